# SPDX-License-Identifier: Apache-2.0
"""The output projection, with the residual sum as the epilogue of the product."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import grid_wait
from .dispatch import kernel


@triton.jit
def left_half(x, LEFT: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """One half of a tile's columns: on a whole tile an epilogue that reads several tiles would spill registers."""
    left, right = tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    return left if LEFT else right


@triton.jit
def tile_of(program, m_blocks, n_blocks, GROUP: tl.constexpr):
    """Row and column block of a program: GROUP row blocks share their columns while these are in the L2 cache."""
    per_group = GROUP * n_blocks
    first = (program // per_group) * GROUP
    size = tl.minimum(m_blocks - first, GROUP)
    return first + (program % per_group) % size, (program % per_group) // size


@kernel
@triton.jit
def residual_kernel(
    a, w, bias_ptr, x_ptr, y_ptr, M, N, K,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`y = x + a w^T + bias` with descriptors of a `[M, K]` and w `[N, K]`, contiguous x and y `[M, N]`.

    EVEN: M and N are whole numbers of blocks.
    """
    grid_wait()
    # In reverse, so that the rows that the previous kernel wrote last are still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block_m, block_n = tile_of(program, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    row = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        acc = tl.dot(
            a.load([block_m * BLOCK_M, start]), tl.trans(w.load([block_n * BLOCK_N, start])), acc,
            input_precision=PRECISION,
        )  # fmt: skip
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
