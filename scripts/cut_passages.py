"""python scripts/cut_passages.py --files tests/data/wizard_of_oz.txt --output runs/passages.jsonl

Cut documents at paragraphs into passages of all lengths, one JSON object per line, in random order: training text for
a masked model of single sentences as well as whole chapters.

A masked model trained on full blocks alone never sees a short input, where FLASH's sums over chunk and document have
other magnitudes. A causal model has no such gap, since each of its blocks starts with short contexts.
"""

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from flash_hf.commands.options import OptionParser, natural, run_command, seed


def cut_passages(text: str, generator: random.Random, *, shortest: int, longest: int) -> Iterator[str]:
    """Cut a text at blank lines into passages whose minimum number of words is sampled log-uniformly.

    Nothing is left out and no paragraph is cut, so a passage may be longer than sampled, and the last one shorter.

    Args:
        generator: Source of the lengths.
        shortest, longest: Bounds of the sampled lengths, in words.

    Raises:
        ValueError: bounds below 1, or in the wrong order.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest and longest must satisfy 1 <= shortest <= longest, got {shortest} and {longest}.")
    paragraphs, words, wanted = [], 0, 0.0
    for paragraph in text.split("\n\n"):
        if not paragraphs:
            wanted = math.exp(generator.uniform(math.log(shortest), math.log(longest)))
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
    """[`cut_passages`] of rows with the column `text`, as rows in the same order."""
    generator = random.Random(seed)
    for document in documents:
        for passage in cut_passages(document["text"] or "", generator, shortest=shortest, longest=longest):
            yield {"text": passage}


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--files", nargs="+", required=True, help="texts, in the formats of train_mlm.py")
    parser.add_argument("--output", required=True, type=Path, help=".jsonl file to write")
    parser.add_argument("--shortest", type=natural, default=8, help="smallest sampled length, in words")
    parser.add_argument("--longest", type=natural, default=2048, help="largest sampled length, in words")
    parser.add_argument(
        "--max_documents", type=natural, default=None, help="use the first documents of each file only"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of lengths and order")
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
