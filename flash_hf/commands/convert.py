# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint of another FLASH implementation (JunnYu's FLASH and FLASHQuad, lucidrains' FLASH-pytorch) to a
folder for from_pretrained. The converted model computes the same function; where that is impossible, the reason is
printed instead."""

import argparse
import json
from pathlib import Path

import torch

from ..convert import CONVERTERS, convert, detect_kind, read_state_dict, save_tokenizer
from .options import OptionParser, natural, program_name


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="original weights: .bin, .pt or .safetensors, or a folder with one of them")
    parser.add_argument("output", help="folder for config, weights and tokenizer")
    parser.add_argument("--kind", choices=tuple(CONVERTERS), help="kind of checkpoint; default: detected")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the output; default: float32",
    )
    parser.add_argument("--encoder_only", action="store_true", help="make a FlashModel, without language-model head")
    junnyu = parser.add_argument_group("JunnYu's FLASH")
    junnyu.add_argument(
        "--padded_length", type=int,
        help="tokens that inputs of the original are padded to, 0 for no padding; default: 512, as the public "
        "checkpoints were trained",
    )  # fmt: skip
    lucidrains = parser.add_argument_group("FLASH-pytorch: constructor arguments, which its checkpoints do not store")
    flag = argparse.BooleanOptionalAction
    lucidrains.add_argument("--causal", action=flag, help="causal; required")
    lucidrains.add_argument("--shift", action=flag, help="shift_tokens; required; FLASHTransformer's default is True")
    lucidrains.add_argument("--chunk_size", type=natural, help="group_size in tokens; default: 256")
    lucidrains.add_argument("--laplace", action="store_true", help="laplace_attn_fn=True")
    lucidrains.add_argument("--separate_groups", action="store_true", help="reduce_group_non_causal_attn=False")
    args = parser.parse_args()
    if Path(args.output).is_file():
        parser.error(f"output must be a folder, and {args.output} is a file")
    if Path(args.output).is_dir() and any(Path(args.output).iterdir()):
        parser.error(f"output must be a new or empty folder, and {args.output} holds files. Choose another one")

    state, settings = read_state_dict(args.input)
    kind = args.kind or detect_kind(state)
    given = {
        "encoder_only": args.encoder_only or None,
        "causal": args.causal,
        "shift_tokens": args.shift,
        "group_size": args.chunk_size,
        "laplace_attn_fn": args.laplace or None,
        "reduce_group_non_causal_attn": False if args.separate_groups else None,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if args.padded_length is not None:
        options["padded_length"] = args.padded_length or None
    if kind.startswith("junnyu"):
        options["settings"] = settings
    converted = convert(state, kind=kind, **options)
    model = converted.build().to(getattr(torch, args.dtype))
    model.save_pretrained(args.output)
    try:
        tokenizer = save_tokenizer(args.input, args.output)
    except ValueError as error:
        parser.exit(2, f"{program_name()}: {error}\n")
    report = {
        "kind": kind, "class": converted.architecture, "output": args.output, "parameters": model.num_parameters(),
        "tokenizer": tokenizer, "notes": converted.notes,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
