# SPDX-License-Identifier: Apache-2.0
"""Packing tokenized documents into blocks, and collating blocks into batches."""

import zlib
from collections.abc import Iterable
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, Features, Sequence, Value
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, default_data_collator

from ..loss_flash import IGNORE
from .tokenizer import document_end, document_start


Packing = Literal["concatenate", "documents"]

PACKING_VERSION = 1  # raise it when `Packer` changes: `datasets` would reuse blocks from its cache


class Packer:
    """Cut documents into blocks of exactly `block_size` tokens, without dropping any.

    A document becomes start token, text, end token. With `"concatenate"`, an end token that equals the start token
    appears once between two documents. With `"documents"`, `position_ids` restart at 0 at each document, so that
    attention and state stay within it; a document that exceeds its block continues as a new one in the next block.

    Causal blocks overlap by one token: the last one of a block is the first one, not predicted, of the next. So every
    token after the first is predicted exactly once (with `"documents"`, every token but the first of each document).
    Masked blocks do not overlap. The last block is padded on the right, with `attention_mask` 0 and label -100.

    A block has `input_ids`, `attention_mask`, `labels` if causal (equal to `input_ids`, since the model shifts them;
    the collator makes those of masked models) and `position_ids` for `"documents"`, all int `[block_size]`.

    Between two documents the packer holds at most one block of tokens, which is its state.
    """

    def __init__(self, *, block_size: int, causal: bool, packing: Packing, start_id: int, end_id: int, pad_id: int):
        self.block_size, self.causal, self.borders = block_size, causal, packing == "documents"
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.ids, self.first, self.begun = np.empty(0, np.int32), np.empty(0, bool), False

    def add(self, input_ids: Iterable[int]) -> list[dict[str, np.ndarray]]:
        """Add a document (tokens without start and end) and return the blocks that it completes."""
        shared = not self.borders and self.start_id == self.end_id and self.begun
        piece = np.concatenate([[] if shared else [self.start_id], input_ids, [self.end_id]]).astype(np.int32)
        self.ids = np.concatenate([self.ids, piece])
        self.first = np.concatenate([self.first, np.arange(len(piece)) == 0])
        self.begun = True
        blocks, begin = [], 0
        # Wait for one token more than a block: if it starts a document, no token has to be repeated.
        while len(self.ids) - begin > self.block_size:
            end = begin + self.block_size
            blocks.append(self._block(begin, end))
            begin = end - (1 if self.causal and not (self.borders and self.first[end]) else 0)
        self.ids, self.first = self.ids[begin:], self.first[begin:]
        return blocks

    def rest(self) -> list[dict[str, np.ndarray]]:
        """The remaining tokens as one padded block, or no block."""
        return [self._block(0, len(self.ids))] if len(self.ids) else []

    def state_dict(self) -> dict:
        """The remaining tokens, as JSON types."""
        return {"ids": self.ids.tolist(), "starts": np.flatnonzero(self.first).tolist(), "begun": self.begun}

    def load_state_dict(self, state: dict) -> None:
        """Restore a [`state_dict`]."""
        self.ids, self.begun = np.array(state["ids"], np.int32), state["begun"]
        self.first = np.isin(np.arange(len(self.ids)), state["starts"])

    def _block(self, begin: int, end: int) -> dict[str, np.ndarray]:
        tokens, starts = self.ids[begin:end], self.first[begin:end].copy()
        starts[0] = True
        fill = (0, self.block_size - len(tokens))
        row = {
            "input_ids": np.pad(tokens, fill, constant_values=self.pad_id),
            "attention_mask": np.pad(np.ones(len(tokens), np.int8), fill),
        }
        if self.causal:
            unpredicted = starts if self.borders else np.arange(len(tokens)) == 0
            row["labels"] = np.pad(np.where(unpredicted, IGNORE, tokens), fill, constant_values=IGNORE)
        if self.borders:
            index = np.arange(len(tokens), dtype=np.int32)
            row["position_ids"] = np.pad(index - np.maximum.accumulate(np.where(starts, index, 0)), fill)
        return row


def packing_options(
    tokenizer: PreTrainedTokenizerBase, *, block_size: int, causal: bool, packing: Packing
) -> dict[str, int | bool | str]:
    """Checked arguments of [`Packer`] for a tokenizer."""
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 (one token to see, one to predict), got {block_size}.")
    if packing not in ("concatenate", "documents"):
        raise ValueError(f"packing must be 'concatenate' or 'documents', got {packing!r}.")
    end_id, pad_id = document_end(tokenizer), tokenizer.pad_token_id
    return {
        "block_size": block_size,
        "causal": causal,
        "packing": packing,
        "start_id": document_start(tokenizer),
        "end_id": end_id,
        "pad_id": pad_id if pad_id is not None else end_id,  # any id: padding is masked
    }


def pack_documents(
    tokenized: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    causal: bool,
    packing: Packing = "concatenate",
) -> Dataset:
    """The blocks of [`Packer`] for a whole data set, cached on disk. For streams see [`BlockStream`].

    Raises:
        ValueError: block_size below 2, an unknown packing, no text at all.
    """
    options = packing_options(tokenizer, block_size=block_size, causal=causal, packing=packing)
    if not len(tokenized):
        raise ValueError("The data set has no text: every document is empty or blank.")
    row = Sequence(Value("int32"), length=block_size)
    names = ["input_ids"] + ["labels"] * causal + ["position_ids"] * (packing == "documents")
    features = Features({**dict.fromkeys(names, row), "attention_mask": Sequence(Value("int8"), length=block_size)})
    packer, last = Packer(**options), len(tokenized) - 1

    def pack(batch: dict, indices: list[int], version: int = PACKING_VERSION) -> dict:
        """Tokens left over from a batch go into the next one. One array per column: `datasets` would turn every
        number of single blocks into an object."""
        blocks = [block for ids in batch["input_ids"] for block in packer.add(np.asarray(ids, np.int32))]
        if indices[-1] == last:
            blocks += packer.rest()
        return {name: np.stack([block[name] for block in blocks]) if blocks else [] for name in features}

    ids = tokenized.select_columns(["input_ids"]).with_format("numpy")
    options = {"with_indices": True, "batched": True, "batch_size": 32}  # documents may be whole books
    blocks = ids.map(pack, **options, remove_columns=["input_ids"], features=features, desc="Pack")
    return blocks.with_format(None)


def cut_rows(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Cut each row of a batch of blocks, `[B, N]` each, into independent rows of `length` tokens, a divisor of N:
    `[B * N / length, length]` each, whose `position_ids` also restart at the beginning of each row."""
    cut = {name: values.reshape(-1, length) for name, values in batch.items()}
    if "position_ids" in cut:
        index = torch.arange(length, device=cut["position_ids"].device).expand_as(cut["position_ids"])
        starts = torch.where(cut["position_ids"] == 0, index, 0)
        cut["position_ids"] = index - starts.cummax(-1).values
    return cut


def collate(examples: list[dict]) -> dict:
    """`default_data_collator`, but without an attention mask of ones: FLASH then forms chunks by a plain reshape."""
    # Blocks of a stream are int32; losses need int64.
    batch = {name: values.long() for name, values in default_data_collator(examples).items()}
    if "attention_mask" in batch and bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    return batch


class MaskingCollator(DataCollatorForLanguageModeling):
    """BERT's masking from transformers, with random numbers that depend on (seed, epoch, content of the row) alone.

    The base class has one generator for all batches, whose state is not saved in checkpoints, and batches are fetched
    ahead; a resumed run would draw other masks. Here it draws the same ones, as does a run with another number of
    workers, of devices, or of rows per device. Blocks with labels (see [`mask_once`]) are not masked again.

    Attributes:
        epoch: set by a callback of the trainer, so that each epoch masks a row differently.
    """

    def __post_init__(self):
        super().__post_init__()
        # Shared with workers that live for several epochs (dataloader_persistent_workers).
        self._shared_epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._shared_epoch)

    @epoch.setter
    def epoch(self, number: int) -> None:
        self._shared_epoch.fill_(number)

    def torch_mask_tokens(self, inputs: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """As in the base class, but with random tokens from the tokenizer's ids, which may have gaps, instead of from
        all numbers below `len(tokenizer)`."""
        before = inputs.clone()
        inputs, labels = super().torch_mask_tokens(inputs, *args, **kwargs)
        if len(self.sorted_ids) < int(self.sorted_ids[-1]) + 1:
            exchanged = (inputs != before) & (inputs != self.tokenizer.mask_token_id)
            inputs[exchanged] = self.sorted_ids[inputs[exchanged]]
        return inputs, labels

    @cached_property
    def sorted_ids(self) -> Tensor:
        return torch.tensor(sorted(set(self.tokenizer.get_vocab().values())))

    def torch_call(self, examples: list[dict]) -> dict:
        if "labels" in examples[0]:
            return collate(examples)
        batch = collate(examples)
        start, rows = zlib.crc32(f"{self.seed} {self.epoch}".encode()), []
        for row in batch["input_ids"]:
            self.generator = self.get_generator(zlib.crc32(row.numpy().astype(np.int32).tobytes(), start))
            rows.append(self.torch_mask_tokens(row[None]))
        self.generator = None  # torch does not send generators to workers that are spawned
        batch["input_ids"], batch["labels"] = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return batch

    def mask_once(self, blocks: Dataset) -> Dataset:
        """Mask an evaluation set once and for all, so that all evaluations use the same masks."""

        def mask(batch: dict) -> dict:
            masked = self.torch_call([{"input_ids": row} for row in batch["input_ids"]])
            return {name: masked[name].numpy() for name in ("input_ids", "labels")}

        return blocks.map(mask, batched=True, batch_size=64, desc="Mask once")
