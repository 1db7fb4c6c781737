# SPDX-License-Identifier: Apache-2.0
"""The options of the trainings: dataclasses, `--config` files and recipes, batches in tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from huggingface_hub import whoami
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available

from ..configuration_flash import PLUS, FlashConfig, nearest
from .budget import MAX_STEPS


@dataclass
class ModelArguments:
    """Which model and tokenizer."""

    _argument_group_name = "model and tokenizer"

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a model to go on from. Without it, a new one is made."}
    )
    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML or JSON file with any of these options, for instance a recipe of scripts/recipes. What the "
            "command line says goes over it."
        },
    )
    preset: Literal["flash", "plus"] = field(
        default="flash",
        metadata={
            "help": "Form of a new model: flash, the paper's, or plus, FLASH+ (FlashConfig.plus), for causal models. "
            "Fields given by --model_config and --config_overrides take precedence."
        },
    )
    model_config: str | None = field(
        default=None,
        metadata={"help": "Fields of FlashConfig for a new model: a mapping in a --config file, JSON as an option."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Fields of FlashConfig for a new model, over those of --model_config, for instance: "
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

    _argument_group_name = "text"

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
        default=1000, metadata={"help": "Blocks of a stream that are shuffled at a time; 0 keeps its order."}
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
        if self.block_size < 2:
            raise ValueError(
                f"block_size must be at least 2 (one token to see, one to predict), got {self.block_size}."
            )
        for name in ("max_train_documents", "max_eval_documents", "num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie strictly between 0 and 1, got {self.validation_fraction}.")
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability must be above 0 and at most 1, got {self.mlm_probability}.")


SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")  # ends of the names of metrics


@dataclass
class FlashTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of FLASH (the paper's optimiser) and of an honest log."""

    _argument_group_name = "training"

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the model, its checkpoints and the log. Must be given."}
    )
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
    batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in a step, over all devices; gradients are accumulated over as many batches as that takes."
        },
    )
    per_device_batch_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that a device computes at a time, instead of --per_device_train_batch_size."},
    )
    sequence_warmup_steps: int = field(
        default=0,
        metadata={"help": "Steps in which rows grow from --sequence_warmup_start to --block_size; no token is lost."},
    )
    sequence_warmup_start: int = field(
        default=128, metadata={"help": "Tokens in a row at first; doubled again and again it gives --block_size."}
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "What a device can do at most, for MFU. Known of common GPUs computing in bf16 or fp16."},
    )

    cuda_graph: bool = field(
        default=False,
        metadata={
            "help": "Replay training steps as a CUDA graph, with the same numbers: about twice as fast for small "
            "models on a fast GPU, which otherwise waits for Python. For one GPU and rows without padding or packing."
        },
    )

    def __post_init__(self):
        if self.hub_token is not None:
            raise ValueError(
                "`hub_token` must be left out: Trainer would write it into training_args.bin, which is pushed too. "
                "Log in with `hf auth login`, or set the environment variable HF_TOKEN."
            )
        if self.output_dir is None:
            raise ValueError("output_dir must name the folder for the model and the log: --output_dir runs/NAME.")
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # Trainer takes all but losses for better the greater they are.
            self.greater_is_better = not self.metric_for_best_model.endswith(SMALLER_IS_BETTER)
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


def config_fields(model_args: ModelArguments) -> dict:
    """The fields of `--preset` and, over them, of `--model_config` and `--config_overrides` (JSON, else strings).

    Raises:
        ValueError: `--model_config` is no mapping in JSON; an override is not `name=value`; fields are given beside
            `--model`, or are refused by `FlashConfig.plus`.
    """
    fields = {}
    if model_args.model_config is not None:
        try:
            fields = json.loads(model_args.model_config)
        except json.JSONDecodeError as error:
            raise ValueError(f"--model_config must be JSON, but: {error}. Or put it into a --config file.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"--model_config must be a mapping of fields, got {type(fields).__name__}.")
    for item in (model_args.config_overrides or "").split(","):
        name, equals, value = item.partition("=")
        if item and not equals:
            raise ValueError(
                f"--config_overrides must read name=value,name=value, got {item!r}. Put values that hold commas "
                "under model_config in a --config file."
            )
        if item:
            try:
                fields[name.strip()] = json.loads(value)
            except json.JSONDecodeError:
                fields[name.strip()] = value.strip()
    if model_args.model is not None and fields:
        raise ValueError(
            f"--model_config and --config_overrides make a new model, but --model {model_args.model} brings its own "
            f"configuration: leave out {', '.join(fields)}, or --model."
        )
    if model_args.preset == "plus":
        if model_args.model is not None:
            raise ValueError(
                f"--preset is the form of a new model, but --model {model_args.model} brings its own configuration: "
                "leave out one of them."
            )
        config = FlashConfig.plus(**fields)
        fields = {name: getattr(config, name) for name in ("chunk_shift", *PLUS)} | fields
    return fields


def check_arguments(args: FlashTrainingArguments, metrics: Collection[str]) -> None:
    """Refuse what would end the training in its middle, before any work is done.

    Args:
        metrics: names of what the validation measures, without `eval_`.

    Raises:
        ValueError: a value out of range, an option that this training cannot have, an optimizer or a learning rate
            that cannot be made.
        ImportError: a package that an option needs is missing.
        OSError: `push_to_hub` without the Hub or a login.
    """
    least = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
        "num_train_epochs": 0, "dataloader_num_workers": 0, "sequence_warmup_steps": 0, "seed": 0,
    }  # fmt: skip
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {getattr(args, name)}.")
    whole = {"prediction_loss_only": False, "batch_eval_metrics": False, "eval_do_concat_batches": True}
    for name, value in whole.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name} must be {value}, got {not value}: the scores of the validation come from the predictions of "
                "the whole set. Little memory is taken all the same, since logits are reduced batch by batch."
            )
    if args.label_names:
        raise ValueError(f"label_names must be left out, got {args.label_names}: the model knows its labels.")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise ValueError("dataloader_persistent_workers needs dataloader_num_workers of at least 1, got 0.")
    if args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "eval_strategy must be steps or epoch with save_strategy=best, which saves after a validation, got no."
        )
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in metrics:
        known = ", ".join(metrics)
        raise ValueError(f"metric_for_best_model must be one of {known}, got {metric!r}.{nearest(metric, metrics)}")
    if args.auto_find_batch_size and getattr(args, "batch_tokens", None) is not None:
        raise ValueError("auto_find_batch_size must be left out with batch_tokens, which it would change.")
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError("fsdp is for several processes, got one: put `accelerate launch` in front of the command.")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel needs liger-kernel: pip install 'flash-hf[kernels]'")
    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except RuntimeError as error:
        raise ImportError(f"report_to={','.join(args.report_to)} cannot be used: {error}") from error
    if args.push_to_hub and args.should_save:
        try:
            whoami()
        except OSError as error:
            raise OSError(
                f"push_to_hub needs the Hub and a login (hf auth login, or HF_TOKEN), but: {error}"
            ) from error
    check_optimizer(args)


def check_optimizer(args: FlashTrainingArguments) -> None:
    """Make the optimizer and the learning-rate schedule of the arguments for a single number.

    Raises:
        ValueError: a value that one of them does not take.
        ImportError: the package of the optimizer is missing.
    """
    try:
        make, options = Trainer.get_optimizer_cls_and_kwargs(args)
    except ValueError:
        return  # an optimizer that needs the model to be made
    if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
        return
    try:
        optimizer = make([torch.nn.Parameter(torch.zeros(1, 1))], **options)
        steps = max(1, args.max_steps)
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"optim={args.optim.value} with lr_scheduler_type={args.lr_scheduler_type.value} cannot be made of the "
            f"options given (learning_rate, adam_beta1, optim_args, lr_scheduler_kwargs, ...): {error}"
        ) from error


def set_batch(args: FlashTrainingArguments, block_size: int) -> None:
    """Turn batches given in tokens into rows on a device and batches to accumulate, for the devices there are.

    Raises:
        ValueError: they cannot be made of whole rows, or whole batches, of that size.
    """
    if args.per_device_batch_tokens is not None:
        rows, rest = divmod(args.per_device_batch_tokens, block_size)
        if rest or not rows:
            raise ValueError(
                f"per_device_batch_tokens must be a multiple of block_size={block_size}, got "
                f"{args.per_device_batch_tokens}. Take {max(1, rows) * block_size}."
            )
        args.per_device_train_batch_size = rows
    if args.batch_tokens is not None:
        devices = args.world_size * max(1, args.n_gpu)
        together = devices * args.per_device_train_batch_size * block_size
        args.gradient_accumulation_steps, rest = divmod(args.batch_tokens, together)
        if rest or not args.gradient_accumulation_steps:
            raise ValueError(
                f"batch_tokens must be a multiple of {together} ({devices} devices x "
                f"{args.per_device_train_batch_size} rows x {block_size} tokens), got {args.batch_tokens}. Change "
                "--per_device_batch_tokens."
            )


def warmup_length(step: int, *, steps: int, start: int, block_size: int) -> int:
    """Tokens in a row at a step of the sequence-length warm-up: `start` doubled, as far as a straight line allows.

    Raises:
        ValueError: `start` doubled again and again never gives `block_size`.
    """
    lengths = [start]
    while 0 < lengths[-1] < block_size:
        lengths.append(2 * lengths[-1])
    if lengths[-1] != block_size:
        raise ValueError(
            f"sequence_warmup_start must give block_size={block_size} when doubled again and again, got {start}."
        )
    line = start + (block_size - start) * step / steps if step < steps else block_size
    return max(length for length in lengths if length <= line)
