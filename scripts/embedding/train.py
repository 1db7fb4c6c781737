"""python -m scripts.embedding.train --model model_cards/flash-30m-masked --pairs tests/data/wizard_of_oz.txt --output_dir runs/embedder

Fine-tune an encoder to embed texts with sentence-transformers: on the halves of paragraphs (--pairs), which belong
together, and on sentence pairs with scores, such as STS-B's (--scores: CSV or TSV with the columns sentence1, sentence2
and score). --test_scores is measured before and after: Spearman's correlation of the cosines with the scores.
"""  # noqa: E501

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from flash_hf.commands.options import OptionParser, natural, number, run_command, seed
from flash_hf.hub import add_code, read_config
from flash_hf.sources import load_named


SCORED = {"sentence1": "", "sentence2": "", "score": "The last column of STS-B is called so."}


def halves(texts: list[str], shortest: int) -> Iterator[dict[str, str]]:
    """Both halves of each paragraph of at least `shortest` words."""
    for text in texts:
        for paragraph in text.split("\n\n"):
            words = paragraph.split()
            if len(words) >= shortest:
                middle = len(words) // 2
                yield {"anchor": " ".join(words[:middle]), "positive": " ".join(words[middle:])}


def read_scores(path: Path) -> list[dict]:
    """Rows of sentence1, sentence2 and score, 0 to 1 (a fifth of STS-B's)."""
    from flash_hf.training.documents import read_rows

    rows = [row for _, row in read_rows(path, SCORED, quotes=path.suffix == ".csv")]
    return [{**row, "score": float(row["score"]) / 5} for row in rows]


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an encoder")
    parser.add_argument("--pairs", nargs="+", type=Path, help="texts (.txt, .jsonl): paragraphs between blank lines")
    parser.add_argument("--scores", type=Path, help="pairs with scores from 0 to 5 to train on; after --pairs")
    parser.add_argument("--test_scores", type=Path, help="pairs with scores to measure")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--max_pairs", type=natural, default=50_000, help="halves of paragraphs; default: %(default)s")
    parser.add_argument("--shortest", type=natural, default=40, help="words of a paragraph; default: %(default)s")
    parser.add_argument("--max_length", type=natural, default=128, help="tokens in training; default: %(default)s")
    parser.add_argument("--epochs", type=number(float, above=0), default=2, help="over --scores; default: %(default)s")
    parser.add_argument("--batch_size", type=natural, default=64, help="default: %(default)s")
    parser.add_argument("--learning_rate", type=number(float, above=0), default=3e-4, help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    args = parser.parse_args()
    if args.pairs is None and args.scores is None:
        parser.error("give --pairs, --scores or both")

    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
    from transformers import set_seed

    from flash_hf.training.documents import load_documents

    set_seed(args.seed)
    model = load_named(SentenceTransformer, args.model, option="--model", model_kwargs={"dtype": torch.float32})
    results = {}

    def measure(name: str) -> None:
        if args.test_scores is not None:
            columns = zip(*(row.values() for row in read_scores(args.test_scores)), strict=True)
            evaluator = EmbeddingSimilarityEvaluator(*map(list, columns), main_similarity="cosine", write_csv=False)
            results[name] = {"spearman": evaluator(model)["spearman_cosine"]}

    def train(rows: list[dict], loss: torch.nn.Module, epochs: float) -> None:
        arguments = SentenceTransformerTrainingArguments(
            str(args.output_dir / "trainer"),
            num_train_epochs=epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            seed=args.seed,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            disable_tqdm=False,
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_list(rows), loss=loss)
        with contextlib.redirect_stdout(sys.stderr):  # the trainer's log
            trainer.train()

    measure("before")
    longest, model.max_seq_length = model.max_seq_length, args.max_length
    if args.pairs is not None:
        rows = list(halves(load_documents(args.pairs)["text"], args.shortest))
        random.Random(args.seed).shuffle(rows)
        train(rows[: args.max_pairs], losses.MultipleNegativesRankingLoss(model), epochs=1)
    if args.scores is not None:
        train(read_scores(args.scores), losses.CoSENTLoss(model), epochs=args.epochs)
    model.max_seq_length = longest
    measure("after")
    model.save_pretrained(str(args.output_dir))
    if read_config(args.output_dir)["model_type"] == "flash_gau":
        add_code(args.output_dir)
    print(json.dumps({"output_dir": str(args.output_dir), **results}, indent=2))


if __name__ == "__main__":
    run_command(main)
