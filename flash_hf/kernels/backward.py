# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of gated mixed chunk attention: gate, scores, linear heads, values, heads, and the norm."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    add_state_product,
    basis,
    grid_wait,
    has_tokens,
    load_grid,
    load_rows,
    load_tile,
    preactivation,
    rotated_pair,
    row_gain,
    sigmoid,
    silu,
    silu_grad,
    state_depth,
    store_grid,
    store_rows,
    store_tile,
    token_rows,
    vector,
)
from .dispatch import kernel
from .forward import lower_tile


@triton.jit
def gate_gradient(
    d_out, raw, saved, gain, bias_ptr, column, E,
    SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, ATTENDED: tl.constexpr,
):  # fmt: skip
    """Gradients of the attended value and of the gate's input h, from that of `out = silu(h) * attended`.

    Without the attended value itself it is `out / (h s)`, `s = sigmoid(h)`, so that
    `d_out attended silu'(h) = d_out out (1 / h + 1 - s)`. The forward keeps h away from 0.
    """
    h = preactivation(raw, bias_ptr, column, E, gain, SCALED)
    saved = saved.to(tl.float32)
    if SILU:
        if not ATTENDED:
            h = tl.where(h == 0.0, 1e-20, h)
        s = sigmoid(h, FAST)
        d_attended = d_out * h * s
        if ATTENDED:
            d_gate = d_out * saved * s * (1.0 + h * (1.0 - s))
        else:
            d_gate = d_out * saved * (1.0 / h + 1.0 - s)
    else:
        d_attended = d_out * h
        d_gate = d_out * saved
    return d_attended, d_gate


@kernel
@triton.jit
def gate_kernel(
    d_out_ptr, d_out_stride, u_ptr, u_stride, saved_ptr, v_ptr, v_stride, rms_ptr, gain_ptr, bias_u_ptr, bias_v_ptr,
    d_attended_ptr, d_u_ptr, d_u_stride, value_ptr, d_bias_ptr, T, E,
    SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, ATTENDED: tl.constexpr, EVEN: tl.constexpr,
    VALUES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Backward of the gate: `gate_gradient`, and with VALUES the values again, which the other gradients need.

    With SCALED the gate's gradient is stored times the norm's gain, as the projection's backward takes it, and its
    sums over the program's tokens, `[row blocks, E]`, for the bias.
    """
    grid_wait()
    block_m = tl.program_id(0).to(tl.int64)
    token = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = token < T
    d_out = load_rows(d_out_ptr, d_out_stride, token, real, column, E, EVEN).to(tl.float32)
    u = load_rows(u_ptr, u_stride, token, real, column, E, EVEN)
    saved = load_rows(saved_ptr, E, token, real, column, E, EVEN)
    if VALUES:
        v = load_rows(v_ptr, v_stride, token, real, column, E, EVEN)
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    d_attended, d_u = gate_gradient(d_out, u, saved, gain, bias_u_ptr, column, E, SCALED, SILU, FAST, ATTENDED)
    store_rows(d_attended_ptr, E, token, real, column, E, d_attended, EVEN)
    if SCALED:
        sums = tl.sum(tl.where(real[:, None], d_u, 0.0), 0)
        tl.store(d_bias_ptr + block_m * E + column, sums, mask=column < E)
        d_u = d_u * gain[:, None]
    store_rows(d_u_ptr, d_u_stride, token, real, column, E, d_u, EVEN)
    if VALUES:
        value = silu(preactivation(v, bias_v_ptr, column, E, gain, SCALED), SILU, FAST)
        store_rows(value_ptr, E, token, real, column, E, value, EVEN)


@kernel
@triton.jit
def gate_states_kernel(
    queries, d_out, d_out_stride, u, u_stride, saved, v, v_stride, rms_ptr, gain_ptr, bias_u_ptr, bias_v_ptr,
    source_ptr, begin_ptr, end_ptr, d_attended_ptr, d_u_ptr, d_u_stride, value_ptr, d_bias_ptr, prefix_ptr, total_ptr,
    N, G, C, shift, E,
    CP: tl.constexpr, SP: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
    RAGGED: tl.constexpr, ATTENDED: tl.constexpr, EVEN_E: tl.constexpr, TMA: tl.constexpr, PREFIX: tl.constexpr,
    TOTAL: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`gate_kernel` and the gradient of the states in one pass over a piece, from its last chunk to its first:
    `sum q_lin d_attended^T` as `states_kernel` sums `k v^T`. `d_bias` has one row a piece."""
    grid_wait()
    piece = tl.program_id(0)
    first_e = tl.program_id(1) * BLOCK_E
    column = first_e + tl.arange(0, BLOCK_E)
    s = tl.arange(0, SP)
    k = tl.arange(0, BLOCK_K)
    begin = tl.load(begin_ptr + piece)
    end = tl.load(end_ptr + piece)
    offset = s[:, None] * E + column[None, :]
    mask = (column < E)[None, :]
    acc = tl.zeros((SP, BLOCK_E), tl.float32)
    d_bias = tl.zeros((BLOCK_E,), tl.float32)
    inverse = 1.0 / C
    STEPS: tl.constexpr = CP // BLOCK_K
    for step in tl.range(0, (end - begin) * STEPS, num_stages=STAGES):
        chunk = end - 1 - step // STEPS
        if PREFIX:
            if step % STEPS == 0:
                pointers = prefix_ptr + chunk.to(tl.int64) * (SP * E) + offset
                tl.store(pointers, (acc * inverse).to(prefix_ptr.dtype.element_ty), mask=mask)
        slot = (step % STEPS) * BLOCK_K
        row = chunk * CP + slot
        token, real = token_rows(source_ptr, chunk, slot + k, N, G, C, shift, RAGGED)
        query = load_grid(queries, SP, row, k, 0, s, TMA)
        d = load_tile(d_out, d_out_stride, token, real, chunk, slot, column, first_e, E, G, C, shift, EVEN_E, TMA).to(
            tl.float32
        )
        raw = load_tile(u, u_stride, token, real, chunk, slot, column, first_e, E, G, C, shift, EVEN_E, TMA)
        kept = load_tile(saved, E, token, real, chunk, slot, column, first_e, E, G, C, shift, EVEN_E, TMA)
        gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
        d_attended, d_u = gate_gradient(d, raw, kept, gain, bias_u_ptr, column, E, SCALED, SILU, FAST, ATTENDED)
        d_attended = d_attended.to(d_attended_ptr.dtype.element_ty)
        store_rows(d_attended_ptr, E, token, real, column, E, d_attended, EVEN_E)
        if SCALED:
            d_bias += tl.sum(tl.where(real[:, None], d_u, 0.0), 0)
            d_u = d_u * gain[:, None]
        store_rows(d_u_ptr, d_u_stride, token, real, column, E, d_u, EVEN_E)
        if SILU:
            h = load_tile(v, v_stride, token, real, chunk, slot, column, first_e, E, G, C, shift, EVEN_E, TMA)
            value = silu(preactivation(h, bias_v_ptr, column, E, gain, SCALED), SILU, FAST)
            store_rows(value_ptr, E, token, real, column, E, value, EVEN_E)
        acc = tl.dot(tl.trans(query), d_attended, acc, input_precision=PRECISION)
    if TOTAL:
        tl.store(total_ptr + piece.to(tl.int64) * (SP * E) + offset, acc, mask=mask)
    if SCALED:
        tl.store(d_bias_ptr + piece.to(tl.int64) * E + column, d_bias, mask=column < E)


@triton.jit
def score_gradient(
    chunk, index, d, value, value_stride, source_ptr, a, d_score, N, G, C, shift, E,
    CP: tl.constexpr, TILES: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr, EVEN_E: tl.constexpr,
    TMA: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of scores: `dA = d_attended V^T`, `d_score = 2 relu(score) dA = 2 sqrt(A) dA`."""
    block_m, block_n = lower_tile(index, TILES, CAUSAL)
    m = block_m * BLOCK + tl.arange(0, BLOCK)
    n = block_n * BLOCK + tl.arange(0, BLOCK)
    token_m, real_m = token_rows(source_ptr, chunk, m, N, G, C, shift, RAGGED)
    token_n, real_n = token_rows(source_ptr, chunk, n, N, G, C, shift, RAGGED)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, E, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        d_tile = load_tile(d, E, token_m, real_m, chunk, block_m * BLOCK, column, start, E, G, C, shift, EVEN_E, TMA)
        v = load_tile(
            value, value_stride, token_n, real_n, chunk, block_n * BLOCK, column, start, E, G, C, shift, EVEN_E, TMA
        )
        acc = tl.dot(d_tile, tl.trans(v), acc, input_precision=PRECISION)
    row = chunk * CP + block_m * BLOCK
    rows = tl.arange(0, BLOCK)
    weight = load_grid(a, CP, row, rows, block_n * BLOCK, rows, TMA).to(tl.float32)
    store_grid(d_score, CP, row, rows, block_n * BLOCK, rows, acc * 2.0 * tl.sqrt(weight), TMA)


@triton.jit
def linear_gradient(
    chunk, block_m, x, x_stride, source_ptr, prefix, carry, piece, out, factor, depth, N, G, C, shift, E,
    CP: tl.constexpr, SP: tl.constexpr, PREFIX: tl.constexpr, CARRY: tl.constexpr, RAGGED: tl.constexpr,
    EVEN_E: tl.constexpr, TMA: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of a linear head for a block of tokens, `factor * x state^T`: of the query from x = d_attended and the
    state it saw, of the key from x = V and the state's gradient."""
    m = block_m * BLOCK + tl.arange(0, BLOCK)
    token, real = token_rows(source_ptr, chunk, m, N, G, C, shift, RAGGED)
    s = tl.arange(0, SP)
    acc = tl.zeros((BLOCK, SP), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        tile = load_tile(x, x_stride, token, real, chunk, block_m * BLOCK, column, start, E, G, C, shift, EVEN_E, TMA)
        acc = add_state_product(
            acc, tile, prefix, carry, chunk, piece, s, 0, column, start, E, SP, EVEN_E, PREFIX, CARRY, TMA, True,
            PRECISION,
        )  # fmt: skip
    store_grid(out, SP, chunk * CP + block_m * BLOCK, tl.arange(0, BLOCK), 0, s, acc * factor, TMA)


@triton.jit
def value_gradient(
    chunk, block_n, block_e, a, d, keys, prefix, carry, piece, h_v, v_stride, rms_ptr, gain_ptr, bias_v_ptr,
    source_ptr, d_v, d_v_stride, d_bias_ptr, depth, N, G, C, shift, E,
    CP: tl.constexpr, SP: tl.constexpr, QUAD: tl.constexpr, LIN: tl.constexpr, PREFIX: tl.constexpr,
    CARRY: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
    RAGGED: tl.constexpr, EVEN_E: tl.constexpr, TMA: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of the values' input for a tile: `(A^T d_attended + k_lin d_state) silu'(h)`, times the norm's gain if
    that is applied here, and its sums over the tile's tokens for the bias."""
    n = tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    first_n = block_n * BLOCK
    first_e = block_e * BLOCK_E
    column = first_e + tl.arange(0, BLOCK_E)
    acc = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    if QUAD:
        first = first_n if CAUSAL else 0
        for start in tl.range(first, CP, BLOCK_K, num_stages=STAGES):
            token, real = token_rows(source_ptr, chunk, start + k, N, G, C, shift, RAGGED)
            weight = load_grid(a, CP, chunk * CP + start, k, first_n, n, TMA)
            d_tile = load_tile(d, E, token, real, chunk, start, column, first_e, E, G, C, shift, EVEN_E, TMA)
            acc = tl.dot(tl.trans(weight), d_tile, acc, input_precision=PRECISION)
    if LIN:
        s = tl.arange(0, BLOCK_S)
        for start in tl.range(0, depth, BLOCK_S, num_stages=STAGES):
            key = load_grid(keys, SP, chunk * CP + first_n, n, start, s, TMA)
            acc = add_state_product(
                acc, key, prefix, carry, chunk, piece, s, start, column, first_e, E, SP, EVEN_E, PREFIX, CARRY, TMA,
                False, PRECISION,
            )  # fmt: skip
    token, real = token_rows(source_ptr, chunk, first_n + n, N, G, C, shift, RAGGED)
    raw = load_tile(h_v, v_stride, token, real, chunk, first_n, column, first_e, E, G, C, shift, EVEN_E, TMA)
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    d_h = acc * silu_grad(preactivation(raw, bias_v_ptr, column, E, gain, SCALED), SILU, FAST)
    if SCALED:
        d_h = tl.where(real[:, None], d_h, 0.0)
        place = d_bias_ptr + (chunk.to(tl.int64) * (CP // BLOCK) + block_n) * E + column
        tl.store(place, tl.sum(d_h, 0), mask=column < E)
        d_h = d_h * gain[:, None]
    store_tile(d_v, d_v_stride, token, real, chunk, first_n, column, first_e, E, d_h, C, EVEN_E, TMA)


@kernel
@triton.jit
def chunk_gradients_kernel(
    a, a_slots, d_rows, d_slots, value, value_stride, keys, prefix, carry, d_prefix, d_carry, d_prefix_slots,
    d_carry_slots, piece_ptr, factor_ptr, opens_ptr, h_v, v_stride, rms_ptr, gain_ptr, bias_v_ptr, source_ptr, d_score,
    d_lin_q, d_lin_k, d_v, d_v_stride, d_bias_ptr, N, G, C, shift, GT, E, E_BLOCKS,
    CP: tl.constexpr, SP: tl.constexpr, TILES: tl.constexpr, SCORE_TILES: tl.constexpr, QUAD: tl.constexpr,
    LIN: tl.constexpr, PREFIX: tl.constexpr, CARRY: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr,
    SILU: tl.constexpr, FAST: tl.constexpr, RAGGED: tl.constexpr, EVEN_E: tl.constexpr, EVEN_K: tl.constexpr,
    TMA: tl.constexpr, SKIP: tl.constexpr, SKIP_AFTER: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    LONG_STAGES: tl.constexpr,
):  # fmt: skip
    """All products of one chunk's backward, each program one tile of one of them. They read the same d_attended and
    V; side by side in one launch they find them in the L2 cache.

    `..._slots` are the same tensors, as descriptors of tiles that take slots as the product's inner dimension.
    """
    grid_wait()
    score_programs: tl.constexpr = SCORE_TILES if QUAD else 0
    linear_programs: tl.constexpr = TILES if LIN else 0
    per_chunk = score_programs + 2 * linear_programs + TILES * E_BLOCKS
    # From the last chunk on: the pass before ended there, and the cache still holds what it wrote.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program // per_chunk
    index = program % per_chunk
    piece = tl.load(piece_ptr + chunk)
    if index < score_programs:
        if QUAD:
            score_gradient(
                chunk, index, d_rows, value, value_stride, source_ptr, a, d_score, N, G, C, shift, E, CP, TILES,
                CAUSAL, RAGGED, EVEN_K, TMA, BLOCK, BLOCK_K, PRECISION, LONG_STAGES,
            )  # fmt: skip
    elif index < score_programs + linear_programs:
        if LIN:
            linear_gradient(
                chunk, index - score_programs, d_rows, E, source_ptr, prefix, carry, piece, d_lin_q,
                tl.load(factor_ptr + chunk), state_depth(opens_ptr, chunk, GT, E, False, SKIP), N, G, C, shift, E, CP,
                SP, PREFIX, CARRY, RAGGED, EVEN_K, TMA, BLOCK, BLOCK_K, PRECISION, STAGES,
            )  # fmt: skip
    elif index < score_programs + 2 * linear_programs:
        if LIN:
            linear_gradient(
                chunk, index - score_programs - linear_programs, value, value_stride, source_ptr, d_prefix, d_carry,
                piece, d_lin_k, 1.0, state_depth(opens_ptr, chunk, GT, E, True, SKIP_AFTER), N, G, C, shift, E, CP, SP,
                PREFIX, CARRY, RAGGED, EVEN_K, TMA, BLOCK, BLOCK_K, PRECISION, STAGES,
            )  # fmt: skip
    else:
        tile = index - score_programs - 2 * linear_programs
        value_gradient(
            chunk, tile % TILES, tile // TILES, a_slots, d_slots, keys, d_prefix_slots, d_carry_slots, piece, h_v,
            v_stride, rms_ptr, gain_ptr, bias_v_ptr, source_ptr, d_v, d_v_stride, d_bias_ptr,
            state_depth(opens_ptr, chunk, GT, SP, True, SKIP_AFTER), N, G, C, shift, E, CP, SP, QUAD, LIN, PREFIX,
            CARRY, CAUSAL, SCALED, SILU, FAST, RAGGED, EVEN_E, TMA, BLOCK, BLOCK_E, BLOCK_K, BLOCK_S, PRECISION,
            STAGES,
        )  # fmt: skip


@kernel
@triton.jit
def quadratic_heads_kernel(
    d_score_ptr, q_ptr, k_ptr, d_q_ptr, d_k_ptr, N, G, C, shift, scale,
    CP: tl.constexpr, SP: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`dq = scale d_score k` (program 0 of the last axis) or `dk = scale d_score^T q` of a block of tokens. SKIP:
    halves of chunks without tokens are neither read nor written."""
    grid_wait()
    chunk = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    opens = 0
    closes = CP
    if SKIP:
        if not has_tokens(chunk, first, N, G, C, shift):
            return
        opens = tl.where(has_tokens(chunk, 0, N, G, C, shift), 0, CP // 2)
        closes = tl.where(has_tokens(chunk, CP // 2, N, G, C, shift), CP, CP // 2)
    own = first + tl.arange(0, BLOCK)
    s = tl.arange(0, SP)
    acc = tl.zeros((BLOCK, SP), tl.float32)
    place = (chunk * CP + own)[:, None] * SP + s[None, :]
    if tl.program_id(2) == 0:
        last = first + BLOCK if CAUSAL else closes
        for start in tl.range(opens, last, BLOCK_K, num_stages=STAGES):
            n = start + tl.arange(0, BLOCK_K)
            d = tl.load(d_score_ptr + (chunk * CP + own)[:, None] * CP + n[None, :])
            k = tl.load(k_ptr + (chunk * CP + n)[:, None] * SP + s[None, :])
            acc = tl.dot(d, k, acc, input_precision=PRECISION)
        tl.store(d_q_ptr + place, (acc * scale).to(d_q_ptr.dtype.element_ty))
    else:
        begin = first if CAUSAL else opens
        for start in tl.range(begin, closes, BLOCK_K, num_stages=STAGES):
            m = start + tl.arange(0, BLOCK_K)
            d = tl.load(d_score_ptr + (chunk * CP + m)[:, None] * CP + own[None, :])
            q = tl.load(q_ptr + (chunk * CP + m)[:, None] * SP + s[None, :])
            acc = tl.dot(tl.trans(d), q, acc, input_precision=PRECISION)
        tl.store(d_k_ptr + place, (acc * scale).to(d_k_ptr.dtype.element_ty))


@kernel
@triton.jit
def bias_kernel(
    d_score_ptr, out_ptr, N, G, C, shift, GT, PER_PROGRAM,
    CP: tl.constexpr, TILES: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of one tile of score gradients over some chunks, `[programs, CP, CP]`, with SKIP without those that have no
    tokens there. `sums_kernel` adds the diagonals."""
    grid_wait()
    block_m, block_n = lower_tile(tl.program_id(0), TILES, CAUSAL)
    m = block_m * BLOCK + tl.arange(0, BLOCK)
    n = block_n * BLOCK + tl.arange(0, BLOCK)
    place = m[:, None] * CP + n[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    begin = tl.program_id(1) * PER_PROGRAM
    for step in tl.range(0, tl.minimum(PER_PROGRAM, GT - begin), num_stages=8):
        tile = d_score_ptr + (begin + step).to(tl.int64) * CP * CP + place
        if SKIP:
            inside = has_tokens(begin + step, block_m * BLOCK, N, G, C, shift)
            inside = inside & has_tokens(begin + step, block_n * BLOCK, N, G, C, shift)
            acc += tl.load(tile, mask=inside, other=0.0).to(tl.float32)
        else:
            acc += tl.load(tile).to(tl.float32)
    tl.store(out_ptr + tl.program_id(1) * CP * CP + place, acc)


@triton.jit
def no_totals(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    totals = ()
    for _ in tl.static_range(COUNT):
        totals = totals + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    return totals


@triton.jit
def gained_rows(
    source_ptr, rms_ptr, gain_ptr, chunk, slot, N, G, C, shift, RAGGED: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """`token_rows`, whether a token may follow in the row, and `row_gain` of the tokens."""
    token, real = token_rows(source_ptr, chunk, slot, N, G, C, shift, RAGGED)
    followed = real if RAGGED else real & ((chunk % G) * C + slot - shift < N - 1)
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    return token, real, followed, gain


@triton.jit
def head_rows(opens_ptr, chunk, slot, real, C, CP: tl.constexpr, GT, AFTER: tl.constexpr):
    """Which slots have a gradient of a head, and its row, `[slots, 1]`: with AFTER that of the slot after."""
    place = chunk.to(tl.int64) * CP + slot
    if AFTER:
        # The next chunk's first slot, unless another document begins there.
        ends = slot == C - 1
        opens = tl.load(opens_ptr + chunk + 1, mask=chunk + 1 < GT, other=1)
        real = real & ((slot < C - 1) | (ends & (opens == 0)))
        place = tl.where(ends, (chunk + 1).to(tl.int64) * CP, place + 1)
    return real[:, None], place[:, None]


@triton.jit
def head_gradient(
    d_heads_ptr, head, column, inside, taken, opens_ptr, chunk, slot, real, followed, C, CP: tl.constexpr, GT,
    SP: tl.constexpr, AFTER: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Columns of a head's gradient, `[slots, columns]` float32: with AFTER those of the slot after, with MIXED those
    that are `taken`. Both rows are loaded then: single columns of either would not be vectors."""
    # Places within a head are those of all heads.
    d_head = d_heads_ptr + head * (tl.cast(GT, tl.int64) * (CP * SP))
    row, at = head_rows(opens_ptr, chunk, slot, followed if AFTER else real, C, CP, GT, AFTER)
    found = tl.load(d_head + (at * SP + column[None, :]), mask=row & inside[None, :], other=0.0)
    if MIXED:
        row, at = head_rows(opens_ptr, chunk, slot, followed, C, CP, GT, True)
        after = tl.load(d_head + (at * SP + column[None, :]), mask=row & inside[None, :], other=0.0)
        found = tl.where(taken[None, :], after, found)
    return found.to(tl.float32)


@kernel
@triton.jit
def heads_gradient_kernel(
    d_heads_ptr, z_ptr, z_stride, rms_ptr, gain_ptr, bias_ptr, gamma_ptr, cos_ptr, sin_ptr, source_ptr, opens_ptr,
    d_z_ptr, d_z_stride, sums_ptr, N, G, C, shift, GT, S, rotary_dim, table_rows,
    H: tl.constexpr, PREVIOUS: tl.constexpr, LOCAL: tl.constexpr, CP: tl.constexpr, SP: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr,
    FAST: tl.constexpr, RAGGED: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Backward of `heads_kernel`: gradient of z's input, and per program the sums over its `ROWS` slots for gamma,
    beta and z's bias, `[programs, 2 H + 1, S]`. A rotation's transpose turns the other way; with PREVIOUS the last
    head's gradient comes from the slot after, with LOCAL that of every second pair of the local key, too.

    A program walks through its slots, loads two steps ahead, and adds up in registers what only its end sums over
    threads. SKIP: unless it has half a chunk without tokens."""
    grid_wait()
    blocks: tl.constexpr = CP // ROWS
    program = tl.program_id(0)
    chunk = program // blocks
    rows = ROWS
    if SKIP:
        rows = tl.where(has_tokens(chunk, (program % blocks) * ROWS, N, G, C, shift), ROWS, 0)
    sums = sums_ptr + program.to(tl.int64) * (2 * H + 1) * S
    dtype = d_z_ptr.dtype.element_ty
    if HALF > 0:
        one, two, inside = rotated_pair(rotary_dim, HALF, INTERLEAVED)
        taken = tl.arange(0, HALF) % 2 == 1
        totals = no_totals(4 * H + 2, BLOCK_M, HALF)
        gammas = ()
        for head in tl.static_range(H):
            gammas = gammas + (
                vector(gamma_ptr, head, S, one, inside), vector(gamma_ptr, head, S, two, inside),
            )  # fmt: skip
        for start in tl.range(0, rows, BLOCK_M, num_stages=3):
            slot = (program % blocks) * ROWS + start + tl.arange(0, BLOCK_M)
            token, real, followed, gain = gained_rows(
                source_ptr, rms_ptr, gain_ptr, chunk, slot, N, G, C, shift, RAGGED, SCALED
            )  # fmt: skip
            mask = real[:, None] & inside[None, :]
            h_one = basis(z_ptr, z_stride, token, real, one, inside, gain, bias_ptr, SCALED)
            h_two = basis(z_ptr, z_stride, token, real, two, inside, gain, bias_ptr, SCALED)
            z_one = silu(h_one, SILU, FAST)
            z_two = silu(h_two, SILU, FAST)
            table = ((chunk * C + slot) % table_rows)[:, None] * (rotary_dim // 2) + tl.arange(0, HALF)[None, :]
            cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
            d_one = tl.zeros((BLOCK_M, HALF), tl.float32)
            d_two = tl.zeros((BLOCK_M, HALF), tl.float32)
            added = ()
            for head in tl.static_range(H):
                p_one = head_gradient(
                    d_heads_ptr, head, one, inside, taken, opens_ptr, chunk, slot, real, followed, C, CP, GT, SP,
                    PREVIOUS and head == H - 1, LOCAL and head == 1,
                )  # fmt: skip
                p_two = head_gradient(
                    d_heads_ptr, head, two, inside, taken, opens_ptr, chunk, slot, real, followed, C, CP, GT, SP,
                    PREVIOUS and head == H - 1, LOCAL and head == 1,
                )  # fmt: skip
                if not (PREVIOUS and head >= H - 2):
                    p_one, p_two = p_one * cos + p_two * sin, p_two * cos - p_one * sin
                d_one += p_one * gammas[2 * head]
                d_two += p_two * gammas[2 * head + 1]
                added = added + (
                    totals[4 * head] + p_one * z_one, totals[4 * head + 1] + p_two * z_two,
                    totals[4 * head + 2] + p_one, totals[4 * head + 3] + p_two,
                )  # fmt: skip
            d_one *= silu_grad(h_one, SILU, FAST)
            d_two *= silu_grad(h_two, SILU, FAST)
            totals = added + (totals[4 * H] + d_one, totals[4 * H + 1] + d_two)
            if SCALED:
                d_one *= gain[:, None]
                d_two *= gain[:, None]
            d_z = d_z_ptr + token[:, None] * d_z_stride
            tl.store(d_z + one[None, :], d_one.to(dtype), mask=mask)
            tl.store(d_z + two[None, :], d_two.to(dtype), mask=mask)
        for head in tl.static_range(H):
            tl.store(sums + head * S + one, tl.sum(totals[4 * head], 0), mask=inside)
            tl.store(sums + head * S + two, tl.sum(totals[4 * head + 1], 0), mask=inside)
            tl.store(sums + (H + head) * S + one, tl.sum(totals[4 * head + 2], 0), mask=inside)
            tl.store(sums + (H + head) * S + two, tl.sum(totals[4 * head + 3], 0), mask=inside)
        tl.store(sums + 2 * H * S + one, tl.sum(totals[4 * H], 0), mask=inside)
        tl.store(sums + 2 * H * S + two, tl.sum(totals[4 * H + 1], 0), mask=inside)
    if REST > 0:
        column = rotary_dim + tl.arange(0, REST)
        inside = column < S
        taken = (column // 2 if INTERLEAVED else column) % 2 == 1
        totals = no_totals(2 * H + 1, BLOCK_M, REST)
        for start in tl.range(0, rows, BLOCK_M, num_stages=3):
            slot = (program % blocks) * ROWS + start + tl.arange(0, BLOCK_M)
            token, real, followed, gain = gained_rows(
                source_ptr, rms_ptr, gain_ptr, chunk, slot, N, G, C, shift, RAGGED, SCALED
            )  # fmt: skip
            h = basis(z_ptr, z_stride, token, real, column, inside, gain, bias_ptr, SCALED)
            z = silu(h, SILU, FAST)
            d_h = tl.zeros((BLOCK_M, REST), tl.float32)
            added = ()
            for head in tl.static_range(H):
                d = head_gradient(
                    d_heads_ptr, head, column, inside, taken, opens_ptr, chunk, slot, real, followed, C, CP, GT, SP,
                    PREVIOUS and head == H - 1, LOCAL and head == 1,
                )  # fmt: skip
                d_h += d * vector(gamma_ptr, head, S, column, inside)
                added = added + (totals[2 * head] + d * z, totals[2 * head + 1] + d)
            d_h *= silu_grad(h, SILU, FAST)
            totals = added + (totals[2 * H] + d_h,)
            if SCALED:
                d_h *= gain[:, None]
            d_z = d_z_ptr + token[:, None] * d_z_stride + column[None, :]
            tl.store(d_z, d_h.to(dtype), mask=real[:, None] & inside[None, :])
        for head in tl.static_range(H):
            tl.store(sums + head * S + column, tl.sum(totals[2 * head], 0), mask=inside)
            tl.store(sums + (H + head) * S + column, tl.sum(totals[2 * head + 1], 0), mask=inside)
        tl.store(sums + 2 * H * S + column, tl.sum(totals[2 * H], 0), mask=inside)


@kernel
@triton.jit
def norm_gradient_kernel(
    p_ptr, x_ptr, dy_ptr, rms_ptr, gain_ptr, dx_ptr, sums_ptr, T, D,
    LAYER: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Backward of ScaleNorm, `dx = p - x (p . x) / (D rms^2)` with the gradient p that includes the norm's gain; and
    the program's sum of `(p . x) / gain` for the gain's gradient, in the last column of `sums`.

    LAYER: p comes from the projections' backward, and the sums of the layer's gradient dy over the program's tokens,
    the output bias', are the other columns, `[programs, D + 1]`. Otherwise p is `dy * gain` of a norm on its own.
    RESIDUAL: dy is added, since the layer's output includes its input.
    """
    grid_wait()
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    dots = tl.zeros((BLOCK_T,), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        token = (program * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        real = token < T
        mask = real[:, None] & (column < D)[None, :]
        offset = token[:, None] * D + column[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rms = tl.load(rms_ptr + token, mask=real, other=0.0)
        if LAYER:
            p = tl.load(p_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(dy, 0)
        else:
            p = dy * row_gain(rms_ptr, gain_ptr, token, real)[:, None]
        if not RESIDUAL:
            dy = 0.0
        dot = tl.sum(p * x, 1)
        dx = dy + p - x * (dot * rms * rms / D)[:, None]
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dots += dot
    width = D + 1 if LAYER else 1
    if LAYER:
        tl.store(sums_ptr + program * width + column, total, mask=column < D)
    gain = tl.load(gain_ptr).to(tl.float32)
    gain = tl.where(gain == 0.0, 1e-20, gain)  # as `row_gain` reads it
    tl.store(sums_ptr + program * width + width - 1, tl.sum(dots, 0) / gain)


@triton.jit
def column_sums(ptr, rows, width, block, out_ptr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Sums over the rows of a float32 matrix, for a block of its columns."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, rows, ROWS, num_stages=6):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        acc += tl.load(ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.sum(acc, 0).to(out_ptr.dtype.element_ty))


@triton.jit
def diagonal_sums(
    ptr, squares, C, block, out_ptr, CP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Sums along the diagonals of some float32 squares `[squares, CP, CP]`, for a block of offsets `n - m + C - 1`."""
    offset = block * BLOCK + tl.arange(0, BLOCK) - (C - 1)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(0, squares * CP, ROWS, num_stages=6):
        row = start + tl.arange(0, ROWS)
        m = (row % CP)[:, None]
        n = m + offset[None, :]
        inside = (row < squares * CP)[:, None] & (m < C) & (n >= 0) & (n < C)
        if CAUSAL:
            inside = inside & (offset <= 0)[None, :]
        acc += tl.load(ptr + row[:, None] * CP + n, mask=inside, other=0.0)
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.sum(acc, 0).to(out_ptr.dtype.element_ty))


@kernel
@triton.jit
def sums_kernel(
    u_ptr, u_rows, v_ptr, v_rows, heads_ptr, heads_rows, norm_ptr, norm_rows, square_ptr, squares, out_ptr, E,
    heads_width, norm_width, C, u_blocks, v_blocks, heads_blocks, norm_blocks,
    CP: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All sums over tokens, from the partial sums that programs have left: one after the other in `out`, each from
    a whole block on. In a fixed order, so that two runs are bit-equal."""
    grid_wait()
    block = tl.program_id(0)
    out = out_ptr + block * BLOCK
    after_v = u_blocks + v_blocks
    after_heads = after_v + heads_blocks
    after_norm = after_heads + norm_blocks
    if block < u_blocks:
        column_sums(u_ptr, u_rows, E, block, out, BLOCK, ROWS)
    elif block < after_v:
        column_sums(v_ptr, v_rows, E, block - u_blocks, out, BLOCK, ROWS)
    elif block < after_heads:
        column_sums(heads_ptr, heads_rows, heads_width, block - after_v, out, BLOCK, ROWS)
    elif block < after_norm:
        column_sums(norm_ptr, norm_rows, norm_width, block - after_heads, out, BLOCK, ROWS)
    else:
        diagonal_sums(square_ptr, squares, C, block - after_norm, out, CP, CAUSAL, BLOCK, ROWS)


@kernel
@triton.jit
def rotary_bias_gradient_kernel(
    d_bias_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, offsets, S, rotary_dim,
    PAIRS: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradient of `rotary_bias_kernel`'s weight, `[2, S]`, for some pairs of dimensions; the first program also takes
    the dimensions that RoPE does not turn. All offsets in a fixed order, so that two runs are bit-equal."""
    grid_wait()
    half = rotary_dim // 2
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < half
    cosines, sines = tl.zeros((ROWS, PAIRS), tl.float32), tl.zeros((ROWS, PAIRS), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(0, offsets, ROWS):
        offset = start + tl.arange(0, ROWS)
        real = offset < offsets
        d = tl.load(d_bias_ptr + offset, mask=real, other=0.0).to(tl.float32)
        place = offset[:, None] * half + pair[None, :]
        mask = real[:, None] & inside[None, :]
        cosines += d[:, None] * tl.load(cos_ptr + place, mask=mask, other=0.0)
        sines += d[:, None] * tl.load(sin_ptr + place, mask=mask, other=0.0)
        total += d
    one, two = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + half)
    a_one, a_two = vector(weight_ptr, 0, S, one, inside), vector(weight_ptr, 0, S, two, inside)
    b_one, b_two = vector(weight_ptr, 1, S, one, inside), vector(weight_ptr, 1, S, two, inside)
    c, s = tl.sum(cosines, 0)[None, :], tl.sum(sines, 0)[None, :]
    store_row(out_ptr, 0, S, one, inside, c * b_one - s * b_two)
    store_row(out_ptr, 0, S, two, inside, c * b_two + s * b_one)
    store_row(out_ptr, 1, S, one, inside, c * a_one + s * a_two)
    store_row(out_ptr, 1, S, two, inside, c * a_two - s * a_one)
    if REST > 0:
        column = rotary_dim + tl.arange(0, REST)
        rest = (column < S) & (tl.program_id(0) == 0)
        both = tl.sum(total, 0)
        store_row(out_ptr, 0, S, column, rest, both * vector(weight_ptr, 1, S, column, rest))
        store_row(out_ptr, 1, S, column, rest, both * vector(weight_ptr, 0, S, column, rest))


@triton.jit
def store_row(ptr, row, width, column, inside, values):
    """`ptr[row, column] = values`, `[1, columns]`."""
    place = (ptr + row * width + column)[None, :]
    tl.store(place, values.to(ptr.dtype.element_ty), mask=inside[None, :])
