# SPDX-License-Identifier: Apache-2.0
"""The scan over bidirectional rows of at most two chunks, for Hopper: the state of a row, which is a sum over all of
it, and the products that read it, in one launch.

Warps, tiles and barriers as in scan.py. README.md beside this file derives it.
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
from .hopper import BLOCK, barriers, store_async
from .scan import (
    BACK_END_TILES,
    BACK_REGISTERS,
    DEPTH,
    END,
    SIDE,
    activate,
    fetch_depths,
    fetch_half,
    fetch_tokens,
    finish_back,
    finish_half,
    gain_of,
    half_of,
    high,
    leave_ends,
    load_ends,
    load_values,
    sum_half,
)


# Value dimensions of a task: forward 128. Backward all values of a row stay, which for 128 would leave so little room
# that loads in flight limit the speed.
WIDTH = gl.constexpr(64)
# Tiles of the ring, and of the values: forward at least four, those of a chunk; backward four for a row's, the others
# for the next row's.
SLOTS, VALUE_SLOTS = 5, 5
BACK_SLOTS, BACK_VALUE_SLOTS = 6, 5
# Forward: warps that activate, their registers, and those of the two groups.
SIDE_ACTIVATING, SIDE_ACTIVATING_REGISTERS, SIDE_REGISTERS = gl.constexpr(8), gl.constexpr(80), gl.constexpr(144)


@gluon.jit
def token_of(visit, G, shift):
    """The first token of the chunk that a forward scan's values come from at this visit of a row: all chunks for the
    state, and for the outputs from the last chunk, whose values have stayed, to the first."""
    return gl.where(visit < G, visit, 2 * G - 2 - visit) * (2 * BLOCK) - shift


@gluon.jit
def load_sides(x, values, x_full, x_empty, N, G, shift, E_BLOCKS, TASKS, VALUE_SLOTS: gl.constexpr):
    """The values' tiles of `multiply_side`, one for each group."""
    grid_wait()
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        for visit in range(0, 2 * G - 1):
            token = token_of(visit, G, shift)
            for half in gl.static_range(2):
                for side in gl.static_range(2):
                    place = [task // E_BLOCKS, token + half * BLOCK, ((task % E_BLOCKS) * 2 + side) * SIDE]
                    step = fetch_tokens(x, place, values, x_full, x_empty, step, VALUE_SLOTS, SIDE)


@gluon.jit
def activate_sides(
    values, x_full, ready, rms_ptr, gain_ptr, bias_ptr, N, G, shift, E_BLOCKS, TASKS, EVEN: gl.constexpr,
    VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """`activate` for the tiles of `load_sides`: what has arrived becomes `ready`."""
    grid_wait()
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // SIDE, SIDE // 8], [SIDE_ACTIVATING, 1], [1, 0])
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in `scan_kernel`
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row = task // E_BLOCKS
        columns = (task % E_BLOCKS) * BLOCK + gl.arange(0, SIDE, gl.SliceLayout(0, wide))
        bias_0 = gl.load(bias_ptr + columns).to(gl.float32)
        bias_1 = gl.load(bias_ptr + SIDE + columns).to(gl.float32)
        for number in range(0, 2 * (2 * G - 1)):
            token = token_of(number // 2, G, shift) + (number % 2) * BLOCK
            # Before the tiles arrive.
            scale, real = gain_of(rms_ptr, gain, row, token, N, EVEN, gl.SliceLayout(1, wide))
            for side in gl.static_range(2):
                slot = step % VALUE_SLOTS
                mbarrier.wait(x_full.index(slot), (step // VALUE_SLOTS) & 1)
                activate(values.index(slot), scale, real, bias_0 if side == 0 else bias_1, EVEN, wide)
                fence_async_shared()
                mbarrier.arrive(ready.index(slot), count=1)
                step += 1


@gluon.jit
def load_shared(a, reader, writer, ring, full, empty, G, E_BLOCKS, TASKS, SLOTS: gl.constexpr):
    """The left factors that `multiply_side` reads, in its order."""
    grid_wait()
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        begin = (task // E_BLOCKS) * G
        for tile in range(2 * begin, 2 * (begin + G)):
            step = fetch_depths(writer, tile * BLOCK, 0, ring, full, empty, step, SLOTS, True)
        for number in range(0, 2 * G):
            half = half_of(number, begin, begin + G, True)
            step = fetch_depths(reader, half * BLOCK, 0, ring, full, empty, step, SLOTS)
            for other in gl.static_range(2):
                step = fetch_depths(a, half * BLOCK, other * BLOCK, ring, full, empty, step, SLOTS)


@gluon.jit
def multiply_side(
    out, states, rms_ptr, gain_ptr, bias_h_ptr, values, ready, x_empty, ring, full, empty, tiles, end_full, end_empty,
    state_tiles, out_ptr, out_stride, N, G, shift, E_BLOCKS, TASKS, GROUP: gl.constexpr, EVEN: gl.constexpr,
    SHIFTED: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """What `row_kernel` computes forward, for `SIDE` of a task's value dimensions."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, END, 16])
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in `scan_kernel`
    state_tile = state_tiles.index(GROUP)
    step = 0
    # Of the group's tiles of values, the first: each second one, in turn with the other group's.
    value = 0
    count = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row = task // E_BLOCKS
        first_e = (task % E_BLOCKS) * BLOCK + GROUP * SIDE
        state = gl.zeros([BLOCK, SIDE], gl.float32, mma)
        for half in range(0, 2 * G):
            held = (2 * (value + half) + GROUP) % VALUE_SLOTS
            mbarrier.wait(ready.index(held), ((2 * (value + half) + GROUP) // VALUE_SLOTS) & 1)
            x = values.index(held)
            for depth in gl.static_range(2):
                slot = step % SLOTS
                mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
                left = high(ring.index(slot)).permute((1, 0))
                state = warpgroup_mma(left, x.slice(depth * DEPTH, DEPTH, dim=0), state, is_async=True)
                # The product before, while this one runs.
                state = warpgroup_mma_wait(1, deps=[state])
                if depth == 1:
                    mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
                elif half > 0:
                    mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
                    if half <= 2 * (G - 1):
                        before = 2 * (value + half - 1) + GROUP
                        mbarrier.arrive(x_empty.index(before % VALUE_SLOTS), count=1)
                elif count > 0:
                    # The ends of the row before have been stored.
                    leave_ends(end_empty, False, GROUP, False)
                step += 1
        state = warpgroup_mma_wait(0, deps=[state])
        mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
        # The state before has been stored: `leave_ends` has waited.
        state_tile.store((state * (1.0 / (2 * BLOCK))).to(gl.bfloat16))
        fence_async_shared()
        store_async(states, [row * BLOCK, first_e], state_tile)
        # The last chunk's values have stayed.
        value += 2 * (G - 1)
        for number in range(0, 2 * G):
            half = half_of(number, 0, G, True)
            start = half * BLOCK - shift
            # Early, so that nothing waits for it.
            scale, real = gain_of(rms_ptr, gain, row, start, N, EVEN, gl.SliceLayout(1, narrow))
            acc = gl.zeros([BLOCK, SIDE], gl.float32, mma)
            for part in gl.static_range(6):
                slot = step % SLOTS
                if part % 2 == 0:
                    right = state_tile
                    if part > 0:
                        held = 2 * (value + part // 2 - 1) + GROUP
                        mbarrier.wait(ready.index(held % VALUE_SLOTS), (held // VALUE_SLOTS) & 1)
                        right = values.index(held % VALUE_SLOTS)
                mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
                right_half = right.slice((part % 2) * DEPTH, DEPTH, dim=0)
                acc = warpgroup_mma(ring.index(slot), right_half, acc, is_async=True)
                if part > 0:
                    acc = warpgroup_mma_wait(1, deps=[acc])
                    mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
                    if part == 4:
                        if half % 2 == 1:
                            mbarrier.arrive(x_empty.index((2 * value + GROUP) % VALUE_SLOTS), count=1)
                elif number > 0:
                    leave_ends(end_empty, False, GROUP, False)
                step += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
            if half % 2 == 1:
                mbarrier.arrive(x_empty.index((2 * value + 2 + GROUP) % VALUE_SLOTS), count=1)
                value += 2
            finish_half(
                acc, out, out_ptr, out_stride, scale, real, bias_h_ptr, tiles, end_full, end_empty, count, row, start,
                first_e, N, GROUP, EVEN, SHIFTED, narrow, SIDE, OWN=True,
            )  # fmt: skip
            count += 1
    tma.store_wait(0)


@gluon.jit
def load_factors(a, reader, writer, ring, full, empty, G, E_BLOCKS, TASKS, SLOTS: gl.constexpr):
    """The left factors that `multiply_half` reads, in its order."""
    grid_wait()
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        first = (task // E_BLOCKS) * (2 * G)
        for group in gl.static_range(2):
            for tile in range(first, first + 2 * G):
                step = fetch_half(writer, tile * BLOCK, group * DEPTH, ring, full, empty, step, SLOTS)
        for half in range(first, first + 2 * G):
            step = fetch_depths(reader, half * BLOCK, 0, ring, full, empty, step, SLOTS)
            for other in gl.static_range(2):
                above = (half - half % 2 + other) * BLOCK
                step = fetch_depths(a, above, (half % 2) * BLOCK, ring, full, empty, step, SLOTS, True)


@gluon.jit
def multiply_half(
    out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full, empty, turns,
    tiles, end_full, end_empty, state_tile, state_full, state_empty, out_ptr, out_stride, value_ptr, N, G,
    shift, E_BLOCKS, TASKS, GROUP: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr, SLOTS: gl.constexpr,
    VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """What `row_kernel` computes backward: half of the state's rows, and every other half of a chunk."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, END, 16])
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in `scan_kernel`
    first = 0
    value_step = 0
    walks = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row = task // E_BLOCKS
        first_e = (task % E_BLOCKS) * WIDTH
        step = first + GROUP * (2 * G)
        state = gl.zeros([DEPTH, WIDTH], gl.float32, mma)
        # See `sum_half`. The group has had its turns for the state and half of the chunks' halves of each row.
        mbarrier.wait(turns.index(GROUP), (walks * (1 + G) + 1 - GROUP) & 1)
        for number in range(0, 2 * G):
            value = value_step + number
            slot = step % SLOTS
            mbarrier.wait(ready.index(value % VALUE_SLOTS), (value // VALUE_SLOTS) & 1)
            mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
            left = ring.index(slot).permute((1, 0))
            state = warpgroup_mma(left, values.index(value % VALUE_SLOTS), state, is_async=True)
            state = warpgroup_mma_wait(1, deps=[state])
            if number > 0:
                mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
            step += 1
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        state = warpgroup_mma_wait(0, deps=[state])
        mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
        # Once both groups have left the row before's state.
        mbarrier.wait(state_empty.index(0), (walks & 1) ^ 1)
        state_tile.slice(GROUP * DEPTH, DEPTH, dim=0).store((state * (1.0 / (2 * BLOCK))).to(gl.bfloat16))
        fence_async_shared()
        mbarrier.arrive(state_full.index(0), count=1)
        mbarrier.wait(state_full.index(0), walks & 1)
        if GROUP == 0:
            store_async(states, [row * BLOCK, first_e], state_tile)
        first += 4 * G
        for number in range(0, G):
            start = (2 * number + GROUP) * BLOCK - shift
            scale, real = gain_of(rms_ptr, gain, row, start, N, EVEN, gl.SliceLayout(1, narrow))
            last = number == G - 1
            if last:
                # The state's tile is stored.
                tma.store_wait(0)
            acc = sum_half(
                values, ready, x_empty, ring, full, empty, turns, state_tile, state_empty, first + GROUP * 6,
                value_step, 2, walks * (1 + G) + 1 + number, last, GROUP, False, SLOTS, VALUE_SLOTS, WIDTH, True,
            )  # fmt: skip
            E = E_BLOCKS * WIDTH
            sums = sums_ptr + (2 * (row * G + number) + GROUP) * E
            finish_back(
                acc, out, value_out, sums, out_ptr, out_stride, value_ptr, scale, real, bias_h_ptr, tiles, end_full,
                walks * G + number, row, start, first_e, E, N, GROUP, EVEN, SHIFTED, narrow,
            )  # fmt: skip
            leave_ends(end_empty, False, GROUP, True)
            first += 12
            value_step += 2
        walks += 1


@kernel
@gluon.jit
def row_kernel(
    x, h, a, reader, writer, out, states, value_out, rms_ptr, gain_ptr, bias_x_ptr, bias_h_ptr, sums_ptr, out_ptr,
    out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, BACK: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr,
    SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """`totals_kernel` and `whole_kernel` of scan.py in one, for rows of at most two chunks of 256: the row's state
    `sum writer^T V / C`, which goes to `states`, and the chunks' outputs.

    Forward, a task is a row and 128 value dimensions, of which two groups of four warps have `SIDE` each, and share
    the left factors. BACK, a task is a row and `WIDTH` value dimensions, and two groups of four warps have half of the
    state's rows each, and halves of chunks in turn.

    Descriptors of x and the states are for tiles of 128 by 64, those of h, `out` and `value_out` for tiles of 128 by
    `END`. Left factors come in tiles of 128 by 64, but those that are multiplied transposed in tiles of 64 by 128:
    forward `writer`, BACK a, whose `writer` comes in columns for either group.
    """
    layout: gl.constexpr = a.layout
    end_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    values = gl.allocate_shared_memory(gl.bfloat16, [VALUE_SLOTS, BLOCK, SIDE], layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, DEPTH], layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [BACK_END_TILES, BLOCK, END], end_layout)
    x_full = barriers(VALUE_SLOTS)
    full = barriers(SLOTS)
    end_full = barriers(BACK_END_TILES)
    end_empty = barriers(BACK_END_TILES)
    if BACK:
        state_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, WIDTH], layout)
        empty = barriers(SLOTS)
        # Both groups read values, and write and read the state.
        x_empty = barriers(VALUE_SLOTS, 2)
        state_full = barriers(1, 2)
        state_empty = barriers(1, 2)
        turns = barriers(2)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    multiply_half,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, x_full, x_empty, ring,
                        full, empty, turns, tiles, end_full, end_empty, state_tile, state_full, state_empty, out_ptr,
                        out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 0, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_half,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, x_full, x_empty, ring,
                        full, empty, turns, tiles, end_full, end_empty, state_tile, state_full, state_empty, out_ptr,
                        out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 1, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    load_values,
                    (
                        x, values, x_full, x_empty, rms_ptr, rms_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "rows", False,
                        VALUE_SLOTS, WIDTH,
                    ),
                ),
                (load_factors, (a, reader, writer, ring, full, empty, G, E_BLOCKS, TASKS, SLOTS)),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, rms_ptr, rms_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "rows",
                        False, WIDTH, BACK_END_TILES, True,
                    ),
                ),
            ],
            [4, 1, 1, 1],
            [BACK_REGISTERS, 24, 24, 24],
        )  # fmt: skip
    else:
        state_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, SIDE], layout)
        # Both groups read the ring.
        empty = barriers(SLOTS, 2)
        x_empty = barriers(VALUE_SLOTS)
        ready = barriers(VALUE_SLOTS)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    multiply_side,
                    (
                        out, states, rms_ptr, gain_ptr, bias_h_ptr, values, ready, x_empty, ring, full, empty, tiles,
                        end_full, end_empty, state_tiles, out_ptr, out_stride, N, G, shift, E_BLOCKS, TASKS, 0, EVEN,
                        SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_side,
                    (
                        out, states, rms_ptr, gain_ptr, bias_h_ptr, values, ready, x_empty, ring, full, empty, tiles,
                        end_full, end_empty, state_tiles, out_ptr, out_stride, N, G, shift, E_BLOCKS, TASKS, 1, EVEN,
                        SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    activate_sides,
                    (
                        values, x_full, ready, rms_ptr, gain_ptr, bias_x_ptr, N, G, shift, E_BLOCKS, TASKS, EVEN,
                        VALUE_SLOTS,
                    ),
                ),
                (load_sides, (x, values, x_full, x_empty, N, G, shift, E_BLOCKS, TASKS, VALUE_SLOTS)),
                (load_shared, (a, reader, writer, ring, full, empty, G, E_BLOCKS, TASKS, SLOTS)),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, rms_ptr, rms_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "rows",
                        False, BLOCK, BACK_END_TILES, True, True,
                    ),
                ),
            ],
            [4, SIDE_ACTIVATING, 1, 1, 1],
            [SIDE_REGISTERS, SIDE_ACTIVATING_REGISTERS, 24, 24, 24],
        )  # fmt: skip
