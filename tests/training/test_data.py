# SPDX-License-Identifier: Apache-2.0
"""Loading, tokenizers, packing and collators of flash_hf/training/."""

import csv
import gzip
import io
import json
import lzma
import os
import pickle
import time
from functools import partial
from multiprocessing import context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM
from flash_hf.hub import vocabulary_size
from flash_hf.loss_flash import IGNORE
from flash_hf.training.documents import load_documents, split_documents
from flash_hf.training.packing import MaskingCollator, Packer, collate, cut_rows, pack_documents
from flash_hf.training.tokenizer import (
    LONGEST_WORD,
    document_end,
    document_start,
    load_tokenizer,
    text_size,
    tokenize_documents,
    train_tokenizer,
)
from helpers import BOOK, TEXT


pytestmark = pytest.mark.usefixtures("own_cache")
# One, two, three and four bytes a character, a combining mark, Windows line ends, a tab.
ODD_TEXT = "naïve – 日本語 🦁 e\u0301\r\n\t“Dorothy” didn’t\n\n  ok "


@pytest.fixture(scope="module")
def with_gaps(tokenizer, tmp_path_factory):
    """The tokenizer with a hundred more tokens, from 1000 to 1099: the ids from 400 to 999 are unused."""
    folder = tmp_path_factory.mktemp("gaps")
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {f"[{number}]": number for number in range(1000, 1100)}
    content["added_tokens"].append({**content["added_tokens"][0], "id": 1099, "content": "[1099]"})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(str(folder), masked=True)


def write(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(content)
    return path


def jsonl(*texts: str, column: str = "text") -> str:
    return "".join(json.dumps({"id": i, column: text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts))


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.xz", "a.json.gz"])
def test_json_files_give_the_same_documents(tmp_path, name, streaming):
    path = write(tmp_path / name, jsonl("one", ODD_TEXT, "three"))
    documents = load_documents(path, streaming=streaming)
    assert [dict(row) for row in documents] == [{"text": "one"}, {"text": ODD_TEXT}, {"text": "three"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.md"])
def test_a_text_file_is_one_document(tmp_path, name, streaming):
    text = "First line\n\nSecond – paragraph\n"
    documents = list(load_documents(write(tmp_path / name, text), streaming=streaming))
    assert [row["text"] for row in documents] == [text]


def test_sample_by_column_and_limit(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\n\nthree\n")
    assert load_documents(path, sample_by="line")["text"] == ["one", "two", "", "three"]
    assert load_documents(path, sample_by="paragraph")["text"] == ["one\ntwo", "three\n"]
    other = write(tmp_path / "a.jsonl", jsonl("one", "two", "three", column="content"))
    assert load_documents(other, text_column="content", max_documents=2)["text"] == ["one", "two"]
    more = write(tmp_path / "b.jsonl", jsonl("four", column="content"))
    both = load_documents([other, more], text_column="content")
    assert both["text"] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_by_name(tmp_path, streaming):
    """A folder stands for one of the Hub: `datasets.load_dataset` reads both, with configurations and splits."""
    for split, texts in (("train", ["one", "two", "three"]), ("validation", ["four"])):
        (tmp_path / "set" / "small").mkdir(parents=True, exist_ok=True)
        write(tmp_path / "set" / "small" / f"{split}.jsonl", jsonl(*texts, column="content"))
    card = "---\nconfigs:\n- config_name: small\n  data_dir: small\n---\n"
    write(tmp_path / "set" / "README.md", card)
    options = {"dataset_config_name": "small", "text_column": "content", "streaming": streaming}
    load = partial(load_documents, dataset_name=str(tmp_path / "set"), **options)
    assert [row["text"] for row in load(split="train")] == ["one", "two", "three"]
    assert [row["text"] for row in load(split="validation")] == ["four"]
    if not streaming:
        assert [row["text"] for row in load(split="train[1:]")] == ["two", "three"]


def test_a_damaged_data_set_by_name_is_refused_with_the_reason(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", jsonl("one") + "{")
    with pytest.raises(ValueError, match="JSON parse error"):
        load_documents(dataset_name=str(tmp_path / "set"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.xz", "a.jsonl.gz"])
def test_empty_and_blank_files_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"a\.\S+ must hold text, but has none"):
        load_documents(write(tmp_path / name, ""))
    with pytest.raises(ValueError, match=r"a\.\S+ must hold text, but has none"):
        load_documents(write(tmp_path / name, " \n\n\t\n"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.xz"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path, name, streaming):
    """`datasets` replaces wrong bytes in JSON by U+FFFD."""
    lines = {"a.csv": b"text\none\n", "a.jsonl": b'{"text": "one"}\n{"text": "'}
    path = write(tmp_path / name, lines.get(name, b"one ") + b'\xe4"}\n')
    with pytest.raises(ValueError, match=rf"{name} must be a complete file of UTF-8 text, but: .*0xe4"):
        list(load_documents(path, streaming=streaming))


def test_truncated_archives_are_refused(tmp_path):
    for name in ("a.txt.gz", "a.txt.xz"):
        path = write(tmp_path / name, BOOK.read_bytes()[:50_000])
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(ValueError, match="must be a complete file of UTF-8 text, but: "):
            load_documents(path)
    path.with_suffix(".gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match="must be a complete file of UTF-8 text, but: Not a gzipped file"):
        load_documents(path.with_suffix(".gz"))


def test_wrong_sources_are_refused(tmp_path):
    good = write(tmp_path / "a.jsonl", jsonl("one"))
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        load_documents([good, tmp_path / "none.txt"])
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_documents(tmp_path)
    with pytest.raises(ValueError, match=r"must end in one of \.txt"):
        load_documents(write(tmp_path / "a.pdf", "x"))
    with pytest.raises(ValueError, match="of one type, got json, text"):
        load_documents([good, write(tmp_path / "a.txt", "x")])
    with pytest.raises(ValueError, match="either files or dataset_name"):
        load_documents()
    with pytest.raises(ValueError, match="either files or dataset_name"):
        load_documents(good, dataset_name="x/y")
    with pytest.raises(ValueError, match="Parquet"):
        load_documents(write(tmp_path / "a.parquet", "x"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_text_column_names_those_there_are(tmp_path, streaming):
    path = write(tmp_path / "a.jsonl", jsonl("one", column="content"))
    with pytest.raises(ValueError, match=r"a\.jsonl must have a column 'text'; it has id, content\. .*--text_column"):
        load_documents(path, streaming=streaming)
    good = write(tmp_path / "b.jsonl", jsonl("one"))
    for name, content in (("c.csv", "a,b\n1,2\n"), ("d.csv", "a,b\n")):
        with pytest.raises(ValueError, match=rf"{name} must have a column 'text'; it has a, b\."):
            load_documents(write(tmp_path / name, content), streaming=streaming)
    with pytest.raises(ValueError, match=r"a\.jsonl must have a column 'text'"):  # the second of two files
        load_documents([good, path], streaming=streaming)
    for name in ("a", "b"):
        Dataset.from_json(str(tmp_path / f"{name}.jsonl")).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet must have a column 'text'; it has id, content\."):
        load_documents(tmp_path / "a.parquet", streaming=streaming)


# Other columns: one changes its type, one begins late, one is an object here and a list there.
UNLIKE = [
    {"text": "one", "id": 1, "meta": {"a": 1}},
    {"text": "two", "id": "x", "meta": [1]},
    {"id": 2.5},
    {"text": "three", "late": {"deep": [{"er": None}, 3]}},
    {"text": None},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_may_hold_anything(tmp_path, streaming):
    """Their type changes in a file, late in a file, and from file to file."""
    lines = "".join(json.dumps(row) + "\n" for row in UNLIKE)
    table = "id,text\n1,one\nx,two\n,three\n"
    files = {
        "a.jsonl": (lines, ["one", "two", None, "three", None]),
        "b.jsonl.gz": ('{"id": [], "text": "four"}', ["four"]),
        "c.json": (json.dumps(UNLIKE, indent=1), ["one", "two", None, "three", None]),
        "d.json": ('{\n"text": "five",\n"id": 7}', ["five"]),
        "e.json": ('["six", "seven"]', ["six", "seven"]),
        # datasets infers types from 10 MB; they change after that.
        "f.jsonl": (
            f'{{"text": "same", "id": {"1" * 4000}}}\n' * 2800 + '{"text": "other", "id": "x", "late": 1}',
            None,
        ),
    }
    paths = [write(tmp_path / name, content) for name, (content, _) in files.items()]
    for path, (_, texts) in zip(paths, files.values(), strict=True):
        if texts is not None:
            assert [row["text"] for row in load_documents(path, streaming=streaming)] == texts
    documents = load_documents(paths, streaming=streaming)
    texts = [row["text"] for row in documents]
    assert texts[:6] == ["one", "two", None, "three", None, "four"] and texts[-2:] == ["same", "other"]
    assert len(texts) == 5 + 1 + 5 + 1 + 2 + 2801

    tables = [write(tmp_path / "a.csv", table), write(tmp_path / "b.csv", "text,late\nfour,4\n")]
    documents = load_documents(tables, streaming=streaming)
    assert [dict(row) for row in documents] == [{"text": text} for text in ("one", "two", "three", "four")]

    rows = [{"text": ["one"], "id": [1]}, {"late": ["x"], "text": ["two"], "id": ["y"]}]
    for number, row in enumerate(rows):
        Dataset.from_dict(row).to_parquet(tmp_path / f"{number}.parquet")
    documents = load_documents([tmp_path / "0.parquet", tmp_path / "1.parquet"], streaming=streaming)
    assert [dict(row) for row in documents] == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_files_keep_what_stands_there(tmp_path, name, streaming):
    """Quotation marks, lines and separators in a field, words that pandas reads as missing, numbers, a long field."""
    texts = ['a "b", c\r\nd\n\ne', "NA", "null", "5", "x" * 300_000, "", "日本"]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("id", "text"), *enumerate(texts)])
    documents = load_documents(write(tmp_path / name, "\ufeff" + table.getvalue()), streaming=streaming)
    assert [row["text"] for row in documents] == texts


@pytest.mark.parametrize("streaming", [False, True])
def test_line_ends_and_byte_order_marks(tmp_path, streaming):
    """A line of JSON ends at a line break, not at the other characters at which str.splitlines splits."""
    for end in ("\n", "\r\n", "\r"):
        text = "\ufeff" + end.join(['{"text": "a\u2028b\x85c"}', "", '{"text": "d\\r\\ne"}', ""])
        documents = load_documents(write(tmp_path / "a.jsonl", text), streaming=streaming)
        assert [row["text"] for row in documents] == ["a\u2028b\x85c", "d\r\ne"]
    path = write(tmp_path / "long.jsonl", jsonl("x" * 12_000_000, "y"))
    assert [len(row["text"]) for row in load_documents(path, streaming=streaming)] == [12_000_000, 1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": 5}\n', r"a\.jsonl, line 3, column 'text' must hold a string, got int"),
        ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}\n', r"line 2, column 'text' must hold a string, got list"),
        ("a.json", '[{"text": "a"}, {"text": {}}]', r"a\.json, row 2, column 'text' must hold a string, got dict"),
        ("a.jsonl", '{"text": "a"}\n{"text": b}\n', r"line 2 must hold JSON: Expecting value at character 10"),
        ("a.jsonl", '{"text": a}\n{"text": "b"}\n', r"a\.jsonl must hold JSON: Expecting value at character 10"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"line 2 must hold a JSON object, got list"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b\\ud800"}\n', r"line 2, .* character 1 is half"),
        ("a.csv", "text,id\na,1\nb,c,2\n", r"a\.csv, line 3 must have 2 fields \(text, id\)\..*Quote"),
        ("a.csv", 'id,text\n1,"a\nb"\n2\n', r"a\.csv, line 4 must have 2 fields \(id, text\)\."),
        ("a.csv", 'id,text\n1,a\n2,"b\n3,c\n', r"a\.csv is malformed: unexpected end of data.*in pairs"),
        ("a.csv", "text,id\n", r"a\.csv must hold text, but has none"),
        ("a.jsonl", '{"text": null}\n' * 3, r"a\.jsonl must hold text, but has none"),
    ],
)
def test_an_error_names_file_and_row(tmp_path, name, content, message, streaming):
    with pytest.raises(ValueError, match=message):
        list(load_documents(write(tmp_path / name, content), streaming=streaming))


def test_a_file_that_has_changed_is_read_again(tmp_path):
    """`datasets` keeps what it has read."""
    path = write(tmp_path / "a.jsonl", jsonl("one"))
    assert load_documents(path)["text"] == ["one"]
    write(path, jsonl("two"))
    assert load_documents(path)["text"] == ["two"]


def test_a_column_of_numbers_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl("one"))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1, column 'id' must hold a string, got int: '0'"):
        load_documents(path, text_column="id")
    Dataset.from_json(str(path)).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text_column='id' of .*a\.parquet must hold strings"):
        load_documents(tmp_path / "a.parquet", text_column="id")


def test_split_documents():
    documents = Dataset.from_dict({"text": [f"document {i}" for i in range(40)]})
    train, validation = split_documents(documents, 0.1)
    assert (len(train), len(validation)) == (36, 4)
    assert [*train["text"], *validation["text"]] == list(documents["text"])
    two = split_documents(documents.take(2), 0.9)  # both parts keep at least one
    assert [len(part) for part in two] == [1, 1]

    text = TEXT
    train, validation = split_documents(Dataset.from_dict({"text": [text]}), 0.1)
    assert train[0]["text"] + validation[0]["text"] == text
    assert validation[0]["text"][0].isspace()  # not inside a word
    assert len(validation[0]["text"]) == pytest.approx(len(text) / 10, rel=0.01)
    with pytest.raises(ValueError, match="cannot be split"):
        split_documents(Dataset.from_dict({"text": ["oneword"]}), 0.1)
    with pytest.raises(ValueError, match="above 0 and below 1, got 1.5"):
        split_documents(documents, 1.5)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_trained_tokenizer_loses_nothing(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), masked=True)
    for either in (tokenizer, loaded):
        assert len(either) == 400
        ids = either(ODD_TEXT, add_special_tokens=False)["input_ids"]
        assert either.decode(ids) == ODD_TEXT
        assert set(either("Oz")) == {"input_ids", "attention_mask"}
        assert either("Oz")["input_ids"][0] == document_start(either) == document_end(either)
        assert len({either.bos_token_id, either.pad_token_id, either.mask_token_id}) == 3
        # The mask includes the space, as the masked word does.
        mask = either.mask_token
        assert either(f"the {mask} ran")["input_ids"] == [either.bos_token_id] + [
            *either("the", add_special_tokens=False)["input_ids"],
            either.mask_token_id,
            *either(" ran", add_special_tokens=False)["input_ids"],
        ]


@pytest.mark.parametrize("kind", ["DNA", "Chinese", "digits", "signs", "blanks"])
def test_text_without_words_is_cut(kind, tmp_path):
    """BPE takes a run of one kind for a single word, and the time to train grows with the square of its length: 65 s
    for the 400,000 letters that take one second here."""
    rng = np.random.default_rng(0)
    alphabet = {
        "DNA": "ACGT", "Chinese": "".join(map(chr, range(0x4E00, 0x4E00 + 2000))), "digits": "0123456789",
        "signs": "=-_*", "blanks": " \t",
    }[kind]  # fmt: skip
    text = "".join(rng.choice([*alphabet], 400_000 if kind == "DNA" else 100_000))
    begin = time.process_time()
    trained = train_tokenizer([{"text": text}], 1000 if kind == "DNA" else 300)
    ids = trained(text)["input_ids"]
    assert time.process_time() - begin < 20
    assert len(ids) < (0.4 if kind == "DNA" else 3) * len(text)  # it has learnt more than single bytes
    assert trained.decode(ids[1:]) == text
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), masked=True)
    assert loaded(text)["input_ids"] == ids
    pieces = loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text[:5000])
    assert max(end - begin for _, (begin, end) in pieces) == LONGEST_WORD
    # One run among words: it is restored in full, and the words around it are unchanged.
    mixed = f"the lion{ODD_TEXT} {text[:1000]} ran"
    assert loaded.decode(loaded(mixed, add_special_tokens=False)["input_ids"]) == mixed


def test_ordinary_text_is_not_cut(tokenizer, monkeypatch):
    monkeypatch.setattr("flash_hf.training.tokenizer.LONG_RUN", r"(?!)")  # nothing
    text = TEXT[:60_000]
    uncut = train_tokenizer([{"text": text}], 400)
    assert uncut.get_vocab() == tokenizer.get_vocab() and uncut(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_tokenizer_errors(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 259"):
        train_tokenizer([{"text": "x"}], 258)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": None}), encoding="utf-8")
    assert load_tokenizer(str(tmp_path), masked=False).mask_token is None
    with pytest.raises(ValueError, match="must have a mask_token"):
        load_tokenizer(str(tmp_path), masked=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}), encoding="utf-8")
    with pytest.raises(ValueError, match="must have an eos_token or sep_token"):
        load_tokenizer(str(tmp_path), masked=False)


def test_tokenizer_training_stops_at_max_bytes():
    read = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield {"text": "ten bytes!"}

    train_tokenizer(rows(), 300, max_bytes=95)
    assert len(read) <= 11  # ten rows, and the one at which it is noticed


def test_text_size_counts_bytes_words_and_skips_blank_rows(tokenizer):
    byte_order_mark = "\ufeff"
    documents = Dataset.from_dict({"text": ["one two", "", None, "  \n", f"{byte_order_mark}日本 x"]})
    tokenized = tokenize_documents(documents, tokenizer)
    assert text_size(tokenized) == {"n_documents": 2, "n_bytes": 7 + 8, "n_words": 4, "n_unknown": 0}
    assert tokenizer.decode(tokenized[1]["input_ids"]) == "日本 x"
    nothing = tokenize_documents(documents.select([1, 2, 3]), tokenizer)
    with pytest.raises(ValueError, match="has no text"):
        pack_documents(nothing, tokenizer, block_size=8, causal=True)


# --- packing ---------------------------------------------------------------------------------------------------------

X = IGNORE
HAND = [{"input_ids": [11, 12, 13]}, {"input_ids": [21]}, {"input_ids": [31, 32]}]


def packed(documents=HAND, *, block_size=4, causal=True, packing="concatenate", start_id=1):
    ids = {"start_id": start_id, "end_id": 2, "pad_id": 0}
    packer = Packer(block_size=block_size, causal=causal, packing=packing, **ids)
    rows = [row for document in documents for row in packer.add(document["input_ids"])] + packer.rest()
    return [{key: value.tolist() for key, value in row.items()} for row in rows]


def test_pack_by_hand_concatenated():
    rows = packed(block_size=5)
    # The stream: 1 11 12 13 2 | 1 21 2 | 1 31 32 2, blocks sharing one token.
    assert [row["input_ids"] for row in rows] == [[1, 11, 12, 13, 2], [2, 1, 21, 2, 1], [1, 31, 32, 2, 0]]
    assert [row["labels"] for row in rows] == [[X, 11, 12, 13, 2], [X, 1, 21, 2, 1], [X, 31, 32, 2, X]]
    assert [row["attention_mask"] for row in rows] == [[1] * 5, [1] * 5, [1, 1, 1, 1, 0]]
    # One token for both ends (GPT-2) stands once between documents.
    rows = packed(block_size=5, start_id=2)
    assert [row["input_ids"] for row in rows] == [[2, 11, 12, 13, 2], [2, 21, 2, 31, 32], [32, 2, 0, 0, 0]]
    rows = packed(block_size=5, causal=False)
    assert [row["input_ids"] for row in rows] == [[1, 11, 12, 13, 2], [1, 21, 2, 1, 31], [32, 2, 0, 0, 0]]
    assert [set(row) for row in rows] == [{"input_ids", "attention_mask"}] * 3


def test_pack_by_hand_with_borders():
    rows = packed(block_size=4, packing="documents")
    assert [row["input_ids"] for row in rows] == [[1, 11, 12, 13], [13, 2, 1, 21], [21, 2, 1, 31], [31, 32, 2, 0]]
    assert [row["labels"] for row in rows] == [[X, 11, 12, 13], [X, 2, X, 21], [X, 2, X, 31], [X, 32, 2, X]]
    assert [row["position_ids"] for row in rows] == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 2, 0]]
    # A block that ends with a document has nothing to repeat.
    rows = packed(block_size=5, packing="documents")
    assert [row["input_ids"] for row in rows] == [[1, 11, 12, 13, 2], [1, 21, 2, 1, 31], [31, 32, 2, 0, 0]]
    assert [row["position_ids"] for row in rows] == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize("block_size", [2, 3, 7, 64, 1000])
@pytest.mark.parametrize("start_id", [1, 2])
def test_every_token_is_predicted_exactly_once(packing, block_size, start_id):
    lengths = np.random.default_rng(block_size).integers(1, 30, size=20)
    # All tokens differ, so that each can be counted.
    ids = np.split(np.arange(10, 10 + lengths.sum()), lengths.cumsum()[:-1])
    documents = [{"input_ids": part} for part in ids]
    rows = packed(documents, block_size=block_size, packing=packing, start_id=start_id)
    labels = [label for row in rows for label in row["labels"] if label >= 10]
    assert labels == list(range(10, 10 + lengths.sum()))
    assert sum(label == 2 for row in rows for label in row["labels"]) == len(documents)  # each end, too
    for row in rows:
        assert all(len(values) == block_size for values in row.values())
        real = np.array(row["attention_mask"])
        assert (np.diff(real) <= 0).all() and real[0] == 1  # padding on the right only
        assert row["labels"][0] == X
        for index, label in enumerate(row["labels"]):
            assert label in (X, row["input_ids"][index])
            if "position_ids" in row and real[index] and row["position_ids"][index] == 0:
                assert label == X  # nothing is predicted across a border
    masked = packed(documents, block_size=block_size, packing=packing, start_id=start_id, causal=False)
    tokens = [token for row in masked for token in row["input_ids"] if token >= 10]
    assert tokens == list(range(10, 10 + lengths.sum()))


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_packer_resumes_from_its_state(packing, causal):
    """After any number of documents, through JSON."""
    lengths = np.random.default_rng(0).integers(1, 30, size=12)
    documents = [np.arange(10, 10 + n) for n in lengths]
    options = {"block_size": 16, "causal": causal, "packing": packing, "start_id": 1, "end_id": 1, "pad_id": 0}
    packer, states, blocks = Packer(**options), [], []
    for document in documents:
        states.append((len(blocks), json.dumps(packer.state_dict())))
        blocks += packer.add(document)
    blocks += packer.rest()
    for number, (begin, state) in enumerate(states):
        other = Packer(**options)
        other.load_state_dict(json.loads(state))
        again = [block for document in documents[number:] for block in other.add(document)] + other.rest()
        assert len(again) == len(blocks) - begin
        for got, want in zip(again, blocks[begin:], strict=True):
            assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("length", [4, 8, 16])
def test_cut_rows_are_blocks_of_their_own(length):
    """A row that is cut is what it would be if it were packed alone; no token is lost."""
    documents = [{"input_ids": np.arange(10 * n, 10 * n + n)} for n in (5, 3, 9, 1, 6)]
    rows = packed(documents, block_size=16, packing="documents", causal=False)
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    cut = cut_rows(batch, length)
    assert torch.equal(cut["input_ids"].flatten(), batch["input_ids"].flatten())
    assert torch.equal(cut["attention_mask"].flatten(), batch["attention_mask"].flatten())
    old, new = batch["position_ids"].reshape(-1, length), cut["position_ids"]
    assert (new[:, 0] == 0).all()
    for before, after in zip(old.tolist(), new.tolist(), strict=True):
        starts = [i for i, position in enumerate(before) if position == 0 or i == 0]
        assert after == [i - max(start for start in starts if start <= i) for i in range(length)]


def test_a_text_shorter_than_a_block_is_kept(tokenizer):
    tokenized = tokenize_documents(Dataset.from_dict({"text": ["Oz"]}), tokenizer)
    (block,) = pack_documents(tokenized, tokenizer, block_size=64, causal=True)
    ids = tokenizer("Oz")["input_ids"] + [tokenizer.eos_token_id]
    assert block["input_ids"] == ids + [tokenizer.pad_token_id] * (64 - len(ids))
    assert block["labels"] == [X] + ids[1:] + [X] * (64 - len(ids))
    for wrong in ({"block_size": 1}, {"packing": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            pack_documents(tokenized, tokenizer, **{"block_size": 8, "causal": True, **wrong})


@pytest.mark.parametrize("causal", [True, False])
def test_documents_packed_with_borders_have_the_loss_they_have_alone(causal):
    """The sum of all documents' losses, each alone, is that of the packed blocks; without borders it is not."""
    torch.manual_seed(0)
    config = FlashConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, query_key_dim=8, chunk_size=4, initializer_range=0.5
    )
    model = (FlashForCausalLM if causal else FlashForMaskedLM)(config).eval()
    lengths = [3, 9, 1, 17, 4, 12]  # with start and end: 58 tokens, so that one block of 64 holds all
    documents = [{"input_ids": np.random.default_rng(n).integers(3, 50, n)} for n in lengths]

    def loss(rows: list[dict]) -> tuple[float, int]:
        total, count = 0.0, 0
        for row in rows:
            if not causal:
                tokens = np.array(row["input_ids"])
                row["labels"] = np.where((tokens % 3 == 0) & (tokens > 2), tokens, X)  # any choice will do
            row = {key: torch.tensor(np.array(value))[None] for key, value in row.items()}
            counted = int((row["labels"] != X).sum())
            if counted:  # the mean of nothing is nan
                total += model(**row).loss.item() * counted
                count += counted
        return total, count

    alone = [loss(packed([row], block_size=n + 2, causal=causal)) for row, n in zip(documents, lengths, strict=True)]
    want, count = np.sum(alone, axis=0)
    got = {
        packing: loss(packed(documents, block_size=64, causal=causal, packing=packing))
        for packing in ("concatenate", "documents")
    }
    assert got["documents"] == (pytest.approx(want, rel=1e-5), count)
    assert abs(got["concatenate"][0] / got["concatenate"][1] - want / count) > 0.01


# --- collators -------------------------------------------------------------------------------------------------------


def test_collate_drops_only_a_mask_without_padding():
    full = {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [X, 6]}
    part = {"input_ids": [5, 0], "attention_mask": [1, 0], "labels": [X, X]}
    batch = collate([full, full])
    assert set(batch) == {"input_ids", "labels"} and batch["input_ids"].dtype == torch.int64
    assert collate([full, part])["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_masking_depends_on_seed_epoch_and_content_only(tokenizer):
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(3, 400, 500).tolist()} for _ in range(20)]
    rows[0]["input_ids"][-100:] = [tokenizer.pad_token_id] * 100
    collator = MaskingCollator(tokenizer, seed=1)
    first = collator(rows)
    collator(rows[:3])  # whatever came in between
    torch.rand(7)
    again, fresh = collator(rows), MaskingCollator(tokenizer, seed=1)(rows)
    for other in (again, fresh):
        assert torch.equal(first["input_ids"], other["input_ids"]) and torch.equal(first["labels"], other["labels"])
    for attribute, value in (("seed", 2), ("epoch", 1)):
        changed = MaskingCollator(tokenizer, seed=1)
        setattr(changed, attribute, value)
        assert not torch.equal(first["labels"], changed(rows)["labels"])
    # The other rows of a batch do not matter, so masks do not depend on the number of devices.
    assert torch.equal(first["labels"][5:8], collator(rows[5:8])["labels"])
    assert not torch.equal(first["labels"][5] != X, first["labels"][6] != X)

    original, chosen = torch.tensor([row["input_ids"] for row in rows]), first["labels"] != X
    assert torch.equal(first["labels"][chosen], original[chosen])
    assert torch.equal(first["input_ids"][~chosen], original[~chosen])
    assert not chosen[original == tokenizer.pad_token_id].any()
    share = chosen.sum() / (original != tokenizer.pad_token_id).sum()
    hidden = (first["input_ids"][chosen] == tokenizer.mask_token_id).float().mean()
    assert 0.13 < share < 0.17 and 0.76 < hidden < 0.84  # 9,900 tokens: about 4 standard deviations


def test_a_used_collator_can_be_sent_to_workers(with_gaps):
    """Pickled as for those that are spawned, on macOS, which take over files that have to stay open until then (those
    of a generator's state do not); they see later epochs of the one in the main process."""
    rows = [{"input_ids": list(range(3, 200))} for _ in range(4)]
    collator = MaskingCollator(with_gaps, seed=1)
    collator(rows)
    descriptors = []
    process = SimpleNamespace(DupFd=int, duplicate_for_child=lambda one: descriptors.append(one) or one)
    context.set_spawning_popen(process)
    try:
        ForkingPickler.dumps(collator)
    finally:
        context.set_spawning_popen(None)
    assert descriptors and all(os.fstat(one).st_size for one in descriptors)
    sent = pickle.loads(ForkingPickler.dumps(collator))
    for epoch in range(2):
        collator.epoch = epoch
        assert torch.equal(sent(rows)["labels"], collator(rows)["labels"])


def test_random_tokens_are_tokens_of_the_tokenizer(with_gaps):
    """transformers takes numbers below len(tokenizer): where ids are unused, some of them, and not the highest ids."""
    known = set(with_gaps.get_vocab().values())
    rows = [{"input_ids": np.random.default_rng(n).choice([*known], 2000).tolist()} for n in range(10)]
    collator = MaskingCollator(with_gaps, seed=1)
    batch = collator(rows)
    original = torch.tensor([row["input_ids"] for row in rows])
    exchanged = (batch["input_ids"] != original) & (batch["input_ids"] != with_gaps.mask_token_id)
    assert 150 < exchanged.sum() < 450 and (batch["labels"][exchanged] == original[exchanged]).all()
    found = set(batch["input_ids"][exchanged].tolist())
    assert found <= known and max(found) > len(with_gaps)
    assert torch.equal(collator(rows)["input_ids"], batch["input_ids"])


def test_a_vocabulary_ends_at_its_highest_id(with_gaps, tokenizer):
    assert len(with_gaps) == 500 and vocabulary_size(with_gaps) == 1100
    assert vocabulary_size(tokenizer) == len(tokenizer) == 400
    documents = Dataset.from_dict({"text": ["one [1099] two"]})
    tokenized = tokenize_documents(documents, with_gaps)
    assert 1099 in tokenized[0]["input_ids"]


def test_mask_once_fixes_the_validation_set(tokenizer):
    tokenized = tokenize_documents(Dataset.from_dict({"text": [TEXT[:20_000]]}), tokenizer)
    blocks = pack_documents(tokenized, tokenizer, block_size=64, causal=False)
    collator = MaskingCollator(tokenizer, seed=1)
    masked = collator.mask_once(blocks)
    collator.epoch = 5
    batch = collator(list(masked))
    for name in ("input_ids", "labels"):
        assert batch[name].tolist() == list(masked[name])
    assert "attention_mask" in batch  # of the last, partly filled block
    labels = np.array(masked["labels"])
    assert (labels != X).sum() > 0.1 * labels.size
    assert np.array_equal(labels[labels != X], np.array(blocks["input_ids"])[labels != X])
