# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning with Trainer: checks, training, evaluation and the files it writes."""

from __future__ import annotations

import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from flash_hf.sources import load_named
from flash_hf.training.arguments import ModelArguments, check_arguments, config_fields
from flash_hf.training.checkpoints import check_output_dir, delete_checkpoints, find_checkpoint
from flash_hf.training.run import check_sources, check_vocabulary, new_config
from flash_hf.training.tokenizer import load_tokenizer, train_tokenizer
from flash_hf.training.trainer import FlashTrainer, LossPlotCallback

from ..provenance import program_words, provenance
from .arguments import FinetuningArguments, TaskArguments
from .readers import label_names
from .tasks import TASKS, Task


def load_splits(args: TaskArguments) -> dict[str, Dataset]:
    """Rows for training, validation and, if given, test.

    Raises:
        ValueError: validation or test rows have a label that the training rows lack, or there is only one label.
    """
    load = TASKS[args.task].load
    splits = {"train": load(args, args.train_file, args.train_split, args.max_train_examples)}
    for name in ("validation", "test"):
        files, split = getattr(args, f"{name}_file"), getattr(args, f"{name}_split")
        if files is not None or split is not None:
            splits[name] = load(args, files, split, args.max_eval_examples)
    if "validation" not in splits:
        if len(splits["train"]) < 2:
            raise ValueError("A single training row leaves nothing for validation: give --validation_file.")
        # Questions about one text stand together and must not be split; other rows may be sorted by class.
        parts = splits["train"].train_test_split(args.validation_fraction, shuffle=args.task != "qa", seed=0)
        splits |= {"train": parts["train"], "validation": parts["test"]}
    counts = {name: TASKS[args.task].label_set(rows) for name, rows in splits.items()}
    if len(counts["train"]) == 1:
        raise ValueError(f"The training set must have two labels or more, it has only {[*counts['train']][0]!r}.")
    for name in splits:
        unknown = counts[name].keys() - counts["train"].keys()
        if unknown:
            raise ValueError(
                f"Every label of the {name} set must occur in the training set; {', '.join(sorted(unknown))} "
                f"({sum(counts[name][label] for label in unknown)} times) does not. The training set has "
                f"{', '.join(label_names({*counts['train']}))}."
            )
    return splits


def load_model(
    task: type[Task],
    model_args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str],
    resume: Path | None,
) -> PreTrainedModel:
    """The head on a new model, on that of `--model`, or for a checkpoint whose weights Trainer will load."""
    names = {}
    if labels:
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if resume is not None:
        config = AutoConfig.from_pretrained(resume)
        if labels and config.id2label != names["id2label"]:
            raise ValueError(
                f"The checkpoint {resume} knows the labels {', '.join(config.id2label.values())}, the data have "
                f"{', '.join(labels)}. Resume with the data the run started with."
            )
        model = task.auto.from_config(config)
    elif model_args.model is not None:
        # A head for other classes is initialised again, with a warning of transformers. In float32, whatever it was
        # saved in: small updates of bfloat16 weights are lost in rounding.
        names |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        model = load_named(task.auto.from_pretrained, model_args.model, option="--model", **names)
    else:
        config = new_config("masked", config_fields(model_args), tokenizer)
        for name, value in names.items():
            setattr(config, name, value)
        model = task.auto.from_config(config)
    check_vocabulary(model, tokenizer)
    return model


def load_or_train_tokenizer(
    task: type[Task], model_args: ModelArguments, rows: Dataset, resume: Path | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, else `--tokenizer`, else the model's, else a new one."""
    source = resume or model_args.tokenizer or model_args.model
    if source is None:
        tokenizer = train_tokenizer(task.texts(rows), model_args.tokenizer_vocab_size)
    else:
        tokenizer = load_tokenizer(str(source), masked=False)
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer {source} must be a fast one: words and answers are found by its offsets.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    return tokenizer


def card_results(result: dict, command: str) -> list[dict]:
    """The scores of [`run_finetuning`] as results for `python -m scripts.cards`."""
    names = {"classification": "text-classification", "tagging": "token-classification", "qa": "question-answering"}
    source = result["data"] if isinstance(result["data"], str) else ", ".join(Path(f).name for f in result["data"])
    return [
        {
            "task": names[result["task"]],
            "dataset": source,
            "split": split,
            "metric": metric,
            "value": value,
            "command": command,
            "machine": result["machine"],
            "commit": result["commit"] or "not in a repository",
        }
        for split, scores in result["metrics"].items()
        for metric, value in scores.items()
        if metric not in ("loss", "examples")
    ]


def build_trainer(
    task: Task, model: PreTrainedModel, args: FinetuningArguments, rows: dict[str, Dataset]
) -> tuple[FlashTrainer, dict[str, Dataset], dict[str, Dataset]]:
    """Tokenize the splits and build the trainer, which evaluates on the validation split.

    Returns:
        The trainer, and the features of each split with the rows they come from, both without empty examples.
    """
    with args.main_process_first(desc="tokenizing"):
        both = {name: task.features(part, name) for name, part in rows.items()}
    features, rows = ({name: part[index] for name, part in both.items()} for index in (0, 1))
    trainer = FlashTrainer(
        model=model,
        args=args,
        train_dataset=features["train"],
        eval_dataset=features["validation"],
        data_collator=task.collator(),
        processing_class=task.own_tokenizer,
        compute_metrics=partial(task.score, rows=rows["validation"], features=features["validation"]),
        preprocess_logits_for_metrics=task.reduce,
    )
    return trainer, features, rows


def run_finetuning(
    model_args: ModelArguments, task_args: TaskArguments, args: FinetuningArguments, *, plot: bool = True
) -> dict:
    """Check, train, validate, test, and save everything to `args.output_dir`.

    The folder then holds the model (with its class names) and tokenizer, `checkpoint-*`, the log and its plot,
    `results.json` and, for a model card, `card_results.json`.

    Args:
        plot: Update the plot of the losses during training; needs matplotlib.

    Returns:
        The contents of `results.json`: the `metrics` of validation and test, and the settings to reproduce them.
    """
    check_arguments(args, TASKS[task_args.task].metrics)
    for name in ("batch_tokens", "per_device_batch_tokens", "sequence_warmup_steps"):
        if getattr(args, name):
            raise ValueError(
                f"{name} must be left out, got {getattr(args, name)}: it needs examples of one length, and "
                "fine-tuning has all lengths. Give --per_device_train_batch_size."
            )
    resume = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=resume)
    fields = config_fields(model_args)
    check_sources(model_args)
    if model_args.model is None:
        new_config("masked", fields)  # raises its errors before the data are loaded
    if plot:
        import matplotlib  # noqa: F401  else it would be missed only at the first validation

    set_seed(args.seed)
    kind = TASKS[task_args.task]
    rows = load_splits(task_args)
    tokenizer = load_or_train_tokenizer(kind, model_args, rows["train"], resume)
    source = resume or model_args.model
    known = AutoConfig.from_pretrained(source).id2label if source is not None else None
    labels = label_names({*kind.label_set(rows["train"])}, known)
    model = load_model(kind, model_args, tokenizer, labels, resume)
    given = {name: len(part) for name, part in rows.items()}
    trainer, features, rows = build_trainer(kind(task_args, tokenizer, labels), model, args, rows)
    if plot:
        trainer.add_callback(LossPlotCallback())

    if args.overwrite_output_dir and resume is None and args.should_save:
        delete_checkpoints(args.output_dir)
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - begin
    trainer.save_model()  # before evaluation, which leaves the model in the dtype of bf16_full_eval or fp16_full_eval
    metrics = {}
    for name in ("validation", "test"):
        if name in rows:
            trainer.compute_metrics = partial(trainer.compute_metrics.func, rows=rows[name], features=features[name])
            scores = trainer.evaluate(features[name], metric_key_prefix=name)
            # Times and rates are in the log; results hold only what is reproducible.
            rates = ("_runtime", "_per_second", "epoch")
            metrics[name] = {
                key.removeprefix(f"{name}_"): value for key, value in scores.items() if not key.endswith(rates)
            }
            metrics[name]["examples"] = len(rows[name])
    trainer.save_state()
    result = {
        "task": kind.name,
        "model": model_args.model,
        "model_type": model.config.model_type,
        "data": task_args.dataset_name or task_args.train_file,
        "labels": labels,
        "main_metric": kind.main_metric,
        "metrics": metrics,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "steps": trainer.state.global_step,
        "epochs": args.num_train_epochs,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps,
        "train_examples": len(rows["train"]),
        "empty_examples": {name: given[name] - len(part) for name, part in rows.items()},
        "train_seconds": round(seconds, 2),
        "parameters": model.num_parameters(),
        **provenance(),
    }
    if trainer.is_world_process_zero():
        folder = Path(args.output_dir)
        (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        command = shlex.join([*program_words(), *sys.argv[1:]])
        (folder / "card_results.json").write_text(
            json.dumps(card_results(result, command), indent=1) + "\n", encoding="utf-8"
        )
    return result


def describe(result: dict, output_dir: str) -> str:
    """The result of [`run_finetuning`] as text to print."""
    lines = []
    for name, scores in result["metrics"].items():
        shown = "  ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in scores.items())  # fmt: skip
        lines.append(f"{name:<12}{shown}")
    lines.append(f"trained in {result['train_seconds']:.1f} s, {result['steps']} steps")
    lines.append(f"model and results.json in {output_dir}")
    return "\n".join(lines)


__all__ = ["build_trainer", "card_results", "describe", "load_splits", "run_finetuning"]
