# SPDX-License-Identifier: Apache-2.0
"""Training for a given time instead of a given number of steps, for instance on machines rented by the hour."""

import time

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


MAX_STEPS = 100_000_000  # never reached: the clock ends the run


class TimeBudget(TrainerCallback, ExportableState):
    """Stop the training after some minutes, with a learning rate that rises and falls by the clock.

    The rate then reaches 0 at the end, whatever the speed, and even if the speed changes. Two runs with one seed see
    the same data, but not the same rate at each step; use `max_steps` for curves to compare.

    Args:
        minutes: from `started` to the last step. A resumed run gets the same number again, and its rate continues.
        warmup: fraction of the training in which the rate rises; from 1 on, steps of linear warm-up.
        started: a reading of `time.monotonic()`; None starts the clock with the training.

    Raises:
        ValueError: `minutes` is not positive, or `warmup` is negative.
    """

    def __init__(self, minutes: float, warmup: float = 0.05, started: float | None = None):
        if not minutes > 0:
            raise ValueError(f"max_minutes must be greater than 0, got {minutes}.")
        if warmup < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {warmup}.")
        self.minutes, self.warmup, self.started = minutes, warmup, started
        self.before = 0.0  # fraction of the training done before a checkpoint
        self.begin = self.end = None

    def state(self) -> dict:
        return {"args": {"minutes": self.minutes, "warmup": self.warmup}, "attributes": {"before": self.done()}}

    def done(self) -> float:
        """The fraction of the training that is done."""
        if self.begin is None:
            return self.before
        share = (time.monotonic() - self.begin) / max(1e-9, self.end - self.begin)
        return self.before + (1 - self.before) * min(1.0, share)

    def rate(self, step: int) -> float:
        """The learning rate after `step` steps, as a fraction of its peak."""
        done = self.done()
        if self.warmup >= 1:
            return min(1.0, (step + 1) / self.warmup) * (1 - done)
        return done / self.warmup if done < self.warmup else (1 - done) / (1 - self.warmup)

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.rate)

    def on_train_begin(self, args, state, control, **kwargs):
        # Not by restore_callback_states_from_checkpoint, which makes a new object: the scheduler has this one.
        kept = state.stateful_callbacks.get(type(self).__name__)
        self.before = kept["attributes"]["before"] if kept and state.global_step else 0.0
        self.begin = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.begin is None:  # not earlier: the validation at the start would use up the warm-up
            self.begin = time.monotonic()
            self.end = (self.begin if self.started is None else self.started) + 60 * self.minutes

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() >= self.end:
            # As DefaultFlowCallback does at max_steps.
            control.should_training_stop = True
            control.should_evaluate = args.eval_strategy == IntervalStrategy.STEPS
            control.should_save = args.save_strategy == SaveStrategy.STEPS
