# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of gated mixed chunk attention: scores, linear heads, values, heads, and the norm."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    load_rows,
    load_state,
    load_values,
    preactivation,
    rotation,
    row_gain,
    silu,
    silu_grad,
    store_rows,
    token_rows,
)
from .forward import lower_tile


@triton.jit
def score_gradient(
    chunk, index, d_ptr, v_ptr, v_stride, rms_ptr, gain_ptr, bias_v_ptr, source_ptr, a_ptr, d_score_ptr, N, G, C, E,
    CP: tl.constexpr, TILES: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr,
    FAST: tl.constexpr, RAGGED: tl.constexpr, EVEN_E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of scores: `dA = d_attended V^T`, `d_score = 2 relu(score) dA = 2 sqrt(A) dA`."""
    block_m, block_n = lower_tile(index, TILES, CAUSAL)
    m = block_m * BLOCK + tl.arange(0, BLOCK)
    n = block_n * BLOCK + tl.arange(0, BLOCK)
    token_m, real_m = token_rows(source_ptr, chunk, m, N, G, C, RAGGED)
    token_n, real_n = token_rows(source_ptr, chunk, n, N, G, C, RAGGED)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, E, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        d = load_rows(d_ptr, E, token_m, real_m, column, E, EVEN_E)
        v = load_values(
            v_ptr, v_stride, rms_ptr, gain_ptr, bias_v_ptr, token_n, real_n, column, E, SCALED, SILU, FAST, EVEN_E
        )
        acc = tl.dot(d, tl.trans(v), acc, input_precision=PRECISION)
    place = (chunk.to(tl.int64) * CP + m)[:, None] * CP + n[None, :]
    weight = tl.load(a_ptr + place).to(tl.float32)
    tl.store(d_score_ptr + place, (acc * 2.0 * tl.sqrt(weight)).to(d_score_ptr.dtype.element_ty))


@triton.jit
def linear_gradient(
    chunk, block_m, x_ptr, x_stride, rms_ptr, gain_ptr, bias_v_ptr, source_ptr, prefix_ptr, carry_ptr, piece, out_ptr,
    factor, N, G, C, E,
    CP: tl.constexpr, SP: tl.constexpr, PREFIX: tl.constexpr, CARRY: tl.constexpr, SCALED: tl.constexpr,
    SILU: tl.constexpr, FAST: tl.constexpr, RAGGED: tl.constexpr, EVEN_E: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of a linear head for a block of tokens, `factor * x state^T`: of the query from x = d_attended and the
    state it saw, of the key from x = V and the state's gradient."""
    m = block_m * BLOCK + tl.arange(0, BLOCK)
    token, real = token_rows(source_ptr, chunk, m, N, G, C, RAGGED)
    s = tl.arange(0, SP)
    acc = tl.zeros((BLOCK, SP), tl.float32)
    for start in tl.range(0, E, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        x = load_values(
            x_ptr, x_stride, rms_ptr, gain_ptr, bias_v_ptr, token, real, column, E, SCALED, SILU, FAST, EVEN_E
        )
        state = load_state(prefix_ptr, carry_ptr, chunk, piece, s, column, E, SP, EVEN_E, PREFIX, CARRY)
        acc = tl.dot(x, tl.trans(state), acc, input_precision=PRECISION)
    place = (chunk.to(tl.int64) * CP + m)[:, None] * SP + s[None, :]
    tl.store(out_ptr + place, (acc * factor).to(out_ptr.dtype.element_ty))


@triton.jit
def value_gradient(
    chunk, block_n, block_e, a_ptr, d_ptr, k_ptr, prefix_ptr, carry_ptr, piece, v_ptr, v_stride, rms_ptr, gain_ptr,
    bias_v_ptr, source_ptr, d_v_ptr, d_v_stride, d_bias_ptr, N, G, C, E,
    CP: tl.constexpr, SP: tl.constexpr, QUAD: tl.constexpr, LIN: tl.constexpr, PREFIX: tl.constexpr,
    CARRY: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
    RAGGED: tl.constexpr, EVEN_E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of the values' input for a tile: `(A^T d_attended + k_lin d_state) silu'(h)`, times the norm's gain if
    that is applied here, and its sums over the tile's tokens for the bias."""
    n = block_n * BLOCK + tl.arange(0, BLOCK)
    column = block_e * BLOCK_E + tl.arange(0, BLOCK_E)
    wide_chunk = chunk.to(tl.int64)
    acc = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    if QUAD:
        first = block_n * BLOCK if CAUSAL else 0
        for start in tl.range(first, CP, BLOCK_K, num_stages=STAGES):
            m = start + tl.arange(0, BLOCK_K)
            token, real = token_rows(source_ptr, chunk, m, N, G, C, RAGGED)
            a = tl.load(a_ptr + (wide_chunk * CP + m)[:, None] * CP + n[None, :])
            d = load_rows(d_ptr, E, token, real, column, E, EVEN_E)
            acc = tl.dot(tl.trans(a), d, acc, input_precision=PRECISION)
    if LIN:
        for start in tl.range(0, SP, BLOCK_S, num_stages=STAGES):
            s = start + tl.arange(0, BLOCK_S)
            k = tl.load(k_ptr + (wide_chunk * CP + n)[:, None] * SP + s[None, :])
            state = load_state(prefix_ptr, carry_ptr, chunk, piece, s, column, E, SP, EVEN_E, PREFIX, CARRY)
            # States are kept over C; the query's factor makes up for it, and keys have none.
            acc = tl.dot(k, state, acc, input_precision=PRECISION)
    token, real = token_rows(source_ptr, chunk, n, N, G, C, RAGGED)
    raw = load_rows(v_ptr, v_stride, token, real, column, E, EVEN_E)
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    d_h = acc * silu_grad(preactivation(raw, bias_v_ptr, column, E, gain, SCALED), SILU, FAST)
    if SCALED:
        d_h = tl.where(real[:, None], d_h, 0.0)
        place = d_bias_ptr + (wide_chunk * (CP // BLOCK) + block_n) * E + column
        tl.store(place, tl.sum(d_h, 0), mask=column < E)
        d_h = d_h * gain[:, None]
    store_rows(d_v_ptr, d_v_stride, token, real, column, E, d_h, EVEN_E)


@triton.jit
def chunk_gradients_kernel(
    a_ptr, d_ptr, lin_k_ptr, prefix_ptr, carry_ptr, d_prefix_ptr, d_carry_ptr, piece_ptr, factor_ptr, v_ptr, v_stride,
    rms_ptr, gain_ptr, bias_v_ptr, source_ptr, d_score_ptr, d_lin_q_ptr, d_lin_k_ptr, d_v_ptr, d_v_stride,
    d_bias_ptr, N, G, C, E, E_BLOCKS,
    CP: tl.constexpr, SP: tl.constexpr, TILES: tl.constexpr, SCORE_TILES: tl.constexpr, QUAD: tl.constexpr,
    LIN: tl.constexpr, PREFIX: tl.constexpr, CARRY: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr,
    SILU: tl.constexpr, FAST: tl.constexpr, RAGGED: tl.constexpr, EVEN_E: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All products of one chunk's backward, each program one tile of one of them. They read the same d_attended and
    V; side by side in one launch they find them in the L2 cache."""
    score_programs: tl.constexpr = SCORE_TILES if QUAD else 0
    linear_programs: tl.constexpr = TILES if LIN else 0
    per_chunk = score_programs + 2 * linear_programs + TILES * E_BLOCKS
    program = tl.program_id(0)
    chunk = program // per_chunk
    index = program % per_chunk
    piece = tl.load(piece_ptr + chunk)
    if index < score_programs:
        if QUAD:
            score_gradient(
                chunk, index, d_ptr, v_ptr, v_stride, rms_ptr, gain_ptr, bias_v_ptr, source_ptr, a_ptr, d_score_ptr,
                N, G, C, E, CP, TILES, CAUSAL, SCALED, SILU, FAST, RAGGED, EVEN_K, BLOCK, BLOCK_K, PRECISION, STAGES,
            )  # fmt: skip
    elif index < score_programs + linear_programs:
        if LIN:
            linear_gradient(
                chunk, index - score_programs, d_ptr, E, rms_ptr, gain_ptr, bias_v_ptr, source_ptr, prefix_ptr,
                carry_ptr, piece, d_lin_q_ptr, tl.load(factor_ptr + chunk), N, G, C, E, CP, SP, PREFIX, CARRY, False,
                False, FAST, RAGGED, EVEN_K, BLOCK, BLOCK_K, PRECISION, STAGES,
            )  # fmt: skip
    elif index < score_programs + 2 * linear_programs:
        if LIN:
            linear_gradient(
                chunk, index - score_programs - linear_programs, v_ptr, v_stride, rms_ptr, gain_ptr, bias_v_ptr,
                source_ptr, d_prefix_ptr, d_carry_ptr, piece, d_lin_k_ptr, 1.0, N, G, C, E, CP, SP, PREFIX, CARRY,
                SCALED, SILU, FAST, RAGGED, EVEN_K, BLOCK, BLOCK_K, PRECISION, STAGES,
            )  # fmt: skip
    else:
        tile = index - score_programs - 2 * linear_programs
        value_gradient(
            chunk, tile % TILES, tile // TILES, a_ptr, d_ptr, lin_k_ptr, d_prefix_ptr, d_carry_ptr, piece, v_ptr,
            v_stride, rms_ptr, gain_ptr, bias_v_ptr, source_ptr, d_v_ptr, d_v_stride, d_bias_ptr, N, G, C, E, CP, SP,
            QUAD, LIN, PREFIX, CARRY, CAUSAL, SCALED, SILU, FAST, RAGGED, EVEN_E, BLOCK, BLOCK_E, BLOCK_K, BLOCK_S,
            PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def quadratic_heads_kernel(
    d_score_ptr, q_ptr, k_ptr, d_q_ptr, d_k_ptr, scale,
    CP: tl.constexpr, SP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`dq = scale d_score k` (program 0 of the last axis) or `dk = scale d_score^T q` of a block of tokens."""
    chunk = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    own = first + tl.arange(0, BLOCK)
    s = tl.arange(0, SP)
    acc = tl.zeros((BLOCK, SP), tl.float32)
    place = (chunk * CP + own)[:, None] * SP + s[None, :]
    if tl.program_id(2) == 0:
        last = first + BLOCK if CAUSAL else CP
        for start in tl.range(0, last, BLOCK_K, num_stages=STAGES):
            n = start + tl.arange(0, BLOCK_K)
            d = tl.load(d_score_ptr + (chunk * CP + own)[:, None] * CP + n[None, :])
            k = tl.load(k_ptr + (chunk * CP + n)[:, None] * SP + s[None, :])
            acc = tl.dot(d, k, acc, input_precision=PRECISION)
        tl.store(d_q_ptr + place, (acc * scale).to(d_q_ptr.dtype.element_ty))
    else:
        begin = first if CAUSAL else 0
        for start in tl.range(begin, CP, BLOCK_K, num_stages=STAGES):
            m = start + tl.arange(0, BLOCK_K)
            d = tl.load(d_score_ptr + (chunk * CP + m)[:, None] * CP + own[None, :])
            q = tl.load(q_ptr + (chunk * CP + m)[:, None] * SP + s[None, :])
            acc = tl.dot(tl.trans(d), q, acc, input_precision=PRECISION)
        tl.store(d_k_ptr + place, (acc * scale).to(d_k_ptr.dtype.element_ty))


@triton.jit
def bias_kernel(
    d_score_ptr, out_ptr, GT, PER_PROGRAM,
    CP: tl.constexpr, TILES: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of one tile of score gradients over some chunks, `[programs, CP, CP]`."""
    block_m, block_n = lower_tile(tl.program_id(0), TILES, CAUSAL)
    m = block_m * BLOCK + tl.arange(0, BLOCK)
    n = block_n * BLOCK + tl.arange(0, BLOCK)
    place = m[:, None] * CP + n[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    begin = tl.program_id(1) * PER_PROGRAM
    for step in range(0, tl.minimum(PER_PROGRAM, GT - begin)):
        acc += tl.load(d_score_ptr + (begin + step).to(tl.int64) * CP * CP + place).to(tl.float32)
    tl.store(out_ptr + tl.program_id(1) * CP * CP + place, acc)


@triton.jit
def heads_gradient_kernel(
    d_heads_ptr, z_ptr, z_stride, rms_ptr, gain_ptr, bias_ptr, gamma_ptr, cos_ptr, sin_ptr, source_ptr, d_z_ptr,
    d_z_stride, sums_ptr, N, G, C, GT, S, rotary_dim, table_rows,
    H: tl.constexpr, CP: tl.constexpr, SP: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, RAGGED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Backward of `heads_kernel`: gradient of z's input, and per program the sums over its tokens for gamma, beta and
    z's bias, `[programs, 2 H + 1, SP]`. A rotation's transpose turns the other way."""
    blocks: tl.constexpr = CP // BLOCK_M
    program = tl.program_id(0)
    chunk = program // blocks
    slot = (program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, real = token_rows(source_ptr, chunk, slot, N, G, C, RAGGED)
    column = tl.arange(0, SP)
    partner, angle, sign, turned = rotation(column, rotary_dim, INTERLEAVED)
    inside = column < S
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    h = preactivation(load_rows(z_ptr, z_stride, token, real, column, S, False), bias_ptr, column, S, gain, SCALED)
    z = silu(h, SILU, FAST)
    if ROPE:
        row = (chunk * C + slot) % table_rows
        table = row[:, None].to(tl.int64) * (rotary_dim // 2) + angle[None, :]
        table_mask = (slot < C)[:, None] & turned[None, :]
        cos = tl.load(cos_ptr + table, mask=table_mask, other=1.0)
        sin = tl.load(sin_ptr + table, mask=table_mask, other=0.0) * sign[None, :]
    mask = inside[None, :] & real[:, None]
    sums = sums_ptr + program.to(tl.int64) * (2 * H + 1) * SP + column
    d_z = tl.zeros((BLOCK_M, SP), tl.float32)
    for head in tl.static_range(H):
        place = ((head * GT + chunk).to(tl.int64) * CP + slot)[:, None] * SP
        d = tl.load(d_heads_ptr + place + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if ROPE:
            other = tl.load(d_heads_ptr + place + partner[None, :], mask=mask, other=0.0).to(tl.float32)
            d = d * cos - other * sin
        gamma = tl.load(gamma_ptr + head * S + column, mask=inside, other=0.0).to(tl.float32)
        d_z += d * gamma[None, :]
        tl.store(sums + head * SP, tl.sum(d * z, 0))
        tl.store(sums + (H + head) * SP, tl.sum(d, 0))
    d_h = d_z * silu_grad(h, SILU, FAST)
    tl.store(sums + 2 * H * SP, tl.sum(d_h, 0))
    if SCALED:
        d_h = d_h * gain[:, None]
    store_rows(d_z_ptr, d_z_stride, token, real, column, S, d_h, False)


@triton.jit
def norm_gradient_kernel(
    p_ptr, x_ptr, dy_ptr, rms_ptr, dx_ptr, dot_ptr, sum_ptr, T, D,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Backward of ScaleNorm and of the residual sum: `dx = dy + p - x (p . x) / (D rms^2)`, where p is the gradient
    through the projections with the norm's gain in it. `dot = p . x` gives the gain's gradient, and the sums of dy
    over the program's tokens, `[programs, D]`, that of the output projection's bias."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(STEPS):
        token = (program * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (token < T)[:, None] & (column < D)[None, :]
        offset = token[:, None] * D + column[None, :]
        p = tl.load(p_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rms = tl.load(rms_ptr + token, mask=token < T, other=0.0)
        dot = tl.sum(p * x, 1)
        dx = dy + p - x * (dot * rms * rms / D)[:, None]
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        tl.store(dot_ptr + token, dot, mask=token < T)
        total += tl.sum(dy, 0)
    tl.store(sum_ptr + program * D + column, total, mask=column < D)
