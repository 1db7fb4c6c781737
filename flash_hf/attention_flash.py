# SPDX-License-Identifier: Apache-2.0
"""The maths of FLASH as pure functions of tensors, on any device: offset-scale, rotary, attention over chunks, over
whole documents, and for one decoding step. Equations are numbered as in `FlashGatedAttentionUnit`.

Alphabet: B rows, N tokens, G chunks, C slots of a chunk, M keys, D model width, E value width, S query/key width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunking_flash import (
    AppendLayout,
    ChunkLayout,
    QuadraticLayout,
    StepLayout,
    global_scale,
    held_before,
    is_exporting,
    is_tracing,
)


Activation = Literal["relu2", "softmax", "laplace"]
Normalization = Literal["mean", "chunk"]

# MEGA (arXiv 2209.10655, eq. 16): the Gaussian integral with the value and slope of relu^2 at sqrt(1/2).
LAPLACE_MEAN, LAPLACE_STD = math.sqrt(0.5), math.sqrt(0.25 / math.pi)


class QueryKeys(NamedTuple):
    """Queries and keys of both branches, each `[..., S]`; None where the layer lacks the branch. `gates` are those of
    the delta rule: log decay and strength, `[..., 2]`, 0 at empty slots."""

    quad_q: Tensor | None
    quad_k: Tensor | None
    lin_q: Tensor | None
    lin_k: Tensor | None
    gates: Tensor | None = None


@dataclass(eq=False)
class DecodingState:
    """What one layer remembers of each row's open document, of one size for any length.

    Attributes:
        quad_k: keys of the open chunk, `[B, C, S]`; None without that branch. With shifted local dimensions
            `[B, C + 1, S]`, where the newest token's own key is kept as in `lin_k`.
        lin_k: keys under which the open chunk's values are stored, `[B, C, S]`; None without that branch. For shifted
            keys `[B, C + 1, S]`: the newest token's key, for the next token's value, is in slot p (the row's phase),
            or in slot C when p is 0.
        value: values of the open chunk, `[B, C, E]`. Slots before the document's first token, and from the phase p on,
            hold leftovers that are never read (apart from that key).
        total: sum of `lin_k v^T` over ALL tokens of the document, including the open chunk, `[B, S, E]`, at least
            float32. A step then adds one outer product and needs no branch at a chunk's end; the open chunk's part is
            subtracted where the closed chunks' sum is needed.
        seen: tokens of the open document, int64 `[B]`. The phase is `(seen + shift) % C`.
        opened, since: only with the delta rule: its state before the open chunk, `[B, S, E]`, and the sum of log
            decays in that chunk, `[B]`; both of the type of `total`, which is then the state after all tokens. At
            phase 0 the next chunk starts from `total`. `lin_k` is the newest token's key, `[B, 1, S]`, if shifted.
        previous_k, previous_value: only with a window of two chunks: keys and values of the chunk before the open one,
            `[B, C, S]` and `[B, C, E]`. At phase 0 they are still in the open chunk's place.
    """

    quad_k: Tensor | None
    lin_k: Tensor | None
    value: Tensor
    total: Tensor | None
    seen: Tensor
    opened: Tensor | None = None
    since: Tensor | None = None
    previous_k: Tensor | None = None
    previous_value: Tensor | None = None

    # Not a NamedTuple: transformers' exporters cannot rebuild one.
    def __iter__(self):
        return iter(getattr(self, field.name) for field in fields(self))

    def map(self, change: Callable[[Tensor], Tensor]) -> "DecodingState":
        """The state with every tensor changed."""
        return DecodingState(*(None if x is None else change(x) for x in self))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums over tokens: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- Positions, queries and keys ----
FLOAT64_DEVICES = ("cpu", "cuda")


def angle_dtype(x: Tensor) -> torch.dtype:
    """The type of angles, position times frequency: float64, since float32 rounds angles of the millionth token by up
    to 0.03. Exported programs (some runtimes have no float64 sine) and other devices (mps has none) keep float32."""
    exporting = is_exporting() or torch.jit.is_tracing()
    return wide(x.dtype) if exporting or x.device.type not in FLOAT64_DEVICES else torch.float64


def scaled_sinusoid(position_BN: Tensor, like: Tensor) -> Tensor:
    """Sinusoidal positions, sine half then cosine half, `[B, N, D]` in the type and width of `like`, before the learnt
    scalar (eq. 0)."""
    half, dtype = like.shape[-1] // 2, angle_dtype(like)
    steps = torch.arange(half, device=position_BN.device, dtype=dtype)
    angle = position_BN[..., None].to(dtype) * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat([angle.sin().to(like.dtype), angle.cos().to(like.dtype)], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """RoPE on the first r dimensions of x, `[..., S]`; the rest pass through (eq. 3).

    Args:
        cos, sin: broadcastable to `[..., r / 2]`.
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, r / 2), (1, r / 2 + 1), ...
    """
    half, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        kept = [x[..., 2 * half :]] if rest else []
    else:
        first, second, *kept = x.split([half, half, rest] if rest else [half, half], -1)
    turned = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)]
    if interleaved:
        turned = [torch.stack(turned, -1).flatten(-2)]
    return torch.cat(turned + kept, -1)


def offset_scale(z: Tensor, gamma_HS: Tensor, beta_HS: Tensor, rotary, *, interleaved: bool = False) -> Tensor:
    """Queries and keys `RoPE(gamma_h * z + beta_h)` (eq. 3), `[..., H, S]` from z `[..., S]`; `rotary` is cos and sin,
    `[..., r / 2]`, or None."""
    scaled = torch.addcmul(beta_HS, z[..., None, :], gamma_HS)
    if rotary is None:
        return scaled
    return rotate(scaled, rotary[0][..., None, :], rotary[1][..., None, :], interleaved=interleaved)


# ---- The quadratic part: scores -> weights ----
def activate(scores: Tensor, activation: Activation) -> Tensor:
    """Attention weights from scores; a score of -inf gives a weight of exactly 0 (eq. 4)."""
    if activation == "relu2":
        return F.relu(scores).square()
    if activation == "laplace":
        return 0.5 * (1 + torch.erf((scores - LAPLACE_MEAN) / (LAPLACE_STD * math.sqrt(2))))
    return torch.softmax(scores.to(wide(scores.dtype)), -1).to(scores.dtype)


def score_scale(activation: Activation, divisor: float, key_dim: int) -> float:
    """The factor of `q k^T`: 1 / divisor for relu2 and laplace, 1 / sqrt(S) for softmax."""
    return key_dim**-0.5 if activation == "softmax" else 1.0 / divisor


def toeplitz(bias_R: Tensor, length: int) -> Tensor:
    """`b[i, j] = w[j - i + length - 1]` from `w` of `2 * length - 1` offsets, `[length, length]`."""
    return bias_R.unfold(0, length, 1).flip(0)


def score_bias(bias_R: Tensor | None, length: int, causal: bool, like: Tensor) -> Tensor | None:
    """Additive `[length, length]`: the relative bias, and -inf above the diagonal if causal. None without either."""
    bias_CC = None if bias_R is None else toeplitz(bias_R, length).to(like.dtype)
    if not causal:
        return bias_CC
    future_CC = torch.ones(length, length, dtype=torch.bool, device=like.device).triu(1)
    if bias_CC is None:
        bias_CC = torch.zeros(length, length, dtype=like.dtype, device=like.device)
    return bias_CC.masked_fill(future_CC, -math.inf)


def scores_of(q_XQS: Tensor, k_XMS: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """`scale * q k^T + bias` for batches X, with the scale inside the product, since float16 keys may be tiny."""
    if bias is None:
        bias = q_XQS.new_zeros(())
        return torch.baddbmm(bias, q_XQS, k_XMS.transpose(1, 2), beta=0, alpha=scale)
    return torch.baddbmm(bias, q_XQS, k_XMS.transpose(1, 2), alpha=scale)


def visible_scores(
    q_BNS: Tensor,
    k_BMS: Tensor,
    hidden_BNM: Tensor,
    offset_BNM: Tensor,
    *,
    activation: Activation,
    divisor: float,
    bias_R: Tensor | None,
) -> Tensor:
    """Scores of keys, `[B, N, M]`, with the relative bias at `offset_BNM` in `bias_R`; those of hidden ones give no
    weight."""
    bias_BNM = None if bias_R is None else bias_R.to(q_BNS.dtype)[offset_BNM]
    scores = scores_of(q_BNS, k_BMS, score_scale(activation, divisor, q_BNS.shape[-1]), bias_BNM)
    # As in local_attention: queries without keys must stay finite under a softmax.
    return scores.masked_fill(hidden_BNM, torch.finfo(scores.dtype).min if activation == "softmax" else -math.inf)


# ---- Mixed chunk attention ----
class PreviousChunks(NamedTuple):
    """The chunk before each chunk of a grid; `visible_BGC` is False at empty slots and those of other documents."""

    k_BGCS: Tensor
    value_BGCE: Tensor
    visible_BGC: Tensor


def local_attention(
    quad_q_BGCS: Tensor,
    quad_k_BGCS: Tensor,
    value_BGCE: Tensor,
    layout: ChunkLayout,
    *,
    causal: bool,
    activation: Activation,
    divisor: float,
    bias_R: Tensor | None = None,
    dropout: float = 0.0,
    previous: PreviousChunks | None = None,
) -> Tensor:
    """Quadratic attention inside each chunk (eq. 4), and to the chunk before it if that is given, `[B, G, C, E]`.

    Args:
        bias_R: relative bias of offsets `-(C-1) ... C-1`, `[2 * C - 1]`, or None; with `previous` of as many more to
            both sides.
        dropout: probability on the attention weights.
    """
    B, G, C, S = quad_q_BGCS.shape
    scale, queries = score_scale(activation, divisor, S), quad_q_BGCS.flatten(0, 1)
    previous_bias_CC = None
    if bias_R is not None and bias_R.shape[0] > 2 * C - 1:
        length = (bias_R.shape[0] + 1) // 2
        if previous is not None:
            previous_bias_CC = toeplitz(bias_R, length)[length - C :, length - 2 * C : length - C].to(queries.dtype)
        bias_R = bias_R[length - C : length + C - 1]
    bias_CC = score_bias(bias_R, C, causal, quad_q_BGCS)
    scores = scores_of(queries, quad_k_BGCS.flatten(0, 1), scale, bias_CC).view(B, G, C, C)
    if activation == "softmax":
        # Other activations need no mask, since empty slots have value 0; in a softmax they would still take a share.
        # Not -inf: a query without keys (an empty slot) must stay finite, in the backward too.
        scores = scores.masked_fill(~layout.occupied_BGC[:, :, None, :], torch.finfo(scores.dtype).min)
    if previous is not None:
        before = scores_of(queries, previous.k_BGCS.flatten(0, 1), scale, previous_bias_CC).view(B, G, C, C)
        hidden = torch.finfo(scores.dtype).min if activation == "softmax" else -math.inf
        scores = torch.cat([before.masked_fill(~previous.visible_BGC[:, :, None, :], hidden), scores], -1)
    weights = activate(scores, activation)
    if dropout:
        weights = F.dropout(weights, dropout)
    if previous is None:
        return weights @ value_BGCE
    return weights[..., :C] @ previous.value_BGCE + weights[..., C:] @ value_BGCE


def previous_chunks(
    k_BGCS: Tensor, value_BGCE: Tensor, layout: ChunkLayout, state: DecodingState | None
) -> PreviousChunks:
    """Keys and values of the chunk before each, from the cache for a row's first chunk."""
    B, G, C, _ = value_BGCE.shape
    if state is None:
        first_k, first_value = torch.zeros_like(k_BGCS[:, 0]), torch.zeros_like(value_BGCE[:, 0])
        visible_BC = torch.zeros(B, C, dtype=torch.bool, device=k_BGCS.device)
    else:
        opens_B11 = (layout.phase_B == 0)[:, None, None]
        first_k = torch.where(opens_B11, state.quad_k[:, :C], state.previous_k).to(k_BGCS.dtype)
        first_value = torch.where(opens_B11, state.value, state.previous_value).to(value_BGCE.dtype)
        visible_BC = held_before(state.seen - layout.phase_B, C) & layout.continues_B[:, None]

    def before(first_BXF: Tensor, x_BGXF: Tensor) -> Tensor:
        if is_tracing():  # slices of length G - 1 would fix it
            return torch.cat([first_BXF[:, None], x_BGXF], 1)[:, :-1]
        return torch.cat([first_BXF[:, None], x_BGXF[:, :-1]], 1)

    visible_BGC = before(visible_BC, layout.occupied_BGC.expand(B, -1, -1))
    if layout.first_BG is not None:
        chunk_G = torch.arange(G, device=k_BGCS.device)
        visible_BGC = visible_BGC & ((layout.first_BG < chunk_G) | (chunk_G == 0))[..., None]
    return PreviousChunks(before(first_k, k_BGCS), before(first_value, value_BGCE), visible_BGC)


def chunk_products(lin_k_BGCS: Tensor, value_BGCE: Tensor) -> Tensor:
    """`sum_c k_c v_c^T` of every chunk, `[B, G, S, E]`, at least float32."""
    product = lin_k_BGCS.transpose(2, 3) @ value_BGCE
    return product.to(wide(product.dtype))


def running_states(product_BGSE: Tensor, initial_BSE: Tensor | None) -> Tensor:
    """Running sums over a row's chunks, `[B, G + 1, S, E]`: entry g is the sum before chunk g, the last one of all."""
    if initial_BSE is None:
        initial_BSE = torch.zeros_like(product_BGSE[:, 0])
    return torch.cat([initial_BSE[:, None], product_BGSE], 1).cumsum(1)


def _select(x_BGXF: Tensor, index_BG: Tensor) -> Tensor:
    """`out[b, g] = x[b, index[b, g]]`."""
    return x_BGXF.gather(1, index_BG[..., None, None].expand(-1, -1, *x_BGXF.shape[2:]))


def previous_keys(own_BGCS: Tensor, layout: ChunkLayout, before_BS: Tensor | None) -> Tensor:
    """Shifted keys, `[B, G, C, S]`: of the token before each slot's in its document, 0 at the first.

    Args:
        own_BGCS: the slots' own keys.
        before_BS: the key before a row's first slot, unless that begins a document.
    """
    flat_BKS = own_BGCS.flatten(1, 2)
    before_BS = torch.zeros_like(flat_BKS[:, 0]) if before_BS is None else before_BS.to(flat_BKS.dtype)
    moved_BKS = torch.cat([before_BS[:, None], flat_BKS[:, :-1]], 1)
    # Documents take whole chunks: only the slot before a first token belongs to another document, or is empty.
    return moved_BKS.masked_fill((layout.position_BGC.flatten(1) == 0)[..., None], 0).view_as(own_BGCS)


def shifted_dims(key_dim: int, interleaved: bool, device: torch.device) -> Tensor:
    """Which dimensions of local keys `local_key_shift` takes from the token before: every second of RoPE's pairs,
    bool `[S]`."""
    pair_S = torch.arange(key_dim, device=device)
    return (pair_S // 2 if interleaved else pair_S) % 2 == 1


def mixed_chunk_attention(
    qk: QueryKeys,
    value_BGCE: Tensor,
    layout: ChunkLayout,
    *,
    causal: bool,
    chunk_size: int,
    activation: Activation = "relu2",
    divisor: float,
    bias_R: Tensor | None = None,
    normalization: Normalization = "mean",
    dropout: float = 0.0,
    previous_key: bool = False,
    shifted_S: Tensor | None = None,
    before: QueryKeys | None = None,
    window: int = 1,
    state: DecodingState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, DecodingState | None]:
    """Mixed chunk attention (arXiv 2202.10447, section 3.2): eq. 4 inside chunks plus eq. 5 across them.

    Args:
        qk: on the grid of `layout`, each `[B, G, C, S]`.
        value_BGCE: values, 0 at empty slots.
        chunk_size: the configured C; a short input has a shorter chunk.
        bias_R: relative bias `[2 * window * C - 1]` for the grid's C, or None.
        previous_key: store values under shifted keys in the global sum.
        shifted_S: dimensions of local keys to take from the token before ([`shifted_dims`]), or None.
        before: keys of the token before a row's first slot, each `[B, S]`, where another process holds it.
        window: chunks of keys that the local part sees: its own, or with 2 the one before it, too.
        state: decoding state to continue; causal only.
        return_state: also return the state after these tokens, detached from the graph.

    Returns:
        `[B, G, C, E]`, and the new state or None.
    """
    quad_q, quad_k, lin_q, lin_k, _ = qk
    own_before, before = (None, None) if before is None else (before.quad_k, before.lin_k)
    initial = exchange = None
    own_quad_k = quad_k
    if state is not None:
        quad_k, value_BGCE = (
            None if new is None else _continue_chunk(new, old[:, : state.value.shape[1]], layout)
            for new, old in ((quad_k, state.quad_k), (value_BGCE, state.value))
        )
    if quad_k is not None and shifted_S is not None:
        if state is not None:  # slot j + 1 holds the shifted dimensions of slot j's own key
            own_quad_k = _continue_chunk(own_quad_k, state.quad_k[:, 1:], layout)
            own_before = _newest_key(state.quad_k, layout)
        quad_k = torch.where(shifted_S, previous_keys(own_quad_k, layout, own_before), quad_k)
    if state is not None:
        if lin_k is not None:
            lin_k = _continue_chunk(lin_k, state.lin_k[:, 1:] if previous_key else state.lin_k, layout)
            initial = closed_total(state, layout.cached_BC) * layout.continues_B[:, None, None]
        if lin_k is not None and previous_key:
            before = _newest_key(state.lin_k, layout)

    B, G, C, E = value_BGCE.shape
    total, stored_k = None, lin_k
    # The causal global part is zero in a first chunk, and skipped for a short input. Not for TorchScript, which would
    # skip it for any input if its example is short, nor on its own, since parameters would have no gradient.
    begins = initial is not None or layout.neighbours is not None
    skips = causal and G == 1 and not begins and not return_state and not torch.jit.is_tracing()
    needs_lin = lin_q is not None and (quad_q is None or not skips)
    if needs_lin:
        if previous_key:
            stored_k = previous_keys(lin_k, layout, before)
        product = chunk_products(stored_k, value_BGCE)
        if layout.neighbours is not None:
            exchange = layout.neighbours.start_exchange(product)
    out = previous = None
    if quad_k is not None and window > 1 and (G > 1 or state is not None or return_state or torch.jit.is_tracing()):
        previous = previous_chunks(quad_k, value_BGCE, layout, state)
    if quad_q is not None:
        options = {"activation": activation, "divisor": divisor, "bias_R": bias_R, "dropout": dropout}
        out = local_attention(quad_q, quad_k, value_BGCE, layout, causal=causal, previous=previous, **options)
    if needs_lin:
        if exchange is not None:
            product, initial = exchange()
        if not causal and layout.first_BG is None:
            states = product.sum(1, keepdim=True)
        else:
            running = running_states(product, initial)
            if layout.first_BG is None:
                states = running[:, :-1]
            else:
                # Packed rows: subtract the running sum of earlier documents. A document that continues the cache is
                # the first of its row, and keeps the sum it began with.
                base = _select(running, layout.first_BG).masked_fill((layout.first_BG == 0)[..., None, None], 0)
                states = (running[:, :-1] if causal else _select(running, layout.last_BG + 1)) - base
            if return_state:
                total = running[:, -1]
                if layout.first_BG is not None:
                    total = at_final(states + product, layout)
        count_BG = layout.before_BG if causal else layout.count_BG
        states = states * global_scale(count_BG, normalization, chunk_size, states.dtype)[..., None, None]
        # One product per group of chunks with the same state: all chunks of a row, or each chunk.
        groups = states.shape[1]
        query = lin_q.reshape(B * groups, -1, lin_q.shape[-1])
        states = states.to(value_BGCE.dtype).flatten(0, 1)
        if out is None:
            out = torch.bmm(query, states)
        else:
            out = torch.baddbmm(out.reshape(B * groups, -1, E), query, states)
        out = out.view(B, G, C, E)
    if out is None:
        out = torch.zeros_like(value_BGCE)
    if not return_state:
        return out, None
    open_grids = [None if grid is None else at_final(grid, layout) for grid in (quad_k, stored_k, value_BGCE)]
    for index, own, shifts in ((0, own_quad_k, shifted_S is not None), (1, lin_k, previous_key)):
        if own is not None and shifts:
            full_B1 = at_final(layout.occupied_BGC.expand(B, -1, -1)[..., None], layout)[:, -1]
            newest_BS = torch.where(full_B1, at_final(own, layout)[:, -1], open_grids[index][:, 0])
            open_grids[index] = torch.cat([open_grids[index], newest_BS[:, None]], 1)
    # Copies, since views would keep the whole grid alive as long as the cache.
    behind = chunk_size - C - layout.skipped
    closed_grids = [None, None] if previous is None else [at_final(grid, layout) for grid in previous[:2]]
    if previous is not None and state is not None:
        # A row of padding at the border of a chunk: the closed chunk stays in the open one's place.
        empty_B11 = ~at_final(layout.occupied_BGC.expand(B, -1, -1)[..., None], layout).any(1, keepdim=True)
        for index, closed in ((0, closed_grids[0]), (2, closed_grids[1])):
            held = torch.where(empty_B11, closed, open_grids[index][:, :C])
            open_grids[index] = torch.cat([held, open_grids[index][:, C:]], 1)
    quad_k, lin_k, value, previous_k, previous_value = (
        None if grid is None else F.pad(grid.detach(), (0, 0, layout.skipped, behind)).clone()
        for grid in (*open_grids, *closed_grids)
    )
    total = None if total is None else total.detach().clone()
    seen_B = layout.seen_after_B.expand(B).clone()
    return out, DecodingState(
        quad_k, lin_k, value, total, seen_B, previous_k=previous_k, previous_value=previous_value
    )


def _continue_chunk(new_BGCF: Tensor, old_BCF: Tensor, layout: ChunkLayout) -> Tensor:
    """Put the cached slots in front of chunk 0."""
    first_BCF = torch.where(layout.cached_BC[..., None], old_BCF.to(new_BGCF.dtype), new_BGCF[:, 0])
    return torch.cat([first_BCF[:, None], new_BGCF[:, 1:]], 1)


def _newest_key(cached_BKS: Tensor, layout: ChunkLayout) -> Tensor:
    """The key before a row's first slot, `[B, S]`: at a chunk border the state has it behind the chunk."""
    return torch.where(layout.phase_B[:, None] == 0, cached_BKS[:, -1], cached_BKS[:, 0])


def at_final(x_BGXF: Tensor, layout: ChunkLayout) -> Tensor:
    """The chunk of each row that stays open, `[B, X, F]`."""
    return x_BGXF[:, -1] if layout.final_B is None else _select(x_BGXF, layout.final_B[:, None])[:, 0]


def closed_total(state: DecodingState, open_BC: Tensor) -> Tensor:
    """Sum of `lin_k v^T` over closed chunks, `[B, S, E]`: the total without the open chunk's tokens."""
    dtype = state.total.dtype
    key = torch.where(open_BC[..., None], state.lin_k[:, : open_BC.shape[1]], 0).to(dtype)
    value = torch.where(open_BC[..., None], state.value, 0).to(dtype)
    # Outside of autocast: this must cancel what float32 steps have added, as exactly as possible.
    with torch.autocast(state.total.device.type, enabled=False):
        return state.total - key.transpose(1, 2) @ value


def mixed_chunk_step(
    qk: QueryKeys,
    value_B1E: Tensor,
    layout: StepLayout,
    state: DecodingState,
    *,
    activation: Activation = "relu2",
    divisor: float,
    bias_R: Tensor | None = None,
    normalization: Normalization = "mean",
    previous_key: bool = False,
    shifted_S: Tensor | None = None,
    window: int = 1,
) -> Tensor:
    """Mixed chunk attention for one token per row, which advances the state in place: no branch on values but on a
    CPU, and the same cost at any length (on a CPU it grows with the open chunk).

    With `t` tokens seen, `c = 1 / tokens in closed chunks` and the open chunk's slots `j`:
    `out = sum_j (A_j - c lin_q lin_k_j) v_j + c lin_q total`, since `total` also counts the open chunk.

    Args:
        qk: each `[B, 1, S]`, or None.
        value_B1E: `[B, 1, E]`.
        bias_R: relative bias `[2 * window * C - 1]`, or None.

    Returns:
        `[B, 1, E]`; any finite values where the token is padding, which leaves the state as it is.
    """
    # Exporters treat every size of a cache as a variable, but this one is a constant.
    C = int(state.value.shape[1])
    seen_B = state.seen
    phase_B = (seen_B + layout.shift) % C
    # Tokens in closed chunks; the first chunk may begin before its document.
    closed_B = (seen_B - phase_B).clamp(min=0)
    # A CPU need not read the slots behind the newest token; elsewhere their number would have to be waited for.
    partly = seen_B.device.type == "cpu" and window == 1 and not is_tracing()
    slots = int(phase_B.max()) + 1 if partly else C
    slot_C = torch.arange(slots, device=seen_B.device)
    held_BC = (slot_C < phase_B[:, None]) & (slot_C >= (phase_B - seen_B)[:, None])
    visible_BC = held_BC | (slot_C == phase_B[:, None])
    valid_B1 = layout.valid_BN

    def index_of(slot_B: Tensor, cache_BCF: Tensor) -> Tensor:
        return slot_B[:, None, None].expand(-1, 1, cache_BCF.shape[2])

    def write(cache_BCF: Tensor | None, new_B1F: Tensor | None, slot_B: Tensor = phase_B):
        if cache_BCF is not None:
            index = index_of(slot_B, cache_BCF)
            new_B1F = new_B1F.detach().to(cache_BCF.dtype)
            if valid_B1 is not None:
                new_B1F = torch.where(valid_B1[..., None], new_B1F, cache_BCF.gather(1, index))
            cache_BCF.scatter_(1, index, new_B1F)

    def shift(cache_BKS: Tensor, own_B1S: Tensor) -> Tensor:
        """The key of the token before; this token's own is left for the next one."""
        newest_B = torch.where(phase_B == 0, C, phase_B)
        before_B1S = cache_BKS.gather(1, index_of(newest_B, cache_BKS)).masked_fill((seen_B == 0)[:, None, None], 0)
        write(cache_BKS, own_B1S, phase_B + 1)
        return before_B1S

    quad_k, key_B1S = qk.quad_k, qk.lin_k
    if window > 1:
        opens_B11 = (phase_B == 0)[:, None, None]
        state.previous_k.copy_(torch.where(opens_B11, state.quad_k[:, :C], state.previous_k))
        state.previous_value.copy_(torch.where(opens_B11, state.value, state.previous_value))
    if quad_k is not None and shifted_S is not None:
        quad_k = torch.where(shifted_S, shift(state.quad_k, quad_k).to(quad_k.dtype), quad_k)
    if key_B1S is not None and previous_key:
        key_B1S = shift(state.lin_k, key_B1S)
    write(state.quad_k, quad_k)
    write(state.lin_k, key_B1S)
    write(state.value, value_B1E)

    dtype = value_B1E.dtype
    weights_B1C = None
    if qk.quad_q is not None:
        scale = score_scale(activation, divisor, qk.quad_q.shape[-1])
        keys, offset_BW = state.quad_k[:, :slots], slot_C - phase_B[:, None]
        if window > 1:
            keys, offset_BW = torch.cat([state.previous_k, keys], 1), torch.cat([offset_BW - C, offset_BW], 1)
            visible_BC = torch.cat([held_before(closed_B, C), visible_BC], 1)
        bias_B1W = torch.zeros_like(offset_BW, dtype=qk.quad_q.dtype)[:, None]
        if bias_R is not None:
            bias_B1W = bias_R.to(qk.quad_q.dtype)[offset_BW + window * C - 1][:, None]
        bias_B1W = bias_B1W.masked_fill(~visible_BC[:, None], -math.inf)
        weights_B1C = activate(scores_of(qk.quad_q, keys.to(qk.quad_q.dtype), scale, bias_B1W), activation)
        if window > 1:
            before_B1C, weights_B1C = weights_B1C.to(dtype).split(C, -1)
    remote_B1E = None
    if qk.lin_q is not None:
        scale_B = global_scale(closed_B, normalization, C, state.total.dtype)
        query = qk.lin_q.to(state.total.dtype) * scale_B[:, None, None]
        with torch.autocast(seen_B.device.type, enabled=False):
            remote_B1E = torch.bmm(query, state.total).to(dtype)
            inside_B1C = torch.bmm(query, state.lin_k[:, :slots].to(query.dtype).transpose(1, 2))
            # The total does not include the new token yet.
            inside_B1C = torch.where(held_BC[:, None], inside_B1C, 0)
            key = key_B1S.detach().to(query.dtype).transpose(1, 2)
            if valid_B1 is not None:
                key = torch.where(valid_B1[..., None], key, 0)
            state.total.baddbmm_(key, value_B1E.detach().to(query.dtype))
        weights_B1C = (0 if weights_B1C is None else weights_B1C) - inside_B1C.to(dtype)
    out = torch.bmm(weights_B1C.to(dtype), state.value[:, :slots].to(dtype))
    if window > 1:
        out = torch.baddbmm(out, before_B1C, state.previous_value.to(dtype))
    state.seen.add_(1 if valid_B1 is None else valid_B1[:, 0].to(state.seen.dtype))
    return out if remote_B1E is None else out + remote_B1E


def mixed_chunk_append(
    qk: QueryKeys,
    value_BNE: Tensor,
    layout: AppendLayout,
    state: DecodingState,
    *,
    activation: Activation = "relu2",
    divisor: float,
    bias_R: Tensor | None = None,
    dropout: float = 0.0,
    previous_key: bool = False,
    shifted_S: Tensor | None = None,
    window: int = 1,
) -> tuple[Tensor | None, DecodingState]:
    """Mixed chunk attention for up to C tokens per row, with the sums of [`mixed_chunk_step`] but not in place:
    `out_n = sum_m (A_nm + s_nm c_n lin_q_n lin_k_m) v_m + c_n lin_q_n total`, with the signs s and the scales c of
    `layout`.

    Args:
        qk: each `[B, N, S]`, or None; finite at padding, too.
        value_BNE: `[B, N, E]`, 0 at padding.
        bias_R: relative bias `[2 * window * C - 1]`, or None.

    Returns:
        `[B, N, E]`, any finite values where the token is padding, or None without queries; and the new state, detached
        from the graph.
    """
    C, slots, dtype = state.value.shape[1], layout.slots, value_BNE.dtype
    quad_k, lin_k, newest_quad, newest_lin = qk.quad_k, qk.lin_k, None, None

    def shift(cache_BKS: Tensor, own_BNS: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of the token before each, and of the newest one."""
        newest_B1S = cache_BKS.gather(1, layout.newest_B11.expand(-1, 1, own_BNS.shape[2]))
        return layout.tokens_before(newest_B1S, own_BNS)

    if quad_k is not None and shifted_S is not None:
        moved_BNS, newest_quad = shift(state.quad_k, quad_k)
        quad_k = torch.where(shifted_S, moved_BNS, quad_k)
    if lin_k is not None and previous_key:
        lin_k, newest_lin = shift(state.lin_k, lin_k)
    previous_k = previous_value = None
    if window > 1:
        previous_k = torch.where(layout.opens_B11, state.quad_k[:, :C], state.previous_k)
        previous_value = torch.where(layout.opens_B11, state.value, state.previous_value)

    out = weights = total = None
    if qk.quad_q is not None:
        keys = [state.quad_k[:, :slots].to(quad_k.dtype), quad_k]
        keys = keys if window == 1 else [previous_k.to(quad_k.dtype), *keys]
        options = {"activation": activation, "divisor": divisor, "bias_R": bias_R}
        scores = visible_scores(qk.quad_q, torch.cat(keys, 1), layout.hidden_BNM, layout.offset_BNM, **options)
        weights = activate(scores, activation)
        weights = (F.dropout(weights, dropout) if dropout else weights).to(dtype)
        if window > 1:
            out, weights = torch.bmm(weights[..., :C], previous_value.to(dtype)), weights[..., C:]
    # Outside of autocast: sums must cancel as exactly as possible.
    with torch.autocast(value_BNE.device.type, enabled=False):
        if qk.lin_q is not None:
            query = (qk.lin_q * layout.scale_BN1).to(state.total.dtype)
            keys = torch.cat([state.lin_k[:, :slots], lin_k], 1).to(query.dtype)
            inside = torch.bmm(query, keys.transpose(1, 2))
            sign = layout.sign_BNM
            weights = (inside * sign if weights is None else torch.addcmul(weights, inside, sign)).to(dtype)
            remote = torch.bmm(query, state.total).to(dtype)
            out = remote if out is None else out + remote
        if lin_k is not None:
            with torch.no_grad():
                key = lin_k.to(state.total.dtype).transpose(1, 2)
                total = torch.baddbmm(state.total, key, value_BNE.to(key.dtype))
    if weights is not None:
        held, new = weights.split([slots, value_BNE.shape[1]], -1)
        inside = torch.bmm(new, value_BNE) if out is None else torch.baddbmm(out, new, value_BNE)
        out = torch.baddbmm(inside, held, state.value[:, :slots].to(dtype))

    with torch.no_grad():
        open_k, stored_k, open_value = (
            None if cache is None else written(cache, new, layout)
            for cache, new in ((state.quad_k, quad_k), (state.lin_k, lin_k), (state.value, value_BNE))
        )
        if window > 1:
            # Where a row goes on into the next chunk, its open one is closed: the old slots, and the first new tokens.
            crosses, new = layout.crosses_B11, layout.closing_BC1
            closed_k = torch.where(new, open_k[:, :C], state.quad_k[:, :C])
            previous_k = torch.where(crosses, closed_k, previous_k)
            previous_value = torch.where(crosses, torch.where(new, open_value, state.value), previous_value)
        # The next call's first key, in the slot behind the newest token.
        for cache, newest_B1S in ((open_k, newest_quad), (stored_k, newest_lin)):
            if newest_B1S is not None:
                index_B1S = layout.newest_after_B11.expand_as(newest_B1S)
                cache.scatter_(1, index_B1S, newest_B1S.to(cache.dtype))
        seen_B = layout.seen_after_B.clone()
    return out, DecodingState(
        open_k, stored_k, open_value, total, seen_B, previous_k=previous_k, previous_value=previous_value
    )


def written(cache_BXF: Tensor, new_BNF: Tensor, layout: AppendLayout) -> Tensor:
    """The cached slots, with the new tokens in theirs."""
    index_BNF, new_BNF = layout.write_BN1.expand_as(new_BNF), new_BNF.to(cache_BXF.dtype)
    if layout.padding_BN1 is not None:
        new_BNF = torch.where(layout.padding_BN1, cache_BXF.gather(1, index_BNF), new_BNF)
    return cache_BXF.scatter(1, index_BNF, new_BNF)


# ---- FLASH-Quad ----
def quadratic_attention(
    q_BNS: Tensor,
    k_BMS: Tensor,
    value_BME: Tensor,
    layout: QuadraticLayout,
    *,
    causal: bool,
    activation: Activation = "relu2",
    divisor: float,
    bias_R: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One quadratic attention over each document (FLASH-Quad, eq. 4 with the document as the chunk), `[B, N, E]`.

    Args:
        bias_R: relative bias of offsets `-(L-1) ... L-1` with `L` at least the largest distance plus 1, or None.
    """
    N = q_BNS.shape[1]
    visible_BNM, offset_BNM = layout.visible_BNM, layout.offset_BNM
    if visible_BNM is None and is_tracing() and bias_R is not None:
        # The views used below would fix the length of the graph.
        token_N = torch.arange(N, device=q_BNS.device)
        offset_BNM = (token_N - token_N[:, None])[None]
        visible_BNM = offset_BNM <= 0 if causal else torch.ones_like(offset_BNM, dtype=torch.bool)
    if visible_BNM is None:
        if bias_R is not None:
            margin = (bias_R.shape[0] + 1) // 2 - N
            bias_R = bias_R[margin : bias_R.shape[0] - margin]
        scale = score_scale(activation, divisor, q_BNS.shape[-1])
        scores = scores_of(q_BNS, k_BMS, scale, score_bias(bias_R, N, causal, q_BNS))
    else:
        options = {"activation": activation, "divisor": divisor, "bias_R": bias_R}
        if bias_R is not None:
            centre = (bias_R.shape[0] - 1) // 2
            offset_BNM = offset_BNM + centre
            # An exported program cannot check its length, but ONNX Runtime refuses an index out of range.
            if not is_exporting():
                offset_BNM = offset_BNM.clamp(0, 2 * centre)
        scores = visible_scores(q_BNS, k_BMS, ~visible_BNM, offset_BNM, **options)
    weights = activate(scores, activation)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ value_BME
