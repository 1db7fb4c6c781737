"""python -m scripts.embedding.train --model model_cards/flash-30m-masked --pairs tests/data/wizard_of_oz.txt --output_dir runs/embedder

Fine-tune an encoder to embed texts with sentence-transformers: on the halves of paragraphs (--pairs), which belong
together, and on sentence pairs with scores, such as STS-B's (--scores: CSV or TSV with the columns sentence1, sentence2
and score). Spearman's correlation of the cosines with the scores is measured before and after, on --test_scores and on
the part of --scores that --validation_fraction holds out, by which to choose settings. OUTPUT_DIR/results.json has it
with the settings, the versions and the machine.
"""  # noqa: E501

import argparse
import contextlib
import json
import random
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from flash_hf.commands.options import OptionParser, natural, number, run_command, seed
from flash_hf.hub import add_code
from flash_hf.sources import load_named, read_json

from .. import baselines  # noqa: F401  registers Transformer++
from ..provenance import program_words, provenance, write_json


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


def hold_out(rows: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and a random `fraction` of them, the same for every seed of the training."""
    chosen = {*random.Random(0).sample(range(len(rows)), round(fraction * len(rows)))}
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an encoder")
    parser.add_argument("--pairs", nargs="+", type=Path, help="texts (.txt, .jsonl): paragraphs between blank lines")
    parser.add_argument("--scores", type=Path, help="pairs with scores from 0 to 5 to train on; after --pairs")
    parser.add_argument("--test_scores", type=Path, help="pairs with scores to measure")
    parser.add_argument(
        "--validation_fraction", type=number(float, least=0, most=0.5), default=0.0,
        help="share of --scores held out and measured; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--max_pairs", type=natural, default=50_000, help="halves of paragraphs; default: %(default)s")
    parser.add_argument("--shortest", type=natural, default=40, help="words of a paragraph; default: %(default)s")
    parser.add_argument("--max_length", type=natural, default=128, help="tokens in training; default: %(default)s")
    parser.add_argument(
        "--epochs", type=number(float, least=0), default=2,
        help="over --scores; 0 measures without training on them; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=natural, default=64, help="default: %(default)s")
    parser.add_argument("--learning_rate", type=number(float, above=0), default=3e-4, help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 with float32 weights")
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
    pairs = [] if args.pairs is None else list(halves(load_documents(args.pairs)["text"], args.shortest))
    random.Random(args.seed).shuffle(pairs)
    pairs = pairs[: args.max_pairs]
    scores, held_out = [], []
    if args.scores is not None:
        scores, held_out = hold_out(read_scores(args.scores), args.validation_fraction)
    test = [] if args.test_scores is None else read_scores(args.test_scores)
    results = {
        "command": shlex.join([*program_words(), *sys.argv[1:]]),
        "examples": {"pairs": len(pairs), "scores": len(scores), "validation": len(held_out), "test": len(test)},
        "parameters": model[0].auto_model.num_parameters(),
        "train_seconds": 0.0,
    }

    def measure() -> dict[str, float]:
        found = {}
        for name, rows in (("validation_spearman", held_out), ("test_spearman", test)):
            if rows:
                columns = map(list, zip(*(row.values() for row in rows), strict=True))
                evaluator = EmbeddingSimilarityEvaluator(
                    *columns, batch_size=args.batch_size, main_similarity="cosine", write_csv=False
                )
                found[name] = evaluator(model)["spearman_cosine"]
        return found

    def train(rows: list[dict], loss: torch.nn.Module, epochs: float) -> None:
        arguments = SentenceTransformerTrainingArguments(
            str(args.output_dir / "trainer"),
            num_train_epochs=epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            bf16=args.bf16,
            use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
            seed=args.seed,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            disable_tqdm=False,
        )
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_list(rows), loss=loss)
        with contextlib.redirect_stdout(sys.stderr):  # the trainer's log
            results["train_seconds"] += trainer.train().metrics["train_runtime"]
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # end autocast, for measuring

    results["before"] = measure()
    longest, model.max_seq_length = model.max_seq_length, args.max_length
    if pairs:
        train(pairs, losses.MultipleNegativesRankingLoss(model), epochs=1)
    if scores and args.epochs:
        train(scores, losses.CoSENTLoss(model), epochs=args.epochs)
    model.max_seq_length = longest
    results["after"] = measure()
    model.save_pretrained(str(args.output_dir))
    if read_json(args.output_dir / "config.json", dict).get("model_type") == "flash_gau":
        add_code(args.output_dir)
    write_json(args.output_dir / "results.json", results | provenance())
    print(json.dumps({key: results[key] for key in ("before", "after")}, indent=2))


if __name__ == "__main__":
    run_command(main)
