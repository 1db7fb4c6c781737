# SPDX-License-Identifier: Apache-2.0
"""The commit, versions and machine of a measurement, and the atomic writing of results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flash_hf.commands.options import started_module


def program_words() -> list[str]:
    """The command that started this program, without its options, to be recorded with results."""
    if sys.argv[0].startswith("flash-hf "):  # set by flash_hf.commands.main
        return sys.argv[0].split()
    module = started_module()
    return ["python", os.path.relpath(sys.argv[0])] if module is None else ["python", "-m", module]


def commit() -> str:
    """The current commit, with `-dirty` if there are changes; `FLASH_COMMIT` takes precedence over git."""
    if given := os.environ.get("FLASH_COMMIT"):
        return given

    def git(*command: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, encoding="utf-8", check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The name of the CPU; on Linux from /proc, which is more precise than `platform`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def provenance() -> dict:
    """Versions, commit and machine of a measurement; `FLASH_COMMIT` takes precedence over git."""
    names = ("torch", "transformers", "datasets", "evaluate", "accelerate", "tokenizers", "numpy")
    versions = {"python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    commit = os.environ.get("FLASH_COMMIT") or None
    if commit is None:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        try:
            commit = subprocess.run(git, capture_output=True, encoding="utf-8", timeout=20).stdout.strip() or None
        except OSError:
            commit = None
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return {"versions": versions, "commit": commit, "machine": machine}


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a file atomically, so that an interrupted result does not look complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    os.replace(part, path)


__all__ = ["commit", "processor", "provenance", "triton_version", "write_json"]
