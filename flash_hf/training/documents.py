# SPDX-License-Identifier: Apache-2.0
"""Loading documents from files, from data sets on the Hub and as streams, and holding some out for validation."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Collection, Iterator
from io import TextIOWrapper
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetBuilder,
    Features,
    IterableDataset,
    ReadInstruction,
    Sequence,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetGenerationError
from datasets.utils.file_utils import xopen
from transformers.utils import logging

from ..sources import load_named


logger = logging.get_logger(__name__)

FILE_TYPES = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

DECOMPRESSORS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

READING_VERSION = 1  # raise it when `_read_texts` changes: `datasets` would reuse documents from its cache
TEXT_ADVICE = "Choose one with --text_column."
TEXT = Features({"text": Value("string")})
TOKENIZED = Features(
    {"input_ids": Sequence(Value("int32")), **dict.fromkeys(("n_bytes", "n_words", "n_unknown"), Value("int64"))}
)


def check_text_file(path: Path) -> None:
    """Check a text file, compressed or not, by reading it once. `datasets` silently replaces bad bytes in JSON.

    Raises:
        ValueError: the file is empty, blank, not UTF-8 (with the offset of the first wrong byte), or truncated.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, blank, encoding = 0, True, "latin1"
    try:
        with DECOMPRESSORS.get(path.suffix, open)(path, "rb") as file:
            while True:
                chunk = file.read(1 << 20)
                pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut in two
                # Windows' "Unicode" files begin with this mark.
                if not done and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    encoding = "utf-16"
                blank = not decoder.decode(chunk, final=not chunk).strip() and blank
                if not chunk:
                    break
                done += len(chunk)
    except UnicodeDecodeError as error:
        offset = done - pending + error.start
        raise ValueError(
            f"{path} must be UTF-8 text; byte {offset} (0x{error.object[error.start]:02x}) is not: {error.reason}. "
            f"Convert it first, for instance: iconv -f {encoding} -t utf-8 {path.name} > utf8_{path.name}"
        ) from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete {path.suffix} file ({error}). Download it again.") from None
    if blank:
        raise ValueError(f"{path} must hold text, but is {'blank' if done else 'empty (0 bytes)'}.")


def suffix_of(path: Path | str) -> str:
    """The suffix of a file without compression: `.jsonl` for "a.jsonl.gz"."""
    path = PurePosixPath(path)
    return path.with_suffix("").suffix if path.suffix in DECOMPRESSORS else path.suffix


def open_text(path: Path | str, newline: str | None = None) -> IO[str]:
    """Open a UTF-8 file or URL, compressed or not, and skip a byte-order mark."""
    options = {"encoding": "utf-8-sig", "newline": newline}
    file = xopen(path, "rb") if "://" in str(path) else open(path, "rb")
    suffix = PurePosixPath(path).suffix
    return DECOMPRESSORS[suffix](file, "rt", **options) if suffix in DECOMPRESSORS else TextIOWrapper(file, **options)


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
        for a missing column.

    Raises:
        ValueError: the file or a row is malformed, or a column is missing everywhere.
    """
    suffix = suffix_of(path)
    missing, found = dict(columns), {}
    try:
        if suffix in (".csv", ".tsv"):
            yield from _read_table(path, columns, "\t" if suffix == ".tsv" else ",", names, quotes)
            return
        for place, row in _read_json(path):
            if missing:
                found |= dict.fromkeys(row)
                missing = {name: advice for name, advice in missing.items() if name not in row}
            yield place, {name: row.get(name) for name in columns}
    except UnicodeDecodeError as error:  # of a URL; local files have passed `check_text_file`
        raise ValueError(f"{path} must be UTF-8 text: {error}. Convert it first.") from None
    if found:
        refuse_missing(path, missing, found)


def refuse_missing(path: Path | str, missing: dict[str, str], found: Collection[str]) -> None:
    """Raise a ValueError for the first missing column, with its advice."""
    for name, advice in missing.items():
        raise ValueError(f"{path} must have a column {name!r}; it has {', '.join(found) or 'none'}. {advice}".rstrip())


def _read_json(path: Path | str) -> Iterator[tuple[str, dict]]:
    """Rows of JSON Lines, of an array of objects or strings, or of one object over several lines."""
    with open_text(path) as file:
        begin = [""]
        while begin[-1].strip() == "" and (line := file.readline()):
            begin.append(line)
        if not begin[-1].lstrip().startswith("[") and _parse(begin[-1]) is not None:
            for number, line in enumerate(chain(begin[1:], file), 1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _as_object(_parse(line, place), place)
            return
        content = _parse("".join(begin) + file.read(), str(path))
    for number, row in enumerate(content if isinstance(content, list) else [content], 1):
        place = f"{path}, row {number}"
        yield place, {"text": row} if isinstance(row, str) else _as_object(row, place)


def _parse(text: str, place: str | None = None):
    """The value of a JSON text; for malformed text None, or a ValueError if `place` is given."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if place is None:
            return None
        reason = f"{error.msg} at character {error.colno}" if hasattr(error, "colno") else error
        if getattr(error, "lineno", 1) > 1:
            reason = f"{reason} of line {error.lineno}"
        raise ValueError(f"{place} must hold JSON: {reason}.") from None


def _as_object(row, place: str) -> dict:
    if not isinstance(row, dict):
        raise ValueError(f"{place} must hold a JSON object, got {type(row).__name__}: {str(row)[:80]!r}.")
    return row


def _read_table(
    path: Path | str, columns: dict[str, str], delimiter: str, names: list[str] | None, quotes: bool
) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(sys.maxsize)  # a field may be a whole book
    with open_text(path, newline="") as file:
        quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        line = 1
        try:
            names = names or next(reader, [])
            refuse_missing(path, {name: advice for name, advice in columns.items() if name not in names}, names)
            line = reader.line_num + 1
            for fields in reader:
                place, line = f"{path}, line {line}", reader.line_num + 1
                if not fields:
                    continue
                row = dict(zip(names, fields, strict=False))
                # With too many or too few fields, a column may hold a part of another one.
                if len(fields) > len(names) or not columns.keys() <= row.keys():
                    raise ValueError(
                        f"{place} must have {len(names)} fields ({', '.join(names)}), it has {len(fields)}. Quote "
                        f"text that contains {delimiter!r}."
                    )
                yield place, {name: row[name] for name in columns}
        except csv.Error as error:
            raise ValueError(f"{path}, line {line} is malformed: {error}. Are the quotation marks in pairs?") from None


def _read_texts(files: list[tuple], text_column: str, version: int) -> Iterator[dict]:
    """Documents of `files`: tuples of a path, and its time and size, by which `datasets` detects changes."""
    for file, *_ in files:
        for place, row in read_rows(file, {text_column: TEXT_ADVICE}):
            text = row[text_column]
            check_text(text, f"{place}, column {text_column!r}")
            yield {"text": text}


def check_text(text, place: str) -> None:
    """Raise a ValueError unless `text` is None or a string that UTF-8 can encode."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place} must hold a string, got {type(text).__name__}: {str(text)[:80]!r}.")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} must hold text; character {error.start} (U+{ord(text[error.start]):04X}) is half of a surrogate "
            "pair. Write the whole character, or remove it."
        ) from None


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
    """Load documents, one per row, in the single column `text`, or tokenized ones from `scripts/tokenize_text.py`.

    Of JSON, CSV and Parquet files only the text column is read; see [`read_rows`].

    Args:
        files: local files of one type: .txt, .md, .json, .jsonl, .csv (also as .gz, .xz, .bz2) or .parquet.
        dataset_name: instead of files, a data set on the Hub or a folder for `datasets.load_dataset`.
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
    if dataset_name is not None:
        documents, text_column = load_named(
            _load_named, dataset_name, option="--dataset_name", config=dataset_config_name, split=split,
            streaming=streaming, text_column=text_column,
        )  # fmt: skip
        source = dataset_name
    else:
        paths = [Path(file) for file in ([files] if isinstance(files, (str, Path)) else files)]
        documents, text_column = _load_files(paths, sample_by, streaming, text_column)
        source = ", ".join(map(str, paths))

    columns = documents.column_names or list(next(iter(documents), {}))
    if text_column not in columns and set(TOKENIZED) <= set(columns) and isinstance(documents, Dataset):
        return _first(documents.select_columns(list(TOKENIZED)), max_documents).cast(TOKENIZED)
    if text_column not in columns:
        refuse_missing(source, {text_column: TEXT_ADVICE}, columns)
    feature = (documents.features or {}).get(text_column)
    if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"text_column={text_column!r} of {source} must hold strings, got {feature}.")
    documents = documents.select_columns([text_column])
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    return _first(documents, max_documents)


def _first(documents: Dataset | IterableDataset, max_documents: int | None) -> Dataset | IterableDataset:
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents must be at least 1, got {max_documents}.")
    return documents if max_documents is None else documents.take(max_documents)


def _load_files(
    paths: list[Path], sample_by: str, streaming: bool, text_column: str
) -> tuple[Dataset | IterableDataset, str]:
    """Documents, and the name of their text column."""
    types = set()
    for path in paths:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"Data file {path} {what}. Pass files, or a data set with --dataset_name.")
        suffix = suffix_of(path)
        if suffix not in FILE_TYPES:
            raise ValueError(
                f"Data file {path} must end in one of {', '.join(FILE_TYPES)} (or that and "
                f"{', '.join(DECOMPRESSORS)}), it ends in {path.suffix or 'nothing'!r}."
            )
        types.add(FILE_TYPES[suffix])
        if FILE_TYPES[suffix] != "parquet":
            check_text_file(path)
    if len(types) > 1:
        raise ValueError(f"Data files must be of one type, got {', '.join(sorted(types))}. Convert them first.")
    builder = types.pop()
    if builder in ("json", "csv"):
        return _read_files([*map(str, paths)], text_column, streaming), "text"
    columns = {"columns": _parquet_columns(paths, text_column)} if builder == "parquet" else {"sample_by": sample_by}
    names = [str(path) for path in paths]
    try:
        return load_dataset(builder, data_files=names, split="train", streaming=streaming, **columns), text_column
    except Exception as error:  # `datasets` leaves the reason in the cause
        raise ValueError(f"Cannot read {', '.join(names)} as {builder}: {error.__cause__ or error}") from error


def _load_named(
    name: str, config: str | None, split: str, streaming: bool, text_column: str
) -> tuple[Dataset | IterableDataset, str]:
    """Documents of a data set on the Hub or in a folder, and the name of their text column."""
    if not streaming and not Path(name).is_dir():
        try:  # so that `datasets` finds it again in its cache without the network
            return load_dataset(name, config, split=split), text_column
        except DatasetGenerationError as error:
            logger.info(f"Reading only the text column of {name}, since: {error.__cause__ or error}")
    builder = load_dataset_builder(name, config)
    files = {
        str(key): [*map(str, value)] for key, value in (getattr(builder.config, "data_files", None) or {}).items()
    }
    kind, options = builder.name, {}
    if config is None and Path(name).is_dir():
        # `datasets` reads the most frequent type and skips the other files silently.
        unread = sorted(
            str(path)
            for path in Path(name).rglob("*")
            if path.suffix != ".md" and FILE_TYPES.get(suffix_of(path), kind) != kind
        )
        if unread:
            more = " ..." * (len(unread) > 5)
            logger.warning(f"{name} is read as {kind}; not read: {', '.join(unread[:5])}{more}")
    if kind == "parquet" and files:
        options = {"columns": _parquet_columns(next(iter(files.values()))[:1], text_column)}
    parts = {part.split("[")[0].strip() for part in split.split("+")}
    if not _is_plain(builder, files) or "all" in parts or streaming and split not in parts:
        return load_dataset(name, config, split=split, streaming=streaming, **options), text_column
    if not parts <= files.keys():
        raise ValueError(f"split={split!r} must be made of the splits of {name}: {', '.join(files)}.")
    for path in (path for part in parts for path in files[part] if "://" not in path):
        check_text_file(Path(path))
    read = {part: _read_files(files[part], text_column, streaming) for part in sorted(parts)}
    if split in parts:
        return read[split], "text"
    slices = ReadInstruction.from_spec(split).to_absolute({part: len(rows) for part, rows in read.items()})
    rows = [read[part.splitname].select(range(part.from_ or 0, part.to)) for part in slices]
    return concatenate_datasets(rows), "text"


def _is_plain(builder: DatasetBuilder, files: dict[str, list[str]]) -> bool:
    """Whether these are JSON or CSV files for [`read_rows`], without the separators, fields of objects and
    compressions that only `datasets` supports."""
    if builder.name not in ("json", "csv"):
        return False
    given = ("name", "version", "data_dir", "data_files", "description")
    usual = {key: value for key, value in vars(type(builder.config)()).items() if key not in given}
    return all(getattr(builder.config, key) == value for key, value in usual.items()) and all(
        FILE_TYPES.get(suffix_of(path)) == builder.name and "::" not in path
        for paths in files.values()
        for path in paths
    )


def _read_files(files: list[str], text_column: str, streaming: bool) -> Dataset | IterableDataset:
    """The text column of .json, .jsonl and .csv files, or URLs, under the name `text`."""
    for file in files:
        # Read up to the first text, for errors that a stream would raise late.
        texts = (row[text_column] for _, row in read_rows(file, {text_column: TEXT_ADVICE}))
        if not any(text is not None for text in texts):
            raise ValueError(f"{file} must hold text, but has none in the column {text_column!r}.")
        if "://" in file:
            break  # one file is enough: there may be a thousand on the Hub
    # URLs of the Hub contain the commit, so they need no time and size.
    states = [None if "://" in file else Path(file).stat() for file in files]
    stamps = [(file, state and (state.st_mtime_ns, state.st_size)) for file, state in zip(files, states, strict=True)]
    options = {"files": stamps, "text_column": text_column, "version": READING_VERSION}
    if streaming:
        return IterableDataset.from_generator(_read_texts, features=TEXT, gen_kwargs=options)
    try:
        # writer_batch_size is small because documents may be whole books.
        return Dataset.from_generator(_read_texts, features=TEXT, gen_kwargs=options, writer_batch_size=32)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _parquet_columns(paths: list[Path | str], text_column: str) -> list[str]:
    """The columns to read: the text, or those of tokenized documents."""
    for path in paths:
        with xopen(str(path), "rb") as file:
            schema = pq.read_schema(file)
        if text_column not in schema.names and set(TOKENIZED) <= set(schema.names):
            return list(TOKENIZED)
        refuse_missing(path, {} if text_column in schema.names else {text_column: TEXT_ADVICE}, schema.names)
        kind = schema.field(text_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise ValueError(f"{path}, column {text_column!r} must hold strings, got {kind}.")
    return [text_column]


def split_documents(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Hold out the last `fraction` of the documents for validation, or of the text if there is only one document.

    The split is by position, not random: neighboring passages of a book have too much in common.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The validation fraction must be above 0 and below 1, got {fraction}.")
    count = len(documents)
    if count == 1 and "text" not in documents.column_names:
        raise ValueError("A single tokenized document cannot be split for validation. Pass a --validation_file.")
    if count > 1:
        border = count - min(count - 1, max(1, round(count * fraction)))
        return documents.select(range(border)), documents.select(range(border, count))
    text = documents[0]["text"]
    border = int(len(text) * (1 - fraction))
    while border < len(text) and not text[border].isspace():  # do not split a word
        border += 1
    parts = text[:border], text[border:]
    if not all(part.strip() for part in parts):
        raise ValueError(
            f"A single document of {len(text)} characters cannot be split with {fraction:.0%} for validation: one "
            "part would be empty. Pass a --validation_file."
        )
    return tuple(Dataset.from_dict({"text": [part]}) for part in parts)
