# SPDX-License-Identifier: Apache-2.0
"""Reading original checkpoints from files, and copying their tokenizers."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, BertTokenizerFast, PreTrainedTokenizerFast

from ..hub import pad_on_the_left, vocabulary_size
from ..sources import read_json


WEIGHT_FILES = (
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def read_state_dict(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors and the `config.json` of a checkpoint, without running code that a file may contain.

    Args:
        path: a `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt` file, or a folder with one of those (or shards and
            their index).

    Returns:
        The state dict, and the contents of the `config.json` beside it ({} without one).

    Raises:
        ValueError: there is no such file, or it holds anything but tensors.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        known = [path / name for name in WEIGHT_FILES if (path / name).is_file()][:1]
        found = known or sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or f"none ({', '.join(WEIGHT_SUFFIXES)})"
            raise ValueError(f"The folder {path} must hold one file of weights, it holds {names}. Name one.")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"There is no file or folder {path}.")
    settings_path = folder / "config.json"
    settings = read_json(settings_path, dict) if settings_path.is_file() else {}
    if path.name.endswith(".index.json"):
        shards = sorted(set(read_json(path, dict)["weight_map"].values()))
        if any(name != os.path.basename(name) for name in shards):
            raise ValueError(f"The index {path} must name files beside it, got {shards}.")
        return {name: x for shard in shards for name, x in read_tensors(folder / shard).items()}, settings
    return read_tensors(path), settings


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in one file, or in the `state_dict` or `model` entry of a training checkpoint."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything, for a damaged or hostile file; torch's own message advises to trust it
        raise ValueError(
            f"{path} must hold tensors that torch.load(weights_only=True) reads, and does not. Save "
            "model.state_dict() with the original code, not the module."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a state dict of tensors, but holds something else.")
    return dict(state)


def save_tokenizer(source: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Save the original's tokenizer (BERT's `vocab.txt`, or `tokenizer.json`) with a converted model; False if it has
    none, ValueError if it has ids beyond the model's embeddings."""
    source = Path(source) if Path(source).is_dir() else Path(source).parent
    if (source / "vocab.txt").is_file():
        tokenizer_class = BertTokenizerFast
    elif (source / "tokenizer.json").is_file():
        tokenizer_class = PreTrainedTokenizerFast
    else:
        return False
    # No token_type_ids: the embedding of type 0 has been folded into the word embeddings.
    tokenizer = tokenizer_class.from_pretrained(str(source), model_input_names=["input_ids", "attention_mask"])
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
