# SPDX-License-Identifier: Apache-2.0
"""Causal and masked language-model training on the Trainer of transformers: arguments, checks, metrics, loss plot.

`scripts/train_clm.py` and `scripts/train_mlm.py` are `run_training("causal")` and `run_training("masked")`.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import has_length
from transformers.utils import logging

from . import data
from .budget import MAX_STEPS, TimeBudget
from .configuration_flash import FlashConfig


logger = logging.get_logger(__name__)

Kind = Literal["causal", "masked"]


# --- arguments -------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model and tokenizer."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a model to go on from. Without it, a new one is made."}
    )
    config: str | None = field(
        default=None, metadata={"help": "JSON or YAML file with fields of FlashConfig for a new model."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Fields of FlashConfig for a new model, over those of --config, for instance: "
            "hidden_size=128,num_hidden_layers=4,relative_bias=null"
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub name of a tokenizer. Without it: the model's, or one trained on the data."},
    )
    tokenizer_vocab_size: int = field(default=8192, metadata={"help": "Size of the tokenizer, if one is trained."})


@dataclass
class DataArguments:
    """Which text, and how it is cut."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Text files: .txt, .md, .json, .jsonl, .csv (also .gz, .xz, .bz2), .parquet."}
    )
    validation_file: list[str] | None = field(
        default=None,
        metadata={"help": "The same for validation. Without it, the end of the training text is held out."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Instead of files: a data set on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Its split to train on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Its split to validate on. Without it, the end of the training split."}
    )
    validation_fraction: float = field(default=0.05, metadata={"help": "Share of the text held out for validation."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    sample_by: Literal["document", "paragraph", "line"] = field(
        default="document", metadata={"help": "What one document is in a .txt or .md file."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training text while training. Needs --max_steps and a validation set."},
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Blocks held in memory to shuffle a stream; 0 keeps its order."}
    )
    max_train_documents: int | None = field(default=None, metadata={"help": "Train on the first ones only."})
    max_eval_documents: int | None = field(default=None, metadata={"help": "Validate on the first ones only."})
    block_size: int = field(default=512, metadata={"help": "Tokens in a training example."})
    packing: Literal["concatenate", "documents"] = field(
        default="concatenate",
        metadata={
            "help": "concatenate: one stream of tokens cut into blocks. documents: the same, but position_ids restart "
            "at each document, so that nothing is seen across its borders."
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens masked (masked model only)."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self):
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError("Training text must come from either --train_file or --dataset_name: give exactly one.")
        if self.shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must be 0 or more, got {self.shuffle_buffer}.")


@dataclass
class FlashTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of FLASH (the paper's optimiser) and of an honest log."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay, on matrices only."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of AdamW."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of linear warm-up, or, below 1, their share of all steps."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to validate: no, steps or epoch."})
    eval_on_start: bool = field(default=True, metadata={"help": "Validate before the first step, to have a baseline."})
    logging_steps: float = field(default=10, metadata={"help": "Log the training loss every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinite losses out of the log. Off: a failure must be seen."}
    )
    use_cache: bool = field(
        default=True,
        metadata={"help": "Value of config.use_cache. Trainer's own default, False, would be saved with the model."},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Pin memory for faster copies to a device."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train anew in a folder that holds an earlier run; its checkpoints are deleted."},
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "End the training so many minutes after the start of the program (its imports not counted); the "
            "learning rate then rises and falls by the clock instead of by the step."
        },
    )

    def __post_init__(self):
        if self.hub_token is not None:
            raise ValueError(
                "`hub_token` must be left out: Trainer would write it into training_args.bin, which is pushed too. "
                "Log in with `hf auth login`, or set the environment variable HF_TOKEN."
            )
        self.started = time.monotonic()
        if self.max_minutes is not None and self.max_steps <= 0:
            self.max_steps = MAX_STEPS
        super().__post_init__()
        if self.max_minutes is not None and (self.world_size > 1 or self.lr_scheduler_type != "linear"):
            raise ValueError(
                "max_minutes must be left out with several processes, whose clocks differ, and with another "
                f"lr_scheduler_type than linear, got {self.world_size} processes and {self.lr_scheduler_type}. Give "
                "max_steps."
            )
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of the data is then the same whatever drew random numbers before


def parse_arguments(
    arguments: list[str] | None = None, description: str | None = None
) -> tuple[ModelArguments, DataArguments, FlashTrainingArguments]:
    """Read the command line; a single argument that ends in .json or .yaml names a file of arguments instead."""
    parser = HfArgumentParser((ModelArguments, DataArguments, FlashTrainingArguments), description=description)
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) == 1 and arguments[0].endswith((".json", ".yaml", ".yml")):
        parse = parser.parse_json_file if arguments[0].endswith(".json") else parser.parse_yaml_file
        return parse(arguments[0])
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def config_fields(model_args: ModelArguments) -> dict:
    """The fields of `--config` and, over them, of `--config_overrides`; values are JSON, else strings.

    Raises:
        ValueError, FileNotFoundError: the file is missing or holds no mapping; an override is not `name=value`.
    """
    fields = {}
    if model_args.config is not None:
        path = Path(model_args.config)
        if not path.is_file():
            raise FileNotFoundError(f"--config must be a JSON or YAML file of FlashConfig fields; {path} is no file.")
        # Not YAML for both: it reads 1e-5 as a string.
        fields = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
        if not isinstance(fields, dict):
            raise ValueError(f"--config {path} must hold a mapping of fields, got {type(fields).__name__}.")
    for item in (model_args.config_overrides or "").split(","):
        name, equals, value = item.partition("=")
        if item and not equals:
            raise ValueError(
                f"--config_overrides must read name=value,name=value, got {item!r}. Put values that hold commas "
                "into a --config file."
            )
        if item:
            try:
                fields[name.strip()] = json.loads(value)
            except json.JSONDecodeError:
                fields[name.strip()] = value.strip()
    if model_args.model is not None and fields:
        raise ValueError(
            f"--config and --config_overrides make a new model, but --model {model_args.model} brings its own "
            f"configuration: leave out {', '.join(fields)}, or --model."
        )
    return fields


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


def missing_from_checkpoint(folder: Path) -> list[str]:
    """What a folder lacks to be a checkpoint that training can go on from; cut-off files count as missing."""
    missing = [] if (folder / "trainer_state.json").is_file() else ["trainer_state.json"]
    weights = list(folder.glob("model*.safetensors"))
    if not weights:
        missing.append("model.safetensors")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            missing.append(f"{file.name} (damaged: {error})")
    for pattern in ("optimizer.pt", "scheduler.pt", "rng_state*.pth"):
        files = list(folder.glob(pattern))
        missing.extend([] if files else [pattern])
        # A zip file has its table of contents at the end, so one that was cut off is none.
        missing.extend(f"{file.name} (damaged)" for file in files if not zipfile.is_zipfile(file))
    return missing


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to go on from: a folder, or `"last"` (also `"true"`) for the last whole one of `output_dir`.

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
        missing |= {path: missing_from_checkpoint(path) for path in found}
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
        lacks = missing_from_checkpoint(folder)
        if not lacks:
            return folder
        reason = f"{folder} lacks {', '.join(lacks)}"
    raise ValueError(
        f"resume_from_checkpoint={str(resume_from_checkpoint)!r} must be a checkpoint saved by this training, but "
        f"{reason}. Whole checkpoints nearby: {', '.join(map(str, whole)) or 'none'}. Nothing has been changed."
    )


# --- metrics ---------------------------------------------------------------------------------------------------------


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


class FlashTrainer(Trainer):
    """Trainer with weight decay on matrices only, an evaluation that keeps the rows in their order, and a clock."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.budget = None
        if (minutes := getattr(self.args, "max_minutes", None)) is not None:
            self.budget = TimeBudget(minutes, self.args.warmup_steps, self.args.started)
            self.add_callback(self.budget)

    def _get_eval_sampler(self, eval_dataset) -> SequentialSampler | None:
        """`group_by_length` is for training; transformers shuffles the evaluation too, and a score that looks up the
        words or the text of each row would take another row's."""
        if eval_dataset is None or not has_length(eval_dataset) or self.args.world_size > 1:
            return None
        return SequentialSampler(eval_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
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
    (folder / "log_history.json").write_text(json.dumps(log_history, indent=1))
    with open(folder / "log_history.csv", "w", newline="") as file:
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
    figure.savefig(folder / "loss.png", dpi=120)


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
        model = auto.from_pretrained(model_args.model)
    else:
        model = auto.from_config(new_config(kind, fields, tokenizer))
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"The model's vocab_size must be at least the tokenizer's {len(tokenizer)} tokens, got "
            f"{model.config.vocab_size}. Leave vocab_size out, or take the tokenizer that belongs to the model."
        )
    return model


def new_config(kind: Kind, fields: dict, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """`FlashConfig` from fields, with the tokenizer's size and special tokens where the fields leave them open."""
    defaults = {"is_decoder": kind == "causal"}
    if tokenizer is not None:
        defaults |= {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": data.document_start(tokenizer),
            "eos_token_id": data.document_end(tokenizer),
        }
    return FlashConfig(**{**defaults, **fields})


def load_or_train_tokenizer(
    kind: Kind, model_args: ModelArguments, train: Dataset | IterableDataset, resume: Path | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, else `--tokenizer`, else the one of `--model`, else a new one."""
    source = resume or model_args.tokenizer or model_args.model
    if source is not None:
        return data.load_tokenizer(str(source), masked=kind == "masked")
    logger.info(f"Training a tokenizer with {model_args.tokenizer_vocab_size} tokens.")
    return data.train_tokenizer(train, model_args.tokenizer_vocab_size)


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
        tokenized = [tokenize(train), tokenize(validation)]
        pack = partial(
            data.pack_documents,
            tokenizer=tokenizer,
            block_size=data_args.block_size,
            causal=causal,
            packing=data_args.packing,
        )
        train_blocks, eval_blocks = pack(tokenized[0], endless=True), pack(tokenized[1])
        size = data.text_size(tokenized[1])
        logger.info(f"Validation text: {size}, in {len(eval_blocks)} blocks of {data_args.block_size} tokens.")
        if size["n_unknown"]:
            logger.warning(
                f"{size['n_unknown']} tokens of the validation text are unknown to the tokenizer; guessing them is "
                "too easy, so perplexities come out too low."
            )
        if isinstance(train_blocks, IterableDataset) and data_args.shuffle_buffer:
            train_blocks = train_blocks.shuffle(seed=args.data_seed, buffer_size=data_args.shuffle_buffer)
        collator, callbacks = data.collate, [LossPlotCallback()]
        if not causal:
            collator = data.MaskingCollator(tokenizer, mlm_probability=data_args.mlm_probability, seed=args.data_seed)
            callbacks.append(MaskEpochCallback(collator))
            eval_blocks = collator.mask_once(eval_blocks)
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
    resume = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=resume)
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError(
            f"max_steps must be at least 1 with --streaming, got {args.max_steps}: a stream has no length."
        )
    fields = config_fields(model_args)
    if model_args.model is None:
        new_config(kind, fields)  # for its errors: they should not wait for the data
    import matplotlib  # noqa: F401  the same: it would be missed only at the first validation

    set_seed(args.seed)
    train, validation = load_text(data_args)
    tokenizer = load_or_train_tokenizer(kind, model_args, train, resume)
    model = load_model(kind, model_args, tokenizer, resume)
    trainer = build_trainer(kind, model, tokenizer, train, validation, data_args, args)

    if args.overwrite_output_dir and resume is None and args.should_save:
        # Nothing of the old run may be taken for one of the new by --resume_from_checkpoint last.
        for old in Path(args.output_dir).glob("checkpoint-*"):
            if (old / "trainer_state.json").is_file():
                logger.warning(f"Deleting {old} of an earlier run.")
                shutil.rmtree(old)
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - begin
    after = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("eval", after)
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
    "DataArguments", "FlashTrainer", "FlashTrainingArguments", "LossPlotCallback", "ModelArguments", "build_trainer",
    "check_output_dir", "describe", "find_checkpoint", "make_compute_metrics", "parse_arguments", "run_training",
    "token_scores", "write_log",
]  # fmt: skip
