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
    warpgroup_mma_wait,
)

from .common import grid_wait
from .dispatch import kernel
from .hopper import BLOCK, barriers, store_async
from .walk import (
    ACTIVATING,
    ACTIVATING_REGISTERS,
    BACK_REGISTERS,
    DEPTH,
    END,
    END_TILES,
    GROUP_REGISTERS,
    activate_tiles,
    fetch_depths,
    fetch_half,
    finish_back,
    finish_half,
    gain_of,
    load_ends,
    load_values,
)
from .wholescan import sum_half


# Value dimensions of a task. With 128, values would leave so little room that loads in flight limit the speed.
WIDTH = gl.constexpr(64)
# Tiles of the ring, and of the values, four for a row's, the other for the next row's.
SLOTS, VALUE_SLOTS = 6, 5
BACK_SLOTS, BACK_VALUE_SLOTS = 6, 5


@gluon.jit
def load_factors(
    a, reader, writer, ring, full, empty, G, E_BLOCKS, TASKS, BACK: gl.constexpr, SLOTS: gl.constexpr
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
                if BACK:
                    above = (half - half % 2 + other) * BLOCK
                    step = fetch_depths(a, above, (half % 2) * BLOCK, ring, full, empty, step, SLOTS, True)
                else:
                    step = fetch_depths(a, half * BLOCK, other * BLOCK, ring, full, empty, step, SLOTS)


@gluon.jit
def multiply_half(
    out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full, empty, turns,
    tiles, end_full, end_empty, state_tile, state_full, state_empty, out_ptr, out_stride, value_ptr, N, G,
    shift, E_BLOCKS, TASKS, GROUP: gl.constexpr, BACK: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr,
    SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """What `row_kernel` computes: half of the state's rows, and every other half of a chunk."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, END, 16])
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply`
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
                WIDTH, BACK,
            )  # fmt: skip
            if BACK:
                E = E_BLOCKS * WIDTH
                sums = sums_ptr + (2 * (row * G + number) + GROUP) * E
                finish_back(
                    acc, out, value_out, sums, out_ptr, out_stride, value_ptr, scale, real, bias_h_ptr, tiles,
                    end_full, walks * G + number, row, start, first_e, E, N, GROUP, EVEN, SHIFTED, narrow,
                )  # fmt: skip
                tma.store_wait(0)
                mbarrier.arrive(end_empty.index(2 * GROUP), count=1)
                mbarrier.arrive(end_empty.index(2 * GROUP + 1), count=1)
            else:
                finish_half(
                    acc, out, out_ptr, out_stride, scale, real, bias_h_ptr, tiles, end_full, end_empty,
                    walks * G + number, row, start, first_e, N, GROUP, EVEN, SHIFTED, narrow, WIDTH,
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
    """`totals_kernel` and `whole_kernel` in one, for rows of at most two chunks of 256: the row's state
    `sum writer^T V / C`, which goes to `states`, and the chunks' outputs.

    A task is a row and `WIDTH` value dimensions. Two groups of four warps have half of the state's rows each, and
    halves of chunks in turn: descriptors are those of the forward of `whole_kernel`, with `writer` as `reader`. Those
    of x and the states are for tiles of 128 by `WIDTH`; BACK, those of `value_out` for such as `out`, and those of a,
    which is transposed, for tiles of 64 by 128.
    """
    layout: gl.constexpr = a.layout
    end_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    values = gl.allocate_shared_memory(gl.bfloat16, [VALUE_SLOTS, BLOCK, WIDTH], layout)
    state_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, WIDTH], layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, DEPTH], layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [END_TILES, BLOCK, END], end_layout)
    x_full = barriers(VALUE_SLOTS)
    full = barriers(SLOTS)
    empty = barriers(SLOTS)
    # Both groups read values, and write and read the state.
    x_empty = barriers(VALUE_SLOTS, 2)
    state_full = barriers(1, 2)
    state_empty = barriers(1, 2)
    turns = barriers(2)
    end_full = barriers(2 * END_TILES)
    end_empty = barriers(END_TILES)
    if BACK:
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    multiply_half,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, x_full, x_empty, ring,
                        full, empty, turns, tiles, end_full, end_empty, state_tile, state_full,
                        state_empty, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 0, BACK, EVEN,
                        SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_half,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, x_full, x_empty, ring,
                        full, empty, turns, tiles, end_full, end_empty, state_tile, state_full,
                        state_empty, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 1, BACK, EVEN,
                        SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    load_values,
                    (
                        x, values, x_full, x_empty, rms_ptr, rms_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "rows", False,
                        VALUE_SLOTS, WIDTH,
                    ),
                ),
                (load_factors, (a, reader, writer, ring, full, empty, G, E_BLOCKS, TASKS, BACK, SLOTS)),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, rms_ptr, rms_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "rows",
                        False, WIDTH, END_TILES, True,
                    ),
                ),
            ],
            [4, 1, 1, 1],
            [BACK_REGISTERS, 24, 24, 24],
        )  # fmt: skip
    else:
        ready = barriers(VALUE_SLOTS)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    multiply_half,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring,
                        full, empty, turns, tiles, end_full, end_empty, state_tile, state_full,
                        state_empty, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 0, BACK, EVEN,
                        SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_half,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring,
                        full, empty, turns, tiles, end_full, end_empty, state_tile, state_full,
                        state_empty, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 1, BACK, EVEN,
                        SHIFTED, SLOTS, VALUE_SLOTS,
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
                        x, values, x_full, x_empty, rms_ptr, rms_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "rows", False,
                        VALUE_SLOTS, WIDTH,
                    ),
                ),
                (load_factors, (a, reader, writer, ring, full, empty, G, E_BLOCKS, TASKS, BACK, SLOTS)),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, rms_ptr, rms_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "rows",
                        False, WIDTH,
                    ),
                ),
            ],
            [4, ACTIVATING, 1, 1, 1],
            [GROUP_REGISTERS, ACTIVATING_REGISTERS, 24, 24, 24],
        )  # fmt: skip
