# SPDX-License-Identifier: Apache-2.0
"""Shuffled blocks of tokens from a stream of documents, resumed exactly and without reading it from the start.

`datasets` saves its position in a stream, but not what a `map` or a shuffle buffer holds at that moment. So both are
done here in a way that needs no saved contents: documents are tokenized in batches, blocks are shuffled in windows,
and the state names the batch and the window to begin with. Those two are read again, which takes seconds.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from datasets import IterableDataset
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .packing import Packer, Packing, packing_options
from .tokenizer import tokenize_texts


logger = logging.get_logger(__name__)

STREAM_STATE = "stream_state.json"  # a file of each checkpoint

BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 20, 256  # tokenized together: enough to keep all cores busy
PLAIN_WINDOW = 64  # blocks read ahead without shuffling


class BlockStream(torch.utils.data.IterableDataset):
    """Shuffled blocks of [`Packer`] from a stream of documents, without end: after the last document it starts over.

    Windows of `shuffle_buffer` blocks are shuffled one by one, with random numbers from (seed, number of the window).
    A thread reads the next window while the current one is used, so iterate in the training process, not in a worker.
    `datasets` retries lost connections for about nine minutes.

    Args:
        documents: rows with the column `text`.
        shuffle_buffer: blocks per window; 0 keeps the order of the stream.
        source: name of the stream in messages and in its state.

    Raises:
        ValueError: block_size below 2, an unknown packing; while reading: no text at all.
        ConnectionError: while reading: the network is lost.
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
        source: str = "the data set",
    ):
        self.documents, self.tokenizer = documents, tokenizer
        self.options = packing_options(tokenizer, block_size=block_size, causal=causal, packing=packing)
        self.shuffle_buffer, self.seed, self.source = shuffle_buffer, seed, source
        self.settings = {**self.options, "shuffle_buffer": shuffle_buffer, "seed": seed, "source": source}
        self._begin = {
            "rows": 0, "offset": 0, "window": 0, "pass": 0, "documents": None, "skip": 0,
            "packer": Packer(**self.options).state_dict(),
        }  # fmt: skip
        self._windows_given: deque[dict] = deque()

    @property
    def first_row(self) -> int:
        """The row that iteration begins with: 0, or as set by [`load_state_dict`]."""
        return self._begin["rows"] + self._begin["offset"]

    def state_at(self, rows: int) -> dict:
        """The state after `rows` rows, counted from the start of the stream, as JSON types.

        Loaders fetch ahead, so more rows may have been iterated, but not fewer. `rows` must never decrease.
        """
        windows = self._windows_given
        while len(windows) > 1 and windows[1]["rows"] <= rows:
            windows.popleft()
        state = windows[0] if windows else self._begin
        return {**state, "offset": rows - state["rows"], "settings": self.settings}

    def load_state_dict(self, state: dict) -> None:
        """Begin the next iteration where [`state_at`] returned this state; ValueError if the settings differ."""
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                raise ValueError(
                    f"The checkpoint's stream was read with {name}={state['settings'][name]!r}, this one with "
                    f"{value!r}: it would continue elsewhere. Resume with the arguments the run began with."
                )
        self._begin = {name: value for name, value in state.items() if name != "settings"}
        self._windows_given.clear()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        self._windows_given.clear()
        windows, offset = self._windows(), self._begin["offset"]
        with ThreadPoolExecutor(1, thread_name_prefix="flash-stream") as reader:
            upcoming = reader.submit(next, windows)
            while True:
                try:
                    begin, rows = upcoming.result()
                except (ConnectionError, HfHubHTTPError) as error:
                    raise ConnectionError(
                        f"{self.source} could not be read: {error}. Saved checkpoints are complete: when the network "
                        "is back, resume with --resume_from_checkpoint last."
                    ) from error
                upcoming = reader.submit(next, windows)
                self._windows_given.append(begin)
                yield from rows[offset:]
                offset = 0

    def _windows(self) -> Iterator[tuple[dict, list[dict]]]:
        """Shuffled windows, each with the state of the stream at its beginning."""
        size, number, given = self.shuffle_buffer or PLAIN_WINDOW, self._begin["window"], self._begin["rows"]
        blocks = self._blocks()
        while True:
            states, rows = zip(*(next(blocks) for _ in range(size)), strict=True)
            begin = {**states[0], "rows": given, "window": number, "offset": 0}
            if self.shuffle_buffer:
                rows = [rows[i] for i in np.random.default_rng([self.seed, number]).permutation(size)]
            yield begin, list(rows)
            number, given = number + 1, given + size

    def _blocks(self) -> Iterator[tuple[dict, dict]]:
        """Blocks in order, each with its state: batch of documents, tokens left from earlier ones, blocks to skip."""
        packer, skip = Packer(**self.options), self._begin["skip"]
        packer.load_state_dict(self._begin["packer"])
        for state, texts in self._batches():
            state["packer"] = packer.state_dict()
            _, ids = tokenize_texts(texts, self.tokenizer)
            blocks = [block for row in ids for block in packer.add(row)]
            for index in range(skip, len(blocks)):
                yield {**state, "skip": index}, blocks[index]
            skip = 0

    def _batches(self) -> Iterator[tuple[dict, list[str | None]]]:
        """Batches of texts, pass after pass, each with the position of its first document."""
        state, found = self._begin["documents"], self._begin["documents"] is not None
        for number in itertools.count(self._begin["pass"]):
            # A saved state is only valid for its own epoch; without one, the epoch starts from the beginning.
            self.documents.set_epoch(number)
            if state is not None:
                self.documents.load_state_dict(state)
            texts, size = [], 0
            for document in itertools.chain(self.documents, [None]):
                if document is not None:
                    texts.append(document["text"])
                    size += len(texts[-1] or "")
                if size >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS or texts and document is None:
                    found = found or any(text and text.strip() for text in texts)
                    yield {"pass": number, "documents": state}, texts
                    state, texts, size = self.documents.state_dict(), [], 0
            if not found:
                raise ValueError(f"{self.source} has no text: every document is empty or blank.")
            state = None
            logger.info(f"{self.source} has been read {number + 1} time(s).")
