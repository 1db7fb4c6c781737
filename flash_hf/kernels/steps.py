# SPDX-License-Identifier: Apache-2.0
"""Attention of a few new tokens per row with the decoding state, all at once: what as many calls of `step.py` compute.

Alphabet as in attention_flash.py, and N tokens of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_flash import DecodingState
from .common import INTERPRET, grid_wait
from .dispatch import kernel
from .step import FULL_GPU, STAGES, activated, turned_columns
from .tiles import cdiv, on_device, power_of_2


# A position that no token has.
NEVER = tl.constexpr(1 << 62)
# Columns of queries and keys that are multiplied at a time: in full precision these take three times the registers.
SLICE = 32


@triton.jit
def _places(position_ptr, valid_ptr, row, position_row, valid_row, valid_token, N, HAS_VALID: tl.constexpr, BLOCK_N):
    """Of a row's tokens: positions, which are real, the real one before each (-1 if that came before the call); the
    first position, NEVER without real tokens, and the last, -1 then."""
    n_N = tl.arange(0, BLOCK_N)
    real_N = n_N < N
    position_N = tl.load(position_ptr + row * position_row + n_N, mask=real_N, other=0)
    if HAS_VALID:
        real_N = real_N & (tl.load(valid_ptr + row * valid_row + n_N * valid_token, mask=real_N, other=0) != 0)
    earlier_NN = (n_N[None, :] < n_N[:, None]) & real_N[None, :]
    before_N = tl.max(tl.where(earlier_NN, n_N[None, :], -1), 1)
    first, last = tl.min(tl.where(real_N, position_N, NEVER), 0), tl.max(tl.where(real_N, position_N, -1), 0)
    return position_N, real_N, before_N, first, last


@triton.jit
def _load_z(
    z_ptr, cos_ptr, sin_ptr, token_N, real_N, z_token, rotary_token, S, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    SILU: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Some of a row's tokens: z, its partner under RoPE, and what these are multiplied by; z is 0 where not real."""
    col_S = tl.arange(0, BLOCK_S)
    in_S = col_S < S
    turned_S, first_S, pair_S, angle_S = turned_columns(col_S, HALF, INTERLEAVED)
    z_NS = activated(z_ptr, token_N[:, None] * z_token + col_S, real_N[:, None] & in_S, SILU)
    pair_NS = activated(z_ptr, token_N[:, None] * z_token + pair_S, real_N[:, None] & turned_S, SILU)
    angle_NS, turned_NS = token_N[:, None] * rotary_token + angle_S, real_N[:, None] & turned_S
    cos_NS = tl.load(cos_ptr + angle_NS, mask=turned_NS, other=1.0).to(tl.float32)
    sin_NS = tl.load(sin_ptr + angle_NS, mask=turned_NS, other=0.0).to(tl.float32)
    sin_NS = tl.where(first_S, -sin_NS, sin_NS)
    return z_NS, pair_NS, cos_NS, sin_NS


@triton.jit
def _heads(
    token, gamma_ptr, beta_ptr, S, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, TURN: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """`RoPE(gamma z + beta)` of tokens as `_load_z` returns them, or without RoPE."""
    z_NS, pair_NS, cos_NS, sin_NS = token
    col_S = tl.arange(0, BLOCK_S)
    in_S = col_S < S
    turned_S, _, pair_S, _ = turned_columns(col_S, HALF, INTERLEAVED)
    gamma_S = tl.load(gamma_ptr + col_S, mask=in_S, other=0.0).to(tl.float32)
    beta_S = tl.load(beta_ptr + col_S, mask=in_S, other=0.0).to(tl.float32)
    head_NS = gamma_S * z_NS + beta_S
    if TURN:
        gamma_S = tl.load(gamma_ptr + pair_S, mask=turned_S, other=0.0).to(tl.float32)
        beta_S = tl.load(beta_ptr + pair_S, mask=turned_S, other=0.0).to(tl.float32)
        head_NS = head_NS * cos_NS + (gamma_S * pair_NS + beta_S) * sin_NS
    return head_NS


@triton.jit
def _keys(
    token, before, gamma_ptr, beta_ptr, cached_ptr, taken_S, before_N, position_N, begin, S, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, TURN: tl.constexpr, BLOCK_S: tl.constexpr, SHIFTED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Tokens' own keys, and those that their values go under: if SHIFTED, with the dimensions `taken_S` of the key
    before, which is one of this call, else the cached one, else 0."""
    own_NS = _heads(token, gamma_ptr, beta_ptr, S, HALF, INTERLEAVED, TURN, BLOCK_S).to(dtype)
    key_NS = own_NS
    if SHIFTED:
        col_S = tl.arange(0, BLOCK_S)
        before_NS = _heads(before, gamma_ptr, beta_ptr, S, HALF, INTERLEAVED, TURN, BLOCK_S).to(dtype)
        cached_S = tl.load(cached_ptr + col_S, mask=(col_S < S) & taken_S & (begin > 0), other=0.0)
        from_cache_NS = tl.where((position_N > 0)[:, None], cached_S[None, :], 0.0)
        shifted_NS = tl.where((before_N < 0)[:, None], from_cache_NS, before_NS)
        key_NS = tl.where(taken_S[None, :], shifted_NS, own_NS)
    return own_NS, key_NS


@triton.jit
def _unit_rows(x_NS):
    return x_NS / tl.maximum(tl.sqrt(tl.sum(x_NS * x_NS, 1)), 1e-12)[:, None]


@triton.jit
def _copy(source_ptr, target_ptr, rows, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    col_S = tl.arange(0, BLOCK_S)
    for start in range(0, rows, BLOCK_C):
        row_C = start + tl.arange(0, BLOCK_C)
        at, there = row_C[:, None] * S + col_S, (row_C < rows)[:, None] & (col_S < S)
        tl.store(target_ptr + at, tl.load(source_ptr + at, mask=there, other=0.0), mask=there)


@kernel
@triton.jit
def _step_heads_kernel(
    z_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, position_ptr, valid_ptr, quad_k_ptr, lin_k_ptr, seen_ptr,
    copied_quad_k_ptr, copied_lin_k_ptr, new_quad_k_ptr, new_lin_k_ptr, new_seen_ptr, heads_ptr,
    z_row, z_token, rotary_row, rotary_token, position_row, valid_row, valid_token, N, score_scale, shift,
    C: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr, HAS_QUAD: tl.constexpr, HAS_LIN: tl.constexpr,
    HAS_VALID: tl.constexpr, COUNTS: tl.constexpr, MEAN: tl.constexpr, PREVIOUS: tl.constexpr, LOCAL: tl.constexpr,
    INTERLEAVED: tl.constexpr, SILU: tl.constexpr, DELTA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One row: its new tokens' heads, float32 `[4, BLOCK_N, S]`; a copy of the cached keys, and then the new keys,
    among the copied ones or, in place, among those that were copied; and the count of tokens.

    The heads are quad_q times score_scale, quad_k, and lin_q times the global part's scale and lin_k, 0 at padding, or
    with the delta rule both of length 1. Keys are rounded as the state stores them. With PREVIOUS and LOCAL the slot
    behind the newest token gets that token's own key.
    """
    grid_wait()
    row = tl.program_id(0).to(tl.int64)
    n_N = tl.arange(0, BLOCK_N)
    position_N, real_N, before_N, begin, last = _places(
        position_ptr, valid_ptr, row, position_row, valid_row, valid_token, N, HAS_VALID, BLOCK_N
    )
    begin = tl.where(last >= 0, begin, 0)
    slot_N, slots = ((position_N + shift) % C).to(tl.int32), ((begin + shift) % C).to(tl.int32)
    newest = tl.where(slots == 0, C, slots)
    newest_N = real_N & (position_N == last)
    # Of tokens that take one slot in turn the last stays. Behind the newest its own key is left, and behind a chunk.
    stays_N = real_N & (position_N + C > last)
    leaves_N = newest_N | (stays_N & (slot_N == C - 1))
    behind_N = (position_N + C == last + 1) & (slot_N > 0)
    z_ptr += row * z_row
    cos_ptr += row * rotary_row
    sin_ptr += row * rotary_row
    token = _load_z(z_ptr, cos_ptr, sin_ptr, n_N, real_N, z_token, rotary_token, S, HALF, INTERLEAVED, SILU, BLOCK_S)
    before = token
    if LOCAL or PREVIOUS:
        before = _load_z(
            z_ptr, cos_ptr, sin_ptr, before_N, before_N >= 0, z_token, rotary_token, S, HALF, INTERLEAVED, SILU,
            BLOCK_S,
        )  # fmt: skip
    TURN: tl.constexpr = HALF > 0
    TURN_LIN: tl.constexpr = TURN and not PREVIOUS
    LIN: tl.constexpr = 2 * S if HAS_QUAD else 0
    col_S = tl.arange(0, BLOCK_S)
    in_S = col_S < S
    key_at = slot_N[:, None] * S + col_S
    leaves_NS = leaves_N[:, None] & in_S
    head_at = n_N[:, None] * S + col_S
    HEAD: tl.constexpr = BLOCK_N * S
    heads_ptr += row * 4 * HEAD
    if HAS_QUAD:
        quad_k_ptr += row * (C + LOCAL) * S
        copied_quad_k_ptr += row * (C + LOCAL) * S
        new_quad_k_ptr += row * (C + LOCAL) * S
        taken_S = (col_S // 2 if INTERLEAVED else col_S) % 2 == 1
        query_NS = score_scale * _heads(token, gamma_ptr, beta_ptr, S, HALF, INTERLEAVED, TURN, BLOCK_S)
        tl.store(heads_ptr + head_at, query_NS, mask=in_S[None, :])
        own_NS, key_NS = _keys(
            token, before, gamma_ptr + S, beta_ptr + S, quad_k_ptr + newest * S, taken_S, before_N, position_N, begin,
            S, HALF, INTERLEAVED, TURN, BLOCK_S, LOCAL, new_quad_k_ptr.dtype.element_ty,
        )  # fmt: skip
        tl.store(heads_ptr + HEAD + head_at, key_NS.to(tl.float32), mask=in_S[None, :])
        _copy(quad_k_ptr, copied_quad_k_ptr, C + LOCAL, S, BLOCK_C, BLOCK_S)
        tl.debug_barrier()  # other threads may still read what is overwritten now
        tl.store(new_quad_k_ptr + key_at, key_NS, mask=(stays_N & ~(behind_N & LOCAL))[:, None] & in_S)
        if LOCAL:
            tl.store(new_quad_k_ptr + key_at + S, own_NS, mask=leaves_NS)
    if HAS_LIN or DELTA:
        # The state of the delta rule has the newest key alone, if any.
        key_slots: tl.constexpr = 1 if DELTA else C + PREVIOUS
        lin_k_ptr += row * key_slots * S
        new_lin_k_ptr += row * key_slots * S
        query_NS = _heads(token, gamma_ptr + LIN, beta_ptr + LIN, S, HALF, INTERLEAVED, TURN_LIN, BLOCK_S)
        own_NS, key_NS = _keys(
            token, before, gamma_ptr + LIN + S, beta_ptr + LIN + S, lin_k_ptr + (0 if DELTA else newest * S),
            col_S >= 0, before_N, position_N, begin, S, HALF, INTERLEAVED, TURN_LIN, BLOCK_S, PREVIOUS,
            new_lin_k_ptr.dtype.element_ty,
        )  # fmt: skip
        left_NS = tl.where(real_N[:, None], key_NS.to(tl.float32), 0.0)
        if DELTA:
            query_NS, left_NS = _unit_rows(query_NS), _unit_rows(left_NS)
        else:
            copied_lin_k_ptr += row * key_slots * S
            _copy(lin_k_ptr, copied_lin_k_ptr, key_slots, S, BLOCK_C, BLOCK_S)
            closed_N = tl.maximum(position_N - slot_N, 0)
            scale_N = 1.0 / C
            if MEAN:
                scale_N = 1.0 / tl.maximum(closed_N, 1).to(tl.float32)
            query_NS *= tl.where(closed_N > 0, scale_N, 0.0)[:, None]
        tl.store(heads_ptr + 2 * HEAD + head_at, query_NS, mask=in_S[None, :])
        tl.store(heads_ptr + 3 * HEAD + head_at, left_NS, mask=in_S[None, :])
        tl.debug_barrier()
        if not DELTA:
            tl.store(new_lin_k_ptr + key_at, key_NS, mask=(stays_N & ~(behind_N & PREVIOUS))[:, None] & in_S)
            if PREVIOUS:
                tl.store(new_lin_k_ptr + key_at + S, own_NS, mask=leaves_NS)
        elif PREVIOUS:
            # Without a real token the key before stays.
            kept_S = tl.load(lin_k_ptr + col_S, mask=in_S, other=0.0)
            newest_S = tl.sum(tl.where(newest_N[:, None], own_NS.to(tl.float32), 0.0), 0)
            tl.store(new_lin_k_ptr + col_S, tl.where(last >= 0, newest_S, kept_S.to(tl.float32)), mask=in_S)
    if COUNTS:
        tl.store(new_seen_ptr + row, tl.load(seen_ptr + row) + tl.sum(real_N.to(tl.int64), 0))


@triton.jit
def _scores(query_ptr, key_ptr, at_N, at_C, live_C, S, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S, SLICE):
    """Products of the new tokens' queries and some keys, of which others than those that are live count as 0."""
    score_NC = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, BLOCK_S, SLICE):
        s = start + tl.arange(0, SLICE)
        query_NS = tl.load(query_ptr + at_N[:, None] * S + s, mask=(s < S)[None, :], other=0.0)
        key_CS = tl.load(key_ptr + at_C[:, None] * S + s, mask=live_C[:, None] & (s < S), other=0.0).to(tl.float32)
        score_NC = tl.dot(query_NS, tl.trans(key_CS), score_NC, input_precision="tf32x3")
    return score_NC


@triton.jit
def _local_weights(
    heads_ptr, key_ptr, bias_ptr, n_N, at_C, live_C, offset_NC, reads_NC, S, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S, SLICE,
):  # fmt: skip
    """What the new tokens weigh some local keys with, at these places of the bias; 0 where they read none."""
    score_NC = _scores(heads_ptr, key_ptr, n_N, at_C, live_C, S, BLOCK_N, BLOCK_C, BLOCK_S, SLICE)
    if HAS_BIAS:
        score_NC += tl.load(bias_ptr + offset_NC, mask=reads_NC, other=0.0).to(tl.float32)
    # tl.maximum would turn NaN into 0.
    return tl.where((score_NC < 0) | ~reads_NC, 0.0, score_NC * score_NC)


@kernel
@triton.jit
def _gated_steps_kernel(
    u_ptr, v_ptr, heads_ptr, position_ptr, valid_ptr, quad_k_ptr, lin_k_ptr, value_ptr, total_ptr, opened_ptr,
    new_value_ptr, new_total_ptr, new_opened_ptr, bias_ptr, gates_ptr, out_ptr,
    u_row, v_row, u_token, v_token, position_row, valid_row, valid_token, N, shift,
    C: tl.constexpr, E: tl.constexpr, S: tl.constexpr, HAS_QUAD: tl.constexpr, HAS_LIN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, PREVIOUS: tl.constexpr, LOCAL: tl.constexpr, SILU: tl.constexpr,
    DELTA: tl.constexpr, COPIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row and BLOCK_E of its value columns. With the token n in slot p_n of chunk g_n, the slots from b on that
    were filled before the call in chunk g, and c_n the global part's scale,

        out_n = silu(u_n) (sum_j W_nj v_j + sum_{m<=n} W_nm v_m + c_n lin_q_n total)
        W_nj  = relu(quad_q_n.quad_k_j score_scale + bias[j - p_n + C - 1])^2 - c_n lin_q_n.lin_k_j     if g_n = g
        W_nm  = relu(...)^2 if g_m = g_n, else c_n lin_q_n.lin_k_m
        total += sum_n lin_k_n v_n^T

    and the delta rule as in `_gated_step_kernel`, token by token. The heads are those of `_step_heads_kernel`, the
    cached keys those before it. Products are those of float32.
    """
    grid_wait()
    blocks: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    n_N = tl.arange(0, BLOCK_N)
    position_N, real_N, _, begin, last = _places(
        position_ptr, valid_ptr, row, position_row, valid_row, valid_token, N, HAS_VALID, BLOCK_N
    )
    any_real = last >= 0
    begin = tl.where(any_real, begin, 0)
    slot_N, chunk_N = ((position_N + shift) % C).to(tl.int32), (position_N + shift) // C
    slots, chunk = ((begin + shift) % C).to(tl.int32), (begin + shift) // C
    first, slots = slots - begin, tl.where(any_real, slots, 0)
    continues_N = real_N & (chunk_N == chunk)
    e_E = block * BLOCK_E + tl.arange(0, BLOCK_E)
    in_E = e_E < E
    HEAD: tl.constexpr = BLOCK_N * S
    heads_ptr += row * 4 * HEAD
    quad_k_ptr += row * (C + LOCAL) * S
    lin_k_ptr += row * (C + PREVIOUS) * S

    # -- among the new tokens
    weight_NN = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    reads_NN = (n_N[None, :] <= n_N[:, None]) & real_N[None, :] & real_N[:, None]
    same_NN = chunk_N[None, :] == chunk_N[:, None]
    if HAS_QUAD:
        weight_NN += _local_weights(
            heads_ptr, heads_ptr + HEAD, bias_ptr, n_N, n_N, real_N, slot_N[None, :] - slot_N[:, None] + C - 1,
            reads_NN & same_NN, S, HAS_BIAS, BLOCK_N, BLOCK_N, BLOCK_S, SLICE,
        )  # fmt: skip
    if HAS_LIN:
        score_NN = _scores(
            heads_ptr + 2 * HEAD, heads_ptr + 3 * HEAD, n_N, n_N, real_N, S, BLOCK_N, BLOCK_N, BLOCK_S, SLICE
        )
        weight_NN += tl.where(reads_NN & ~same_NN, score_NN, 0.0)
    mask_NE = real_N[:, None] & in_E[None, :]
    v_NE = activated(v_ptr + row * v_row, n_N[:, None] * v_token + e_E, mask_NE, SILU).to(value_ptr.dtype.element_ty)
    new_NE = v_NE.to(tl.float32)
    out_NE = tl.dot(weight_NN, new_NE, input_precision="tf32x3")

    # -- the open chunk's slots; others are only copied
    value_ptr += row * C * E
    new_value_ptr += row * C * E
    if COPIES:
        for start in range(0, C, BLOCK_C):
            slot_C = start + tl.arange(0, BLOCK_C)
            value_at, there = slot_C[:, None] * E + e_E, (slot_C < C)[:, None] & in_E
            tl.store(new_value_ptr + value_at, tl.load(value_ptr + value_at, mask=there, other=0.0), mask=there)
    until = slots if HAS_QUAD or HAS_LIN else 0
    for start in tl.range(0, C if INTERPRETED else until, BLOCK_C, num_stages=STAGES):
        slot_C = start + tl.arange(0, BLOCK_C)
        live_C = (slot_C < slots) & (slot_C >= first)
        reads_NC = continues_N[:, None] & live_C[None, :]
        weight_NC = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        if HAS_QUAD:
            weight_NC += _local_weights(
                heads_ptr, quad_k_ptr, bias_ptr, n_N, slot_C, live_C, slot_C[None, :] - slot_N[:, None] + C - 1,
                reads_NC, S, HAS_BIAS, BLOCK_N, BLOCK_C, BLOCK_S, SLICE,
            )  # fmt: skip
        if HAS_LIN:
            weight_NC -= _scores(
                heads_ptr + 2 * HEAD, lin_k_ptr, n_N, slot_C, live_C, S, BLOCK_N, BLOCK_C, BLOCK_S, SLICE
            )
        value_at = slot_C[:, None] * E + e_E
        value_CE = tl.load(value_ptr + value_at, mask=live_C[:, None] & in_E, other=0.0).to(tl.float32)
        out_NE = tl.dot(tl.where(reads_NC, weight_NC, 0.0), value_CE, out_NE, input_precision="tf32x3")
    tl.debug_barrier()  # other threads may still read the slots that are overwritten now

    # -- the state
    stays_N = real_N & (position_N + C > last)
    tl.store(new_value_ptr + slot_N[:, None] * E + e_E, v_NE, mask=mask_NE & stays_N[:, None])
    total_ptr += row * S * E
    new_total_ptr += row * S * E
    if HAS_LIN:
        for start in range(0, BLOCK_S, SLICE):
            s = start + tl.arange(0, SLICE)
            total_at, there = s[:, None] * E + e_E, (s < S)[:, None] & in_E
            total_SE = tl.load(total_ptr + total_at, mask=there, other=0.0)
            head_at, in_S = n_N[:, None] * S + s, (s < S)[None, :]
            query_NS = tl.load(heads_ptr + 2 * HEAD + head_at, mask=in_S, other=0.0)
            out_NE = tl.dot(query_NS, total_SE, out_NE, input_precision="tf32x3")
            key_NS = tl.load(heads_ptr + 3 * HEAD + head_at, mask=in_S, other=0.0)
            total_SE = tl.dot(tl.trans(key_NS), new_NE, total_SE, input_precision="tf32x3")
            tl.store(new_total_ptr + total_at, total_SE, mask=there)
    if DELTA:
        col_S = tl.arange(0, BLOCK_S)
        state_at, there = col_S[:, None] * E + e_E, (col_S < S)[:, None] & in_E
        total_SE = tl.load(total_ptr + state_at, mask=there, other=0.0)
        opened_SE = tl.load(opened_ptr + row * S * E + state_at, mask=there, other=0.0)
        for n in range(BLOCK_N if INTERPRETED else N):
            itself_N = n_N == n
            real = tl.sum(tl.where(itself_N & real_N, 1, 0), 0) != 0
            slot = tl.sum(tl.where(itself_N, slot_N, 0), 0)
            head_ptr = heads_ptr + 2 * HEAD + n * S + col_S
            query_S = tl.load(head_ptr, mask=col_S < S, other=0.0)
            key_S = tl.load(head_ptr + HEAD, mask=col_S < S, other=0.0)
            v_E = tl.sum(tl.where(itself_N[:, None], new_NE, 0.0), 0)
            gate_ptr = gates_ptr + (row * N + n) * 3
            decay = tl.load(gate_ptr, mask=real, other=1.0)
            strength = tl.load(gate_ptr + 1, mask=real, other=0.0)
            since = tl.load(gate_ptr + 2, mask=real, other=0.0)
            opened_SE = tl.where(real & (slot == 0), total_SE, opened_SE)
            own_E = since * tl.sum(opened_SE * query_S[:, None], 0)
            out_NE += tl.where(itself_N[:, None], own_E[None, :], 0.0)
            missing_E = v_E - decay * tl.sum(total_SE * key_S[:, None], 0)
            total_SE = decay * total_SE + (strength * key_S)[:, None] * missing_E[None, :]
        tl.store(new_opened_ptr + row * S * E + state_at, opened_SE, mask=there)
        tl.store(new_total_ptr + state_at, total_SE, mask=there)

    u_NE = activated(u_ptr + row * u_row, n_N[:, None] * u_token + e_E, mask_NE, SILU)
    out_at = (row * N + n_N)[:, None] * E + e_E
    tl.store(out_ptr + out_at, tl.where(mask_NE, out_NE * u_NE, 0.0), mask=(n_N < N)[:, None] & in_E)


def _block_e(batch: int, width: int, key_dim: int) -> int:
    """The widest block of value columns that leaves enough programs, each of which weighs all keys of its row."""
    for block_e in (64, 32):
        if batch * cdiv(width, block_e) >= FULL_GPU and block_e * power_of_2(key_dim) <= 8192:
            return block_e
    return 16


def advance(
    state: DecodingState, target: DecodingState, u: Tensor, v: Tensor, z: Tensor, gamma: Tensor, beta: Tensor,
    cos: Tensor | None, sin: Tensor | None, position: Tensor, valid: Tensor | None, bias_R: Tensor | None,
    divisor: float, mean: bool, interleaved: bool, silu: bool, shift: int, previous: bool, local_shift: bool,
    gates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[`gated_step`] of a few tokens of each row, one after another, in two launches; without gradients.

    Args:
        state: before these tokens.
        target: the same, which is then overwritten, or another, of which all is.
        u, v, z: `[B, N, E]`, `[B, N, E]`, `[B, N, S]`, dense in their last dimension.
        cos, sin: `[B or 1, N, r / 2]`, dense in their last dimension.
        position, valid: `[B or 1, N]`, dense in the last dimension, and `[B, N]`. In a row position grows by 1 from
            one real token to the next.
        gates: with the delta rule, as of [`step_gates`], `[B, N, 3]`; `since` is advanced there.

    Other arguments as there. Returns `[B, N, E]`.
    """
    (B, N, E), C, S = u.shape, state.value.shape[1], z.shape[-1]
    block_n = max(power_of_2(N), 16)
    out, heads = u.new_empty(u.shape), u.new_empty(B, 4, block_n, S, dtype=torch.float32)
    delta, has_quad, copies = gates is not None, state.quad_k is not None, target is not state
    has_lin = not delta and state.lin_k is not None

    def given(*tensors: Tensor | None) -> list[Tensor]:
        """With any tensor in place of an absent one, which no kernel reads."""
        return [heads if x is None else x for x in tensors]

    keys, new_keys = given(state.quad_k, state.lin_k), given(target.quad_k, target.lin_k)
    # The new keys overwrite others over a border, which are read there from a copy.
    copied = new_keys if copies else [torch.empty_like(x) if x is not heads else x for x in keys]
    where = position, position if valid is None else valid
    where_strides = 0 if position.shape[0] == 1 else position.stride(0), *((0, 0) if valid is None else valid.stride())
    rotary = (0, 0) if cos is None else (0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1))
    kinds = {
        "HAS_QUAD": has_quad, "HAS_LIN": has_lin, "HAS_VALID": valid is not None, "PREVIOUS": previous,
        "LOCAL": local_shift, "SILU": silu, "DELTA": delta, "C": C, "S": S, "BLOCK_N": block_n,
        "BLOCK_C": 1024 // block_n, "BLOCK_S": max(power_of_2(S), 16), "num_warps": block_n // 4,
    }  # fmt: skip
    block_e = _block_e(B, E, S)
    with on_device(u):
        _step_heads_kernel(
            (B,), z, gamma, beta, *given(cos, sin), *where, *keys, *given(state.seen), *copied, *new_keys,
            *given(target.seen), heads, z.stride(0), z.stride(1), *rotary, *where_strides, N, 1.0 / divisor, shift,
            COUNTS=state.seen is not None, MEAN=mean, INTERLEAVED=interleaved, HALF=0 if cos is None else cos.shape[2],
            **kinds,
        )  # fmt: skip
        _gated_steps_kernel(
            (B * cdiv(E, block_e),), u, v, heads, *where, *(keys if copies else copied), state.value,
            *given(state.total, state.opened), target.value, *given(target.total, target.opened, bias_R, gates), out,
            u.stride(0), v.stride(0), u.stride(1), v.stride(1), *where_strides, N, shift,
            E=E, HAS_BIAS=bias_R is not None, COPIES=copies, BLOCK_E=block_e, SLICE=SLICE,
            STAGES=STAGES, INTERPRETED=INTERPRET, **kinds,
        )  # fmt: skip
    return out
