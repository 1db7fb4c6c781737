"""\
python -m scripts.study.finetune --smoke --text tests/data/wizard_of_oz.txt --work runs/study

FLASH against a Transformer++ of the same size, trained in the same way: one tokenizer, the same text, blocks, masks,
steps and optimiser for masked pretraining, then the same fine-tuning on three labelled sets. Learning rates, of
pretraining and of each set, are chosen for each model from one grid on the validation split; with them the test split
is measured over several seeds.

The study consists of cells, each a process that writes work/cells/NAME.json; finished cells are not run again, so that
an interrupted study resumes. summary.json (also read back) and summary.md hold the whole study;
--render summary.json prints the section of scripts/results/README.md.
On one GPU: --data FOLDER (labelled.tar.xz, unpacked: glue/SST-2, sentence_cls, movie_reviews, wnut17), --text FILES.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from transformers import AutoModelForMaskedLM, set_seed

from flash_hf import FlashConfig, training
from flash_hf.commands.options import OptionParser, natural, run_command
from flash_hf.hub import vocabulary_size
from flash_hf.sources import read_json
from flash_hf.training.documents import load_documents, split_documents
from flash_hf.training.packing import MaskingCollator, pack_documents
from flash_hf.training.tokenizer import load_tokenizer, text_size, tokenize_documents, train_tokenizer
from flash_hf.training.trainer import MaskEpochCallback

from ..baselines import TransformerPPConfig  # registers Transformer++
from ..finetune.arguments import FinetuningArguments, TaskArguments
from ..finetune.run import card_results as task_card_results
from ..finetune.run import run_finetuning
from ..provenance import program_words, provenance, write_json
from .runner import CellRunner


MODELS = ("flash", "transformer_pp")
ROOT = Path(__file__).resolve().parents[2]


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
    reviews, wnut = folder / "movie_reviews", folder / "wnut17"
    # The long one comes last, so that only it is lost if time runs out.
    return {
        "sst2": {
            "task": "classification", "epochs": 1, "batch": 128, "accumulate": 1, "text_column": "sentence",
            "train_file": [str(folder / "glue" / "SST-2" / "train.tsv")],
            "validation_file": [str(folder / "glue" / "SST-2" / "dev.tsv")],
            "test_file": [str(made / "sst2_test.tsv")],
        },
        "wnut17": {
            "task": "tagging", "epochs": 5, "batch": 32, "accumulate": 1,
            "train_file": [str(wnut / "wnut17train.conll")], "validation_file": [str(wnut / "emerging.dev.conll")],
            "test_file": [str(wnut / "emerging.test.annotated")],
        },
        # Up to 4,000 tokens each: several processes on one GPU have memory for eight at a time.
        "movie_reviews": {
            "task": "classification", "epochs": 4, "batch": 8, "accumulate": 2,
            "train_file": [str(reviews / "train.jsonl")], "validation_file": [str(reviews / "valid.jsonl")],
            "test_file": [str(reviews / "test.jsonl")],
        },
    }  # fmt: skip


# --- stage 0: text ---------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> None:
    """Tokenizer and packed blocks of the pretraining text, and the labelled file in a format of its own."""
    work = Path(options.work)
    if (work / "text.json").is_file():
        return
    if options.data is not None:
        # GLUE's test split has no labels; this is the same split from the Stanford treebank: "label text".
        lines = (Path(options.data) / "sentence_cls" / "stsa.binary.test").read_text(encoding="utf-8").splitlines()
        (work / "data").mkdir(parents=True, exist_ok=True)
        rows = [f"{line[2:]}\t{line[0]}" for line in lines if line.strip()]
        (work / "data" / "sst2_test.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    documents = [load_documents([file]) for file in options.text]
    texts = [row["text"] for part in documents for row in part]
    rows = Dataset.from_dict({"text": texts}).shuffle(seed=0) if len(texts) > 1 else Dataset.from_dict({"text": texts})
    train, validation = split_documents(rows, 0.05 if options.smoke else 0.01)
    tokenizer = train_tokenizer(train, options.vocab_size, max_bytes=20_000_000)
    tokenizer.save_pretrained(work / "tokenizer")
    workers = min(8, os.cpu_count() or 1, len(train))
    size = {}
    for name, part in (("train", train), ("validation", validation)):
        tokens = tokenize_documents(part, tokenizer, num_proc=workers if name == "train" and workers > 1 else None)
        blocks = pack_documents(tokens, tokenizer=tokenizer, block_size=options.block_size, causal=False)
        blocks.save_to_disk(str(work / "blocks" / name))
        size[name] = {**text_size(tokens), "blocks": len(blocks)}
    write_json(work / "text.json", {"files": [Path(file).name for file in options.text], **size})


# --- stage 1: masked pretraining -------------------------------------------------------------------------------------


def model_configs(options: argparse.Namespace, tokenizer) -> dict:
    """FLASH and the Transformer++ with the closest number of parameters."""
    width, layers = options.hidden_size, options.layers
    common = {"vocab_size": vocabulary_size(tokenizer), "pad_token_id": tokenizer.pad_token_id, "hidden_size": width}
    flash = FlashConfig(
        num_hidden_layers=layers, query_key_dim=32 if options.smoke else 128,
        chunk_size=32 if options.smoke else 256, max_position_embeddings=options.block_size, **common,
    )  # fmt: skip

    def transformer(inner: int):
        return TransformerPPConfig(
            num_hidden_layers=layers // 2, num_attention_heads=max(1, width // 64), intermediate_size=inner,
            max_position_embeddings=options.block_size, **common,
        )  # fmt: skip

    def size(config) -> int:
        with torch.device("meta"):
            return AutoModelForMaskedLM.from_config(config).num_parameters()

    # The size is linear in the width of the feed-forward layers.
    small, step = size(transformer(8)), size(transformer(16)) - size(transformer(8))
    return {"flash": flash, "transformer_pp": transformer(8 + 8 * round((size(flash) - small) / step))}


def pretrain(options: argparse.Namespace, name: str, rate: float) -> dict:
    work = Path(options.work)
    tokenizer = load_tokenizer(str(work / "tokenizer"), masked=True)
    blocks = {
        part: load_from_disk(str(work / "blocks" / part)).with_format("numpy") for part in ("train", "validation")
    }
    cuda = torch.cuda.is_available()
    args = training.FlashTrainingArguments(
        output_dir=str(work / "runs" / pretrain_name(name, rate)),
        max_steps=options.pretrain_steps,
        per_device_train_batch_size=options.batch_tokens // options.block_size,
        per_device_eval_batch_size=min(32, options.batch_tokens // options.block_size),
        learning_rate=rate,
        warmup_steps=0.05,
        eval_strategy="no",
        eval_on_start=False,
        save_strategy="no",
        logging_steps=max(1, options.pretrain_steps // 10),
        bf16=cuda,
        dataloader_num_workers=4 if cuda else 0,
        dataloader_drop_last=len(blocks["train"]) * options.block_size > options.batch_tokens,
        report_to="none",
        disable_tqdm=True,
    )
    set_seed(0)
    model = AutoModelForMaskedLM.from_config(model_configs(options, tokenizer)[name])
    collator = MaskingCollator(tokenizer, mlm_probability=0.15, seed=0)
    size = json.loads((work / "text.json").read_text(encoding="utf-8"))["validation"]
    trainer = training.FlashTrainer(
        model=model,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=collator.mask_once(blocks["validation"].with_format(None)),
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=training.make_compute_metrics("masked", size),
        preprocess_logits_for_metrics=partial(training.token_scores, causal=False),
        callbacks=[MaskEpochCallback(collator)],
    )
    if options.compile and cuda:
        for layer in model.model.layers:
            layer.compile()
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    with torch.compiler.set_stance("force_eager"):  # a single pass is not worth a second graph
        scores = trainer.evaluate()
    trainer.save_model(str(work / "models" / pretrain_name(name, rate)))
    return {
        "kind": "pretrain",
        "model": name,
        "config": model.config.to_diff_dict(),
        "parameters": model.num_parameters(),
        "steps": options.pretrain_steps,
        "tokens": options.pretrain_steps * args.train_batch_size * options.block_size,
        "learning_rate": rate,
        "seed": 0,
        "train_seconds": round(seconds, 1),
        "log": [{k: log[k] for k in ("step", "loss")} for log in trainer.state.log_history if "loss" in log],
        "metrics": {"validation": {k.removeprefix("eval_"): v for k, v in scores.items() if k != "epoch"}},
    }


def pretrain_name(name: str, rate: float) -> str:
    return f"pretrain-{name}-{rate:g}"


def best_pretraining(options: argparse.Namespace, name: str) -> str | None:
    """The cell with the lowest validation loss, or None until all rates are done."""
    losses = {}
    for rate in options.pretrain_rates:
        cell = pretrain_name(name, rate)
        path = Path(options.work) / "cells" / f"{cell}.json"
        if not path.is_file():
            return None  # a choice from part of the grid would not be fair
        losses[cell] = json.loads(path.read_text(encoding="utf-8"))["metrics"]["validation"]["loss"]
    return min(losses, key=losses.get)


# --- stages 2 and 3: fine-tuning -------------------------------------------------------------------------------------


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
    start = best_pretraining(options, name)
    result = run_finetuning(
        training.ModelArguments(model=str(work / "models" / start)), TaskArguments(**chosen), args, plot=False
    )
    shutil.rmtree(args.output_dir)  # one model per cell would fill the disk
    return {**result, "kind": "tune", "model": name, "data": task, "pretraining": start}


def cell_name(name: str, task: str, rate: float, seed: int) -> str:
    return f"tune-{name}-{task}-{rate:g}-{seed}"


def run_cell(options: argparse.Namespace, cell: str) -> None:
    """Run the cell of this name in this process."""
    begin = time.perf_counter()
    kind, name, rest = cell.split("-", 2)  # a rate may be 1e-05; names and tasks have no hyphen
    if kind == "pretrain":
        result = pretrain(options, name, float(rest))
    else:
        task, _, end = rest.partition("-")
        rate, _, seed = end.rpartition("-")
        result = tune(options, name, task, float(rate), int(seed))
    result |= provenance()
    if options.commit:  # for copies without .git
        result["commit"] = options.commit
    result["smoke"] = options.smoke
    result["cell_seconds"] = round(time.perf_counter() - begin, 1)
    if torch.cuda.is_available():
        result["peak_gigabytes"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    write_json(Path(options.work) / "cells" / f"{cell}.json", result)


# --- the whole -------------------------------------------------------------------------------------------------------


class Study(CellRunner):
    """The cells of this study and their summary."""

    def __init__(self, options: argparse.Namespace, begin: float):
        self.options, self.work = options, Path(options.work)
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        if options.smoke:
            environment["OMP_NUM_THREADS"] = "1"  # in tests, beside other work
        command = [sys.executable, "-m", "scripts.study.finetune", *sys.argv[1:], "--cell"]
        super().__init__(
            self.work, command, minutes=options.minutes,
            least_seconds=5 if options.smoke else 30, environment=environment, begin=begin,
        )  # fmt: skip

    def rate(self, name: str, task: str) -> float | None:
        """The rate with the best score on the validation split, the lower one of two."""
        scores = {}
        for rate in self.options.rates:
            result = self.result(cell_name(name, task, rate, 0))
            if result is None:
                return None
            scores[rate] = result["metrics"]["validation"][result["main_metric"]]
        return max(sorted(scores), key=scores.get)

    def summary(self) -> dict:
        cells = {
            path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((self.work / "cells").glob("*.json"))
        }
        table = []
        for task in task_options(self.options):
            for name in MODELS:
                rate = self.rate(name, task)
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
        facts = ("model", "parameters", "tokens", "learning_rate", "metrics")
        chosen = [best_pretraining(self.options, name) for name in MODELS]
        pretraining = [{key: cells[cell][key] for key in facts} for cell in chosen if cell is not None]
        settings = {key: value for key, value in vars(self.options).items() if key not in ("cell", "work", "out")}
        text = self.work / "text.json"
        return {
            "study": "finetune", "settings": settings, "text": json.loads(text.read_text(encoding="utf-8")),
            "pretraining": pretraining, "table": table, "failed": self.failed, "seconds": round(self.seconds(), 1),
            "cells": cells,
        }  # fmt: skip


def as_markdown(summary: dict) -> str:
    lines = ["| pretraining | parameters | tokens | learning rate | masked perplexity | masked accuracy |"]
    lines.append("| --- " * 6 + "|")
    for row in summary["pretraining"]:
        scores = row["metrics"]["validation"]
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:.2f} M | {row['tokens'] / 1e6:.1f} M | "
            f"{row['learning_rate']:g} | "
            f"{scores['perplexity']:.2f} | {100 * scores['masked_accuracy']:.2f} % |"
        )
    lines += ["", "| data | model | learning rate | metric | validation | test | seeds |", "| --- " * 7 + "|"]
    for row in summary["table"]:
        shown = []
        for split in ("validation", "test"):
            std = row[f"{split}_std"]
            shown.append(f"{100 * row[split]:.2f}" + (f" +- {100 * std:.2f}" if std is not None else ""))
        lines.append(
            f"| {row['data']} | {row['model']} | {row['learning_rate']:g} | {row['metric']} | {' | '.join(shown)} | "
            f"{row['seeds']} |"
        )
    lines += ["", f"{summary['seconds']:.0f} s in all."]
    lines += [f"Failed: {cell}: {why.strip().splitlines()[-1]}" for cell, why in summary["failed"].items()]
    return "\n".join(lines) + "\n"


NAMES = {"flash": "FLASH", "transformer_pp": "Transformer++"}
TITLES = {
    "sst2": "SST-2, accuracy", "movie_reviews": "movie reviews, whole, accuracy", "wnut17": "WNUT-17, F1",
    "names": "names (tests/data), F1", "characters": "characters (tests/data), accuracy",
}  # fmt: skip


def as_readme(summary: dict) -> str:
    """The section of scripts/results/README.md: all rates of both models, what was not run, and the conditions."""
    settings, cells, failed = (summary[key] for key in ("settings", "cells", "failed"))
    bold = {pretrain_name(row["model"], row["learning_rate"]) for row in summary["pretraining"]}
    bold |= {cell_name(row["model"], row["data"], row["learning_rate"], 0) for row in summary["table"]}
    test_examples = {cell["data"]: cell["metrics"]["test"]["examples"]
                     for cell in cells.values() if cell["kind"] == "tune"}  # fmt: skip

    def seeds_of(task: str, name: str, rate: float) -> list[str]:
        return [cell_name(name, task, rate, seed) for seed in range(settings["seeds"])]

    def shown(names: list[str], score) -> str:
        """The mean over the finished seeds; without any, the reason."""
        scores = [score(cells[name]) for name in names if name in cells]
        if not scores:
            why = failed.get(names[0], "not run")
            return next((state for state in ("not begun", "cut off", "not run") if why.startswith(state)), "failed")
        text = f"{statistics.mean(scores):.2f}"
        if len(scores) > 1:
            text += f" +- {statistics.stdev(scores):.2f}"
        return f"**{text}**" if names[0] in bold else text

    def rows(title: str, rates: list[float], names, score) -> list[str]:
        found = [(f"{rate:g}", *(shown(names(name, rate), score) for name in MODELS)) for rate in rates]
        if not any(cell in cells for rate in rates for name in MODELS for cell in names(name, rate)):
            found = [("all", *found[0][1:])]
        return [f"|{'' if i else f' {title}'} | {' | '.join(values)} |" for i, values in enumerate(found)]

    lines = ["### Beside a Transformer++ of the same size", ""]
    lines += ["| | learning rate | FLASH | Transformer++ |", "| --- | --- | --- | --- |"]
    sizes = [f"{row['parameters'] / 1e6:.2f} M" for row in summary["pretraining"]]
    lines.append(f"| parameters | | {' | '.join(sizes)} |")
    lines += rows("masked perplexity of held-out text", settings["pretrain_rates"],
                  lambda name, rate: [pretrain_name(name, rate)],
                  lambda cell: cell["metrics"]["validation"]["perplexity"])  # fmt: skip
    for task, title in TITLES.items():
        if any(f"-{task}-" in cell for cell in (*cells, *failed)):
            count = f" ({test_examples[task]:,} test examples)" if task in test_examples else ""
            lines += rows(title + count, settings["rates"], partial(seeds_of, task),
                          lambda cell: 100 * cell["metrics"]["test"][cell["main_metric"]])  # fmt: skip

    cell = next(cell for cell in cells.values() if cell["kind"] == "pretrain")
    tokens = summary["pretraining"][0]["tokens"] / 1e6
    depth = {one["model"]: one["config"]["num_hidden_layers"] for one in cells.values() if one["kind"] == "pretrain"}
    seeds = " or ".join(sorted({str(row["seeds"]) for row in summary["table"]})) or "1"
    paragraphs = [
        f"{depth['flash']} layers of FLASH, {depth['transformer_pp']} blocks of Transformer++, both of width "
        f"{settings['hidden_size']}; all else but the learning rates is equal. For each rate, one masked pretraining "
        f"on {tokens:.1f} M tokens of {', '.join(summary['text']['files'])}, {cell['steps']:,} steps in blocks of "
        f"{settings['block_size']:,}; then the best model of each kind is fine-tuned with each rate of a second grid. "
        "Accuracy and F1 are those of the test split, in percent, "
        + ("of one seed: the spread is not known." if seeds == "1" else
           f"of one seed; for the chosen rates, mean +- standard deviation over {seeds} seeds.")
        + " Bold: chosen on the validation split, which needs all rates of a model."
    ]  # fmt: skip
    if failed:
        paragraphs.append(missing(failed, len(cells)))
    edges = at_the_edge(summary)
    if edges:
        paragraphs.append(
            f"Chosen at the end of their grid, so that a rate beyond it may be better: {'; '.join(edges)}."
        )
    versions = ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
    paragraphs.append(f"{cell['machine']}, {versions}, commit {(cell['commit'] or 'unknown')[:9]}:")
    for paragraph in paragraphs:
        lines += ["", *textwrap.wrap(paragraph, 119, break_on_hyphens=False, break_long_words=False)]
    lines += ["", "```bash", as_command(settings), "```"]
    return "\n".join(lines) + "\n"


def missing(failed: dict[str, str], done: int) -> str:
    """The cells that an interrupted study lacks, with the reasons."""
    rates, seeds = {}, {}
    for cell in failed:
        kind, name, rest = cell.split("-", 2)
        task, _, end = ("pretraining", "", f"{rest}-0") if kind == "pretrain" else rest.partition("-")
        rate, _, seed = end.rpartition("-")
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
    settings, found = summary["settings"], []
    rows = [("pretraining", "pretrain_rates", row) for row in summary["pretraining"]]
    rows += [(TITLES[row["data"]].split(",")[0], "rates", row) for row in summary["table"]]
    for title, grid, row in rows:
        ends = {min(settings[grid]): "lowest", max(settings[grid]): "highest"}
        if row["learning_rate"] in ends:
            found.append(f"{NAMES[row['model']]} {title} {row['learning_rate']:g} ({ends[row['learning_rate']]})")
    return found


def as_command(settings: dict) -> str:
    """The command of a study: the options that differ from the defaults, files and folders without their paths."""
    words = ["python", "-m", "scripts.study.finetune"]
    for name, value in settings.items():
        if name in ("commit", "render") or value == make_parser().get_default(name):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(Path(one).name if name in ("data", "text") else f"{one}" for one in values)]
    return shlex.join([*words, "--work", "runs/study"])


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
    parser.add_argument("--data", help="folder of the labelled sets; by default the small ones in tests/data")
    parser.add_argument(
        "--render",
        metavar="SUMMARY",
        help="print the section of scripts/results/README.md from a summary.json and exit",
    )
    parser.add_argument("--text", nargs="+", help="pretraining text: .txt, .jsonl (also .xz, .gz)")
    parser.add_argument("--work", help="folder for models, logs and cells (about 1 GB)")
    parser.add_argument("--out", help="folder for summary.json and summary.md; by default that of --work")
    parser.add_argument("--commit", help="commit to record in the results if git cannot")
    parser.add_argument("--smoke", action="store_true", help="tiny models and few steps, to see that the study runs")
    parser.add_argument("--hidden_size", type=natural, default=512)
    parser.add_argument(
        "--layers", type=int, default=12, help="layers of FLASH; Transformer++ has half as many blocks"
    )
    parser.add_argument("--vocab_size", type=natural, default=16384)
    parser.add_argument("--block_size", type=natural, default=1024)
    parser.add_argument("--batch_tokens", type=natural, default=32768)
    parser.add_argument("--pretrain_steps", type=natural, default=800)
    parser.add_argument(
        "--pretrain_rates", type=float, nargs="+", default=[1e-3, 2e-3], help="the grid of pretraining"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="the grid of fine-tuning")
    parser.add_argument("--seeds", type=natural, default=3)
    parser.add_argument("--tasks", nargs="+", help="run these labelled sets only")
    parser.add_argument("--workers", type=natural, default=4, help="parallel fine-tunings")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit; the next run resumes")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the layers in pretraining"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    begin = time.perf_counter()
    parser = make_parser()
    options = parser.parse_args()
    if options.render:
        print(as_readme(read_json(options.render, dict)), end="")
        return 0
    if not options.text or not options.work:
        parser.error("--text and --work are needed")
    if options.smoke:
        sizes = {"hidden_size": 64, "layers": 2, "vocab_size": 600, "block_size": 64, "batch_tokens": 512}
        for name, value in {**sizes, "pretrain_steps": 10, "rates": [1e-3, 3e-3], "seeds": 2, "workers": 1}.items():
            setattr(options, name, value)
    if options.cell:
        run_cell(options, options.cell)
        return 0

    out = Path(options.out or options.work)
    study = Study(options, begin)
    if not any((study.work / "cells").glob("*.json")) and (out / "summary.json").is_file():
        earlier = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        for cell, result in earlier["cells"].items():
            if result["kind"] == "tune":  # a pretraining also needs its model, which is not in the summary
                write_json(study.path(cell), result)
    study.work.mkdir(parents=True, exist_ok=True)
    prepare(options)
    print(f"{study.seconds():6.1f} s  text: {(study.work / 'text.json').read_text(encoding='utf-8')}", flush=True)
    tasks = [task for task in task_options(options) if options.tasks is None or task in options.tasks]
    study.run([pretrain_name(n, rate) for rate in options.pretrain_rates for n in MODELS], min(options.workers, 2))
    ready = [name for name in MODELS if best_pretraining(options, name) is not None]
    study.run(
        [cell_name(n, task, rate, 0) for task in tasks for n in ready for rate in options.rates], options.workers
    )
    chosen = [(n, task, study.rate(n, task)) for task in tasks for n in ready]
    chosen = [cell for cell in chosen if cell[2] is not None]
    study.run([cell_name(*cell, seed) for seed in range(1, options.seeds) for cell in chosen], options.workers)

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
