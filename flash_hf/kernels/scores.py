# SPDX-License-Identifier: Apache-2.0
"""Attention weights within chunks, and the gradients of their heads, for Hopper.

Warps load tiles, and two groups of four multiply: weights each for half of a tile's queries, gradients one those of
queries, the other those of keys. The groups do not wait for each other, so that one's end runs while the tensor cores
work for the other. README.md beside this file has the bytes.
"""

from __future__ import annotations

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import grid_wait
from .dispatch import kernel
from .hopper import BLOCK, TILE_BYTES, barriers, halves, load_async, lower_tile, store_async
from .tiles import cdiv
from .walk import has_tokens


# Pairs of tiles in flight: with a tile for the ends they fill the shared memory.
STAGES = 3
# Queries of a group of warps.
HALF = gl.constexpr(64)
# Of a gradient: the depth of a step of the product, which is also the width of its end's tiles, and steps in flight of
# each group.
STEP, GRADIENT_STAGES = 64, 3


@functools.cache
def tasks_of(chunks: int, blocks: int, causal: bool, programs: int) -> tuple[int, int]:
    """How many chunks a task has, of which it computes the same tile with one bias; and how many tasks there are. The
    fewest tiles for the program with most, if the bias of a task takes a quarter of a tile's time."""
    tiles = blocks * (blocks + 1) // 2 if causal else blocks * blocks
    run = min(range(1, 9), key=lambda run: cdiv(cdiv(chunks, run) * tiles, programs) * (run + 0.25))
    return run, cdiv(chunks, run) * tiles


@gluon.jit
def place_of(task, CHUNKS, BLOCKS, RUN, CAUSAL: gl.constexpr):
    """Blocks of queries and of keys of a task, and the first and the last (exclusive) of its chunks. All tiles of some
    chunks run at the same time and share what they read in the L2 cache."""
    tiles = BLOCKS * (BLOCKS + 1) // 2 if CAUSAL else BLOCKS * BLOCKS
    tile = task % tiles
    if CAUSAL:
        m, n = lower_tile(tile)
    else:
        m = tile // BLOCKS
        n = tile % BLOCKS
    first = (task // tiles) * RUN
    return m, n, first, gl.minimum(first + RUN, CHUNKS)


@gluon.jit
def pair_has_tokens(chunk, m, n, N, G, shift, BLOCKS):
    """Whether there are tokens in two blocks of a chunk."""
    token = (chunk % G) * BLOCKS * BLOCK - shift
    return has_tokens(token + m * BLOCK, N) & has_tokens(token + n * BLOCK, N)


@gluon.jit
def load_heads(
    q, k, left, right, full, empty, N, G, shift, CHUNKS, BLOCKS, RUN, TASKS, CAUSAL: gl.constexpr, SKIP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order."""
    grid_wait()
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        m, n, first, last = place_of(task, CHUNKS, BLOCKS, RUN, CAUSAL)
        for chunk in range(first, last):
            if not SKIP or pair_has_tokens(chunk, m, n, N, G, shift, BLOCKS):
                slot = step % STAGES
                row = (chunk * BLOCKS + m) * BLOCK
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(slot), 2 * TILE_BYTES)
                load_async(q, [row, 0], full.index(slot), left.index(2 * slot))
                load_async(q, [row + HALF, 0], full.index(slot), left.index(2 * slot + 1))
                load_async(k, [(chunk * BLOCKS + n) * BLOCK, 0], full.index(slot), right.index(slot))
                step += 1


@gluon.jit
def multiply(
    a, bias_ptr, left, right, full, empty, tiles, N, G, shift, scale, CHUNKS, BLOCKS, RUN, TASKS, GROUP: gl.constexpr,
    BIAS: gl.constexpr, CAUSAL: gl.constexpr, SKIP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The weights themselves, see `scores_kernel`, for one group's queries of every tile."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    tile = tiles.index(GROUP)
    m_slot = GROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(1, mma))
    n_slot = gl.arange(0, BLOCK, gl.SliceLayout(0, mma))
    offset = gl.expand_dims(n_slot, 0) - gl.expand_dims(m_slot, 1)
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        m, n, first, last = place_of(task, CHUNKS, BLOCKS, RUN, CAUSAL)
        # What is added to a score stays in registers.
        if BIAS:
            bias = gl.load(bias_ptr + ((n - m + BLOCKS) * BLOCK - 1) + offset).to(gl.float32)
        else:
            bias = gl.zeros([HALF, BLOCK], gl.float32, mma)
        if CAUSAL:
            bias = gl.where((n - m) * BLOCK + offset <= 0, bias, float("-inf"))
        for chunk in range(first, last):
            if not SKIP or pair_has_tokens(chunk, m, n, N, G, shift, BLOCKS):
                slot = step % STAGES
                acc = gl.zeros([HALF, BLOCK], gl.float32, mma)
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                acc = warpgroup_mma(
                    left.index(2 * slot + GROUP), right.index(slot).permute((1, 0)), acc, is_async=True
                )
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(slot), count=1)
                step += 1
                score = gl.maximum(acc * scale + bias, 0.0)
                tma.store_wait(0)
                tile.store((score * score).to(gl.bfloat16))
                fence_async_shared()
                store_async(a, [(chunk * BLOCKS + m) * BLOCK + GROUP * HALF, n * BLOCK], tile)
    tma.store_wait(0)


@kernel
@gluon.jit
def scores_kernel(
    q, k, a, bias_ptr, N, G, shift, scale, CHUNKS, BLOCKS, RUN, TASKS, BIAS: gl.constexpr, CAUSAL: gl.constexpr,
    SKIP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention weights `A = relu(scale q k^T + b)^2` within chunks of so many blocks of 128 slots. Tiles above the
    diagonal of a causal model, and with SKIP those of halves of chunks without tokens, are neither read nor written.

    A task is a tile of 128 by 128 of `RUN` chunks.
    """
    left = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, HALF, BLOCK], q.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, BLOCK], k.layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, BLOCK], a.layout)
    full = barriers(STAGES)
    # One arrival of each group.
    empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    a, bias_ptr, left, right, full, empty, tiles, N, G, shift, scale, CHUNKS, BLOCKS, RUN, TASKS, 0,
                    BIAS, CAUSAL, SKIP, STAGES,
                ),
            ),
            (
                multiply,
                (
                    a, bias_ptr, left, right, full, empty, tiles, N, G, shift, scale, CHUNKS, BLOCKS, RUN, TASKS, 1,
                    BIAS, CAUSAL, SKIP, STAGES,
                ),
            ),
            (
                load_heads,
                (
                    q, k, left, right, full, empty, N, G, shift, CHUNKS, BLOCKS, RUN, TASKS, CAUSAL, SKIP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def depth_of(
    chunk, block, N, G, shift, BLOCKS, KEYS: gl.constexpr, CAUSAL: gl.constexpr, SKIP: gl.constexpr
):  # fmt: skip
    """Where the product for a block of queries (KEYS: of keys) begins and ends, in blocks: nowhere without tokens."""
    begin = 0
    end = BLOCKS
    if SKIP:
        token = (chunk % G) * BLOCKS * BLOCK - shift
        begin = gl.where(has_tokens(token, N), 0, 1)
        end = gl.where(has_tokens(token + (BLOCKS - 1) * BLOCK, N), BLOCKS, BLOCKS - 1)
        end = gl.where(has_tokens(token + block * BLOCK, N), end, begin)
    if CAUSAL:
        if KEYS:
            begin = gl.maximum(begin, block)
        else:
            end = gl.minimum(end, block + 1)
    return begin, end


@gluon.jit
def load_gradients(
    d_score, head, left, right, full, empty, N, G, shift, BLOCKS, TASKS, KEYS: gl.constexpr, CAUSAL: gl.constexpr,
    SKIP: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `add` reads, in its order."""
    grid_wait()
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        chunk = task // BLOCKS
        block = task % BLOCKS
        begin, end = depth_of(chunk, block, N, G, shift, BLOCKS, KEYS, CAUSAL, SKIP)
        first = chunk * BLOCKS * BLOCK
        for start in range(begin * BLOCK, end * BLOCK, STEP):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * BLOCK * STEP * 2)
            if KEYS:
                load_async(d_score, [first + start, block * BLOCK], full.index(slot), left.index(slot))
            else:
                load_async(d_score, [first + block * BLOCK, start], full.index(slot), left.index(slot))
            load_async(head, [first + start, 0], full.index(slot), right.index(slot))
            step += 1


@gluon.jit
def add(
    result, left, right, full, empty, tile, N, G, shift, scale, BLOCKS, TASKS, KEYS: gl.constexpr,
    CAUSAL: gl.constexpr, SKIP: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The gradients of queries, or with KEYS of keys, see `score_heads_kernel`."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16])
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        chunk = task // BLOCKS
        block = task % BLOCKS
        begin, end = depth_of(chunk, block, N, G, shift, BLOCKS, KEYS, CAUSAL, SKIP)
        if not SKIP or begin < end:
            acc = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
            for start in range(begin * BLOCK, end * BLOCK, STEP):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                x = left.index(slot).permute((1, 0)) if KEYS else left.index(slot)
                acc = warpgroup_mma(x, right.index(slot), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                if start > begin * BLOCK:
                    mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
                step += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            parts = halves(acc, narrow)
            for part in gl.static_range(2):
                tma.store_wait(0)
                tile.store((parts[part] * scale).to(gl.bfloat16))
                fence_async_shared()
                store_async(result, [task * BLOCK, part * STEP], tile)
    tma.store_wait(0)


@kernel
@gluon.jit
def score_heads_kernel(
    d_score, d_score_rows, q, k, d_q, d_k, N, G, shift, scale, BLOCKS, TASKS, CAUSAL: gl.constexpr,
    SKIP: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`d_q = scale d_score k` and `d_k = scale d_score^T q` within chunks of so many blocks of 128 slots.
    `d_score_rows` is d_score, described for `STEP` of its rows. What lies above the diagonal of a causal model in
    blocks, and with SKIP halves of chunks without tokens, are neither read nor written.

    A task is a block of queries, for one group of warps, and the same block of keys, for the other.
    """
    query_left = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, STEP], d_score.layout)
    query_right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, STEP, BLOCK], k.layout)
    key_left = gl.allocate_shared_memory(gl.bfloat16, [STAGES, STEP, BLOCK], d_score_rows.layout)
    key_right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, STEP, BLOCK], q.layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, STEP], d_q.layout)
    query_full = barriers(STAGES)
    query_empty = barriers(STAGES)
    key_full = barriers(STAGES)
    key_empty = barriers(STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                add,
                (
                    d_q, query_left, query_right, query_full, query_empty, tiles.index(0), N, G, shift, scale, BLOCKS,
                    TASKS, False, CAUSAL, SKIP, STEP, STAGES,
                ),
            ),
            (
                add,
                (
                    d_k, key_left, key_right, key_full, key_empty, tiles.index(1), N, G, shift, scale, BLOCKS, TASKS,
                    True, CAUSAL, SKIP, STEP, STAGES,
                ),
            ),
            (
                load_gradients,
                (
                    d_score, k, query_left, query_right, query_full, query_empty, N, G, shift, BLOCKS, TASKS, False,
                    CAUSAL, SKIP, STEP, STAGES,
                ),
            ),
            (
                load_gradients,
                (
                    d_score_rows, q, key_left, key_right, key_full, key_empty, N, G, shift, BLOCKS, TASKS, True,
                    CAUSAL, SKIP, STEP, STAGES,
                ),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
