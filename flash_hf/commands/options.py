# SPDX-License-Identifier: Apache-2.0
"""What all commands share: option parsing, and errors in one sentence.

A user error ends with one sentence on stderr and exit code 2 (an option that does not exist or cannot be parsed) or 1
(a value that cannot be used). Bugs keep their traceback, as does every error under `FLASH_TRACEBACK=1`.
"""

import argparse
import difflib
import dis
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_flash import FlashConfig


# Module: the extra in setup.cfg that installs it.
EXTRAS = {
    "accelerate": "train", "datasets": "train", "evaluate": "train", "matplotlib": "train", "psutil": "train",
    "tqdm": "train", "yaml": "train", "lm_eval": "eval", "gradio": "demo", "sentence_transformers": "embed",
}  # fmt: skip

# Packages whose own `raise` statements report user errors; the same exceptions from elsewhere are bugs.
REPORTING = {"__main__", "accelerate", "datasets", "flash_hf", "huggingface_hub", "scripts", "torch", "transformers"}


class OptionParser(argparse.ArgumentParser):
    """A parser without abbreviations that suggests the nearest option and reports errors in one line on stderr."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, "prog": program_name(), **kwargs})

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for place, word in enumerate(args[: args.index("--")] if "--" in args else args):
            name, equals, value = word.partition("=")
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                if (underscored := "--" + name[2:].replace("-", "_")) not in self._option_string_actions:
                    # Before argparse reports missing options: a misspelt one may be required.
                    self.error(self.unknown_option(name))
                args[place] = underscored + equals + value
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # HfArgumentParser raises instead
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def unknown_option(self, name: str) -> str:
        """The error message for an option that does not exist."""
        name = name.removeprefix("--")
        field = name.replace("-", "_")
        known = {option[2:] for option in self._option_string_actions if option.startswith("--")}
        if "config_overrides" in known and field in FlashConfig.__dataclass_fields__:
            return (
                f"--{name} is a field of FlashConfig, not an option: use --config_overrides {field}=VALUE, or in a "
                "file for --config its entry model_config."
            )
        near = difflib.get_close_matches(field, known, n=1)
        cure = f"Did you mean --{near[0]}?" if near else "--help lists the options."
        return f"There is no option --{name}. {cure}"

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type, *, least: float | None = None, above: float | None = None, most: float | None = None):
    """A `type` for `add_argument`: an int or float within bounds."""

    def parse(word: str) -> int | float:
        value = kind(word)
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {word}")
        if above is not None and not value > above:
            raise argparse.ArgumentTypeError(f"must be above {above}, got {word}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {word}")
        return value

    parse.__name__ = kind.__name__  # appears in argparse's errors
    return parse


natural = number(int, least=1)
seed = number(int, least=0, most=2**32 - 1)  # as numpy takes


def started_module() -> str | None:
    """The module that `python -m` started; None if a file was started."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None and spec.origin == sys.argv[0] else None


def program_name() -> str:
    """The name of this program in messages: its file name, or `python -m MODULE`."""
    module = started_module()
    return Path(sys.argv[0]).name if module is None else f"python -m {module}"


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its return code; report user errors in one sentence."""
    program = program_name()
    use_utf8()
    try:
        code = main()
        leave_processes()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
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


def leave_processes() -> None:
    """End a distributed run in order: while the interpreter ends, threads of its connections can abort the process."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def use_utf8() -> None:
    """Use UTF-8 for stdin and for stdout to pipes and files, whatever the locale. A terminal keeps its encoding and
    shows a question mark for characters that it lacks."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            terminal = stream is sys.stdout and stream.isatty()
            stream.reconfigure(**({"errors": "replace"} if terminal else {"encoding": "utf-8"}))


def explain(error: BaseException) -> str | None:
    """A user error as one line; None for a bug."""
    cause = error
    while cause is not None:  # transformers wraps the errors of its lazy imports
        module = (getattr(cause, "name", None) or "").partition(".")[0]
        if isinstance(cause, ModuleNotFoundError) and module in EXTRAS:
            return f"The package {module} is missing: pip install 'flash-hf[{EXTRAS[module]}]'"
        cause = cause.__cause__
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else str(error)
    reported = isinstance(error, (ValueError, OSError, ImportError, RuntimeError, StrictDataclassError))
    return " ".join(str(error).split()) if reported and is_deliberate(error) else None


def is_deliberate(error: BaseException) -> bool:
    """Whether the error comes from a `raise` statement in one of the `REPORTING` packages."""
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    package = place.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    return package in REPORTING and place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def find_device(name: str | None) -> torch.device:
    """The device named by `--device`; None selects the accelerator if there is one, else the CPU."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device must be a device of this machine, got {name!r}: {reason}") from error
