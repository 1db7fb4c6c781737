# SPDX-License-Identifier: Apache-2.0
"""Continue a text with a causal model. Text is printed as it is generated, the speed at the end on stderr."""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from ..sources import load_named, read_text
from .options import OptionParser, find_device, natural, number, seed


def main() -> None:
    parser = OptionParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or name on the Hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompt_file", help="file with the text to continue; - for stdin")
    parser.add_argument("--greedy", action="store_true", help="take the most likely token instead of sampling")
    for name, kind, default, words in (
        ("max_new_tokens", natural, 200, "tokens to generate"),
        ("temperature", number(float, above=0), 0.8, "of sampling; below 1 favors likely tokens"),
        ("top_k", number(int, least=0), 50, "sample from this many most likely tokens, 0 for all"),
        ("top_p", number(float, above=0, most=1), 0.95, "sample from the most likely tokens, of this probability"),
        ("repetition_penalty", number(float, above=0), 1.0, "above 1 makes repetitions less likely"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{words}; default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of sampling; default: %(default)s")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; default: auto, as saved")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: the accelerator, if any")
    args = parser.parse_args()

    if args.prompt is not None:
        prompt = args.prompt
    else:
        prompt = sys.stdin.read() if args.prompt_file == "-" else read_text(args.prompt_file)
    if not prompt.strip():
        parser.error("the prompt is empty: give at least one word")
    if Path(args.model).is_dir() and not Path(args.model, "config.json").is_file():
        parser.error(f"--model must be a folder with a model; {args.model} has no config.json")
    device = find_device(args.device)
    model = load_named(AutoModelForCausalLM.from_pretrained, args.model, option="--model", dtype=args.dtype)
    model = model.to(device).eval()
    tokenizer = load_named(AutoTokenizer.from_pretrained, args.model, option="--model")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    sampling = {"do_sample": False}
    if not args.greedy:
        names = ("temperature", "top_k", "top_p")
        sampling = {"do_sample": True, **{name: getattr(args, name) for name in names}}
    with torch.no_grad():
        model(inputs["input_ids"][:, :1])  # the model's warnings come now, not in the middle of the text
    set_seed(args.seed)
    begin = time.perf_counter()
    options = {"max_new_tokens": args.max_new_tokens, "repetition_penalty": args.repetition_penalty, **sampling}
    output = model.generate(**inputs, **options, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
    seconds, read = time.perf_counter() - begin, inputs["input_ids"].shape[1]
    count = output.shape[1] - read
    speed = f"{count / seconds:.1f} tokens/s"
    print(f"{read} prompt tokens, {count} new ones in {seconds:.2f} s: {speed}", file=sys.stderr)
