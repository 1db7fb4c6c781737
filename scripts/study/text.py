# SPDX-License-Identifier: Apache-2.0
"""Text of the study: one tokenizer, and each corpus as one array of tokens in a file.

Training reads the files with numpy and torch alone; only their preparation needs `datasets` and `tokenizers`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


CORPORA = ("books", "wiki")
# All training text, shuffled by document, in pieces that can be copied one by one.
MIXED = "mixed"
PIECE_TOKENS = 26_000_000
VALIDATED = {MIXED: CORPORA}  # validation corpora, where these are not the training corpus
IGNORE = -100
# As in BERT and MaskingCollator: of the chosen tokens 80 % are masked, 10 % replaced and 10 % kept.
MASKED, HIDDEN, EXCHANGED = 0.15, 0.8, 0.5


def prepare(data: Path, folder: Path, *, vocab_size: int, max_tokens: int, max_valid_tokens: int) -> dict:
    """Train a tokenizer on both corpora and write `{corpus}_{train,valid}.npy` and `text.json` into `folder`.

    Documents are shuffled, separated by `<|endoftext|>`, and cut at `max_tokens`.

    Args:
        data: Folder with `{corpus}_{train,valid}.jsonl.xz`; or, for trials, one text file for both corpora, the last
            tenth of which is for validation.
    """
    from flash_hf.hub import vocabulary_size
    from flash_hf.training.documents import load_documents, split_documents
    from flash_hf.training.tokenizer import train_tokenizer

    if data.is_file():
        parts = split_documents(load_documents(data, sample_by="paragraph"), 0.1)
        rows = {f"{corpus}_{part}": parts[part == "valid"] for corpus in CORPORA for part in ("train", "valid")}
    else:
        rows = {
            f"{corpus}_{part}": load_documents(data / f"{corpus}_{part}.jsonl.xz").shuffle(seed=0)
            for corpus in CORPORA
            for part in ("train", "valid")
        }
    folder.mkdir(parents=True, exist_ok=True)
    sample = [row for corpus in CORPORA for row in _until(rows[f"{corpus}_train"], 10_000_000)]
    tokenizer = train_tokenizer(sample, vocab_size, max_bytes=20_000_000)
    tokenizer.save_pretrained(folder / "tokenizer")
    facts = {"vocab_size": vocabulary_size(tokenizer), "end": tokenizer.eos_token_id, "mask": tokenizer.mask_token_id}
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
        # The last document may be cut, so bytes and words are scaled in proportion.
        share = len(tokens) / size["tokens"]
        size |= {"tokens": len(tokens), "bytes": round(size["bytes"] * share), "words": round(size["words"] * share)}
        np.save(folder / f"{name}.npy", tokens)
        facts[name] = size
    (folder / "text.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def prepare_mixed(data: Path, folder: Path, *, piece_tokens: int = PIECE_TOKENS, batch: int = 64) -> dict:
    """Write all training text of `data`, `*_train.jsonl.xz` and `*_more.jsonl.xz`, into `folder` as
    `mixed_train_{0,1,...}.npy` of `piece_tokens` tokens each, with the tokenizer of [`prepare`]. Validation uses the
    text of the other corpora.

    Args:
        batch: Documents encoded together.
    """
    from datasets import concatenate_datasets

    from flash_hf.training import load_documents, load_tokenizer

    files = sorted(path for part in ("train", "more") for path in data.glob(f"*_{part}.jsonl.xz"))
    documents = concatenate_datasets([load_documents(path) for path in files]).shuffle(seed=0)
    encoder = load_tokenizer(str(folder / "tokenizer"), masked=True).backend_tokenizer
    facts = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    size = {"documents": len(documents), "tokens": 0, "bytes": 0, "words": 0}
    pieces, waiting = [], np.empty(0, np.uint16)

    def write(tokens: np.ndarray) -> None:
        np.save(folder / f"{MIXED}_train_{len(pieces)}.npy", tokens)
        pieces.append(len(tokens))

    for rows in documents.iter(batch):
        encoded = encoder.encode_batch_fast(rows["text"], add_special_tokens=False)
        ids = [np.asarray([facts["end"], *found.ids], np.uint16) for found in encoded]
        size["bytes"] += sum(len(text.encode()) for text in rows["text"])
        size["words"] += sum(len(text.split()) for text in rows["text"])
        waiting = np.concatenate([waiting, *ids])
        while len(waiting) >= piece_tokens:
            write(waiting[:piece_tokens])
            waiting = waiting[piece_tokens:]
    if len(waiting):
        write(waiting)
    size["tokens"] = sum(pieces)
    facts[f"{MIXED}_train"] = {**size, "pieces": pieces, "files": [path.name for path in files]}
    (folder / "text.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _until(documents, max_bytes: int) -> Iterator[dict]:
    for document in documents:
        yield document
        max_bytes -= len(document["text"].encode())
        if max_bytes <= 0:
            return


@dataclass(eq=False)
class Stream:
    """A corpus cut into consecutive rows of `context` tokens; documents continue across rows.

    Attributes:
        tokens: int32 `[T]`, on the training device.
        mask_id: None for causal rows, whose labels are the next tokens; otherwise the id of the mask token.
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

    def spans(self, rows: np.ndarray) -> Tensor:
        """The tokens of these rows, each with the token after it, int32 `[rows, context + 1]`."""
        begin = torch.from_numpy(rows * self.context).to(self.device, non_blocking=True)
        return self.tokens[begin[:, None] + torch.arange(self.context + 1, device=self.device)]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def batch(self, rows: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels (not shifted), int64 `[rows, context]`; masks are sampled with `seed`."""
        device = self.device
        ids = self.spans(rows).long()
        inputs, following = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        if self.mask_id is None:
            return inputs, following
        # Sampled on the CPU, so that masks are the same on every device.
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(3, *inputs.shape, generator=generator).to(device)
        other = torch.randint(self.vocab_size, inputs.shape, generator=generator).to(device)
        chosen = draw[0] < MASKED
        labels = torch.where(chosen, inputs, IGNORE)
        hidden = chosen & (draw[1] < HIDDEN)
        exchanged = chosen & ~hidden & (draw[2] < EXCHANGED)
        return torch.where(hidden, self.mask_id, torch.where(exchanged, other, inputs)), labels


class PieceStream(Stream):
    """Rows of a corpus in pieces, shuffled within each piece, one piece after the other. A piece is read when its
    first row is needed, so that training can start before the last piece is there.

    Args:
        files: The pieces, `.npy`.
        sizes: Tokens of each piece.
        wait_seconds: How long to wait for a missing piece.
    """

    def __init__(self, files: list[Path], sizes: list[int], context: int, vocab_size: int, mask_id: int | None,
                 device: str, wait_seconds: float = 0.0):  # fmt: skip
        super().__init__(torch.empty(0, dtype=torch.int32, device=device), context, vocab_size, mask_id)
        self.files, self.sizes, self.wait_seconds = files, sizes, wait_seconds
        self.counts = np.array([(size - 1) // context for size in sizes])
        self.ends = np.cumsum(self.counts)
        self.held: dict[int, Stream] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def order(self, seed: int) -> np.ndarray:
        return np.concatenate([
            end - count + np.random.default_rng([seed, piece]).permutation(count)
            for piece, (end, count) in enumerate(zip(self.ends, self.counts, strict=True))
        ])  # fmt: skip

    def spans(self, rows: np.ndarray) -> Tensor:
        pieces = np.searchsorted(self.ends, rows, side="right")
        found = torch.empty(len(rows), self.context + 1, dtype=torch.int32, device=self.device)
        for piece in np.unique(pieces):
            chosen = pieces == piece
            inside = rows[chosen] - (self.ends[piece] - self.counts[piece])
            found[torch.from_numpy(chosen).to(self.device)] = self.piece(int(piece)).spans(inside)
        return found

    def piece(self, index: int) -> Stream:
        if index not in self.held:
            file, begin = self.files[index], time.monotonic()
            while not file.is_file():
                if time.monotonic() - begin >= self.wait_seconds:
                    raise FileNotFoundError(
                        f"study: no tokens in {file}. Make them with --prepare DATA, or wait longer with "
                        "--wait_minutes."
                    )
                time.sleep(0.2)
            tokens = np.load(file)
            if len(tokens) != self.sizes[index]:
                raise ValueError(f"study: {file} must hold {self.sizes[index]:,} tokens as in text.json, got "
                                 f"{len(tokens):,}. Make both with one --prepare.")  # fmt: skip
            # A batch comes from one piece, or from the end of one and the start of the next.
            for old in [other for other in self.held if other != index - 1]:
                del self.held[old]
            self.held[index] = Stream(torch.from_numpy(tokens.astype(np.int32)).to(self.device), self.context,
                                      self.vocab_size)  # fmt: skip
        return self.held[index]


def load_stream(
    folder: Path, corpus: str, part: str, context: int, *, causal: bool, device: str = "cpu",
    limit: int | None = None, wait_seconds: float = 0.0,
) -> Stream:  # fmt: skip
    """The rows of `{corpus}_{part}.npy` (of its first `limit` tokens if given), or of all pieces of a corpus in
    pieces, waiting up to `wait_seconds` for each.

    Raises:
        FileNotFoundError: the text has not been prepared.
    """
    if not (folder / "text.json").is_file():
        raise FileNotFoundError(f"study: no tokens in {folder}. Make them with --prepare DATA.")
    facts = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    mask_id = None if causal else facts["mask"]
    sizes = facts.get(f"{corpus}_{part}", {}).get("pieces")
    if sizes:
        files = [folder / f"{corpus}_{part}_{index}.npy" for index in range(len(sizes))]
        return PieceStream(files, sizes, context, facts["vocab_size"], mask_id, device, wait_seconds)
    tokens = np.load(folder / f"{corpus}_{part}.npy", mmap_mode="r")[:limit]
    tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
    return Stream(tokens, context, facts["vocab_size"], mask_id)


__all__ = ["CORPORA", "IGNORE", "MIXED", "VALIDATED", "PieceStream", "Stream", "load_stream", "prepare",
           "prepare_mixed"]  # fmt: skip
