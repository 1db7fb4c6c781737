# SPDX-License-Identifier: Apache-2.0
"""From text to checkpoint: `run_training("causal", ...)` and `run_training("masked", ...)`."""

import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from ..configuration_flash import FlashConfig
from ..hub import pad_on_the_left, vocabulary_size
from ..sources import load_named
from .arguments import (
    DataArguments,
    FlashTrainingArguments,
    ModelArguments,
    check_arguments,
    config_fields,
    set_batch,
    warmup_length,
)
from .checkpoints import check_output_dir, delete_checkpoints, find_checkpoint
from .documents import load_documents, split_documents
from .metrics import METRICS, Kind, make_compute_metrics, token_scores
from .packing import MaskingCollator, collate, pack_documents
from .stream import BlockStream
from .tokenizer import document_end, document_start, load_tokenizer, text_size, tokenize_documents, train_tokenizer
from .trainer import FlashTrainer, LossPlotCallback, MaskEpochCallback


logger = logging.get_logger(__name__)

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 40}  # saved for generate() with new causal models


def load_text(data_args: DataArguments) -> tuple[Dataset | IterableDataset, Dataset]:
    """Training and validation documents. Validation documents are never streamed, so they stay the same."""
    names = ("dataset_name", "dataset_config_name", "text_column", "sample_by")
    load = partial(load_documents, **{name: getattr(data_args, name) for name in names})
    own_validation = data_args.validation_file is not None or data_args.validation_split is not None
    if data_args.streaming and not own_validation:
        raise ValueError(
            "The end of a stream cannot be held out for validation: with --streaming give --validation_file, or "
            "--validation_split of a data set."
        )
    split, first = data_args.train_split, data_args.max_train_documents
    train = load(data_args.train_file, split=split, streaming=data_args.streaming, max_documents=first)
    if not own_validation:
        train, validation = split_documents(train, data_args.validation_fraction)
        if data_args.max_eval_documents is not None:
            validation = validation.take(data_args.max_eval_documents)
        return train, validation
    if data_args.validation_file is not None:
        load = partial(load, data_args.validation_file, dataset_name=None)
    # With --streaming, download only the first documents.
    lazily = data_args.streaming and data_args.max_eval_documents is not None
    split = data_args.validation_split or "train"
    validation = load(split=split, max_documents=data_args.max_eval_documents, streaming=lazily)
    return train, Dataset.from_list(list(validation)) if lazily else validation


def check_sources(model_args: ModelArguments) -> None:
    """Raise an OSError unless `--model` and `--tokenizer` are folders or on the Hub."""
    for option, auto in (("model", AutoConfig), ("tokenizer", AutoTokenizer)):
        if (name := getattr(model_args, option)) is not None:
            load_named(auto.from_pretrained, name, option=f"--{option}")


def load_model(
    kind: Kind, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, resume: Path | None
) -> PreTrainedModel:
    """A new model, the model `--model`, or a model for the weights that Trainer will load from `resume`."""
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    fields = config_fields(model_args)
    if resume is not None:
        config = AutoConfig.from_pretrained(resume)
        for name, value in fields.items():
            if getattr(config, name, None) != value:
                raise ValueError(
                    f"The checkpoint {resume} has {name}={getattr(config, name, None)!r}, the arguments {value!r}. "
                    "Resume with the arguments the run began with."
                )
        model = auto.from_config(config)
    elif model_args.model is not None:
        # In float32, whatever it was saved in: small updates of bfloat16 weights are lost in rounding.
        model = load_named(auto.from_pretrained, model_args.model, option="--model", dtype=torch.float32)
    else:
        model = auto.from_config(new_config(kind, fields, tokenizer))
        if kind == "causal":
            # Greedy decoding of small models soon repeats itself.
            model.generation_config = GenerationConfig.from_model_config(model.config)
            model.generation_config.update(**SAMPLING)
    if kind == "causal" and resume is not None and (resume / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(resume)
    check_vocabulary(model, tokenizer)
    return model


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if the tokenizer has ids beyond the model's embeddings."""
    needed = vocabulary_size(tokenizer)
    if model.config.vocab_size < needed:
        raise ValueError(
            f"The model's vocab_size must be at least {needed}, the tokenizer's highest id + 1, got "
            f"{model.config.vocab_size}. Leave out vocab_size, or use the model's own tokenizer."
        )


def new_config(kind: Kind, fields: dict, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """A `FlashConfig` with `fields`, and by default with the tokenizer's size and special tokens."""
    defaults = {"is_decoder": kind == "causal"}
    if tokenizer is not None:
        defaults |= {
            "vocab_size": vocabulary_size(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": document_start(tokenizer),
            "eos_token_id": document_end(tokenizer),
        }
    return FlashConfig(**{**defaults, **fields})


def load_or_train_tokenizer(
    kind: Kind, model_args: ModelArguments, train: Dataset | IterableDataset, resume: Path | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, else `--tokenizer`, else that of `--model`, else a new one, which the first
    process trains for all. For causal models it pads on the left."""
    source = resume or model_args.tokenizer or model_args.model
    if source is not None:
        tokenizer = load_tokenizer(str(source), masked=kind == "masked")
        if kind == "causal":
            pad_on_the_left(tokenizer)
        return tokenizer
    logger.info(f"Training a tokenizer with {model_args.tokenizer_vocab_size} tokens.")
    tokenizer = [None]
    if PartialState().is_main_process:
        tokenizer = [train_tokenizer(train, model_args.tokenizer_vocab_size, causal=kind == "causal")]
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
    """Tokenize and pack the documents, and make a trainer with metrics, collator and callbacks."""
    causal = kind == "causal"
    with args.main_process_first(desc="tokenizing and packing"):
        tokenize = partial(tokenize_documents, tokenizer=tokenizer)
        pack = {"tokenizer": tokenizer, "block_size": data_args.block_size, "packing": data_args.packing}
        if isinstance(train, IterableDataset):
            source = data_args.dataset_name or ", ".join(data_args.train_file)
            order = {"shuffle_buffer": data_args.shuffle_buffer, "seed": args.data_seed}
            train_blocks = BlockStream(train, **pack, **order, causal=causal, source=source)
        else:
            train_blocks = pack_documents(tokenize(train), causal=causal, **pack)
        tokenized = tokenize(validation)
        eval_blocks = pack_documents(tokenized, causal=causal, **pack)
        size = text_size(tokenized)
        logger.info(f"Validation text: {size}, in {len(eval_blocks)} blocks of {data_args.block_size} tokens.")
        if size["n_unknown"]:
            logger.warning(
                f"{size['n_unknown']} tokens of the validation text are unknown to the tokenizer. They are easy to "
                "predict, so perplexities will be too low."
            )
        collator, callbacks = collate, [LossPlotCallback()]
        if not causal:
            collator = MaskingCollator(tokenizer, mlm_probability=data_args.mlm_probability, seed=args.data_seed)
            callbacks.append(MaskEpochCallback(collator))
            eval_blocks = collator.mask_once(eval_blocks)
    # Training needs the loss only, and logits would be the largest tensors of a step.
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


def check_run(
    kind: Kind, model_args: ModelArguments, data_args: DataArguments, args: FlashTrainingArguments
) -> Path | None:
    """Refuse what would fail later, before the data are read; return the checkpoint to resume from."""
    check_arguments(args, METRICS[kind])
    resume = find_checkpoint(args.resume_from_checkpoint, args.output_dir, streaming=data_args.streaming)
    if args.process_index == 0:  # the others may come when this process has begun to write
        check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=resume)
    if args.sequence_warmup_steps:
        warmup_length(0, steps=1, start=args.sequence_warmup_start, block_size=data_args.block_size)
    if data_args.streaming and (args.max_steps <= 0 or args.dataloader_num_workers or args.auto_find_batch_size):
        raise ValueError(
            "--streaming needs max_steps of at least 1, since a stream has no length, and neither "
            "dataloader_num_workers, since it has a reader thread, nor auto_find_batch_size, since it cannot restart."
        )
    if kind == "masked" and model_args.preset == "plus":
        logger.warning(
            "--preset plus is for causal models: masked models end 0.02 to 0.06 worse than with --preset flash."
        )
    fields = config_fields(model_args)
    check_sources(model_args)
    if model_args.model is None:
        new_config(kind, fields)
    import matplotlib  # noqa: F401  or its absence would end the run at the first validation

    return resume


def outline(kind: Kind, trainer: FlashTrainer, block_size: int) -> str:
    """What is about to be trained, in one line."""
    args, rows = trainer.args, trainer.get_total_train_batch_size(trainer.args)
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(len(trainer.train_dataset) / rows * args.num_train_epochs)
    length = f"{steps:,} steps" if args.max_minutes is None else f"{args.max_minutes:g} minutes of steps"
    millions = trainer.model.num_parameters() / 1e6
    return (
        f"Training a {kind} model of {millions:.1f} M parameters on {args.device.type}: {length} of "
        f"{rows * block_size:,} tokens each. --config_overrides sets the sizes of a new model."
    )


def run_training(
    kind: Kind, model_args: ModelArguments, data_args: DataArguments, args: FlashTrainingArguments
) -> dict:
    """Load text, tokenizer and model, train, validate and save.

    `args.output_dir` then holds the model and the tokenizer (for `from_pretrained`), `checkpoint-*`, `loss.png`,
    `log_history.json`, `trainer_state.json` and `eval_results.json`.

    Returns:
        `before` and `after` (validation metrics; `before` is None without `eval_on_start`), `train_seconds`,
        `output_dir` and `plot`.

    Raises:
        ValueError, OSError, ImportError: an argument is invalid, or text, model or tokenizer cannot be loaded.
    """
    resume = check_run(kind, model_args, data_args, args)
    set_batch(args, data_args.block_size)
    set_seed(args.seed)
    train, validation = load_text(data_args)
    tokenizer = load_or_train_tokenizer(kind, model_args, train, resume)
    model = load_model(kind, model_args, tokenizer, resume)
    trainer = build_trainer(kind, model, tokenizer, train, validation, data_args, args)
    if args.overwrite_output_dir and resume is None and args.should_save:
        delete_checkpoints(args.output_dir)
    if resume is not None and isinstance(trainer.train_dataset, BlockStream):
        trainer.resume_stream(resume)
    if args.process_index == 0:
        print(outline(kind, trainer, data_args.block_size), file=sys.stderr)
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - begin
    trainer.save_model()  # before evaluating, which casts the model with bf16_full_eval or fp16_full_eval
    after = trainer.evaluate()
    trainer.save_state()
    trainer.save_metrics("eval", after)
    if args.push_to_hub:
        trainer.push_to_hub()  # again, with the last metrics and the loss plot
    before = next((log for log in trainer.state.log_history if "eval_loss" in log and log["step"] == 0), None)
    return {
        "before": before,
        "after": after,
        "train_seconds": seconds,
        "output_dir": args.output_dir,
        "plot": str(Path(args.output_dir) / "loss.png"),
    }


def describe(kind: Kind, result: dict) -> str:
    """The result of [`run_training`] as a printable table."""
    own = ("word_perplexity", "bits_per_byte", "accuracy") if kind == "causal" else ("masked_accuracy",)
    lines = [f"{'validation':<18}{'before':>16}{'after':>16}"]
    for name in ("loss", "perplexity", *own):
        values = [result[when] and result[when][f"eval_{name}"] for when in ("before", "after")]
        shown = ["-" if value is None else f"{value:,.{4 if value < 100 else 0}f}" for value in values]
        lines.append(f"{name:<18}" + "".join(f"{value:>16}" for value in shown))
    lines.append(f"trained in {result['train_seconds']:.1f} s")
    lines.append(f"checkpoint  {result['output_dir']}")
    lines.append(f"loss plot   {result['plot']}")
    if kind == "causal":
        lines.append(f"Try it: flash-hf generate --model {result['output_dir']} --prompt 'Once upon a time'")
    return "\n".join(lines)
