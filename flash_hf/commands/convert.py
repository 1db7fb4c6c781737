# SPDX-License-Identifier: Apache-2.0
"""Convert a checkpoint of another FLASH implementation (JunnYu's FLASH and FLASHQuad, lucidrains' FLASH-pytorch) to a
folder for from_pretrained. The converted model computes the same function; where that is impossible, the reason is
printed instead."""

import argparse
import json
from pathlib import Path

import torch

from ..convert import CONVERTERS, convert, detect_kind, read_state_dict, save_tokenizer
from .options import OptionParser, natural, number


def main() -> None:
    parser = OptionParser(description=__doc__, argument_default=argparse.SUPPRESS)  # only what is given is an option
    parser.add_argument("input", help="original weights: .bin, .pt or .safetensors, or a folder with one of them")
    parser.add_argument("output", help="folder for config, weights and tokenizer")
    parser.add_argument("--kind", choices=tuple(CONVERTERS), help="kind of checkpoint; default: detected")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the output; default: %(default)s")
    parser.add_argument("--encoder_only", action="store_true", help="make a FlashModel, without language-model head")
    junnyu = parser.add_argument_group("JunnYu's FLASH")
    junnyu.add_argument(
        "--padded_length", type=number(int, least=0),
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
    options = vars(parser.parse_args())
    source, output, dtype = options.pop("input"), Path(options.pop("output")), options.pop("dtype")
    if output.is_file():
        parser.error(f"output must be a folder, and {output} is a file")
    if output.is_dir() and any(output.iterdir()):
        parser.error(f"output must be a new or empty folder, and {output} holds files. Choose another one")
    state, settings = read_state_dict(source)
    kind = options.pop("kind", None) or detect_kind(state)
    if kind.startswith("junnyu"):
        options["settings"] = settings
    converted = convert(state, kind=kind, **options)
    model = converted.build().to(getattr(torch, dtype))
    model.save_pretrained(output)
    tokenizer = save_tokenizer(source, output)
    report = {
        "kind": kind, "class": converted.architecture, "output": str(output), "parameters": model.num_parameters(),
        "tokenizer": tokenizer, "notes": converted.notes,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
