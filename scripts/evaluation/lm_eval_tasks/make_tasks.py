"""\
python -m scripts.evaluation.lm_eval_tasks.make_tasks --books tests/data/wizard_of_oz.txt --output runs/tasks

Make the questions of book_cloze and book_next from books. Those in this folder come from two public-domain books that
the checkpoints of this repository were not trained on: "The Wind in the Willows" (Kenneth Grahame, 1859-1932;
published in 1908) and "Looking Backward" (Edward Bellamy, 1850-1898; published in 1888).
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from flash_hf.commands.options import OptionParser, natural, run_command, seed


CONTEXT_WORDS = 60  # minimum
SENTENCE = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"']))\s+(?=[\"'A-Z])")


def sentences(text: str) -> list[str]:
    """The sentences of a text in order, without headings, with single spaces."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if re.search(r"[.!?][\"']?$", part.strip())]
    return [sentence for part in paragraphs for sentence in SENTENCE.split(part)]


def contexts(parts: list[str]) -> Iterator[tuple[str, int]]:
    """For each sentence with enough text before it: that text, from the start of a sentence, and its number."""
    words = [len(part.split()) for part in parts]
    for number in range(len(parts)):
        begin, length = number, 0
        while begin > 0 and length < CONTEXT_WORDS:
            begin -= 1
            length += words[begin]
        if length >= CONTEXT_WORDS:
            yield " ".join(parts[begin:number]), number


def cloze(parts: list[str]) -> list[dict]:
    """Passages whose last word, of five letters or more, occurs earlier in the passage."""
    rows = []
    for before, number in contexts(parts):
        match = re.fullmatch(r"(.+ )([A-Za-z]{5,})[.!?][\"']?", parts[number])
        if match and re.search(rf"\b{match[2]}\b", before):
            rows.append({"context": f"{before} {match[1].rstrip()}", "word": match[2]})
    return rows


def following(parts: list[str], generator: random.Random) -> list[dict]:
    """Passages with four sentences each: the next one, and three of similar length from elsewhere in the book."""
    rows = []
    for before, number in contexts(parts):
        true, length = parts[number], len(parts[number].split())
        if length < 8 or number % 5:  # every fifth sentence is enough
            continue
        others = {
            part for place, part in enumerate(parts)
            if abs(place - number) >= 50 and abs(len(part.split()) - length) <= 2 and part != true
        }  # fmt: skip
        if len(others) >= 3:
            choices = [true, *generator.sample(sorted(others), 3)]
            generator.shuffle(choices)
            rows.append({"context": before, "choices": choices, "answer": choices.index(true)})
    return rows


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", nargs="+", required=True, help="texts, in the formats of the training commands")
    parser.add_argument("--questions", type=natural, default=200, help="maximum number of questions per task")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the .jsonl files")
    args = parser.parse_args()
    from flash_hf.training import load_documents

    generator = random.Random(args.seed)
    books = [sentences(row["text"]) for row in load_documents(args.books)]
    rows = {
        "book_cloze": [row for parts in books for row in cloze(parts)],
        "book_next": [row for parts in books for row in following(parts, generator)],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, questions in rows.items():
        chosen = generator.sample(questions, min(args.questions, len(questions)))
        path = args.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        print(f"{path}: {len(chosen)} of {len(questions)} questions")


if __name__ == "__main__":
    run_command(main)
