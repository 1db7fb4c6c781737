"""python -m scripts.cards --folder runs/demo/causal --facts tests/data/card_facts.json --results tests/data/card_results.json

Write README.md, the model card, into a saved model's folder. Facts and results are described in scripts/cards/card.py.
--published does so for every model in model_cards/ and prints the table of checkpoints in README.md. These folders hold
no code, since pushing adds it (flash_hf.push_with_code), but their cards are those of the pushed repositories.
"""  # noqa: E501

import argparse
from pathlib import Path

from flash_hf.commands.options import OptionParser, run_command
from flash_hf.sources import read_json

from .card import make_card, published, shown_results


SHOWN = 3  # numbers of each card in the README
CARDS = Path(__file__).resolve().parents[2] / "model_cards"
TEMPLATE = CARDS / "TEMPLATE.md"


def table() -> str:
    """The table of checkpoints in README.md."""
    lines = ["| checkpoint | measured | value |", "| --- | --- | --- |"]
    for folder, facts, results in published(CARDS):
        for result in shown_results(read_json(facts, dict), read_json(results, list))[:SHOWN]:
            lines.append(f"| [{folder.name}] | {result['label']} | {result['value']:.4g} |")
    return "\n".join(lines)


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", type=Path, help="the saved model")
    parser.add_argument("--facts", type=Path, help="JSON object of facts")
    parser.add_argument("--results", type=Path, help="JSON list of results, [] if there are none")
    parser.add_argument("--published", action="store_true", help="all models in model_cards/ instead of one")
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
