# SPDX-License-Identifier: Apache-2.0
"""FLASH-Quad's products over whole rows, for Hopper: `A V`, `A^T d_attended` and `d_attended V^T`, each with what
becomes of it as its epilogue. A row's tokens are its slots.

Short products come in tiles of 128 slots, for which groups of warps take turns, as hopper.py describes; long ones in
tiles of 256, of which two groups have half each, as in product.py. README.md beside this file has the derivation and
the bytes.
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
from .hopper import (
    BLOCK,
    REINTERPRETS,
    TILE_BYTES,
    accumulate,
    barriers,
    halves,
    joined,
    load_async,
    lower_tile,
    sigmoid,
    store_async,
)


# Depth of one step of a product, and steps in flight: with two tiles for the ends they fill the shared memory.
STEP, STAGES = 64, 5
# Rows whose tasks run next to each other and share what they read in the L2 cache.
GROUP_ROWS = 8
# The same of tiles of 256 slots. With three rows the programs of a causal product also have about as much to do each.
WIDE_STAGES, WIDE_GROUP_ROWS = 4, 3


def tile_of(kind: str, E: int, wide: bool) -> tuple[int, int]:
    """Slots and columns of a tile."""
    if not wide:
        return 128, 128
    return 256, 192 if kind != "scores" and E % 192 == 0 else 128


def task_count(kind: str, rows: int, N: int, E: int, causal: bool, tall: int, columns: int) -> int:
    """Tiles of a product over so many rows of N tokens."""
    blocks = N // tall
    if kind == "scores":
        # Of a causal model those with anything below the diagonal.
        per_row = (tall // columns) * blocks * (blocks + 1) // 2 if causal else blocks * (N // columns)
        return rows * per_row
    return rows * blocks * (E // columns)


@gluon.jit
def place_of(
    task, ROWS, N, E, SPAN, KIND: gl.constexpr, CAUSAL: gl.constexpr, TALL: gl.constexpr, COLUMNS: gl.constexpr
):  # fmt: skip
    """Row, first slot and first column of a task's tile, and where the depth of its product begins and ends: slots, or
    the value dimensions of a score. Of each SPAN rows, what takes longest comes first."""
    blocks = N // TALL
    if KIND == "scores":
        begin = 0
        end = E
        if CAUSAL:
            times: gl.constexpr = TALL // COLUMNS
            per_row = times * (blocks * (blocks + 1) // 2)
            row = task // per_row
            tile = task % per_row
            block, column = lower_tile(tile // times)
            column = column * times + tile % times
        else:
            columns = N // COLUMNS
            row = task // (blocks * columns)
            block = (task // columns) % blocks
            column = task % columns
    else:
        columns = E // COLUMNS
        per_group = SPAN * blocks * columns
        first = (task // per_group) * SPAN
        rows = gl.minimum(ROWS - first, SPAN)
        inside = task % per_group
        block = inside // (rows * columns)
        row = first + (inside // columns) % rows
        column = inside % columns
        begin = 0
        end = N
        if CAUSAL:
            if KIND == "output":
                block = blocks - 1 - block
                end = (block + 1) * TALL
            else:
                begin = block * TALL
    return row, block * TALL, column * COLUMNS, begin, end


@gluon.jit
def load_factors(
    x, y, held, left, right, full, empty, tiles, end_full, end_empty, ROWS, N, E, SPAN, TASKS, KIND: gl.constexpr,
    CAUSAL: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order."""
    grid_wait()
    step = 0
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row, place, column, begin, end = place_of(task, ROWS, N, E, SPAN, KIND, CAUSAL, BLOCK, BLOCK)
        group = number % 2
        first = row * N
        for start in range(begin, end, STEP):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * BLOCK * STEP * 2)
            if KIND == "values":
                load_async(x, [first + start, place], full.index(slot), left.index(slot))
            else:
                load_async(x, [first + place, start], full.index(slot), left.index(slot))
            if KIND == "scores":
                load_async(y, [first + column, start], full.index(slot), right.index(slot))
            else:
                load_async(y, [first + start, column], full.index(slot), right.index(slot))
            step += 1
            if start == gl.minimum(end - STEP, begin + (STAGES - 1) * STEP):
                # The group's task before has stored its tile by now, and this one has the rest of the product to
                # arrive.
                mbarrier.wait(end_empty.index(group), (number // 2) & 1)
                mbarrier.expect(end_full.index(group), TILE_BYTES)
                load_async(held, [first + place, column], end_full.index(group), tiles.index(group))
        number += 1


@gluon.jit
def ended(acc, x, scale, bias, sums, KIND: gl.constexpr):
    """What becomes of a product: of h `silu(h) acc` (output) or `silu'(h) acc` (values, whose sums over the tokens are
    stored at `sums`), of weights A `2 sqrt(A) acc` (scores). x is h before norm and bias, or A; `bias` and `sums`
    point to the columns."""
    x = x.to(gl.float32)
    if KIND == "scores":
        acc = acc * (2.0 * gl.sqrt(x))
    else:
        h = x * scale + gl.expand_dims(gl.load(bias).to(gl.float32), 0)
        if KIND == "output":
            # The backward recovers the attended value as out / silu(h): h must not be 0.
            h = gl.where(h == 0.0, 1e-20, h)
            acc = acc * (h * sigmoid(h))
        else:
            s = sigmoid(h)
            acc = acc * (s * (1.0 + h * (1.0 - s)))
            gl.store(sums, gl.sum(acc, 0))
            acc = acc * scale
    return acc.to(gl.bfloat16)


@gluon.jit
def finish(
    tile, acc, scale, bias_ptr, sums_ptr, first: gl.constexpr, KIND: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """The end of half a tile, whose columns begin at `first`: `tile` holds x of `ended`, and takes the result."""
    tile = tile.slice(first, BLOCK // 2, dim=1)
    columns = first + gl.arange(0, BLOCK // 2, gl.SliceLayout(0, layout))
    tile.store(ended(acc, tile.load(layout), scale, bias_ptr + columns, sums_ptr + columns, KIND))


@gluon.jit
def multiply(
    result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns, tiles, end_full, end_empty, ROWS,
    N, E, SPAN, TASKS, GROUP: gl.constexpr, KIND: gl.constexpr, CAUSAL: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The products and their ends, see `quadratic_kernel`, for every other task."""
    grid_wait()
    narrow: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK // 2, 16]
    )
    tile = tiles.index(GROUP)
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply`
    programs = gl.num_programs(0)
    step = 0
    if GROUP == 1:
        _, _, _, begin, end = place_of(gl.program_id(0), ROWS, N, E, SPAN, KIND, CAUSAL, BLOCK, BLOCK)
        step += (end - begin) // STEP
    number = 0
    for task in range(gl.program_id(0) + GROUP * programs, TASKS, 2 * programs):
        row, place, column, begin, end = place_of(task, ROWS, N, E, SPAN, KIND, CAUSAL, BLOCK, BLOCK)
        token = row * N + place
        # Early, so that nothing waits for it.
        scale = gl.load(rms_ptr + token + gl.arange(0, BLOCK, gl.SliceLayout(1, narrow))) * gain
        steps = (end - begin) // STEP
        acc = accumulate(
            left, right, full, empty, turns, end_empty, number, step, steps, GROUP, KIND == "values",
            KIND == "scores", STAGES,
        )  # fmt: skip
        # Behind the other group's next task.
        _, _, _, begin, end = place_of(
            gl.minimum(task + programs, TASKS - 1), ROWS, N, E, SPAN, KIND, CAUSAL, BLOCK, BLOCK
        )  # fmt: skip
        step += steps + (end - begin) // STEP
        mbarrier.wait(end_full.index(GROUP), number & 1)
        number += 1
        scale = gl.expand_dims(scale, 1)
        sums = sums_ptr + (token // BLOCK) * E + column
        # In two steps, since more does not fit the registers.
        one, two = halves(acc, narrow)
        finish(tile, one, scale, bias_ptr + column, sums, 0, KIND, narrow)
        finish(tile, two, scale, bias_ptr + column, sums, BLOCK // 2, KIND, narrow)
        fence_async_shared()
        store_async(result, [token, column], tile)
    tma.store_wait(0)


@kernel
@gluon.jit
def quadratic_kernel(
    x, y, held, result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, ROWS, N, E, SPAN, TASKS, KIND: gl.constexpr,
    CAUSAL: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of FLASH-Quad's products, in tiles of 128 slots by 128 columns of whole rows of N tokens.

    KIND "output": `silu(u) * (A V)` from x = A `[rows * N, N]`, y = V `[rows * N, E]`, held = u's input.
    "values": `silu'(h) * (A^T d_attended)` from x = A, y = d_attended, held = the values' input h; per block of 128
    tokens the sums for the bias, `[blocks, E]`.
    "scores": `2 sqrt(A) * (d_attended V^T)` from x = d_attended, y = V, held = A.
    Tiles above the diagonal of a causal model are neither read nor written.
    """
    left_shape: gl.constexpr = [STAGES, STEP, BLOCK] if KIND == "values" else [STAGES, BLOCK, STEP]
    right_shape: gl.constexpr = [STAGES, BLOCK, STEP] if KIND == "scores" else [STAGES, STEP, BLOCK]
    left = gl.allocate_shared_memory(gl.bfloat16, left_shape, x.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, right_shape, y.layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, BLOCK], held.layout)
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
                    result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns, tiles,
                    end_full, end_empty, ROWS, N, E, SPAN, TASKS, 0, KIND, CAUSAL, STEP, STAGES,
                ),
            ),
            (
                multiply,
                (
                    result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns, tiles,
                    end_full, end_empty, ROWS, N, E, SPAN, TASKS, 1, KIND, CAUSAL, STEP, STAGES,
                ),
            ),
            (
                load_factors,
                (
                    x, y, held, left, right, full, empty, tiles, end_full, end_empty, ROWS, N, E, SPAN, TASKS, KIND,
                    CAUSAL, STEP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def leaves_out(place, column, start, KIND: gl.constexpr):
    """Whether a group has nothing to multiply in a step of a causal model, since it is above the diagonal: of values
    the second group, otherwise the first."""
    if KIND == "output":
        return start >= place + BLOCK
    if KIND == "values":
        return start < place + BLOCK
    return column > place


@gluon.jit
def fetch(x, token, place, start, left, slot, full, GROUP: gl.constexpr, KIND: gl.constexpr):
    """A step of a group's left factor, for the row that begins with `token`."""
    place += GROUP * BLOCK
    if KIND == "values":
        load_async(x, [token + start, place], full.index(slot), left.index(2 * slot + GROUP))
    else:
        load_async(x, [token + place, start], full.index(slot), left.index(2 * slot + GROUP))


@gluon.jit
def load_wide(
    x, y, y_rest, held, left, right, rest, ends, full, empty, ROWS, N, E, SPAN, TASKS, KIND: gl.constexpr,
    CAUSAL: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `multiply_wide` reads, in its order."""
    grid_wait()
    ALWAYS: gl.constexpr = 0 if KIND == "values" else 1
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row, place, column, begin, end = place_of(task, ROWS, N, E, SPAN, KIND, CAUSAL, 2 * BLOCK, COLUMNS)
        token = row * N
        for start in range(begin, end, STEP):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            alone = leaves_out(place, column, start, KIND) if CAUSAL else False
            if alone:
                mbarrier.expect(full.index(slot), (BLOCK + COLUMNS) * STEP * 2)
                fetch(x, token, place, start, left, slot, full, ALWAYS, KIND)
            else:
                mbarrier.expect(full.index(slot), (2 * BLOCK + COLUMNS) * STEP * 2)
                fetch(x, token, place, start, left, slot, full, 0, KIND)
                fetch(x, token, place, start, left, slot, full, 1, KIND)
            if KIND == "scores":
                load_async(y, [token + column, start], full.index(slot), right.index(slot))
            else:
                load_async(y, [token + start, column], full.index(slot), right.index(slot))
                if COLUMNS == 192:
                    load_async(y_rest, [token + start, column + BLOCK], full.index(slot), rest.index(slot))
            step += 1
        # A score's tile above the diagonal has no end.
        alone = column > place if CAUSAL and KIND == "scores" else False
        for part in range(COLUMNS // STEP):
            slot = step % STAGES
            first = column + part * STEP
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            if alone:
                mbarrier.expect(full.index(slot), BLOCK * STEP * 2)
            else:
                mbarrier.expect(full.index(slot), 2 * BLOCK * STEP * 2)
                load_async(held, [token + place, first], full.index(slot), ends.index(2 * slot))
            load_async(held, [token + place + BLOCK, first], full.index(slot), ends.index(2 * slot + 1))
            step += 1


@gluon.jit
def pass_by(full, empty, step, count, STAGES: gl.constexpr):
    """Leave out some of the ring's steps. A group must not wait for a slot before it has waited for the slot's step
    before."""
    for _ in range(count):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        mbarrier.arrive(empty.index(slot), count=1)
        step += 1
    return step


@gluon.jit
def finish_part(
    result, acc, scale, bias_ptr, sums_ptr, ends, full, empty, step, token, column, PART: gl.constexpr,
    GROUP: gl.constexpr, KIND: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The end of the tile's columns from `PART * STEP` on, for a group's rows: x of `ended`, in the ring's place of
    `step`, becomes the result. The place of the part before is free when its store has ended, that of the last part in
    the next task."""
    width: gl.constexpr = STEP // 2
    half: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16])
    slot = step % STAGES
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    tile = ends.index(2 * slot + GROUP)
    bias_ptr += PART * STEP + gl.arange(0, width, gl.SliceLayout(0, half))
    sums_ptr += PART * STEP + gl.arange(0, width, gl.SliceLayout(0, half))
    # In two steps, since more does not fit the registers.
    left_x, right_x = halves(tile.load(layout), half)
    left, right = halves(acc, half)
    left = ended(left, left_x, scale, bias_ptr, sums_ptr, KIND)
    right = ended(right, right_x, scale, bias_ptr + width, sums_ptr + width, KIND)
    tile.store(joined(left, right, layout))
    fence_async_shared()
    store_async(result, [token, column + PART * STEP], tile)
    if PART > 0:
        tma.store_wait(1)
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    return step + 1


@gluon.jit
def wide_task(
    result, rms_ptr, gain, bias_ptr, sums_ptr, left, right, rest, ends, full, empty, E, token, column, step, steps,
    behind, FREED: gl.constexpr, GROUP: gl.constexpr, KIND: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One group's rows of a tile: the product of `steps` steps, `behind` steps that are left out, and the end. With
    FREED the last place of the task before is free already."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP // 2, 16]
    )
    # Early, so that nothing waits for it.
    scale = gl.load(rms_ptr + token + gl.arange(0, BLOCK, gl.SliceLayout(1, half))) * gain
    acc = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
    if COLUMNS == 192:
        acc_rest = gl.zeros([BLOCK, STEP], gl.float32, narrow)
    for part in range(steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        x = left.index(2 * slot + GROUP)
        x = x.permute((1, 0)) if KIND == "values" else x
        y = right.index(slot).permute((1, 0)) if KIND == "scores" else right.index(slot)
        acc = warpgroup_mma(x, y, acc, is_async=True)
        if COLUMNS == 192:
            acc_rest = warpgroup_mma(x, rest.index(slot), acc_rest, is_async=True)
            acc, acc_rest = warpgroup_mma_wait(2, deps=[acc, acc_rest])
        else:
            acc = warpgroup_mma_wait(1, deps=[acc])
        if part > 0:
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        elif not FREED:
            if step > 0:
                # The last place of the task before.
                tma.store_wait(0)
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        step += 1
    if COLUMNS == 192:
        acc, acc_rest = warpgroup_mma_wait(0, deps=[acc, acc_rest])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    step = pass_by(full, empty, step, behind, STAGES)
    scale = gl.expand_dims(scale, 1)
    bias_ptr += column
    sums_ptr += (token // BLOCK) * E + column
    one, two = halves(acc, narrow)
    step = finish_part(
        result, one, scale, bias_ptr, sums_ptr, ends, full, empty, step, token, column, 0, GROUP, KIND, STEP, STAGES,
        narrow,
    )  # fmt: skip
    step = finish_part(
        result, two, scale, bias_ptr, sums_ptr, ends, full, empty, step, token, column, 1, GROUP, KIND, STEP, STAGES,
        narrow,
    )  # fmt: skip
    if COLUMNS == 192:
        step = finish_part(
            result, acc_rest, scale, bias_ptr, sums_ptr, ends, full, empty, step, token, column, 2, GROUP, KIND, STEP,
            STAGES, narrow,
        )  # fmt: skip
    return step


@gluon.jit
def multiply_wide(
    result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, rest, ends, full, empty, ROWS, N, E, SPAN, TASKS,
    GROUP: gl.constexpr, KIND: gl.constexpr, CAUSAL: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The products and their ends, see `wide_kernel`, for one group's rows of every tile."""
    grid_wait()
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply`
    # Whether the group has nothing to multiply in some steps: the last ones (output), the first ones, or all.
    LESS: gl.constexpr = CAUSAL and GROUP == (1 if KIND == "values" else 0)
    FREED: gl.constexpr = LESS and KIND != "output"
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row, place, column, begin, end = place_of(task, ROWS, N, E, SPAN, KIND, CAUSAL, 2 * BLOCK, COLUMNS)
        token = row * N + place + GROUP * BLOCK
        steps = (end - begin) // STEP
        behind = 0
        if FREED:
            if step > 0:
                tma.store_wait(0)
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        if LESS and KIND == "output":
            behind = BLOCK // STEP
            steps -= behind
        if LESS and KIND == "values":
            step = pass_by(full, empty, step, BLOCK // STEP, STAGES)
            steps -= BLOCK // STEP
        if LESS and KIND == "scores" and column > place:
            # All but the last place, which the next task frees.
            step = pass_by(full, empty, step, steps + COLUMNS // STEP - 1, STAGES)
            mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
            step += 1
        else:
            step = wide_task(
                result, rms_ptr, gain, bias_ptr, sums_ptr, left, right, rest, ends, full, empty, E, token, column,
                step, steps, behind, FREED, GROUP, KIND, COLUMNS, STEP, STAGES,
            )  # fmt: skip
    tma.store_wait(0)


@kernel
@gluon.jit
def wide_kernel(
    x, y, y_rest, held, result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, ROWS, N, E, SPAN, TASKS, KIND: gl.constexpr,
    CAUSAL: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`quadratic_kernel` in tiles of 256 slots by COLUMNS, of rows of a multiple of 256 tokens. Of 192 columns y is
    read for 128 and `y_rest` for the others."""
    ends = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, BLOCK, STEP], held.layout)
    left = ends
    if KIND == "values":
        if REINTERPRETS:
            left = ends.reinterpret(gl.bfloat16, [2 * STAGES, STEP, BLOCK], x.layout)
        else:
            left = ends._reinterpret(gl.bfloat16, [2 * STAGES, STEP, BLOCK], x.layout)
    right_shape: gl.constexpr = [STAGES, BLOCK, STEP] if KIND == "scores" else [STAGES, STEP, BLOCK]
    right = gl.allocate_shared_memory(gl.bfloat16, right_shape, y.layout)
    rest = right
    if COLUMNS == 192:
        rest = gl.allocate_shared_memory(gl.bfloat16, [STAGES, STEP, STEP], y_rest.layout)
    full = barriers(STAGES)
    # One arrival of each group.
    empty = barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply_wide,
                (
                    result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, rest, ends, full, empty, ROWS, N, E,
                    SPAN, TASKS, 0, KIND, CAUSAL, COLUMNS, STEP, STAGES,
                ),
            ),
            (
                multiply_wide,
                (
                    result, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, rest, ends, full, empty, ROWS, N, E,
                    SPAN, TASKS, 1, KIND, CAUSAL, COLUMNS, STEP, STAGES,
                ),
            ),
            (
                load_wide,
                (
                    x, y, y_rest, held, left, right, rest, ends, full, empty, ROWS, N, E, SPAN, TASKS, KIND, CAUSAL,
                    COLUMNS, STEP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
