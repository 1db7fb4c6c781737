"""Loads the questions beside this file; `data_files` of a task would be relative to the working directory."""

from pathlib import Path

from datasets import DatasetDict, load_dataset


def load(name: str, **metadata) -> DatasetDict:
    """The questions of a task, as the split `test`."""
    return load_dataset("json", data_files={"test": str(Path(__file__).resolve().parent / f"{name}.jsonl")})
