# SPDX-License-Identifier: Apache-2.0
"""Checks of output folders and of checkpoints to resume from."""

import json
import shutil
import tempfile
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .stream import STREAM_STATE


logger = logging.get_logger(__name__)


def check_output_dir(output_dir: str | Path, *, overwrite: bool = False, resume: Path | None = None) -> None:
    """Make the output folder; OSError unless it can be written to, and holds no run but one to resume or overwrite."""
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


def is_complete(folder: Path, *, streaming: bool = False) -> bool:
    """Whether a folder is a checkpoint to resume from, with the state of a stream if `streaming`. Trainer writes its
    own state after all other files."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # No random state: output_dir itself, or save_only_model.
    return any(folder.glob("rng_state*.pth")) and (not streaming or (folder / STREAM_STATE).is_file())


def find_checkpoint(
    resume_from_checkpoint: str | None, output_dir: str | Path, *, streaming: bool = False
) -> Path | None:
    """The checkpoint to resume from: a folder, or `"last"` (also `"true"`) for the last complete one in `output_dir`;
    ValueError, with a list of these, for an incomplete one."""
    if resume_from_checkpoint is None:
        return None
    folder, last = Path(resume_from_checkpoint), str(resume_from_checkpoint).lower() in ("last", "true")
    if not last and is_complete(folder, streaming=streaming):
        return folder
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit()]
    found = sorted(found, key=lambda path: int(path.name[11:]))
    complete = [path for path in found if is_complete(path, streaming=streaming)]
    if last and complete:
        return complete[-1]
    raise ValueError(
        f"resume_from_checkpoint must be a complete checkpoint of this training, or 'last' for the last one in "
        f"output_dir, got {str(resume_from_checkpoint)!r}. Complete checkpoints in {output_dir}: "
        f"{', '.join(map(str, complete)) or 'none'}."
    )


def delete_checkpoints(output_dir: str | Path) -> None:
    """Delete the checkpoints of an earlier run, which `--resume_from_checkpoint last` might resume."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if (folder / "trainer_state.json").is_file():
            logger.warning(f"Deleting {folder} of an earlier run.")
            shutil.rmtree(folder)
