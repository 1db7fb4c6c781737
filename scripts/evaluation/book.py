"""\
python -m scripts.evaluation.book --model model_cards/flash-30m-causal --book tests/data/wizard_of_oz.txt

Read a whole book into a state of constant size and continue it, printing time and the memory of state and process
while reading. Runs on a laptop CPU.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer, set_seed

from flash_hf.commands.options import OptionParser, natural, number, run_command, seed
from flash_hf.sources import load_named, read_text


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a causal model")
    parser.add_argument("--book", required=True, help="text file to continue")
    parser.add_argument(
        "--tokens", type=number(int, least=2), default=100_000, help="tokens to read; a shorter book is repeated"
    )
    parser.add_argument("--segment", type=natural, default=2048, help="tokens read at once")
    parser.add_argument("--max_new_tokens", type=natural, default=200)
    parser.add_argument("--temperature", type=number(float, above=0), default=0.8)
    parser.add_argument("--top_p", type=number(float, above=0, most=1), default=0.95)
    parser.add_argument("--seed", type=seed, default=0)
    args = parser.parse_args()
    from .cost import cache_bytes, memory_bytes, read_long

    book = read_text(args.book)
    model = load_named(AutoModelForCausalLM.from_pretrained, args.model, option="--model", dtype=torch.float32).eval()
    tokenizer = load_named(AutoTokenizer.from_pretrained, args.model, option="--model")
    ids = tokenizer(book, verbose=False)["input_ids"]
    if len(ids) < 2:
        parser.error(f"{args.book} has no text to continue")
    # Repeat in front, since the end of the book is what is continued.
    ids_N = torch.tensor(ids).repeat(-(-args.tokens // len(ids)))[-args.tokens :]

    cache = DynamicCache(config=model.config)
    print(f"{'tokens read':>12}{'seconds':>10}{'tokens/s':>10}{'state':>12}{'process':>12}")
    marks = [1000 * 10**power for power in range(6)]
    # All but the last token, which generate() reads.
    for at in read_long(model, ids_N[:-1], cache, segment=args.segment, marks=marks):
        sizes = f"{at.cache / 2**20:8.2f} MiB{at.memory / 2**20:8.0f} MiB"
        print(f"{at.tokens:12,}{at.seconds:10.1f}{at.tokens / at.seconds:10.0f}{sizes}", flush=True)

    print("\n..." + tokenizer.decode(ids_N[-60:]), end="", flush=True)
    set_seed(args.seed)
    begin = time.perf_counter()
    tokens = model.generate(
        ids_N[None],
        attention_mask=torch.ones(1, len(ids_N), dtype=torch.long),
        cache=cache,
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    new, seconds = tokens.shape[1] - len(ids_N), time.perf_counter() - begin
    print(
        f"\n{new} tokens generated at {new / seconds:.0f} per second; state {cache_bytes(cache) / 2**20:.2f} MiB, "
        f"process {memory_bytes() / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    run_command(main)
