# SPDX-License-Identifier: Apache-2.0
"""Quality of language models: scores of whole documents and of masked tokens.

Every function takes a causal or masked model of transformers and returns plain numbers; `python -m scripts.evaluation`
writes them as the results that model cards are made from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from flash_hf.cache_flash import CACHE_NAME
from flash_hf.loss_flash import IGNORE
from flash_hf.training import token_scores
from flash_hf.training.packing import MaskingCollator, pack_documents
from flash_hf.training.tokenizer import document_end, document_start, tokenize_documents


# --- causal: perplexity, by position ---------------------------------------------------------------------------------


def score_document(model: PreTrainedModel, ids_N: Tensor, *, segment: int = 4096) -> tuple[Tensor, Tensor]:
    """Score every token of a document except the first, each given everything before it, in constant memory.

    Args:
        ids_N: The document, int64 `[N]`, on the model's device.
        segment: Tokens read at once; the state is carried over. A multiple of the chunk size is fastest.

    Returns:
        Negative log-likelihoods in nats, float32, and whether the most likely token was right, bool: both `[N - 1]`,
        on the CPU.
    """
    cache, scores = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for begin in range(0, len(ids_N) - 1, segment):
            part = ids_N[begin : begin + segment + 1]
            logits = model(part[None, :segment], use_cache=True, **{CACHE_NAME: cache}).logits
            # token_scores shifts the labels, so the logits of the last token of `part` are not needed.
            logits = logits[:, : len(part) - 1]
            padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))
            scores.append([score[0, 1:].cpu() for score in token_scores(padded, part[None], causal=True)])
    return tuple(torch.cat(parts) for parts in zip(*scores, strict=True))


def position_edges(longest: int) -> list[int]:
    """0, 256, 512, 1024, ... up to the first edge of at least `longest`."""
    edges = [0, 256]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return edges


@dataclass
class DocumentScores:
    """Sums over all predicted tokens, and losses by the length of their context (see `position_edges`)."""

    nats: float
    right: int
    tokens: int
    n_bytes: int
    n_words: int
    by_position: list[dict[str, float]]

    def metrics(self) -> dict[str, float]:
        """Metrics by the names of `training.metrics`; as there, ends of documents count for words and bytes too."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(loss),
            "word_perplexity": math.exp(self.nats / self.n_words),
            "bits_per_byte": self.nats / math.log(2) / self.n_bytes,
            "accuracy": self.right / self.tokens,
            "tokens": self.tokens,
        }


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[dict],
    *,
    context: int | None = None,
    segment: int = 4096,
) -> DocumentScores:
    """Perplexity of documents with their start and end tokens, each as one context or cut into several.

    Args:
        documents: Rows with the column `text`.
        context: Score stretches of `context + 1` tokens separately (they overlap by one, so that every token but the
            first is predicted). None: a document is one context.
        segment: As for [`score_document`].

    Raises:
        ValueError: no text, or a context below 1.
    """
    if context is not None and context < 1:
        raise ValueError(f"context must be at least 1, got {context}.")
    nats, right, places, n_bytes, n_words = [], [], [], 0, 0
    for row in documents:
        text = (row["text"] or "").removeprefix("\ufeff")
        if not text.strip():
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [document_start(tokenizer), *ids, document_end(tokenizer)]
        ids_N = torch.tensor(ids, device=model.device)
        step = context or len(ids)
        for begin in range(0, len(ids) - 1, step):
            scores = score_document(model, ids_N[begin : begin + step + 1], segment=segment)
            nats.append(scores[0])
            right.append(scores[1])
            # The number of tokens that each one is predicted from.
            places.append(torch.arange(1, len(scores[0]) + 1, device=scores[0].device))
        n_bytes, n_words = n_bytes + len(text.encode()), n_words + len(text.split())
    if not nats:
        raise ValueError("The documents hold no text: all of them are empty or blank.")
    nats_T, right_T, places_T = torch.cat(nats).double(), torch.cat(right), torch.cat(places)
    by_position = []
    edges = position_edges(int(places_T.max()))
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (places_T > low) & (places_T <= high)
        tokens = int(inside.sum())
        by_position.append({"above": low, "up_to": high, "tokens": tokens, "loss": nats_T[inside].mean().item()})
    return DocumentScores(
        nats=nats_T.sum().item(), right=int(right_T.sum()), tokens=len(nats_T), n_bytes=n_bytes, n_words=n_words,
        by_position=by_position,
    )  # fmt: skip


# --- masked ----------------------------------------------------------------------------------------------------------


def masked_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    *,
    block_size: int,
    mlm_probability: float = 0.15,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Loss, perplexity and accuracy on randomly masked tokens (as in BERT), with the settings of training.

    Args:
        documents: A data set with the column `text`.
        block_size, mlm_probability, seed: As in training.
    """
    tokenized = tokenize_documents(documents, tokenizer)
    blocks = pack_documents(tokenized, tokenizer, block_size=block_size, causal=False, packing="documents")
    collator = MaskingCollator(tokenizer, mlm_probability=mlm_probability, seed=seed)
    nats, right, tokens = 0.0, 0, 0
    for begin in range(0, len(blocks), batch_size):
        rows = blocks.select(range(begin, min(begin + batch_size, len(blocks))))
        batch = {name: value.to(model.device) for name, value in collator.torch_call(list(rows)).items()}
        labels = batch.pop("labels")
        with torch.inference_mode():
            scores = token_scores(model(**batch).logits, labels, causal=False)
        counted = labels != IGNORE
        nats += scores[0][counted].cpu().sum(dtype=torch.float64).item()  # some devices have no float64
        right += int(scores[1][counted].sum())
        tokens += int(counted.sum())
    loss = nats / tokens
    return {"loss": loss, "perplexity": math.exp(loss), "masked_accuracy": right / tokens, "tokens": tokens}


def pseudo_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_tokens: int = 256,
    batch_size: int = 64,
) -> dict[str, float]:
    """Pseudo-perplexity: each token is masked in turn and predicted from all others (arXiv 1910.14659).

    Args:
        texts: Short texts, since a text of n tokens costs n passes over n tokens.
        max_tokens: Longer texts are cut to this length.

    Returns:
        `pseudo_perplexity` (per token), `word_pseudo_perplexity`, `pseudo_accuracy`, `pseudo_tokens`.

    Raises:
        ValueError: no text.
    """
    nats, right, tokens, words = 0.0, 0, 0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
        ids = [document_start(tokenizer), *ids, document_end(tokenizer)]
        whole_N = torch.tensor(ids, device=model.device)
        places = torch.arange(1, len(ids) - 1, device=model.device)
        for place_B in places.split(batch_size) if len(places) else ():
            rows = torch.arange(len(place_B), device=model.device)
            batch_BN = whole_N.repeat(len(place_B), 1)
            batch_BN[rows, place_B] = tokenizer.mask_token_id
            with torch.inference_mode():
                logits_BV = model(batch_BN).logits[rows, place_B].float()
            truth_B = whole_N[place_B]
            nats += torch.nn.functional.cross_entropy(logits_BV, truth_B, reduction="sum").item()
            right += int((logits_BV.argmax(-1) == truth_B).sum())
        tokens += len(places)
        # Words of the text, which may have been cut.
        words += len(tokenizer.decode(ids[1:-1]).split())
    if not tokens:
        raise ValueError("The texts hold no token to mask.")
    return {
        "pseudo_perplexity": math.exp(nats / tokens),
        "word_pseudo_perplexity": math.exp(nats / words),
        "pseudo_accuracy": right / tokens,
        "pseudo_tokens": tokens,
    }


__all__ = [
    "DocumentScores", "masked_scores", "position_edges", "pseudo_perplexity", "score_document", "score_documents",
]  # fmt: skip
