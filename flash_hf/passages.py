# SPDX-License-Identifier: Apache-2.0
"""Passages of every length from whole books and articles, for a masked model that is to read single sentences, too.

A model trained on full blocks alone has never seen a short input, and FLASH's sums over a chunk and over a document
come out differently there. A causal model has no such gap: each of its blocks begins with short contexts.
"""

import math
import random
from collections.abc import Iterable, Iterator


def cut_passages(text: str, draw: random.Random, *, shortest: int, longest: int) -> Iterator[str]:
    """Cut a text at its blank lines into passages of at least so many words as each time drawn, log-uniformly.

    Nothing is left out and no paragraph is cut, so a passage may be longer than drawn, and the last one shorter.

    Args:
        draw: where the lengths come from.
        shortest, longest: words; the bounds of what is drawn.

    Raises:
        ValueError: bounds that are none.
    """
    if not 1 <= shortest <= longest:
        raise ValueError(f"shortest and longest must satisfy 1 <= shortest <= longest, got {shortest} and {longest}.")
    paragraphs, words, wanted = [], 0, 0.0
    for paragraph in text.split("\n\n"):
        if not paragraphs:
            wanted = math.exp(draw.uniform(math.log(shortest), math.log(longest)))
        paragraphs.append(paragraph)
        words += len(paragraph.split())
        if words >= wanted:
            yield "\n\n".join(paragraphs)
            paragraphs, words = [], 0
    if words:
        yield "\n\n".join(paragraphs)


def passages(
    documents: Iterable[dict], *, shortest: int = 8, longest: int = 2048, seed: int = 0
) -> Iterator[dict[str, str]]:
    """[`cut_passages`] of rows with the column `text`, as rows again, in their order."""
    draw = random.Random(seed)
    for document in documents:
        for passage in cut_passages(document["text"] or "", draw, shortest=shortest, longest=longest):
            yield {"text": passage}


__all__ = ["cut_passages", "passages"]
