# SPDX-License-Identifier: Apache-2.0
"""The token mixers of the baselines: pure multi-head functions of queries, keys and values, without parameters.

Three are chunked and take a [`ChunkLayout`], like FLASH, which handles padding and packing; they expect zeros at empty
slots. Alphabet: B rows, G chunks (the rows of Combiner's grid), H heads, C slots of a chunk,
S width of a head, R random features, N tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_hf.attention_flash import activate, global_scale, running_states, wide
from flash_hf.chunking_flash import ChunkLayout


# Added to every ReLU feature, so that no denominator is 0; the value of the Performer authors' code.
RELU_EPSILON = 1e-3


def split_heads(x_BNHS: Tensor, layout: ChunkLayout) -> Tensor:
    """`[B, N, H, S]` to `[B, G, H, C, S]`; 0 at empty slots."""
    return layout.split(x_BNHS.flatten(2)).unflatten(3, x_BNHS.shape[2:]).transpose(2, 3)


def merge_heads(x_BGHCS: Tensor, layout: ChunkLayout) -> Tensor:
    """`[B, G, H, C, S]` to `[B, N, H, S]`; 0 at padding."""
    return layout.merge(x_BGHCS.transpose(2, 3).flatten(3)).unflatten(2, (x_BGHCS.shape[2], -1))


def totals(product_BGHXY: Tensor, layout: ChunkLayout, *, causal: bool) -> Tensor:
    """Sums over chunks of one document: of the earlier ones if causal, else of all; `[B, G or 1, H, X, Y]`."""
    running = running_states(product_BGHXY, None)
    if layout.first_BG is None:
        return running[:, :-1] if causal else running[:, -1:]

    def at(index_BG: Tensor) -> Tensor:
        return running.take_along_dim(index_BG[:, :, None, None, None], 1)

    return (running[:, :-1] if causal else at(layout.last_BG + 1)) - at(layout.first_BG)


# ------------------------------------------------------------------------------------------------------------------
# Quadratic attention without a softmax
# ------------------------------------------------------------------------------------------------------------------
def relu2_attention(
    q_BHNS: Tensor, k_BHNS: Tensor, v_BHNS: Tensor, visible_BHNM: Tensor | None, *, causal: bool, divisor: float,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """`relu(q k^T / divisor)^2 v` (arXiv 2202.10447, section 2.2; in MHSA in its table 2), `[B, H, N, S]`.

    Args:
        visible_BHNM: Visible keys of each query, bool, broadcastable to `[B, H, N, N]`; None for all, or all earlier.
        divisor: A constant; the length of the input would make the function depend on it.
    """
    weights = F.relu(q_BHNS @ (k_BHNS / divisor).transpose(-1, -2)).square()
    if visible_BHNM is not None:
        weights = weights * visible_BHNM
    elif causal:
        weights = weights.tril()
    return F.dropout(weights, dropout, dropout > 0) @ v_BHNS


# ------------------------------------------------------------------------------------------------------------------
# Performer
# ------------------------------------------------------------------------------------------------------------------
def orthogonal_features(count: int, width: int, seed: int) -> Tensor:
    """Orthogonal random features (arXiv 2009.14794, section 2.4), float32 `[count, width]` on the CPU.

    Blocks of at most `width` orthogonal directions with the lengths of independent Gaussian vectors, so that each row
    is N(0, I): the kernel estimate stays unbiased and has less variance.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, count, width):
        square = torch.randn(width, width, generator=generator, dtype=torch.float64, device="cpu")
        # With the signs of R's diagonal on Q the directions are uniform, unlike with LAPACK's signs.
        basis, upper = torch.linalg.qr(square)
        blocks.append((basis * upper.diagonal().sign()).T[: count - start])
    gaussian = torch.randn(count, width, generator=generator, dtype=torch.float64, device="cpu")
    return (torch.cat(blocks) * gaussian.norm(dim=1, keepdim=True)).float()


def performer_attention(
    q_BGHCS: Tensor, k_BGHCS: Tensor, v_BGHCS: Tensor, layout: ChunkLayout, features_RS: Tensor, *, causal: bool,
    kernel: str = "softmax",
) -> Tensor:  # fmt: skip
    """FAVOR+ (arXiv 2009.14794, lemma 1 and section 2), linear in the number of chunks, `[B, G, H, C, S]`:
    `out_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) sum_j phi(k_j))`, causal by prefix sums over chunks and a
    masked `C x C` product in each.

    Args:
        features_RS: Rows w of the random projection.
        kernel: `"softmax"`: `phi(x) = exp(w x - |x|^2 / 2)` of `x / S^(1/4)`, an unbiased estimate of
            `exp(q k / sqrt(S))`; `"relu"`: `phi(x) = relu(w x / S^(1/4)) + 1e-3`.
    """
    dtype = v_BGHCS.dtype
    occupied = layout.occupied_BGC[:, :, None, :, None]
    with torch.autocast(v_BGHCS.device.type, enabled=False):  # exponentials, and sums over the whole document
        q, k, v = (x.to(wide(dtype)) for x in (q_BGHCS, k_BGHCS, v_BGHCS))
        project_SR = features_RS.to(q.dtype).T
        root = q.shape[-1] ** -0.25
        q, k = q * root, k * root
        if kernel == "softmax":
            q_log = q @ project_SR - q.square().sum(-1, keepdim=True) / 2
            k_log = (k @ project_SR - k.square().sum(-1, keepdim=True) / 2).masked_fill(~occupied, -math.inf)
            # Each feature is scaled by the largest value over the keys, which moves to the queries, where the maximum
            # of each query cancels in the quotient. The denominator over a document then cannot underflow, whatever
            # the norms (with one scale for all features it could). The scales need no gradient.
            largest = k_log.detach().amax((1, 3), keepdim=True).clamp(min=-1e30)
            q_log = q_log + largest
            q_phi = torch.exp(q_log - q_log.detach().amax(-1, keepdim=True))
            k_phi = torch.exp(k_log - largest)
        else:
            q_phi = F.relu(q @ project_SR) + RELU_EPSILON
            k_phi = (F.relu(k @ project_SR) + RELU_EPSILON) * occupied
        # An extra value of 1 accumulates the denominator.
        v = F.pad(v, (0, 1), value=1.0)
        out = q_phi @ totals(k_phi.transpose(-1, -2) @ v, layout, causal=causal)
        if causal:
            out = out + (q_phi @ k_phi.transpose(-1, -2)).tril() @ v
        # Slots without keys (padding) stay 0, and so do, in float32, tokens all of whose keys are exp(-69) below a
        # later key, where the gradient of the quotient would overflow.
        below = out[..., -1:]
        below = torch.where(below < torch.finfo(below.dtype).tiny ** 0.8, 1.0, below)
        return (out[..., :-1] / below).to(dtype)


# ------------------------------------------------------------------------------------------------------------------
# Combiner
# ------------------------------------------------------------------------------------------------------------------
def combiner_attention(
    q_BGHCS: Tensor, k_BGHCS: Tensor, v_BGHCS: Tensor, layout: ChunkLayout, *, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Combiner, row-major axial (arXiv 2107.05768, section 4.3), `[B, G, H, C, S]`.

    A document is a grid of rows of C tokens. A token attends to its own row directly and to every other row (earlier
    ones if causal) through one summary, in one softmax over `C + G` scores; so its weights for all tokens,
    `p(row | i) p(j | row, column of i)`, sum to 1. A row has one summary per column c: keys and values weighted by the
    softmax of the row's own token in column c over the whole row. Where a document's last row has no token in a
    column, the query is 0 and the summary is the mean of the row.

    `C + G` scores per token: a cost of N^1.5 with C near the square root of N, not linear.
    """
    B, G, H, C, S = q_BGHCS.shape
    occupied = layout.occupied_BGC
    low = torch.finfo(wide(q_BGHCS.dtype)).min  # not -inf: an empty row must stay finite, also in the backward pass
    q = q_BGHCS * S**-0.5
    direct = (q @ k_BGHCS.transpose(-1, -2)).to(wide(q.dtype))
    direct = direct.masked_fill(~occupied[:, :, None, None, :], low)
    within = torch.softmax(direct, -1).to(v_BGHCS.dtype)
    key_BGHCS, value_BGHCS = within @ k_BGHCS, within @ v_BGHCS

    # [B, H, C, G, S]: for every column, the rows.
    q_BHCGS, key, value = (x.permute(0, 2, 3, 1, 4) for x in (q, key_BGHCS, value_BGHCS))
    row_G = torch.arange(G, device=q.device)
    seen_BGG = row_G[None, :] < row_G[:, None] if causal else row_G[None, :] != row_G[:, None]
    seen_BGG = seen_BGG & occupied.any(2)[:, None, :]
    if layout.first_BG is not None:
        seen_BGG = seen_BGG & (layout.first_BG[:, :, None] == layout.first_BG[:, None, :])
    rows = (q_BHCGS @ key.transpose(-1, -2)).to(direct.dtype).masked_fill(~seen_BGG[:, None, None], low)
    if causal:
        future_CC = torch.ones(C, C, dtype=torch.bool, device=q.device).triu(1)
        direct = direct.masked_fill(future_CC, low)
    weights = torch.softmax(torch.cat([direct, rows.permute(0, 3, 1, 2, 4)], -1), -1)
    weights = F.dropout(weights, dropout, dropout > 0).to(v_BGHCS.dtype)
    direct, rows = weights.split([C, G], -1)
    return direct @ v_BGHCS + (rows.permute(0, 2, 3, 1, 4) @ value).permute(0, 3, 1, 2, 4)


# ------------------------------------------------------------------------------------------------------------------
# Mixed chunk attention with several heads
# ------------------------------------------------------------------------------------------------------------------
def multi_head_mixed_chunk_attention(
    quad_q: Tensor, quad_k: Tensor, lin_q: Tensor, lin_k: Tensor, v_BGHCS: Tensor, layout: ChunkLayout,
    bias_HCC: Tensor, *, causal: bool, divisor: float, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """FLASH's attention (arXiv 2202.10447, section 3.2) for each head separately, `[B, G, H, C, S]`:
    `relu(Q K^T / divisor + b)^2 V` inside a chunk, plus `Q_lin (sum k v^T) / tokens` over the earlier chunks, or, if
    not causal, over the document.

    Args:
        quad_q, quad_k, lin_q, lin_k: `[B, G, H, C, S]`.
        v_BGHCS: Values, 0 at empty slots, which therefore need no mask.
        bias_HCC: The relative bias b of each head, for the C of the layout.
    """
    scores = quad_q @ (quad_k / divisor).transpose(-1, -2) + bias_HCC
    weights = activate(scores, "relu2")
    if causal:
        weights = weights.tril()
    out = F.dropout(weights, dropout, dropout > 0) @ v_BGHCS
    product = lin_k.transpose(-1, -2) @ v_BGHCS
    states = totals(product.to(wide(product.dtype)), layout, causal=causal)
    count_BG = layout.before_BG if causal else layout.count_BG
    states = states * global_scale(count_BG, "mean", layout.position_BGC.shape[2], states.dtype)[..., None, None, None]
    return out + lin_q @ states.to(v_BGHCS.dtype)


__all__ = [
    "combiner_attention", "merge_heads", "multi_head_mixed_chunk_attention", "orthogonal_features",
    "performer_attention", "relu2_attention", "split_heads",
]  # fmt: skip
