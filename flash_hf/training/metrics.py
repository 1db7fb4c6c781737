# SPDX-License-Identifier: Apache-2.0
"""Validation metrics of language models."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from torch import Tensor, nn
from transformers import EvalPrediction

from ..loss_flash import IGNORE


Kind = Literal["causal", "masked"]

METRICS = {
    "causal": ("loss", "perplexity", "word_perplexity", "bits_per_byte", "accuracy", "tokens"),
    "masked": ("loss", "perplexity", "masked_accuracy", "tokens"),
}


def token_scores(logits: Tensor | tuple[Tensor, ...], labels: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Reduce logits to what the metrics need, so that evaluation never keeps logits for all tokens.

    Args:
        logits: `[B, N, V]`, or a tuple that begins with them.
        labels: `[B, N]`, -100 where not counted.

    Returns:
        Negative log-likelihood in nats, float32, and whether the most likely token is correct, bool; both `[B, N]`, at
        the position of the label, and 0 where not counted.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if causal:  # the logits of a token predict the next one
        logits, labels = logits[:, :-1], labels[:, 1:]
    nll = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORE)
    right = logits.argmax(-1) == labels
    if causal:
        nll, right = (nn.functional.pad(score, (1, 0)) for score in (nll, right))
    return nll, right


def make_compute_metrics(kind: Kind, size: dict[str, int]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Exact metrics over the whole set from the scores of [`token_scores`].

    `loss` replaces Trainer's own, a mean of the batches' means, which differs if batches count different numbers of
    tokens. Word perplexity and bits per byte divide the nats of all predicted tokens (ends of documents included) by
    the words and bytes of the text, for comparison between tokenizers.

    Args:
        size: of the validation text, from [`text_size`].
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        nll, right = prediction.predictions
        counted = prediction.label_ids != IGNORE
        if kind == "causal":
            counted[:, 0] = False
        count, nats = counted.sum(), nll[counted].sum(dtype=np.float64)
        with np.errstate(all="ignore"):  # inf or nan is the right answer for a huge loss, or without tokens to count
            metrics = {"loss": nats / count, "perplexity": np.exp(nats / count), "tokens": int(count)}
            if kind == "causal":
                metrics["word_perplexity"] = np.exp(nats / size["n_words"])
                metrics["bits_per_byte"] = nats / np.log(2) / size["n_bytes"]
            metrics["accuracy" if kind == "causal" else "masked_accuracy"] = right[counted].sum() / count
        return metrics

    return compute_metrics
