# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a language-model head without the logits of all tokens at once.

Float32 logits `[tokens, vocabulary]` and their gradient are often the largest tensors of a training step: 8.4 GB each
for 65,536 tokens and a vocabulary of 32,000.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging

from .backend_flash import compute_dtype, is_bare


logger = logging.get_logger(__name__)

# The label that the losses of transformers and torch skip.
IGNORE = -100
# Tokens whose logits exist at the same time, without liger-kernel.
SLICE = 4096


@functools.cache
def load_liger():
    """liger-kernel's fused linear cross-entropy, or None with one warning."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        logger.warning(
            f"The loss without logits falls back to plain torch, which is slower than liger-kernel: {error}. "
            "pip install liger-kernel."
        )
        return None
    return liger_fused_linear_cross_entropy


def can_split(head: nn.Module) -> bool:
    """Whether a head is a plain linear layer, whose product can be computed in parts."""
    return type(head) is nn.Linear and type(head.weight) in (nn.Parameter, Tensor) and is_bare(head)


def sum_of_slice(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_T: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden_TD, weight_VD, bias_V).float(), labels_T, reduction="sum")


def may_wait(x: Tensor) -> bool:
    """Whether the host may wait for the device of x: not while a CUDA graph is being recorded, or about to be."""
    return not (x.is_cuda and (torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() == 2))


def zero_without_labels(loss: Tensor, labels: Tensor) -> Tensor:
    """`loss`, or 0 if all labels are -100: their mean is NaN, as would be every average over steps. The gradients of
    torch's losses are 0 then."""
    # Not a comparison on the host, which a CUDA graph could not record.
    return loss.masked_fill((labels == IGNORE).all().to(loss.device), 0.0)


def loss_without_logits(
    head: nn.Linear,
    hidden_BND: Tensor,
    labels_BN: Tensor,
    *,
    shift: bool,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of `head(hidden)` in nats, float32: the mean over the labels, or their sum over
    `num_items_in_batch`; 0 without any label. The same loss and gradients as from logits.

    On CUDA this is liger-kernel's fused linear cross-entropy, if it is installed and the head has no bias. Otherwise,
    and in CUDA graphs, torch computes slices of tokens, and their logits again in the backward. A masked model skips
    tokens without a label, except in CUDA graphs.

    Args:
        head: linear layer `[V, D]`; see `can_split`.
        shift: whether a token predicts the next token's label (causal), or its own (masked).
    """
    if shift:
        labels_BN = F.pad(labels_BN[:, 1:], (0, 1), value=IGNORE)
    hidden, labels = hidden_BND.flatten(0, 1), labels_BN.flatten().to(hidden_BND.device)
    waits = may_wait(hidden)
    # liger-kernel reads the number of labels from the device.
    liger = load_liger() if hidden.is_cuda and head.bias is None and waits else None
    if waits and (liger is None or not shift):
        # So does this, which pays if most tokens have no label.
        labelled = (labels != IGNORE).nonzero()[:, 0]
        hidden, labels = hidden[labelled], labels[labelled]
    items = (labels != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(items, Tensor):
        items = items.to(hidden.device)
    items = items + (items == 0)
    if liger is not None and len(labels):
        dtype = compute_dtype(head.weight)
        options = {"ignore_index": IGNORE, "reduction": "sum", "accum_dtype": torch.float32}
        return liger(hidden.to(dtype), head.weight.to(dtype), labels, **options).float() / items
    sums = [
        checkpoint(sum_of_slice, part, head.weight, head.bias, own, use_reentrant=False, preserve_rng_state=False)
        for part, own in zip(hidden.split(SLICE), labels.split(SLICE), strict=True)
    ]
    return torch.stack(sums).sum() / items
