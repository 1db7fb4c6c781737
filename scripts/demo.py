"""python scripts/demo.py

Everything once on a CPU, in about two minutes: generate and fill masks with the checkpoints of this repository, then
train a tiny causal and a tiny masked FLASH on a book, report perplexity before and after, save, reload through the
Auto classes, continue a text and fill in a mask.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline, set_seed

from flash_hf.commands.options import OptionParser, natural, number, run_command


ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "tests" / "data" / "wizard_of_oz.txt"
CHECKPOINTS = ROOT / "model_cards"
PROMPT = "Dorothy looked at the Tin Woodman and said,"
MASKED = "The Scarecrow and the Tin {mask} walked along the road of yellow brick."
OPENING = "It was a cold evening in November, and the old house"
SENTENCE = "I have never {mask} such a thing in all my life."


def continue_text(folder: Path, prompt: str) -> str:
    """Sample a continuation, printed as it is generated; returns prompt and continuation."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    set_seed(0)
    tokens = model.generate(
        **tokenizer(prompt, return_tensors="pt"),
        max_new_tokens=120,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def fill_in(folder: Path, sentence: str) -> None:
    """Print the most likely words for `{mask}` in the sentence."""
    fill_mask = pipeline("fill-mask", model=str(folder), dtype=torch.float32)
    question = sentence.format(mask=fill_mask.tokenizer.mask_token)
    print(question)
    for answer in fill_mask(question):
        print(f"  {answer['score']:6.1%} {answer['token_str']!r}")


def train(kind: str, output_dir: Path, args: argparse.Namespace, steps: int, *more: str) -> dict:
    """Train a model of `kind` into `output_dir`, print the table of metrics, return the result."""
    from flash_hf.commands.train import parse_arguments
    from flash_hf.training import describe, run_training

    print(f"\n=== Training a {kind} FLASH on {args.book.name}: {steps} steps ===", flush=True)
    arguments = {
        "train_file": args.book,
        "validation_fraction": 0.1,
        "config_overrides": args.config_overrides,
        "tokenizer_vocab_size": args.vocab_size,
        "block_size": 128,
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "warmup_steps": 0.1,
        "learning_rate": args.learning_rate,
        "eval_steps": max(1, steps // 6),
        "logging_steps": max(1, steps // 20),
        "save_steps": steps,
        "output_dir": output_dir,
    }
    command = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    result = run_training(kind, *parse_arguments([*command, "--overwrite_output_dir", *more]))
    print(describe(kind, result), flush=True)
    return result


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--book", type=Path, default=BOOK, help="text to train on")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="folder of all outputs")
    parser.add_argument("--causal_steps", type=natural, default=600, help="training steps of the causal model")
    parser.add_argument("--masked_steps", type=natural, default=1200, help="training steps of the masked model")
    parser.add_argument("--learning_rate", type=number(float, above=0), default=3e-3, help="peak learning rate")
    parser.add_argument("--vocab_size", type=natural, default=1024, help="size of the tokenizer")
    parser.add_argument(
        "--config_overrides",
        default="hidden_size=128,num_hidden_layers=2,query_key_dim=64,chunk_size=64,initializer_range=0.05",
        help="fields of FlashConfig",
    )
    args = parser.parse_args()
    if not args.book.is_file():
        parser.error(f"--book must be a text file, got {args.book}")
    # Models this small gain little from a second core, and lose much when another program uses it.
    torch.set_num_threads(1)
    begin = time.perf_counter()
    causal_dir, masked_dir = args.output_dir / "causal", args.output_dir / "masked"

    print("\n=== model_cards/flash-30m-causal, trained on books, continues a text ===", flush=True)
    continue_text(CHECKPOINTS / "flash-30m-causal", OPENING)
    print("\n=== model_cards/flash-30m-masked, trained on books and articles, fills in a word ===")
    fill_in(CHECKPOINTS / "flash-30m-masked", SENTENCE)

    causal = train("causal", causal_dir, args, args.causal_steps)
    masked = train("masked", masked_dir, args, args.masked_steps, "--tokenizer", str(causal_dir))

    print("\n=== The causal model, loaded again, continues a text ===", flush=True)
    text = args.output_dir / "text.txt"
    text.write_text(continue_text(causal_dir, PROMPT) + "\n", encoding="utf-8")
    print("\n=== The masked model, loaded again, fills in a word ===")
    fill_in(masked_dir, MASKED)

    print(
        f"\nDone in {time.perf_counter() - begin:.0f} s. Perplexity on the last tenth of the book, before and after:"
    )
    for name, result in (("causal", causal), ("masked", masked)):
        before, after = (result[when]["eval_perplexity"] for when in ("before", "after"))
        print(f"  {name}: {before:,.0f} -> {after:,.1f}   checkpoint {result['output_dir']}   plot {result['plot']}")
    print(f"  text: {text}")


if __name__ == "__main__":
    run_command(main)
