# SPDX-License-Identifier: Apache-2.0
"""The `flash-hf` command. In a clone, scripts/ has the same commands and more."""

import sys
from importlib import import_module

from .. import __version__
from ..configuration_flash import nearest
from .options import run_command


# Name: module, function, and one line of help.
COMMANDS = {
    "train-clm": ("train", "train_clm", "train or continue a causal language model on text"),
    "train-mlm": ("train", "train_mlm", "train or continue a masked language model on text"),
    "generate": ("generate", "main", "continue a text with a causal model"),
    "serve": ("serve", "main", "serve a causal model over HTTP with transformers serve"),
    "convert": ("convert", "main", "convert a checkpoint of another FLASH implementation"),
    "demo": ("demo", "main", "open a page in the browser: continue text, fill masks, look inside"),
    "env": ("env", "main", "print versions, backend and a self-test, for bug reports"),
}


def usage() -> str:
    lines = "\n".join(f"  {name:<10} {words}" for name, (_, _, words) in COMMANDS.items())
    return f"usage: flash-hf COMMAND [OPTIONS]\n\n{lines}\n\nOptions of a command: flash-hf COMMAND --help"


def main() -> None:
    """The console script."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"flash-hf {__version__}")
        return
    if name not in COMMANDS:
        if name is not None:
            print(f"flash-hf: there is no command {name!r}.{nearest(name, tuple(COMMANDS))}\n", file=sys.stderr)
        print(usage(), file=sys.stderr)
        sys.exit(2)
    module, function, _ = COMMANDS[name]
    sys.argv[:2] = [f"flash-hf {name}"]  # the name in messages and results
    run_command(lambda: getattr(import_module(f".{module}", __name__), function)())


__all__ = ["COMMANDS", "main"]
