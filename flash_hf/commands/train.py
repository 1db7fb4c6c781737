# SPDX-License-Identifier: Apache-2.0
"""Train a new language model on text, or continue training one (--model). Try --max_steps 20 first."""

import argparse
import json
import sys
from pathlib import Path

from transformers import HfArgumentParser

from ..sources import read_text
from ..training.arguments import DataArguments, FlashTrainingArguments, ModelArguments
from .options import OptionParser


# An option on the command line also replaces these options of the --config file, which set the same thing otherwise.
ALTERNATIVES = {
    "train_file": ("dataset_name", "dataset_config_name", "train_split", "validation_split"),
    "dataset_name": ("train_file", "validation_file", "dataset_config_name", "train_split", "validation_split"),
    "validation_file": ("validation_split",),
    "validation_split": ("validation_file",),
    "per_device_train_batch_size": ("per_device_batch_tokens",),
    "gradient_accumulation_steps": ("batch_tokens",),
    "num_train_epochs": ("max_steps",),
    "max_minutes": ("max_steps",),
    "model": ("preset", "model_config", "config_overrides"),
}


# What `--help` shows, of these commands and of scripts.finetune; `--help all` shows all options.
SHOWN = (
    "help", "model", "preset", "config_overrides", "tokenizer_vocab_size", "train_file", "validation_file",
    "dataset_name", "block_size", "task", "text_column", "label_column", "output_dir", "resume_from_checkpoint",
    "max_steps", "num_train_epochs", "max_minutes", "learning_rate", "per_device_train_batch_size", "bf16",
)  # fmt: skip


class TrainingParser(HfArgumentParser, OptionParser):
    """`HfArgumentParser` with a help of one screen."""

    def __init__(self, dataclass_types: tuple[type, ...], **kwargs):
        usage = "%(prog)s [CONFIG.yaml] [--OPTION VALUE ...]"
        super().__init__(dataclass_types, usage=usage, epilog="All options: --help all", **kwargs)
        for action in self._actions:
            action.option_strings = action.option_strings[-1:] if action.dest == "help" else action.option_strings[:1]

    def hide_rare_options(self) -> None:
        for action in self._actions:
            if action.dest not in SHOWN:
                action.help = argparse.SUPPRESS


def parse_with_config(parser: HfArgumentParser, arguments: list[str] | None = None) -> tuple:
    """Parse a command line, with the options of a `--config` file in front of it.

    The file is YAML or JSON: a mapping of options, without their dashes, to values; `model_config` is a mapping of
    fields of `FlashConfig`. A first argument that ends in .yaml, .yml or .json stands for `--config`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "all" not in arguments:
        parser.hide_rare_options()
    if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
        arguments.insert(0, "--config")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(arguments)[0].config
    words = []
    if path is not None:
        given = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
        replaced = given.union(*(ALTERNATIVES.get(name, ()) for name in given))
        for name, value in read_config(path).items():
            if name in replaced or value is None:
                continue
            if isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            else:
                value = json.dumps(value) if isinstance(value, (dict, bool)) else value  # true, not True
                words.append(f"--{name}={value}")
    return parser.parse_args_into_dataclasses([*words, *arguments], look_for_args_file=False)


def read_config(path: str | Path) -> dict:
    """The options in a YAML or JSON file."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--config must be a YAML or JSON file of options; there is no file {path}.")
    try:  # YAML alone will not do: it reads 1e-5 in JSON as a string
        options = (json.loads if path.suffix == ".json" else yaml.safe_load)(read_text(path))
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} must hold a mapping of options, got {type(options).__name__}.")
    return options


def parse_arguments(
    arguments: list[str] | None = None, description: str | None = None
) -> tuple[ModelArguments, DataArguments, FlashTrainingArguments]:
    """The options of `flash-hf train-clm` and `train-mlm`, by default of this process's command line."""
    types = (ModelArguments, DataArguments, FlashTrainingArguments)
    return parse_with_config(TrainingParser(types, description=description), arguments)


def train(kind: str) -> None:
    """Train a `"causal"` or `"masked"` model with the options of the command line."""
    from ..training import describe, run_training  # first, for the error without the extra

    print(describe(kind, run_training(kind, *parse_arguments(description=__doc__))))


def train_clm() -> None:
    train("causal")


def train_mlm() -> None:
    train("masked")
