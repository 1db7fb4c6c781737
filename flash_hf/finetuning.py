# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on the Trainer of transformers: classification, tagging and extractive question answering.

`scripts/finetune.py` is [`run_finetuning`] on a command line. Reading, aligning and scoring are here; the run itself,
its checks and its arguments are those of training.py, the metrics those of flash_hf/metrics.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, load_dataset
from datasets import Sequence as DatasetSequence
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from . import data
from .cells import provenance
from .command_line import load_named
from .hub import vocabulary_size
from .metrics import Accuracy, MacroF1, SpanF1, Squad
from .training import (
    FlashTrainer,
    FlashTrainingArguments,
    LossPlotCallback,
    ModelArguments,
    TrainingParser,
    check_arguments,
    check_output_dir,
    check_sources,
    config_fields,
    find_checkpoint,
    new_config,
    parse_with_config,
)


logger = logging.get_logger(__name__)

TaskName = Literal["classification", "tagging", "qa"]
TABLES = (".csv", ".tsv")
COLUMN_FILES = (".conll", ".iob", ".bio", ".txt", ".tsv", ".annotated")


# --- arguments -------------------------------------------------------------------------------------------------------


@dataclass
class TaskArguments:
    """Which task, on which labelled data."""

    _argument_group_name = "task and data"

    task: TaskName = field(
        metadata={
            "help": "classification of texts (or pairs), tagging of words, or qa: answers that are part of a text."
        }
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Labelled files: .csv, .tsv, .json, .jsonl (also as .gz, .xz or .bz2), .parquet; for tagging also "
            "column files (a word and its tag on each line, blank lines between sentences); for qa also .json as SQuAD"
            " has it."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "The same for validation. Without it, a part of the training set."}
    )
    test_file: list[str] | None = field(default=None, metadata={"help": "The same for a test after the training."})
    dataset_name: str | None = field(default=None, metadata={"help": "Instead of files: a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "Its split to validate on."})
    test_split: str | None = field(default=None, metadata={"help": "Its split to test on."})
    validation_fraction: float = field(default=0.1, metadata={"help": "Share held out if there is no validation set."})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the columns of .csv and .tsv files that have no header."}
    )
    quoting: Literal["auto", "standard", "none"] = field(
        default="auto",
        metadata={"help": "Whether quotes enclose fields. auto: in .csv they do, in .tsv (GLUE) they are text."},
    )
    text_column: str = field(default="text", metadata={"help": "Classification: the column that holds the text."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Classification of pairs: the second text."})
    label_column: str = field(default="label", metadata={"help": "Classification: the column that holds the class."})
    tokens_column: str = field(default="tokens", metadata={"help": "Tagging: the column that holds the words."})
    tags_column: str = field(default="tags", metadata={"help": "Tagging: the column that holds the tags."})
    max_length: int = field(default=8192, metadata={"help": "Tokens of an example; longer ones are cut (qa: split)."})
    stride: int = field(default=128, metadata={"help": "Qa: tokens that parts of a split text share."})
    max_answer_length: int = field(default=30, metadata={"help": "Qa: tokens of an answer at most."})
    max_train_examples: int | None = field(default=None, metadata={"help": "Train on the first ones only."})
    max_eval_examples: int | None = field(default=None, metadata={"help": "Validate and test on the first ones only."})

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}.")
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError("Labelled data come from either --train_file or --dataset_name: give exactly one.")
        if self.train_file is None and (self.validation_file or self.test_file):
            raise ValueError(
                "--validation_file and --test_file go with --train_file; with --dataset_name give --validation_split "
                "and --test_split."
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie strictly between 0 and 1, got {self.validation_fraction}.")
        for name in ("max_length", "max_answer_length", "max_train_examples", "max_eval_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.task == "qa" and not 0 <= self.stride < self.max_length:
            raise ValueError(
                f"stride must lie in [0, max_length = {self.max_length}), got {self.stride}. Give --stride, or a "
                "larger --max_length."
            )


@dataclass
class FinetuningArguments(FlashTrainingArguments):
    """The training arguments with defaults for labelled data: a lower rate, validation once an epoch."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Examples in a batch on each device."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to validate: no, steps or epoch."})
    eval_on_start: bool = field(default=False, metadata={"help": "Validate before the first step."})


def parse_arguments(
    arguments: list[str] | None = None, description: str | None = None
) -> tuple[ModelArguments, TaskArguments, FinetuningArguments]:
    """Read the command line, and under it the options of a `--config` file (see [`training.parse_with_config`])."""
    return parse_with_config(
        TrainingParser((ModelArguments, TaskArguments, FinetuningArguments), description=description), arguments
    )


# --- reading labelled data -------------------------------------------------------------------------------------------


def load_rows(
    args: TaskArguments, files: list[str] | None, split: str, columns: dict[str, str]
) -> tuple[Dataset, list[str]]:
    """These columns of the files, or of a split of the data set, and the place of each row, for messages.

    Args:
        columns: their names in the files, and what a message about a missing one advises.

    Raises:
        ValueError, FileNotFoundError: a missing, empty, undecodable or malformed file, one of an unknown type, or one
            that lacks a column.
    """
    if files is None:
        rows = load_named(
            load_dataset, args.dataset_name, option="--dataset_name", name=args.dataset_config_name, split=split
        )
        return select_columns(rows, columns, f"{args.dataset_name}, split {split}")
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"Data file {path} {what}. Give files, or a data set with --dataset_name.")
        if path.suffix != ".parquet":
            data.check_text_file(path)
    types = {data.suffix_of(path) for path in paths}
    if len(types) > 1:
        raise ValueError(f"Data files must be of one type, got {', '.join(sorted(types))}. Convert them first.")
    suffix, source = types.pop(), ", ".join(files)
    if args.task == "tagging" and suffix in COLUMN_FILES:
        rows = [(f"{path}, sentence {n}", row) for path in paths for n, row in enumerate(read_column_file(path), 1)]
    elif args.task == "qa" and suffix == ".json":
        rows = [(f"{path}, question {row['id']}", row) for path in paths for row in read_squad_file(path)]
    elif suffix in (".csv", ".tsv", ".json", ".jsonl"):
        options = {}
        if suffix in TABLES:
            quotes = args.quoting == "standard" or args.quoting == "auto" and suffix == ".csv"
            options = {"names": args.column_names, "quotes": quotes}
        rows = [row for path in paths for row in data.read_rows(path, columns, **options)]
    elif suffix == ".parquet":
        for path in paths:
            found = pq.read_schema(path).names
            data.refuse_missing(path, {name: columns[name] for name in columns if name not in found}, found)
        try:
            rows = load_dataset("parquet", data_files=files, split="train", columns=[*columns])
        except Exception as error:  # datasets hides the reason in the cause, behind "an error occurred"
            raise ValueError(f"Cannot read {source} as parquet: {error.__cause__ or error}") from error
        return select_columns(rows, columns, source)
    else:
        known = {*TABLES, ".json", ".jsonl", ".parquet", *(COLUMN_FILES if args.task == "tagging" else ())}
        raise ValueError(
            f"Data file {paths[0]} must end in one of {', '.join(sorted(known))}, got {suffix or 'nothing'!r}."
        )
    if not rows:
        raise ValueError(f"{source} must hold at least one row, it holds none.")
    places = [place for place, _ in rows]
    return select_columns(as_dataset(rows), columns, source)[0], places


def select_columns(rows: Dataset, columns: dict[str, str], source: str) -> tuple[Dataset, list[str]]:
    found = rows.column_names
    data.refuse_missing(source, {name: columns[name] for name in columns if name not in found}, found)
    return rows.select_columns([*columns]), [f"{source}, row {number}" for number in range(1, len(rows) + 1)]


def as_dataset(rows: list[tuple[str, dict]]) -> Dataset:
    """Rows, each with its place, as a data set.

    Raises:
        ValueError: a column holds values of unlike types, or a string that UTF-8 cannot hold.
    """
    errors = (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError)
    try:
        return Dataset.from_list([row for _, row in rows])
    except errors as error:
        for name in rows[0][1]:
            first = None
            for place, row in rows:
                value = row.get(name)
                first = value if first is None else first
                try:
                    pa.array([first, value])
                except errors as reason:
                    raise ValueError(
                        f"{place}, column {name!r} must hold values of the type that the rows before have: {reason}"
                    ) from None
        raise ValueError(f"The rows up to {rows[-1][0]} cannot be made into one table: {error}") from error


def read_column_file(path: Path) -> list[dict]:
    """Sentences of a CoNLL file: the word in the first column, the tag in the last; tabs, or else blanks, separate.

    Raises:
        ValueError: a line without a second column.
    """
    sentences, tokens, tags = [], [], []
    with data.open_text(path) as file:
        lines = file.read().split("\n")
    for number, line in enumerate([*lines, ""], 1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            parts = [part.strip() for part in line.split("\t")] if "\t" in line.strip() else line.split()
            if len(parts) < 2 or not parts[-1]:
                raise ValueError(f"{path}, line {number} must hold a word and its tag, got {line!r}.")
            tokens.append(parts[0])
            tags.append(parts[-1])
        elif tokens:
            sentences.append({"tokens": tokens, "tags": tags})
            tokens, tags = [], []
    return sentences


def read_squad_file(path: Path) -> list[dict]:
    """Questions of a file in SQuAD's format, also of version 2.0.

    Raises:
        ValueError: another format.
    """
    try:
        with data.open_text(path) as file:
            articles = json.load(file)["data"]
        return [
            {
                "id": str(question["id"]),
                "question": question["question"],
                "context": paragraph["context"],
                "answers": {
                    name: [answer[name] for answer in question["answers"]] for name in ("text", "answer_start")
                },
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be in SQuAD's format, data > paragraphs > context, qas > id, question, answers > text, "
            f"answer_start; but: {error!r}."
        ) from error


def label_names(values: set[str], known: dict[int, str] | None = None) -> list[str]:
    """Classes in order: that of a model that knows just these, or by number, or by name."""
    if known and set(known.values()) == values:
        return [known[index] for index in sorted(known)]
    if all(value.lstrip("-").isdecimal() for value in values):
        return sorted(values, key=int)
    return sorted(values)


def as_names(values: Iterable, feature, places: Iterable[str]) -> list[str]:
    """Class labels, numbers or names, as names.

    Raises:
        ValueError: a missing label, or a fraction (regression is no task here).
    """
    names = []
    for value, place in zip(values, places, strict=True):
        if value is None or value == "" or isinstance(feature, ClassLabel) and value < 0:
            raise ValueError(f"{place} must hold a label, got {value!r}.")
        if isinstance(value, str) and re.fullmatch(r"-?\d+\.\d+", value):  # of a table
            value = float(value)
        if not isinstance(value, (str, int, float)) or isinstance(value, float) and not value.is_integer():
            raise ValueError(f"{place} must hold a class (a name or a whole number) as its label, got {value!r}.")
        if isinstance(feature, ClassLabel):
            value = feature.int2str(value)
        names.append(str(int(value) if isinstance(value, (bool, float)) else value))
    return names


# --- tasks -----------------------------------------------------------------------------------------------------------


class Task:
    """What distinguishes a task from the others: its columns, features, and scores.

    Args:
        labels: names of the classes, in the order of the model's; empty for question answering.
    """

    name: str
    auto: type
    main_metric: str
    nothing: str  # what an empty row has
    metrics: tuple[str, ...]

    def __init__(self, args: TaskArguments, tokenizer: PreTrainedTokenizerBase, labels: list[str]):
        self.args, self.own_tokenizer, self.labels = args, tokenizer, labels
        # Answers are marked by column. The checkpoint's own tokenizer, which is saved, keeps its side: a causal one's
        # is the left.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.padding_side = "right"

    @classmethod
    def columns(cls, args: TaskArguments) -> dict[str, str]:
        """The task's name of each column that the rows must have, and theirs."""
        raise NotImplementedError

    @classmethod
    def load(cls, args: TaskArguments, files: list[str] | None, split: str, limit: int | None) -> Dataset:
        """Rows under the task's column names, checked.

        Raises:
            ValueError: no rows, a missing column, or one of a wrong type.
        """
        theirs = cls.columns(args)
        advice = {
            name: f"Name it with --{own}_column." if hasattr(args, f"{own}_column") else ""
            for own, name in theirs.items()
        }
        rows, places = load_rows(args, files, split, advice)
        source = f"{args.dataset_name}, split {split}" if files is None else ", ".join(files)
        if not len(rows):
            raise ValueError(f"{source} must hold at least one row, it holds none.")
        rows = rows.rename_columns({name: own for own, name in theirs.items() if own != name})
        rows = rows.add_column("place", places)
        rows = rows.take(min(limit or len(rows), len(rows)))
        return cls.check(rows)

    @classmethod
    def check(cls, rows: Dataset) -> Dataset:
        """Rows with labels as names. The column `place` says where each row stands, for messages.

        Raises:
            ValueError: a value of a wrong type.
        """
        raise NotImplementedError

    @classmethod
    def label_set(cls, rows: Dataset) -> Counter:
        """How often each label occurs."""
        return Counter()

    @classmethod
    def texts(cls, rows: Dataset) -> list[dict]:
        """The text, to train a tokenizer on."""
        raise NotImplementedError

    def encode(self, batch: dict, indices: list[int]) -> dict:
        """Features of a batch of rows; columns that the model does not take are for `score`.

        Of each feature, `row` is the index of its row, `cut` whether that is too long, and `empty` whether it has
        nothing to learn from or to predict.
        """
        raise NotImplementedError

    def collator(self):
        return DataCollatorWithPadding(self.tokenizer)

    @staticmethod
    def reduce(logits: Tensor | tuple[Tensor, ...], labels) -> Tensor | tuple[Tensor, ...]:
        """What of the logits `score` needs."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def score(self, prediction: EvalPrediction, rows: Dataset, features: Dataset) -> dict[str, float]:
        raise NotImplementedError

    def features(self, rows: Dataset, what: str) -> tuple[Dataset, Dataset]:
        """Tokenised rows, and the rows themselves, both without empty ones; says how many those are, or too long.

        Raises:
            ValueError: every row is empty.
        """
        options = {"remove_columns": rows.column_names, "desc": f"Tokenise {what}"}
        out = rows.map(self.encode, with_indices=True, batched=True, batch_size=64, **options)
        cut, empty = sum(out["cut"]), np.array(out["empty"], bool)
        if cut:
            logger.warning(
                f"{cut} of {len(rows)} examples for {what} are longer than max_length = {self.args.max_length} tokens "
                f"and were {'split' if self.name == 'qa' else 'cut'}."
            )
        if empty.any():
            left_out = np.unique(np.array(out["row"])[empty])
            places = [rows[int(row)]["place"] for row in left_out[:5]]
            logger.warning(
                f"Left out {len(left_out)} of {len(rows)} examples for {what}, with {self.nothing}: "
                f"{'; '.join(places)}{' ...' if len(left_out) > 5 else ''}."
            )
            rows = rows.select(np.setdiff1d(np.arange(len(rows)), left_out))
            out = out.select(np.flatnonzero(~empty))
        if not len(rows):
            raise ValueError(f"An example for {what} must not be empty, but each one has {self.nothing}.")
        return out.remove_columns(["cut", "empty", "row"]), rows

    def was_cut(self, encoded, count: int) -> list[bool]:
        return [bool(encoded.encodings[row].overflowing) for row in range(count)]


def strings(rows: Dataset, column: str) -> None:
    for value, place in zip(rows[column], rows["place"], strict=True):
        if not isinstance(value, str):
            raise ValueError(f"{place}, column {column!r} must hold a string, got {value!r}.")


class Classification(Task):
    """One class for a text or a pair of texts."""

    name, auto, main_metric = "classification", AutoModelForSequenceClassification, "accuracy"
    nothing = "no text"
    metrics = ("loss", "accuracy", "macro_f1")

    @classmethod
    def columns(cls, args):
        pair = {"text_pair": args.text_pair_column} if args.text_pair_column else {}
        return {"text": args.text_column, **pair, "label": args.label_column}

    @classmethod
    def check(cls, rows):
        for column in set(rows.column_names) - {"label", "place"}:
            strings(rows, column)
        names = as_names(rows["label"], rows.features["label"], rows["place"])
        return rows.remove_columns("label").add_column("label", names)

    @classmethod
    def label_set(cls, rows):
        return Counter(rows["label"])

    @classmethod
    def texts(cls, rows):
        return [{"text": text} for text in rows["text"]]

    def encode(self, batch, indices):
        texts, pairs = batch["text"], batch.get("text_pair")
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.args.max_length)
        labels = [self.labels.index(name) for name in batch["label"]]
        # A special token alone says nothing of a class, and without one there is nothing at all.
        empty = [
            not ids or not (text.strip() or pair.strip())
            for ids, text, pair in zip(encoded["input_ids"], texts, pairs or texts, strict=True)
        ]
        cut = self.was_cut(encoded, len(labels))
        return {**encoded, "labels": labels, "cut": cut, "empty": empty, "row": indices}

    def score(self, prediction, rows, features):
        both = {"predictions": prediction.predictions, "references": prediction.label_ids}
        return {**Accuracy(keep_in_memory=True).compute(**both), **MacroF1(keep_in_memory=True).compute(**both)}


class Tagging(Task):
    """A tag for every word."""

    name, auto, main_metric = "tagging", AutoModelForTokenClassification, "f1"
    nothing = "no words"
    metrics = ("loss", "f1", "precision", "recall", "accuracy")

    @classmethod
    def columns(cls, args):
        return {"tokens": args.tokens_column, "tags": args.tags_column}

    @classmethod
    def check(cls, rows):
        feature = rows.features["tags"]
        feature = feature.feature if isinstance(feature, DatasetSequence) else None
        tags = []
        for row in rows:
            if not isinstance(row["tokens"], list) or not isinstance(row["tags"], list):
                raise ValueError(f"{row['place']}: tokens and tags must be lists, got {row['tokens']!r}.")
            if len(row["tokens"]) != len(row["tags"]) or not all(isinstance(word, str) for word in row["tokens"]):
                raise ValueError(
                    f"{row['place']} must have as many tags as words, all strings; it has {len(row['tags'])} for "
                    f"{len(row['tokens'])}."
                )
            tags.append(as_names(row["tags"], feature, [row["place"]] * len(row["tags"])))
        return rows.remove_columns("tags").add_column("tags", tags)

    @classmethod
    def label_set(cls, rows):
        return Counter(tag for tags in rows["tags"] for tag in tags)

    @classmethod
    def texts(cls, rows):
        return [{"text": " ".join(words)} for words in rows["tokens"]]

    def encode(self, batch, indices):
        # As running text and not word by word: byte-level tokenizers spell a word with the blank before it.
        texts = [" ".join(words) for words in batch["tokens"]]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.args.max_length, return_offsets_mapping=True)
        labels, owners = [], []
        for words, tags, offsets in zip(batch["tokens"], batch["tags"], encoded.pop("offset_mapping"), strict=True):
            # The word that each character belongs to; blanks belong to none.
            word_at = [owner for number, word in enumerate(words) for owner in [number] * len(word) + [-1]]
            row, owner, last = [], [], -1
            for begin, end in offsets:
                word = word_at[end - 1] if end > begin else -1
                owner.append(word if word > last else -1)  # later pieces of a word have no label
                row.append(self.labels.index(tags[word]) if word > last else data.IGNORE)
                last = max(last, word)
            labels.append(row)
            owners.append(owner)
        empty = [all(label == data.IGNORE for label in row) for row in labels]
        cut = self.was_cut(encoded, len(labels))
        return {**encoded, "labels": labels, "word": owners, "cut": cut, "empty": empty, "row": indices}

    def collator(self):
        return DataCollatorForTokenClassification(self.tokenizer)

    def score(self, prediction, rows, features):
        guesses = []
        # A word behind the cut, or without any token, has no prediction; it is wrong unless nothing was to be found.
        outside = "O" if "O" in self.labels else self.labels[0]
        for row, tags, words in zip(prediction.predictions, rows["tags"], features["word"], strict=True):
            guess = [outside] * len(tags)
            for place, word in enumerate(words):
                if word >= 0:
                    guess[word] = self.labels[row[place]]
            guesses.append(guess)
        if all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-") for name in self.labels):
            return SpanF1(keep_in_memory=True).compute(predictions=guesses, references=rows["tags"])
        flat = {
            "predictions": [self.labels.index(tag) for tags in guesses for tag in tags],
            "references": [self.labels.index(tag) for tags in rows["tags"] for tag in tags],
        }
        f1 = MacroF1(keep_in_memory=True).compute(**flat)["macro_f1"]
        return {**Accuracy(keep_in_memory=True).compute(**flat), "f1": f1}


class QuestionAnswering(Task):
    """The part of a text that answers a question, or, as in SQuAD 2.0, that there is none."""

    name, auto, main_metric = "qa", AutoModelForQuestionAnswering, "f1"
    nothing = "no question or no context"
    metrics = ("loss", "f1", "exact_match")
    best = 20  # starts and ends that are combined

    @classmethod
    def columns(cls, args):
        return {name: name for name in ("id", "question", "context", "answers")}

    @classmethod
    def check(cls, rows):
        for column in ("question", "context"):
            strings(rows, column)
        seen = {}
        for row in rows:
            earlier = seen.setdefault(row["id"], row["place"])
            if earlier != row["place"]:
                raise ValueError(f"{row['place']} must have an id of its own, {row['id']!r} is that of {earlier}.")
            answers = row["answers"] if isinstance(row["answers"], dict) else {}
            texts, starts = answers.get("text"), answers.get("answer_start")
            if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
                raise ValueError(
                    f"{row['place']}: answers must be two lists of one length, text and answer_start (empty where "
                    f"there is no answer), got {row['answers']!r}."
                )
            for text, start in zip(texts, starts, strict=True):
                if row["context"][start : start + len(text)] != text:
                    raise ValueError(
                        f"{row['place']}: answer_start = {start} must be where {text!r} begins in the context, which "
                        f"has {row['context'][start : start + len(text)]!r} there."
                    )
        return rows

    @classmethod
    def texts(cls, rows):
        return [{"text": text} for text in {*rows["context"], *rows["question"]}]

    def encode(self, batch, indices):
        room = self.args.max_length - self.args.stride - self.tokenizer.num_special_tokens_to_add(pair=True)
        for question, ids in zip(
            batch["question"], self.tokenizer(batch["question"], add_special_tokens=False)["input_ids"], strict=True
        ):
            if len(ids) >= room:
                raise ValueError(
                    f"max_length = {self.args.max_length} must be longer than stride = {self.args.stride} and the "
                    f"question of {len(ids)} tokens together: {question[:60]!r}."
                )
        encoded = self.tokenizer(
            batch["question"], batch["context"], truncation="only_second", max_length=self.args.max_length,
            stride=self.args.stride, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        owner = encoded.pop("overflow_to_sample_mapping")
        starts, ends, offset_rows, empty = [], [], [], []
        for feature, row in enumerate(owner):
            offsets = np.array(encoded["offset_mapping"][feature], int).reshape(-1, 2)
            of_context = np.array([part == 1 for part in encoded.sequence_ids(feature)], bool)
            empty.append(not (batch["question"][row].strip() and batch["context"][row].strip() and of_context.any()))
            offsets[~of_context] = -1
            offset_rows.append(offsets.tolist())
            place = (0, 0)  # the first token stands for "no answer here"
            for text, begin in [*zip(*(batch["answers"][row][n] for n in ("text", "answer_start")), strict=True)][:1]:
                end = begin + len(text)
                touched = np.flatnonzero(of_context & (offsets[:, 1] > begin) & (offsets[:, 0] < end))
                if len(touched) and offsets[touched[0], 0] <= begin and offsets[touched[-1], 1] >= end:
                    place = int(touched[0]), int(touched[-1])
            starts.append(place[0])
            ends.append(place[1])
        pieces = Counter(owner)
        seen = set()
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "start_positions": starts,
            "end_positions": ends,
            "offsets": offset_rows,
            "example_id": [batch["id"][row] for row in owner],
            "cut": [pieces[row] > 1 and not (row in seen or seen.add(row)) for row in owner],
            "empty": empty,
            "row": [indices[row] for row in owner],
        }

    @staticmethod
    def reduce(logits, labels):
        return logits[:2]

    def answer(self, context: str, windows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], allow_none: bool) -> str:
        """The best span of all windows of a context; each is (start logits, end logits, offsets)."""
        found, best, none = "", -np.inf, -np.inf
        for start, end, offsets in windows:
            none = max(none, start[0] + end[0])
            places = np.flatnonzero(offsets[:, 0] >= 0)
            firsts = places[np.argsort(-start[places], kind="stable")[: self.best]]
            lasts = places[np.argsort(-end[places], kind="stable")[: self.best]]
            length = lasts[None] - firsts[:, None] + 1
            score = start[firsts][:, None] + end[lasts][None]
            score = np.where((length >= 1) & (length <= self.args.max_answer_length), score, -np.inf)
            if score.size and score.max() > best:
                first, last = np.unravel_index(score.argmax(), score.shape)
                best = score.max()
                found = context[offsets[firsts[first], 0] : offsets[lasts[last], 1]].strip()
        return "" if allow_none and none > best else found

    def score(self, prediction, rows, features):
        windows: dict[str, list] = {}
        for number, feature in enumerate(features):
            offsets = np.array(feature["offsets"])
            logits = [part[number, : len(offsets)].astype(np.float64) for part in prediction.predictions]
            windows.setdefault(feature["example_id"], []).append((*logits, offsets))
        allow_none = any(not answers["text"] for answers in rows["answers"])
        return Squad(keep_in_memory=True).compute(
            predictions=[
                {"id": row["id"], "prediction_text": self.answer(row["context"], windows[row["id"]], allow_none)}
                for row in rows
            ],
            references=[{"id": row["id"], "answers": row["answers"]} for row in rows],
        )


TASKS: dict[str, type[Task]] = {cls.name: cls for cls in (Classification, Tagging, QuestionAnswering)}


# --- the run ---------------------------------------------------------------------------------------------------------


def load_splits(args: TaskArguments) -> dict[str, Dataset]:
    """Training, validation and, if there is one, test rows.

    Raises:
        ValueError: validation or test rows have a label that the training rows lack; or there is one label only.
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
        # Questions about one text stand together and would give each other away; other rows may be sorted by class.
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
    """The head on a new model, on that of `--model`, or for a checkpoint whose weights Trainer is going to load."""
    names = {}
    if labels:
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    if resume is not None:
        config = AutoConfig.from_pretrained(resume)
        if labels and config.id2label != names["id2label"]:
            raise ValueError(
                f"The checkpoint {resume} knows the labels {', '.join(config.id2label.values())}, the data have "
                f"{', '.join(labels)}. Resume with the data the run began with."
            )
        model = task.auto.from_config(config)
    elif model_args.model is not None:
        # A head for other classes is made anew, and transformers says so.
        model = load_named(
            task.auto.from_pretrained, model_args.model, option="--model", ignore_mismatched_sizes=True, **names
        )
    else:
        config = new_config("masked", config_fields(model_args), tokenizer)
        for name, value in names.items():
            setattr(config, name, value)
        model = task.auto.from_config(config)
    needed = vocabulary_size(tokenizer)
    if model.config.vocab_size < needed:
        raise ValueError(
            f"The model's vocab_size must be at least {needed}, the tokenizer's highest id + 1, got "
            f"{model.config.vocab_size}. Take the tokenizer that belongs to the model."
        )
    return model


def load_or_train_tokenizer(
    task: type[Task], model_args: ModelArguments, rows: Dataset, resume: Path | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, else `--tokenizer`, else the model's, else a new one."""
    source = resume or model_args.tokenizer or model_args.model
    if source is None:
        tokenizer = data.train_tokenizer(task.texts(rows), model_args.tokenizer_vocab_size)
    else:
        tokenizer = data.load_tokenizer(str(source), masked=False)
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer {source} must be a fast one: words and answers are found by its offsets.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    return tokenizer


def card_results(result: dict, command: str) -> list[dict]:
    """The scores of [`run_finetuning`] in the form that scripts/cards puts into a model card."""
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
    """Tokenise the splits and put everything together; validation is the trainer's evaluation.

    Returns:
        The trainer, the features of each split, and the rows they come from: those that are not empty.
    """
    with args.main_process_first(desc="tokenising"):
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
    """Check, train, validate, test, save. Everything goes to `args.output_dir`.

    The folder then holds the model (with the names of its classes) and the tokenizer, `checkpoint-*`, the log and its
    plot, `results.json` and, for a model card, `card_results.json`.

    Args:
        plot: keep log and plot up to date, which needs matplotlib.

    Returns:
        What `results.json` holds: the `metrics` of validation and test, and what is needed to have them again.
    """
    check_arguments(args, TASKS[task_args.task].metrics)
    for name in ("batch_tokens", "per_device_batch_tokens", "sequence_warmup_steps"):
        if getattr(args, name):
            raise ValueError(
                f"{name} must be left out, got {getattr(args, name)}: it is for rows of one length, and fine-tuning "
                "has examples of all lengths. Give --per_device_train_batch_size."
            )
    resume = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=resume)
    fields = config_fields(model_args)
    check_sources(model_args)
    if model_args.model is None:
        new_config("masked", fields)  # for its errors: they should not wait for the data
    if plot:
        import matplotlib  # noqa: F401  the same: it would be missed only at the first validation

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
        for old in Path(args.output_dir).glob("checkpoint-*"):
            if (old / "trainer_state.json").is_file():
                logger.warning(f"Deleting {old} of an earlier run.")
                shutil.rmtree(old)
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - begin
    trainer.save_model()  # first: the evaluation leaves the model in the type of bf16_full_eval or fp16_full_eval
    metrics = {}
    for name in ("validation", "test"):
        if name in rows:
            trainer.compute_metrics = partial(trainer.compute_metrics.func, rows=rows[name], features=features[name])
            scores = trainer.evaluate(features[name], metric_key_prefix=name)
            # Seconds and rates are in the log; results are what could be repeated.
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
        # The interpreter's folder says nothing to others.
        command = shlex.join(["python", *sys.argv])
        (folder / "card_results.json").write_text(
            json.dumps(card_results(result, command), indent=1) + "\n", encoding="utf-8"
        )
    return result


def describe(result: dict, output_dir: str) -> str:
    """The result of [`run_finetuning`] as a table to print."""
    lines = []
    for name, scores in result["metrics"].items():
        shown = "  ".join(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in scores.items())  # fmt: skip
        lines.append(f"{name:<12}{shown}")
    lines.append(f"trained in {result['train_seconds']:.1f} s, {result['steps']} steps")
    lines.append(f"model and results.json in {output_dir}")
    return "\n".join(lines)


__all__ = [
    "FinetuningArguments", "TASKS", "Task", "TaskArguments", "build_trainer", "card_results", "describe",
    "label_names", "load_rows", "load_splits", "parse_arguments", "provenance", "read_column_file", "read_squad_file",
    "run_finetuning",
]  # fmt: skip
