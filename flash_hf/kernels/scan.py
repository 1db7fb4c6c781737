# SPDX-License-Identifier: Apache-2.0
"""Scans over the chunks of a document, for Hopper: one program walks along some chunks for 128 value dimensions, keeps
the state in the tensor cores' accumulators, and leaves nothing to be read again but what the backward needs.

Written in Gluon, which comes with triton: tiles of 128 by 128 go by the tensor memory accelerator into a ring in
shared memory, filled by one warp ahead of the eight warps that multiply; backward, two groups of four warps have 64
value dimensions each. README.md beside this file derives them.
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
from .hopper import BLOCK, barriers, halves, store_async
from .walk import (
    ACTIVATING,
    ACTIVATING_REGISTERS,
    BACK_REGISTERS,
    DEPTH,
    END,
    END_TILES,
    activate_tiles,
    fetch,
    fetch_depths,
    fetch_tokens,
    finish_back,
    gain_of,
    gate,
    half_of,
    has_tokens,
    high,
    load_ends,
    load_values,
    no_sums,
    tasks_of,
    walk_of,
)


# Tiles of the ring, and of the values, whose tiles stay longer. With the state's they fill the shared memory.
SLOTS, VALUE_SLOTS = 3, 3
# Backward: the same, of half tiles, and value dimensions of a group of warps.
BACK_SLOTS, BACK_VALUE_SLOTS, SIDE = 6, 4, gl.constexpr(64)


@gluon.jit
def load_tiles(
    x, h, a, reader, writer, values, x_full, x_empty, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut,
    E_BLOCKS, TASKS, SPLIT: gl.constexpr, SKIP: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order."""
    grid_wait()
    value_step = 0
    step = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        walk, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, False, SPLIT)
        column = (task % E_BLOCKS) * BLOCK
        for chunk in range(begin, end):
            reads = chunk > begin
            if SPLIT != "rows":
                reads = reads | (begin % G != 0)
            writes = chunk < end - 1
            row = chunk // G
            token = (chunk % G) * (2 * BLOCK) - shift
            slot = chunk * (2 * BLOCK)
            for half in gl.static_range(2):
                if not SKIP or has_tokens(token + half * BLOCK, N):
                    place = [row, token + half * BLOCK, column]
                    value_step = fetch_tokens(x, place, values, x_full, x_empty, value_step, VALUE_SLOTS)
                    if reads:
                        step = fetch(reader, [slot + half * BLOCK, 0], ring, full, empty, step, SLOTS)
                    for other in gl.static_range(2):
                        if other <= half:
                            if not SKIP or has_tokens(token + other * BLOCK, N):
                                place_a = [slot + half * BLOCK, other * BLOCK]
                                step = fetch(a, place_a, ring, full, empty, step, SLOTS)
                    step = fetch_tokens(h, place, ring, full, empty, step, SLOTS)
                    if writes:
                        step = fetch(writer, [slot + half * BLOCK, 0], ring, full, empty, step, SLOTS)


@gluon.jit
def product(ring, full, empty, step, right, acc, TRANS: gl.constexpr, SLOTS: gl.constexpr):
    """`acc + left right`, or with TRANS `left^T`, for the ring's next tile, whose slot is then free."""
    slot = step % SLOTS
    mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
    left = ring.index(slot).permute((1, 0)) if TRANS else ring.index(slot)
    acc = warpgroup_mma(left, right, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(slot), count=1)
    return acc, step + 1


@gluon.jit
def two_products(ring, full, empty, step, right_0, right_1, acc, HIGH: gl.constexpr, SLOTS: gl.constexpr):
    """Two of `product`, the second of which begins while the first runs; with HIGH, the left factors are transposed
    tiles of 64 by 128."""
    slot_0 = step % SLOTS
    slot_1 = (step + 1) % SLOTS
    mbarrier.wait(full.index(slot_0), (step // SLOTS) & 1)
    left_0 = high(ring.index(slot_0)).permute((1, 0)) if HIGH else ring.index(slot_0)
    acc = warpgroup_mma(left_0, right_0, acc, is_async=True)
    mbarrier.wait(full.index(slot_1), ((step + 1) // SLOTS) & 1)
    left_1 = high(ring.index(slot_1)).permute((1, 0)) if HIGH else ring.index(slot_1)
    acc = warpgroup_mma(left_1, right_1, acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    mbarrier.arrive(empty.index(slot_0), count=1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(slot_1), count=1)
    return acc, step + 2


@gluon.jit
def products(
    ring, full, empty, step, values, first, count, acc, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr
):  # fmt: skip
    """`product` with `count` values, of which `first` is the first: each begins while the one before runs. A loop,
    since ptxas of CUDA 12.8 lost halves of descriptors where one product or two were chosen by a branch."""
    for part in range(count):
        slot = step % SLOTS
        mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
        acc = warpgroup_mma(ring.index(slot), values.index((first + part) % VALUE_SLOTS), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        if part > 0:
            mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
        step += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((step - 1) % SLOTS), count=1)
    return acc, step


@gluon.jit
def multiply(
    out, states, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, values, ready, x_empty, ring, full, empty, state_tile,
    begin_ptr, end_ptr, out_ptr, out_stride, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT: gl.constexpr,
    SKIP: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """The forward scan itself, see `scan_kernel`."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK // 2, 16]
    )
    E = E_BLOCKS * BLOCK
    CHUNK: gl.constexpr = 2 * BLOCK
    gain = gl.load(gain_ptr).to(gl.float32)
    # A gain of exactly 0 would hide its own gradient, which is recovered by a division.
    gain = gl.where(gain == 0.0, 1e-20, gain)
    value_step = 0
    step = 0
    # Whether the tile of the half before, `held`, is still being stored.
    pending = 0
    held = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        walk, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, False, SPLIT)
        first_e = (task % E_BLOCKS) * BLOCK
        columns = first_e + gl.arange(0, BLOCK, gl.SliceLayout(0, mma))
        state = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
        if SPLIT != "rows":
            if begin % G != 0:
                s = gl.arange(0, BLOCK, gl.SliceLayout(1, mma))
                piece = walk.to(gl.int64) * BLOCK * E
                place = gl.expand_dims(s * E, 1) + gl.expand_dims(columns, 0)
                state = gl.load(carry_ptr + piece + place).to(gl.float32) * CHUNK
        for chunk in range(begin, end):
            reads = chunk > begin
            if SPLIT != "rows":
                reads = reads | (begin % G != 0)
            writes = chunk < end - 1
            row = chunk // G
            token = (chunk % G) * CHUNK - shift
            if not SKIP:
                # Early, so that nothing waits for it.
                scale_0, real_0 = gain_of(rms_ptr, gain, row, token, N, EVEN, gl.SliceLayout(1, narrow))
                scale_1, real_1 = gain_of(rms_ptr, gain, row, token + BLOCK, N, EVEN, gl.SliceLayout(1, narrow))
            has_0 = has_tokens(token, N)
            has_1 = has_tokens(token + BLOCK, N)
            # The places of the halves' values, and how many there are.
            value_1 = value_step + 1
            count = 2
            if SKIP:
                value_1 = value_step + gl.where(has_0, 1, 0)
                count = gl.where(has_0, 1, 0) + gl.where(has_1, 1, 0)
            x_0 = values.index(value_step % VALUE_SLOTS)
            x_1 = values.index(value_1 % VALUE_SLOTS)
            if reads:
                # The state before has been stored. What was stored since, a half at least, has time.
                tma.store_wait(0 if SHIFTED else 1)
                state_tile.store((state * (1.0 / CHUNK)).to(gl.bfloat16))
                fence_async_shared()
                store_async(states, [chunk * BLOCK, first_e], state_tile)
            for half in gl.static_range(2):
                start = token + half * BLOCK
                if not SKIP or (has_0 if half == 0 else has_1):
                    if SKIP:
                        scale, real = gain_of(rms_ptr, gain, row, start, N, EVEN, gl.SliceLayout(1, narrow))
                    else:
                        scale = scale_0 if half == 0 else scale_1
                        real = real_0 if half == 0 else real_1
                    x_half = x_0 if half == 0 else x_1
                    value = value_step if half == 0 else value_1
                    mbarrier.wait(ready.index(value % VALUE_SLOTS), (value // VALUE_SLOTS) & 1)
                    acc = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
                    if reads:
                        acc, step = product(ring, full, empty, step, state_tile, acc, False, SLOTS)
                        # What the half before stores has had the time of this product; this chunk's state came last.
                        tma.store_wait(1 if half == 0 else 0)
                    if pending > 0:
                        if not reads:
                            tma.store_wait(0)
                        mbarrier.arrive(empty.index(held), count=1)
                    if half == 0:
                        acc, step = product(ring, full, empty, step, x_half, acc, False, SLOTS)
                    elif SKIP:
                        acc, step = products(
                            ring, full, empty, step, values, value_step, count, acc, SLOTS, VALUE_SLOTS
                        )  # fmt: skip
                    else:
                        acc, step = two_products(ring, full, empty, step, x_0, x_1, acc, False, SLOTS)
                    held = step % SLOTS
                    pending = 1
                    mbarrier.wait(full.index(held), (step // SLOTS) & 1)
                    step += 1
                    scale = gl.expand_dims(scale, 1)
                    real = gl.expand_dims(real, 1)
                    tile = ring.index(held)
                    # In two steps, since more does not fit the registers.
                    left, right = halves(acc, narrow)
                    before = start < 0
                    gate(
                        tile, tile, left, scale, real, bias_h_ptr + first_e, out_ptr, out_ptr + first_e, out_stride,
                        out_ptr, E, row * N + start, before, 0, False, EVEN, SHIFTED, narrow,
                    )  # fmt: skip
                    gate(
                        tile, tile, right, scale, real, bias_h_ptr + first_e, out_ptr, out_ptr + first_e, out_stride,
                        out_ptr, E, row * N + start, before, BLOCK // 2, False, EVEN, SHIFTED, narrow,
                    )  # fmt: skip
                    fence_async_shared()
                    if not SHIFTED or not before:
                        store_async(out, [row, start, first_e], tile.reshape([1, BLOCK, BLOCK]))
                    if writes:
                        state, step = product(ring, full, empty, step, x_half, state, True, SLOTS)
                        tma.store_wait(0)
                        mbarrier.arrive(empty.index(held), count=1)
                        pending = 0
            if not SKIP or count == 2:
                mbarrier.arrive(x_empty.index(value_step % VALUE_SLOTS), count=1)
            mbarrier.arrive(x_empty.index((value_step + count - 1) % VALUE_SLOTS), count=1)
            value_step += count
    tma.store_wait(0)


@gluon.jit
def load_back(
    a, reader, writer, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT: gl.constexpr,
    SKIP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The left factors that `multiply_back` reads, in its order."""
    grid_wait()
    step = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        _, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, True, SPLIT)
        for number in range(0, 2 * (end - begin)):
            half = half_of(number, begin, end, True)
            chunk = half // 2
            reads = number > 1
            if SPLIT != "rows":
                reads = reads | (end % G != 0)
            token = (chunk % G) * (2 * BLOCK) - shift
            if not SKIP or has_tokens(token + (half % 2) * BLOCK, N):
                if reads:
                    step = fetch_depths(reader, half * BLOCK, 0, ring, full, empty, step, SLOTS)
                for other in gl.static_range(2):
                    seen = half % 2 <= other
                    if SKIP:
                        seen = seen & has_tokens(token + other * BLOCK, N)
                    if seen:
                        slot = (2 * chunk + other) * BLOCK
                        step = fetch_depths(a, slot, (half % 2) * BLOCK, ring, full, empty, step, SLOTS, True)
                if chunk > begin:
                    step = fetch_depths(writer, half * BLOCK, 0, ring, full, empty, step, SLOTS, True)


@gluon.jit
def multiply_back(
    out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, sums_ptr, values, x_full, x_empty, ring, full,
    empty, tiles, end_full, end_empty, state_tiles, begin_ptr, end_ptr, out_ptr, out_stride, value_ptr, N, G, shift,
    cut, E_BLOCKS, TASKS, GROUP: gl.constexpr, SPLIT: gl.constexpr, SKIP: gl.constexpr, EVEN: gl.constexpr,
    SHIFTED: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """The backward scan itself, see `scan_kernel`, for `SIDE` of a task's value dimensions."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, END, 16])
    E = E_BLOCKS * BLOCK
    CHUNK: gl.constexpr = 2 * BLOCK
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in `multiply`
    state_tile = state_tiles.index(GROUP)
    # Halves with tokens before.
    count = 0
    step = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        walk, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, True, SPLIT)
        first_e = (task % E_BLOCKS) * BLOCK + GROUP * SIDE
        state = gl.zeros([BLOCK, SIDE], gl.float32, mma)
        if SPLIT != "rows":
            if end % G != 0:
                s = gl.arange(0, BLOCK, gl.SliceLayout(1, mma))
                columns = first_e + gl.arange(0, SIDE, gl.SliceLayout(0, mma))
                place = walk.to(gl.int64) * BLOCK * E + gl.expand_dims(s * E, 1) + gl.expand_dims(columns, 0)
                state = gl.load(carry_ptr + place).to(gl.float32) * CHUNK
        for number in range(0, 2 * (end - begin)):
            half = half_of(number, begin, end, True)
            chunk = half // 2
            row = chunk // G
            token = (chunk % G) * CHUNK - shift
            start = token + (half % 2) * BLOCK
            reads = number > 1
            if SPLIT != "rows":
                reads = reads | (end % G != 0)
            stores = reads & (half % 2 == 0)
            if stores:
                # The state before has been stored: each chunk has tokens, and `gate` waits.
                state_tile.store((state * (1.0 / CHUNK)).to(gl.bfloat16))
                fence_async_shared()
                store_async(states, [chunk * BLOCK, first_e], state_tile)
            sums = sums_ptr + half * E
            if not SKIP or has_tokens(start, N):
                # Early, so that nothing waits for it.
                scale, real = gain_of(rms_ptr, gain, row, start, N, EVEN, gl.SliceLayout(1, narrow))
                acc = gl.zeros([BLOCK, SIDE], gl.float32, mma)
                if reads:
                    upper = state_tile.slice(0, DEPTH, dim=0)
                    lower = state_tile.slice(DEPTH, DEPTH, dim=0)
                    acc, step = two_products(ring, full, empty, step, upper, lower, acc, False, SLOTS)
                if count > 0:
                    # What the half before stores has had the time of this product; this chunk's state came last.
                    if stores:
                        tma.store_wait(1)
                    else:
                        tma.store_wait(0)
                    mbarrier.arrive(end_empty.index(2 * GROUP), count=1)
                    mbarrier.arrive(end_empty.index(2 * GROUP + 1), count=1)
                others = 2 - half % 2
                if SKIP:
                    others = gl.where(has_tokens(token + BLOCK, N), others, 1)
                for other in range(others):
                    value = 2 * (count + other) + GROUP
                    mbarrier.wait(x_full.index(value % VALUE_SLOTS), (value // VALUE_SLOTS) & 1)
                    x = values.index(value % VALUE_SLOTS)
                    upper = x.slice(0, DEPTH, dim=0)
                    lower = x.slice(DEPTH, DEPTH, dim=0)
                    acc, step = two_products(ring, full, empty, step, upper, lower, acc, True, SLOTS)
                value = (2 * count + GROUP) % VALUE_SLOTS
                if chunk > begin:
                    x = values.index(value)
                    upper = x.slice(0, DEPTH, dim=0)
                    lower = x.slice(DEPTH, DEPTH, dim=0)
                    state, step = two_products(ring, full, empty, step, upper, lower, state, True, SLOTS)
                mbarrier.arrive(x_empty.index(value), count=1)
                finish_back(
                    acc, out, value_out, sums, out_ptr, out_stride, value_ptr, scale, real, bias_h_ptr, tiles,
                    end_full, count, row, start, first_e, E, N, GROUP, EVEN, SHIFTED, narrow,
                )  # fmt: skip
                count += 1
            else:
                no_sums(sums + first_e, gl.SliceLayout(0, narrow), SIDE)
    tma.store_wait(0)


@kernel
@gluon.jit
def scan_kernel(
    x, h, a, reader, writer, out, states, value_out, rms_ptr, gain_ptr, bias_x_ptr, bias_h_ptr, carry_ptr, sums_ptr,
    begin_ptr, end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, cut, E_BLOCKS, TASKS, BACK: gl.constexpr,
    SPLIT: gl.constexpr, SKIP: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr, SLOTS: gl.constexpr,
    VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """Forward: `out = silu(u) * (A V + q_lin S)` with `V = silu(x)`, `u` from h, and `S += k_lin^T V` from chunk to
    chunk, which is stored as it was before each chunk, over C.

    BACK, from the last chunk to the first: with x = d_attended and h the values' input, its gradient
    `out = silu'(h) * (A^T x + k_lin dS)`, and `dS += q_lin^T x`. Also stores the values, and per half chunk the sums
    of `out` for the bias.

    BACK, two groups of four warps have `SIDE` of a task's value dimensions each, and share the left factors:
    `reader` is described for tiles of 128 by 64, which come in a ring of `SLOTS`, a and `writer` for tiles of 64 by
    128, x and the states for tiles of 128 by `SIDE`, h, `out` and `value_out` for tiles of 128 by `END`.

    reader, writer: the linear head that multiplies the state, and that whose product with x is added to it.
    SPLIT: what a task walks along: "rows"; "pieces", whose first states are `carry`; or "ends", rows without their
    first `cut` chunks (BACK: the last), which are tasks of their own and before which (behind which) `carry` is the
    rows' state. Where the state is 0 it is neither read nor stored. SKIP: leave out halves of chunks without tokens.
    EVEN: all slots, of what is not left out, have tokens. SHIFTED: a row's first slots have none.
    """
    layout: gl.constexpr = a.layout
    x_full = barriers(VALUE_SLOTS)
    x_empty = barriers(VALUE_SLOTS)
    full = barriers(SLOTS)
    if BACK:
        end_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
        values = gl.allocate_shared_memory(gl.bfloat16, [VALUE_SLOTS, BLOCK, SIDE], layout)
        ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, DEPTH], layout)
        state_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, SIDE], layout)
        tiles = gl.allocate_shared_memory(gl.bfloat16, [END_TILES, BLOCK, END], end_layout)
        # Both groups read the ring.
        empty = barriers(SLOTS, 2)
        end_full = barriers(END_TILES)
        end_empty = barriers(END_TILES)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    multiply_back,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, sums_ptr, values, x_full,
                        x_empty, ring, full, empty, tiles, end_full, end_empty, state_tiles, begin_ptr,
                        end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, cut, E_BLOCKS, TASKS, 0, SPLIT, SKIP,
                        EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_back,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, sums_ptr, values, x_full,
                        x_empty, ring, full, empty, tiles, end_full, end_empty, state_tiles, begin_ptr,
                        end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, cut, E_BLOCKS, TASKS, 1, SPLIT, SKIP,
                        EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    load_values,
                    (
                        x, values, x_full, x_empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT, SKIP,
                        VALUE_SLOTS, SIDE, BLOCK, True,
                    ),
                ),
                (
                    load_back,
                    (
                        a, reader, writer, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS,
                        SPLIT, SKIP, SLOTS,
                    ),
                ),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT,
                        SKIP, BLOCK, END_TILES, True, True,
                    ),
                ),
            ],
            [4, 1, 1, 1],
            [BACK_REGISTERS, 24, 24, 24],
        )  # fmt: skip
    else:
        values = gl.allocate_shared_memory(gl.bfloat16, [VALUE_SLOTS, BLOCK, BLOCK], layout)
        ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, BLOCK], layout)
        state_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BLOCK], layout)
        empty = barriers(SLOTS)
        ready = barriers(VALUE_SLOTS)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    multiply,
                    (
                        out, states, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, values, ready, x_empty, ring, full,
                        empty, state_tile, begin_ptr, end_ptr, out_ptr, out_stride, N, G, shift, cut, E_BLOCKS, TASKS,
                        SPLIT, SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    activate_tiles,
                    (
                        values, x_full, ready, rms_ptr, gain_ptr, bias_x_ptr, begin_ptr, end_ptr, N, G, shift, cut,
                        E_BLOCKS, TASKS, SPLIT, SKIP, EVEN, VALUE_SLOTS, ACTIVATING,
                    ),
                ),
                (
                    load_tiles,
                    (
                        x, h, a, reader, writer, values, x_full, x_empty, ring, full, empty, begin_ptr, end_ptr, N, G,
                        shift, cut, E_BLOCKS, TASKS, SPLIT, SKIP, SLOTS, VALUE_SLOTS,
                    ),
                ),
            ],
            [ACTIVATING, 1],
            [ACTIVATING_REGISTERS, 24],
        )  # fmt: skip
