"""python scripts/make_card.py --folder runs/demo/causal --facts tests/data/card_facts.json --results tests/data/card_results.json

Write README.md, the model card, into a saved model's folder. Facts and results are described in flash_hf/cards.py.
--published does so for every model of model_cards/, and brings the code in their folders up to date.
"""  # noqa: E501

import argparse
import json
from pathlib import Path

from flash_hf.cards import make_card, published
from flash_hf.hub import add_code


CARDS = Path(__file__).resolve().parent.parent / "model_cards"
TEMPLATE = CARDS / "TEMPLATE.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
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
        if args.published:
            add_code(folder)
        facts, results = (json.loads(path.read_text(encoding="utf-8")) for path in (facts, results))
        make_card(folder, facts, results, args.template).save(folder / "README.md")
        print(folder / "README.md")


if __name__ == "__main__":
    main()
