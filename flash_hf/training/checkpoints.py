# SPDX-License-Identifier: Apache-2.0
"""Output folders and checkpoints: checked before anything is written or resumed."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from .stream import STREAM_STATE


logger = logging.get_logger(__name__)


def check_output_dir(output_dir: str | Path, *, overwrite: bool = False, resume: Path | None = None) -> None:
    """See that results can be saved, and that no earlier ones are in the way.

    Raises:
        FileExistsError: the folder holds an earlier run that is neither resumed nor to be overwritten.
        OSError: it cannot be made or written to.
    """
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Trying is the only sure test: permission bits say nothing to root, on read-only mounts, or on full disks.
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"flash")
            file.flush()
    except OSError as error:
        raise type(error)(
            f"output_dir {output_dir} must be a folder that can be written to, but: {error}. Choose another one."
        ) from error
    resumed_here = resume is not None and resume.resolve().is_relative_to(output_dir.resolve())
    if not overwrite and not resumed_here and any(output_dir.iterdir()):
        raise FileExistsError(
            f"output_dir {output_dir} must be empty, or an earlier run there would be damaged. Choose another, go on "
            "with --resume_from_checkpoint last, or start anew with --overwrite_output_dir."
        )


def missing_from_checkpoint(folder: Path, *, streaming: bool = False) -> list[str]:
    """What a folder lacks to be a checkpoint that training can go on from; cut-off files count as missing.

    Args:
        streaming: whether it has to know its place in a stream, too.
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
    if not weights and not (folder / "pytorch_model_fsdp_0").is_dir():  # FSDP with a file for each device
        missing.append("model.safetensors")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            missing.append(f"{file.name} (damaged: {error})")
    # The optimizer's other names are those of FSDP, in one file or one a device, and of DeepSpeed.
    optimizer = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
    for patterns in (optimizer, ("scheduler.pt",), ("rng_state*.pth",)):
        files = [file for pattern in patterns for file in folder.glob(pattern)]
        missing.extend([] if files else patterns[:1])
        # A zip file has its table of contents at the end, so one that was cut off is none.
        missing.extend(f"{file.name} (damaged)" for file in files if file.is_file() and not zipfile.is_zipfile(file))
    return missing


def find_checkpoint(
    resume_from_checkpoint: str | None, output_dir: str | Path, *, streaming: bool = False
) -> Path | None:
    """The checkpoint to go on from: a folder, or `"last"` (also `"true"`) for the last whole one of `output_dir`.

    Args:
        streaming: whether the training text is a stream.

    Raises:
        ValueError: it is no checkpoint, or not a whole one; the message says what it lacks and which ones there are.
    """
    if resume_from_checkpoint is None:
        return None
    wants_last = str(resume_from_checkpoint).lower() in ("last", "true")
    folder = Path(output_dir if wants_last else resume_from_checkpoint)
    missing = {}
    for place in (folder, folder.parent, Path(output_dir)):
        found = [path for path in place.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
        found.sort(key=lambda path: int(path.name[11:]))
        missing |= {path: missing_from_checkpoint(path, streaming=streaming) for path in found}
    whole = [path for path, lacks in missing.items() if not lacks]
    if wants_last:
        here = [path for path in missing if path.parent == folder]
        for path in reversed(here):
            if path in whole:
                return path
            logger.warning(f"Skipping the incomplete checkpoint {path}: it lacks {', '.join(missing[path])}.")
        reason = f"no whole checkpoint in {folder}"
    elif not folder.is_dir():
        reason = f"{folder} is not a folder"
    else:
        lacks = missing_from_checkpoint(folder, streaming=streaming)
        if not lacks:
            return folder
        reason = f"{folder} lacks {', '.join(lacks)}"
    raise ValueError(
        f"resume_from_checkpoint={str(resume_from_checkpoint)!r} must be a checkpoint saved by this training, but "
        f"{reason}. Whole checkpoints nearby: {', '.join(map(str, whole)) or 'none'}. Nothing has been changed."
    )
