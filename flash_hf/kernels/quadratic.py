# SPDX-License-Identifier: Apache-2.0
"""FLASH-Quad's products over whole rows, for Hopper: `A V`, `A^T d_attended` and `d_attended V^T`, each with what
becomes of it as its epilogue. A row's tokens are its slots.

Groups of warps take turns, as hopper.py describes. README.md beside this file has the derivation and the bytes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .common import grid_wait
from .dispatch import kernel
from .hopper import BLOCK, TILE_BYTES, accumulate, barriers, halves, load_async, lower_tile, sigmoid, store_async


# Depth of one step of a product, and steps in flight: with two tiles of `HALF` columns for each group's ends they fill
# the shared memory.
STEP, STAGES = 64, 5
HALF = gl.constexpr(64)
# Tokens whose tasks run next to each other, so that what they read stays in the L2 cache, and the most rows of these.
GROUP_TOKENS, GROUP_ROWS = gl.constexpr(2048), gl.constexpr(8)


def task_count(kind: str, rows: int, N: int, E: int, causal: bool) -> int:
    """Tiles of 128 by 128 of a product over so many rows of N tokens."""
    blocks = N // 128
    if kind == "scores":
        return rows * (blocks * (blocks + 1) // 2 if causal else blocks * blocks)
    return rows * blocks * (E // 128)


@gluon.jit
def place_of(task, ROWS, N, E, KIND: gl.constexpr, CAUSAL: gl.constexpr):
    """Row, block of 128 slots and block of 128 columns of a task, and where the depth of its product begins and ends:
    slots, or the value dimensions of a score. Of a group of rows, what takes longest comes first, and in every other
    group last: programs that take tasks in turn have about as much to do."""
    blocks = N // BLOCK
    if KIND == "scores":
        begin = 0
        end = E
        if CAUSAL:
            per_row = blocks * (blocks + 1) // 2
            row = task // per_row
            tile = task % per_row
            block, column = lower_tile(tile)
        else:
            row = task // (blocks * blocks)
            block = (task // blocks) % blocks
            column = task % blocks
    else:
        columns = E // BLOCK
        most = gl.maximum(gl.minimum(GROUP_TOKENS // N, GROUP_ROWS), 1)
        per_group = most * blocks * columns
        group = task // per_group
        first = group * most
        rows = gl.minimum(ROWS - first, most)
        inside = task % per_group
        block = inside // (rows * columns)
        row = first + (inside // columns) % rows
        column = inside % columns
        begin = 0
        end = N
        if CAUSAL:
            if KIND == "output":
                block = gl.where(group % 2 == 0, blocks - 1 - block, block)
                end = (block + 1) * BLOCK
            else:
                block = gl.where(group % 2 == 0, block, blocks - 1 - block)
                begin = block * BLOCK
    return row, block, column, begin, end


@gluon.jit
def load_factors(
    x, y, held, left, right, full, empty, tiles, end_full, end_empty, ROWS, N, E, TASKS, KIND: gl.constexpr,
    CAUSAL: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order."""
    grid_wait()
    step = 0
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row, block, column, begin, end = place_of(task, ROWS, N, E, KIND, CAUSAL)
        group = number % 2
        first = row * N
        for start in range(begin, end, STEP):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * BLOCK * STEP * 2)
            if KIND == "values":
                load_async(x, [first + start, block * BLOCK], full.index(slot), left.index(slot))
            else:
                load_async(x, [first + block * BLOCK, start], full.index(slot), left.index(slot))
            if KIND == "scores":
                load_async(y, [first + column * BLOCK, start], full.index(slot), right.index(slot))
            else:
                load_async(y, [first + start, column * BLOCK], full.index(slot), right.index(slot))
            step += 1
            if start == gl.minimum(end - STEP, begin + (STAGES - 1) * STEP):
                # The group's task before has stored its tile by now, and this one has the rest of the product to
                # arrive.
                mbarrier.wait(end_empty.index(group), (number // 2) & 1)
                mbarrier.expect(end_full.index(group), TILE_BYTES)
                for part in gl.static_range(2):
                    place = [first + block * BLOCK, column * BLOCK + part * HALF]
                    load_async(held, place, end_full.index(group), tiles.index(2 * group + part))
        number += 1


@gluon.jit
def finish(value, place, tile, acc, scale, bias_ptr, sums_ptr, KIND: gl.constexpr, layout: gl.constexpr):
    """The end of `HALF` columns: `tile` holds h and takes `silu(h) acc` (output) or `silu'(h) acc` (values), or holds
    weights A and takes `2 sqrt(A) acc` (scores). The values leave by the same tile before."""
    x = tile.load(layout).to(gl.float32)
    if KIND == "scores":
        acc = acc * (2.0 * gl.sqrt(x))
    else:
        columns = gl.arange(0, HALF, gl.SliceLayout(0, layout))
        h = x * scale + gl.expand_dims(gl.load(bias_ptr + columns).to(gl.float32), 0)
        if KIND == "output":
            # The backward recovers the attended value as out / silu(h): h must not be 0.
            h = gl.where(h == 0.0, 1e-20, h)
            acc = acc * (h * sigmoid(h))
        else:
            s = sigmoid(h)
            tile.store((h * s).to(gl.bfloat16))
            fence_async_shared()
            store_async(value, place, tile)
            acc = acc * (s * (1.0 + h * (1.0 - s)))
            gl.store(sums_ptr + columns, gl.sum(acc, 0))
            acc = acc * scale
            # Late, so that nothing waits.
            tma.store_wait(0)
    tile.store(acc.to(gl.bfloat16))


@gluon.jit
def multiply(
    result, value, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns, tiles, end_full, end_empty,
    ROWS, N, E, TASKS, GROUP: gl.constexpr, KIND: gl.constexpr, CAUSAL: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The products and their ends, see `quadratic_kernel`, for every other task."""
    grid_wait()
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    tile_0 = tiles.index(2 * GROUP)
    tile_1 = tiles.index(2 * GROUP + 1)
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply`
    programs = gl.num_programs(0)
    step = 0
    if GROUP == 1:
        _, _, _, begin, end = place_of(gl.program_id(0), ROWS, N, E, KIND, CAUSAL)
        step += (end - begin) // STEP
    number = 0
    for task in range(gl.program_id(0) + GROUP * programs, TASKS, 2 * programs):
        row, block, column, begin, end = place_of(task, ROWS, N, E, KIND, CAUSAL)
        token = row * N + block * BLOCK
        # Early, so that nothing waits for it.
        scale = gl.load(rms_ptr + token + gl.arange(0, BLOCK, gl.SliceLayout(1, narrow))) * gain
        steps = (end - begin) // STEP
        acc = accumulate(
            left, right, full, empty, turns, number, step, steps, GROUP, KIND == "values", KIND == "scores", STAGES,
            end_empty,
        )  # fmt: skip
        # Behind the other group's next task.
        _, _, _, begin, end = place_of(gl.minimum(task + programs, TASKS - 1), ROWS, N, E, KIND, CAUSAL)
        step += steps + (end - begin) // STEP
        mbarrier.wait(end_full.index(GROUP), number & 1)
        number += 1
        scale = gl.expand_dims(scale, 1)
        first = column * BLOCK
        bias = bias_ptr + first
        sums = sums_ptr + (token // BLOCK) * E + first
        # In two steps, since more does not fit the registers.
        one, two = halves(acc, narrow)
        finish(value, [token, first], tile_0, one, scale, bias, sums, KIND, narrow)
        finish(value, [token, first + HALF], tile_1, two, scale, bias + HALF, sums + HALF, KIND, narrow)
        fence_async_shared()
        store_async(result, [token, first], tile_0)
        store_async(result, [token, first + HALF], tile_1)
    tma.store_wait(0)


@kernel
@gluon.jit
def quadratic_kernel(
    x, y, held, result, value, rms_ptr, gain_ptr, bias_ptr, sums_ptr, ROWS, N, E, TASKS, KIND: gl.constexpr,
    CAUSAL: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of FLASH-Quad's products, in tiles of 128 slots by 128 columns of whole rows of N tokens.

    KIND "output": `silu(u) * (A V)` from x = A `[rows * N, N]`, y = V `[rows * N, E]`, held = u's input.
    "values": `silu'(h) * (A^T d_attended)` from x = A, y = d_attended, held = the values' input h; also stores the
    values `silu(h)` in `value`, and per block of 128 tokens the sums for the bias, `[blocks, E]`.
    "scores": `2 sqrt(A) * (d_attended V^T)` from x = d_attended, y = V, held = A.
    Tiles above the diagonal of a causal model are neither read nor written.
    """
    left_shape: gl.constexpr = [STAGES, STEP, BLOCK] if KIND == "values" else [STAGES, BLOCK, STEP]
    right_shape: gl.constexpr = [STAGES, BLOCK, STEP] if KIND == "scores" else [STAGES, STEP, BLOCK]
    left = gl.allocate_shared_memory(gl.bfloat16, left_shape, x.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, right_shape, y.layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [4, BLOCK, HALF], held.layout)
    full = barriers(STAGES)
    empty = barriers(STAGES)
    turns = barriers(2)
    end_full = barriers(2)
    end_empty = barriers(2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    result, value, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns, tiles,
                    end_full, end_empty, ROWS, N, E, TASKS, 0, KIND, CAUSAL, STEP, STAGES,
                ),
            ),
            (
                multiply,
                (
                    result, value, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns, tiles,
                    end_full, end_empty, ROWS, N, E, TASKS, 1, KIND, CAUSAL, STEP, STAGES,
                ),
            ),
            (
                load_factors,
                (
                    x, y, held, left, right, full, empty, tiles, end_full, end_empty, ROWS, N, E, TASKS, KIND, CAUSAL,
                    STEP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
