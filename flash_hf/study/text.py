# SPDX-License-Identifier: Apache-2.0
"""Text of the study: one tokenizer, and each corpus as one row of tokens that fits a file to carry along.

Machines that train need numpy and torch alone: `datasets` and `tokenizers` are used where the tokens are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


CORPORA = ("books", "wiki")
IGNORE = -100
# BERT's recipe, as data.MaskingCollator has it: of the chosen tokens, 80 % are hidden, 10 % exchanged, 10 % kept.
MASKED, HIDDEN, EXCHANGED = 0.15, 0.8, 0.5


def prepare(data: Path, folder: Path, *, vocab_size: int, max_tokens: int, max_valid_tokens: int) -> dict:
    """Train a tokenizer on both corpora and write `{corpus}_{train,valid}.npy` and `text.json` into `folder`.

    Documents are shuffled, written with `<|endoftext|>` between them, and cut at `max_tokens`.

    Args:
        data: folder with `{corpus}_{train,valid}.jsonl.xz`; or one text file, whose last tenth then is for validation,
            for both corpora: to try the study out.
    """
    from .. import data as flash_data

    if data.is_file():
        parts = flash_data.split_documents(flash_data.load_documents(data, sample_by="paragraph"), 0.1)
        rows = {f"{corpus}_{part}": parts[part == "valid"] for corpus in CORPORA for part in ("train", "valid")}
    else:
        rows = {
            f"{corpus}_{part}": flash_data.load_documents(data / f"{corpus}_{part}.jsonl.xz").shuffle(seed=0)
            for corpus in CORPORA
            for part in ("train", "valid")
        }
    folder.mkdir(parents=True, exist_ok=True)
    sample = [row for corpus in CORPORA for row in _until(rows[f"{corpus}_train"], 10_000_000)]
    tokenizer = flash_data.train_tokenizer(sample, vocab_size, max_bytes=20_000_000)
    tokenizer.save_pretrained(folder / "tokenizer")
    facts = {"vocab_size": len(tokenizer), "end": tokenizer.eos_token_id, "mask": tokenizer.mask_token_id}
    for name, documents in rows.items():
        limit = max_tokens if name.endswith("train") else max_valid_tokens
        stream, size = [], {"documents": 0, "tokens": 0, "bytes": 0, "words": 0}
        for document in documents:
            if size["tokens"] >= limit:
                break
            ids = [facts["end"], *tokenizer(document["text"], add_special_tokens=False, verbose=False)["input_ids"]]
            stream.append(np.asarray(ids, np.uint16))
            size["documents"] += 1
            size["tokens"] += len(ids)
            size["bytes"] += len(document["text"].encode())
            size["words"] += len(document["text"].split())
        tokens = np.concatenate(stream)[:limit]
        # The last document may be cut: its bytes and words go down in proportion.
        share = len(tokens) / size["tokens"]
        size |= {"tokens": len(tokens), "bytes": round(size["bytes"] * share), "words": round(size["words"] * share)}
        np.save(folder / f"{name}.npy", tokens)
        facts[name] = size
    (folder / "text.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _until(documents, max_bytes: int) -> Iterator[dict]:
    for document in documents:
        yield document
        max_bytes -= len(document["text"].encode())
        if max_bytes <= 0:
            return


@dataclass(frozen=True)
class Stream:
    """A corpus as rows of `context` tokens, cut one after the other; documents run on from row to row.

    Attributes:
        tokens: int32 `[T]`, on the device that trains.
        mask_id: None for causal rows, whose labels are the next tokens; otherwise the id that hides a token.
    """

    tokens: Tensor
    context: int
    vocab_size: int
    mask_id: int | None = None

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def order(self, seed: int) -> np.ndarray:
        """All rows in a random order."""
        return np.random.default_rng(seed).permutation(len(self))

    def batch(self, rows: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and, at the same places, labels, int64 `[rows, context]`; `seed` draws the masks."""
        device = self.tokens.device
        begin = torch.from_numpy(rows * self.context).to(device, non_blocking=True)
        ids = self.tokens[begin[:, None] + torch.arange(self.context + 1, device=device)].long()
        inputs, following = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if self.mask_id is None:
            return inputs, following
        # Drawn on the CPU, whatever the device: the same masks everywhere.
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(3, *inputs.shape, generator=generator).to(device)
        other = torch.randint(self.vocab_size, inputs.shape, generator=generator).to(device)
        chosen = draw[0] < MASKED
        labels = torch.where(chosen, inputs, IGNORE)
        hidden = chosen & (draw[1] < HIDDEN)
        exchanged = chosen & ~hidden & (draw[2] < EXCHANGED)
        return torch.where(hidden, self.mask_id, torch.where(exchanged, other, inputs)), labels


def load_stream(
    folder: Path, corpus: str, part: str, context: int, *, causal: bool, device: str = "cpu", limit: int | None = None
) -> Stream:
    """The rows of `{corpus}_{part}.npy`, of its first `limit` tokens if given.

    Raises:
        FileNotFoundError: the text has not been prepared.
    """
    if not (folder / "text.json").is_file():
        raise FileNotFoundError(f"study: no tokens in {folder}. Make them with --prepare DATA.")
    facts = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    tokens = np.load(folder / f"{corpus}_{part}.npy", mmap_mode="r")[:limit]
    tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
    return Stream(tokens, context, facts["vocab_size"], None if causal else facts["mask"])


__all__ = ["CORPORA", "IGNORE", "Stream", "load_stream", "prepare"]
