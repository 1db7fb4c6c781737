# SPDX-License-Identifier: Apache-2.0
"""One decoding step of a layer: one launch for everything between the input projections and the output projection, and
one more on either side for these with the norm and the residual sum. The delta rule has a fourth, for its gates.

Alphabet as in attention_flash.py: B rows, C slots of a chunk, D model width, E value width, S query/key width, H
heads.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_flash import DecodingState
from .common import INTERPRET, dot_precision, grid_wait
from .delta import log_sigmoid
from .dispatch import kernel
from .tiles import cdiv, on_device, power_of_2


# Enough programs to occupy the multiprocessors of a large GPU (108 to 132). More would only read the keys again.
FULL_GPU = 96
# Blocks of slots in flight.
STAGES = 3


@triton.jit
def activated(x_ptr, index, mask, SILU: tl.constexpr):
    """`x sigmoid(x)` in float32, or x if the caller has applied SiLU."""
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def turned_columns(col, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of columns: whether RoPE turns them, and then whether they are the first of a pair, the other one, the angle."""
    if INTERLEAVED:
        first, pair, angle = col % 2 == 0, col ^ 1, col // 2
    else:
        first = col < HALF
        pair, angle = tl.where(first, col + HALF, col - HALF), tl.where(first, col, col - HALF)
    return col < 2 * HALF, first, pair, angle


@triton.jit
def _head(z_2S, turn_2S, gamma_ptr, beta_ptr, col_2S, in_2S):
    """`RoPE(gamma z + beta)`: the column itself times cos plus its partner times +-sin."""
    gamma_2S = tl.load(gamma_ptr + col_2S, mask=in_2S, other=0.0).to(tl.float32)
    beta_2S = tl.load(beta_ptr + col_2S, mask=in_2S, other=0.0).to(tl.float32)
    return tl.sum((gamma_2S * z_2S + beta_2S) * turn_2S, 0)


@triton.jit
def _unit_length(x_S):
    return x_S / tl.maximum(tl.sqrt(tl.sum(x_S * x_S, 0)), 1e-12)


@kernel
@triton.jit
def _gated_step_kernel(
    u_ptr, v_ptr, z_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, position_ptr, valid_ptr,
    quad_k_ptr, lin_k_ptr, value_ptr, total_ptr, seen_ptr, bias_ptr, out_ptr,
    opened_ptr, gates_ptr, before_ptr,
    u_stride, v_stride, z_stride, rotary_stride, position_stride, valid_stride, score_scale, shift,
    C: tl.constexpr, E: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr,
    HAS_QUAD: tl.constexpr, HAS_LIN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr,
    COUNTS: tl.constexpr, MEAN: tl.constexpr, PREVIOUS: tl.constexpr, LOCAL: tl.constexpr, INTERLEAVED: tl.constexpr,
    SILU: tl.constexpr, DELTA: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row and BLOCK_E of its value columns. With the token in slot p of the open chunk, whose slots from b on are
    filled (a document's first chunk begins `shift` slots before it), and c the global part's scale,

        out = silu(u) (sum_{b<=j<p} (A_j - c lin_q.lin_k_j) v_j + A_p v_p + c lin_q total)
        A_j = relu(quad_q.quad_k_j score_scale + bias[j - p + C - 1])^2
        total += lin_k_p v_p^T

    where total, before that update, holds all tokens before this one. With PREVIOUS lin_k_p, the key that v_p goes
    under, is the token's before, and slot p + 1 gets the token's own; no linear head is turned. With LOCAL quad_k_p
    has every second pair of dimensions from the token's before, which are in slot p already (at a border in slot C),
    and slot p + 1 gets the token's own.

    With DELTA, instead of the parts with c, where q and k are lin_q and lin_k_p of length 1, opened is the total
    before the chunk, and `gates` holds the decay a, the strength w and the decay s since the chunk began,

        out += s q opened,    total = a total + w k (v_p - a k total)^T

    The key of the token before is in `before`; lin_k, which no program reads, gets the token's own.
    """
    grid_wait()
    blocks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    # Programs of one row are neighbours in time, so that all but the first find its keys in L2.
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks

    # Not from `seen`, which another program of this row may have advanced.
    position = tl.load(position_ptr + row * position_stride)
    phase = ((position + shift) % C).to(tl.int32)
    closed = tl.maximum(position - phase, 0)
    first = phase - position
    slots = phase
    if HAS_VALID:
        valid = tl.load(valid_ptr + row * valid_stride) != 0
        # Padding has no valid phase, and its output is 0 in any case.
        slots = tl.where(valid, slots, 0)
    else:
        valid = True

    col_S = tl.arange(0, BLOCK_S)
    in_S = col_S < S
    e_E = block * BLOCK_E + tl.arange(0, BLOCK_E)
    in_E = e_E < E

    # A small block of the total is loaded first, so that it arrives during the loop below. A large one is not worth
    # the registers, since other programs then hide the latency.
    total_ptr += row * S * E
    total_at = col_S[:, None] * E + e_E[None, :]
    total_mask = in_S[:, None] & in_E[None, :] & valid
    EARLY: tl.constexpr = BLOCK_S * BLOCK_E <= (4096 if DELTA else 8192)
    if (HAS_LIN or DELTA) and EARLY:
        total_SE = tl.load(total_ptr + total_at, mask=total_mask, other=0.0)
    opened_ptr += row * S * E
    opened_mask = total_mask & (phase > 0)
    if DELTA and EARLY:
        opened_SE = tl.load(opened_ptr + total_at, mask=opened_mask, other=0.0)

    # -- the new token's heads. z is loaded twice, the column itself in row 0 of a tile and its partner in row 1, which
    # are then summed. This saves shuffles, and the compiler computes a sum once; elementwise heads it would compute
    # again, with their loads, for every layout that reads them.
    col_1S = col_S[None, :]
    turned_1S, first_1S, pair_1S, angle_1S = turned_columns(col_1S, HALF, INTERLEAVED)
    itself_21 = tl.arange(0, 2)[:, None] == 0
    col_2S = tl.where(itself_21, col_1S, pair_1S)
    in_2S = tl.where(itself_21, col_1S < S, turned_1S)
    cos_ptr += row * rotary_stride
    sin_ptr += row * rotary_stride
    # The other columns are rotated by 0.
    cos_2S = tl.load(cos_ptr + angle_1S, mask=turned_1S & itself_21, other=1.0).to(tl.float32)
    sin_2S = tl.load(sin_ptr + angle_1S, mask=turned_1S & ~itself_21, other=0.0).to(tl.float32)
    turn_2S = tl.where(itself_21, cos_2S, tl.where(first_1S, -sin_2S, sin_2S))
    z_2S = activated(z_ptr + row * z_stride, col_2S, in_2S, SILU)
    # Rounded as the state stores them: while the chunk is open, a token's part of the total has to cancel against the
    # contents of its slot.
    cache: tl.constexpr = value_ptr.dtype.element_ty
    v_E = activated(v_ptr + row * v_stride, e_E, in_E, SILU).to(cache)
    LIN: tl.constexpr = 2 * S if HAS_QUAD else 0
    own_weight = 0.0
    newest = tl.where(phase == 0, C, phase)
    quad_k_ptr += row * (C + LOCAL) * S
    if HAS_QUAD:
        quad_q_S = _head(z_2S, turn_2S, gamma_ptr, beta_ptr, col_2S, in_2S)
        own_quad_k_S = _head(z_2S, turn_2S, gamma_ptr + S, beta_ptr + S, col_2S, in_2S).to(cache)
        quad_k_S = own_quad_k_S
        if LOCAL:
            # Of slot p programs read only what the row's first program writes there unchanged.
            taken_S = (col_S // 2 if INTERLEAVED else col_S) % 2 == 1
            key_mask_S = taken_S & in_S & valid & (position > 0)
            quad_k_S = tl.where(
                taken_S, tl.load(quad_k_ptr + newest * S + col_S, mask=key_mask_S, other=0.0), quad_k_S
            )
        quad_q_S *= score_scale
        own_score = tl.sum(quad_q_S * quad_k_S.to(tl.float32), 0)
        if HAS_BIAS:
            own_score += tl.load(bias_ptr + C - 1).to(tl.float32)
        own_weight = tl.where(own_score < 0, 0.0, own_score * own_score)
    if HAS_LIN or DELTA:
        lin_turn_2S = tl.where(itself_21, 1.0, 0.0) if PREVIOUS else turn_2S
        lin_q_S = _head(z_2S, lin_turn_2S, gamma_ptr + LIN, beta_ptr + LIN, col_2S, in_2S)
        own_k_S = _head(z_2S, lin_turn_2S, gamma_ptr + LIN + S, beta_ptr + LIN + S, col_2S, in_2S).to(cache)
    if DELTA:
        key_S = own_k_S
        if PREVIOUS:
            before_S = tl.load(before_ptr + row * S + col_S, mask=in_S, other=0.0)
            key_S = tl.where(position > 0, before_S, 0.0)
        key_S = _unit_length(key_S.to(tl.float32))
    if HAS_LIN:
        scale = 1.0 / C
        if MEAN:
            scale = 1.0 / tl.maximum(closed, 1).to(tl.float32)
        lin_q_S *= tl.where(closed > 0, scale, 0.0)
        # In a document's first chunk there is nothing to subtract.
        lin_slots = tl.where(closed > 0, slots, 0)

    # -- the open chunk's slots before this one; others are never loaded
    value_ptr += row * C * E
    if HAS_LIN:
        lin_k_ptr += row * (C + PREVIOUS) * S
        lin_k_S = own_k_S
        if PREVIOUS:
            lin_k_S = tl.load(lin_k_ptr + newest * S + col_S, mask=in_S & valid & (position > 0), other=0.0)
    # Slots are summed after the loop: one sum across threads instead of one per block.
    sum_CE = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    # Under numpy 2.4 the interpreter of triton 3.6 cannot end a loop at a tensor (triton issue 9171): it walks through
    # all slots, of which the masks leave the same.
    last = slots if HAS_QUAD or HAS_LIN else 0
    for start in tl.range(0, C if INTERPRETED else last, BLOCK_C, num_stages=STAGES):
        slot_C = start + tl.arange(0, BLOCK_C)
        live_C = (slot_C < slots) & (slot_C >= first)
        weight_C = tl.zeros([BLOCK_C], tl.float32)
        key_at = slot_C[:, None] * S + col_S[None, :]
        if HAS_QUAD:
            key_CS = tl.load(quad_k_ptr + key_at, mask=live_C[:, None] & in_S[None, :], other=0.0).to(tl.float32)
            score_C = tl.sum(key_CS * quad_q_S[None, :], 1)
            if HAS_BIAS:
                score_C += tl.load(bias_ptr + slot_C - phase + C - 1, mask=live_C, other=0.0).to(tl.float32)
            # tl.maximum would turn NaN into 0.
            weight_C = tl.where(score_C < 0, 0.0, score_C * score_C)
        if HAS_LIN:
            key_mask = (slot_C < lin_slots)[:, None] & in_S[None, :]
            key_CS = tl.load(lin_k_ptr + key_at, mask=key_mask, other=0.0).to(tl.float32)
            weight_C -= tl.sum(key_CS * lin_q_S[None, :], 1)
        # The bias gives empty slots a weight, but their value is 0.
        value_at = slot_C[:, None] * E + e_E[None, :]
        value_CE = tl.load(value_ptr + value_at, mask=live_C[:, None] & in_E[None, :], other=0.0).to(tl.float32)
        sum_CE += weight_C[:, None] * value_CE
    new_E = v_E.to(tl.float32)
    out_E = tl.sum(sum_CE, 0) + own_weight * new_E

    # -- the state
    writes_E = in_E & valid
    tl.store(value_ptr + phase.to(tl.int64) * E + e_E, v_E, mask=writes_E)
    if HAS_LIN:
        if not EARLY:
            total_SE = tl.load(total_ptr + total_at, mask=total_mask, other=0.0)
        out_E += tl.sum(total_SE * lin_q_S[:, None], 0)
        total_SE += lin_k_S.to(tl.float32)[:, None] * new_E[None, :]
        tl.store(total_ptr + total_at, total_SE, mask=total_mask)
    if DELTA:
        if not EARLY:
            total_SE = tl.load(total_ptr + total_at, mask=total_mask, other=0.0)
            opened_SE = tl.load(opened_ptr + total_at, mask=opened_mask, other=0.0)
        decay = tl.load(gates_ptr + row * 3)
        strength = tl.load(gates_ptr + row * 3 + 1)
        since = tl.load(gates_ptr + row * 3 + 2)
        tl.store(opened_ptr + total_at, total_SE, mask=total_mask & (phase == 0))
        opened_SE = tl.where(phase == 0, total_SE, opened_SE)
        out_E += tl.sum(opened_SE * (since * _unit_length(lin_q_S))[:, None], 0)
        missing_E = new_E - decay * tl.sum(total_SE * key_S[:, None], 0)
        total_SE = decay * total_SE + (strength * key_S)[:, None] * missing_E[None, :]
        tl.store(total_ptr + total_at, total_SE, mask=total_mask)
    # Once per row.
    writes = (block == 0) & valid
    if DELTA and PREVIOUS:
        tl.store(lin_k_ptr + row * S + col_S, own_k_S, mask=in_S & writes)
    if HAS_QUAD:
        tl.store(quad_k_ptr + phase.to(tl.int64) * S + col_S, quad_k_S, mask=in_S & writes)
        if LOCAL:
            tl.store(quad_k_ptr + (phase + 1) * S + col_S, own_quad_k_S, mask=in_S & writes)
    if HAS_LIN and PREVIOUS:
        # Other programs of this row read none of these slots.
        tl.store(lin_k_ptr + phase * S + col_S, lin_k_S, mask=in_S & writes & ((phase == 0) | (position == 0)))
        tl.store(lin_k_ptr + (phase + 1) * S + col_S, own_k_S, mask=in_S & writes)
    elif HAS_LIN:
        tl.store(lin_k_ptr + phase.to(tl.int64) * S + col_S, lin_k_S, mask=in_S & writes)
    if COUNTS:
        tl.store(seen_ptr + row, tl.load(seen_ptr + row, mask=writes, other=0) + 1, mask=writes)

    u_E = activated(u_ptr + row * u_stride, e_E, in_E, SILU)
    # 0 for padding, whose own bias is read at no valid phase.
    tl.store(out_ptr + row * E + e_E, tl.where(valid, out_E * u_E, 0.0), mask=in_E)


@triton.jit
def _product(
    x_ptr, w_ptr, row_B, column_N, B, N, K, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SQUARES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`x w^T` of some rows and columns, and with SQUARES the rows' sums of squares; x is `[B, K]` and w `[N, K]`."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    squares_B = tl.zeros((BLOCK_B,), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        in_K = start + k < K
        x = tl.load(x_ptr + row_B[:, None] * K + start + k, mask=(row_B < B)[:, None] & in_K, other=0.0)
        w = tl.load(w_ptr + column_N[:, None] * K + start + k, mask=(column_N < N)[:, None] & in_K, other=0.0)
        if SQUARES:
            wide = x.to(tl.float32)
            squares_B += tl.sum(wide * wide, 1)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    return acc, squares_B


@kernel
@triton.jit
def _project_kernel(
    x_ptr, gain_ptr, w_u_ptr, w_v_ptr, w_z_ptr, b_u_ptr, b_v_ptr, b_z_ptr, out_ptr, B, D, E, S, eps,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """u, v and z, `norm(x) w^T + b`, of some rows and columns, `[B, 2 E + S]`. ScaleNorm's factor, one number per row,
    is applied after the product."""
    grid_wait()
    blocks = tl.cdiv(E, BLOCK_N)
    block = tl.program_id(0)
    w_ptr, b_ptr, N, before = w_u_ptr, b_u_ptr, E, 0
    if block >= 2 * blocks:
        w_ptr, b_ptr, N, before = w_z_ptr, b_z_ptr, S, 2 * E
        block -= 2 * blocks
    elif block >= blocks:
        w_ptr, b_ptr, before = w_v_ptr, b_v_ptr, E
        block -= blocks
    column_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    acc, squares_B = _product(
        x_ptr, w_ptr, row_B, column_N, B, N, D, BLOCK_B, BLOCK_N, BLOCK_K, True, PRECISION, STAGES
    )
    scale_B = tl.rsqrt(squares_B / D + eps) * tl.load(gain_ptr).to(tl.float32)
    in_N = column_N < N
    acc = acc * scale_B[:, None] + tl.load(b_ptr + column_N, mask=in_N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row_B[:, None] * (2 * E + S) + before + column_N
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(row_B < B)[:, None] & in_N)


@kernel
@triton.jit
def _residual_kernel(
    x_ptr, h_ptr, w_ptr, b_ptr, out_ptr, B, D, E,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`x + h w^T + b` of some rows and columns, `[B, D]`."""
    grid_wait()
    column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    acc, _ = _product(h_ptr, w_ptr, row_B, column_N, B, D, E, BLOCK_B, BLOCK_N, BLOCK_K, False, PRECISION, STAGES)
    mask = (row_B < B)[:, None] & (column_N < D)
    place = row_B[:, None] * D + column_N
    acc += tl.load(b_ptr + column_N, mask=column_N < D, other=0.0).to(tl.float32)[None, :]
    acc += tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@functools.cache
def step_tiles(batch: int, width: int, dtype: torch.dtype) -> dict:
    """Tiles of the products. Columns of the weights are many, each read once, and so are spread over all
    multiprocessors; rows are few. The tiles in flight fit into 100 KB."""
    wide = dtype == torch.float32
    block_b, block_n = min(max(power_of_2(batch), 16), 64), 16 if cdiv(width, 32) < FULL_GPU else 32
    step = 2048 if wide else 4096
    return {
        "BLOCK_B": block_b, "BLOCK_N": block_n, "BLOCK_K": min(step // block_n, 2 * step // block_b),
        "STAGES": 2 if wide else 4, "num_warps": 4,
    }  # fmt: skip


def project(
    x: Tensor, gain: Tensor, w_u: Tensor, w_v: Tensor, w_z: Tensor, b_u: Tensor, b_v: Tensor, b_z: Tensor, eps: float
) -> Tensor:  # fmt: skip
    """u, v and z next to each other, `[B, 2 E + S]`: `norm(x) w^T + b` of x `[B, D]`, without gradients."""
    (B, D), E, S = x.shape, w_u.shape[0], w_z.shape[0]
    out = x.new_empty(B, 2 * E + S)
    tiles = step_tiles(B, 2 * E + S, x.dtype)
    columns = 2 * cdiv(E, tiles["BLOCK_N"]) + cdiv(S, tiles["BLOCK_N"])
    with on_device(x):
        _project_kernel(
            (columns, cdiv(B, tiles["BLOCK_B"])), x, gain, w_u.contiguous(), w_v.contiguous(), w_z.contiguous(), b_u,
            b_v, b_z, out, B, D, E, S, eps, PRECISION=dot_precision(x.dtype), **tiles,
        )  # fmt: skip
    return out


def add_output(x: Tensor, h: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`x + h w^T + b` of x `[B, D]` and h `[B, E]`, without gradients."""
    (B, D), E = x.shape, h.shape[1]
    out = torch.empty_like(x)
    tiles = step_tiles(B, D, x.dtype)
    with on_device(x):
        _residual_kernel(
            (cdiv(D, tiles["BLOCK_N"]), cdiv(B, tiles["BLOCK_B"])), x, h, w.contiguous(), b, out, B, D, E,
            PRECISION=dot_precision(x.dtype), **tiles,
        )  # fmt: skip
    return out


def launch_shape(batch: int, width: int, key_dim: int, itemsize: int, delta: bool = False) -> tuple[int, int, int]:
    """BLOCK_C, BLOCK_E and warps.

    BLOCK_E is the widest block that leaves enough programs (each reads all keys of its row) and whose part of the
    total, `[S, BLOCK_E]` (with the delta rule of two states), fits the registers. BLOCK_C is as many slots as have 8
    KiB of keys. If there are few programs, large ones get more warps; many programs hide each other's loads.
    """
    block_s = power_of_2(key_dim)
    block_c = min(max(8192 // (block_s * itemsize), 8), 32)
    for block_e in (128, 64, 32):
        programs = batch * cdiv(width, block_e)
        if programs >= FULL_GPU and block_e * block_s <= (8192 if delta else 16384):
            return block_c, block_e, 8 if block_e * block_s > 4096 and programs < 4 * FULL_GPU else 4
    return block_c, 16, 4


def gated_step(
    u: Tensor, v: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, cos: Tensor | None, sin: Tensor | None,
    position: Tensor, valid: Tensor | None, quad_k: Tensor | None, lin_k: Tensor | None, value: Tensor,
    total: Tensor | None, seen: Tensor | None, bias_R: Tensor | None, divisor: float, mean: bool, interleaved: bool,
    silu: bool, shift: int, previous: bool, local_shift: bool,
) -> Tensor:  # fmt: skip
    """`silu(u) * mixed_chunk_step(heads of silu(z), silu(v))` with relu2 attention, in one kernel, without gradients.

    Args:
        u, v, z: projections of one new token per row, `[B, 1, E]`, `[B, 1, E]`, `[B, 1, S]`, or without the 1, dense
            in their last dimension, float32, float16 or bfloat16.
        gamma, beta: offset-scale, `[H, S]`: rows quad_q, quad_k, lin_q, lin_k, without those of absent branches.
        cos, sin: of the tokens' positions, `[B or 1, 1, r / 2]`, dense in their last dimension.
        position: tokens of the row's document before this one, int64 `[B or 1, 1]`. No view of `seen`, which the
            kernel advances while it reads this.
        valid: False where the token is padding, bool `[B, 1]`.
        quad_k, lin_k, value, total, seen: the `DecodingState`, contiguous; updated in place, except for padding. With
            None the caller counts `seen`.
        bias_R: relative bias `[2 * C - 1]`.
        divisor: constant under the scores.
        mean: whether the global part is normalised by "mean", otherwise by "chunk".
        interleaved: RoPE rotates the pairs (0, 1), (2, 3), ... instead of (0, r / 2), (1, r / 2 + 1), ...
        silu: whether to apply SiLU to u, v and z.
        shift: slots of a document's first chunk before its first token.
        previous: values go under the key of the token before them, and linear heads are not rotated.
        local_shift: local keys have every second pair of dimensions from the token before.

    Returns:
        A dense tensor like u; 0 for rows whose token is padding.
    """
    return _launch_step(
        u, v, z, gamma, beta, cos, sin, position, valid, quad_k, lin_k, value, total, seen, bias_R, divisor, mean,
        interleaved, silu, shift, previous, local_shift,
    )  # fmt: skip


class DeltaStep(NamedTuple):
    """What a step takes besides for the delta rule.

    Attributes:
        opened: the state before the open chunk, float32 `[B, S, E]`; updated in place where a chunk begins.
        gates: decay, strength and decay since the chunk began, this token's included, float32 `[B, 3]`.
        before: the key of the token before, `[B, S]`, if keys are shifted; else any tensor.
    """

    opened: Tensor
    gates: Tensor
    before: Tensor


def delta_step(delta: DeltaStep, *arguments) -> Tensor:
    """[`gated_step`] with the delta rule. `lin_k` is only written: the newest token's key, `[B, 1, S]`, or None
    without shifted keys."""
    return _launch_step(*arguments, delta)


def _launch_step(
    u, v, z, gamma, beta, cos, sin, position, valid, quad_k, lin_k, value, total, seen, bias_R, divisor, mean,
    interleaved, silu, shift, previous, local_shift, delta: DeltaStep | None = None,
) -> Tensor:  # fmt: skip
    B, E = u.shape[0], u.shape[-1]
    C, S = value.shape[1], z.shape[-1]
    out = u.new_empty(u.shape)
    block_c, block_e, warps = launch_shape(B, E, S, value.element_size(), delta is not None)
    # Any tensor takes the place of an absent one, which the kernel does not read.
    with on_device(u):
        _gated_step_kernel(
            (B * cdiv(E, block_e),),
            u, v, z, gamma, beta, z if cos is None else cos, z if sin is None else sin,
            position, position if valid is None else valid,
            value if quad_k is None else quad_k, value if lin_k is None else lin_k, value,
            value if total is None else total, position if seen is None else seen, z if bias_R is None else bias_R,
            out, *((value,) * 3 if delta is None else delta), u.stride(0), v.stride(0), z.stride(0),
            0 if cos is None or cos.shape[0] == 1 else cos.stride(0),
            0 if position.shape[0] == 1 else position.stride(0), 0 if valid is None else valid.stride(0),
            1.0 / divisor, shift,
            C=C, E=E, S=S, HALF=0 if cos is None else cos.shape[2],
            HAS_QUAD=quad_k is not None, HAS_LIN=delta is None and lin_k is not None, HAS_BIAS=bias_R is not None,
            HAS_VALID=valid is not None, COUNTS=seen is not None, MEAN=mean, PREVIOUS=previous, LOCAL=local_shift,
            INTERLEAVED=interleaved, SILU=silu, DELTA=delta is not None,
            BLOCK_C=block_c, BLOCK_E=block_e, BLOCK_S=power_of_2(S), STAGES=STAGES,
            INTERPRETED=INTERPRET, num_warps=warps,
        )  # fmt: skip
    return out


@kernel
@triton.jit
def _step_gates_kernel(
    x_ptr, gain_ptr, w_ptr, raw_ptr, bias_ptr, position_ptr, valid_ptr, since_ptr, new_since_ptr, lin_k_ptr, gates_ptr,
    keys_ptr, raw_row, raw_token, position_row, valid_row, valid_token, N, D, S, shift, eps,
    C: tl.constexpr, PROJECT: tl.constexpr, HAS_VALID: tl.constexpr, KEY: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of one row: the gates of N tokens, and with KEY the key of the token before them. Here and not in the kernel of
    the step, where other programs of the row would still read what one had advanced."""
    grid_wait()
    row = tl.program_id(0).to(tl.int64)
    if KEY:
        s = tl.arange(0, BLOCK_S)
        tl.store(keys_ptr + row * S + s, tl.load(lin_k_ptr + row * S + s, mask=s < S, other=0.0), mask=s < S)
    since = tl.load(since_ptr + row)
    for n in range(STEPS if STEPS else N):  # N for the interpreter, see `_gated_step_kernel`
        raw_at = raw_ptr + row * raw_row + n * raw_token
        if PROJECT:
            d = tl.arange(0, BLOCK_D)
            in_D = d < D
            x = tl.load(x_ptr + (row * N + n) * D + d, mask=in_D, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps) * tl.load(gain_ptr).to(tl.float32)
            forget = tl.sum(x * tl.load(w_ptr + d, mask=in_D, other=0.0).to(tl.float32), 0) * scale
            write = tl.sum(x * tl.load(w_ptr + D + d, mask=in_D, other=0.0).to(tl.float32), 0) * scale
            tl.store(raw_at, forget)
            tl.store(raw_at + 1, write)
        else:
            forget = tl.load(raw_at).to(tl.float32)
            write = tl.load(raw_at + 1).to(tl.float32)
        forget = log_sigmoid(forget + tl.load(bias_ptr).to(tl.float32))
        position = tl.load(position_ptr + row * position_row + n)
        real = True
        if HAS_VALID:
            real = tl.load(valid_ptr + row * valid_row + n * valid_token) != 0
        since = tl.where(real, tl.where((position + shift) % C == 0, 0.0, since) + forget, since)
        gates_at = gates_ptr + (row * N + n) * 3
        tl.store(gates_at, tl.exp(forget))
        tl.store(gates_at + 1, tl.sigmoid(write + tl.load(bias_ptr + 1).to(tl.float32)))
        tl.store(gates_at + 2, tl.exp(since))
    tl.store(new_since_ptr + row, since)


def step_gates(
    raw: Tensor, bias: Tensor, position: Tensor, valid: Tensor | None, state: DecodingState, since: Tensor, shift: int,
    key: Tensor | None = None, x: Tensor | None = None, gain: Tensor | None = None, w: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Of some tokens decay, strength and decay since the chunk began, the token's included, float32 `[B, N, 3]`.

    Args:
        raw: the gates without bias, `[B, N, 2]`; with x and w it is filled with those of `norm(x) w^T`.
        position, valid: as of `gated_step`, `[B or 1, N]` and `[B, N]`.
        since: gets the sum of log decays after these tokens, `[B]`; that before them is `state.since`.
        key: gets the key of the token before them, `[B, S]`.
        x: `[B N, D]`, under the norm's `gain` and `eps`.
        w: `[2, D]`.
    """
    B, N, _ = raw.shape
    C, S = state.value.shape[1], 1 if key is None else key.shape[1]
    gates = since.new_empty(B, N, 3)
    D = 1 if x is None else x.shape[1]
    with on_device(raw):
        _step_gates_kernel(
            (B,), raw if x is None else x, raw if gain is None else gain, raw if w is None else w, raw, bias, position,
            position if valid is None else valid, state.since, since, gates if key is None else state.lin_k, gates,
            gates if key is None else key, raw.stride(0), raw.stride(1),
            0 if position.shape[0] == 1 else position.stride(0), *((0, 0) if valid is None else valid.stride()), N, D,
            S, shift, eps,
            C=C, PROJECT=x is not None, HAS_VALID=valid is not None, KEY=key is not None,
            BLOCK_D=power_of_2(D), BLOCK_S=power_of_2(S), STEPS=N if INTERPRET else 0, num_warps=4,
        )  # fmt: skip
    return gates


def step_delta(
    raw: Tensor, bias: Tensor, position: Tensor, valid: Tensor | None, state: DecodingState, shift: int, key_dim: int,
    *projected,
) -> DeltaStep:  # fmt: skip
    """What the step of one token takes besides for the delta rule; advances `state.since`. `projected` are arguments
    of [`step_gates`] from x on, as are the others."""
    before = None if state.lin_k is None else state.lin_k.new_empty(len(raw), key_dim)
    gates = step_gates(raw, bias, position, valid, state, state.since, shift, before, *projected)
    return DeltaStep(state.opened, gates, gates if before is None else before)


def gated_delta_step(
    u: Tensor, v: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, cos: Tensor | None, sin: Tensor | None,
    position: Tensor, valid: Tensor | None, quad_k: Tensor | None, lin_k: Tensor | None, value: Tensor, total: Tensor,
    seen: Tensor | None, bias_R: Tensor | None, divisor: float, mean: bool, interleaved: bool, silu: bool, shift: int,
    previous: bool, local_shift: bool, opened: Tensor, since: Tensor, raw: Tensor | None, gate_bias: Tensor,
    x: Tensor | None, gain: Tensor | None, w: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """[`step_delta`] and [`delta_step`] with it: the operator of a compiled step. The gates are `raw`, or those of x,
    `[B, D]`."""
    state = DecodingState(quad_k, lin_k, value, total, seen, opened, since)
    if raw is None:
        raw = since.new_empty(len(x), 1, 2)
    delta = step_delta(raw, gate_bias, position, valid, state, shift, z.shape[-1], x, gain, w, eps)
    return delta_step(
        delta, u, v, z, gamma, beta, cos, sin, position, valid, quad_k, lin_k, value, total, seen, bias_R, divisor,
        mean, interleaved, silu, shift, previous, local_shift,
    )  # fmt: skip


# Not torch.library.custom_op: around an operator that writes to its arguments, its wrappers took 0.23 ms of the host
# per call, against 0.01 ms this way (2 shared cores, torch 2.13). They are for gradients, which a step does not have.
_LIBRARY = torch.library.Library("flash_hf", "FRAGMENT")
_STATE = ("quad_k", "lin_k", "value", "total", "seen")
_WRITES = {gated_step: _STATE, gated_delta_step: (*_STATE, "opened", "since"), project: (), add_output: ()}
for _function, _written in _WRITES.items():
    _LIBRARY.define(
        _function.__name__ + torch.library.infer_schema(_function, mutates_args=_written),
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
    )
    for _key in ("CUDA", "CPU"):
        _LIBRARY.impl(_function.__name__, _function, _key)


@torch.library.register_fake("flash_hf::gated_delta_step", lib=_LIBRARY)
@torch.library.register_fake("flash_hf::gated_step", lib=_LIBRARY)
def _(u, *others):
    return u.new_empty(u.shape)


@torch.library.register_fake("flash_hf::project", lib=_LIBRARY)
def _(x, gain, w_u, w_v, w_z, *others):
    return x.new_empty(len(x), 2 * len(w_u) + len(w_z))


@torch.library.register_fake("flash_hf::add_output", lib=_LIBRARY)
def _(x, *others):
    return torch.empty_like(x)


step_operator = torch.ops.flash_hf.gated_step.default
delta_operator = torch.ops.flash_hf.gated_delta_step.default
project_operator = torch.ops.flash_hf.project.default
output_operator = torch.ops.flash_hf.add_output.default
