"""python scripts/make_card.py --folder runs/demo/causal --facts tests/data/card_facts.json --results tests/data/card_results.json

Write README.md, the model card, into a saved model's folder. Facts and results are described in flash_hf/cards.py.
"""  # noqa: E501

import argparse
import json
from pathlib import Path

from flash_hf.cards import make_card


TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "TEMPLATE.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path, help="the saved model")
    parser.add_argument("--facts", required=True, type=Path, help="JSON object of facts")
    parser.add_argument("--results", required=True, type=Path, help="JSON list of results, [] if there are none")
    parser.add_argument("--template", default=TEMPLATE, type=Path, help="Jinja template of the card")
    args = parser.parse_args()

    facts, results = (json.loads(path.read_text(encoding="utf-8")) for path in (args.facts, args.results))
    make_card(args.folder, facts, results, args.template).save(args.folder / "README.md")
    print(args.folder / "README.md")


if __name__ == "__main__":
    main()
