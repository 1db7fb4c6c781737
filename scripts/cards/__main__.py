"""python -m scripts.cards --folder runs/demo/causal --facts tests/data/card_facts.json --results tests/data/card_results.json

Write README.md, the model card, into a saved model's folder. Facts and results are described in scripts/cards/card.py.
--published does so for every model of model_cards/, and prints the table of the README. Their folders hold no code:
pushing adds it (flash_hf.hub.add_code, push_with_code), and their cards say so.
"""  # noqa: E501

import argparse
import json
from pathlib import Path

from flash_hf.commands.options import OptionParser, read_json, run_command

from .card import make_card, published


# What the README shows of the results: model, metric, data set, split, and how to say it.
SHOWN = (
    ("flash-7m-causal", "bits_per_byte", "books_valid", "validation", "bits a byte of twenty held-out books"),
    ("flash-7m-causal", "perplexity", "books_valid", "validation", "perplexity by token"),
    ("flash-7m-causal", "word_perplexity", "books_valid", "validation", "perplexity by word"),
    ("flash-7m-causal", "acc_norm", "book_next", "test",
     "which of four sentences comes next, accuracy (chance: 0.25)"),
    ("flash-7m-masked", "masked_accuracy", "passages_valid", "validation, first 1000 documents",
     "accuracy on masked tokens, 15 % of held-out passages"),
    ("flash-7m-masked", "perplexity of masked tokens", "passages_valid", "validation, first 1000 documents",
     "perplexity of these"),
    ("flash-7m-masked", "pseudo_perplexity", "sentences_valid", "validation, first 100 documents",
     "pseudo-perplexity of held-out short passages"),
)  # fmt: skip
CARDS = Path(__file__).resolve().parents[2] / "model_cards"
TEMPLATE = CARDS / "TEMPLATE.md"


def table() -> str:
    """The README's table of the published models."""
    lines = ["| checkpoint | measured | value |", "| --- | --- | --- |"]
    for name, *key, words in SHOWN:
        results = json.loads((CARDS / name / "results.json").read_text(encoding="utf-8"))
        value = next(row["value"] for row in results if [row["metric"], row["dataset"], row["split"]] == key)
        lines.append(f"| [{name}](model_cards/{name}/README.md) | {words} | {value:.4g} |")
    return "\n".join(lines)


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, help="the saved model")
    parser.add_argument("--facts", type=Path, help="JSON object of facts")
    parser.add_argument("--results", type=Path, help="JSON list of results, [] if there are none")
    parser.add_argument("--published", action="store_true", help="all models of model_cards/ instead of one")
    parser.add_argument("--template", default=TEMPLATE, type=Path, help="Jinja template of the card")
    args = parser.parse_args()
    one = (args.folder, args.facts, args.results)
    if args.published == any(one) or not (args.published or all(one)):
        parser.error("give --folder, --facts and --results, or --published alone")

    for folder, facts, results in published(CARDS) if args.published else [one]:
        facts, results = read_json(facts, dict), read_json(results, list)
        make_card(folder, facts, results, args.template, has_code=args.published or None).save(folder / "README.md")
        print(folder / "README.md")
    if args.published:
        print(table())


if __name__ == "__main__":
    run_command(main)
