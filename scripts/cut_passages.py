"""python scripts/cut_passages.py --files tests/data/wizard_of_oz.txt --output runs/passages.jsonl

Cut documents at their paragraphs into passages of all lengths, one JSON object a line, in random order: training text
for a masked model that is to read single sentences as well as whole chapters.

A model trained on full blocks alone has never seen a short input, and FLASH's sums over a chunk and over a document
come out differently there. A causal model has no such gap: each of its blocks begins with short contexts.
"""

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from flash_hf.commands.options import OptionParser, natural, run_command, seed


def cut_passages(text: str, draw: random.Random, *, shortest: int, longest: int) -> Iterator[str]:
    """Cut a text at its blank lines into passages of at least so many words as each time drawn, log-uniformly.

    Nothing is left out and no paragraph is cut, so a passage may be longer than drawn, and the last one shorter.

    Args:
        draw: where the lengths come from.
        shortest, longest: words; the bounds of what is drawn.

    Raises:
        ValueError: bounds that are none.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest and longest must satisfy 1 <= shortest <= longest, got {shortest} and {longest}.")
    paragraphs, words, wanted = [], 0, 0.0
    for paragraph in text.split("\n\n"):
        if not paragraphs:
            wanted = math.exp(draw.uniform(math.log(shortest), math.log(longest)))
        paragraphs.append(paragraph)
        words += len(paragraph.split())
        if words >= wanted:
            yield "\n\n".join(paragraphs)
            paragraphs, words = [], 0
    if words:
        yield "\n\n".join(paragraphs)


def passages(
    documents: Iterable[dict], *, shortest: int = 8, longest: int = 2048, seed: int = 0
) -> Iterator[dict[str, str]]:
    """[`cut_passages`] of rows with the column `text`, as rows again, in their order."""
    draw = random.Random(seed)
    for document in documents:
        for passage in cut_passages(document["text"] or "", draw, shortest=shortest, longest=longest):
            yield {"text": passage}


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--files", nargs="+", required=True, help="texts, as train_mlm.py takes them")
    parser.add_argument("--output", required=True, type=Path, help=".jsonl file to write")
    parser.add_argument("--shortest", type=natural, default=8, help="words that are drawn at least")
    parser.add_argument("--longest", type=natural, default=2048, help="words that are drawn at most")
    parser.add_argument("--max_documents", type=natural, default=None, help="of each file, the first ones only")
    parser.add_argument("--seed", type=seed, default=0, help="of lengths and order")
    args = parser.parse_args()
    from flash_hf.training import load_documents

    rows = []
    for file in args.files:
        documents = load_documents(file, max_documents=args.max_documents)
        rows += passages(documents, shortest=args.shortest, longest=args.longest, seed=args.seed)
    random.Random(args.seed).shuffle(rows)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} passages, {sum(len(row['text'].split()) for row in rows)} words, in {args.output}")


if __name__ == "__main__":
    run_command(main)
