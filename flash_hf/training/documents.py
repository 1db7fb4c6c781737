# SPDX-License-Identifier: Apache-2.0
"""Loading documents from files, from data sets on the Hub and as streams, and holding some out for validation."""

import bz2
import contextlib
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..sources import load_named


FILE_TYPES = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

DECOMPRESSORS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

READING_VERSION = 2  # raise it when `_read_texts` changes: `datasets` would reuse documents from its cache
TEXT_ADVICE = "Choose one with --text_column."
TEXT = Features({"text": Value("string")})


def suffix_of(path: Path | str) -> str:
    """The suffix of a file without compression: `.jsonl` for "a.jsonl.gz"."""
    path = Path(path)
    return path.with_suffix("").suffix if path.suffix in DECOMPRESSORS else path.suffix


@contextlib.contextmanager
def open_text(path: Path | str, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a UTF-8 file, compressed or not, and skip a byte-order mark; ValueError for other or damaged contents."""
    try:
        opener = DECOMPRESSORS.get(Path(path).suffix, open)
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"{path} must be a complete file of UTF-8 text, but: {error}. Convert it, or download it again."
        ) from None


def read_rows(
    path: Path | str, columns: dict[str, str], *, names: list[str] | None = None, quotes: bool = True
) -> Iterator[tuple[str, dict]]:
    """Read some columns of a .json, .jsonl, .csv or .tsv file, compressed or not.

    Other columns may change their type, begin late, or differ between files. `datasets` infers one schema for all
    columns from the first rows, and fails at a later row that differs.

    Args:
        columns: names, each with advice for the error if it is missing ("Choose one with --text_column.").
        names: columns of a table without a header.
        quotes: whether quotation marks enclose the fields of a table.

    Yields:
        The location of a row, for messages ("a.jsonl, line 3"), and its values: strings from a table; from JSON, None
        for a missing column. A ValueError if it is missing everywhere.
    """
    missing, found, table = dict(columns), {}, suffix_of(path) in (".csv", ".tsv")
    with open_text(path, newline="" if table else None) as file:
        for place, row in _read_table(file, path, columns, names, quotes) if table else _read_json(file, path):
            if missing:
                found |= dict.fromkeys(row)
                missing = {name: advice for name, advice in missing.items() if name not in row}
            yield place, {name: row.get(name) for name in columns}
    if found:
        refuse_missing(path, missing, found)


def refuse_missing(path: Path | str, missing: dict[str, str], found: Collection[str]) -> None:
    """Raise a ValueError for the first missing column, with its advice."""
    for name, advice in missing.items():
        raise ValueError(f"{path} must have a column {name!r}; it has {', '.join(found) or 'none'}. {advice}".rstrip())


def _read_json(file: IO[str], path: Path | str) -> Iterator[tuple[str, dict]]:
    """Rows of JSON Lines, of an array of objects or strings, or of one object over several lines."""
    lines = enumerate(file, 1)
    first = next((numbered for numbered in lines if numbered[1].strip()), (1, ""))
    try:
        by_line = not first[1] or isinstance(json.loads(first[1]), dict)
    except ValueError:
        by_line = False
    if by_line:
        pieces = ((f"{path}, line {number}", line) for number, line in chain([first], lines) if line.strip())
    else:
        pieces = [(str(path), first[1] + file.read())]
    for place, text in pieces:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} must hold JSON: {error.msg} at character {error.pos + 1}.") from None
        for number, row in enumerate(content if isinstance(content, list) and not by_line else [content], 1):
            row = {"text": row} if isinstance(row, str) else row
            where = place if by_line else f"{place}, row {number}"
            if not isinstance(row, dict):
                raise ValueError(f"{where} must hold a JSON object, got {type(row).__name__}: {str(row)[:80]!r}.")
            yield where, row


def _read_table(
    file: IO[str], path: Path | str, columns: dict[str, str], names: list[str] | None, quotes: bool
) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(sys.maxsize)  # a field may be a whole book
    delimiter, quoting = "\t" if suffix_of(path) == ".tsv" else ",", csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.DictReader(file, names, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        names = reader.fieldnames or []
        refuse_missing(path, {name: advice for name, advice in columns.items() if name not in names}, names)
        for row in reader:
            # With too many or too few fields, a column may hold a part of another one.
            if None in row or any(row[name] is None for name in columns):
                raise ValueError(
                    f"{path}, line {reader.line_num} must have {len(names)} fields ({', '.join(names)}). Quote text "
                    f"that contains {delimiter!r}."
                )
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path} is malformed: {error}. Are the quotation marks in pairs?") from None


def _read_texts(files: list[tuple], text_column: str, sample_by: str, version: int) -> Iterator[dict]:
    """Documents of `files`: tuples of a path, and its time and size, by which `datasets` detects changes."""
    for path, *_ in files:
        if FILE_TYPES[suffix_of(path)] == "text":
            with open_text(path) as file:
                if sample_by == "line":
                    texts = (line.removesuffix("\n") for line in file)
                else:
                    texts = file.read().split("\n\n") if sample_by == "paragraph" else [file.read()]
                yield from ({"text": text} for text in texts)
            continue
        for place, row in read_rows(path, {text_column: TEXT_ADVICE}):
            text, place = row[text_column], f"{place}, column {text_column!r}"
            if not isinstance(text, str | None):
                raise ValueError(f"{place} must hold a string, got {type(text).__name__}: {str(text)[:80]!r}.")
            if half := re.search("[\ud800-\udfff]", text or ""):
                raise ValueError(f"{place} must hold text; character {half.start()} is half of a surrogate pair.")
            yield {"text": text}


def load_documents(
    files: str | Path | list[str | Path] | None = None,
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    sample_by: Literal["document", "paragraph", "line"] = "document",
    streaming: bool = False,
    max_documents: int | None = None,
) -> Dataset | IterableDataset:
    """Load documents, one per row, in the single column `text`.

    Of JSON, CSV and Parquet files only the text column is read; see [`read_rows`].

    Args:
        files: local files of one type: .txt, .md, .json, .jsonl, .csv (also as .gz, .xz, .bz2) or .parquet.
        dataset_name: instead of files, a data set on the Hub or a folder, as `datasets.load_dataset` reads it.
        dataset_config_name: configuration of the data set.
        split: split of the data set, for instance `"train"` or `"train[:5%]"`.
        text_column: column that holds the text.
        sample_by: what a document is in .txt and .md files: the whole file, a paragraph (up to a blank line), a line.
        streaming: return an `IterableDataset` that is read during training.
        max_documents: keep the first ones only.

    Raises:
        ValueError, FileNotFoundError: neither or both sources, a missing, empty or undecodable file, a missing column,
            a text that is not a string (in a stream: once it is read).
    """
    if (files is None) == (dataset_name is None):
        raise ValueError(f"Documents must come from either files or dataset_name, got {files=} and {dataset_name=}.")
    paths = [Path(file) for file in ([files] if isinstance(files, (str, Path)) else files or ())]
    source = dataset_name or ", ".join(map(str, paths))
    try:
        if dataset_name is not None:
            options = {"name": dataset_config_name, "split": split, "streaming": streaming}
            documents = load_named(load_dataset, dataset_name, option="--dataset_name", **options)
        else:
            documents, text_column = _load_files(paths, sample_by, streaming, text_column)
    except (DatasetGenerationError, pa.ArrowInvalid) as error:  # `datasets` leaves the reason in the cause
        reason = str(error.__cause__ or error)
        raise ValueError(reason if any(str(path) in reason for path in paths) else f"{source}: {reason}") from error
    columns = documents.column_names or list(next(iter(documents), {}))
    if text_column not in columns:
        refuse_missing(source, {text_column: TEXT_ADVICE}, columns)
    feature = (documents.features or {}).get(text_column)
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"text_column={text_column!r} of {source} must hold strings, got {feature}.")
    documents = documents.select_columns([text_column])
    documents = documents if text_column == "text" else documents.rename_column(text_column, "text")
    return documents if max_documents is None else documents.take(max_documents)


def _load_files(
    paths: list[Path], sample_by: str, streaming: bool, text_column: str
) -> tuple[Dataset | IterableDataset, str]:
    """Documents, and the name of their text column."""
    for path in paths:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"Data file {path} {what}. Pass files, or a data set with --dataset_name.")
        if suffix_of(path) not in FILE_TYPES:
            raise ValueError(
                f"Data file {path} must end in one of {', '.join(FILE_TYPES)} (or that and "
                f"{', '.join(DECOMPRESSORS)}), it ends in {path.suffix or 'nothing'!r}."
            )
    types = sorted({FILE_TYPES[suffix_of(path)] for path in paths})
    if len(types) > 1:
        raise ValueError(f"Data files must be of one type, got {', '.join(types)}. Convert them first.")
    names = [str(path) for path in paths]
    if types == ["parquet"]:
        columns = [text_column] if text_column in pq.read_schema(names[0]).names else None
        options = {"split": "train", "streaming": streaming, "columns": columns}
        return load_dataset("parquet", data_files=names, **options), text_column
    options = {"text_column": text_column, "sample_by": sample_by, "version": READING_VERSION}
    for name in names:  # up to the first text, for errors that a stream would raise late
        if not any((row["text"] or "").strip() for row in _read_texts([(name,)], **options)):
            raise ValueError(f"{name} must hold text, but has none.")
    options["files"] = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
    if streaming:
        return IterableDataset.from_generator(_read_texts, features=TEXT, gen_kwargs=options), "text"
    # writer_batch_size is small because documents may be whole books.
    return Dataset.from_generator(_read_texts, features=TEXT, gen_kwargs=options, writer_batch_size=32), "text"


def split_documents(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Hold out the last `fraction` of the documents for validation, or of the text if there is only one document.

    The split is by position, not random: neighboring passages of a book have too much in common.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The validation fraction must be above 0 and below 1, got {fraction}.")
    count = len(documents)
    if count > 1:
        border = count - min(count - 1, max(1, round(count * fraction)))
        return documents.select(range(border)), documents.select(range(border, count))
    text = documents[0]["text"]
    border = re.compile(r"\s").search(text, int(len(text) * (1 - fraction)))  # do not split a word
    if border is None or not border.start():
        raise ValueError(
            f"A single document of {len(text)} characters cannot be split with {fraction:.0%} for validation. Pass a "
            "--validation_file."
        )
    parts = text[: border.start()], text[border.start() :]
    return tuple(Dataset.from_dict({"text": [part]}) for part in parts)
