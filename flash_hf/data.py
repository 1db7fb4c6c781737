# SPDX-License-Identifier: Apache-2.0
"""Text in, blocks of tokens out: loading, tokenizers, packing and collators for the two language-model trainings.

Everything that `datasets`, `tokenizers` and `transformers` do is left to them. What is ours: checks that speak before
work is lost, a packer that drops nothing and lets every token be predicted exactly once, masks that a resumed run
draws again.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property, partial
from io import TextIOWrapper
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
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
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    default_data_collator,
)
from transformers.utils import logging

from .command_line import load_named
from .hub import vocabulary_size
from .loss_flash import IGNORE


logger = logging.get_logger(__name__)

Packing = Literal["concatenate", "documents"]

PACKING_VERSION = 1  # raise it when `pack` changes: `datasets` would find the blocks of the old one in its cache

READING_VERSION = 1  # the same for `_read_texts`

FILE_TYPES = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
DECOMPRESSORS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

# What byte-level BPE takes for one word (letters, digits, signs or blanks in a row) is cut after this many characters.
# The time to train grows with the square of the longest word, and DNA or Chinese is a single one for whole pages.
LONGEST_WORD = 256
LONG_RUN = "|".join(rf"{kind}{{{LONGEST_WORD}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s"))

TEXT_ADVICE = "Choose one with --text_column."
TEXT = Features({"text": Value("string")})
TOKENIZED = Features(
    {
        "input_ids": Sequence(Value("int32")),
        "n_bytes": Value("int64"),
        "n_words": Value("int64"),
        "n_unknown": Value("int64"),
    }
)


# --- documents ---------------------------------------------------------------------------------------------------


def check_text_file(path: Path) -> None:
    """Read a text file (or a compressed one) through once, so that bad bytes are reported now and not in epoch two.

    `datasets` itself lets some of them pass: its JSON reader replaces bytes that are not UTF-8 without a word.

    Raises:
        ValueError: the file is empty, blank, not UTF-8 (with the offset of the first wrong byte), or cut off.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, blank, encoding = 0, True, "latin1"
    try:
        with DECOMPRESSORS.get(path.suffix, open)(path, "rb") as file:
            while True:
                chunk = file.read(1 << 20)
                pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut in two
                # What Windows calls "Unicode" begins with this mark.
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
        raise ValueError(f"{path} is not a whole {path.suffix} file ({error}). Copy or download it again.") from None
    if blank:
        raise ValueError(f"{path} must hold text, but it is {'blank' if done else 'empty (0 bytes)'}.")


def suffix_of(path: Path | str) -> str:
    """The suffix of a file, or of what is compressed in it: `.jsonl` of "a.jsonl.gz"."""
    path = PurePosixPath(path)
    return path.with_suffix("").suffix if path.suffix in DECOMPRESSORS else path.suffix


def open_text(path: Path | str, newline: str | None = None) -> IO[str]:
    """Open a UTF-8 file or URL, compressed or not, without its byte-order mark."""
    options = {"encoding": "utf-8-sig", "newline": newline}
    file = xopen(path, "rb") if "://" in str(path) else open(path, "rb")
    suffix = PurePosixPath(path).suffix
    return DECOMPRESSORS[suffix](file, "rt", **options) if suffix in DECOMPRESSORS else TextIOWrapper(file, **options)


def read_rows(
    path: Path | str, columns: dict[str, str], *, names: list[str] | None = None, quotes: bool = True
) -> Iterator[tuple[str, dict]]:
    """Read these columns of a .json, .jsonl, .csv or .tsv file, compressed or not.

    The other columns may hold anything: change their type, begin late, or be different in another file. `datasets`
    infers one schema for all columns from the first rows, and fails at a later row that is different.

    Args:
        columns: their names, and what a message about a missing one advises ("Name it with --text_column.").
        names: the columns of a table without a header.
        quotes: whether quotation marks enclose the fields of a table.

    Yields:
        The place of a row, for messages ("a.jsonl, line 3"), and its values. Those of a table are strings; a row of
        JSON that lacks a column has None there.

    Raises:
        ValueError: the file or a row is malformed, or no row has one of the columns.
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
    except UnicodeDecodeError as error:  # not of local files, which `check_text_file` has read
        raise ValueError(f"{path} must be UTF-8 text: {error}. Convert it first.") from None
    if found:
        refuse_missing(path, missing, found)


def refuse_missing(path: Path | str, missing: dict[str, str], found: Collection[str]) -> None:
    """Raise a ValueError that names the first missing column, those there are, and an advice."""
    for name, advice in missing.items():
        raise ValueError(f"{path} must have a column {name!r}; it has {', '.join(found) or 'none'}. {advice}".rstrip())


def _read_json(path: Path | str) -> Iterator[tuple[str, dict]]:
    """Rows of JSON Lines, of an array of objects or strings, or of a single object over several lines."""
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
    """The value that a JSON text holds; if it holds none, a ValueError, or None where no place is given."""
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
                # With a field too many, or too few, a column may hold a part of another one.
                if len(fields) > len(names) or not columns.keys() <= row.keys():
                    raise ValueError(
                        f"{place} must have {len(names)} fields ({', '.join(names)}), it has {len(fields)}. Text that "
                        f"holds {delimiter!r} must stand in quotation marks."
                    )
                yield place, {name: row[name] for name in columns}
        except csv.Error as error:
            raise ValueError(f"{path}, line {line} is malformed: {error}. Are the quotation marks in pairs?") from None


def _read_texts(files: list[tuple], text_column: str, version: int) -> Iterator[dict]:
    """Documents of files that are each given with the time and size that tell `datasets` whether it has changed."""
    for file, *_ in files:
        for place, row in read_rows(file, {text_column: TEXT_ADVICE}):
            text = row[text_column]
            check_text(text, f"{place}, column {text_column!r}")
            yield {"text": text}


def check_text(text, place: str) -> None:
    """Raise a ValueError unless `text` is None or a string that UTF-8 can hold."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place} must hold a string, got {type(text).__name__}: {str(text)[:80]!r}.")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} must hold text; character {error.start} (U+{ord(text[error.start]):04X}) is half of a surrogate "
            "pair. Write the whole character, or leave it out."
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
    """Load documents, one a row, in the single column `text`; or, as `scripts/tokenize_text.py` wrote them, tokenised.

    Of JSON, CSV and Parquet the text column alone is read; see [`read_rows`].

    Args:
        files: local files, all of one type: .txt, .md, .json, .jsonl, .csv or .parquet; all but the last also as
            .gz, .xz or .bz2.
        dataset_name: instead of files: a data set on the Hub, or a folder that `datasets.load_dataset` understands.
        dataset_config_name: its configuration.
        split: its split, for instance `"train"` or `"train[:5%]"`.
        text_column: the column that holds the text.
        sample_by: what a document is in .txt and .md files: the whole file, a paragraph (up to a blank line), a line.
        streaming: read while training instead of first; the result is an `IterableDataset`.
        max_documents: keep only the first ones.

    Raises:
        ValueError, FileNotFoundError: neither or both sources, a missing, empty or undecodable file, no such column,
            a text that is no string (in a stream: when it is read).
    """
    if (files is None) == (dataset_name is None):
        raise ValueError(f"Documents come either from files or from dataset_name, got {files=} and {dataset_name=}.")
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
        raise ValueError(f"text_column={text_column!r} of {source} must hold strings, it holds {feature}.")
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
    """Documents, and the name of the column that holds them."""
    types = set()
    for path in paths:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"Data file {path} {what}. Give files, or a data set with --dataset_name.")
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
    except Exception as error:  # datasets hides the reason in the cause, behind "an error occurred"
        raise ValueError(f"Cannot read {', '.join(names)} as {builder}: {error.__cause__ or error}") from error


def _load_named(
    name: str, config: str | None, split: str, streaming: bool, text_column: str
) -> tuple[Dataset | IterableDataset, str]:
    """Documents of a data set on the Hub or in a folder, and the name of the column that holds them."""
    if not streaming and not Path(name).is_dir():
        try:
            # What `datasets` can read, it finds again in its cache without the network.
            return load_dataset(name, config, split=split), text_column
        except DatasetGenerationError as error:
            logger.info(f"Reading the text column of {name} alone, since: {error.__cause__ or error}")
    builder = load_dataset_builder(name, config)
    files = {
        str(key): [*map(str, value)] for key, value in (getattr(builder.config, "data_files", None) or {}).items()
    }
    kind, options = builder.name, {}
    if config is None and Path(name).is_dir():
        # `datasets` takes the files of the most frequent type, and says nothing of the others.
        unread = sorted(
            str(path)
            for path in Path(name).rglob("*")
            if path.suffix != ".md" and FILE_TYPES.get(suffix_of(path), kind) != kind
        )
        if unread:
            logger.warning(f"{name} is read as {kind}; not read: {', '.join(unread[:5])}{' ...' * (len(unread) > 5)}")
    if kind == "parquet" and files:
        options = {"columns": _parquet_columns(next(iter(files.values()))[:1], text_column)}
    parts = {part.split("[")[0].strip() for part in split.split("+")}
    if not _is_plain(builder, files) or "all" in parts or streaming and split not in parts:
        return load_dataset(name, config, split=split, streaming=streaming, **options), text_column
    if not parts <= files.keys():
        raise ValueError(f"split={split!r} must be of splits that {name} has: {', '.join(files)}.")
    for path in (path for part in parts for path in files[part] if "://" not in path):
        check_text_file(Path(path))
    read = {part: _read_files(files[part], text_column, streaming) for part in sorted(parts)}
    if split in parts:
        return read[split], "text"
    slices = ReadInstruction.from_spec(split).to_absolute({part: len(rows) for part, rows in read.items()})
    rows = [read[part.splitname].select(range(part.from_ or 0, part.to)) for part in slices]
    return concatenate_datasets(rows), "text"


def _is_plain(builder: DatasetBuilder, files: dict[str, list[str]]) -> bool:
    """Whether these are JSON or CSV files as [`read_rows`] takes them: without another separator, or one field of an
    object to read, or another compression, which `datasets` knows."""
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
        # For errors that a stream would meet late: read up to the first text.
        texts = (row[text_column] for _, row in read_rows(file, {text_column: TEXT_ADVICE}))
        if not any(text is not None for text in texts):
            raise ValueError(f"{file} must hold text, but it has none in the column {text_column!r}.")
        if "://" in file:
            break  # of a thousand files on the Hub, one
    # A URL of the Hub names the commit.
    states = [None if "://" in file else Path(file).stat() for file in files]
    stamps = [(file, state and (state.st_mtime_ns, state.st_size)) for file, state in zip(files, states, strict=True)]
    options = {"files": stamps, "text_column": text_column, "version": READING_VERSION}
    if streaming:
        return IterableDataset.from_generator(_read_texts, features=TEXT, gen_kwargs=options)
    try:
        # Few at once, since documents may be whole books.
        return Dataset.from_generator(_read_texts, features=TEXT, gen_kwargs=options, writer_batch_size=32)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _parquet_columns(paths: list[Path | str], text_column: str) -> list[str]:
    """The columns to read: the text alone, or those of tokenised documents."""
    for path in paths:
        with xopen(str(path), "rb") as file:
            schema = pq.read_schema(file)
        if text_column not in schema.names and set(TOKENIZED) <= set(schema.names):
            return list(TOKENIZED)
        refuse_missing(path, {} if text_column in schema.names else {text_column: TEXT_ADVICE}, schema.names)
        kind = schema.field(text_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise ValueError(f"{path}, column {text_column!r} must hold strings, it holds {kind}.")
    return [text_column]


def split_documents(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Hold out the end for validation: the last `fraction` of the documents, or of the text if there is only one.

    By position and not at random, since neighbouring passages of a book give each other away.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The validation share must lie strictly between 0 and 1, got {fraction}.")
    count = len(documents)
    if count == 1 and "text" not in documents.column_names:
        raise ValueError("A single tokenised document cannot be split for validation. Give a --validation_file.")
    if count > 1:
        border = count - min(count - 1, max(1, round(count * fraction)))
        return documents.select(range(border)), documents.select(range(border, count))
    text = documents[0]["text"]
    border = int(len(text) * (1 - fraction))
    while border < len(text) and not text[border].isspace():  # not inside a word
        border += 1
    parts = text[:border], text[border:]
    if not all(part.strip() for part in parts):
        raise ValueError(
            f"A single document of {len(text)} characters cannot be split with {fraction:.0%} for validation: one "
            "part is empty. Give a --validation_file."
        )
    return tuple(Dataset.from_dict({"text": [part]}) for part in parts)


# --- tokenizers ----------------------------------------------------------------------------------------------------


# A chat as running text: the messages one after another, as they are. A model of this package knows no roles; what it
# continues is the last message. The marks of the assistant's messages are for losses on these alone.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content -%}{%- for part in content -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- text(message['content']) -}}{%- endgeneration -%}
{%- else -%}
{{- text(message['content']) -}}
{%- endif -%}
{%- endfor -%}
"""


def train_tokenizer(
    documents: Iterable[dict], vocab_size: int, *, max_bytes: int = 100_000_000, causal: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: no text is unknown to it, and decoding gives every byte back.

    Its special tokens are `<|endoftext|>` (begin and end of a document, as in GPT-2), `<|pad|>` and `<|mask|>`.
    Encoding puts `<|endoftext|>` in front, because that is what stands before a document in training.
    A word has at most 256 characters: longer runs of letters, digits, signs or blanks are cut, so that text without
    blanks (DNA, Chinese) takes no longer than other text.

    Args:
        documents: rows with the column `text`.
        vocab_size: number of tokens, special ones included; at least 256 bytes and 3 special tokens.
        max_bytes: read no more text than this.
        causal: whether it is for a causal model: then it pads on the left, where generate() needs the padding, and has
            a chat template, which puts the messages of a chat one after another.

    Raises:
        ValueError: vocab_size is below 259.
    """
    end, pad, mask = "<|endoftext|>", "<|pad|>", "<|mask|>"
    # The mask takes the space before it, like the words it stands for ("the <|mask|> ran" hides " dog").
    special = [AddedToken(token, special=True, lstrip=token == mask) for token in (end, pad, mask)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(special)} (256 bytes and {len(special)} special "
            f"tokens), got {vocab_size}."
        )

    def texts() -> Iterator[str]:
        left = max_bytes
        for document in documents:
            if left <= 0:
                break
            left -= len((document["text"] or "").encode())
            yield document["text"] or ""

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LONG_RUN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", pair=f"{end} $A {end} $B", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    if tokenizer.get_vocab_size() < vocab_size:
        logger.warning(f"The text gives {tokenizer.get_vocab_size()} tokens only, fewer than vocab_size={vocab_size}.")
    return PreTrainedTokenizerFast(
        padding_side="left" if causal else "right",
        chat_template=CHAT_TEMPLATE if causal else None,
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        mask_token=special[2],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str, *, masked: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer by Hub name or folder, and check that it has the special tokens the training needs.

    Raises:
        ValueError: no token to end documents with, or none to mask with.
        OSError: there is no such tokenizer.
    """
    tokenizer = load_named(AutoTokenizer.from_pretrained, name_or_path, option="--tokenizer")
    if document_end(tokenizer) is None:
        raise ValueError(
            f"The tokenizer {name_or_path} has neither an eos_token nor a sep_token to end documents with."
        )
    if masked and tokenizer.mask_token_id is None:
        raise ValueError(
            f"The tokenizer {name_or_path} has no mask_token, which masked language modelling needs. Take another, or "
            "leave --tokenizer out to have one trained on the data."
        )
    return tokenizer


def document_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that ends a document: `eos_token`, else `sep_token` (BERT)."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def document_start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that begins a document: `bos_token`, else `cls_token` (BERT), else the one that ends it."""
    for token_id in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        if token_id is not None:
            return token_id
    return document_end(tokenizer)


def tokenize_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None
) -> Dataset:
    """Turn the column `text` into `input_ids` (no special tokens), `n_bytes`, `n_words` and `n_unknown`.

    Blank rows are left out. Bytes are those of the text in UTF-8; words are what whitespace separates. Documents that
    are tokenised already stay as they are.

    Raises:
        ValueError: they have tokens that the tokenizer does not know.
    """
    if "input_ids" in documents.column_names:
        column = documents.select_columns(["input_ids"]).with_format("numpy")
        largest = max((int(row["input_ids"].max(initial=0)) for row in column), default=0)
        if largest >= vocabulary_size(tokenizer):
            raise ValueError(
                f"The tokenised documents hold the token {largest}, and the tokenizer's ids end at "
                f"{vocabulary_size(tokenizer) - 1}. Give the --tokenizer that they were made with."
            )
        return documents
    return documents.map(
        partial(_tokenize, tokenizer=tokenizer),
        batched=True,
        batch_size=32,  # documents may be whole books
        remove_columns=["text"],
        features=TOKENIZED,
        num_proc=num_proc,
        desc="Tokenize",
        writer_batch_size=32,
    )


def _tokenize(batch: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    texts, ids = tokenize_texts(batch["text"], tokenizer)
    return {
        "input_ids": ids,
        "n_bytes": [len(text.encode()) for text in texts],
        "n_words": [len(text.split()) for text in texts],
        "n_unknown": [row.count(tokenizer.unk_token_id) for row in ids],
    }


def tokenize_texts(
    texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[list[int]]]:
    """The texts that are not blank, and their tokens, without special ones.

    Raises:
        ValueError: a text is no string.
    """
    texts = [text for text in texts if text and (not isinstance(text, str) or text.strip())]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"The text column must hold strings, got {type(wrong).__name__}: {str(wrong)[:80]!r}.")
    texts = [text.removeprefix("\ufeff") for text in texts]  # a byte-order mark is not text
    # verbose=False: documents longer than the tokenizer's model_max_length are cut into blocks later.
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return texts, ids


def text_size(tokenized: Dataset) -> dict[str, int]:
    """Documents, bytes, words and unknown tokens of a tokenised data set."""
    columns = tokenized.select_columns(["n_bytes", "n_words", "n_unknown"]).with_format("numpy")[:]
    return {"n_documents": len(tokenized), **{name: int(np.sum(column)) for name, column in columns.items()}}


# --- packing ---------------------------------------------------------------------------------------------------------


class Packer:
    """Cut documents into blocks of exactly `block_size` tokens, dropping none.

    A document is written as start token, text, end token. With `"concatenate"`, an end token that equals the start
    token stands once between two documents. With `"documents"`, `position_ids` restart at 0 at each document, which is
    where the state and the attention of FLASH stop; a document that runs over the end of a block continues in the next
    as a document of its own.

    Causal blocks overlap by one token: the last one of a block is the first one, unpredicted, of the next. So every
    token after the first is predicted exactly once, whatever the block size (with `"documents"`: every token but the
    start of each document). Masked blocks do not overlap. The last block is padded on the right; padding has
    `attention_mask` 0, label -100 and no influence.

    A block is a dictionary of `input_ids`, `attention_mask`, for causal `labels` (equal to `input_ids`, not shifted:
    the model shifts; masked labels come from the collator), for `"documents"` `position_ids`, all int `[block_size]`.

    Between two documents the packer holds at most one block of tokens: that is its state.
    """

    def __init__(self, *, block_size: int, causal: bool, packing: Packing, start_id: int, end_id: int, pad_id: int):
        self.block_size, self.causal, self.borders = block_size, causal, packing == "documents"
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.ids, self.first, self.begun = np.empty(0, np.int32), np.empty(0, bool), False

    def add(self, input_ids: Iterable[int]) -> list[dict[str, np.ndarray]]:
        """The blocks that are full once this document (its tokens, without start and end) is added."""
        shared = not self.borders and self.start_id == self.end_id and self.begun
        piece = np.concatenate([[] if shared else [self.start_id], input_ids, [self.end_id]]).astype(np.int32)
        self.ids = np.concatenate([self.ids, piece])
        self.first = np.concatenate([self.first, np.arange(len(piece)) == 0])
        self.begun = True
        blocks, begin = [], 0
        # One token more than a block is awaited, to know whether the next block opens with a document's start: then
        # nothing has to be repeated.
        while len(self.ids) - begin > self.block_size:
            end = begin + self.block_size
            blocks.append(self._block(begin, end))
            begin = end - (1 if self.causal and not (self.borders and self.first[end]) else 0)
        self.ids, self.first = self.ids[begin:], self.first[begin:]
        return blocks

    def rest(self) -> list[dict[str, np.ndarray]]:
        """The tokens that are left, as one padded block, or none."""
        return [self._block(0, len(self.ids))] if len(self.ids) else []

    def state_dict(self) -> dict:
        """What is left over from the documents so far; for JSON."""
        return {"ids": self.ids.tolist(), "starts": np.flatnonzero(self.first).tolist(), "begun": self.begun}

    def load_state_dict(self, state: dict) -> None:
        """Go on as the packer went on whose [`state_dict`] this is."""
        self.ids, self.begun = np.array(state["ids"], np.int32), state["begun"]
        self.first = np.isin(np.arange(len(self.ids)), state["starts"])

    def _block(self, begin: int, end: int) -> dict[str, np.ndarray]:
        tokens, starts = self.ids[begin:end], self.first[begin:end].copy()
        starts[0] = True
        fill = (0, self.block_size - len(tokens))
        row = {
            "input_ids": np.pad(tokens, fill, constant_values=self.pad_id),
            "attention_mask": np.pad(np.ones(len(tokens), np.int8), fill),
        }
        if self.causal:
            unpredicted = starts if self.borders else np.arange(len(tokens)) == 0
            row["labels"] = np.pad(np.where(unpredicted, IGNORE, tokens), fill, constant_values=IGNORE)
        if self.borders:
            index = np.arange(len(tokens), dtype=np.int32)
            row["position_ids"] = np.pad(index - np.maximum.accumulate(np.where(starts, index, 0)), fill)
        return row


def packing_options(
    tokenizer: PreTrainedTokenizerBase, *, block_size: int, causal: bool, packing: Packing
) -> dict[str, int | bool | str]:
    """The arguments of [`Packer`] for a tokenizer, checked.

    Raises:
        ValueError: block_size below 2, an unknown packing.
    """
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 (one token to see, one to predict), got {block_size}.")
    if packing not in ("concatenate", "documents"):
        raise ValueError(f"packing must be 'concatenate' or 'documents', got {packing!r}.")
    end_id, pad_id = document_end(tokenizer), tokenizer.pad_token_id
    return {
        "block_size": block_size,
        "causal": causal,
        "packing": packing,
        "start_id": document_start(tokenizer),
        "end_id": end_id,
        "pad_id": pad_id if pad_id is not None else end_id,  # any id will do, it is never seen
    }


def pack_documents(
    tokenized: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    causal: bool,
    packing: Packing = "concatenate",
) -> Dataset:
    """The blocks of [`Packer`] for a whole data set, cached on disk. Streams: [`streaming.BlockStream`].

    Raises:
        ValueError: block_size below 2, an unknown packing, no text at all.
    """
    options = packing_options(tokenizer, block_size=block_size, causal=causal, packing=packing)
    if not len(tokenized):
        raise ValueError("The data set has no text: every document is empty or blank.")
    row = Sequence(Value("int32"), length=block_size)
    names = ["input_ids"] + ["labels"] * causal + ["position_ids"] * (packing == "documents")
    features = Features({**dict.fromkeys(names, row), "attention_mask": Sequence(Value("int8"), length=block_size)})
    pack = _PackBatches(Packer(**options), names=list(features), last=len(tokenized) - 1, version=PACKING_VERSION)
    tokens = tokenized.select_columns(["input_ids"]).with_format("numpy")
    blocks = tokens.map(
        pack,
        with_indices=True,
        batched=True,
        batch_size=32,  # documents may be whole books
        remove_columns=["input_ids"],
        features=features,
        desc="Pack",
    )
    return blocks.with_format(None)


class _PackBatches:
    """A [`Packer`] as `datasets` maps it: what a batch leaves over goes into the next one, so the order matters.

    Blocks are handed over as one array a column, which is written at once; one by one, each number becomes an object.
    """

    def __init__(self, packer: Packer, *, names: list[str], last: int, version: int):
        self.packer, self.names, self.last, self.version = packer, names, last, version

    def __call__(self, batch: dict, indices: list[int]) -> dict:
        blocks = [block for ids in batch["input_ids"] for block in self.packer.add(np.asarray(ids, np.int32))]
        if indices[-1] == self.last:
            blocks += self.packer.rest()
        return {name: np.stack([block[name] for block in blocks]) if blocks else [] for name in self.names}


def cut_rows(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Cut each row of a batch of blocks into rows of `length` tokens, which know nothing of each other.

    Args:
        batch: `[B, N]` each; `position_ids` restart at 0 at each document.
        length: a divisor of N.

    Returns:
        `[B * N / length, length]` each; `position_ids` restart at the beginning of a row, too.
    """
    cut = {name: values.reshape(-1, length) for name, values in batch.items()}
    if "position_ids" in cut:
        index = torch.arange(length, device=cut["position_ids"].device).expand_as(cut["position_ids"])
        starts = torch.where(cut["position_ids"] == 0, index, 0)
        cut["position_ids"] = index - starts.cummax(-1).values
    return cut


# --- collators -------------------------------------------------------------------------------------------------------


def collate(examples: list[dict]) -> dict:
    """`default_data_collator`, less a mask that masks nothing: FLASH then cuts its chunks by a plain reshape."""
    # Rows of a stream come as the int32 arrays they were packed in; losses want int64.
    batch = {name: values.long() for name, values in default_data_collator(examples).items()}
    if "attention_mask" in batch and bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    return batch


class MaskingCollator(DataCollatorForLanguageModeling):
    """transformers' BERT masking, with random numbers drawn from (seed, epoch, content of the row).

    The generator of the base class runs on from batch to batch, and its state is in no checkpoint; nor would Trainer's
    own random state do, since batches are fetched ahead. So a resumed run would see other masks. Here the masks of a
    row depend on nothing but the row: a resumed run draws them again, and so does one with another number of workers,
    of devices, or of rows on a device.

    Blocks that have labels (see [`mask_once`]) are passed through.

    Attributes:
        epoch: set by the training's callback, so that a row that comes back in another epoch is masked differently.
    """

    epoch: int = 0

    def torch_mask_tokens(self, inputs: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The masks of the base class, whose random tokens are numbers below `len(tokenizer)`: where the tokenizer
        leaves ids unused, the token of that rank stands in for a number."""
        before = inputs.clone()
        inputs, labels = super().torch_mask_tokens(inputs, *args, **kwargs)
        if len(self.sorted_ids) < int(self.sorted_ids[-1]) + 1:
            exchanged = (inputs != before) & (inputs != self.tokenizer.mask_token_id)
            inputs[exchanged] = self.sorted_ids[inputs[exchanged]]
        return inputs, labels

    @cached_property
    def sorted_ids(self) -> Tensor:
        return torch.tensor(sorted(set(self.tokenizer.get_vocab().values())))

    def torch_call(self, examples: list[dict]) -> dict:
        if "labels" in examples[0]:
            return collate(examples)
        batch = collate(examples)
        start, rows = zlib.crc32(f"{self.seed} {self.epoch}".encode()), []
        for row in batch["input_ids"]:
            self.generator = self.get_generator(zlib.crc32(row.numpy().astype(np.int32).tobytes(), start))
            rows.append(self.torch_mask_tokens(row[None]))
        batch["input_ids"], batch["labels"] = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return batch

    def mask_once(self, blocks: Dataset) -> Dataset:
        """Mask an evaluation set for good, so that every evaluation, before and after, asks the same questions."""
        return blocks.map(self._mask_batch, batched=True, batch_size=64, desc="Mask once")

    def _mask_batch(self, batch: dict) -> dict:
        masked = self.torch_call([{"input_ids": row} for row in batch["input_ids"]])
        return {name: masked[name].numpy() for name in ("input_ids", "labels")}


__all__ = [
    "MaskingCollator", "Packer", "check_text_file", "collate", "cut_rows", "document_end", "document_start",
    "load_documents", "load_tokenizer", "open_text", "pack_documents", "packing_options", "read_rows",
    "refuse_missing", "split_documents", "text_size", "tokenize_documents", "tokenize_texts", "train_tokenizer",
]  # fmt: skip
