# SPDX-License-Identifier: Apache-2.0
"""Synthetic recall tasks: retrieving a value from far back in the context.

`mqar` is multi-query associative recall (Arora et al., "Zoology", arXiv 2312.04927): pairs of key and value, and later
the keys again, each to be followed by its value. `needle` hides one pair in random tokens and asks for it at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flash_hf.loss_flash import IGNORE


def mqar(
    batch: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator, *, queries: int | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs and labels, both int64 `[batch, length]`.

    A sequence starts with `pairs` distinct keys, each followed by its value. The rest is token 0 and, at random even
    positions, `queries` of the keys without repetition, each followed by its value. Labels stand at the queries (not
    shifted), all others are -100. Keys are the ids from 1 to `vocab_size // 2 - 1`, values the ids above.

    Args:
        queries: Number of queries; by default as many as pairs.

    Raises:
        ValueError: the sequence is too short, or there are fewer keys than pairs.
    """
    queries = pairs if queries is None else queries
    keys = vocab_size // 2 - 1
    if pairs > keys or not 0 < queries <= pairs:
        raise ValueError(f"mqar: `pairs` must be at most {keys} keys and `queries` at most pairs, got {pairs=} "
                         f"{queries=}. Raise vocab_size, or ask for less.")  # fmt: skip
    places = (length - 2 * pairs) // 2
    if places < queries:
        raise ValueError(f"mqar: `length` must be at least {2 * (pairs + queries)} for {pairs=} and {queries=}, got "
                         f"{length}.")  # fmt: skip

    def draw(count: int, of: int) -> Tensor:
        return torch.rand(batch, of, generator=generator).argsort(1)[:, :count]

    key = 1 + draw(pairs, keys)
    value = torch.randint(vocab_size // 2, vocab_size, (batch, pairs), generator=generator)
    inputs = torch.zeros(batch, length, dtype=torch.long)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = key, value
    asked = draw(queries, pairs)
    place = 2 * pairs + 2 * draw(queries, places)
    inputs.scatter_(1, place, key.gather(1, asked)).scatter_(1, place + 1, value.gather(1, asked))
    labels = torch.full_like(inputs, IGNORE).scatter_(1, place, value.gather(1, asked))
    return inputs, labels


def needle(
    batch: int, length: int, vocab_size: int, generator: torch.Generator, *, depth: float | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs and labels as for [`mqar`]: random tokens with the marker 1 and a value among them, and the marker again
    at the end, whose label is the value.

    Args:
        depth: Position of the needle, from 0 (start) to 1 (end); by default random.

    Raises:
        ValueError: fewer than 4 tokens, or a depth outside of [0, 1].
    """
    if length < 4 or (depth is not None and not 0 <= depth <= 1):
        raise ValueError(f"needle: `length` must be at least 4 and `depth` in [0, 1], got {length=} {depth=}.")
    inputs = torch.randint(2, vocab_size, (batch, length), generator=generator)
    last = length - 3  # so that the value also comes before the question
    place = torch.randint(last + 1, (batch,), generator=generator) if depth is None else (
        torch.full((batch,), round(depth * last)))  # fmt: skip
    row = torch.arange(batch)
    value = inputs[row, place + 1]
    inputs[row, place] = 1
    inputs[:, -1] = 1
    labels = torch.full_like(inputs, IGNORE)
    labels[:, -1] = value
    return inputs, labels


def answer_accuracy(model: PreTrainedModel, inputs_BN: Tensor, labels_BN: Tensor, *, batch_size: int = 8) -> float:
    """Share of the labels that are the most likely next token, for [`mqar`] and [`needle`].

    Args:
        inputs_BN: int64 `[B, N]`.
        labels_BN: int64 `[B, N]`, -100 where there is no question. A label stands at the token before it (no shift).

    Raises:
        ValueError: all labels are -100.
    """
    right, asked = 0, int((labels_BN != IGNORE).sum())
    if not asked:
        raise ValueError("labels_BN must hold a label other than -100.")
    for inputs, labels in zip(inputs_BN.split(batch_size), labels_BN.split(batch_size), strict=True):
        with torch.inference_mode():
            likeliest = model(inputs.to(model.device)).logits.argmax(-1).cpu()
        right += int((likeliest == labels)[labels != IGNORE].sum())
    return right / asked


__all__ = ["answer_accuracy", "mqar", "needle"]
