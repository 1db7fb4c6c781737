# SPDX-License-Identifier: Apache-2.0
"""Synthetic recall: what a model can fetch from far back, asked directly.

`mqar` is multi-query associative recall (Arora et al., "Zoology", arXiv 2312.04927): pairs of key and value, later the
keys again, each of which the value must follow. `needle` hides one pair in random tokens and asks for it at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


IGNORE = -100


def mqar(
    batch: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator, *, queries: int | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs and, at the same places, labels, int64 `[batch, length]`.

    The row begins with `pairs` different keys, each followed by its value. The rest is token 0, and, at random even
    places, `queries` of the keys, without repetition, each followed by its value; the label stands at the query, all
    others are -100. Keys are the ids from 1 to `vocab_size // 2 - 1`, values the ids above.

    Args:
        queries: as many as pairs unless given.

    Raises:
        ValueError: the row is too short, or there are fewer keys than pairs.
    """
    queries = pairs if queries is None else queries
    keys = vocab_size // 2 - 1
    if pairs > keys or not 0 < queries <= pairs:
        raise ValueError(f"mqar: `pairs` must be at most {keys} keys and `queries` at most pairs, got {pairs=} "
                         f"{queries=}. Raise vocab_size, or ask less.")  # fmt: skip
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
    """Inputs and labels as of [`mqar`]: random tokens, among them once the marker 1 and a value; the row ends with the
    marker, whose label is the value.

    Args:
        depth: where the needle is, from 0 (begin) to 1 (end); random unless given.

    Raises:
        ValueError: shorter than 4 tokens, or depth outside of [0, 1].
    """
    if length < 4 or (depth is not None and not 0 <= depth <= 1):
        raise ValueError(f"needle: `length` must be at least 4 and `depth` in [0, 1], got {length=} {depth=}.")
    inputs = torch.randint(2, vocab_size, (batch, length), generator=generator)
    last = length - 3  # the value, too, stands before the question
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
    """Share of the labelled places whose likeliest next token is the label, as in [`mqar`] and [`needle`].

    Args:
        inputs_BN: int64 `[B, N]`.
        labels_BN: int64 `[B, N]`, -100 where nothing is asked. A label stands at the token it follows: no shift.

    Raises:
        ValueError: nothing is asked.
    """
    right, asked = 0, int((labels_BN != IGNORE).sum())
    if not asked:
        raise ValueError("labels_BN must ask for something, but every label is -100.")
    for inputs, labels in zip(inputs_BN.split(batch_size), labels_BN.split(batch_size), strict=True):
        with torch.inference_mode():
            likeliest = model(inputs.to(model.device)).logits.argmax(-1).cpu()
        right += int((likeliest == labels)[labels != IGNORE].sum())
    return right / asked


__all__ = ["IGNORE", "answer_accuracy", "mqar", "needle"]
