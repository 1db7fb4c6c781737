# SPDX-License-Identifier: Apache-2.0
"""Training of the checkpoints on the study's tokens."""

import dataclasses
import json
import lzma
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from flash_hf import FlashConfig
from helpers import ROOT, TEXT
from scripts.evaluation.language import masked_scores, score_documents
from scripts.study import pretrain
from scripts.study.text import Stream, prepare, prepare_mixed


FIELDS = {"hidden_size": 32, "num_hidden_layers": 2, "query_key_dim": 16, "chunk_size": 16, "initializer_range": 0.1}
CAUSAL = pretrain.Pretraining(
    causal=True, preset="plus", model_config={**FIELDS, "local_key_shift": True, "global_state": "delta"}, context=64,
    batch_tokens=256, warmup_steps=4, evaluate_every=40,
)  # fmt: skip
MASKED = dataclasses.replace(CAUSAL, causal=False, preset=None, model_config=FIELDS, passage_tokens=(2, 64))
TRANSFORMER = dataclasses.replace(MASKED, model="transformer++", learning_rate=1e-2)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Documents, and their tokens as the study's and this `--prepare` write them."""
    data, work = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("work")
    paragraphs = TEXT.split("\n\n")
    for corpus, begin in (("books", 0), ("wiki", 150)):
        for part, places in (("valid", range(begin, begin + 30, 15)), ("train", range(begin + 30, begin + 150, 15))):
            rows = [json.dumps({"text": "\n\n".join(paragraphs[at : at + 15])}) for at in places]
            (data / f"{corpus}_{part}.jsonl.xz").write_bytes(lzma.compress("\n".join(rows).encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", work / "cache")
        prepare(data, work / "tokens", vocab_size=300, max_tokens=20_000, max_valid_tokens=4_000)
        prepare_mixed(data, work / "tokens", piece_tokens=9_000)
        patch.setattr(pretrain, "BLOCK", 128)
        pretrain.prepare(data, work / "tokens")
    return data, work


def train(monkeypatch, recipe, work, output, *, seconds=25, resume=None, steps=None):
    """A training in which every look at the clock takes a second."""
    clock = iter(range(10**6))
    monkeypatch.setattr(pretrain, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(pretrain, "START", 0)
    pretrain.run(recipe, work, output, seconds, resume, 0.0, steps)
    return json.loads((output / "final" / "training.json").read_text(encoding="utf-8"))


def test_passages_are_whole_packed_and_masked():
    line, end, first, mask = 5, 0, 3, 2
    tokens = np.random.default_rng(0).integers(10, 90, 64 * 40 + 1)
    tokens[3::17] = tokens[4::17] = line
    tokens[::200] = end
    stream = Stream(torch.from_numpy(tokens.astype(np.int32)), 64, 100, mask)
    passages = pretrain.Passages(stream, line, end, first, MASKED)
    for seed in range(20):
        row, position = passages.cut(tokens[64 * seed : 64 * seed + 64], np.random.default_rng(seed))
        assert len(row) == len(position) == 64
        starts = np.flatnonzero(position == 0)
        assert (row[starts] == end).all() and (row[starts[1:] - 1] == end).all()
        # Between its ends a passage is a run of tokens, and begins after a paragraph or a document.
        for begin, until in zip(starts, [*starts[1:], 65], strict=True):
            inside = row[begin + 1 : until - 1]  # the last passage may be cut off
            inside = inside[: len(inside) - (until == 65 and len(inside) and inside[-1] == end)]
            if not len(inside):
                continue
            runs = np.lib.stride_tricks.sliding_window_view(tokens, len(inside))
            at = np.flatnonzero((runs == inside).all(1))
            assert any(place % 64 == 0 or tokens[place - 1] in (line, end) for place in at)
            assert end not in inside and (until == 65 or inside[-1] != line)
            assert (position[begin:until] == np.arange(len(position[begin:until]))).all()

    batch, again = (passages.batch(np.arange(8), 7) for _ in range(2))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    places, labels, inputs = batch["places"], batch["labels"], batch["inputs"].flatten()
    assert len(places) == len(places.unique()) == round(0.3 * 8 * 64) and (labels >= first).all()
    assert 0.7 < (inputs[places] == mask).float().mean() < 0.9 and (inputs[places] == labels).any()
    passages.share = 0.15
    assert len(passages.batch(np.arange(8), 7)["places"]) == round(0.15 * 8 * 64)


@pytest.mark.parametrize("recipe", [CAUSAL, MASKED, TRANSFORMER], ids=["causal", "masked", "transformer++"])
def test_a_checkpoint_is_trained_measured_and_continued(work, tmp_path, monkeypatch, recipe):
    data, work = work
    log = train(monkeypatch, recipe, work, tmp_path / "a")
    (this,) = log["runs"]
    begin, last = this["decay"]
    assert 0 < begin < last == this["steps"] and (tmp_path / "a" / "done").exists()
    assert this["valid_curve"][-1][1] < this["valid_curve"][0][1]

    # The folder holds what was measured, as scripts.evaluation measures it.
    folder = tmp_path / "a" / "final"
    auto = AutoModelForCausalLM if recipe.causal else AutoModelForMaskedLM
    assert auto.from_pretrained(folder).dtype == torch.bfloat16
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # tied
    model, tokenizer = auto.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)
    found = {row["metric"]: row["value"] for row in log["results"] if row["dataset"] != "wiki_valid"}
    if recipe.causal:
        with lzma.open(data / "books_valid.jsonl.xz", "rt", encoding="utf-8") as file:
            expected = score_documents(model, tokenizer, map(json.loads, file)).metrics()
    else:
        from datasets import Dataset

        from scripts.cut_passages import passages

        rows = []
        for corpus in ("books", "wiki"):
            with lzma.open(data / f"{corpus}_valid.jsonl.xz", "rt", encoding="utf-8") as file:
                rows += passages(map(json.loads, file))
        random.Random(0).shuffle(rows)
        expected = masked_scores(model, tokenizer, Dataset.from_list(rows), block_size=128)
        # Without the last block, which is padded.
        assert 0 < expected.pop("tokens") - found.pop("tokens") < 128 * 0.3
    for metric, value in found.items():
        assert value == pytest.approx(expected[metric], rel=1e-3 if recipe.causal else 0.05), metric

    # A later run goes on from the weights before the decay, with the batches after them.
    more = train(monkeypatch, recipe, work, tmp_path / "b", resume=tmp_path / "a" / "stable")
    before, after = more["runs"]
    assert before["steps"] == begin and more["steps"] == begin + after["steps"]
    assert after["valid_curve"][0][1] < this["valid_curve"][0][1]


@pytest.mark.parametrize("recipe", [CAUSAL, MASKED], ids=["causal", "masked"])
def test_an_interrupted_training_resumes_exactly(work, tmp_path, monkeypatch, recipe):
    work = work[1]
    whole = train(monkeypatch, recipe, work, tmp_path / "a")["runs"][0]
    save = pretrain.save_state

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "STATE_SECONDS", 5)
    monkeypatch.setattr(pretrain, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, recipe, work, tmp_path / "b")
    monkeypatch.setattr(pretrain, "save_state", save)
    resumed = train(monkeypatch, recipe, work, tmp_path / "b")["runs"][0]
    (at,) = resumed["resumed"]
    both = min(whole["decay"][0], resumed["decay"][0])
    assert 0 < at < both and whole["train_curve"]["every"] == resumed["train_curve"]["every"] == 1
    assert resumed["train_curve"]["loss"][:both] == whole["train_curve"]["loss"][:both]


def test_steps_are_counted_and_the_best_rate_is_found(work, tmp_path, monkeypatch):
    """A rate that is far too low loses, and the trained one decays over the last fifth of the steps."""
    monkeypatch.setattr(pretrain, "START", 0)
    recipe = ROOT / "scripts" / "recipes" / "checkpoints" / "transformer-pp-30m-masked.yaml"
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    small = {name: getattr(MASKED, name) for name in ("model_config", "context", "batch_tokens", "warmup_steps")}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings | small), encoding="utf-8")
    options = ["--recipe", "a.yaml", "--work", str(work[1]), "--output", "out"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pretrain", *options, "--steps", "150", "--search", "1e-6", "1e-2"])
    pretrain.main()
    found = json.loads((tmp_path / "out" / "search.json").read_text(encoding="utf-8"))
    assert found["0.01"] < found["1e-06"] - 0.1
    log = json.loads((tmp_path / "out" / "final" / "training.json").read_text(encoding="utf-8"))
    (this,) = log["runs"]
    assert this["decay"] == [120, 150] and this["steps"] == 150 and this["recipe"]["learning_rate"] == 0.01
    assert log["results"][0]["value"] < found["0.01"]
    first = tmp_path / "out" / "rate-0.01" / "final" / "training.json"
    (tried,) = json.loads(first.read_text(encoding="utf-8"))["runs"]
    assert tried["steps"] == 15 and tried["decay"] == [12, 15]

    monkeypatch.setattr("sys.argv", ["pretrain", *options, "--search", "1e-2"])
    with pytest.raises(SystemExit):
        pretrain.main()


def test_the_transformer_has_the_size_and_the_tokens_of_flash():
    folder = ROOT / "scripts" / "recipes" / "checkpoints"
    names = ("flash-30m-masked", "transformer-pp-30m-masked")
    flash, other = (
        pretrain.Pretraining(**yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))) for name in names
    )
    same = dataclasses.replace(other, model="flash", learning_rate=flash.learning_rate)
    assert same == flash  # batches, passages, optimiser
    with torch.device("meta"):
        sizes = [
            AutoModelForMaskedLM.from_config(recipe.config(8192, 0, 1)).num_parameters() for recipe in (flash, other)
        ]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize("name", ["flash-30m-causal", "flash-30m-masked"])
def test_recipes_make_models_of_at_most_64_mib(name):
    recipe = ROOT / "scripts" / "recipes" / "checkpoints" / f"{name}.yaml"
    recipe = pretrain.Pretraining(**yaml.safe_load(recipe.read_text(encoding="utf-8")))
    config = recipe.config(8192, 0, 1)
    assert isinstance(config, FlashConfig) and config.max_position_embeddings == 8192
    with torch.device("meta"):
        model = (AutoModelForCausalLM if recipe.causal else AutoModelForMaskedLM).from_config(config)
    assert 30e6 < sum(p.numel() for p in model.parameters()) < 2**25
