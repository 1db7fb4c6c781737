# SPDX-License-Identifier: Apache-2.0
"""FLASH-Quad's products over whole rows, for Hopper: `A V`, `A^T d_attended` and `d_attended V^T`, each with what
becomes of it as its epilogue. README.md beside this file has the derivation and the bytes.

Written in Gluon like scan.py: one warp loads tiles ahead of the eight that multiply. A row's tokens are its slots.
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

from .dispatch import kernel
from .gate import row_halves
from .scan import BLOCK, TILE_BYTES, halves, load_async, sigmoid, store_async


# Depth of one step of a product, and steps in flight.
STEP, STAGES = 64, 3
# Rows whose tasks run next to each other and share what they read in the L2 cache.
GROUP = gl.constexpr(8)


@gluon.jit
def place_of(task, ROWS, M_BLOCKS, COLUMNS, KIND: gl.constexpr, CAUSAL: gl.constexpr):
    """Row, block of 256 slots and block of 128 columns of a task, and whether the task has anything to do. Of a group
    of rows, what takes longest comes first."""
    per_group = GROUP * M_BLOCKS * COLUMNS
    first = (task // per_group) * GROUP
    rows = gl.minimum(ROWS - first, GROUP)
    inside = task % per_group
    block = inside // (rows * COLUMNS)
    if CAUSAL:
        if KIND == "output":
            block = M_BLOCKS - 1 - block
    row = first + (inside // COLUMNS) % rows
    column = inside % COLUMNS
    real = column < COLUMNS
    if CAUSAL:
        if KIND == "scores":
            real = column <= 2 * block + 1
    return row, block, column, real


@gluon.jit
def depth_of(block, N, E, KIND: gl.constexpr, CAUSAL: gl.constexpr):
    """Where a task's product begins and ends: slots, or the value dimensions of a score."""
    begin = 0
    end = N
    if KIND == "scores":
        end = E
    elif CAUSAL:
        if KIND == "output":
            end = (block + 1) * (2 * BLOCK)
        else:
            begin = block * (2 * BLOCK)
    return begin, end


@gluon.jit
def load_factors(
    x, y, held, left, right, full, empty, tiles, end_full, end_empty, ROWS, N, E, COLUMNS, TASKS, KIND: gl.constexpr,
    CAUSAL: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order."""
    step = 0
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row, block, column, real = place_of(task, ROWS, N // (2 * BLOCK), COLUMNS, KIND, CAUSAL)
        begin, end = depth_of(block, N, E, KIND, CAUSAL)
        first = row * N
        if real:
            for start in range(begin, end, STEP):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(slot), 3 * BLOCK * STEP * 2)
                if KIND == "values":
                    load_async(x, [first + start, block * (2 * BLOCK)], full.index(slot), left.index(slot))
                else:
                    load_async(x, [first + block * (2 * BLOCK), start], full.index(slot), left.index(slot))
                if KIND == "scores":
                    load_async(y, [first + column * BLOCK, start], full.index(slot), right.index(slot))
                else:
                    load_async(y, [first + start, column * BLOCK], full.index(slot), right.index(slot))
                step += 1
                if start == begin + STAGES * STEP:
                    # The task before has stored its tiles by now, and these have the rest of the product to arrive.
                    mbarrier.wait(end_empty, number & 1)
                    mbarrier.expect(end_full, 2 * TILE_BYTES)
                    for half in gl.static_range(2):
                        place = [first + (block * 2 + half) * BLOCK, column * BLOCK]
                        load_async(held, place, end_full, tiles.index(half))
            number += 1


@gluon.jit
def finish(
    tile, acc, scale, bias_ptr, sums_ptr, first: gl.constexpr, KIND: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """The end of half a tile, whose columns begin at `first`: `tile` holds h and takes `silu(h) acc` (output) or
    `silu'(h) acc` (values), or holds weights A and takes `2 sqrt(A) acc` (scores)."""
    tile = tile.slice(first, BLOCK // 2, dim=1)
    x = tile.load(layout).to(gl.float32)
    if KIND == "scores":
        acc = acc * (2.0 * gl.sqrt(x))
    else:
        columns = first + gl.arange(0, BLOCK // 2, gl.SliceLayout(0, layout))
        h = x * scale + gl.expand_dims(gl.load(bias_ptr + columns).to(gl.float32), 0)
        if KIND == "output":
            # The backward recovers the attended value as out / silu(h): h must not be 0.
            h = gl.where(h == 0.0, 1e-20, h)
            acc = acc * (h * sigmoid(h))
        else:
            s = sigmoid(h)
            acc = acc * (s * (1.0 + h * (1.0 - s)))
            gl.store(sums_ptr + columns, gl.sum(acc, 0))
            acc = acc * scale
    tile.store(acc.to(gl.bfloat16))


@gluon.jit
def multiply(
    result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, tiles, end_full, end_empty, ROWS, N, E,
    COLUMNS, TASKS, KIND: gl.constexpr, CAUSAL: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The products and their ends, see `quadratic_kernel`."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK // 2, 16]
    )
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply`
    step = 0
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row, block, column, real = place_of(task, ROWS, N // (2 * BLOCK), COLUMNS, KIND, CAUSAL)
        begin, end = depth_of(block, N, E, KIND, CAUSAL)
        token = row * N + block * (2 * BLOCK)
        if real:
            acc = gl.zeros([2 * BLOCK, BLOCK], gl.float32, mma)
            for start in range(begin, end, STEP):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                x = left.index(slot).permute((1, 0)) if KIND == "values" else left.index(slot)
                y = right.index(slot).permute((1, 0)) if KIND == "scores" else right.index(slot)
                acc = warpgroup_mma(x, y, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                if start > begin:
                    mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
                if start == begin + STEP:
                    # The stores of the task before have had the time of a step.
                    tma.store_wait(0)
                    mbarrier.arrive(end_empty, count=1)
                step += 1
            # Early, so that nothing waits for it.
            place = token + gl.arange(0, BLOCK, gl.SliceLayout(1, narrow))
            scale_0 = gl.load(rms_ptr + place) * gain
            scale_1 = gl.load(rms_ptr + place + BLOCK) * gain
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            mbarrier.wait(end_full, number & 1)
            number += 1
            upper, lower = row_halves(acc, mma)
            for half in gl.static_range(2):
                scale = gl.expand_dims(scale_0 if half == 0 else scale_1, 1)
                tile = tiles.index(half)
                sums = sums_ptr + (token // BLOCK + half) * E + column * BLOCK
                # In two steps, since more does not fit the registers.
                one, two = halves(upper if half == 0 else lower, narrow)
                finish(tile, one, scale, bias_ptr + column * BLOCK, sums, 0, KIND, narrow)
                finish(tile, two, scale, bias_ptr + column * BLOCK, sums, BLOCK // 2, KIND, narrow)
                fence_async_shared()
                store_async(result, [token + half * BLOCK, column * BLOCK], tile)
    tma.store_wait(0)


@kernel
@gluon.jit
def quadratic_kernel(
    x, y, held, result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, ROWS, N, E, COLUMNS, TASKS, KIND: gl.constexpr,
    CAUSAL: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of FLASH-Quad's products, in tiles of 256 slots by 128 columns of whole rows of N tokens.

    KIND "output": `silu(u) * (A V)` from x = A `[rows * N, N]`, y = V `[rows * N, E]`, held = u's input.
    "values": `silu'(h) * (A^T d_attended)` from x = A, y = d_attended, held = the values' input h; per block of 128
    tokens the sums for the bias, `[blocks, E]`.
    "scores": `2 sqrt(A) * (d_attended V^T)` from x = d_attended, y = V, held = A.
    Tiles above the diagonal of a causal model are neither read nor written.
    """
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    left_shape: gl.constexpr = [STAGES, STEP, 2 * BLOCK] if KIND == "values" else [STAGES, 2 * BLOCK, STEP]
    right_shape: gl.constexpr = [STAGES, BLOCK, STEP] if KIND == "scores" else [STAGES, STEP, BLOCK]
    left = gl.allocate_shared_memory(gl.bfloat16, left_shape, x.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, right_shape, y.layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, BLOCK], held.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    end_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    end_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    mbarrier.init(end_full, count=1)
    mbarrier.init(end_empty, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, tiles, end_full,
                    end_empty, ROWS, N, E, COLUMNS, TASKS, KIND, CAUSAL, STEP, STAGES,
                ),
            ),
            (
                load_factors,
                (
                    x, y, held, left, right, full, empty, tiles, end_full, end_empty, ROWS, N, E, COLUMNS, TASKS,
                    KIND, CAUSAL, STEP, STAGES,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
