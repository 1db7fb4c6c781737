# SPDX-License-Identifier: Apache-2.0
"""Forward kernels of gated mixed chunk attention: heads, scores, states, and the gated output."""

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
    store_rows,
    token_rows,
)


@triton.jit
def rms_kernel(
    x_ptr, rms_ptr, cast_ptr, T, D, eps,
    CAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`1 / sqrt(mean(x^2) + eps)` of each token, and x in the products' type if that is another."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    mask = (token < T)[:, None] & (column < D)[None, :]
    offset = token[:, None] * D + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0)
    if CAST:
        tl.store(cast_ptr + offset, x.to(cast_ptr.dtype.element_ty), mask=mask)
    x = x.to(tl.float32)
    tl.store(rms_ptr + token, tl.rsqrt(tl.sum(x * x, 1) / D + eps), mask=token < T)


@triton.jit
def heads_kernel(
    z_ptr, z_stride, rms_ptr, gain_ptr, bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, factor_ptr, source_ptr,
    heads_ptr, N, G, C, GT, S, rotary_dim, table_rows,
    H: tl.constexpr, LIN_Q: tl.constexpr, CP: tl.constexpr, SP: tl.constexpr, ROPE: tl.constexpr,
    INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Heads `RoPE(gamma_h silu(z) + beta_h)` on the chunk grid, `[H, GT, CP, SP]`; the linear query times its chunk's
    factor. Each dimension loads its partner's z too, so that the rotation needs no exchange between threads."""
    blocks: tl.constexpr = CP // BLOCK_M
    chunk = tl.program_id(0) // blocks
    slot = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, real = token_rows(source_ptr, chunk, slot, N, G, C, RAGGED)
    column = tl.arange(0, SP)
    partner, angle, sign, turned = rotation(column, rotary_dim, INTERLEAVED)
    inside = column < S
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    z = preactivation(load_rows(z_ptr, z_stride, token, real, column, S, False), bias_ptr, column, S, gain, SCALED)
    z = silu(z, SILU, FAST)
    out_mask = inside[None, :] & real[:, None]
    if ROPE:
        other = load_rows(z_ptr, z_stride, token, real, partner, S, False)
        other = silu(preactivation(other, bias_ptr, partner, S, gain, SCALED), SILU, FAST)
        row = (chunk * C + slot) % table_rows
        table = row[:, None].to(tl.int64) * (rotary_dim // 2) + angle[None, :]
        table_mask = (slot < C)[:, None] & turned[None, :]
        cos = tl.load(cos_ptr + table, mask=table_mask, other=1.0)
        sin = tl.load(sin_ptr + table, mask=table_mask, other=0.0) * sign[None, :]
    for head in tl.static_range(H):
        gamma = tl.load(gamma_ptr + head * S + column, mask=inside, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + head * S + column, mask=inside, other=0.0).to(tl.float32)
        value = z * gamma[None, :] + beta[None, :]
        if ROPE:
            gamma = tl.load(gamma_ptr + head * S + partner, mask=inside, other=0.0).to(tl.float32)
            beta = tl.load(beta_ptr + head * S + partner, mask=inside, other=0.0).to(tl.float32)
            value = value * cos + (other * gamma[None, :] + beta[None, :]) * sin
        if head == LIN_Q:
            value = value * tl.load(factor_ptr + chunk)
        place = (head * GT + chunk).to(tl.int64) * CP + slot
        value = tl.where(out_mask, value, 0.0).to(heads_ptr.dtype.element_ty)
        tl.store(heads_ptr + place[:, None] * SP + column[None, :], value)


@triton.jit
def lower_tile(index, TILES: tl.constexpr, CAUSAL: tl.constexpr):
    """The `index`-th tile (query block, key block) that attention needs: all, or those not above the diagonal."""
    if CAUSAL:
        m = 0
        for _ in tl.static_range(1, TILES):
            m += (index >= (m + 1) * (m + 2) // 2).to(tl.int32)
        return m, index - m * (m + 1) // 2
    else:
        return index // TILES, index % TILES


@triton.jit
def scores_kernel(
    q_ptr, k_ptr, bias_ptr, a_ptr, C, scale,
    CP: tl.constexpr, SP: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention weights `A = relu(scale q k^T + b)^2` of one tile, `[GT, CP, CP]`. Tiles above the diagonal of a
    causal model are neither written nor read."""
    chunk = tl.program_id(1).to(tl.int64)
    block_m, block_n = lower_tile(tl.program_id(0), TILES, CAUSAL)
    m = block_m * BLOCK + tl.arange(0, BLOCK)
    n = block_n * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.static_range(0, SP, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        q = tl.load(q_ptr + (chunk * CP + m)[:, None] * SP + s[None, :])
        k = tl.load(k_ptr + (chunk * CP + n)[:, None] * SP + s[None, :])
        acc = tl.dot(q, tl.trans(k), acc, input_precision=PRECISION)
    score = acc * scale
    offset = n[None, :] - m[:, None]
    inside = (m < C)[:, None] & (n < C)[None, :]
    if BIAS:
        score += tl.load(bias_ptr + offset + C - 1, mask=inside, other=0.0).to(tl.float32)
    if CAUSAL:
        inside = inside & (offset <= 0)
    score = tl.where(inside, tl.maximum(score, 0.0), 0.0)
    tl.store(a_ptr + (chunk * CP + m)[:, None] * CP + n[None, :], (score * score).to(a_ptr.dtype.element_ty))


@triton.jit
def states_kernel(
    k_ptr, x_ptr, x_stride, rms_ptr, gain_ptr, bias_ptr, source_ptr, begin_ptr, end_ptr, prefix_ptr, total_ptr,
    N, G, C, E,
    CP: tl.constexpr, SP: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
    RAGGED: tl.constexpr, EVEN_E: tl.constexpr, PREFIX: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`sum k x^T` over the chunks of one piece (consecutive chunks of one document), `[pieces, SP, E]` in float32, and
    with PREFIX what the sum was before each chunk, over C, `[GT, SP, E]`. REVERSE goes through the chunks backwards,
    for the gradient."""
    piece = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.program_id(2) * BLOCK_S + tl.arange(0, BLOCK_S)
    begin = tl.load(begin_ptr + piece)
    end = tl.load(end_ptr + piece)
    offset = s[:, None] * E + column[None, :]
    mask = (column < E)[None, :] & (s < SP)[:, None]
    acc = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    inverse = 1.0 / C
    for step in range(0, end - begin):
        chunk = end - 1 - step if REVERSE else begin + step
        if PREFIX:
            pointers = prefix_ptr + chunk.to(tl.int64) * (SP * E) + offset
            tl.store(pointers, (acc * inverse).to(prefix_ptr.dtype.element_ty), mask=mask)
        for start in tl.range(0, CP, BLOCK_K, num_stages=STAGES):
            slot = start + tl.arange(0, BLOCK_K)
            token, real = token_rows(source_ptr, chunk, slot, N, G, C, RAGGED)
            k = tl.load(k_ptr + (chunk.to(tl.int64) * CP + slot)[:, None] * SP + s[None, :])
            x = load_values(
                x_ptr, x_stride, rms_ptr, gain_ptr, bias_ptr, token, real, column, E, SCALED, SILU, FAST, EVEN_E
            )
            acc = tl.dot(tl.trans(k), x, acc, input_precision=PRECISION)
    tl.store(total_ptr + piece.to(tl.int64) * (SP * E) + offset, acc, mask=mask)


@triton.jit
def carry_kernel(
    total_ptr, initial_ptr, begin_ptr, end_ptr, carry_ptr, final_ptr, size, carry_scale, final_scale,
    INITIAL: tl.constexpr, CARRY: tl.constexpr, FINAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running sums over a document's pieces: CARRY, the sum before each piece; FINAL, the sum of all."""
    document = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    begin = tl.load(begin_ptr + document)
    end = tl.load(end_ptr + document)
    acc = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        acc += tl.load(initial_ptr + document.to(tl.int64) * size + place, mask=mask, other=0.0).to(tl.float32)
    for step in range(0, end - begin):
        piece = (end - 1 - step if REVERSE else begin + step).to(tl.int64)
        if CARRY:
            tl.store(carry_ptr + piece * size + place, (acc * carry_scale).to(carry_ptr.dtype.element_ty), mask=mask)
        acc += tl.load(total_ptr + piece * size + place, mask=mask, other=0.0)
    if FINAL:
        final = (acc * final_scale).to(final_ptr.dtype.element_ty)
        tl.store(final_ptr + document.to(tl.int64) * size + place, final, mask=mask)


@triton.jit
def output_kernel(
    a_ptr, q_ptr, prefix_ptr, carry_ptr, u_ptr, u_stride, v_ptr, v_stride, rms_ptr, gain_ptr, bias_u_ptr, bias_v_ptr,
    source_ptr, piece_ptr, out_ptr, attended_ptr, N, G, C, E, E_BLOCKS,
    CP: tl.constexpr, SP: tl.constexpr, QUAD: tl.constexpr, LIN: tl.constexpr, PREFIX: tl.constexpr,
    CARRY: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
    RAGGED: tl.constexpr, EVEN_E: tl.constexpr, ATTENDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`silu(u) * (A V + q_lin state)` of one tile of tokens and value dimensions.

    The query blocks of one chunk and value block run next to each other and share V and the state in the L2 cache.
    """
    M_BLOCKS: tl.constexpr = CP // BLOCK_M
    program = tl.program_id(0)
    block_m = program % M_BLOCKS
    block_e = (program // M_BLOCKS) % E_BLOCKS
    chunk = program // (M_BLOCKS * E_BLOCKS)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_e * BLOCK_E + tl.arange(0, BLOCK_E)
    wide_chunk = chunk.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if QUAD:
        last = (block_m + 1) * BLOCK_M if CAUSAL else CP
        for start in tl.range(0, last, BLOCK_K, num_stages=STAGES):
            n = start + tl.arange(0, BLOCK_K)
            token, real = token_rows(source_ptr, chunk, n, N, G, C, RAGGED)
            a = tl.load(a_ptr + (wide_chunk * CP + m)[:, None] * CP + n[None, :])
            v = load_values(
                v_ptr, v_stride, rms_ptr, gain_ptr, bias_v_ptr, token, real, column, E, SCALED, SILU, FAST, EVEN_E
            )
            acc = tl.dot(a, v, acc, input_precision=PRECISION)
    if LIN:
        piece = tl.load(piece_ptr + chunk)
        for start in tl.range(0, SP, BLOCK_S, num_stages=STAGES):
            s = start + tl.arange(0, BLOCK_S)
            q = tl.load(q_ptr + (wide_chunk * CP + m)[:, None] * SP + s[None, :])
            state = load_state(prefix_ptr, carry_ptr, chunk, piece, s, column, E, SP, EVEN_E, PREFIX, CARRY)
            acc = tl.dot(q, state, acc, input_precision=PRECISION)
    token, real = token_rows(source_ptr, chunk, m, N, G, C, RAGGED)
    if ATTENDED:
        store_rows(attended_ptr, E, token, real, column, E, acc, EVEN_E)
    u = load_rows(u_ptr, u_stride, token, real, column, E, EVEN_E)
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    u = preactivation(u, bias_u_ptr, column, E, gain, SCALED)
    if SILU:
        # The backward recovers the attended value as out / silu(u): u must not be 0.
        u = tl.where(u == 0.0, 1e-20, u)
    store_rows(out_ptr, E, token, real, column, E, acc * silu(u, SILU, FAST), EVEN_E)
