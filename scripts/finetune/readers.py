# SPDX-License-Identifier: Apache-2.0
"""Labelled rows from files or the Hub: tables, JSON, Parquet, CoNLL column files and SQuAD."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, load_dataset

from flash_hf.sources import load_named
from flash_hf.training.documents import open_text, read_rows, refuse_missing, suffix_of

from .arguments import TaskArguments


TABLES = (".csv", ".tsv")
COLUMN_FILES = (".conll", ".iob", ".bio", ".txt", ".tsv", ".annotated")


def load_rows(
    args: TaskArguments, files: list[str] | None, split: str, columns: dict[str, str]
) -> tuple[Dataset, list[str]]:
    """The columns of the files, or of a split of a data set, and the place of each row, for messages.

    Args:
        columns: Their names in the files, each with the advice of the message if it is missing.

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
    types = {suffix_of(path) for path in paths}
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
        rows = [row for path in paths for row in read_rows(path, columns, **options)]
    elif suffix == ".parquet":
        for path in paths:
            found = pq.read_schema(path).names
            refuse_missing(path, {name: columns[name] for name in columns if name not in found}, found)
        try:
            rows = load_dataset("parquet", data_files=files, split="train", columns=[*columns])
        except Exception as error:  # datasets hides the reason in __cause__
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
    refuse_missing(source, {name: columns[name] for name in columns if name not in found}, found)
    return rows.select_columns([*columns]), [f"{source}, row {number}" for number in range(1, len(rows) + 1)]


def as_dataset(rows: list[tuple[str, dict]]) -> Dataset:
    """A data set from rows with their places.

    Raises:
        ValueError: a column holds values of different types, or a string that UTF-8 cannot encode.
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
                        f"{place}, column {name!r} must hold values of the same type as the rows before: {reason}"
                    ) from None
        raise ValueError(f"The rows up to {rows[-1][0]} cannot be combined into one table: {error}") from error


def read_column_file(path: Path) -> list[dict]:
    """Sentences of a CoNLL file: the word in the first column, the tag in the last, separated by tabs or spaces.

    Raises:
        ValueError: a line without a second column.
    """
    sentences, tokens, tags = [], [], []
    with open_text(path) as file:
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
    """Questions of a file in SQuAD's format, version 1.1 or 2.0.

    Raises:
        ValueError: another format.
    """
    try:
        with open_text(path) as file:
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
    """Ordered class names: as in a model with the same names (`known`), else by number, else by name."""
    if known and set(known.values()) == values:
        return [known[index] for index in sorted(known)]
    if all(value.lstrip("-").isdecimal() for value in values):
        return sorted(values, key=int)
    return sorted(values)


def as_names(values: Iterable, feature, places: Iterable[str]) -> list[str]:
    """Class labels, numbers or names, as names.

    Raises:
        ValueError: a missing label, or a fraction (regression is not supported).
    """
    names = []
    for value, place in zip(values, places, strict=True):
        if value is None or value == "" or isinstance(feature, ClassLabel) and value < 0:
            raise ValueError(f"{place} must hold a label, got {value!r}.")
        if isinstance(value, str) and re.fullmatch(r"-?\d+\.\d+", value):  # from a table
            value = float(value)
        if not isinstance(value, (str, int, float)) or isinstance(value, float) and not value.is_integer():
            raise ValueError(f"{place} must hold a class (a name or a whole number) as its label, got {value!r}.")
        if isinstance(feature, ClassLabel):
            value = feature.int2str(value)
        names.append(str(int(value) if isinstance(value, (bool, float)) else value))
    return names


def strings(rows: Dataset, column: str) -> None:
    for value, place in zip(rows[column], rows["place"], strict=True):
        if not isinstance(value, str):
            raise ValueError(f"{place}, column {column!r} must hold a string, got {value!r}.")


__all__ = ["as_names", "label_names", "load_rows", "read_column_file", "read_squad_file", "strings"]
