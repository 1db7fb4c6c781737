# SPDX-License-Identifier: Apache-2.0
"""The options of `python -m scripts.finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from flash_hf.commands.train import TrainingParser, parse_with_config
from flash_hf.training.arguments import FlashTrainingArguments, ModelArguments, check_least


TaskName = Literal["classification", "tagging", "qa"]


@dataclass
class TaskArguments:
    """The task and its labelled data."""

    _argument_group_name = "task and data"

    task: TaskName = field(
        metadata={
            "help": "classification of texts (or pairs), tagging of words, or qa: answers that are spans of a text."
        }
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Labelled files: .csv, .tsv, .json, .jsonl (also as .gz, .xz or .bz2), .parquet; for tagging also "
            "column files (a word and its tag per line, blank lines between sentences); for qa also SQuAD's .json."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "The same for validation. By default part of the training set is held out."}
    )
    test_file: list[str] | None = field(default=None, metadata={"help": "The same for a test after training."})
    dataset_name: str | None = field(default=None, metadata={"help": "Instead of files: a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Its split to validate on."})
    test_split: str | None = field(default=None, metadata={"help": "Its split to test on."})
    validation_fraction: float = field(default=0.1, metadata={"help": "Share held out without a validation set."})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Column names of .csv and .tsv files without a header."}
    )
    quoting: Literal["auto", "standard", "none"] = field(
        default="auto", metadata={"help": "Whether quotes enclose fields. auto: yes in .csv, no in .tsv (as in GLUE)."}
    )
    text_column: str = field(default="text", metadata={"help": "Classification: column of the text."})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Classification of pairs: column of the second text."}
    )
    label_column: str = field(default="label", metadata={"help": "Classification: column of the class."})
    tokens_column: str = field(default="tokens", metadata={"help": "Tagging: column of the words."})
    tags_column: str = field(default="tags", metadata={"help": "Tagging: column of the tags."})
    max_length: int = field(
        default=8192, metadata={"help": "Maximum tokens per example; longer ones are cut (qa: split)."}
    )
    stride: int = field(default=128, metadata={"help": "Qa: overlap of the parts of a split text, in tokens."})
    max_answer_length: int = field(default=30, metadata={"help": "Qa: maximum tokens per answer."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Train on the first examples only."})
    max_eval_examples: int | None = field(
        default=None, metadata={"help": "Validate and test on the first examples only."}
    )

    def __post_init__(self):
        tasks = get_args(TaskName)
        if self.task not in tasks:
            raise ValueError(f"task must be one of {', '.join(tasks)}, got {self.task!r}.")
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError("Labelled data come from either --train_file or --dataset_name: give exactly one.")
        if self.train_file is None and (self.validation_file or self.test_file):
            raise ValueError(
                "--validation_file and --test_file go with --train_file; with --dataset_name give --validation_split "
                "and --test_split."
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be above 0 and below 1, got {self.validation_fraction}.")
        check_least(self, max_length=1, max_answer_length=1, max_train_examples=1, max_eval_examples=1)
        if self.task == "qa" and not 0 <= self.stride < self.max_length:
            raise ValueError(
                f"stride must lie in [0, max_length = {self.max_length}), got {self.stride}. Give --stride, or a "
                "larger --max_length."
            )


@dataclass
class FinetuningArguments(FlashTrainingArguments):
    """The training arguments with defaults for labelled data: a lower learning rate, validation after each epoch."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Examples per device and batch."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to validate: no, steps or epoch."})
    eval_on_start: bool = field(default=False, metadata={"help": "Validate before the first step."})


def parse_arguments(
    arguments: list[str] | None = None, description: str | None = None
) -> tuple[ModelArguments, TaskArguments, FinetuningArguments]:
    """Options of the command line and, where it leaves them open, of a `--config` file (see `parse_with_config`)."""
    return parse_with_config(
        TrainingParser((ModelArguments, TaskArguments, FinetuningArguments), description=description), arguments
    )


__all__ = ["FinetuningArguments", "TaskArguments", "TaskName", "parse_arguments"]
