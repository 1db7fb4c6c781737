# SPDX-License-Identifier: Apache-2.0
"""Sums over the chunks of rows or of pieces, from which scans begin, for Hopper.

Warps, tiles and barriers as in scan.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .common import grid_wait
from .dispatch import kernel
from .hopper import BLOCK, barriers
from .walk import ACTIVATING_REGISTERS, activate_tiles, fetch, fetch_tokens, walk_of


# Tiles of the ring, and as many of the values; warps that activate these.
SLOTS, TOTALS_ACTIVATING = 3, gl.constexpr(8)


@gluon.jit
def summands_of(
    task, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, BACK: gl.constexpr, SPLIT: gl.constexpr,
    SKIP: gl.constexpr,
):  # fmt: skip
    """First and last half of a chunk (exclusive) of a task of `totals_kernel`."""
    _, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, BACK, SPLIT)
    first = 2 * begin
    last = 2 * end
    if SKIP:
        first = gl.where((begin % G == 0) & (shift >= BLOCK), first + 1, first)
        last = gl.where((end % G == 0) & (2 * G * BLOCK - BLOCK - shift >= N), last - 1, last)
    return first, last


@gluon.jit
def load_summands(
    x, keys, values, x_full, x_empty, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS,
    BACK: gl.constexpr, SPLIT: gl.constexpr, SKIP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """What `add` reads, in its order."""
    grid_wait()
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        first, last = summands_of(task, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, BACK, SPLIT, SKIP)
        for half in range(first, last):
            token = (half % (2 * G)) * BLOCK - shift
            place = [half // (2 * G), token, (task % E_BLOCKS) * BLOCK]
            fetch_tokens(x, place, values, x_full, x_empty, step, SLOTS)
            step = fetch(keys, [half * BLOCK, 0], ring, full, empty, step, SLOTS)


@gluon.jit
def add(
    total_ptr, values, ready, x_empty, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut, inverse, E_BLOCKS,
    TASKS, BACK: gl.constexpr, SPLIT: gl.constexpr, SKIP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """What `totals_kernel` computes."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK, 16])
    E = E_BLOCKS * BLOCK
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        first, last = summands_of(task, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, BACK, SPLIT, SKIP)
        first_e = (task % E_BLOCKS) * BLOCK
        acc = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
        for half in range(first, last):
            slot = step % SLOTS
            mbarrier.wait(ready.index(slot), (step // SLOTS) & 1)
            mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
            acc = warpgroup_mma(ring.index(slot).permute((1, 0)), values.index(slot), acc, is_async=True)
            # The product before, while this one runs.
            acc = warpgroup_mma_wait(1, deps=[acc])
            if half > first:
                mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
                mbarrier.arrive(x_empty.index((step - 1) % SLOTS), count=1)
            step += 1
        total = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
        mbarrier.arrive(x_empty.index((step - 1) % SLOTS), count=1)
        s = gl.arange(0, BLOCK, gl.SliceLayout(1, mma))
        column = first_e + gl.arange(0, BLOCK, gl.SliceLayout(0, mma))
        place = (task // E_BLOCKS).to(gl.int64) * BLOCK * E + gl.expand_dims(s * E, 1) + gl.expand_dims(column, 0)
        gl.store(total_ptr + place, (total * inverse).to(total_ptr.dtype.element_ty))


@kernel
@gluon.jit
def totals_kernel(
    x, keys, total_ptr, rms_ptr, gain_ptr, bias_ptr, begin_ptr, end_ptr, N, G, shift, cut, inverse, E_BLOCKS, TASKS,
    BACK: gl.constexpr, SPLIT: gl.constexpr, SKIP: gl.constexpr, EVEN: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """`inverse * sum keys^T V` over the chunks of each piece, `[pieces, S, E]`, or with SPLIT "cut" over the first
    `cut` chunks of each row (BACK: the last): V is `silu(x)`, or with BACK x."""
    values = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, BLOCK], keys.layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, BLOCK], keys.layout)
    x_full = barriers(SLOTS)
    x_empty = barriers(SLOTS)
    full = barriers(SLOTS)
    empty = barriers(SLOTS)
    ready = x_full if BACK else barriers(SLOTS)
    fence_async_shared()
    if BACK:
        gl.warp_specialize(
            [
                (
                    add,
                    (
                        total_ptr, values, ready, x_empty, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut,
                        inverse, E_BLOCKS, TASKS, BACK, SPLIT, SKIP, SLOTS,
                    ),
                ),
                (
                    load_summands,
                    (
                        x, keys, values, x_full, x_empty, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut,
                        E_BLOCKS, TASKS, BACK, SPLIT, SKIP, SLOTS,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    add,
                    (
                        total_ptr, values, ready, x_empty, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut,
                        inverse, E_BLOCKS, TASKS, BACK, SPLIT, SKIP, SLOTS,
                    ),
                ),
                (
                    activate_tiles,
                    (
                        values, x_full, ready, rms_ptr, gain_ptr, bias_ptr, begin_ptr, end_ptr, N, G, shift, cut,
                        E_BLOCKS, TASKS, SPLIT, SKIP, EVEN, SLOTS, TOTALS_ACTIVATING,
                    ),
                ),
                (
                    load_summands,
                    (
                        x, keys, values, x_full, x_empty, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut,
                        E_BLOCKS, TASKS, BACK, SPLIT, SKIP, SLOTS,
                    ),
                ),
            ],
            [TOTALS_ACTIVATING, 1],
            [ACTIVATING_REGISTERS, 24],
        )  # fmt: skip
