# SPDX-License-Identifier: Apache-2.0
"""The study's machinery: equal models, batches that predict every token once, cells that run once, and tables that
match the kept cells."""

import dataclasses
import json
import lzma
import math
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch

from helpers import BOOK, ROOT, TEXT, run_here
from scripts.provenance import write_json
from scripts.study import cell as training
from scripts.study import grid, report
from scripts.study.models import MODELS, SIZES, _flash, build
from scripts.study.runner import CellRunner, Gate
from scripts.study.text import IGNORE, PieceStream, Stream, load_stream, prepare, prepare_mixed


KEPT = ROOT / "scripts" / "results" / "study"
CAUSAL = grid.Cell("train", "flash", "tiny", "books-causal", 32, 0.004, 0.004)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Tokens of a small book, prepared like those of the study."""
    folder = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        prepare(BOOK, folder, vocab_size=300, max_tokens=20_000, max_valid_tokens=4_000)
    return folder


# --- text ------------------------------------------------------------------------------------------------------------
def test_prepared_text_is_the_book(tokens):
    from flash_hf.training import load_tokenizer

    facts = json.loads((tokens / "text.json").read_text(encoding="utf-8"))
    train, valid = (np.load(tokens / f"books_{part}.npy") for part in ("train", "valid"))
    assert train.dtype == np.uint16 and len(train) <= 20_000 and facts["books_valid"]["tokens"] == len(valid) <= 4_000
    assert int(train.max()) < facts["vocab_size"] <= 300
    tokenizer, book = load_tokenizer(str(tokens / "tokenizer"), masked=True), TEXT
    paragraphs = tokenizer.decode(train).split("<|endoftext|>")
    assert paragraphs[0] == "" and len(paragraphs) - 1 == facts["books_train"]["documents"]
    assert all(" ".join(paragraph.split()) in " ".join(book.split()) for paragraph in paragraphs[1:30])


def test_every_token_is_asked_for_once_whatever_the_context():
    ids = torch.arange(97, dtype=torch.int32)
    for context in (4, 12, 24):
        stream = Stream(ids, context, 100)
        order = stream.order(0)
        assert sorted(order) == list(range(96 // context)) and list(stream.order(1)) != list(order)
        inputs, labels = stream.batch(order, 0)
        assert torch.equal(labels, inputs + 1) and sorted(labels.flatten().tolist()) == list(range(1, 97))


def test_masks_are_berts_and_reproducible():
    ids = torch.full((40_001,), 7, dtype=torch.int32)
    stream = Stream(ids, 400, 50, mask_id=2)
    inputs, labels = stream.batch(np.arange(100), 3)
    chosen = labels != IGNORE
    assert (labels[chosen] == 7).all() and (inputs[~chosen] == 7).all()
    assert 0.14 < chosen.float().mean() < 0.16
    hidden, kept = ((inputs[chosen] == token).float().mean() for token in (2, 7))
    assert 0.78 < hidden < 0.83 and 0.08 < kept < 0.12 + 0.1 / 50
    assert torch.equal(stream.batch(np.arange(100), 3)[0], inputs)
    assert not torch.equal(stream.batch(np.arange(100), 4)[0], inputs)


def test_missing_text_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="--prepare"):
        load_stream(tmp_path, "books", "train", 8, causal=True)


@pytest.fixture(scope="module")
def mixed(tokens, tmp_path_factory):
    """The same tokenizer and validation, and all training text of a folder in pieces."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("mixed")
    shutil.copytree(tokens, folder, dirs_exist_ok=True)
    paragraphs = TEXT.split("\n\n")
    for index, name in enumerate(("books_train", "books_more", "books_valid", "wiki_train")):
        with lzma.open(data / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            for text in paragraphs[100 * index : 100 * (index + 1)]:
                file.write(json.dumps({"text": f"{name} {text}"}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        facts = prepare_mixed(data, folder, piece_tokens=5000, batch=7)
    return folder, facts, data


def test_the_mixed_corpus_holds_every_training_document_once(mixed):
    from flash_hf.training import load_tokenizer

    folder, facts, data = mixed
    size = facts["mixed_train"]
    pieces = [np.load(folder / f"mixed_train_{index}.npy") for index in range(len(size["pieces"]))]
    assert [len(piece) for piece in pieces] == size["pieces"] and set(size["pieces"][:-1]) == {5000}
    assert len(pieces) > 2 and 0 < size["pieces"][-1] <= 5000 and size["tokens"] == sum(size["pieces"])
    assert all(piece.dtype == np.uint16 for piece in pieces)
    text = load_tokenizer(str(folder / "tokenizer"), masked=True).decode(np.concatenate(pieces))
    expected = [json.loads(line)["text"] for name in ("books_train", "books_more", "wiki_train")
                for line in lzma.open(data / f"{name}.jsonl.xz", "rt", encoding="utf-8")]  # fmt: skip
    found = text.split("<|endoftext|>")[1:]
    assert sorted(found) == sorted(expected) and found != expected and len(found) == size["documents"]
    assert size["bytes"] == sum(len(text.encode()) for text in expected)
    assert json.loads((folder / "text.json").read_text(encoding="utf-8")) == facts and "books_valid" in facts


def test_rows_come_piece_after_piece_and_each_once(tmp_path):
    sizes, context = [41, 33, 18], 8
    tokens = np.arange(sum(sizes), dtype=np.uint16)
    files = [tmp_path / f"{index}.npy" for index in range(len(sizes))]
    for file, piece in zip(files, np.split(tokens, np.cumsum(sizes)[:-1]), strict=True):
        np.save(file, piece)
    stream = PieceStream(files, sizes, context, 100, None, "cpu")
    order = stream.order(3)
    assert len(stream) == 5 + 4 + 2 and [sorted(order[a:b]) for a, b in ((0, 5), (5, 9), (9, 11))] == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10]
    ]  # fmt: skip
    assert list(order) != sorted(order) and list(stream.order(4)) != list(order)
    # A batch of three ends in another piece than it begins in.
    inputs = torch.cat([stream.batch(order[at : at + 3], 0)[0] for at in (0, 3, 6, 9)])
    begins = [8 * row if row < 5 else 41 + 8 * (row - 5) if row < 9 else 74 + 8 * (row - 9) for row in order]
    assert torch.equal(inputs, torch.tensor(begins)[:, None] + torch.arange(context)) and len(stream.held) <= 2
    _, labels = stream.batch(order, 0)
    assert torch.equal(labels, inputs + 1)


def test_a_piece_may_be_late_but_not_missing_or_another(tmp_path):
    files, sizes = [tmp_path / "0.npy", tmp_path / "1.npy"], [33, 33]
    np.save(files[0], np.arange(33, dtype=np.uint16))
    stream = PieceStream(files, sizes, 8, 100, None, "cpu")
    stream.batch(np.array([0, 3]), 0)
    with pytest.raises(FileNotFoundError, match="--prepare"):
        stream.batch(np.array([3, 4]), 0)
    patient = PieceStream(files, sizes, 8, 100, None, "cpu", wait_seconds=60)
    # Under another name first, as what brings it must do.
    np.save(tmp_path / "part.npy", np.arange(33, dtype=np.uint16))
    late = threading.Timer(0.3, (tmp_path / "part.npy").rename, [files[1]])
    late.start()
    inputs, _ = patient.batch(np.array([3, 4]), 0)
    late.join()
    assert inputs[:, 0].tolist() == [24, 0]
    np.save(files[1], np.arange(20, dtype=np.uint16))
    with pytest.raises(ValueError, match="must hold 33 tokens as in text.json, got 20"):
        stream.batch(np.array([4]), 0)


# --- models and grid -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["xs", "s", "m", "l", "recall"])
def test_all_models_of_a_size_have_as_many_parameters(size):
    with torch.device("meta"):
        counts = {name: build(name, size, 8192, 2048, causal=True).num_parameters() for name, model in MODELS.items()
                  if not model.gpu_only}  # fmt: skip
    assert len(counts) > 20
    for name, count in counts.items():
        # A bias per head matters more in small models.
        limit = 0.02 if name.startswith("plus-") and SIZES[size].width <= 128 else 0.01
        assert abs(count / counts["flash"] - 1) < limit, f"{name}: {count}, FLASH {counts['flash']}"


def test_models_are_refused_where_they_cannot_be():
    with pytest.raises(ValueError, match="causal only"):
        build("gated-deltanet", "tiny", 64, 32, causal=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            build("gated-deltanet", "tiny", 64, 32, causal=True)


def test_names_of_cells_can_be_read_back():
    cells = grid.full_grid({}) + grid.tiny_grid()
    assert len({cell.name for cell in cells}) == len(cells) > 100
    for cell in cells:
        assert grid.Cell.parse(cell.name) == cell and cell.size in SIZES and cell.model in MODELS
    with pytest.raises(ValueError, match="no cell"):
        grid.Cell.parse("train_flash")


def test_long_trainings_begin_with_the_best_rates_of_shorter_ones():
    """Searched at each context, Transformer++'s again in the whole pass; what ends close to another model gets a
    second seed, at its own best rate."""
    cells = grid.passes({})
    contexts = {cell.context for cell in cells if cell.causal}
    assert len({cell.name for cell in cells}) == len(cells) and contexts == {2048, 8192}
    assert {cell.tokens for cell in cells} == {grid.SEARCHED, grid.ONE_PASS / 10, grid.BASE_TOKENS / 10}
    results, best = {}, {(grid.LASTING, 8192): 0.004, (grid.RIVAL, 2048): 0.0005}
    later = best | {(grid.RIVAL, 8192): 0.001}  # in a whole pass, and in several
    ends = {(grid.LASTING, 8192): 3.3, ("plus-keys", 8192): 3.319, (grid.RIVAL, 8192): 3.34, (grid.RIVAL, 2048): 3.31}
    while new := [cell for cell in grid.passes(results) if cell not in results]:
        for cell in new:
            apart = 0.1 * list(grid.MODELS).index(cell.model)
            rates = later if cell.tokens >= grid.ONE_PASS and cell.size == "m" else best
            off = abs(math.log(cell.rate / rates.get((cell.model, cell.context), 0.002)))
            results[cell] = {"final": {"loss": ends.get((cell.model, cell.context), 4 + apart) + off}}
    tried = {(grid.RIVAL, 2048): {0.00025, 0.0005, 0.001}, (grid.RIVAL, 8192): {0.0005, 0.001, 0.002, 0.004}}
    passed = [cell for cell in results if (cell.tokens, cell.causal, cell.seed) == (grid.ONE_PASS, True, 0)]
    assert {(cell.model, cell.context, cell.rate) for cell in passed} == {
        (model, context, rate) for model, contexts in grid.PASSED.items() for context in contexts
        for rate in tried.get((model, context), {best.get((model, context), 0.002)})
    }  # fmt: skip
    assert [cell.name for cell in results if cell.seed] == [
        f"train_{model}_m_mixed-causal_8192_{tokens}_{rate}_1"
        for tokens in (235, 600) for model, rate in (("plus-keys-delta", 0.004), ("plus-keys", 0.002))
    ]  # fmt: skip
    several = [cell for cell in results if (cell.tokens, cell.seed) == (grid.SEVERAL_PASSES, 0)]
    assert {(cell.model, cell.context, cell.rate) for cell in several} == {
        (model, context, later.get((model, context), 0.002)) for model in grid.LASTED for context in contexts
    }
    assert {(cell.model, cell.rate) for cell in results if (cell.tokens, cell.size) == (grid.BASE_TOKENS, "base")} == {
        ("plus-keys", 0.002), (grid.RIVAL, 0.002),
    }  # fmt: skip


def test_models_without_several_passes_get_300_million_tokens():
    """At the rate that was best in the whole pass, which may be another than in its tenth."""
    cells = grid.passes({})
    while set(found := grid.passes(finished(cells, {0.002: 4.0, 0.004: 4.1, 0.001: 4.2}))) != set(cells):
        cells = found
    cell = next(cell for cell in cells if (cell.model, cell.context, cell.tokens) == (grid.MODERN, 8192, 235))
    other = dataclasses.replace(cell, rate=0.004)
    results = finished(cells, {0.002: 4.0, 0.004: 4.1, 0.001: 4.2}) | {other: {"final": {"loss": 3.9}}}
    briefer = [cell for cell in grid.passes(results) if (cell.tokens, cell.size) == (grid.FEWER_PASSES, "m")]
    places = {(cell.model, cell.task, cell.context): cell.rate for cell in briefer}
    causal = {(model, "mixed-causal", context) for model in grid.FOLLOWED for context in grid.PASSED[model]}
    masked = {(model, "mixed-masked", context) for model in grid.HEADLINE for context in (512, 8192)}
    assert len(briefer) == len(places) and set(places) == causal | masked
    assert {place for place, rate in places.items() if rate != 0.002} == {(grid.MODERN, "mixed-causal", 8192)}


def test_masked_long_trainings_have_rates_of_their_own():
    """Searched masked and at each context: nothing is taken from the causal ones."""

    def masked(results):
        return [cell for cell in grid.passes(results) if not cell.causal]

    causal = finished([cell for cell in grid.passes({}) if cell.causal], {0.002: 4.0})
    tenths, rates = masked(causal), {("flash", 512): 0.004, ("transformer++", 8192): 0.0005}
    assert {(cell.model, cell.context, cell.tokens, cell.rate) for cell in tenths} == {
        (model, context, 23.5, rate) for model in grid.HEADLINE for context in (512, 8192) for rate in grid.RATES
    }
    results = {}
    while new := [cell for cell in masked(results) if cell not in results]:
        for cell in new:
            best = rates.get((cell.model, cell.context), 0.001)
            results[cell] = {"final": {"loss": abs(math.log(cell.rate / best))}}
    assert {(cell.model, cell.context): cell.rate for cell in results if cell.tokens == grid.ONE_PASS} == {
        (model, context): rates.get((model, context), 0.001) for model in grid.HEADLINE for context in (512, 8192)
    }
    assert {cell.name for cell in results} >= {
        "train_flash_m_mixed-masked_512_23.5_0.008_0", "train_transformer++_m_mixed-masked_8192_235_0.0005_0"
    }  # fmt: skip


def test_shifts_are_of_the_chunks_that_a_form_has():
    config = build("plus-512", "tiny", 64, 32, causal=True).config
    assert (config.chunk_size, config.chunk_shift) == (512, 256)
    assert build("plus-heads", "tiny", 64, 32, causal=True).config.chunk_shift == SIZES["tiny"].chunk // 2


def finished(cells, losses):
    """Results of trainings whose loss depends on their rate alone."""
    return {cell: {"final": {"loss": losses.get(cell.rate, 9.0)}} for cell in cells if cell.kind == "train"}


def test_rates_are_added_until_the_best_lies_between_two_worse_ones():
    group = ("transformer++", "books-causal", 8192)
    results = {}
    for asked in ({0.002, 0.001}, {0.002, 0.001, 0.0005}, {0.002, 0.001, 0.0005, 0.00025}):
        assert grid.tuned(results, *group) is None
        cells = grid.tuning(results, *group)
        assert {cell.rate for cell in cells} == asked
        results |= finished(cells, {0.002: 4.4, 0.001: 4.2, 0.0005: 4.1, 0.00025: math.nan})
    assert grid.tuning(results, *group) == cells and grid.tuned(results, *group).rate == 0.0005
    higher = finished(grid.tuning({}, *group), {0.002: 4.0, 0.001: 4.1})
    assert grid.tuning(higher, *group)[0].rate == 0.004


def test_the_grid_grows_with_what_was_found():
    """Rates between the ends come from the ends, second seeds from the best rates, and it has an end."""
    results, sizes = {}, []
    while set(grid.full_grid(results)) - set(results):
        cells = grid.full_grid(results)
        sizes.append(len(cells))
        for cell in cells:
            best = 0.002 if cell.model == "flash" else 0.0005 if cell.context == 8192 else 0.001
            results[cell] = {"final": {"loss": abs(math.log(max(cell.rate, 1e-9) / best))}}
    assert sizes == sorted(sizes) and len(sizes) > 2

    def rates(model, task, context, seed):
        return {cell.rate for cell in results if (cell.model, cell.task, cell.context, cell.seed) ==
                (model, task, context, seed) and (cell.size, cell.tokens) == ("m", grid.TOKENS)}  # fmt: skip

    for task in ("books-causal", "books-masked"):
        for context in grid.BETWEEN:
            assert rates("flash", task, context, 0) == {0.002}
            assert rates("transformer++", task, context, 0) == {0.0005, 0.001}
    for task, context in grid.GOALS:
        assert rates("flash", task, context, 1) == {0.002} and rates("transformer++", task, context, 1) == {0.0005}


# --- cells -----------------------------------------------------------------------------------------------------------
def test_a_cell_learns_and_tells_all(tokens):
    result = training.run_cell(CAUSAL, tokens, Gate(None), training.TINY_RECIPE)
    assert result["steps"] == 8 and result["valid_curve"][-1][0] == 8 and not result["diverged"]
    losses = [loss for _, loss in result["valid_curve"]]
    assert losses == sorted(losses, reverse=True) and losses[0] < math.log(300) + 0.1
    assert abs(result["final"]["loss"] - np.mean(result["final"]["by_position"])) < 1e-3
    assert len(result["final"]["by_slot"]) == SIZES["tiny"].chunk and set(result["lengths"]) == {"64", "128", "256"}
    assert result["parameters"] and result["versions"]["torch"] and result["recipe"]["eps"] == 1e-6
    again = training.run_cell(CAUSAL, tokens, Gate(None), training.TINY_RECIPE)
    assert again["valid_curve"] == result["valid_curve"] and again["final"] == result["final"]


def test_models_see_the_same_batches_in_the_same_order(tokens):
    """And another seed gives another order."""
    stream = load_stream(tokens, "books", "train", 32, causal=True)
    rival = grid.Cell(**{**CAUSAL.__dict__, "model": "transformer++"})
    drawn = {}
    for cell in (CAUSAL, rival, grid.Cell(**{**CAUSAL.__dict__, "seed": 1})):
        source = training.batches(cell, stream, training.TINY_RECIPE, "cpu")
        drawn[cell] = torch.stack([next(source)[0] for _ in range(5)])
    assert torch.equal(drawn[CAUSAL], drawn[rival]) and len(set(map(str, drawn.values()))) == 2


class CutOff(Exception):
    pass


@pytest.mark.parametrize("task", ["mixed-causal", "mixed-masked", "mqar4"])
def test_a_training_that_was_cut_off_resumes_exactly(mixed, tmp_path, monkeypatch, task):
    """As if unbroken: curves, final losses, in another piece of the text and with dropout."""
    folder, facts, _ = mixed
    size = "tiny-recall" if task == "mqar4" else "tiny"
    cell = grid.Cell("train", "flash", size, task, 32, 0.012, 0.004)
    monkeypatch.setitem(MODELS, "flash", dataclasses.replace(
        MODELS["flash"], build=_flash(hidden_dropout=0.1, attention_init="recent")))  # fmt: skip
    whole = training.run_cell(cell, folder, Gate(None), training.TINY_RECIPE)
    assert whole["steps"] == 23 and "resumed" not in whole and facts["mixed_train"]["pieces"][0] < 12_000

    monkeypatch.setattr(training, "STATE_SECONDS", 0)
    save, cut = training.save_state, {7, 14}

    def cut_off(path, step, now):
        save(path, step, now)
        if now.done in cut:
            cut.remove(now.done)
            raise CutOff

    monkeypatch.setattr(training, "save_state", cut_off)
    for _ in range(2):
        with pytest.raises(CutOff):
            training.run_cell(cell, folder, Gate(None), training.TINY_RECIPE, states=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{cell.name}.safetensors"]
    again = training.run_cell(cell, folder, Gate(None), training.TINY_RECIPE, states=tmp_path)
    assert again["resumed"] == [7, 14] and not list(tmp_path.iterdir())
    for key in ("train_curve", "valid_curve", "final", "lengths", *(["corpora"] if task != "mqar4" else [])):
        assert again[key] == whole[key], key


def test_a_mixed_cell_tells_each_corpus_and_their_mean(mixed):
    folder, _, _ = mixed
    cell = grid.Cell("train", "flash", "tiny", "mixed-causal", 32, 0.004, 0.004)
    result = training.run_cell(cell, folder, Gate(None), training.TINY_RECIPE)
    books, wiki = (result["corpora"][name] for name in ("books", "wiki"))
    assert result["final"]["loss"] == pytest.approx((books["final"]["loss"] + wiki["final"]["loss"]) / 2)
    assert set(books["lengths"]) == set(result["lengths"]) == {"64", "128", "256"}
    for (step, mean), (_, first), (_, second) in zip(
        result["valid_curve"], books["valid_curve"], wiki["valid_curve"], strict=True
    ):
        assert mean == pytest.approx((first + second) / 2, abs=2e-4) and step
    stream = load_stream(folder, "books", "valid", 32, causal=True, limit=1025)
    assert books["final"]["tokens"] == len(stream) * 32


@pytest.mark.parametrize("task", ["books-masked", "mqar4", "needle"])
def test_other_tasks_run(tokens, task):
    size = "tiny" if task == "books-masked" else "tiny-recall"
    cell = grid.Cell("train", "flash", size, task, 64, 0.002, 0.002)
    result = training.run_cell(cell, tokens, Gate(None), training.TINY_RECIPE)
    lengths = {"128", "256", "512"} if "books" in task else {"128", "256"}
    assert math.isfinite(result["final"]["loss"]) and set(result["lengths"]) == lengths
    if task != "books-masked":
        assert 0 <= result["final"]["accuracy"] <= 1 and len(result["valid_curve"][0]) == 3


def test_time_of_a_step_is_measured_alone(tokens, tmp_path):
    cell = grid.Cell("time", "transformer++", "tiny", "books-causal", 32)
    step = training.run_cell(cell, tokens, Gate(tmp_path), training.TINY_RECIPE)["step"]
    assert 0 < step["q25"] <= step["median"] <= step["q75"] and step["samples"] == training.TINY_RECIPE.samples


def test_the_gate_keeps_others_out(tmp_path):
    pytest.importorskip("fcntl")
    inside, order, together = [], [], []

    def side_by_side():
        for _ in range(20):
            with Gate(tmp_path).shared():
                inside.append(1)
                together.append(len(inside))
                time.sleep(0.002)
                inside.pop()

    workers = [threading.Thread(target=side_by_side) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in range(3):
        with Gate(tmp_path).alone():
            order.append(len(inside))
            time.sleep(0.01)
            order.append(len(inside))
    for worker in workers:
        worker.join()
    assert order == [0] * 6 and max(together) > 1


def cell_command(folder, text):
    """A worker like `serve` without its imports: it writes `text` for each cell, and a log for the cell bad, at which
    it ends."""
    program = (
        "import os, sys, time; from pathlib import Path\n"
        "for name in map(str.strip, sys.stdin):\n"
        "    time.sleep(0.5)\n"
        "    if name == 'bad':\n"
        f"        Path({str(folder)!r}, 'logs', name + '.log').write_text('this one fails')\n"
        "        sys.exit(1)\n"
        f"    Path({str(folder)!r}, 'cells', name + '.json').write_text({text})\n"
        "    print('done', flush=True)"
    )
    return [sys.executable, "-c", program]


def test_finished_cells_are_not_run_again_and_failures_are_reported(tmp_path):
    done, command = [], cell_command(tmp_path, repr('{"runs": 1}'))
    runner = CellRunner(tmp_path, command, minutes=5, least_seconds=0, done=done.append)
    write_json(runner.path("old"), {"runs": 0})
    runner.run(["old", "new", "bad"], 2)
    assert done == ["new"] and runner.result("old") == {"runs": 0} and runner.result("new") == {"runs": 1}
    assert list(runner.failed) == ["bad"] and "this one fails" in runner.failed["bad"]
    late = CellRunner(tmp_path, command, minutes=0, least_seconds=0)
    late.begin -= 1
    late.run(["new", "other"], 1)
    assert "not begun" in late.failed["other"] and "new" not in late.failed


def test_each_of_several_devices_has_workers_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    (tmp_path / "cells").mkdir()
    command = cell_command(tmp_path, "os.environ['CUDA_VISIBLE_DEVICES']")
    runner = CellRunner(tmp_path, command, minutes=5, least_seconds=0, devices=2)
    runner.run(["a", "b", "c", "d"], 2)
    assert sorted(runner.result(cell) for cell in "abcd") == [2, 2, 5, 5] and not runner.failed


def test_a_process_that_lasts_runs_cells_until_one_fails(tmp_path):
    program = (
        "import os, sys, time; from pathlib import Path; from scripts.provenance import write_json\n"
        "from scripts.study.runner import serve\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "def run(name):\n"
        "    print('output of', name)\n"
        "    assert name != 'bad', 'this one fails'\n"
        "    time.sleep(60 if name == 'long' else 0)\n"
        "    write_json(folder / 'cells' / f'{name}.json', os.getpid())\n"
        "serve(run, folder / 'logs')"
    )

    def done(cell):
        if cell == "c":
            runner.minutes = (runner.seconds() + 1) / 60

    runner = CellRunner(tmp_path, [sys.executable, "-c", program], minutes=5, least_seconds=0, done=done,
                        environment={"PYTHONPATH": str(ROOT)})  # fmt: skip
    runner.run(["a", "b", "bad", "c", "long"], 1)
    assert runner.result("a") == runner.result("b") != runner.result("c") is not None
    assert list(runner.failed) == ["bad", "long"]
    assert "this one fails" in runner.failed["bad"] and "cut off" in runner.failed["long"]
    assert (tmp_path / "logs" / "b.log").read_text(encoding="utf-8") == "output of b\n"
    assert all(process.returncode is not None for process in runner.processes)


def test_what_is_run_next_may_depend_on_what_was_found(tmp_path):
    runner = CellRunner(tmp_path, cell_command(tmp_path, "'1'"), minutes=5, least_seconds=0)
    (tmp_path / "cells").mkdir()

    def source():
        yield "first"
        yield "second" if runner.result("first") else "third"

    runner.run(source(), 1)
    assert runner.result("second") and runner.result("third") is None and not runner.failed


@pytest.mark.slow
def test_the_script_runs_a_cell_once_and_reports_it(own_cache, tmp_path, capsys):
    cell = grid.tiny_grid()[0].name
    bundle, work = tmp_path / "bundle.json", tmp_path / "work"

    def study(*words):
        with pytest.raises(SystemExit) as ended:
            run_here("-m", "scripts.study", "--tiny", "--work", work, *words)
        assert not ended.value.code
        return capsys.readouterr().out

    assert f"{cell}: done" in study("--prepare", str(BOOK), "--only", cell, "--bundle", str(bundle))
    assert "done" not in study("--only", cell)
    assert study("--list").split() == [other.name for other in grid.tiny_grid()[1:]]
    study("--unbundle", str(bundle), "--results", str(tmp_path / "kept"))
    assert [path.stem for path in (tmp_path / "kept").glob("*.json")] == [cell]
    assert "| FLASH | tiny | causal | 64 |" in study("--report", "--results", str(tmp_path / "kept"))


# --- report ----------------------------------------------------------------------------------------------------------
def cell_of(model, rate, losses, **more):
    curve = [[10 * (i + 1), loss] for i, loss in enumerate(losses)]
    facts = {"task": "books-causal", "parameters": 2e7, "steps": curve[-1][0], "valid_curve": curve, "lengths": {},
             "final": {"loss": losses[-1], "by_position": [losses[-1]] * 8},
             "text": {"books_valid": {"tokens": 100, "bytes": 400}}, "machine": report.TIMED_ON}  # fmt: skip
    return {grid.Cell("train", model, "m", "books-causal", 512, 30, rate, more.pop("seed", 0)): facts | more}


def test_the_time_to_a_loss_lies_between_two_validations():
    curve = [[10, 6.0], [20, 5.0], [30, 4.0]]
    assert report.steps_to(curve, 4.5) == 25 and report.steps_to(curve, 4.0) == 30
    assert report.steps_to(curve, 6.5) == 10 and report.steps_to(curve, 3.9) is None


def test_the_headline_table_compares_best_rates_and_seconds():
    results = cell_of("flash", 0.002, [6.0, 5.0, 4.0]) | cell_of("flash", 0.004, [6.0, 5.5, 4.2])
    results |= cell_of("flash", 0.002, [6.0, 5.0, 4.2], seed=1)
    results |= cell_of("transformer++", 0.002, [6.0, 5.5, 5.0])
    for model, ms in (("flash", 20.0), ("transformer++", 30.0)):
        step = {"median": ms, "q25": ms, "q75": ms}
        results[grid.Cell("time", model, "m", "books-causal", 512)] = {
            "step": step, "graphed": True, "machine": report.TIMED_ON
        }  # fmt: skip
    rows = [line.split(" | ") for line in report.headline(results).splitlines()[2:]]
    ours, rival = rows
    assert ours[4] == "4.100 +- 0.141" and "**0.002: 4.000**, 0.004: 4.200" in ours[6]
    # 20 of 30 steps at 20 ms against 30 at 30 ms.
    assert ours[8] == "20 of 30" and ours[9] == "0.4" and ours[10] == "2.25 x |" and rival[10] == "1.00 x |"
    assert float(ours[5]) == pytest.approx(4.0 / math.log(2) / 4, abs=1e-3)


def test_the_time_of_a_step_is_the_quietest_of_those_measured():
    results = cell_of("flash", 0.002, [5.0], step={"median": 21.0, "q25": 20.0, "q75": 22.0}, graphed=True)
    results |= cell_of("flash", 0.004, [5.0], step={"median": 25.0, "q25": 25.0, "q75": 25.0}, graphed=True)
    results |= cell_of(
        "flash", 0.001, [5.0], step={"median": 19.0, "q25": 19.0, "q75": 19.0}, graphed=True, machine="another GPU"
    )
    times = report.times(results).splitlines()[2:]
    assert times == [
        "| FLASH | m | causal | 512 | NVIDIA H100 80GB HBM3 | 21.0 (20.0 to 22.0) | - | yes |",
        "| FLASH | m | causal | 512 | another GPU | 19.0 (19.0 to 19.0) | - | yes |",
    ]
    assert report.step_ms(results, grid.Cell("train", "flash", "m", "wiki-causal", 512)) == 21.0
    assert report.step_ms(results, grid.Cell("train", "flash", "m", "wiki-masked", 512)) is None


def test_seconds_to_a_loss_are_the_mean_of_the_seeds():
    step = {"median": 10.0, "q25": 10.0, "q75": 10.0}
    results = {}
    for seed, half in ((0, 5.0), (1, 5.5)):
        results |= cell_of("flash", 0.002, [6.0, half, 4.0], seed=seed, step=step)
        results |= cell_of("transformer++", 0.002, [6.0, 5.5, 5.0], seed=seed, step=step)
    ours, rival = (grid.Cell("train", model, "m", "books-causal", 512, 30, 0.002) for model in grid.HEADLINE)
    # 20 of 30 steps, and 20 and a third.
    assert report.faster(results, ours, rival) == f"{(30 / 20 + 30 / (20 + 10 / 3)) / 2:.2f} x"


def long_trainings(task, context):
    """Of two models at three rates; the loss is higher in the first eighth and lower in the last."""
    results = {}
    for model, rate, books in (("flash", 0.002, 4.0), ("flash", 0.004, 4.5), ("transformer++", 0.001, 3.0)):
        cell = grid.Cell("train", model, "m", task, context, 235, rate)
        found = {
            name: {
                "final": {"loss": loss, "by_position": [loss + 0.4] * 4 + [loss] * 24 + [loss - 0.1] * 4},
                "lengths": {f"{2 * context}": {"loss": loss + 1}, f"{4 * context}": {"loss": loss + 2}},
            }
            for name, loss in (("books", books), ("wiki", books + 1))
        }
        results[cell] = {
            "task": cell.task, "final": {"loss": books + 0.5}, "corpora": found, "tokens_per_step": 32768,
            "parameters": 24.4e6, "steps": 2000, "machine": "a GPU",
            "step": dict.fromkeys(("median", "q25", "q75"), 15.0 if model == "flash" else 20.0),
            "train_curve": {"every": 10, "loss": [6.0] * 90 + [books - 0.2, books] * 5},
            "valid_curve": [[100 * step, books + 2 - step / 10] for step in range(1, 21)],
            "text": {f"{name}_valid": {"tokens": 100, "bytes": 400} for name in ("books", "wiki")},
        }  # fmt: skip
    return results


def test_long_trainings_are_listed_by_corpus_and_position():
    """Of each model the best rate, the lowest loss first."""
    results = long_trainings("mixed-causal", 2048)
    rows = [line.strip("| ").split(" | ") for line in report.lasting(results).splitlines()]
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1
    assert rows[2] == ["m, 24 M", "2,048", "235 M", "Transformer++", "0.001", "2.900", "3.500",
                       "3.000 (1.082)", "3.400, 2.900", "0.500", "4.000 (1.443)", "4.400, 3.900", "0.500"]  # fmt: skip
    assert rows[3][3:8] == ["FLASH", "0.002", "3.900", "4.500", "4.000 (1.443)"]
    crossed = report.crossings(results).splitlines()[2:]
    assert crossed[0].startswith(
        "| m, 24 M | 2,048 | 235 M | Transformer++ | 4.900 (3 M) | 4.800 (7 M) | 4.500 (16 M)"
    )
    assert crossed[0].endswith("3.000 (66 M) | 20.0 | 66 M | 40 of 40 |")
    assert crossed[1].endswith(" | 15.0 | never | - |")
    ours = grid.Cell("train", "flash", "m", "mixed-causal", 2048, 235, 0.002)
    sooner = results[ours] | {"valid_curve": [[100 * step, 3.5 - step / 10] for step in range(1, 21)]}
    # At step 500 of 2,000, of 15 and 20 ms.
    assert " | 15.0 | 16 M | 8 of 40 |" in report.crossings(results | {ours: sooner})
    tenth = dataclasses.replace(ours, tokens=23.5)
    results |= {
        dataclasses.replace(tenth, rate=rate): {"final": {"loss": loss}} for rate, loss in ((0.001, 5.0), (0.002, 4.5))
    }
    table = report.lasting(results)
    assert table.endswith(
        "\n\nLearning rates with a tenth of the tokens: FLASH (m, 2,048) 0.001: 5.000, **0.002: 4.500**."
    )
    assert len(table.splitlines()) == len(rows) + 2


def test_lengths_beyond_the_context_are_of_the_longest_training_that_has_them():
    """Seed by seed; a shorter training stands in where no long one has 8 times."""

    def measured(loss, factors, **changes):
        cell = grid.Cell("train", "flash", "m", "mixed-causal", 2048, 235, 0.002)
        lengths = {f"{factor * 2048}": {"loss": loss + factor} for factor in factors}
        return {
            dataclasses.replace(cell, **changes): {"final": {"loss": loss}, "lengths": lengths, "parameters": 24e6}
        }

    results = measured(3.0, (2, 4)) | measured(4.0, (2, 4, 8), tokens=23.5) | measured(3.5, (2, 4, 8), tokens=60)
    results |= measured(3.9, (2, 4, 8), tokens=23.5, rate=0.004) | measured(3.2, (), model=grid.RIVAL)
    head = ["m, 24 M", "2,048"]
    rows = [line.strip("| ").split(" | ") for line in report.beyond(results).splitlines()[2:]]
    assert rows == [
        [*head, "235 M", "FLASH", "3.000", "5.000", "7.000", "-"],
        [*head, "60 M", "FLASH", "3.500", "5.500", "7.500", "11.500"],
    ]
    results |= measured(3.1, (2, 4, 8), seed=1)
    rows = [line.strip("| ").split(" | ") for line in report.beyond(results).splitlines()[2:]]
    assert rows == [[*head, "235 M", "FLASH", "3.000, 3.100", "5.000, 5.100", "7.000, 7.100", "-, 11.100"]]
    assert report.beyond({}) == "No cells yet."


def test_the_global_branch_is_worth_what_local_attention_alone_lacks():
    """By position, of trainings of one pass alone."""
    results = {}
    for model, tokens, more in ((grid.PLUS, 235, 0), (grid.PLUS_LOCAL, 235, 1), (grid.PLUS_LOCAL, 60, 9)):
        found = {
            "final": {"by_position": [3 + more * i / 32 for i in range(32)]},
            "lengths": {
                f"{factor * 2048}": {"quarters": [3 + more * factor * i for i in range(4)]} for factor in (2, 4)
            },
        }
        cell = grid.Cell("train", model, "m", "mixed-causal", 2048, tokens, 0.002)
        results[cell] = {"final": {"loss": 3 + more}, "corpora": {"books": found, "wiki": found}}
    eighths = "0.047, 0.172, 0.297, 0.422, 0.547, 0.672, 0.797, 0.922"
    rows = report.branch(results).splitlines()[2:]
    assert rows == [
        f"| 2,048 | {corpus} | {eighths} | 0.000, 2.000, 4.000, 6.000 | 0.000, 4.000, 8.000, 12.000 |"
        for corpus in ("books", "wiki")
    ]
    del results[next(iter(results))]
    assert report.branch(results) == "No cells yet."


def test_masked_long_trainings_are_listed_apart():
    causal, masked = long_trainings("mixed-causal", 8192), {}
    for context in (8192, 512):
        masked |= long_trainings("mixed-masked", context)
        for rate, loss in ((0.001, 5.0), (0.002, 4.5)):
            cell = grid.Cell("train", "flash", "m", "mixed-masked", context, 23.5, rate)
            masked[cell] = {"final": {"loss": loss}, "machine": "a GPU"}
    both = causal | masked
    for name in ("lasting", "crossings", "searched"):
        assert report.SECTIONS[name](both) == report.SECTIONS[name](causal)
    for name in ("lasting-masked", "crossings-masked"):
        assert report.SECTIONS[name](both) == report.SECTIONS[name](masked)
        assert report.SECTIONS[name](causal) == "No cells yet."
    table, rates = report.SECTIONS["lasting-masked"](both).split("\n\n")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert len(rows) == 6 and len({len(row) for row in rows}) == 1 and "bytes" not in table
    assert [(row[1], row[3]) for row in rows[2:]] == [
        (context, model) for context in ("512", "8,192") for model in ("Transformer++", "FLASH")
    ]
    # Ends: the mean of 3.4 and 2.9.
    assert rows[2][4:] == [
        *("0.001", "2.900", "3.500"),
        *("3.000", "3.150, 3.000", "0.150"),
        *("4.000", "4.150, 4.000", "0.150"),
    ]
    found = " 0.001: 5.000, **0.002: 4.500**"
    assert rates.endswith(f": FLASH (m, 512){found}; FLASH (m, 8,192){found}.")
    only = {cell: result for cell, result in both.items() if cell.tokens == 23.5}
    assert report.SECTIONS["lasting-masked"](only) == f"No cells yet.\n\n{rates}"
    # Transformer++'s end is that of the masked training.
    for cell in causal:
        if cell.model == grid.RIVAL:
            both[cell] = {**both[cell], "valid_curve": [[2000, 9.0]]}
    assert report.SECTIONS["crossings-masked"](both) == report.SECTIONS["crossings-masked"](masked)


def test_forms_are_compared_with_flash_plus_after_a_quarter_of_a_pass():
    results = {}
    for model, size, books, wiki in (
        (grid.PLUS, "m", 3.8, 3.6), ("plus-window", "m", 3.7, 3.5), ("plus-keys", "m-decay", 3.9, 3.8)
    ):  # fmt: skip
        cell = grid.Cell("train", model, size, "mixed-causal", 2048, grid.SEARCHED, 0.002)
        found = {name: {"final": {"loss": loss, "by_position": [loss + 0.3] * 4 + [loss] * 28}}
                 for name, loss in (("books", books), ("wiki", wiki))}  # fmt: skip
        results[cell] = {"final": {"loss": (books + wiki) / 2}, "corpora": found, "machine": "a GPU"}
    rows = [line.strip("| ").split(" | ") for line in report.searched(results).splitlines()]
    assert len({len(row) for row in rows}) == 1 and [row[0] for row in rows[2:]] == [
        "plain-key FLASH+, local part over two chunks",
        "plain-key FLASH+",
        "FLASH+, weight decay 0.1",
    ]
    assert rows[2][1:] == ["0.002", "3.600", "-0.100", "3.700", "0.300", "3.500", "0.300", "-", "a GPU"]
    del results[next(iter(results))]
    assert report.searched(results).splitlines()[2].split(" | ")[3] == "-"


def test_trainings_cut_off_are_compared_after_the_same_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "UNFINISHED", tmp_path)
    cell = grid.Cell("train", "plus-keys", "m", "mixed-causal", 2048, 235, 0.002)
    facts = {"steps": 100, "valid_curve": [[10, 5.0], [50, 4.0]], "why": "the machine was given back"}
    (tmp_path / f"{cell.name}.json").write_text(json.dumps(facts), encoding="utf-8")
    results = {
        dataclasses.replace(cell, model=grid.PLUS): {"valid_curve": [[50, 4.25], [100, 3.0]]},
        dataclasses.replace(cell, model=grid.RIVAL, rate=0.001): {"valid_curve": [[40, 4.1], [100, 3.5]]},
    }
    (row,) = report.unfinished(results).splitlines()[2:]
    assert row.startswith("| mixed, causal | 2,048 | 235 M | 50 of 100 |")
    assert row.endswith("| 4.000 | - | -0.250 | - | - | - | the machine was given back |")
    assert report.unfinished({cell: {}}) == "None."  # it has been run since
    masked = dataclasses.replace(cell, model="flash", task="mixed-masked", context=512)
    (tmp_path / f"{masked.name}.json").write_text(json.dumps(facts), encoding="utf-8")
    results[dataclasses.replace(masked, model=grid.RIVAL, rate=0.001)] = {"valid_curve": [[50, 3.5]]}
    ours, other = report.unfinished(results).splitlines()[2:]
    assert ours == row
    assert other.startswith("| mixed, masked | 512 | 235 M | 50 of 100 | FLASH | 4.000 | - | - | +0.500 |")


def test_long_trainings_are_plotted_against_tokens(tmp_path):
    results = {}
    for context in grid.PASSED["flash"]:
        cell = grid.Cell("train", "flash", "m", "mixed-causal", context, grid.ONE_PASS, 0.002)
        results[cell] = {"final": {"loss": 4.0}, "tokens_per_step": 32768, "machine": "a GPU",
                         "valid_curve": [[10, 6.0], [20, 5.0], [30, 4.0]]}  # fmt: skip
    assert [path.name for path in report.draw(results, tmp_path)] == ["one-pass.png"]
    causal = (tmp_path / "one-pass.png").read_bytes()
    results |= {dataclasses.replace(cell, task="mixed-masked"): result for cell, result in results.items()}
    assert [path.name for path in report.draw(results, tmp_path)] == ["one-pass.png", "one-pass-masked.png"]
    assert (tmp_path / "one-pass.png").read_bytes() == causal


def test_figures_are_plotted(tmp_path):
    step = {"median": 10.0, "q25": 10.0, "q75": 10.0}
    results = cell_of("flash", 0.002, [6.0, 5.0], step=step) | cell_of("transformer++", 0.002, [6.0, 5.5], step=step)
    assert [path.name for path in report.draw(results, tmp_path)] == ["books-causal.png"]
    facts = next(iter(results.values()))
    for size in ("s", "m"):
        results[grid.Cell("train", "flash-quad", size, rate=0.001, **grid.SHORT)] = facts
    names = [path.name for path in report.draw(results, tmp_path)]
    assert names == ["books-causal.png", "sizes.png"] and all((tmp_path / name).stat().st_size for name in names)
    assert "FLASH-Quad | s |" in report.ablations(results)


def test_results_are_filled_in_between_their_marks():
    document = "a\n<!-- study: times -->\nold\n<!-- end -->\nb\n"
    filled = report.fill(document, {})
    assert filled.startswith("a\n") and filled.endswith("\nb\n") and "old" not in filled
    assert report.fill(filled, {}) == filled
    with pytest.raises(ValueError, match="no section"):
        report.fill("<!-- study: else -->\n\n<!-- end -->", {})


def test_the_studys_document_is_what_the_kept_cells_say():
    document = (KEPT / "TABLES.md").read_text(encoding="utf-8")
    results = grid.load_results(KEPT)
    assert results and report.fill(document, results) == document
    assert all(f"<!-- study: {name} -->" in document for name in report.SECTIONS)
    assert "(study/README.md)" in (KEPT.parent / "README.md").read_text(encoding="utf-8")
    for cell, result in results.items():
        recipe = json.loads(json.dumps(dataclasses.asdict(training.recipe_of(cell))))
        assert result["commit"] and "dirty" not in result["commit"] and result["recipe"] == recipe, cell
        assert cell.size not in ("tiny", "tiny-recall")


# The study's finding on recall: as many right answers as are in an earlier chunk.
def recalled(model: str, task: str) -> dict[int, float]:
    """Share of right answers by the length of the rows."""
    result = grid.load_results(KEPT)[grid.Cell("train", model, "recall", task, 512, 60, 0.002)]
    longer = {int(length): found["accuracy"] for length, found in result["lengths"].items()}
    return {512: result["final"]["accuracy"], **longer}


def asked(task: str, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that recall was measured on, and their labels."""
    return tuple(map(torch.cat, zip(*training.recall_questions(task, context, training.Recipe()), strict=True)))


@pytest.mark.parametrize("model", [grid.PLUS, "flash-keyshift-norope"])
def test_as_many_needles_were_found_as_lie_before_the_last_chunk(model):
    found = recalled(model, "needle")
    for context in (512, 1024):
        inputs, _ = asked("needle", context)
        before = (inputs == 1).int().argmax(1) < context - SIZES["recall"].chunk
        assert 0 < before.sum() < len(inputs) and found[context] * len(inputs) == before.sum()


def test_as_many_pairs_were_recalled_as_are_of_an_earlier_chunk():
    for context, found in recalled(grid.PLUS, "mqar32").items():
        _, labels = asked("mqar32", context)
        # All pairs stand in the first 64 tokens; the first chunk of the shifted grid is half of one.
        share = ((labels != IGNORE).nonzero()[:, 1] >= SIZES["recall"].chunk // 2).double().mean().item()
        assert share - 0.001 <= found <= share + 0.01, context
