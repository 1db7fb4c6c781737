# SPDX-License-Identifier: Apache-2.0
"""Checks of output folders and of checkpoints to resume from."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from .stream import STREAM_STATE


logger = logging.get_logger(__name__)


def check_output_dir(output_dir: str | Path, *, overwrite: bool = False, resume: Path | None = None) -> None:
    """Make the output folder, and check that it is writable and holds no other run.

    Raises:
        FileExistsError: the folder holds an earlier run that is neither resumed nor to be overwritten.
        OSError: the folder cannot be made or written to.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Try it: permission bits mean nothing to root, on read-only mounts, or on full disks.
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"flash")
            file.flush()
    except OSError as error:
        raise type(error)(
            f"output_dir {output_dir} must be a folder that can be written to, but: {error}. Choose another one."
        ) from error
    resumed_here = resume is not None and resume.resolve().is_relative_to(output_dir.resolve())
    if not overwrite and not resumed_here and any(output_dir.iterdir()):
        resumable = any(output_dir.glob("checkpoint-*"))
        raise FileExistsError(
            f"output_dir {output_dir} must be empty, to keep what is there. Choose another one, "
            f"{'resume with --resume_from_checkpoint last, ' * resumable}or start over with --overwrite_output_dir."
        )


def missing_from_checkpoint(folder: Path, *, streaming: bool = False) -> list[str]:
    """Files that a folder lacks as a checkpoint to resume from; truncated files count as missing.

    Args:
        streaming: whether a checkpoint needs the state of a stream, too.
    """
    missing = []
    for name in ("trainer_state.json", *([STREAM_STATE] if streaming else [])):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            missing.append(name)
        except ValueError as error:
            missing.append(f"{name} (damaged: {error})")
    weights = list(folder.glob("model*.safetensors"))
    if not weights and not (folder / "pytorch_model_fsdp_0").is_dir():  # FSDP, one file per device
        missing.append("model.safetensors")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            missing.append(f"{file.name} (damaged: {error})")
    # optimizer.pt, or as FSDP saves it in one file or one file per device, or as DeepSpeed does.
    optimizer = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
    for patterns in (optimizer, ("scheduler.pt",), ("rng_state*.pth",)):
        files = [file for pattern in patterns for file in folder.glob(pattern)]
        missing.extend([] if files else patterns[:1])
        # A zip file has its index at the end, so a truncated one is not a zip file.
        missing.extend(f"{file.name} (damaged)" for file in files if file.is_file() and not zipfile.is_zipfile(file))
    return missing


def find_checkpoint(
    resume_from_checkpoint: str | None, output_dir: str | Path, *, streaming: bool = False
) -> Path | None:
    """The checkpoint to resume from: a folder, or `"last"` (also `"true"`) for the last complete one in `output_dir`.

    Args:
        streaming: whether the training text is a stream.

    Raises:
        ValueError: it is not a complete checkpoint; the message lists what it lacks, and the complete ones nearby.
    """
    if resume_from_checkpoint is None:
        return None
    last = str(resume_from_checkpoint).lower() in ("last", "true")
    folder = Path(output_dir if last else resume_from_checkpoint)
    missing = {}
    for place in (folder, folder.parent, Path(output_dir)):
        found = [path for path in place.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
        found.sort(key=lambda path: int(path.name[11:]))
        missing |= {path: missing_from_checkpoint(path, streaming=streaming) for path in found}
    complete = [path for path, lacks in missing.items() if not lacks]
    if last:
        here = [path for path in missing if path.parent == folder]
        for path in reversed(here):
            if path in complete:
                return path
            logger.warning(f"Skipping the incomplete checkpoint {path}: it lacks {', '.join(missing[path])}.")
        reason = f"there is no complete checkpoint in {folder}"
    elif not folder.is_dir():
        reason = f"{folder} is not a folder"
    else:
        lacks = missing_from_checkpoint(folder, streaming=streaming)
        if not lacks:
            return folder
        reason = f"{folder} lacks {', '.join(lacks)}"
    raise ValueError(
        f"resume_from_checkpoint={str(resume_from_checkpoint)!r} must be a checkpoint saved by this training, but "
        f"{reason}. Complete checkpoints nearby: {', '.join(map(str, complete)) or 'none'}. Nothing has been changed."
    )


def delete_checkpoints(output_dir: str | Path) -> None:
    """Delete the checkpoints of an earlier run, which `--resume_from_checkpoint last` might resume."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if (folder / "trainer_state.json").is_file():
            logger.warning(f"Deleting {folder} of an earlier run.")
            shutil.rmtree(folder)
