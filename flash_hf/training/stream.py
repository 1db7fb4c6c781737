# SPDX-License-Identifier: Apache-2.0
"""Blocks of tokens from a stream of documents: shuffled, endless, and resumed in the middle without reading it anew.

`datasets` remembers its place in a stream, but not what a `map` or a shuffle buffer holds at that moment. So those two
are done here, in a way that needs no memory of them: documents are tokenised in batches, blocks are shuffled in
windows, and a state names the batch and the window to begin with. Both are then read again, which costs seconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .packing import Packer, Packing, packing_options
from .tokenizer import tokenize_texts


logger = logging.get_logger(__name__)

STREAM_STATE = "stream_state.json"  # beside the other files of a checkpoint

# A batch of documents is tokenised at once, on all cores; this is enough to keep them busy.
BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 20, 256
PLAIN_WINDOW = 64  # blocks read ahead where nothing is shuffled

# What libraries for the network raise is no OSError in all of them.
NETWORK_LIBRARIES = ("aiohttp", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3")


class BlockStream(torch.utils.data.IterableDataset):
    """Documents in, shuffled blocks of [`Packer`] out, without end: the stream begins again where it ends.

    Windows of `shuffle_buffer` blocks are shuffled one after the other, with random numbers from (seed, number of the
    window). A thread reads the next window while this one is given out, so it is iterated in the training's own
    process and not in a worker's. A lost network is waited for.

    Args:
        documents: rows with the column `text`.
        shuffle_buffer: blocks in a window; 0 keeps the order of the stream.
        patience: seconds to try again for, after the network was lost.
        source: what the stream is called in messages, and in its state.

    Raises:
        ValueError: block_size below 2, an unknown packing; in reading: no text at all.
        ConnectionError: in reading: the network was lost for longer than `patience`.
    """

    def __init__(
        self,
        documents: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        block_size: int,
        causal: bool,
        packing: Packing = "concatenate",
        shuffle_buffer: int = 0,
        seed: int = 0,
        patience: float = 600.0,
        source: str = "the data set",
    ):
        self.documents, self.tokenizer = documents, tokenizer
        self.options = packing_options(tokenizer, block_size=block_size, causal=causal, packing=packing)
        self.shuffle_buffer, self.seed, self.patience, self.source = shuffle_buffer, seed, patience, source
        self.settings = {**self.options, "shuffle_buffer": shuffle_buffer, "seed": seed, "source": source}
        self._begin = {
            "rows": 0, "offset": 0, "window": 0, "pass": 0, "documents": None, "skip": 0,
            "packer": Packer(**self.options).state_dict(),
        }  # fmt: skip
        self._windows_given: deque[dict] = deque()
        self._closed = threading.Event()

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def first_row(self) -> int:
        """The number of the row that iterating begins with: 0, or what [`load_state_dict`] has set."""
        return self._begin["rows"] + self._begin["offset"]

    def state_dict(self, rows: int) -> dict:
        """Where the stream is once `rows` rows are used, counted from its very beginning; for JSON.

        More may have been given out (loaders fetch ahead), but not fewer; `rows` may not go back from call to call.
        """
        windows = self._windows_given
        while len(windows) > 1 and windows[1]["rows"] <= rows:
            windows.popleft()  # nobody will ask for it again
        state = windows[0] if windows else self._begin
        return {**state, "offset": rows - state["rows"], "settings": self.settings}

    def load_state_dict(self, state: dict) -> None:
        """Let the next iteration begin where the stream was that had this state.

        Raises:
            ValueError: it is the state of a stream with other settings.
        """
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"The checkpoint's stream was read with {name}={state['settings'][name]!r}, this one with "
                    f"{value!r}: it would go on elsewhere. Resume with the arguments the run began with."
                )
        self._begin = {name: value for name, value in state.items() if name != "settings"}
        self._windows_given.clear()

    # --- reading -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self._windows_given.clear()
        windows, offset = self._windows(), self._begin["offset"]
        self._closed.clear()
        with ThreadPoolExecutor(1, thread_name_prefix="flash-stream") as reader:
            coming = reader.submit(next, windows)
            try:
                while True:
                    begin, rows = coming.result()
                    coming = reader.submit(next, windows)
                    self._windows_given.append(begin)
                    yield from rows[offset:]
                    offset = 0
            finally:
                self._closed.set()  # the reader may be waiting for the network, and nobody for the reader

    def _windows(self) -> Iterator[tuple[dict, list[dict]]]:
        """Shuffled windows, each with the state of the stream at its beginning."""
        size, number, given = self.shuffle_buffer or PLAIN_WINDOW, self._begin["window"], self._begin["rows"]
        blocks = self._blocks()
        while True:
            places, rows = zip(*(next(blocks) for _ in range(size)), strict=True)
            begin = {**places[0], "rows": given, "window": number, "offset": 0}
            if self.shuffle_buffer:
                rows = [rows[i] for i in np.random.default_rng([self.seed, number]).permutation(size)]
            yield begin, list(rows)
            number, given = number + 1, given + size

    def _blocks(self) -> Iterator[tuple[dict, dict]]:
        """Blocks in their order, each with its place: a batch of documents, what was left before, blocks to skip."""
        packer, skip = Packer(**self.options), self._begin["skip"]
        packer.load_state_dict(self._begin["packer"])
        for place, texts in self._batches():
            place["packer"] = packer.state_dict()
            _, ids = tokenize_texts(texts, self.tokenizer)
            blocks = [block for row in ids for block in packer.add(row)]
            for index in range(skip, len(blocks)):
                yield {**place, "skip": index}, blocks[index]
            skip = 0

    def _batches(self) -> Iterator[tuple[dict, list[str | None]]]:
        """Batches of texts, over and over, each with the place of its first document."""
        number, state = self._begin["pass"], self._begin["documents"]
        while True:
            empty = state is None
            for after, texts in self._one_pass(number, state):
                empty = empty and not any(text and str(text).strip() for text in texts)
                yield {"pass": number, "documents": state}, texts
                state = after
            if empty:
                raise ValueError(f"{self.source} has no text: every document is empty or blank.")
            number, state = number + 1, None
            logger.info(f"{self.source} has been read {number} time(s).")

    def _one_pass(self, number: int, state: dict | None) -> Iterator[tuple[dict | None, list[str | None]]]:
        """Batches to the end of the documents, each with the state after it, opened again if the network fails."""
        lost = None
        while True:
            try:
                # A state is heeded in the pass it was taken in; without one, that of an earlier pass is not.
                self.documents.set_epoch(number)
                if state is not None:
                    self.documents.load_state_dict(state)
                texts, size = [], 0
                for document in self.documents:
                    texts.append(document["text"])
                    size += len(texts[-1] or "") if isinstance(texts[-1], str) else 0
                    if size >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
                        state, lost = self.documents.state_dict(), None
                        yield state, texts
                        texts, size = [], 0
                if texts:
                    yield self.documents.state_dict(), texts
                return
            except Exception as error:
                if not is_network_error(error):
                    raise
                lost = lost or time.monotonic()
                self._wait(error, time.monotonic() - lost)

    def _wait(self, error: Exception, waited: float) -> None:
        """Sleep before the next attempt, longer each time; give up when patience is at an end."""
        if waited >= self.patience:
            raise ConnectionError(
                f"{self.source} could not be read for {waited:.0f} s: {type(error).__name__}: {error}. What was saved "
                "is whole: when the network is back, go on with --resume_from_checkpoint last. (--stream_patience "
                f"{self.patience:g} is how many seconds a lost network is waited for.)"
            ) from error
        pause = min(max(1.0, waited), 60.0, self.patience - waited)
        logger.warning(f"{self.source}: {type(error).__name__}: {error}. Trying again in {pause:.0f} s.")
        if self._closed.wait(pause):
            raise error


def is_network_error(error: BaseException) -> bool:
    """Whether an error, or one behind it, came from the network: waiting may help then."""
    while error is not None:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            return False
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK_LIBRARIES:
            return True
        error = error.__cause__ or error.__context__
    return False


def write_state(state: dict, folder: str | Path) -> None:
    """Write the state of a stream into a checkpoint, whole or not at all."""
    path = Path(folder) / STREAM_STATE
    path.with_suffix(".tmp").write_text(json.dumps(state), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)
