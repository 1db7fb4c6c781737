# SPDX-License-Identifier: Apache-2.0
"""Train a new language model on text, or continue training one (--model). Try --max_steps 20 first."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import sys
from pathlib import Path

from transformers import HfArgumentParser, TrainingArguments

from ..configuration_flash import FlashConfig
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


class TrainingParser(HfArgumentParser, OptionParser):
    """`HfArgumentParser` whose help lists the options of this package first and the rest of TrainingArguments last."""

    def __init__(self, dataclass_types: tuple[type, ...], **kwargs):
        super().__init__(dataclass_types, usage="%(prog)s [CONFIG.yaml] [--OPTION VALUE ...]", **kwargs)
        training = next(cls for cls in dataclass_types if issubclass(cls, TrainingArguments))
        classes = training.__mro__[: training.__mro__.index(TrainingArguments)]
        own = {name for cls in classes for name in inspect.get_annotations(cls)}
        rest = self.add_argument_group("other TrainingArguments of transformers")
        group = next(group for group in self._action_groups if group.title == training._argument_group_name)
        rest._group_actions += [action for action in group._group_actions if action.dest not in own]
        group._group_actions = [action for action in group._group_actions if action.dest in own]


def parse_with_config(parser: HfArgumentParser, arguments: list[str] | None = None) -> tuple:
    """Parse a command line, with the options of a `--config` file in front of it.

    The file is YAML or JSON: a mapping of options, without their dashes, to values; `model_config` is a mapping of
    fields of `FlashConfig`. A first argument that ends in .yaml, .yml or .json stands for `--config`.

    Raises:
        ValueError, FileNotFoundError: the file is missing, is not a mapping, or has a key that is not an option.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
        arguments.insert(0, "--config")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(arguments)[0].config
    words = []
    if path is not None:
        given = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
        replaced = given.union(*(ALTERNATIVES.get(name, ()) for name in given))
        for name, value in read_config(path, parser).items():
            if name in replaced or value is None:
                continue
            if isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            else:
                value = json.dumps(value) if isinstance(value, (dict, bool)) else value  # true, not True
                words.append(f"--{name}={value}")
    return parser.parse_args_into_dataclasses([*words, *arguments], look_for_args_file=False)


def read_config(path: str | Path, parser: HfArgumentParser) -> dict:
    """The options in a YAML or JSON file, checked as [`parse_with_config`] says."""
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
    known = {action.dest for action in parser._actions} - {"help", "config"}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            cure = f"Did you mean {near[0]!r}?" if near else "--help lists the options."
            if name in FlashConfig.__dataclass_fields__:
                cure = "It is a field of FlashConfig: put it under model_config."
            raise ValueError(f"--config {path} has {name!r}, which is not an option. {cure}")
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
