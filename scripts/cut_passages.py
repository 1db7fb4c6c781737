"""python scripts/cut_passages.py --files tests/data/wizard_of_oz.txt --output runs/passages.jsonl

Cut documents at their paragraphs into passages of all lengths, one JSON object a line, in random order: training text
for a masked model that is to read single sentences as well as whole chapters.
"""

import argparse
import json
import random
from pathlib import Path

from flash_hf.command_line import OptionParser, natural, run_command, seed


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--files", nargs="+", required=True, help="texts, as train_mlm.py takes them")
    parser.add_argument("--output", required=True, type=Path, help=".jsonl file to write")
    parser.add_argument("--shortest", type=natural, default=8, help="words that are drawn at least")
    parser.add_argument("--longest", type=natural, default=2048, help="words that are drawn at most")
    parser.add_argument("--max_documents", type=natural, default=None, help="of each file, the first ones only")
    parser.add_argument("--seed", type=seed, default=0, help="of lengths and order")
    args = parser.parse_args()
    from flash_hf.data import load_documents
    from flash_hf.passages import passages

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
