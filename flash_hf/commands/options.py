# SPDX-License-Identifier: Apache-2.0
"""What commands share: a parser that names the option that was meant, a mistake told in one sentence, and the files,
models and devices that their options name.

A mistake of the user ends in one sentence on stderr and exit code 2 (an option that does not exist or cannot be read)
or 1 (a value that cannot be used). A fault of the code shows its traceback, as does everything under
`FLASH_TRACEBACK=1`.
"""

from __future__ import annotations

import argparse
import difflib
import dis
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_flash import FlashConfig


# The extra of setup.cfg that each module comes with.
EXTRAS = {
    "accelerate": "train", "datasets": "train", "evaluate": "train", "matplotlib": "train", "psutil": "train",
    "tqdm": "train", "yaml": "train", "lm_eval": "eval",
}  # fmt: skip

# Packages that refuse what a user gave by a `raise` of their own; elsewhere such an error is a fault of the code.
SPEAKERS = {"__main__", "accelerate", "datasets", "flash_hf", "huggingface_hub", "scripts", "transformers"}


class OptionParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, suggests the option that was meant, and ends in one line on stderr."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, "prog": program_name(), **kwargs})

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        # Before argparse looks for required options: the misspelt one may be one of them.
        for word in args[: args.index("--")] if "--" in args else args:
            name = word.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                self.error(self.unknown_option(name))
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # HfArgumentParser would raise an error of its own
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def unknown_option(self, name: str) -> str:
        """What to say of an option that does not exist."""
        name = name.removeprefix("--")
        field = name.replace("-", "_")
        known = {option[2:] for option in self._option_string_actions if option.startswith("--")}
        if "config_overrides" in known and field in FlashConfig.__dataclass_fields__:
            return f"--{name} is no option but a field of FlashConfig: give it as --config_overrides {field}=VALUE."
        near = difflib.get_close_matches(field, known, n=1)
        return f"--{name} is no option. " + (f"Did you mean --{near[0]}?" if near else "--help lists the options.")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type, *, least: float | None = None, above: float | None = None, most: float | None = None):
    """A `type` for `add_argument`: int or float, within bounds."""

    def parse(word: str) -> int | float:
        value = kind(word)
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {word}")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"must be above {above}, got {word}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {word}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its own errors
    return parse


natural = number(int, least=1)
seed = number(int, least=0)


def started_module() -> str | None:
    """The module that `python -m` started, None for a file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None and spec.origin == sys.argv[0] else None


def program_name() -> str:
    """What messages call this program: its file, or `python -m` and the module, which has no better name than
    `__main__.py`."""
    module = started_module()
    return Path(sys.argv[0]).name if module is None else f"python -m {module}"


def program_words() -> list[str]:
    """What started this program, without its options, as results record it."""
    if sys.argv[0].startswith("flash-hf "):  # see commands
        return sys.argv[0].split()
    module = started_module()
    return ["python", os.path.relpath(sys.argv[0])] if module is None else ["python", "-m", module]


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main`, end with the code that it returns, and tell a mistake of the user in one sentence."""
    program = program_name()
    speak_utf8()
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        sentence = None if os.environ.get("FLASH_TRACEBACK") else explain(error)
        if sentence is None:
            raise
        print(f"{program}: {sentence}", file=sys.stderr)
        code = 1
    if code is not None:
        sys.exit(code)


def speak_utf8() -> None:
    """Read UTF-8 from stdin and write it into pipes and files, whatever the locale is. A terminal keeps its encoding,
    and shows a question mark for what that lacks."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            terminal = stream is sys.stdout and stream.isatty()
            stream.reconfigure(**({"errors": "replace"} if terminal else {"encoding": "utf-8"}))


def explain(error: BaseException) -> str | None:
    """An error that is the user's to mend, as one line; None for a fault of the code."""
    cause = error
    while cause is not None:  # transformers wraps what its lazy imports raise
        module = (getattr(cause, "name", None) or "").partition(".")[0]
        if isinstance(cause, ModuleNotFoundError) and module in EXTRAS:
            return f"The package {module} is missing: pip install 'flash-hf[{EXTRAS[module]}]'"
        cause = cause.__cause__
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else str(error)
    if isinstance(error, (ValueError, OSError, ImportError, StrictDataclassError)) and is_deliberate(error):
        return " ".join(str(error).split())
    return None


def is_deliberate(error: BaseException) -> bool:
    """Whether the error comes from a `raise` statement of one of `SPEAKERS`."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    package = place.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package in SPEAKERS and place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


# --- what options name -----------------------------------------------------------------------------------------------


def load_named(load: Callable, source: str | Path, /, *, option: str, **options) -> Any:
    """`load(source, **options)`, with errors that name the option.

    Args:
        load: `from_pretrained` of a class, or `load_dataset`.
        source: a folder, or a name on the Hub.
        option: where the source comes from, for instance `--model`.

    Raises:
        FileNotFoundError: there is no such folder, and it cannot be a name on the Hub.
        OSError: nor does the Hub, or its cache, give it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return load(str(path), **options)
    if path.is_file():
        raise FileNotFoundError(f"{option} must be a folder or a name on the Hub; {source} is a file.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
        raise FileNotFoundError(f"{option} must be a folder or a name on the Hub; there is no folder {source}.")
    try:
        return load(str(source), **options)
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise OSError(f"{option} {source} is no folder here, and not to be had from the Hub: {reason}") from error


def find_device(name: str | None) -> torch.device:
    """The device of that name, checked; None: the accelerator if there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device must be a device of this machine, got {name!r}: {reason}") from error


def read_text(path: str | Path) -> str:
    """The text in a file.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} (0x{error.object[error.start]:02x})"
        raise ValueError(f"{path} must be UTF-8 text; {byte} is not: {error.reason}. Convert it first.") from error


def read_json(path: str | Path, kind: type) -> Any:
    """The value in a JSON file.

    Args:
        kind: the type it must have, dict or list.

    Raises:
        ValueError: it is no JSON, or holds something else.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, but: {error}.") from error
    if not isinstance(value, kind):
        wanted = {dict: "object", list: "list"}[kind]
        raise ValueError(f"{path} must hold a JSON {wanted}, got {type(value).__name__}.")
    return value


__all__ = [
    "EXTRAS", "OptionParser", "explain", "find_device", "load_named", "natural", "number", "program_name",
    "program_words", "read_json", "read_text", "run_command", "seed",
]  # fmt: skip
