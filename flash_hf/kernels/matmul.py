# SPDX-License-Identifier: Apache-2.0
"""Matrix products whose epilogue does what would be passes of its own: the residual sum of the output projection, and
in its backward the gradient of the gate."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_rows, preactivation, row_gain, sigmoid, store_rows


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


@triton.jit
def gate_kernel(
    d_out_ptr, d_out_stride, u_ptr, u_stride, saved_ptr, d_attended_ptr, d_u_ptr, d_u_stride, T, E,
    SILU: tl.constexpr, FAST: tl.constexpr, ATTENDED: tl.constexpr, EVEN_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Backward of the gate, `gate_gradient`, on its own: for projections that are not plain linear layers."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = token < T
    d_out = load_rows(d_out_ptr, d_out_stride, token, real, column, E, EVEN_E).to(tl.float32)
    u = load_rows(u_ptr, u_stride, token, real, column, E, EVEN_E)
    saved = load_rows(saved_ptr, E, token, real, column, E, EVEN_E)
    gain = real.to(tl.float32)
    d_attended, d_u = gate_gradient(d_out, u, saved, gain, saved_ptr, column, E, False, SILU, FAST, ATTENDED)
    store_rows(d_attended_ptr, E, token, real, column, E, d_attended, EVEN_E)
    store_rows(d_u_ptr, d_u_stride, token, real, column, E, d_u, EVEN_E)


@triton.jit
def product_tile(
    a_ptr, b_ptr, a_stride, b_stride_k, b_stride_n, row, column, M, N, K,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of `a b`, float32. EVEN: M, N and K are whole numbers of blocks."""
    k = tl.arange(0, BLOCK_K)
    a_pointers = a_ptr + row[:, None] * a_stride + k[None, :]
    b_pointers = b_ptr + k[:, None] * b_stride_k + column[None, :] * b_stride_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN:
            a = tl.load(a_pointers)
            b = tl.load(b_pointers)
        else:
            a = tl.load(a_pointers, mask=(row < M)[:, None] & (start + k < K)[None, :], other=0.0)
            b = tl.load(b_pointers, mask=(start + k < K)[:, None] & (column < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_pointers += BLOCK_K
        b_pointers += BLOCK_K * b_stride_k
    return acc


@triton.jit
def left_half(x, LEFT: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """One half of a tile's columns: an epilogue of several tiles runs out of registers on a whole one."""
    left, right = tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    return left if LEFT else right


@triton.jit
def tile_of(program, m_blocks, n_blocks, GROUP: tl.constexpr):
    """Row and column block of a program: GROUP row blocks share their columns while these are in the L2 cache."""
    per_group = GROUP * n_blocks
    first = (program // per_group) * GROUP
    size = tl.minimum(m_blocks - first, GROUP)
    return first + (program % per_group) % size, (program % per_group) // size


@triton.jit
def residual_kernel(
    a_ptr, w_ptr, bias_ptr, x_ptr, y_ptr, M, N, K,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`y = x + a w^T + bias` with contiguous a `[M, K]`, w `[N, K]`, x and y `[M, N]`."""
    block_m, block_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product_tile(
        a_ptr, w_ptr, K, 1, K, row, column, M, N, K, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, STAGES
    )
    HALF: tl.constexpr = BLOCK_N // 2
    for half in tl.static_range(2):
        part = left_half(acc, half == 0, BLOCK_M, HALF)
        column = block_n * BLOCK_N + half * HALF + tl.arange(0, HALF)
        offset = row[:, None] * N + column[None, :]
        if EVEN:
            part += tl.load(bias_ptr + column).to(tl.float32)[None, :] + tl.load(x_ptr + offset).to(tl.float32)
            tl.store(y_ptr + offset, part.to(y_ptr.dtype.element_ty))
        else:
            mask = (row < M)[:, None] & (column < N)[None, :]
            part += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
            part += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + offset, part.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_product_kernel(
    dy_ptr, w_ptr, u_ptr, u_stride, rms_ptr, gain_ptr, bias_ptr, saved_ptr, d_attended_ptr, d_u_ptr, d_u_stride,
    d_bias_ptr, M, N, K,
    FAST: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`d_out = dy w` and, without storing it, `gate_gradient`: dy `[M, K]`, w `[K, N]`, all else `[M, N]`.

    The gate's gradient is stored times the norm's gain, as the input projection's backward takes it; `d_bias` is
    `[row blocks, N]`, to be summed over the first dimension.
    """
    block_m, block_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = product_tile(
        dy_ptr, w_ptr, K, N, 1, row, column, M, N, K, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, STAGES
    )
    real = row < M
    gain = row_gain(rms_ptr, gain_ptr, row, real)
    HALF: tl.constexpr = BLOCK_N // 2
    for half in tl.static_range(2):
        d_out = left_half(acc, half == 0, BLOCK_M, HALF)
        column = block_n * BLOCK_N + half * HALF + tl.arange(0, HALF)
        raw = load_rows(u_ptr, u_stride, row, real, column, N, EVEN)
        saved = load_rows(saved_ptr, N, row, real, column, N, EVEN)
        d_attended, d_u = gate_gradient(d_out, raw, saved, gain, bias_ptr, column, N, True, True, FAST, False)
        store_rows(d_attended_ptr, N, row, real, column, N, d_attended, EVEN)
        store_rows(d_u_ptr, d_u_stride, row, real, column, N, d_u * gain[:, None], EVEN)
        d_u = tl.where(real[:, None], d_u, 0.0)
        tl.store(d_bias_ptr + block_m.to(tl.int64) * N + column, tl.sum(d_u, 0), mask=column < N)
