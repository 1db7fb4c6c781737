# SPDX-License-Identifier: Apache-2.0
"""The output projection, with the residual sum as the end of the product, for Hopper.

Two groups of four warps share a tile's columns; the tiles of its end go through the same ring as its factors.
README.md beside this file has the derivation and the bytes.
"""

from __future__ import annotations

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
from .hopper import barriers, halves, load_async, store_async


# Depth of one step of the product, which is also the width of its end's tiles, and steps in flight: they fill the
# shared memory.
STEP, STAGES = 64, 4


def tile_of(D: int) -> tuple[int, int]:
    """Rows of each group, and columns, of a tile of a product of D columns."""
    return (128, 192) if D % 192 == 0 else (64, 256)


@gluon.jit
def place_of(task, COLUMN_BLOCKS, TASKS, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """First row and column of a task's tile. The tiles of some rows run at the same time, and the last rows first,
    which the L2 cache may still hold."""
    task = TASKS - 1 - task
    return (task // COLUMN_BLOCKS) * (2 * ROWS), (task % COLUMN_BLOCKS) * COLUMNS


@gluon.jit
def fetch(x, row, column, left, slot, full, ROWS: gl.constexpr):
    """Both groups' rows of a tile of `STEP` columns."""
    load_async(x, [row, column], full.index(slot), left.index(2 * slot))
    load_async(x, [row + ROWS, column], full.index(slot), left.index(2 * slot + 1))


@gluon.jit
def load_operands(
    a, w, w_rest, x, left, right, rest, full, empty, steps, COLUMN_BLOCKS, TASKS, ROWS: gl.constexpr,
    COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order."""
    grid_wait()
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row, column = place_of(task, COLUMN_BLOCKS, TASKS, ROWS, COLUMNS)
        for part in range(steps):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), (2 * ROWS + COLUMNS) * STEP * 2)
            fetch(a, row, part * STEP, left, slot, full, ROWS)
            load_async(w, [column, part * STEP], full.index(slot), right.index(slot))
            if COLUMNS == 192:
                load_async(w_rest, [column + 128, part * STEP], full.index(slot), rest.index(slot))
            step += 1
        for part in range(COLUMNS // STEP):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * ROWS * STEP * 2)
            fetch(x, row, column + part * STEP, left, slot, full, ROWS)
            step += 1


@gluon.jit
def finish(
    y, acc, bias_ptr, left, full, empty, step, row, column, PART: gl.constexpr, GROUP: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The end of the tile's columns from `PART * STEP` on, for a group's rows: x, in the ring's place of `step`,
    becomes `x + acc + bias`. The place of the part before is free when its store has ended, that of the last part in
    the next task."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    tile = left.index(2 * slot + GROUP)
    first = column + PART * STEP
    bias = gl.load(bias_ptr + first + gl.arange(0, STEP, gl.SliceLayout(0, layout))).to(gl.float32)
    # In the order of residual.py.
    acc += gl.expand_dims(bias, 0) + tile.load(layout).to(gl.float32)
    tile.store(acc.to(gl.bfloat16))
    fence_async_shared()
    store_async(y, [row, first], tile)
    if PART > 0:
        tma.store_wait(1)
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    return step + 1


@gluon.jit
def multiply(
    y, bias_ptr, left, right, rest, full, empty, steps, COLUMN_BLOCKS, TASKS, GROUP: gl.constexpr, ROWS: gl.constexpr,
    COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The product and its end, see `product_kernel`, for one group's rows of every tile."""
    grid_wait()
    WIDE: gl.constexpr = 128 if COLUMNS == 192 else 256
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16])
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row, column = place_of(task, COLUMN_BLOCKS, TASKS, ROWS, COLUMNS)
        row += GROUP * ROWS
        acc = gl.zeros([ROWS, WIDE], gl.float32, mma)
        if COLUMNS == 192:
            acc_rest = gl.zeros([ROWS, STEP], gl.float32, narrow)
        for part in range(steps):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            factor = left.index(2 * slot + GROUP)
            acc = warpgroup_mma(factor, right.index(slot).permute((1, 0)), acc, is_async=True)
            if COLUMNS == 192:
                acc_rest = warpgroup_mma(factor, rest.index(slot).permute((1, 0)), acc_rest, is_async=True)
                acc, acc_rest = warpgroup_mma_wait(2, deps=[acc, acc_rest])
            else:
                acc = warpgroup_mma_wait(1, deps=[acc])
            if part == 0:
                tma.store_wait(0)
            # The step before, or the last tile of the task before.
            if step > 0:
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            step += 1
        if COLUMNS == 192:
            acc, acc_rest = warpgroup_mma_wait(0, deps=[acc, acc_rest])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        if COLUMNS == 192:
            one, two = halves(acc, narrow)
            three = acc_rest
        else:
            before, behind = halves(acc, half)
            one, two = halves(before, narrow)
            three, four = halves(behind, narrow)
        step = finish(y, one, bias_ptr, left, full, empty, step, row, column, 0, GROUP, STEP, STAGES, narrow)
        step = finish(y, two, bias_ptr, left, full, empty, step, row, column, 1, GROUP, STEP, STAGES, narrow)
        step = finish(y, three, bias_ptr, left, full, empty, step, row, column, 2, GROUP, STEP, STAGES, narrow)
        if COLUMNS == 256:
            step = finish(y, four, bias_ptr, left, full, empty, step, row, column, 3, GROUP, STEP, STAGES, narrow)
    tma.store_wait(0)


@kernel
@gluon.jit
def product_kernel(
    a, w, w_rest, x, y, bias_ptr, steps, COLUMN_BLOCKS, TASKS, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`y = x + a w^T + bias` with a `[T, K]` and w `[D, K]`.

    Tasks are tiles of `2 ROWS` tokens by COLUMNS, in steps of STEP of the K, of which there are `steps`. Of 192
    columns w is read for 128 and `w_rest` for the others. Rows behind the last token are read as 0 and not written.
    """
    RIGHT: gl.constexpr = 128 if COLUMNS == 192 else COLUMNS
    left = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, ROWS, STEP], a.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, RIGHT, STEP], w.layout)
    rest = right
    if COLUMNS == 192:
        rest = gl.allocate_shared_memory(gl.bfloat16, [STAGES, STEP, STEP], w_rest.layout)
    full = barriers(STAGES)
    # One arrival of each group.
    empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    y, bias_ptr, left, right, rest, full, empty, steps, COLUMN_BLOCKS, TASKS, 0, ROWS, COLUMNS, STEP,
                    STAGES,
                ),
            ),
            (
                multiply,
                (
                    y, bias_ptr, left, right, rest, full, empty, steps, COLUMN_BLOCKS, TASKS, 1, ROWS, COLUMNS, STEP,
                    STAGES,
                ),
            ),
            (
                load_operands,
                (
                    a, w, w_rest, x, left, right, rest, full, empty, steps, COLUMN_BLOCKS, TASKS, ROWS, COLUMNS, STEP,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
