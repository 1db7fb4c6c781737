# SPDX-License-Identifier: Apache-2.0
"""Options of the trainings, and checks of them before any work is done."""

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg

from ..configuration_flash import PLUS, FlashConfig, nearest
from .budget import MAX_STEPS


@dataclass
class ModelArguments:
    """Model and tokenizer."""

    _argument_group_name = "model and tokenizer"

    model: str | None = HfArg(default=None, help="Folder or Hub name of a model to continue training.")
    config: str | None = HfArg(
        default=None,
        help="YAML or JSON file of these options, for instance a recipe of scripts/recipes. Options on the command "
        "line take precedence.",
    )
    preset: Literal["flash", "plus"] = HfArg(
        default="flash",
        help="Form of a new model, of 110 M parameters by default: flash, the paper's, or plus, FLASH+, for causal "
        "models. Fields given by --model_config and --config_overrides take precedence.",
    )
    model_config: str | None = HfArg(default=None, help="FlashConfig of a new model: JSON, or a mapping in --config.")
    config_overrides: str | None = HfArg(
        default=None,
        help="Fields of FlashConfig that override those of --model_config; for a model of 5 M parameters: "
        "hidden_size=256,num_hidden_layers=8,query_key_dim=64",
    )
    tokenizer: str | None = HfArg(default=None, help="Folder or Hub name; by default the model's or a new one.")
    tokenizer_vocab_size: int = HfArg(default=8192, help="Vocabulary size of a new tokenizer, in tokens.")


@dataclass
class DataArguments:
    """Text, and how it is cut into examples."""

    _argument_group_name = "text"

    train_file: list[str] | None = HfArg(
        default=None, help="Text files: .txt, .md, .json, .jsonl, .csv (also as .gz, .xz, .bz2) or .parquet."
    )
    validation_file: list[str] | None = HfArg(
        default=None, help="Text files for validation; by default the end of the training text is held out."
    )
    dataset_name: str | None = HfArg(default=None, help="Data set on the Hub, or a folder, instead of files.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of the data set.")
    train_split: str = HfArg(default="train", help="Split to train on.")
    validation_split: str | None = HfArg(default=None, help="Split to validate on; by default held out as above.")
    validation_fraction: float = HfArg(default=0.05, help="Fraction of the text held out for validation.")
    text_column: str = HfArg(default="text", help="Column that holds the text.")
    sample_by: Literal["document", "paragraph", "line"] = HfArg(
        default="document", help="What a document is in .txt and .md files: the whole file, a paragraph, or a line."
    )
    streaming: bool = HfArg(default=False, help="Read text while training; needs --max_steps and a validation set.")
    shuffle_buffer: int = HfArg(default=1000, help="Blocks of a stream shuffled at a time; 0 keeps its order.")
    max_train_documents: int | None = HfArg(default=None, help="Number of documents to train on, from the first.")
    max_eval_documents: int | None = HfArg(default=None, help="Number of documents to validate on.")
    block_size: int = HfArg(default=512, help="Tokens per training example.")
    packing: Literal["concatenate", "documents"] = HfArg(
        default="concatenate",
        help="concatenate: cut one stream of tokens into blocks. documents: the same, but position_ids restart at "
        "each document, and attention stays within documents.",
    )
    mlm_probability: float = HfArg(default=0.15, help="Fraction of tokens to mask, for masked models.")

    def __post_init__(self):
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError("Training text must come from either --train_file or --dataset_name: give exactly one.")
        check_least(self, shuffle_buffer=0, block_size=2, max_train_documents=1, max_eval_documents=1)
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability must be above 0 and at most 1, got {self.mlm_probability}.")


def check_least(args: object, **least: float) -> None:
    """Raise a ValueError if an attribute is below its least value; None is allowed."""
    for name, smallest in least.items():
        if (value := getattr(args, name)) is not None and not value >= smallest:  # also NaN
            raise ValueError(f"{name} must be at least {smallest}, got {value}.")


SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")  # suffixes of metrics' names


@dataclass
class FlashTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the paper's optimizer as default, and options for speed and batches in tokens."""

    _argument_group_name = "training"

    output_dir: str | None = HfArg(default=None, help="Folder for the model, its checkpoints and the log. Required.")
    learning_rate: float = HfArg(default=1e-3, help="Peak learning rate of AdamW.")
    weight_decay: float = HfArg(default=0.01, help="Weight decay, applied to matrices only.")
    adam_epsilon: float = HfArg(default=1e-6, help="Epsilon of AdamW.")
    warmup_steps: float = HfArg(default=0.05, help="Steps of linear warm-up; below 1, a fraction of all steps.")
    eval_strategy: str = HfArg(default="steps", help="When to validate: no, steps or epoch.")
    eval_on_start: bool = HfArg(default=True, help="Validate before the first step.")
    logging_steps: float = HfArg(default=10, help="Steps between entries in the log.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Leave NaN and infinite losses out of the log.")
    use_cache: bool = HfArg(default=True, help="config.use_cache of the saved model.")
    dataloader_pin_memory: bool = HfArg(
        default_factory=torch.accelerator.is_available, help="Pin memory for faster copies to the device."
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Start over, and delete checkpoints of an earlier run.")
    max_minutes: float | None = HfArg(
        default=None,
        help="Stop this many minutes after the start of the program, imports not counted. The learning rate then "
        "rises and falls by the clock instead of by the step.",
    )
    batch_tokens: int | None = HfArg(default=None, help="Tokens per step on all devices; sets accumulation steps.")
    per_device_batch_tokens: int | None = HfArg(default=None, help="Tokens per device and batch, instead of rows.")
    sequence_warmup_steps: int = HfArg(
        default=0, help="Steps in which examples grow to --block_size tokens, at the same number of tokens per step."
    )
    sequence_warmup_start: int = HfArg(default=128, help="Tokens per example at first; --block_size / 2**n.")
    context_parallel_size: int = HfArg(
        default=1,
        help="Processes that share the tokens of each row, for rows too long for one device; see flash_hf.parallel.",
    )
    peak_tflops: float | None = HfArg(default=None, help="Peak TFLOP/s of a device, for MFU; known for common GPUs.")
    cuda_graph: bool = HfArg(
        default=False,
        help="Replay training steps as a CUDA graph, with the same results: about twice as fast for small models on a "
        "fast GPU. For one GPU, and rows without padding or packing.",
    )

    def __post_init__(self):
        if self.hub_token is not None:
            raise ValueError(
                "`hub_token` must be left out: Trainer would save it in training_args.bin, which is pushed too. Log "
                "in with `hf auth login`, or set the environment variable HF_TOKEN."
            )
        if self.output_dir is None:
            raise ValueError("output_dir must name the folder for the model and the log: --output_dir runs/NAME.")
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # Trainer assumes that greater is better for everything but losses.
            self.greater_is_better = not self.metric_for_best_model.endswith(SMALLER_IS_BETTER)
        self.started = time.monotonic()
        if self.max_minutes is not None and self.max_steps <= 0:
            self.max_steps = MAX_STEPS
        for name in self._VALID_DICT_FIELDS:
            if isinstance(value := getattr(self, name, None), str) and value.startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} must be JSON, got {value}: {error}.") from error
        super().__post_init__()
        if self.max_minutes is not None and (self.world_size > 1 or self.lr_scheduler_type != "linear"):
            raise ValueError(
                "max_minutes needs one process, since clocks differ, and lr_scheduler_type=linear, got "
                f"{self.world_size} processes and {self.lr_scheduler_type}. Use max_steps instead."
            )
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of the data then does not depend on other random numbers


def config_fields(model_args: ModelArguments) -> dict:
    """The fields of `--preset` and, over them, of `--model_config` and `--config_overrides` (JSON, else strings)."""
    try:
        fields = json.loads(model_args.model_config or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--model_config must be JSON, but: {error}. Or use a --config file.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--model_config must be a mapping of fields, got {type(fields).__name__}.")
    for item in filter(None, (model_args.config_overrides or "").split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(
                f"--config_overrides must read name=value,name=value, got {item!r}. Put values with commas "
                "under model_config in a --config file."
            )
        try:
            fields[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[name.strip()] = value.strip()
    if model_args.model is not None and (fields or model_args.preset != "flash"):
        raise ValueError(
            f"--preset, --model_config and --config_overrides are for new models, but --model {model_args.model} has "
            "its own configuration: leave out one or the other."
        )
    if model_args.preset == "plus":
        config = FlashConfig.plus(**fields)
        fields = {name: getattr(config, name) for name in ("chunk_shift", *PLUS)} | fields
    return fields


def check_arguments(args: FlashTrainingArguments, metrics: Collection[str]) -> None:
    """Raise a ValueError for options that would end the training midway, before any work is done. `metrics` are names
    of the validation metrics, without `eval_`."""
    from accelerate.utils import DynamoBackend  # here, since `--help` does not need the extra

    check_least(
        args, per_device_train_batch_size=1, per_device_eval_batch_size=1, gradient_accumulation_steps=1,
        num_train_epochs=0, dataloader_num_workers=0, sequence_warmup_steps=0, seed=0, data_seed=0,
        context_parallel_size=1, warmup_steps=0, max_grad_norm=0, weight_decay=0, label_smoothing_factor=0,
        neftune_noise_alpha=0, dataloader_prefetch_factor=1, eval_accumulation_steps=1, learning_rate=0, adam_beta1=0,
        adam_beta2=0, adam_epsilon=0,
    )  # fmt: skip
    if args.label_smoothing_factor > 1:
        raise ValueError(f"label_smoothing_factor must be at most 1, got {args.label_smoothing_factor}.")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(args, name) >= 1:
            raise ValueError(f"{name} must be below 1, got {getattr(args, name)}.")
    check_schedule(args)
    for name in ("seed", "data_seed"):
        if (value := getattr(args, name)) >= 2**32:  # numpy's limit
            raise ValueError(f"{name} must be below 2**32 = {2**32}, got {value}.")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {args.max_steps}.")
    whole = {"prediction_loss_only": False, "batch_eval_metrics": False, "eval_do_concat_batches": True}
    for name, value in whole.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name} must be {value}, got {not value}: metrics are computed from the predictions of the whole "
                "set. They take little memory, since logits are reduced batch by batch."
            )
    if args.label_names:
        raise ValueError(f"label_names must be left out, got {args.label_names}: the model names its labels.")
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in metrics:
        known = ", ".join(metrics)
        raise ValueError(f"metric_for_best_model must be one of {known}, got {metric!r}.{nearest(metric, metrics)}")
    backends = [backend.value.lower() for backend in DynamoBackend]
    if (backend := args.torch_compile_backend) is not None and backend.lower() not in backends:
        names = ", ".join(backends)
        raise ValueError(f"torch_compile_backend must be one of {names}, got {backend!r}.{nearest(backend, backends)}")
    if args.auto_find_batch_size and getattr(args, "batch_tokens", None) is not None:
        raise ValueError("auto_find_batch_size must be left out with batch_tokens, which it would change.")


def check_schedule(args: FlashTrainingArguments) -> None:
    """Raise a ValueError if the learning rate's schedule cannot be made with its arguments."""
    steps = {"num_warmup_steps": 0, "num_training_steps": 1}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs must fit lr_scheduler_type={args.lr_scheduler_type.value}, got "
            f"{args.lr_scheduler_kwargs}: {error}"
        ) from error


def set_batch(args: FlashTrainingArguments, block_size: int) -> None:
    """Convert batch sizes in tokens to rows per device and to gradient accumulation steps."""
    if args.per_device_batch_tokens is not None:
        args.per_device_train_batch_size = whole("per_device_batch_tokens", args.per_device_batch_tokens, block_size)
    if args.batch_tokens is not None:
        unit = args.world_size * max(1, args.n_gpu) * args.per_device_train_batch_size * block_size
        args.gradient_accumulation_steps = whole("batch_tokens", args.batch_tokens, unit)


def whole(name: str, tokens: int, unit: int) -> int:
    """How many `unit`s of tokens the option `name` asks for; ValueError if not a whole number."""
    count, rest = divmod(tokens, unit)
    if rest or not count:
        raise ValueError(
            f"{name} must be a multiple of {unit} (devices x rows x block_size), got {tokens}. Try "
            f"{max(1, count) * unit}."
        )
    return count


def warmup_length(step: int, *, steps: int, start: int, block_size: int) -> int:
    """Tokens per row at a step of the sequence warm-up: the doubled `start` below a straight line to the end."""
    lengths = [start]
    while 0 < lengths[-1] < block_size:
        lengths.append(2 * lengths[-1])
    if lengths[-1] != block_size:
        raise ValueError(f"sequence_warmup_start must give block_size={block_size} when doubled, got {start}.")
    line = start + (block_size - start) * step / steps if step < steps else block_size
    return max(length for length in lengths if length <= line)
