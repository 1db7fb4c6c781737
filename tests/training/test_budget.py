# SPDX-License-Identifier: Apache-2.0
"""Training by the clock: it ends in time, at a rate of 0, and a resumed run continues with the rate it had."""

import json
import time
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from flash_hf import training
from flash_hf.commands.train import parse_arguments
from flash_hf.training import TimeBudget


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("flash_hf.training.budget.time.monotonic", lambda: clock.now)
    return clock


def started(budget: TimeBudget, state: TrainerState | None = None) -> TimeBudget:
    budget.on_train_begin(None, TrainerState() if state is None else state, None)
    budget.on_step_begin(None, None, None)
    return budget


def test_the_rate_follows_the_clock(clock):
    budget = started(TimeBudget(2.0, warmup=0.25))
    rates = []
    for _ in range(5):
        rates.append(budget.rate(7))
        clock.now += 30
    assert rates == pytest.approx([0, 1, 2 / 3, 1 / 3, 0])
    by_steps = started(TimeBudget(2.0, warmup=4))
    assert [by_steps.rate(step) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    clock.now += 60
    assert [by_steps.rate(step) for step in (0, 9)] == [0.125, 0.5]


def test_what_was_prepared_counts_and_the_start_validation_does_not_warm_up(clock):
    budget = TimeBudget(2.0, warmup=0.5, started=clock.now)
    clock.now += 60  # reading and tokenising
    budget.on_train_begin(None, TrainerState(), None)
    clock.now += 20  # the first validation
    budget.on_step_begin(None, None, None)
    assert budget.rate(0) == 0
    clock.now += 20
    budget.on_step_begin(None, None, None)
    assert budget.rate(0) == pytest.approx(1)
    args, control = SimpleNamespace(eval_strategy="steps", save_strategy="no"), TrainerControl()
    clock.now += 19
    budget.on_step_end(args, None, control)
    assert not control.should_training_stop
    clock.now += 1
    budget.on_step_end(args, None, control)
    assert (control.should_training_stop, control.should_evaluate, control.should_save) == (True, True, False)
    assert budget.rate(0) == 0


def test_a_resumed_run_continues_with_its_rate(clock):
    first = started(TimeBudget(2.0, warmup=0.25))
    clock.now += 60
    kept = json.loads(json.dumps(first.state()))
    clock.now += 500  # between the two
    state = TrainerState(global_step=9, stateful_callbacks={"TimeBudget": kept})
    second = started(TimeBudget(1.0, warmup=0.25), state)
    assert second.rate(9) == pytest.approx(2 / 3)
    clock.now += 30
    assert second.rate(9) == pytest.approx(1 / 3)
    # A new run in the same process starts from the beginning.
    assert started(second).rate(0) == 0


def test_a_run_ends_in_time_and_saves(own_cache, tmp_path):
    (tmp_path / "text.txt").write_text("Down the road of yellow brick. " * 400, encoding="utf-8")
    parsed = parse_arguments(
        f"--train_file {tmp_path / 'text.txt'} --config_overrides hidden_size=16,num_hidden_layers=1,query_key_dim=8,"
        "chunk_size=16,vocab_size=300 --tokenizer_vocab_size 280 --block_size 64 --max_minutes 0.05 --logging_steps 1 "
        f"--disable_tqdm true --output_dir {tmp_path / 'run'}".split()
    )
    begin = time.monotonic()
    training.run_training("causal", *parsed)
    seconds = time.monotonic() - begin
    log = json.loads((tmp_path / "run" / "log_history.json").read_text(encoding="utf-8"))
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert 3 <= seconds < 60 and rates
    assert max(rates) <= 1e-3
    assert any("train_runtime" in entry for entry in log)
    assert not any(name.startswith("train_") and name.endswith("per_second") for entry in log for name in entry)
    state = json.loads(next((tmp_path / "run").glob("checkpoint-*/trainer_state.json")).read_text(encoding="utf-8"))
    assert state["stateful_callbacks"]["TimeBudget"]["attributes"]["before"] == 1.0


def test_what_makes_no_sense_is_refused(tmp_path):
    for minutes, warmup, words in ((0, 0.1, "max_minutes must be greater than 0"), (1, -1, "warmup_steps must")):
        with pytest.raises(ValueError, match=words):
            TimeBudget(minutes, warmup)
    with pytest.raises(ValueError, match="max_minutes needs one process.*COSINE.*Use max_steps"):
        training.FlashTrainingArguments(output_dir=tmp_path, max_minutes=1, lr_scheduler_type="cosine")
