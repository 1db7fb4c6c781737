"""\
python -m scripts.study.finetune --smoke --work runs/study

FLASH against a Transformer++ of the same size: two masked checkpoints of scripts.study.pretrain, trained on the same
text, are fine-tuned in the same way on labelled sets. The learning rate is chosen for each model and set on the
validation split, from a grid that grows until the best rate has one on either side; with it the test split is measured
over several seeds.

The study consists of cells, each of which writes work/cells/NAME.json; finished cells are not run again, so that an
interrupted study resumes. summary.json (also read back) and summary.md hold the whole study; --render summary.json
prints the section of scripts/results/README.md.
On one GPU: --flash FOLDER --transformer FOLDER --data FOLDER (labelled.tar.xz, unpacked: glue/SST-2, glue/MRPC,
sentence_cls, movie_reviews, wnut17, xquad).
"""

import argparse
import json
import os
import random
import shlex
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, set_seed

from flash_hf import FlashConfig, training
from flash_hf.commands.options import OptionParser, natural, run_command
from flash_hf.hub import vocabulary_size
from flash_hf.sources import read_json
from flash_hf.training.tokenizer import train_tokenizer

from ..baselines import matched_config  # registers Transformer++
from ..finetune.arguments import FinetuningArguments, TaskArguments
from ..finetune.run import card_results as task_card_results
from ..finetune.run import run_finetuning
from ..provenance import program_words, provenance, write_json
from .cell import forget
from .runner import CellRunner, serve


MODELS = ("flash", "transformer_pp")
ROOT = Path(__file__).resolve().parents[2]
# What a score is multiplied by for percent; SQuAD's metric is in percent.
SCALES = {"xquad": 1}
# Beyond an end of the grid, the next of these rates.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def task_options(options: argparse.Namespace) -> dict[str, dict]:
    """The labelled sets: files, epochs, and `batch`, the examples per forward pass; the same for both models."""
    if options.data is None:
        own = ROOT / "tests" / "data"
        tasks = {
            name: {"task": task, "train_file": [str(own / train)], "validation_file": [str(own / valid)],
                   "test_file": [str(own / valid)], "epochs": 1, "batch": 16,
                   "accumulate": 1}
            for name, task, train, valid in (
                ("characters", "classification", "characters_train.jsonl", "characters_validation.jsonl"),
                ("names", "tagging", "names_train.conll", "names_validation.conll"),
            )
        }  # fmt: skip
        return tasks
    folder, made = Path(options.data), Path(options.work) / "data"
    reviews, wnut, glue = folder / "movie_reviews", folder / "wnut17", folder / "glue"
    # The longest ones come first, so that parallel processes end together.
    return {
        # Up to 4,000 tokens each: several processes on one GPU have memory for eight at a time.
        "movie_reviews": {
            "task": "classification", "epochs": 4, "batch": 8, "accumulate": 2,
            "train_file": [str(reviews / "train.jsonl")], "validation_file": [str(reviews / "valid.jsonl")],
            "test_file": [str(reviews / "test.jsonl")],
        },
        "xquad": {
            "task": "qa", "epochs": 10, "batch": 16, "accumulate": 1,
            "train_file": [str(made / "xquad_train.json")], "validation_file": [str(made / "xquad_validation.json")],
            "test_file": [str(made / "xquad_test.json")],
        },
        "sst2": {
            "task": "classification", "epochs": 1, "batch": 128, "accumulate": 1, "text_column": "sentence",
            "train_file": [str(glue / "SST-2" / "train.tsv")], "validation_file": [str(glue / "SST-2" / "dev.tsv")],
            "test_file": [str(made / "sst2_test.tsv")],
        },
        "mrpc": {
            "task": "classification", "epochs": 5, "batch": 32, "accumulate": 1, "text_column": "#1 String",
            "text_pair_column": "#2 String", "label_column": "Quality",
            "train_file": [str(glue / "MRPC" / "train.tsv")], "validation_file": [str(glue / "MRPC" / "dev.tsv")],
            "test_file": [str(made / "mrpc_test.tsv")],
        },
        "wnut17": {
            "task": "tagging", "epochs": 5, "batch": 32, "accumulate": 1,
            "train_file": [str(wnut / "wnut17train.conll")], "validation_file": [str(wnut / "emerging.dev.conll")],
            "test_file": [str(wnut / "emerging.test.annotated")],
        },
    }  # fmt: skip


def prepare(options: argparse.Namespace) -> None:
    """Write the labelled files that are not as `scripts.finetune` reads them, and tiny models for `--smoke`."""
    work = Path(options.work)
    if options.smoke and options.flash is None:
        make_tiny_models(work)
    if options.data is None or (work / "data").is_dir():
        return
    folder, made = Path(options.data), work / "data.part"
    made.mkdir(parents=True, exist_ok=True)
    # GLUE's test splits have no labels. SST-2's is in the Stanford treebank: "label text".
    lines = (folder / "sentence_cls" / "stsa.binary.test").read_text(encoding="utf-8").splitlines()
    rows = [f"{line[2:]}\t{line[0]}" for line in lines if line.strip()]
    (made / "sst2_test.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    shutil.copy(folder / "glue" / "MRPC" / "msr_paraphrase_test.txt", made / "mrpc_test.tsv")
    # XQuAD has no training split: 32, 8 and 8 of its 48 articles.
    squad = read_json(folder / "xquad" / "xquad.en.json", dict)
    articles = random.Random(0).sample(squad["data"], len(squad["data"]))
    for name, part in (("train", articles[:32]), ("validation", articles[32:40]), ("test", articles[40:])):
        write_json(made / f"xquad_{name}.json", {**squad, "data": part})
    made.rename(work / "data")  # complete


def make_tiny_models(work: Path) -> None:
    """FLASH and Transformer++ with random weights, in `work/flash` and `work/transformer_pp`."""
    text = (ROOT / "tests" / "data" / "wizard_of_oz.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer([{"text": text}], 600)
    common = {"vocab_size": vocabulary_size(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    flash = FlashConfig(
        hidden_size=64, num_hidden_layers=2, query_key_dim=32, chunk_size=32, max_position_embeddings=64, **common
    )
    for name, config in (("flash", flash), ("transformer_pp", matched_config("transformer++", flash))):
        if not (work / name).is_dir():
            set_seed(0)
            tokenizer.save_pretrained(work / name)
            AutoModelForMaskedLM.from_config(config).save_pretrained(work / name)


def folder_of(options: argparse.Namespace, name: str) -> Path:
    """The checkpoint that a model starts from."""
    given = {"flash": options.flash, "transformer_pp": options.transformer}[name]
    return Path(options.work) / name if given is None else Path(given)


def pretraining(options: argparse.Namespace, name: str) -> dict:
    """Size, tokens, last learning rate and held-out scores of a checkpoint, from its training.json."""
    folder = folder_of(options, name)
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder))
    found = {"model": name, "parameters": model.num_parameters(), "tokens": 0, "learning_rate": None, "metrics": {}}
    if (folder / "training.json").is_file():
        log = read_json(folder / "training.json", dict)
        found["tokens"] = sum(run["tokens"] for run in log["runs"])
        found["learning_rate"] = log["runs"][-1]["recipe"]["learning_rate"]
        found["metrics"]["validation"] = {row["metric"]: row["value"] for row in log.get("results", ())}
    return found


def tune(options: argparse.Namespace, name: str, task: str, rate: float, seed: int) -> dict:
    work = Path(options.work)
    cuda = torch.cuda.is_available()
    chosen = dict(task_options(options)[task])
    epochs, batch, accumulate = (chosen.pop(name) for name in ("epochs", "batch", "accumulate"))
    cell = cell_name(name, task, rate, seed)
    if options.smoke:
        # The first 400 sentences of WNUT-17 have all of its tags.
        few = 400 if chosen["task"] == "tagging" else 64
        chosen |= {"max_train_examples": few, "max_eval_examples": 32, "max_length": 512}
    args = FinetuningArguments(
        output_dir=str(work / "runs" / cell),
        overwrite_output_dir=True,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="group_by_length",
        learning_rate=rate,
        warmup_steps=0.1,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=50,
        seed=seed,
        bf16=cuda,
        report_to="none",
        disable_tqdm=True,
    )
    start = folder_of(options, name)
    result = run_finetuning(training.ModelArguments(model=str(start)), TaskArguments(**chosen), args, plot=False)
    shutil.rmtree(args.output_dir)  # one model per cell would fill the disk
    return {**result, "kind": "tune", "model": name, "data": task, "pretraining": start.name}


def cell_name(name: str, task: str, rate: float, seed: int) -> str:
    return f"tune-{name}-{task}-{rate:g}-{seed}"


def run_cell(options: argparse.Namespace, cell: str) -> None:
    """Run the cell of this name in this process."""
    begin = time.perf_counter()
    _, name, task, rest = cell.split("-", 3)  # a rate may be 1e-05; names and tasks have no hyphen
    rate, _, seed = rest.rpartition("-")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result = tune(options, name, task, float(rate), int(seed)) | provenance()
    if options.commit:  # for copies without .git
        result["commit"] = options.commit
    result["smoke"] = options.smoke
    result["cell_seconds"] = round(time.perf_counter() - begin, 1)
    if torch.cuda.is_available():
        result["peak_gigabytes"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    write_json(Path(options.work) / "cells" / f"{cell}.json", result)
    forget()


# --- the whole -------------------------------------------------------------------------------------------------------


class Study(CellRunner):
    """The cells of this study and their summary."""

    def __init__(self, options: argparse.Namespace, begin: float):
        self.options, self.work = options, Path(options.work)
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        if options.smoke:
            environment["OMP_NUM_THREADS"] = "1"  # in tests, beside other work
        command = [sys.executable, "-m", "scripts.study.finetune", *sys.argv[1:], "--serve"]
        super().__init__(
            self.work, command, minutes=options.minutes,
            least_seconds=5 if options.smoke else 30, environment=environment, begin=begin,
        )  # fmt: skip
        self.tasks = [task for task in task_options(options) if options.tasks is None or task in options.tasks]

    def grid(self, name: str, task: str) -> tuple[list[float], float | None]:
        """The rates to try, and the one with the best score on the validation split, the lower one of two; None while
        results are missing. The grid grows at the end where the best rate is, up to an end of `RATES`."""
        rates = sorted(self.options.rates)
        while True:
            scores = {}
            for rate in rates:
                result = self.result(cell_name(name, task, rate, 0))
                if result is None:
                    return rates, None
                scores[rate] = result["metrics"]["validation"][result["main_metric"]]
            best = max(scores, key=scores.get)
            more = []
            if best == rates[0]:
                more += [rate for rate in RATES if rate < best][-1:]
            if best == rates[-1]:
                more += [rate for rate in RATES if rate > best][:1]
            if not more:
                return rates, best
            rates = sorted([*rates, *more])

    def wanted(self) -> list[str]:
        """The cells that can be run, as far as results tell: the longest first, and seeds of chosen rates."""
        cells = []
        for task in self.tasks:
            for name in MODELS:
                rates, best = self.grid(name, task)
                cells += [cell_name(name, task, rate, 0) for rate in rates]
                if best is not None:
                    cells += [cell_name(name, task, best, seed) for seed in range(1, self.options.seeds)]
        return [cell for cell in cells if cell not in self.failed and not self.path(cell).is_file()]

    def upcoming(self) -> Iterator[str]:
        """The cells one after the other, waiting for those that others depend on."""
        begun = set()
        while wanted := self.wanted():
            new = next((cell for cell in wanted if cell not in begun), None)
            if new is None:
                time.sleep(0.1)
            else:
                begun.add(new)
                yield new

    def summary(self) -> dict:
        cells = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((self.work / "cells").glob("*.json"))
        }
        table = []
        for task in self.tasks:
            for name in MODELS:
                _, rate = self.grid(name, task)
                if rate is None:
                    continue
                found = [self.result(cell_name(name, task, rate, seed)) for seed in range(self.options.seeds)]
                found = [result for result in found if result is not None]
                row = {"data": task, "model": name, "learning_rate": rate, "seeds": len(found)}
                row |= {"metric": found[0]["main_metric"], "test_examples": found[0]["metrics"]["test"]["examples"]}
                for split in ("validation", "test"):
                    scores = [result["metrics"][split][row["metric"]] for result in found]
                    row[split] = statistics.mean(scores)
                    row[f"{split}_std"] = statistics.stdev(scores) if len(scores) > 1 else None
                table.append(row)
        hidden = ("serve", "work", "out", "render")
        settings = {key: value for key, value in vars(self.options).items() if key not in hidden}
        return {
            "study": "finetune", "command": shlex.join([*program_words(), *sys.argv[1:]]), "settings": settings,
            "pretraining": [pretraining(self.options, name) for name in MODELS], "table": table,
            "failed": self.failed, "seconds": round(self.seconds(), 1), "cells": cells,
        }  # fmt: skip


def as_markdown(summary: dict) -> str:
    lines = ["| pretraining | parameters | tokens | learning rate | masked perplexity | masked accuracy |"]
    lines.append("| --- " * 6 + "|")
    for row in summary["pretraining"]:
        scores = row["metrics"].get("validation", {})
        shown = (row["learning_rate"], scores.get("perplexity"), scores.get("masked_accuracy"))
        cells = ["-" if value is None else f"{value:.4g}" for value in shown]
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:.2f} M | {row['tokens'] / 1e6:.1f} M | {' | '.join(cells)} |"
        )
    lines += ["", "| data | model | learning rate | metric | validation | test | seeds |", "| --- " * 7 + "|"]
    for row in summary["table"]:
        shown, scale = [], SCALES.get(row["data"], 100)
        for split in ("validation", "test"):
            std = row[f"{split}_std"]
            shown.append(f"{scale * row[split]:.2f}" + (f" +- {scale * std:.2f}" if std is not None else ""))
        lines.append(
            f"| {row['data']} | {row['model']} | {row['learning_rate']:g} | {row['metric']} | {' | '.join(shown)} | "
            f"{row['seeds']} |"
        )
    lines += ["", f"{summary['seconds']:.0f} s in all."]
    lines += [f"Failed: {cell}: {why.strip().splitlines()[-1]}" for cell, why in summary["failed"].items()]
    return "\n".join(lines) + "\n"


NAMES = {"flash": "FLASH", "transformer_pp": "Transformer++"}
TITLES = {
    "sst2": "SST-2, accuracy", "mrpc": "MRPC, accuracy", "movie_reviews": "movie reviews, whole, accuracy",
    "wnut17": "WNUT-17, F1", "xquad": "XQuAD en, F1",
    "names": "names (tests/data), F1", "characters": "characters (tests/data), accuracy",
}  # fmt: skip


def tried_rates(summary: dict, task: str, name: str | None = None) -> list[float]:
    """The fine-tuning rates of a task, of one model or of both; those of cells that failed too."""
    names = [name] if name else MODELS
    begins = tuple(f"tune-{each}-{task}-" for each in names)
    cells = [cell for cell in (*summary["cells"], *summary["failed"]) if cell.startswith(begins)]
    return sorted({float(cell.split("-", 3)[3].rpartition("-")[0]) for cell in cells})


def as_readme(summary: dict) -> str:
    """The section of scripts/results/README.md: all rates of both models, what was not run, and the conditions."""
    settings, cells, failed = (summary[key] for key in ("settings", "cells", "failed"))
    bold = {cell_name(row["model"], row["data"], row["learning_rate"], 0) for row in summary["table"]}
    test_examples = {cell["data"]: cell["metrics"]["test"]["examples"] for cell in cells.values()}

    def shown(name: str, task: str, rate: float) -> str:
        """The mean over the finished seeds; without any, the reason."""
        names = [cell_name(name, task, rate, seed) for seed in range(settings["seeds"])]
        found = [cells[each] for each in names if each in cells]
        if not found:
            why = failed.get(names[0], "-")
            return next((state for state in ("not begun", "cut off", "-") if why.startswith(state)), "failed")
        scores = [SCALES.get(task, 100) * cell["metrics"]["test"][cell["main_metric"]] for cell in found]
        text = f"{statistics.mean(scores):.2f}"
        if len(scores) > 1:
            text += f" +- {statistics.stdev(scores):.2f}"
        return f"**{text}**" if names[0] in bold else text

    lines = ["### Compared with a Transformer++ of the same size", ""]
    lines += ["| | learning rate | FLASH | Transformer++ |", "| --- | --- | --- | --- |"]
    sizes = [f"{row['parameters'] / 1e6:.2f} M" for row in summary["pretraining"]]
    lines.append(f"| parameters | | {' | '.join(sizes)} |")
    before = [
        f"{row['metrics']['validation']['perplexity']:.2f} ({row['learning_rate']:g})" if row["metrics"] else "-"
        for row in summary["pretraining"]
    ]
    lines.append(f"| masked perplexity of held-out text (learning rate of pretraining) | | {' | '.join(before)} |")
    for task, title in TITLES.items():
        count = f" ({test_examples[task]:,} test examples)" if task in test_examples else ""
        for index, rate in enumerate(tried_rates(summary, task)):
            values = " | ".join(shown(name, task, rate) for name in MODELS)
            lines.append(f"|{'' if index else f' {title}{count}'} | {rate:g} | {values} |")

    tokens = summary["pretraining"][0]["tokens"] / 1e6
    seeds = " or ".join(sorted({str(row["seeds"]) for row in summary["table"]})) or "1"
    paragraphs = [
        f"Each model was pretrained once, masked, on {tokens:.1f} M tokens of the same text, and fine-tuned from "
        "there with each learning rate; everything else is equal. Accuracy and F1 are on the test split, in percent, "
        + ("of one seed: the spread is not known." if seeds == "1" else
           f"of one seed; for the chosen rates, mean +- standard deviation over {seeds} seeds.")
        + " Bold: the rate chosen on the validation split, once all rates of a model have run."
    ]  # fmt: skip
    if failed:
        paragraphs.append(missing(failed, len(cells)))
    edges = at_the_edge(summary)
    if edges:
        paragraphs.append(
            f"Chosen at the end of their grid, so that a rate beyond it may be better: {'; '.join(edges)}."
        )
    cell = next(iter(cells.values()))
    versions = ", ".join(f"{name} {version}" for name, version in cell["versions"].items() if version)
    paragraphs.append(f"{cell['machine']}, {versions}, commit {(cell['commit'] or 'unknown')[:9]}.")
    for paragraph in paragraphs:
        lines += ["", *textwrap.wrap(paragraph, 119, break_on_hyphens=False, break_long_words=False)]
    return "\n".join(lines) + "\n"


def missing(failed: dict[str, str], done: int) -> str:
    """The cells that an interrupted study lacks, with the reasons."""
    rates, seeds = {}, {}
    for cell in failed:
        _, name, task, rest = cell.split("-", 3)
        rate, _, seed = rest.rpartition("-")
        title = f"{NAMES[name]} {TITLES.get(task, task).split(',')[0]}"
        if seed == "0":
            rates.setdefault(title, []).append(rate)
        else:
            seeds.setdefault(f"{title} {rate}", []).append(int(seed) + 1)
    parts = [f"{title} {', '.join(values)}" for title, values in rates.items()]
    parts += [f"{title} (seed {', '.join(map(str, values))})" for title, values in seeds.items()]
    why = "; ".join(dict.fromkeys((why.strip() or "no message").splitlines()[-1] for why in failed.values()))
    return f"**This study is partial**: {done} cells are done, {len(failed)} are not ({why}): {'; '.join(parts)}."


def at_the_edge(summary: dict) -> list[str]:
    """The chosen rates at an end of their grid."""
    found = []
    for row in summary["table"]:
        rates = tried_rates(summary, row["data"], row["model"])
        ends = {rates[0]: "lowest", rates[-1]: "highest"}
        if row["learning_rate"] in ends:
            title, end = TITLES[row["data"]].split(",")[0], ends[row["learning_rate"]]
            found.append(f"{NAMES[row['model']]} {title} {row['learning_rate']:g} ({end})")
    return found


def card_results(summary: dict) -> list[dict]:
    """The mean test scores of FLASH as results for scripts.cards."""
    command = shlex.join([*program_words(), *sys.argv[1:]])
    results = []
    for row in summary["table"]:
        if row["model"] == "flash":
            cell = summary["cells"][cell_name("flash", row["data"], row["learning_rate"], 0)]
            cell = {**cell, "data": row["data"], "metrics": {"test": {row["metric"]: row["test"]}}}
            results += task_card_results(cell, command)
    return results


def make_parser() -> argparse.ArgumentParser:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flash", metavar="FOLDER", help="checkpoint of FLASH")
    parser.add_argument("--transformer", metavar="FOLDER", help="checkpoint of Transformer++")
    parser.add_argument("--data", help="folder of the labelled sets; by default the small ones in tests/data")
    parser.add_argument(
        "--render",
        metavar="SUMMARY",
        help="print the section of scripts/results/README.md from a summary.json and exit",
    )
    parser.add_argument("--work", help="folder for logs and cells")
    parser.add_argument("--out", help="folder for summary.json and summary.md; by default that of --work")
    parser.add_argument("--commit", help="commit to record in the results if git cannot")
    parser.add_argument("--smoke", action="store_true", help="few examples and tiny models, to see that it runs")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3],
        help="the grid of learning rates, which grows; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--seeds", type=natural, default=3)
    parser.add_argument("--tasks", nargs="+", help="run these labelled sets only")
    parser.add_argument("--workers", type=natural, default=4, help="parallel fine-tunings")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit; the next run resumes")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    begin = time.perf_counter()
    parser = make_parser()
    options = parser.parse_args()
    if options.render:
        print(as_readme(read_json(options.render, dict)), end="")
        return 0
    if not options.work or (not options.smoke and not (options.flash and options.transformer)):
        parser.error("--work, --flash and --transformer are needed")
    if options.smoke:
        options.seeds, options.workers = 2, 1
    if options.serve:
        serve(partial(run_cell, options), Path(options.work) / "logs")
        return 0

    out = Path(options.out or options.work)
    prepare(options)
    study = Study(options, begin)
    if not any((study.work / "cells").glob("*.json")) and (out / "summary.json").is_file():
        for cell, result in read_json(out / "summary.json", dict)["cells"].items():
            write_json(study.path(cell), result)
    study.run(study.upcoming(), options.workers)
    study.run(study.upcoming(), options.workers)  # what waited for cells that were repeated alone

    summary = study.summary()
    write_json(out / "summary.json", summary)
    (out / "summary.md").write_text(as_markdown(summary), encoding="utf-8")
    write_json(out / "card_results.json", card_results(summary))
    print(as_markdown(summary))
    for cell, why in study.failed.items():
        print(f"--- {cell}\n{why}", file=sys.stderr)
    return bool(study.failed)


if __name__ == "__main__":
    run_command(main)
