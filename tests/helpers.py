# SPDX-License-Identifier: Apache-2.0
"""What test files share: places, text, small models, and ways to run scripts."""

import ast
import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from scripts.benchmark.tiny import error_ratio, make_model, naive_config, random_ids, tiny_config


ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
BOOK = DATA / "wizard_of_oz.txt"
TEXT = BOOK.read_text(encoding="utf-8")
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "query_key_dim": 16, "chunk_size": 16}
OVERRIDES = ",".join(f"{name}={value}" for name, value in TINY.items())  # for --config_overrides


def assert_close(actual: Tensor, expected: Tensor, ratio: float, what: str = "result") -> None:
    """Fail unless shapes agree and the error ratio is at most `ratio`."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = error_ratio(actual, expected)
    assert error <= ratio, f"{what}: error ratio {error:.3g} exceeds {ratio:.3g}"


def write_documents(path: Path, begin: int, end: int, length: int) -> None:
    """Write the book from character `begin` to about `end` as JSON lines, `length` characters per document."""
    rows = [{"text": TEXT[i : i + length]} for i in range(begin, end, length)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def first_line(script: str) -> list[str]:
    """The command in the first line of the docstring of a script, `NAME.py` or `scripts.NAME`, without `python`."""
    module = script.startswith("scripts.")
    source = ROOT / script.replace(".", "/") if module else ROOT / "scripts" / script
    source = source / "__main__.py" if source.is_dir() else source.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    python, *command = shlex.split(docstring.splitlines()[0])
    assert python == "python" and command[: 1 + module] == (["-m", script] if module else [f"scripts/{script}"])
    return command


def history(folder: Path, key: str = "loss") -> dict[int, float]:
    """`key` by step, from the log of a training run."""
    log = json.loads((folder / "log_history.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry[key] for entry in log if key in entry}


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def run_here(*words: object) -> None:
    """What `python WORDS` does, in this process and folder: `-m scripts.NAME ...` or `scripts/NAME.py ...`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, words)))
        if words[0] == "-m":
            del sys.argv[0]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def run_python(*words: object, cwd: Path = ROOT, **environment: str | None) -> subprocess.CompletedProcess:
    """Run `python WORDS` in a new process that finds this tree's package and has no network, no GPU and one thread.

    `environment` sets variables; None removes one. Fails with the end of the output unless the process exits with 0.
    Each process takes about five seconds, most of them for imports: `run_here` does without one.
    """
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    defaults = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    variables = {**os.environ, **defaults, **environment}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, encoding="utf-8", timeout=600,
        env={name: value for name, value in variables.items() if value is not None},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done


__all__ = [
    "BOOK", "DATA", "OVERRIDES", "ROOT", "TEXT", "TINY", "Trap", "assert_close", "error_ratio", "first_line",
    "history", "make_model", "naive_config", "random_ids", "run_here", "run_python", "tiny_config", "write_documents",
]  # fmt: skip
