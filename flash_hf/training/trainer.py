# SPDX-License-Identifier: Apache-2.0
"""The Trainer of transformers for FLASH, and its callbacks."""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LabelSmoother, LengthGroupedSampler
from transformers.utils import logging

from ..configuration_flash import FlashConfig
from ..loss_flash import zero_without_labels
from ..modeling_flash import without_first_tokens
from .arguments import warmup_length
from .budget import TimeBudget
from .checkpoints import is_complete
from .graphs import GraphedBackward
from .packing import MaskingCollator, cut_rows
from .stream import STREAM_STATE, BlockStream
from .throughput import SpeedBar, SpeedMeter, device_peak, training_flops


logger = logging.get_logger(__name__)


@dataclass
class FlashLabelSmoother(LabelSmoother):
    """Trainer's label smoothing, but 0 for a batch without labels, and shifted for causal models even if compiled:
    Trainer decides by the name of the outermost class, which is then torch.compile's."""

    causal: bool = False

    def __call__(self, model_output, labels, shift_labels=False, num_items_in_batch=None) -> Tensor:
        shift = shift_labels or self.causal
        loss = super().__call__(model_output, labels, shift_labels=shift, num_items_in_batch=num_items_in_batch)
        return zero_without_labels(loss, labels[..., 1:] if shift else labels)


class EpochLengthSampler(LengthGroupedSampler):
    """Rows grouped by length, in an order that depends on (seed, epoch) alone. Trainer takes it from torch's global
    random numbers, whose state at the beginning of the epoch a resumed run does not have."""

    def __init__(self, *args, seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class FlashTrainer(Trainer):
    """Trainer with weight decay on matrices only, speed in its log, CUDA graphs, exact resuming of streams, sequence
    warm-up, context parallelism, a wall-clock stop, a clear error when a checkpoint cannot be written, and in-order
    evaluation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:
            epsilon = self.args.label_smoothing_factor
            self.label_smoother = FlashLabelSmoother(epsilon=epsilon, causal=self._loss_shifts_labels)
        self._mesh = self._context_mesh()
        devices = self.args.world_size * max(1, self.args.n_gpu)
        half = self.args.bf16 or self.args.fp16
        peak = device_peak(half=half, peak_tflops=getattr(self.args, "peak_tflops", None))
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
                f"cuda_graph needs one CUDA device and bf16 or float32, got {devices} {self.args.device.type}"
                f"{' in fp16' * self.args.fp16}: training steps run without a graph."
            )
            self._may_graph = False
        self.budget = None
        if (minutes := getattr(self.args, "max_minutes", None)) is not None:
            self.budget = TimeBudget(minutes, self.args.warmup_steps, self.args.started)
            self.add_callback(self.budget)

    def _context_mesh(self):
        """The processes that share the rows of this one, to which the model is bound; None for whole rows."""
        args = self.args
        size, own = getattr(args, "context_parallel_size", 1), getattr(self.accelerator, "parallelism_config", None)
        if own is not None and own.cp_enabled:
            raise ValueError(
                f"ParallelismConfig(cp_size={own.cp_size}) splits softmax attention, not FLASH. Leave it out, "
                f"and use context_parallel_size={own.cp_size} (--context_parallel_size), FLASH's own."
            )
        if size == 1:
            return None
        if args.world_size % size or self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                f"context_parallel_size={size} needs a multiple of {size} processes (got {args.world_size}) and the "
                "model's own loss: neither label_smoothing_factor nor compute_loss_func."
            )
        from torch.distributed.device_mesh import init_device_mesh

        from ..parallel import context_parallel

        shape = args.world_size // size, size
        mesh = init_device_mesh(args.device.type, shape, mesh_dim_names=("dp", "cp"))["cp"]
        context_parallel(self.model, mesh)
        return mesh

    def _with_predicted_labels(self, batch):
        """A batch of a causal FLASH model without the labels of documents' first tokens. The model leaves them out
        itself, but Trainer counts labels, and smooths them, without it. Labels of another form are the user's."""
        causal = isinstance(getattr(self.model, "config", None), FlashConfig) and self._loss_shifts_labels
        if not causal or not isinstance(batch, Mapping) or "shift_labels" in batch:
            return batch
        labels, ids = batch.get("labels"), batch.get("input_ids", batch.get("inputs_embeds"))
        if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape[:2]:
            return batch
        return {**batch, "labels": without_first_tokens(labels, batch)}

    def _get_num_items_in_batch(self, batch_samples: list, *args, **kwargs) -> Tensor | int | None:
        """Trainer's own count of labels, in training and in evaluation, of those that are predicted."""
        return super()._get_num_items_in_batch(list(map(self._with_predicted_labels, batch_samples)), *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Trainer's own. The processes that share rows return the same loss, which Trainer would count for each."""
        if self.label_smoother is not None or self.compute_loss_func is not None:  # else the model sees the labels
            inputs = self._with_predicted_labels(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss / self._mesh.size() if self._mesh is not None and model.training else loss

    def _shared_steps(self, model, inputs, num_items_in_batch) -> Tensor:
        """A step for the batch of each process that shares rows, in turn: so the data are distributed as they are
        without context parallelism, and the losses are the same."""
        import torch.distributed as dist

        from ..parallel import shard_sequence

        batches = [None] * self._mesh.size()
        own = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        dist.all_gather_object(batches, own, group=self._mesh.get_group())
        losses = []
        for batch in batches:
            piece = shard_sequence(batch, self._mesh, self.model)
            losses.append(super().training_step(model, piece, num_items_in_batch))
        return torch.stack(losses).sum()

    def evaluation_loop(self, *args, **kwargs):
        """Trainer's own, on whole rows, which fit one device where no gradients are computed."""
        if self._mesh is None:
            return super().evaluation_loop(*args, **kwargs)
        from ..parallel import context_parallel

        context_parallel(self.model, None)
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            context_parallel(self.model, self._mesh)

    def resume_stream(self, checkpoint: Path) -> None:
        """Continue the stream where it was when `checkpoint` was saved, instead of skipping batches."""
        self.args.ignore_data_skip = True
        self.train_dataset.load_state_dict(json.loads((checkpoint / STREAM_STATE).read_text(encoding="utf-8")))
        self._resumed_from = str(checkpoint)

    def _get_train_sampler(self, *args, **kwargs) -> Sampler | None:
        """Trainer's own, but a resumed run groups rows by length as the unbroken one does."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if type(sampler) is LengthGroupedSampler:
            return EpochLengthSampler(sampler.batch_size, lengths=sampler.lengths, seed=self._data_seed)
        return sampler

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_dataloader(self, *args, is_training: bool = False, **kwargs) -> DataLoader:
        """Evaluation sees the whole set in order: transformers applies `dataloader_drop_last` and `group_by_length` to
        it too, and metrics that look up the text of a row would get another row's."""
        drop = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop and is_training
        if not is_training and self.args.world_size == 1:
            kwargs["sampler_fn"] = SequentialSampler
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop
        if self.args.dataloader_persistent_workers:
            # Their seed would be one of torch's global random numbers, taken when they start: in a resumed run in
            # another epoch, so that dropout would see other numbers from then on.
            plain = getattr(loader, "base_dataloader", loader)  # behind the adapter of accelerate
            plain.generator = torch.Generator().manual_seed(self._data_seed)
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, with rows cut to the current length of the sequence warm-up, and the number of
        labels that the model predicts."""
        steps = getattr(self.args, "sequence_warmup_steps", 0)
        if self.state.global_step < steps:
            length = partial(warmup_length, self.state.global_step, steps=steps, start=self.args.sequence_warmup_start)
            epoch_iterator = (
                cut_rows(batch, length(block_size=batch["input_ids"].shape[-1])) for batch in epoch_iterator
            )
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_used += len(batches)
        if self._resumed_from is not None:
            # As Trainer does after skipping batches: fetching them has used random numbers.
            self._load_rng_state(self._resumed_from)
            self._resumed_from = None
        config, flops = self.model.config, None
        for ids in [batch["input_ids"] for batch in batches if "input_ids" in batch]:
            if isinstance(config, FlashConfig):
                head = self.model.get_output_embeddings() is not None
                flops = training_flops(config, ids.shape[-1], causal=config.is_decoder, head=head)
            self.speed.count(ids.numel() * self.args.world_size, flops)
        return batches, count

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Trainer's own step, replayed as a CUDA graph with `cuda_graph` and plain rows."""
        inputs = self._prepare_inputs(inputs)
        if self._mesh is not None:
            return self._shared_steps(model, inputs, num_items_in_batch)
        if not self._may_graph or inputs.keys() != {"input_ids", "labels"}:
            if self._may_graph:
                logger.warning_once(
                    f"cuda_graph needs batches of input_ids and labels alone, got {', '.join(sorted(inputs))}: steps "
                    "on padded or packed rows run without a graph."
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `tokens_per_second` and `mfu` (if the device's peak is known) to the training log."""
        if "loss" in logs:
            logs.update(self.speed.read())
        if self.budget is not None:
            # Older transformers divide max_steps, not the steps done, by the time.
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
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch on a full disk
            streaming = isinstance(self.train_dataset, BlockStream)
            if self.args.should_save and not is_complete(folder, streaming=streaming):
                shutil.rmtree(folder, ignore_errors=True)  # an incomplete checkpoint only takes up space
            raise OSError(
                f"The checkpoint {folder} could not be saved: {type(error).__name__}: {error}. Earlier ones are "
                "complete. Free some space (--save_total_limit keeps only the last ones), then resume with "
                "--resume_from_checkpoint last."
            ) from error
        self.speed.pause(time.perf_counter() - begin)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Here, since older checkpoints are deleted right after it.
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.train_dataset, BlockStream) and self.args.process_index == 0:
            used = self._batches_used * self.args.train_batch_size * self.args.world_size
            state = self.train_dataset.state_at(self.train_dataset.first_row + used)
            Path(output_dir, STREAM_STATE).write_text(json.dumps(state), encoding="utf-8")

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None):
        """The schedule of the arguments, or by the clock with `max_minutes`."""
        if self.budget is not None and self.lr_scheduler is None:
            self.lr_scheduler = self.budget.scheduler(self.optimizer if optimizer is None else optimizer)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights of linear layers and embeddings. Trainer's rule, by names, would also decay offset scales, the
        sinusoid's scale, ScaleNorm's gain and relative biases, which are scalars and vectors."""
        modules = dict(model.named_modules())
        return [f"{name}.weight" for name in modules if isinstance(modules[name], (nn.Linear, nn.Embedding))]


class LogPrinter(PrinterCallback):
    """Print the log to stderr if there is no progress bar: stdout is for results."""

    def on_log(self, *args, **kwargs):
        with contextlib.redirect_stdout(sys.stderr):
            super().on_log(*args, **kwargs)


class StreamEpochCallback(TrainerCallback):
    """Set the epoch of a stream to the fraction of `max_steps` done. Trainer would restart it in a resumed run."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class MaskEpochCallback(TrainerCallback):
    """Set the epoch of a [`MaskingCollator`] before batches are fetched (and workers are forked)."""

    def __init__(self, collator: MaskingCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int(state.epoch or 0)


class LossPlotCallback(TrainerCallback):
    """Keep `loss.png` and `log_history.json` in the output folder up to date."""

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_log(state.log_history, Path(args.output_dir))

    on_save = on_train_end = on_evaluate


def write_log(log_history: list[dict], folder: Path) -> None:
    """Write a training log as JSON, and a plot of training and validation loss."""
    # Replace the old files only by complete new ones: the disk may be full.
    new = {name: folder / f".{name}.tmp" for name in ("log_history.json", "loss.png")}
    new["log_history.json"].write_text(json.dumps(log_history, indent=1), encoding="utf-8")

    from matplotlib.figure import Figure  # not pyplot, which needs a display and has global state

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
