# SPDX-License-Identifier: Apache-2.0
"""Embeddings with sentence-transformers: batches, lengths, and the commands of scripts/embedding/."""

import json
import random
import re

import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from flash_hf import FlashConfig, FlashForMaskedLM, save_with_code
from flash_hf.training.tokenizer import train_tokenizer
from helpers import BOOK, TEXT, make_model, run_here, tiny_config
from scripts.baselines import TransformerPPForMaskedLM, matched_config
from scripts.embedding.train import hold_out


pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A masked model with large random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer([{"text": TEXT[:50_000]}], vocab_size=400)
    config = tiny_config(vocab_size=400, pad_token_id=tokenizer.pad_token_id)
    save_with_code(make_model(FlashForMaskedLM, config, dtype=torch.float32), folder, tokenizer)
    return folder


def embedder_of(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_has_one_embedding_whatever_is_beside_it(folder, side):
    embedder = embedder_of(folder)
    embedder.tokenizer.padding_side = side
    texts = ["Dorothy.", TEXT[:120], TEXT[:60]]
    together = embedder.encode(texts, batch_size=3, convert_to_tensor=True)
    for text, found in zip(texts, together, strict=True):
        torch.testing.assert_close(embedder.encode(text, convert_to_tensor=True), found, rtol=1e-4, atol=1e-5)
    assert together[0].sub(together[1]).abs().max() > 0.01


def test_texts_beyond_the_training_length_are_read_if_asked(folder):
    embedder = embedder_of(folder)
    assert embedder.max_seq_length == 128
    beginning = AutoTokenizer.from_pretrained(folder).decode(embedder.tokenizer(TEXT[:5000])["input_ids"][:100])
    torch.testing.assert_close(
        *(embedder.encode(beginning + " It was so." * count, convert_to_tensor=True) for count in (100, 200))
    )
    embedder.max_seq_length = 2000
    short, long = (embedder.encode(beginning + " It was so." * n, convert_to_tensor=True) for n in (100, 200))
    assert (short - long).abs().max() > 1e-3


@pytest.mark.slow
def test_training_fits_pairs_and_scores(folder, capsys, tmp_path):
    rows = ["index\tsentence1\tsentence2\tscore"]
    words = ["lion", "witch", 'the "tin" man', "house", "road", "girl", "dog", "city"]
    rows += [f"0\tHere is the {a}.\tI see a {b}.\t{5.0 if a == b else 0.5}" for a in words for b in words]
    (tmp_path / "scores.tsv").write_text("\n".join(rows), encoding="utf-8")
    capsys.readouterr()
    run_here(
        "-m", "scripts.embedding.train", "--model", folder, "--pairs", BOOK, "--max_pairs", 32, "--batch_size", 16,
        "--scores", tmp_path / "scores.tsv", "--test_scores", tmp_path / "scores.tsv", "--epochs", 8,
        "--learning_rate", 3e-3, "--validation_fraction", 0.5, "--bf16", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["test_spearman"] > found["before"]["test_spearman"] + 0.2
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["examples"] == {"pairs": 32, "scores": 32, "validation": 32, "test": 64}
    assert results["after"] == found["after"] and results["after"]["validation_spearman"] > 0.2
    assert results["versions"]["torch"] and "--learning_rate 0.003" in results["command"]
    assert (tmp_path / "out" / "modeling_flash.py").exists()  # loads without the package
    embedder = embedder_of(tmp_path / "out")
    assert embedder.max_seq_length == 128  # not that of training
    table = [row.split("\t")[1:] for row in rows[1:]]
    cosines = [embedder.similarity(*embedder.encode([left, right])).item() for left, right, _ in table]
    again = spearmanr(cosines, [float(score) for _, _, score in table]).statistic
    assert again == pytest.approx(found["after"]["test_spearman"], abs=1e-3)  # measured as saved, not in bfloat16
    assert embedder.similarity(*embedder.encode(["Here is the lion.", "I see a lion."])).item() > 0.5


@pytest.mark.slow
def test_encoders_of_other_kinds_are_trained(folder, capsys, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = matched_config("transformer++", FlashConfig.from_pretrained(folder), tolerance=0.1)
    TransformerPPForMaskedLM(config).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    run_here(
        "-m", "scripts.embedding.train", "--model", tmp_path / "encoder", "--pairs", BOOK, "--max_pairs", 8,
        "--batch_size", 4, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    capsys.readouterr()
    assert embedder_of(tmp_path / "out").encode("Here is the lion.").shape == (config.hidden_size,)


def test_what_is_held_out_does_not_depend_on_the_seed_and_is_not_trained_on():
    rows = [{"score": score} for score in range(50)]
    random.seed(1)
    kept, held_out = hold_out(rows, 0.1)
    random.seed(2)
    assert (kept, held_out) == hold_out(rows, 0.1)
    assert len(held_out) == 5 and sorted([*kept, *held_out], key=rows.index) == rows
    assert hold_out(rows, 0.0) == (rows, [])


def test_search_finds_the_passage_and_keeps_an_index(folder, capsys, tmp_path):
    command = ["-m", "scripts.embedding.search", "--model", folder, "--index", tmp_path / "new" / "index.npz"]
    (tmp_path / "book.txt").write_text(TEXT[:20_000], encoding="utf-8")
    passage = next(part for part in TEXT[:20_000].split("\n\n")[10:] if len(part.split()) > 60)
    run_here(*command, "--books", tmp_path / "book.txt", "--query", passage, "The lion.", "--top", 2)
    first = capsys.readouterr().out
    assert re.search(r"^1\.000, passage \d+ of \d+\n" + re.escape(passage), first, re.M)
    assert first.count("passage") >= 4 and "# The lion." in first
    run_here(*command, "--query", passage, "The lion.", "--top", 2)
    assert capsys.readouterr().out == first


def test_speed_prints_a_row_per_model(folder, capsys):
    run_here("-m", "scripts.embedding.speed", "--model", folder, "--tokens", 32, 64, "--documents", 1)
    head, flash, bert = capsys.readouterr().out.splitlines()
    assert head.split()[-2:] == ["32", "64"] and flash.startswith("FLASH, 0.0 M") and bert.startswith("BERT, ")
    assert all(float(cell) > 0 for row in (flash, bert) for cell in row.split()[-2:])


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["train", "--model", "./none", "--pairs", BOOK, "--output_dir", "out"], 1, "there is no folder ./none"),
        (["train", "--model", "a", "--output_dir", "out"], 2, "give --pairs, --scores or both"),
        (["train", "--model", "a", "--socres", "a", "--output_dir", "out"], 2, "Did you mean --scores?"),
        (["search", "--model", "a", "--query", "b"], 2, "give --books, or an --index that exists"),
        (["search", "--model", "a", "--query", "b", "--index", "a.txt"], 2, "--index must end in .npz, got a.txt"),
    ],
)
def test_mistakes_end_in_one_sentence(command, code, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_here("-m", f"scripts.embedding.{command[0]}", *command[1:])
    out, err = capsys.readouterr()
    assert ended.value.code == code and out == "" and words in err.splitlines()[-1]
