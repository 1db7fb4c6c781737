# SPDX-License-Identifier: Apache-2.0
"""Streams: order, shuffling, their state, and runs that are killed, lose the network, or fill the disk."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import HfHubHTTPError

from flash_hf import training
from flash_hf.commands.train import parse_arguments
from flash_hf.training.checkpoints import find_checkpoint
from flash_hf.training.documents import load_documents
from flash_hf.training.packing import pack_documents
from flash_hf.training.stream import BATCH_DOCUMENTS, STREAM_STATE, BlockStream
from flash_hf.training.tokenizer import tokenize_documents
from flash_hf.training.trainer import write_log
from helpers import ROOT, TEXT, history, run_python


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def small_batches(monkeypatch):
    """A dozen documents then make more than one batch."""
    monkeypatch.setattr("flash_hf.training.stream.BATCH_CHARACTERS", 2000)
    monkeypatch.setattr("flash_hf.training.stream.BATCH_DOCUMENTS", 5)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Three files of short documents, the first with a blank one, as JSON and as Parquet; validation; a tokenizer."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(3):
        rows = [TEXT[i : i + 301] for i in range(number * 7000, (number + 1) * 7000, 301)]
        rows = [" \n", *rows] if number == 0 else rows
        Dataset.from_dict({"text": rows}).to_json(folder / f"{number}.jsonl")
        Dataset.from_dict({"text": rows}).to_parquet(folder / f"{number}.parquet")
    Dataset.from_dict({"text": [TEXT[150_000:151_500]]}).to_json(folder / "validation.jsonl")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def rows_of(stream, count: int) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in itertools.islice(stream, count)]


# --- order and shuffling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_an_unshuffled_stream_gives_the_blocks_of_the_map_style_set(files, tokenizer, causal, packing, small_batches):
    options = {"block_size": 50, "causal": causal, "packing": packing}
    paths = [files / f"{n}.jsonl" for n in range(3)]
    blocks = pack_documents(tokenize_documents(load_documents(paths), tokenizer), tokenizer, **options)
    stream = BlockStream(load_documents(paths, streaming=True), tokenizer, **options)
    rows = list(itertools.islice(stream, 2 * len(blocks) - 2))
    assert len(blocks) > 100
    for got, want in zip(rows, list(blocks)[:-1], strict=False):
        assert got.keys() == want.keys() and all(got[name].tolist() == want[name] for name in want)
    # The second pass begins in the block that the first one left unfilled.
    assert all(row["attention_mask"].all() for row in rows)
    left = sum(blocks[-1]["attention_mask"])
    assert 0 < left < 50 and rows[len(blocks) - 1]["input_ids"][:left].tolist() == blocks[-1]["input_ids"][:left]


def test_blocks_are_shuffled_within_windows(files, tokenizer):
    def read(shuffle_buffer, seed=0):
        documents = load_documents(files / "0.jsonl", streaming=True)
        stream = BlockStream(
            documents, tokenizer, block_size=20, causal=False, shuffle_buffer=shuffle_buffer, seed=seed
        )
        return rows_of(stream, 96)

    plain, shuffled = read(0), read(32)
    windows = [list(map(tuple, rows)) for rows in (plain, shuffled)]
    for begin in range(0, 96, 32):
        one, other = (rows[begin : begin + 32] for rows in windows)
        assert one != other and sorted(one) == sorted(other)
    orders = [[plain.index(row) - begin for row in shuffled[begin : begin + 32]] for begin in (0, 32)]
    assert orders[0] != orders[1]  # every window has an order of its own
    assert read(32) == shuffled != read(32, seed=1)


def test_a_stream_reads_one_window_ahead_and_no_further(tokenizer):
    """Memory and time are bounded, whatever the length of the stream."""
    read = []

    def documents():
        for number in itertools.count():
            read.append(number)
            yield {"text": f"{number} words " * 30}

    stream = BlockStream(
        IterableDataset.from_generator(documents), tokenizer, block_size=32, causal=True, shuffle_buffer=10
    )
    rows = iter(stream)
    next(rows)
    time.sleep(0.5)
    assert len(read) <= 3 * BATCH_DOCUMENTS
    rows.close()


@pytest.mark.parametrize("texts", [["", "  \n"], [None]])
def test_a_stream_without_text_is_refused(texts, tokenizer):
    documents = Dataset.from_dict({"text": texts}).to_iterable_dataset()
    with pytest.raises(ValueError, match="the data set has no text"):
        next(iter(BlockStream(documents, tokenizer, block_size=8, causal=True)))


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize("take", [None, 17])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_stream_resumes_from_any_position(files, tokenizer, ending, take, packing, small_batches):
    """Through JSON; over the borders of batches, windows, files and passes; from a state of a resumed stream, too."""

    def make(shuffle_buffer=20):
        paths = [files / f"{n}.{ending}" for n in range(3)]
        documents = load_documents(paths, streaming=True, max_documents=take)
        return BlockStream(
            documents, tokenizer, block_size=40, causal=True, packing=packing, shuffle_buffer=shuffle_buffer, seed=3
        )

    stream, rows, states = make(), [], []
    for number, row in enumerate(itertools.islice(stream, 360)):
        rows.append(row["input_ids"].tolist())
        if number % 31 == 0 and number <= 310:  # a loader reads a few rows ahead
            states.append((max(0, number - 5), json.dumps(stream.state_at(max(0, number - 5)))))
    passes = [json.loads(state)["pass"] for _, state in states]
    assert passes[0] == 0 and passes[-1] >= (3 if take else 0)
    assert all(len(state) < 2000 for _, state in states)
    for place, state in states:
        again = make()
        again.load_state_dict(json.loads(state))
        assert again.first_row == place
        assert rows_of(again, 45) == rows[place : place + 45]
        third = make()
        third.load_state_dict(json.loads(json.dumps(again.state_at(place + 40))))
        assert rows_of(third, 9) == rows[place + 40 : place + 49]
    with pytest.raises(ValueError, match="was read with shuffle_buffer=20, this one with 5: it would continue else"):
        make(5).load_state_dict(json.loads(state))


# --- the network -----------------------------------------------------------------------------------------------------


class Broken:
    """Documents that cannot be read beyond the 20th."""

    def __init__(self, error: Exception):
        self.error = error

    def set_epoch(self, epoch):
        pass

    def state_dict(self):
        return {}

    def __iter__(self):
        yield from [{"text": "This is a number. " * 9}] * 20
        raise self.error


@pytest.mark.parametrize("error, message", [
    (ConnectionError("Server Disconnected"), "a/b could not be read: Server Disconnected.*resume_from_checkpoint"),
    (HfHubHTTPError("503 Server Error", response=SimpleNamespace(headers={}, request=None)), "503.*resume_from"),
    (KeyError("text"), "text"),
    (UnicodeDecodeError("utf-8", b"", 0, 1, "bad byte"), "bad byte"),
])  # fmt: skip
def test_errors_of_the_reader_end_the_iteration(error, message, tokenizer, small_batches):
    stream = BlockStream(Broken(error), tokenizer, block_size=30, causal=True, source="a/b")
    kind = ConnectionError if "resume_from" in message else type(error)
    with pytest.raises(kind, match=message):
        rows_of(stream, 200)


@pytest.mark.slow
def test_a_stream_from_the_hub_that_breaks_off(tmp_path):
    """tests/support/stream_client.py: a server falls silent in the middle of a run, for a second and then for good."""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": None}
    done = run_python("tests/support/stream_client.py", tmp_path, **environment)
    assert done.stdout.splitlines()[-1] == "as if it had not happened"


# --- whole runs ------------------------------------------------------------------------------------------------------


def command_of(files: Path, folder: Path, *more: str) -> list[str]:
    """A run of 12 steps that logs every one, with dropout and accumulation."""
    return [
        "--train_file",
        *(str(files / f"{n}.jsonl") for n in range(3)),
        *f"--validation_file {files / 'validation.jsonl'} --tokenizer {files / 'tokenizer'} --streaming "
        "--config_overrides hidden_size=32,num_hidden_layers=2,query_key_dim=16,chunk_size=16,hidden_dropout=0.1 "
        "--block_size 60 --shuffle_buffer 20 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
        "--max_steps 12 --learning_rate 3e-3 --eval_strategy no --eval_on_start false --save_steps 2 "
        f"--logging_steps 1 --disable_tqdm true --output_dir {folder}".split(),
        *more,
    ]


def run(kind: str, *command: str) -> dict:
    return training.run_training(kind, *parse_arguments(list(command)))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_clm.py", "train_mlm.py"])
def test_a_killed_run_resumes_as_if_unbroken(script, files, tmp_path):
    """SIGKILL at a random moment after the first checkpoint; resumed here, bit for bit."""
    kind = "causal" if script == "train_clm.py" else "masked"
    run(kind, *command_of(files, tmp_path / "whole"))
    command = command_of(files, tmp_path / "killed")
    process = subprocess.Popen(
        [sys.executable, f"scripts/{script}", *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it was killed: train for longer"

    run(kind, *command, "--resume_from_checkpoint", "last")
    for key in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert history(tmp_path / "killed", key) == history(tmp_path / "whole", key), key
    assert sorted(history(tmp_path / "killed")) == list(range(1, 13))


def test_a_resumed_stream_reads_nothing_twice(files, tmp_path, monkeypatch, small_batches):
    """Resuming at step 10 opens the last window, not the forty rows before it; nor the last step's rows again."""
    run("causal", *command_of(files, tmp_path / "run"))
    load, states = IterableDataset.load_state_dict, []
    monkeypatch.setattr(
        IterableDataset, "load_state_dict", lambda documents, state: (states.append(state), load(documents, state))
    )
    whole = history(tmp_path / "run")
    run(
        "causal", *command_of(files, tmp_path / "run", "--resume_from_checkpoint", str(tmp_path / "run/checkpoint-10"))
    )
    assert history(tmp_path / "run") == whole
    assert states[0]["examples_iterable"]  # not from the beginning


def test_a_checkpoint_without_its_stream_is_none(files, tmp_path):
    run("causal", *command_of(files, tmp_path / "run", "--save_steps", "6"))
    (tmp_path / "run" / "checkpoint-12" / STREAM_STATE).unlink()
    find = partial(find_checkpoint, "last", tmp_path / "run")
    assert find(streaming=True).name == "checkpoint-6" and find().name == "checkpoint-12"
    (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1', encoding="utf-8")
    with pytest.raises(ValueError, match="Complete checkpoints in .*: none"):
        find(streaming=True)


def test_resuming_with_other_text_is_refused(files, tmp_path):
    run("causal", *command_of(files, tmp_path / "run", "--save_steps", "6"))
    with pytest.raises(ValueError, match="was read with block_size=60, this one with 30"):
        run("causal", *command_of(files, tmp_path / "run", "--resume_from_checkpoint", "last", "--block_size", "30"))


@pytest.mark.parametrize("what", ["model", "optimizer.pt", STREAM_STATE])
def test_a_full_disk_costs_no_checkpoint(what, files, tmp_path, monkeypatch):
    """Writes that the kernel refuses: no file may grow, or a single one is /dev/full."""
    resource = pytest.importorskip("resource")
    run("causal", *command_of(files, tmp_path / "whole"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = training.FlashTrainer._save_checkpoint

    def full_at_eight(trainer, model, trial):
        if trainer.state.global_step == 8 and what == "model":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        elif trainer.state.global_step == 8:
            folder = tmp_path / "run" / "checkpoint-8"
            folder.mkdir()
            (folder / what).symlink_to("/dev/full")
        save(trainer, model, trial)

    with monkeypatch.context() as patch:
        patch.setattr(training.FlashTrainer, "_save_checkpoint", full_at_eight)
        try:
            with pytest.raises(OSError, match=r"checkpoint-8 could not be saved: .*--resume_from_checkpoint last"):
                run("causal", *command_of(files, tmp_path / "run", "--save_total_limit", "1"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert find_checkpoint("last", tmp_path / "run", streaming=True).name == "checkpoint-6"
    assert sorted(history(tmp_path / "run")) == list(range(1, 7))  # the log of the last checkpoint is whole, too
    run("causal", *command_of(files, tmp_path / "run", "--resume_from_checkpoint", "last"))
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_a_full_disk_spares_the_log(tmp_path):
    lines = [{"step": 1, "loss": 2.0}]
    write_log(lines, tmp_path)
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(saved) == {"log_history.json", "loss.png"}
    (tmp_path / ".log_history.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_log([*lines * 2000], tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in saved} == saved
