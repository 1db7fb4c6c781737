# SPDX-License-Identifier: Apache-2.0
"""Models, tokenizers, data sets and files that a user names, with errors that name the option or file."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_named(load: Callable, source: str | Path, /, *, option: str, **options) -> Any:
    """`load(source, **options)` (`from_pretrained` of a class, or `load_dataset`) of a folder or a name on the Hub. An
    OSError names the `option` that it comes from, for instance `--model`."""
    path = Path(source).expanduser()
    if path.is_dir():
        return load(str(path), **options)
    if path.is_file():
        raise FileNotFoundError(f"{option} must be a folder or a name on the Hub; {source} is a file.")
    # Not worth a request: a misspelt folder among others, or a model without an owner.
    misspelt = path.parent.is_dir() if "/" in str(source) else option == "--model"
    if misspelt or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
        raise FileNotFoundError(f"{option} must be a folder or a name on the Hub; there is no folder {source}.")
    try:
        return load(str(source), **options)
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise OSError(f"{option} {source} is not a folder, and cannot be loaded from the Hub: {reason}") from error


def read_text(path: str | Path) -> str:
    """The text in a file; ValueError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} (0x{error.object[error.start]:02x})"
        raise ValueError(f"{path} must be UTF-8 text; {byte} is not: {error.reason}. Convert it first.") from error


def read_json(path: str | Path, kind: type) -> Any:
    """The value of type `kind`, dict or list, in a JSON file; ValueError if it holds anything else."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, but: {error}.") from error
    if not isinstance(value, kind):
        expected = {dict: "object", list: "list"}[kind]
        raise ValueError(f"{path} must hold a JSON {expected}, got {type(value).__name__}.")
    return value
