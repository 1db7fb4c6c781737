# SPDX-License-Identifier: Apache-2.0
"""The scan over bidirectional rows of at most two chunks, for Hopper: a row's values for 64 value dimensions stay in
shared memory from the sum that is the row's state to the products that read it.

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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .common import grid_wait
from .dispatch import kernel
from .hopper import BLOCK, barriers, store_async
from .scan import (
    ACTIVATING,
    ACTIVATING_REGISTERS,
    DEPTH,
    END,
    END_TILES,
    GROUP_REGISTERS,
    activate_tiles,
    fetch,
    fetch_depths,
    fetch_half,
    fetch_tokens,
    finish_half,
    gain_of,
    gate,
    load_ends,
    load_values,
    product,
    sum_half,
    two_products,
)


# Value dimensions of a task. With 128, values would leave so little room that loads in flight limit the speed.
WIDTH = gl.constexpr(64)
# Tiles of the ring, and of the values: two for each chunk, and in the forward two for the next row's.
SLOTS, VALUE_SLOTS = 3, 4
DEPTH_SLOTS, DEPTH_VALUE_SLOTS = 6, 6


@gluon.jit
def fetch_values(
    x, values, x_full, x_empty, value_step, task, number, G, shift, E_BLOCKS, TASKS, VALUE_SLOTS: gl.constexpr
):
    """Load the values of chunk `number` of a task's row, if there is such a task."""
    if task < TASKS:
        for half in gl.static_range(2):
            place = [task // E_BLOCKS, (2 * number + half) * BLOCK - shift, (task % E_BLOCKS) * WIDTH]
            value_step = fetch_tokens(x, place, values, x_full, x_empty, value_step, VALUE_SLOTS, WIDTH)
    return value_step


@gluon.jit
def load_tiles(
    x, h, a, reader, writer, values, x_full, x_empty, ring, full, empty, tiles, end_full, end_empty, G, shift,
    E_BLOCKS, TASKS, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order; but values as soon as the row before has left their tiles, and behind what
    that row still needs."""
    grid_wait()
    value_step = 0
    end_step = 0
    step = 0
    for number in range(0, G):
        value_step = fetch_values(
            x, values, x_full, x_empty, value_step, gl.program_id(0), number, G, shift, E_BLOCKS, TASKS, VALUE_SLOTS
        )
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        following = task + gl.num_programs(0)
        row = task // E_BLOCKS
        column = (task % E_BLOCKS) * WIDTH
        for tile in range(0, 2 * G):
            step = fetch(writer, [(row * 2 * G + tile) * BLOCK, 0], ring, full, empty, step, SLOTS)
        for number in range(0, G):
            token = number * (2 * BLOCK) - shift
            slot = (row * G + number) * (2 * BLOCK)
            for half in gl.static_range(2):
                step = fetch(reader, [slot + half * BLOCK, 0], ring, full, empty, step, SLOTS)
                for other in gl.static_range(2):
                    step = fetch(a, [slot + other * BLOCK, half * BLOCK], ring, full, empty, step, SLOTS)
                if half == 0:
                    if number > 0:
                        value_step = fetch_values(
                            x, values, x_full, x_empty, value_step, following, number - 1, G, shift, E_BLOCKS, TASKS,
                            VALUE_SLOTS,
                        )  # fmt: skip
            for half in gl.static_range(2):
                place = [row, token + half * BLOCK, column]
                end_step = fetch_tokens(h, place, tiles, end_full, end_empty, end_step, END_TILES, WIDTH)
        value_step = fetch_values(
            x, values, x_full, x_empty, value_step, following, G - 1, G, shift, E_BLOCKS, TASKS, VALUE_SLOTS
        )


@gluon.jit
def multiply(
    out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, x_full, x_empty, ring, full, empty,
    tiles, end_full, end_empty, state_tile, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS,
    EVEN: gl.constexpr, SHIFTED: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """What `row_kernel` computes, BACK."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, WIDTH, 16])
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    E = E_BLOCKS * WIDTH
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in `scan_kernel`
    value_step = 0
    end_step = 0
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row = task // E_BLOCKS
        first_e = (task % E_BLOCKS) * WIDTH
        state = warpgroup_mma_init(gl.zeros([BLOCK, WIDTH], gl.float32, mma))
        for number in range(0, 2 * G):
            value_slot = (value_step + number) % VALUE_SLOTS
            slot = step % SLOTS
            x = values.index(value_slot)
            mbarrier.wait(x_full.index(value_slot), ((value_step + number) // VALUE_SLOTS) & 1)
            mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
            before = warpgroup_mma_wait(0, deps=[state])
            if number > 0:
                mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
            state = warpgroup_mma(ring.index(slot).permute((1, 0)), x, before, is_async=True)
            step += 1
        total = warpgroup_mma_wait(0, deps=[state])
        mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
        state_tile.store((total * (1.0 / (2 * BLOCK))).to(gl.bfloat16))
        fence_async_shared()
        store_async(states, [row * BLOCK, first_e], state_tile)
        for number in range(0, G):
            chunk = row * G + number
            token = number * (2 * BLOCK) - shift
            scale_0, real_0 = gain_of(rms_ptr, gain, row, token, N, EVEN, rows)
            scale_1, real_1 = gain_of(rms_ptr, gain, row, token + BLOCK, N, EVEN, rows)
            slot_0 = value_step % VALUE_SLOTS
            slot_1 = (value_step + 1) % VALUE_SLOTS
            value_step += 2
            x_0 = values.index(slot_0)
            x_1 = values.index(slot_1)
            acc_0 = gl.zeros([BLOCK, WIDTH], gl.float32, mma)
            acc_0, step = product(ring, full, empty, step, state_tile, acc_0, False, SLOTS)
            acc_0, step = two_products(ring, full, empty, step, x_0, x_1, acc_0, True, SLOTS)
            acc_1 = gl.zeros([BLOCK, WIDTH], gl.float32, mma)
            acc_1, step = product(ring, full, empty, step, state_tile, acc_1, False, SLOTS)
            acc_1, step = two_products(ring, full, empty, step, x_0, x_1, acc_1, True, SLOTS)
            for half in gl.static_range(2):
                mbarrier.wait(end_full.index(half), end_step & 1)
                scale = gl.expand_dims(scale_0 if half == 0 else scale_1, 1)
                real = gl.expand_dims(real_0 if half == 0 else real_1, 1)
                x_half = x_0 if half == 0 else x_1
                tile = tiles.index(half)
                sums = sums_ptr + (chunk * 2 + half) * E + first_e
                acc = acc_0 if half == 0 else acc_1
                start = token + half * BLOCK
                before_row = start < 0
                gate(
                    tile, x_half, acc, scale, real, bias_h_ptr + first_e, sums, out_ptr + first_e, out_stride,
                    value_ptr + first_e, E, row * N + start, before_row, 0, True, EVEN, SHIFTED, mma, WIDTH,
                )  # fmt: skip
                fence_async_shared()
                if not SHIFTED or not before_row:
                    store_async(out, [row, start, first_e], tile.reshape([1, BLOCK, WIDTH]))
                    store_async(value_out, [row, start, first_e], x_half.reshape([1, BLOCK, WIDTH]))
            end_step += 1
            tma.store_wait(0)
            mbarrier.arrive(end_empty.index(0), count=1)
            mbarrier.arrive(end_empty.index(1), count=1)
            mbarrier.arrive(x_empty.index(slot_0), count=1)
            mbarrier.arrive(x_empty.index(slot_1), count=1)
    tma.store_wait(0)


@gluon.jit
def load_factors(
    a, reader, writer, ring, full, empty, G, E_BLOCKS, TASKS, SLOTS: gl.constexpr
):  # fmt: skip
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
                step = fetch_depths(a, half * BLOCK, other * BLOCK, ring, full, empty, step, SLOTS)


@gluon.jit
def multiply_half(
    out, states, rms_ptr, gain_ptr, bias_h_ptr, values, ready, x_empty, ring, full, empty, turns, tiles, end_full,
    end_empty, state_tile, state_full, state_empty, out_ptr, out_stride, N, G, shift, E_BLOCKS, TASKS,
    GROUP: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """What `row_kernel` computes, forward: half of the state's rows, and every other half of a chunk."""
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
                value_step, 2, walks * (1 + G) + 1 + number, last, GROUP, False, SLOTS, VALUE_SLOTS,
                WIDTH,
            )  # fmt: skip
            finish_half(
                acc, out, out_ptr, out_stride, scale, real, bias_h_ptr, tiles, end_full, end_empty, walks * G + number,
                row, start, first_e, N, GROUP, EVEN, SHIFTED, narrow, WIDTH,
            )  # fmt: skip
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
    """`totals_kernel` and `whole_kernel` of scan.py in one, for rows of at most `VALUE_SLOTS / 2` chunks of 256: the
    row's state `sum writer^T V / C`, which goes to `states`, and the chunks' outputs.

    A task is a row and `WIDTH` value dimensions. Forward, two groups of four warps have half of the state's rows each,
    and halves of chunks in turn: descriptors are those of `whole_kernel`, with `writer` as `reader`. Those of x, the
    states and `value_out`, and backward of h and `out`, are for tiles of 128 by `WIDTH`.
    """
    layout: gl.constexpr = a.layout
    values = gl.allocate_shared_memory(gl.bfloat16, [VALUE_SLOTS, BLOCK, WIDTH], layout)
    state_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, WIDTH], layout)
    x_full = barriers(VALUE_SLOTS)
    full = barriers(SLOTS)
    empty = barriers(SLOTS)
    if BACK:
        ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, BLOCK], layout)
        tiles = gl.allocate_shared_memory(gl.bfloat16, [END_TILES, BLOCK, WIDTH], layout)
        x_empty = barriers(VALUE_SLOTS)
        end_full = barriers(END_TILES)
        end_empty = barriers(END_TILES)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, x_full, x_empty, ring,
                        full, empty, tiles, end_full, end_empty, state_tile, out_ptr, out_stride, value_ptr, N, G,
                        shift, E_BLOCKS, TASKS, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    load_tiles,
                    (
                        x, h, a, reader, writer, values, x_full, x_empty, ring, full, empty, tiles, end_full,
                        end_empty, G, shift, E_BLOCKS, TASKS, SLOTS, VALUE_SLOTS,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        end_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
        ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, DEPTH], layout)
        tiles = gl.allocate_shared_memory(gl.bfloat16, [END_TILES, BLOCK, END], end_layout)
        # Both groups read values, and write and read the state.
        x_empty = barriers(VALUE_SLOTS, 2)
        state_full = barriers(1, 2)
        state_empty = barriers(1, 2)
        ready = barriers(VALUE_SLOTS)
        turns = barriers(2)
        end_full = barriers(2 * END_TILES)
        end_empty = barriers(END_TILES)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    multiply_half,
                    (
                        out, states, rms_ptr, gain_ptr, bias_h_ptr, values, ready, x_empty, ring, full, empty, turns,
                        tiles, end_full, end_empty, state_tile, state_full, state_empty, out_ptr, out_stride, N, G,
                        shift, E_BLOCKS, TASKS, 0, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_half,
                    (
                        out, states, rms_ptr, gain_ptr, bias_h_ptr, values, ready, x_empty, ring, full, empty, turns,
                        tiles, end_full, end_empty, state_tile, state_full, state_empty, out_ptr, out_stride, N, G,
                        shift, E_BLOCKS, TASKS, 1, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    activate_tiles,
                    (
                        values, x_full, ready, rms_ptr, gain_ptr, bias_x_ptr, rms_ptr, rms_ptr, N, G, shift, 0,
                        E_BLOCKS, TASKS, "rows", False, EVEN, VALUE_SLOTS, ACTIVATING, WIDTH,
                    ),
                ),
                (
                    load_values,
                    (
                        x, values, x_full, x_empty, rms_ptr, rms_ptr, N, G, shift, E_BLOCKS, TASKS, "rows", False,
                        VALUE_SLOTS, WIDTH,
                    ),
                ),
                (load_factors, (a, reader, writer, ring, full, empty, G, E_BLOCKS, TASKS, SLOTS)),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, rms_ptr, rms_ptr, N, G, shift, E_BLOCKS, TASKS, "rows", False,
                        WIDTH,
                    ),
                ),
            ],
            [4, ACTIVATING, 1, 1, 1],
            [GROUP_REGISTERS, ACTIVATING_REGISTERS, 24, 24, 24],
        )  # fmt: skip
