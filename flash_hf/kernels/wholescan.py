# SPDX-License-Identifier: Apache-2.0
"""The scan over bidirectional rows for Hopper, whose states totals.py has made.

Warps, tiles and barriers as in scan.py, but two groups of warps take halves of chunks in turn. README.md beside this
file derives it.
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
from .hopper import BLOCK, TILE_BYTES, barriers, load_async
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
    finish_half,
    gain_of,
    has_tokens,
    high,
    load_ends,
    load_values,
    no_sums,
    walk_of,
)


# Half tiles of the ring, and tiles of the values; backward half tiles of both.
SLOTS, VALUE_SLOTS = 4, 3
BACK_SLOTS, BACK_VALUE_SLOTS = 5, 4


@gluon.jit
def fetch_state(x, place, tile, full, empty, number):
    """Load the state of the program's task `number`, once the task before has left its tile."""
    mbarrier.wait(empty.index(0), (number & 1) ^ 1)
    mbarrier.expect(full.index(0), TILE_BYTES)
    load_async(x, place, full.index(0), tile)


@gluon.jit
def load_factors(
    a, reader, state, ring, full, empty, state_tile, state_full, state_empty, begin_ptr, end_ptr, N, G, shift,
    E_BLOCKS, TASKS, BACK: gl.constexpr, SKIP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The states and left factors that `multiply_half` reads, in its order."""
    grid_wait()
    step = 0
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        _, begin, end = walk_of(task, begin_ptr, end_ptr, G, 0, E_BLOCKS, TASKS, False, "pieces")
        place = [(begin // G) * BLOCK, (task % E_BLOCKS) * BLOCK]
        fetch_state(state, place, state_tile, state_full, state_empty, number)
        number += 1
        for half in range(2 * begin, 2 * end):
            chunk = half // 2
            token = (chunk % G) * (2 * BLOCK) - shift
            if not SKIP or has_tokens(token + (half % 2) * BLOCK, N):
                step = fetch_depths(reader, half * BLOCK, 0, ring, full, empty, step, SLOTS)
                for other in gl.static_range(2):
                    if not SKIP or has_tokens(token + other * BLOCK, N):
                        if BACK:
                            slot = (2 * chunk + other) * BLOCK
                            step = fetch_depths(a, slot, (half % 2) * BLOCK, ring, full, empty, step, SLOTS, True)
                        else:
                            step = fetch_depths(a, half * BLOCK, other * BLOCK, ring, full, empty, step, SLOTS)


@gluon.jit
def sum_half(
    values, ready, x_empty, ring, full, empty, turns, state_tile, state_empty, step, value_step, count, turn, last,
    GROUP: gl.constexpr, SKIP: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
    WIDTH: gl.constexpr = BLOCK, TRANS: gl.constexpr = False, HALVED: gl.constexpr = False,
):  # fmt: skip
    """The products of half a chunk with the state and with `count` tiles of values, 128 by `WIDTH`, in the group's
    turn of this number; with TRANS, the left factors of values are transposed. Leaves the values, and where it is the
    `last` of a walk, the state. HALVED: tiles of values come in upper and lower halves."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    acc = gl.zeros([BLOCK, WIDTH], gl.float32, mma)
    # The first group has the first turn. What both groups read is waited for in turn.
    mbarrier.wait(turns.index(GROUP), (turn + 1 - GROUP) & 1)
    for depth in gl.static_range(2):
        slot = step % SLOTS
        mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
        state_half = state_tile.slice(depth * DEPTH, DEPTH, dim=0)
        acc = warpgroup_mma(ring.index(slot), state_half, acc, is_async=True)
        if depth == 1:
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
        step += 1
    for part in range(count):
        value = 2 * (value_step + part) if HALVED else value_step + part
        for depth in gl.static_range(2):
            slot = step % SLOTS
            if HALVED or depth == 0:
                held = (value + depth) % VALUE_SLOTS
                mbarrier.wait(ready.index(held), ((value + depth) // VALUE_SLOTS) & 1)
                x = values.index(held)
            mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
            left = high(ring.index(slot)).permute((1, 0)) if TRANS else ring.index(slot)
            right = x if HALVED else x.slice(depth * DEPTH, DEPTH, dim=0)
            acc = warpgroup_mma(left, right, acc, is_async=True)
            # The product before, while this one runs.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
            if depth == 1:
                if HALVED:
                    mbarrier.arrive(x_empty.index(value % VALUE_SLOTS), count=1)
            elif part > 0:
                mbarrier.arrive(x_empty.index((value - 1) % VALUE_SLOTS), count=1)
            elif last:
                mbarrier.arrive(state_empty.index(0), count=1)
            step += 1
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
    held = 2 * (value_step + count) - 1 if HALVED else value_step + count - 1
    mbarrier.arrive(x_empty.index(held % VALUE_SLOTS), count=1)
    if SKIP:
        if count == 1:
            # For the other group, which does not read it.
            mbarrier.arrive(x_empty.index(held % VALUE_SLOTS), count=1)
            if HALVED:
                mbarrier.arrive(x_empty.index((held - 1) % VALUE_SLOTS), count=1)
    return acc


@gluon.jit
def multiply_half(
    out, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full, empty, turns, tiles,
    value_tiles, end_full, end_empty, state_tile, state_full, state_empty, begin_ptr, end_ptr, out_ptr, out_stride,
    value_ptr, N, G, shift, E_BLOCKS, TASKS, GROUP: gl.constexpr, BACK: gl.constexpr, SKIP: gl.constexpr,
    EVEN: gl.constexpr, SHIFTED: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """What `whole_kernel` computes, for every other half of a chunk."""
    grid_wait()
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, END, 16])
    E = E_BLOCKS * BLOCK
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply`
    # Halves of this group before the chunk, of both groups, and their tiles.
    number = 0
    taken = 0
    first = 0
    value_step = 0
    walks = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        _, begin, end = walk_of(task, begin_ptr, end_ptr, G, 0, E_BLOCKS, TASKS, False, "pieces")
        mbarrier.wait(state_full.index(0), walks & 1)
        walks += 1
        for chunk in range(begin, end):
            row = chunk // G
            token = (chunk % G) * (2 * BLOCK) - shift
            half = GROUP
            count = 2
            own = True
            if SKIP:
                has_0 = has_tokens(token, N)
                count = gl.where(has_0 & has_tokens(token + BLOCK, N), 2, 1)
                half = gl.where(count == 2, (GROUP + taken) % 2, gl.where(has_0, 0, 1))
                own = (count == 2) | (taken % 2 == GROUP)
            if not SKIP or own:
                start = token + half * BLOCK
                # Early, so that nothing waits for it.
                scale, real = gain_of(rms_ptr, gain, row, start, N, EVEN, gl.SliceLayout(1, narrow))
                step = first + half * 6
                if SKIP:
                    step = gl.where(count == 2, step, first)
                acc = sum_half(
                    values, ready, x_empty, ring, full, empty, turns, state_tile, state_empty, step, value_step, count,
                    number, chunk == end - 1, GROUP, SKIP, SLOTS, VALUE_SLOTS, BLOCK, BACK,
                    BACK,
                )  # fmt: skip
                finish_half(
                    acc, out, out_ptr, out_stride, scale, real, bias_h_ptr, tiles, end_full, end_empty, number, row,
                    start, (task % E_BLOCKS) * BLOCK, N, GROUP, EVEN, SHIFTED, narrow, BLOCK, END_TILES, BACK,
                    value_out, value_tiles.index(GROUP), value_ptr, sums_ptr + (chunk * 2 + half) * E, E,
                )  # fmt: skip
                if BACK:
                    if SKIP:
                        if count == 1:
                            other = sums_ptr + (chunk * 2 + 1 - half) * E + (task % E_BLOCKS) * BLOCK
                            no_sums(other, gl.SliceLayout(0, narrow))
                number += 1
            elif chunk == end - 1:
                mbarrier.arrive(state_empty.index(0), count=1)
            first += 2 * count * (1 + count)
            value_step += count
            taken += count


@kernel
@gluon.jit
def whole_kernel(
    x, h, a, reader, state, out, value_out, rms_ptr, gain_ptr, bias_x_ptr, bias_h_ptr, sums_ptr, begin_ptr, end_ptr,
    out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, BACK: gl.constexpr, SKIP: gl.constexpr,
    EVEN: gl.constexpr, SHIFTED: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """`scan_kernel` for bidirectional models, where a row has one state, `state`, that of all its chunks over C, and
    every token of a chunk sees all others.

    Two groups of four warps take halves of chunks in turn, see hopper.py: `reader` and forward `a` are described for
    tiles of 128 by 64, which come in a ring of `SLOTS`, h, `out` and `value_out` for tiles of 128 by `END`; backward
    `a` and x for tiles of 64 by 128.
    """
    layout: gl.constexpr = reader.layout
    end_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    ROWS: gl.constexpr = DEPTH if BACK else BLOCK
    values = gl.allocate_shared_memory(gl.bfloat16, [VALUE_SLOTS, ROWS, BLOCK], layout)
    state_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BLOCK], layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, DEPTH], layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [END_TILES, BLOCK, END], end_layout)
    # Both groups read values and states.
    x_full = barriers(VALUE_SLOTS)
    x_empty = barriers(VALUE_SLOTS, 2)
    state_full = barriers(1)
    state_empty = barriers(1, 2)
    full = barriers(SLOTS)
    empty = barriers(SLOTS)
    turns = barriers(2)
    end_full = barriers(2 * END_TILES)
    end_empty = barriers(END_TILES)
    ready = x_full if BACK else barriers(VALUE_SLOTS)
    value_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, END], end_layout) if BACK else tiles
    fence_async_shared()
    if BACK:
        gl.warp_specialize(
            [
                (
                    multiply_half,
                    (
                        out, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full,
                        empty, turns, tiles, value_tiles, end_full, end_empty, state_tile, state_full, state_empty,
                        begin_ptr, end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 0, BACK,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_half,
                    (
                        out, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full,
                        empty, turns, tiles, value_tiles, end_full, end_empty, state_tile, state_full, state_empty,
                        begin_ptr, end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 1, BACK,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    load_values,
                    (
                        x, values, x_full, x_empty, begin_ptr, end_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "pieces",
                        SKIP, VALUE_SLOTS, BLOCK, ROWS,
                    ),
                ),
                (
                    load_factors,
                    (
                        a, reader, state, ring, full, empty, state_tile, state_full, state_empty, begin_ptr, end_ptr,
                        N, G, shift, E_BLOCKS, TASKS, BACK, SKIP, SLOTS,
                    ),
                ),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, begin_ptr, end_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "pieces",
                        SKIP,
                    ),
                ),
            ],
            [4, 1, 1, 1],
            [BACK_REGISTERS, 24, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    multiply_half,
                    (
                        out, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full,
                        empty, turns, tiles, value_tiles, end_full, end_empty, state_tile, state_full, state_empty,
                        begin_ptr, end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 0, BACK,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_half,
                    (
                        out, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full,
                        empty, turns, tiles, value_tiles, end_full, end_empty, state_tile, state_full, state_empty,
                        begin_ptr, end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 1, BACK,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    activate_tiles,
                    (
                        values, x_full, ready, rms_ptr, gain_ptr, bias_x_ptr, begin_ptr, end_ptr, N, G, shift, 0,
                        E_BLOCKS, TASKS, "pieces", SKIP, EVEN, VALUE_SLOTS, ACTIVATING,
                    ),
                ),
                (
                    load_values,
                    (
                        x, values, x_full, x_empty, begin_ptr, end_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "pieces",
                        SKIP, VALUE_SLOTS, BLOCK, ROWS,
                    ),
                ),
                (
                    load_factors,
                    (
                        a, reader, state, ring, full, empty, state_tile, state_full, state_empty, begin_ptr, end_ptr,
                        N, G, shift, E_BLOCKS, TASKS, BACK, SKIP, SLOTS,
                    ),
                ),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, begin_ptr, end_ptr, N, G, shift, 0, E_BLOCKS, TASKS, "pieces",
                        SKIP,
                    ),
                ),
            ],
            [4, ACTIVATING, 1, 1, 1],
            [GROUP_REGISTERS, ACTIVATING_REGISTERS, 24, 24, 24],
        )  # fmt: skip
