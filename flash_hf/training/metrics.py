# SPDX-License-Identifier: Apache-2.0
"""Metrics of language models, from scores that evaluation reduces logits to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
)

from ..loss_flash import IGNORE


Kind = Literal["causal", "masked"]

METRICS = {
    "causal": ("loss", "perplexity", "word_perplexity", "bits_per_byte", "accuracy", "tokens"),
    "masked": ("loss", "perplexity", "masked_accuracy", "tokens"),
}


def token_scores(logits: Tensor | tuple[Tensor, ...], labels: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Reduce logits to what the metrics need, so that evaluation never holds a vocabulary-wide tensor for all tokens.

    Args:
        logits: `[B, N, V]`, maybe first of a tuple.
        labels: `[B, N]`, -100 where not counted.

    Returns:
        Negative log-likelihood in nats, float32, and whether the likeliest token is right, bool: both `[B, N]`, at the
        place of the label, and 0 where nothing is counted.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if causal:  # the logits of a token predict the next one; the first label has none
        logits, targets = logits[:, :-1], labels[:, 1:]
    else:
        targets = labels
    scores = logits.float().transpose(1, 2)
    nll = nn.functional.cross_entropy(scores, targets, reduction="none", ignore_index=IGNORE)
    right = logits.argmax(-1) == targets
    if causal:
        nll, right = (nn.functional.pad(score, (1, 0)) for score in (nll, right))
    return nll, right


def make_compute_metrics(kind: Kind, size: dict[str, int]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Metrics from the scores of [`token_scores`].

    All are exact for the whole set. Trainer's own loss is the mean of the batches' means, which is something else
    when batches count different numbers of tokens; `loss` here takes its place. Perplexity per word and bits per byte
    spread the nats of all predicted tokens (ends of documents included) over the words and bytes of the text, so that
    they can be compared between tokenizers.

    Args:
        size: from [`text_size`], of the text that is evaluated.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        nll, right = prediction.predictions
        counted = prediction.label_ids != IGNORE
        if kind == "causal":
            counted[:, 0] = False
        count, nats = counted.sum(), nll[counted].sum(dtype=np.float64)
        with np.errstate(all="ignore"):  # too large a loss, or nothing to count, gives inf or nan: that is the answer
            metrics = {"loss": nats / count, "perplexity": np.exp(nats / count), "tokens": int(count)}
            if kind == "causal":
                metrics["word_perplexity"] = np.exp(nats / size["n_words"])
                metrics["bits_per_byte"] = nats / np.log(2) / size["n_bytes"]
            metrics["accuracy" if kind == "causal" else "masked_accuracy"] = right[counted].sum() / count
        return metrics

    return compute_metrics
