# SPDX-License-Identifier: Apache-2.0
"""Checkpoints read from files, and the tokenizer beside them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..commands.options import read_json
from ..hub import pad_on_the_left, vocabulary_size


WEIGHT_FILES = (
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def read_state_dict(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Tensors and `config.json` of a checkpoint; no code of the file is run.

    Args:
        path: a `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt` file, or a folder with one of those (or shards and
            their index).

    Returns:
        Names to tensors, and the settings in the `config.json` beside them ({} without one).

    Raises:
        ValueError: nothing is there, or the file holds something else than tensors.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        known = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        found = known or sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        if not known and len(found) > 1:
            names = [file.name for file in found]
            raise ValueError(f"`path` must hold one file of weights, got {names} in {path}. Name one.")
        if not found:
            raise ValueError(f"`path` must hold weights (.safetensors, .bin, .pt), got none in {path}.")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"`path` must be a file or a folder, but {path} does not exist.")
    settings_path = folder / "config.json"
    settings = read_json(settings_path, dict) if settings_path.is_file() else {}
    if path.name.endswith(".index.json"):
        shards = sorted(set(read_json(path, dict)["weight_map"].values()))
        if any(name != os.path.basename(name) for name in shards):
            raise ValueError(f"`path`: the index {path} must name files beside it, got {shards}.")
        state = {}
        for name in shards:
            state |= read_tensors(folder / name)
        return state, settings
    return read_tensors(path), settings


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Names to tensors of one file; a `state_dict` or `model` entry of a training checkpoint is opened.

    Raises:
        ValueError: it holds something else.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # Never the whole pickle: that could run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file raises
        # Torch's message is left to the chain: it advises to trust the file.
        raise ValueError(
            f"`path` must hold tensors that torch.load(weights_only=True) reads, and {path} does not. Save "
            "model.state_dict() with the original code, not the module."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"`path` must hold a state dict of tensors, but {path} holds something else.")
    return dict(state)


def save_tokenizer(source: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Copy a BERT tokenizer (`vocab.txt`) or a `tokenizer.json` beside a converted model; whether there was one.

    Args:
        source: the original's folder, or a file in it.
        folder: the converted model's.

    Raises:
        ValueError: the tokenizer has ids beyond the model's embeddings.
    """
    from transformers import AutoConfig, BertTokenizerFast, PreTrainedTokenizerFast

    source = Path(source) if Path(source).is_dir() else Path(source).parent
    if (source / "vocab.txt").is_file():
        tokenizer_class = BertTokenizerFast
    elif (source / "tokenizer.json").is_file():
        tokenizer_class = PreTrainedTokenizerFast
    else:
        return False
    # FLASH has no token types; type 0 is in the word embeddings.
    names = ["input_ids", "attention_mask"]
    tokenizer = tokenizer_class.from_pretrained(str(source), model_input_names=names)
    config = AutoConfig.from_pretrained(folder)
    if config.is_decoder:
        pad_on_the_left(tokenizer)
    rows, needed = config.vocab_size, vocabulary_size(tokenizer)
    if rows < needed:
        raise ValueError(
            f"The tokenizer in {source} must belong to the model: it has ids up to {needed - 1}, the model's "
            f"vocab_size is {rows}."
        )
    tokenizer.save_pretrained(str(folder))
    return True
