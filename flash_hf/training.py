# SPDX-License-Identifier: Apache-2.0
"""Causal and masked language-model training on the Trainer of transformers: checks, metrics, checkpoints, loss plot.

`scripts/train_clm.py` and `scripts/train_mlm.py` are `run_training("causal")` and `run_training("masked")`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    EvalPrediction,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import has_length
from transformers.utils import logging

from . import data
from .arguments import (
    DataArguments,
    FlashTrainingArguments,
    ModelArguments,
    TrainingParser,
    check_arguments,
    config_fields,
    parse_arguments,
    parse_with_config,
    set_batch,
    warmup_length,
)
from .budget import TimeBudget
from .command_line import load_named
from .configuration_flash import FlashConfig
from .graphs import GraphedBackward
from .hub import pad_on_the_left, vocabulary_size
from .loss_flash import zero_without_labels
from .streaming import STREAM_STATE, BlockStream, write_state
from .throughput import SpeedBar, SpeedMeter, device_name, device_peak, training_flops


logger = logging.get_logger(__name__)

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 40}  # for generate(), in a new causal model's checkpoint

Kind = Literal["causal", "masked"]


# --- checks before any work ------------------------------------------------------------------------------------------


def check_output_dir(output_dir: str | Path, *, overwrite: bool = False, resume: Path | None = None) -> None:
    """See that results can be saved, and that no earlier ones are in the way.

    Raises:
        FileExistsError: the folder holds an earlier run that is neither resumed nor to be overwritten.
        OSError: it cannot be made or written to.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Trying is the only sure test: permission bits say nothing to root, on read-only mounts, or on full disks.
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"flash")
            file.flush()
    except OSError as error:
        raise type(error)(
            f"output_dir {output_dir} must be a folder that can be written to, but: {error}. Choose another one."
        ) from error
    resumed_here = resume is not None and resume.resolve().is_relative_to(output_dir.resolve())
    if not overwrite and not resumed_here and any(output_dir.iterdir()):
        raise FileExistsError(
            f"output_dir {output_dir} must be empty, or an earlier run there would be damaged. Choose another, go on "
            "with --resume_from_checkpoint last, or start anew with --overwrite_output_dir."
        )


def missing_from_checkpoint(folder: Path, *, streaming: bool = False) -> list[str]:
    """What a folder lacks to be a checkpoint that training can go on from; cut-off files count as missing.

    Args:
        streaming: whether it has to know its place in a stream, too.
    """
    missing = []
    for name in ("trainer_state.json", *([STREAM_STATE] if streaming else [])):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            missing.append(name)
        except ValueError as error:
            missing.append(f"{name} (damaged: {error})")
    weights = list(folder.glob("model*.safetensors"))
    if not weights and not (folder / "pytorch_model_fsdp_0").is_dir():  # FSDP with a file for each device
        missing.append("model.safetensors")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            missing.append(f"{file.name} (damaged: {error})")
    # The optimizer's other names are those of FSDP, in one file or one a device, and of DeepSpeed.
    optimizer = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
    for patterns in (optimizer, ("scheduler.pt",), ("rng_state*.pth",)):
        files = [file for pattern in patterns for file in folder.glob(pattern)]
        missing.extend([] if files else patterns[:1])
        # A zip file has its table of contents at the end, so one that was cut off is none.
        missing.extend(f"{file.name} (damaged)" for file in files if file.is_file() and not zipfile.is_zipfile(file))
    return missing


def find_checkpoint(
    resume_from_checkpoint: str | None, output_dir: str | Path, *, streaming: bool = False
) -> Path | None:
    """The checkpoint to go on from: a folder, or `"last"` (also `"true"`) for the last whole one of `output_dir`.

    Args:
        streaming: whether the training text is a stream.

    Raises:
        ValueError: it is no checkpoint, or not a whole one; the message says what it lacks and which ones there are.
    """
    if resume_from_checkpoint is None:
        return None
    wants_last = str(resume_from_checkpoint).lower() in ("last", "true")
    folder = Path(output_dir if wants_last else resume_from_checkpoint)
    missing = {}
    for place in (folder, folder.parent, Path(output_dir)):
        found = [path for path in place.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
        found.sort(key=lambda path: int(path.name[11:]))
        missing |= {path: missing_from_checkpoint(path, streaming=streaming) for path in found}
    whole = [path for path, lacks in missing.items() if not lacks]
    if wants_last:
        here = [path for path in missing if path.parent == folder]
        for path in reversed(here):
            if path in whole:
                return path
            logger.warning(f"Skipping the incomplete checkpoint {path}: it lacks {', '.join(missing[path])}.")
        reason = f"no whole checkpoint in {folder}"
    elif not folder.is_dir():
        reason = f"{folder} is not a folder"
    else:
        lacks = missing_from_checkpoint(folder, streaming=streaming)
        if not lacks:
            return folder
        reason = f"{folder} lacks {', '.join(lacks)}"
    raise ValueError(
        f"resume_from_checkpoint={str(resume_from_checkpoint)!r} must be a checkpoint saved by this training, but "
        f"{reason}. Whole checkpoints nearby: {', '.join(map(str, whole)) or 'none'}. Nothing has been changed."
    )


# --- metrics ---------------------------------------------------------------------------------------------------------

METRICS = {
    "causal": ("loss", "perplexity", "word_perplexity", "bits_per_byte", "accuracy", "tokens"),
    "masked": ("loss", "perplexity", "masked_accuracy", "tokens"),
}


def token_scores(logits: Tensor | tuple[Tensor, ...], labels: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Reduce logits to what the metrics need, so that evaluation never holds a vocabulary-wide tensor for all tokens.

    Args:
        logits: `[B, N, V]`, maybe first of a tuple.
        labels: `[B, N]`, -100 where not counted.

    Returns:
        Negative log-likelihood in nats, float32, and whether the likeliest token is right, bool: both `[B, N]`, at the
        place of the label, and 0 where nothing is counted.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if causal:  # the logits of a token predict the next one; the first label has none
        logits, targets = logits[:, :-1], labels[:, 1:]
    else:
        targets = labels
    scores = logits.float().transpose(1, 2)
    nll = nn.functional.cross_entropy(scores, targets, reduction="none", ignore_index=data.IGNORE)
    right = logits.argmax(-1) == targets
    if causal:
        nll, right = (nn.functional.pad(score, (1, 0)) for score in (nll, right))
    return nll, right


def make_compute_metrics(kind: Kind, size: dict[str, int]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Metrics from the scores of [`token_scores`].

    All are exact for the whole set. Trainer's own loss is the mean of the batches' means, which is something else
    when batches count different numbers of tokens; `loss` here takes its place. Perplexity per word and bits per byte
    spread the nats of all predicted tokens (ends of documents included) over the words and bytes of the text, so that
    they can be compared between tokenizers.

    Args:
        size: from [`data.text_size`], of the text that is evaluated.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        nll, right = prediction.predictions
        counted = prediction.label_ids != data.IGNORE
        if kind == "causal":
            counted[:, 0] = False
        count, nats = counted.sum(), nll[counted].sum(dtype=np.float64)
        with np.errstate(all="ignore"):  # too large a loss, or nothing to count, gives inf or nan: that is the answer
            metrics = {"loss": nats / count, "perplexity": np.exp(nats / count), "tokens": int(count)}
            if kind == "causal":
                metrics["word_perplexity"] = np.exp(nats / size["n_words"])
                metrics["bits_per_byte"] = nats / np.log(2) / size["n_bytes"]
            metrics["accuracy" if kind == "causal" else "masked_accuracy"] = right[counted].sum() / count
        return metrics

    return compute_metrics


# --- Trainer ---------------------------------------------------------------------------------------------------------


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
                data.cut_rows(batch, length(block_size=batch["input_ids"].shape[-1])) for batch in epoch_iterator
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
            write_state(self.train_dataset.state_dict(self.train_dataset.first_row + used), output_dir)

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
    """Tell the [`data.MaskingCollator`] the epoch, before its batches are fetched (and workers are forked)."""

    def __init__(self, collator: data.MaskingCollator):
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


# --- the run ---------------------------------------------------------------------------------------------------------


def load_text(data_args: DataArguments) -> tuple[Dataset | IterableDataset, Dataset]:
    """Training and validation documents; the validation set is always read at once, to be the same each time."""
    load = partial(
        data.load_documents,
        dataset_name=data_args.dataset_name,
        dataset_config_name=data_args.dataset_config_name,
        text_column=data_args.text_column,
        sample_by=data_args.sample_by,
    )
    own_validation = data_args.validation_file is not None or data_args.validation_split is not None
    if data_args.streaming and not own_validation:
        raise ValueError(
            "A stream has no end that could be held out for validation: with --streaming give --validation_file, or "
            "--validation_split with a data set."
        )
    train = load(
        data_args.train_file,
        split=data_args.train_split,
        streaming=data_args.streaming,
        max_documents=data_args.max_train_documents,
    )
    if not own_validation:
        train, validation = data.split_documents(train, data_args.validation_fraction)
        if data_args.max_eval_documents is not None:
            validation = validation.take(data_args.max_eval_documents)
        return train, validation
    if data_args.validation_file is not None:
        load = partial(load, data_args.validation_file, dataset_name=None)
    # With a stream, only the part that is wanted is downloaded.
    lazily = data_args.streaming and data_args.max_eval_documents is not None
    split = data_args.validation_split or "train"
    validation = load(split=split, max_documents=data_args.max_eval_documents, streaming=lazily)
    return train, Dataset.from_list(list(validation)) if lazily else validation


def check_sources(model_args: ModelArguments) -> None:
    """See that there are the model and the tokenizer to go on from, before the data are read.

    Raises:
        OSError: one of them is neither a folder nor to be had from the Hub.
    """
    for option, auto in (("model", AutoConfig), ("tokenizer", AutoTokenizer)):
        if (name := getattr(model_args, option)) is not None:
            load_named(auto.from_pretrained, name, option=f"--{option}")


def load_model(
    kind: Kind, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, resume: Path | None
) -> PreTrainedModel:
    """A new model, the one of `--model`, or one for the weights of a checkpoint that Trainer is going to load.

    Raises:
        ValueError: a misspelt or wrong field; a vocabulary smaller than the tokenizer's; fields that contradict the
            checkpoint.
    """
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    fields = config_fields(model_args)
    if resume is not None:
        config = AutoConfig.from_pretrained(resume)
        for name, value in fields.items():
            if getattr(config, name, None) != value:
                raise ValueError(
                    f"The checkpoint {resume} has {name}={getattr(config, name, None)!r}, the arguments ask for "
                    f"{value!r}. Resume with the arguments the run began with."
                )
        model = auto.from_config(config)
    elif model_args.model is not None:
        model = load_named(auto.from_pretrained, model_args.model, option="--model")
    else:
        model = auto.from_config(new_config(kind, fields, tokenizer))
        if kind == "causal":
            # Greedy text of a small model soon repeats itself.
            model.generation_config = GenerationConfig.from_model_config(model.config)
            model.generation_config.update(**SAMPLING)
    if kind == "causal" and resume is not None and (resume / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(resume)
    needed = vocabulary_size(tokenizer)
    if model.config.vocab_size < needed:
        raise ValueError(
            f"The model's vocab_size must be at least {needed}, the tokenizer's highest id + 1, got "
            f"{model.config.vocab_size}. Leave vocab_size out, or take the tokenizer that belongs to the model."
        )
    return model


def new_config(kind: Kind, fields: dict, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """`FlashConfig` from fields, with the tokenizer's size and special tokens where the fields leave them open."""
    defaults = {"is_decoder": kind == "causal"}
    if tokenizer is not None:
        defaults |= {
            "vocab_size": vocabulary_size(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": data.document_start(tokenizer),
            "eos_token_id": data.document_end(tokenizer),
        }
    return FlashConfig(**{**defaults, **fields})


def load_or_train_tokenizer(
    kind: Kind,
    model_args: ModelArguments,
    train: Dataset | IterableDataset,
    resume: Path | None,
    *,
    first: bool = True,
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, else `--tokenizer`, else the one of `--model`, else a new one; a causal model's
    pads on the left from now on.

    Args:
        first: whether this is the first of the run's processes; it trains the tokenizer for all of them.
    """
    source = resume or model_args.tokenizer or model_args.model
    if source is not None:
        tokenizer = data.load_tokenizer(str(source), masked=kind == "masked")
        if kind == "causal":
            pad_on_the_left(tokenizer)
        return tokenizer
    if "input_ids" in (train.column_names or ()):
        raise ValueError("Tokenised documents must come with the --tokenizer that they were made with.")
    logger.info(f"Training a tokenizer with {model_args.tokenizer_vocab_size} tokens.")
    tokenizer = [None]
    if first:
        tokenizer = [data.train_tokenizer(train, model_args.tokenizer_vocab_size, causal=kind == "causal")]
    broadcast_object_list(tokenizer)
    return tokenizer[0]


def build_trainer(
    kind: Kind,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset | IterableDataset,
    validation: Dataset,
    data_args: DataArguments,
    args: FlashTrainingArguments,
) -> FlashTrainer:
    """Tokenise and pack the documents `train` and `validation`, and put everything together."""
    causal = kind == "causal"
    with args.main_process_first(desc="tokenising and packing"):
        tokenize = partial(data.tokenize_documents, tokenizer=tokenizer, num_proc=data_args.num_proc)
        options = {
            "tokenizer": tokenizer,
            "block_size": data_args.block_size,
            "causal": causal,
            "packing": data_args.packing,
        }
        if isinstance(train, IterableDataset):
            train_blocks = BlockStream(
                train,
                **options,
                shuffle_buffer=data_args.shuffle_buffer,
                seed=args.data_seed,
                patience=data_args.stream_patience,
                source=data_args.dataset_name or ", ".join(data_args.train_file),
            )
        else:
            train_blocks = data.pack_documents(tokenize(train), **options)
        tokenized = tokenize(validation)
        eval_blocks = data.pack_documents(tokenized, **options)
        size = data.text_size(tokenized)
        logger.info(f"Validation text: {size}, in {len(eval_blocks)} blocks of {data_args.block_size} tokens.")
        if size["n_unknown"]:
            logger.warning(
                f"{size['n_unknown']} tokens of the validation text are unknown to the tokenizer; guessing them is "
                "too easy, so perplexities come out too low."
            )
        collator, callbacks = data.collate, [LossPlotCallback()]
        if not causal:
            collator = data.MaskingCollator(tokenizer, mlm_probability=data_args.mlm_probability, seed=args.data_seed)
            callbacks.append(MaskEpochCallback(collator))
            eval_blocks = collator.mask_once(eval_blocks)
    # A training step needs the loss alone; logits would be its largest tensors.
    model.skip_logits = True
    return FlashTrainer(
        model=model,
        args=args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(kind, size),
        preprocess_logits_for_metrics=partial(token_scores, causal=causal),
        callbacks=callbacks,
    )


def run_training(
    kind: Kind, model_args: ModelArguments, data_args: DataArguments, args: FlashTrainingArguments
) -> dict:
    """Check, train, validate before and after, save. Everything goes to `args.output_dir`.

    The folder then holds the model and the tokenizer (for `from_pretrained`), `checkpoint-*`, `loss.png`,
    `log_history.json`, `log_history.csv`, `trainer_state.json` and `eval_results.json`.

    Returns:
        `before` and `after` (the metrics of the validation text; `before` is None if `eval_on_start` is off),
        `train_seconds`, `output_dir`, `plot`.
    """
    check_arguments(args, METRICS[kind])
    resume = find_checkpoint(args.resume_from_checkpoint, args.output_dir, streaming=data_args.streaming)
    if args.process_index == 0:  # another process may look when this one has begun to write
        check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=resume)
    set_batch(args, data_args.block_size)
    if args.sequence_warmup_steps:
        warmup_length(0, steps=1, start=args.sequence_warmup_start, block_size=data_args.block_size)
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError(
            f"max_steps must be at least 1 with --streaming, got {args.max_steps}: a stream has no length."
        )
    if data_args.streaming and args.dataloader_num_workers:
        raise ValueError(
            f"dataloader_num_workers must be 0 with --streaming, got {args.dataloader_num_workers}: a stream is read "
            "by a thread of its own, which tokenises on all cores."
        )
    if data_args.streaming and args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size must be left out with --streaming: a stream does not begin again with smaller "
            "batches. Give --per_device_train_batch_size."
        )
    fields = config_fields(model_args)
    check_sources(model_args)
    if model_args.model is None:
        new_config(kind, fields)  # for its errors: they should not wait for the data
    import matplotlib  # noqa: F401  the same: it would be missed only at the first validation

    set_seed(args.seed)
    train, validation = load_text(data_args)
    tokenizer = load_or_train_tokenizer(kind, model_args, train, resume, first=args.process_index == 0)
    model = load_model(kind, model_args, tokenizer, resume)
    trainer = build_trainer(kind, model, tokenizer, train, validation, data_args, args)

    if args.overwrite_output_dir and resume is None and args.should_save:
        # Nothing of the old run may be taken for one of the new by --resume_from_checkpoint last.
        for old in Path(args.output_dir).glob("checkpoint-*"):
            if (old / "trainer_state.json").is_file():
                logger.warning(f"Deleting {old} of an earlier run.")
                shutil.rmtree(old)
    if resume is not None and isinstance(trainer.train_dataset, BlockStream):
        trainer.go_on_with_stream(resume)
        args.ignore_data_skip = True
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - begin
    trainer.save_model()  # first: the evaluation leaves the model in the type of bf16_full_eval or fp16_full_eval
    after = trainer.evaluate()
    trainer.save_state()
    trainer.save_metrics("eval", after)
    if args.push_to_hub:
        trainer.push_to_hub()  # once more, with the last scores and the loss plot
    before = next((log for log in trainer.state.log_history if "eval_loss" in log and log["step"] == 0), None)
    return {
        "before": before,
        "after": after,
        "train_seconds": seconds,
        "output_dir": args.output_dir,
        "plot": str(Path(args.output_dir) / "loss.png"),
    }


def describe(kind: Kind, result: dict) -> str:
    """The result of [`run_training`] as a table to print."""
    own = ("word_perplexity", "bits_per_byte", "accuracy") if kind == "causal" else ("masked_accuracy",)
    lines = [f"{'validation':<18}{'before':>16}{'after':>16}"]
    for name in ("loss", "perplexity", *own):
        values = [result[when] and result[when][f"eval_{name}"] for when in ("before", "after")]
        shown = ["-" if value is None else f"{value:,.{4 if value < 100 else 0}f}" for value in values]
        lines.append(f"{name:<18}" + "".join(f"{value:>16}" for value in shown))
    lines.append(f"trained in {result['train_seconds']:.1f} s")
    lines.append(f"checkpoint  {result['output_dir']}")
    lines.append(f"loss plot   {result['plot']}")
    return "\n".join(lines)


__all__ = [
    "DataArguments", "FlashTrainer", "FlashTrainingArguments", "LossPlotCallback", "METRICS", "ModelArguments",
    "TrainingParser", "build_trainer", "check_arguments", "check_output_dir", "check_sources", "describe",
    "find_checkpoint", "make_compute_metrics", "parse_arguments", "parse_with_config", "run_training", "set_batch",
    "token_scores", "warmup_length", "write_log",
]  # fmt: skip
