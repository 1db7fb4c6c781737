# SPDX-License-Identifier: Apache-2.0
"""FlashTrainer: the Trainer of transformers with the optimiser's rules, logs and checkpoints of FLASH."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..configuration_flash import FlashConfig
from ..loss_flash import zero_without_labels
from .arguments import (
    warmup_length,
)
from .budget import TimeBudget
from .checkpoints import missing_from_checkpoint
from .graphs import GraphedBackward
from .packing import MaskingCollator, cut_rows
from .stream import STREAM_STATE, BlockStream, write_state
from .throughput import SpeedBar, SpeedMeter, device_name, device_peak, training_flops


logger = logging.get_logger(__name__)


@dataclass
class FlashLabelSmoother(LabelSmoother):
    """Trainer's label smoothing, but 0 for a batch without labels, and shifted for causal models whatever wraps them:
    Trainer goes by the name of the outermost class, which after torch.compile is the compiler's.

    Args:
        causal: whether a token's label is the next one's.
    """

    causal: bool = False

    def __call__(self, model_output, labels, shift_labels=False, num_items_in_batch=None) -> Tensor:
        shift = shift_labels or self.causal
        loss = super().__call__(model_output, labels, shift_labels=shift, num_items_in_batch=num_items_in_batch)
        return zero_without_labels(loss, labels[..., 1:] if shift else labels)


class FlashTrainer(Trainer):
    """Trainer with weight decay on matrices only, speed in its log, steps as CUDA graphs, exact resuming of streams,
    rows that grow, an end by the clock, a word about checkpoints that could not be saved, an evaluation that keeps the
    rows in order, and label smoothing of compiled models."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            epsilon = self.args.label_smoothing_factor
            self.label_smoother = FlashLabelSmoother(epsilon=epsilon, causal=self._loss_shifts_labels)
        devices = self.args.world_size * max(1, self.args.n_gpu)
        half = self.args.bf16 or self.args.fp16
        peak = device_peak(device_name(), half=half, peak_tflops=getattr(self.args, "peak_tflops", None))
        self.speed = SpeedMeter(None if peak is None else peak * devices)
        self._resumed_from: str | None = None
        self._batches_used = 0
        if self.pop_callback(ProgressCallback):
            self.add_callback(SpeedBar)
        if self.pop_callback(PrinterCallback):
            self.add_callback(LogPrinter)
        if isinstance(self.train_dataset, BlockStream):
            self.add_callback(StreamEpochCallback)
        self._graphed: GraphedBackward | None = None
        self._may_graph = getattr(self.args, "cuda_graph", False)
        if self._may_graph and (devices > 1 or self.args.device.type != "cuda" or self.args.fp16):
            logger.warning(
                f"cuda_graph is for one CUDA device in bf16 or float32, got {devices} of type {self.args.device.type}"
                f"{' in fp16' * self.args.fp16}: training steps are issued one by one."
            )
            self._may_graph = False
        self.budget = None
        if (minutes := getattr(self.args, "max_minutes", None)) is not None:
            self.budget = TimeBudget(minutes, self.args.warmup_steps, self.args.started)
            self.add_callback(self.budget)

    # --- data --------------------------------------------------------------------------------------------------------

    def go_on_with_stream(self, checkpoint: Path) -> None:
        """Let the stream begin where it was when `checkpoint` was saved. Train with `ignore_data_skip` then."""
        self.train_dataset.load_state_dict(json.loads((checkpoint / STREAM_STATE).read_text(encoding="utf-8")))
        self._resumed_from = str(checkpoint)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if has_length(loader) and not len(loader):
            rows = f"{len(self.train_dataset)} rows" if has_length(self.train_dataset) else "the data"
            raise ValueError(
                f"dataloader_drop_last leaves nothing of {rows}, which are less than a batch of "
                f"{self.args.train_batch_size} on each device. Leave it out, or give less per_device_train_batch_size."
            )
        return loader

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        with self._no_row_dropped():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs) -> DataLoader:
        with self._no_row_dropped():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _no_row_dropped(self) -> Iterator[None]:
        """`dataloader_drop_last` is for training: scores are those of the whole set."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, cut to the length that the sequence warm-up has reached."""
        steps = getattr(self.args, "sequence_warmup_steps", 0)
        if self.state.global_step < steps:
            length = partial(warmup_length, self.state.global_step, steps=steps, start=self.args.sequence_warmup_start)
            epoch_iterator = (
                cut_rows(batch, length(block_size=batch["input_ids"].shape[-1])) for batch in epoch_iterator
            )
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_used += len(batches)
        if self._resumed_from is not None:
            # As Trainer does after skipping batches: what fetching draws was drawn before the checkpoint, too.
            self._load_rng_state(self._resumed_from)
            self._resumed_from = None
        for batch in batches:
            if "input_ids" in batch:
                tokens, config = batch["input_ids"].numel() * self.args.world_size, self.model.config
                flops = None
                if isinstance(config, FlashConfig):
                    head = self.model.get_output_embeddings() is not None
                    context = batch["input_ids"].shape[-1]
                    flops = training_flops(config, context, causal=config.is_decoder, head=head)
                self.speed.count(tokens, flops)
        return batches, count

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Trainer's own, as a CUDA graph if the arguments ask for it and the rows are plain."""
        inputs = self._prepare_inputs(inputs)
        if not self._may_graph or inputs.keys() != {"input_ids", "labels"}:
            if self._may_graph:
                logger.warning_once(
                    f"cuda_graph is for batches of input_ids and labels alone, got {', '.join(sorted(inputs))}: steps "
                    "on padded or packed rows are issued one by one."
                )
            return super().training_step(model, inputs, num_items_in_batch)

        def compute(batch: dict[str, Tensor]) -> Tensor:
            items = batch.get("num_items_in_batch")
            rows = {name: batch[name] for name in ("input_ids", "labels")}
            return super(FlashTrainer, self).training_step(model, rows, items)

        if self._graphed is None:
            self._graphed = GraphedBackward(compute, model.parameters())
        batch = dict(inputs)
        if num_items_in_batch is not None:
            batch["num_items_in_batch"] = torch.as_tensor(num_items_in_batch, device=self.args.device)
        return self._graphed(batch, key=self.current_gradient_accumulation_steps)

    # --- log, validation, checkpoints --------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `tokens_per_second` and `mfu` (if the peak of the device is known) to a line of the training's log."""
        if "loss" in logs:
            logs.update(self.speed.read())
        if self.budget is not None:
            # Older transformers count the steps that were allowed, not those that there was time for.
            for name in ("train_samples_per_second", "train_steps_per_second"):
                logs.pop(name, None)
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        begin = time.perf_counter()
        metrics = super().evaluate(*args, **kwargs)
        self.speed.pause(time.perf_counter() - begin)
        return metrics

    def _save_checkpoint(self, model, trial) -> None:
        begin = time.perf_counter()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch makes a RuntimeError of a full disk
            streaming = isinstance(self.train_dataset, BlockStream)
            if folder.is_dir() and missing_from_checkpoint(folder, streaming=streaming) and self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint is of no use, and takes up room
            raise OSError(
                f"The checkpoint {folder} could not be saved: {type(error).__name__}: {error}. Those saved before are "
                "whole. Make room (--save_total_limit keeps only the last ones), then go on with "
                "--resume_from_checkpoint last."
            ) from error
        self.speed.pause(time.perf_counter() - begin)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Here, because it comes before older checkpoints are deleted.
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.train_dataset, BlockStream) and self.args.process_index == 0:
            used = self._batches_used * self.args.train_batch_size * self.args.world_size
            write_state(self.train_dataset.state_at(self.train_dataset.first_row + used), output_dir)

    # --- rules -------------------------------------------------------------------------------------------------------

    def _get_eval_sampler(self, eval_dataset) -> SequentialSampler | None:
        """`group_by_length` is for training; transformers shuffles the evaluation too, and a score that looks up the
        words or the text of each row would take another row's."""
        if eval_dataset is None or not has_length(eval_dataset) or self.args.world_size > 1:
            return None
        return SequentialSampler(eval_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None):
        """The one of the arguments, or the clock's."""
        if self.budget is not None and self.lr_scheduler is None:
            self.lr_scheduler = self.budget.scheduler(self.optimizer if optimizer is None else optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights of linear layers and embeddings.

        Trainer's rule goes by names and lets offset scales (`gamma`), the sinusoid's scale and ScaleNorm's gain decay;
        those are scalars and vectors that multiply, and relative biases are vectors that are added.
        """
        return [
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))
        ]


class LogPrinter(PrinterCallback):
    """Where there is no progress bar, Trainer prints its log; on stderr, since stdout is for results."""

    def on_log(self, *args, **kwargs):
        with contextlib.redirect_stdout(sys.stderr):
            super().on_log(*args, **kwargs)


class StreamEpochCallback(TrainerCallback):
    """Count the epoch of a stream, its share of `max_steps`, from the first step of the run: Trainer begins anew in a
    resumed run that skips no batches."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class MaskEpochCallback(TrainerCallback):
    """Tell the [`MaskingCollator`] the epoch, before its batches are fetched (and workers are forked)."""

    def __init__(self, collator: MaskingCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch or 0)


class LossPlotCallback(TrainerCallback):
    """Keep `loss.png`, `log_history.json` and `log_history.csv` in the output folder up to date."""

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_log(state.log_history, Path(args.output_dir))

    on_save = on_train_end = on_evaluate


def write_log(log_history: list[dict], folder: Path) -> None:
    """Write a training log as JSON, as CSV, and as a plot of training and validation loss against the step."""
    # Beside the old files, which are replaced when the new ones are whole: the disk may be full.
    new = {name: folder / f".{name}.tmp" for name in ("log_history.json", "log_history.csv", "loss.png")}
    new["log_history.json"].write_text(json.dumps(log_history, indent=1), encoding="utf-8")
    with open(new["log_history.csv"], "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=dict.fromkeys(key for entry in log_history for key in entry))
        writer.writeheader()
        writer.writerows(log_history)

    # Figure and not pyplot: no display is needed, and no figure of the caller is touched.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, marker in (("loss", "training", None), ("eval_loss", "validation", "o")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per predicted token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(new["loss.png"], dpi=120, format="png")
    for name, path in new.items():
        os.replace(path, folder / name)
