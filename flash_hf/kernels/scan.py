# SPDX-License-Identifier: Apache-2.0
"""Scans over the chunks of a document, for Hopper: one program walks along some chunks for 128 value dimensions, keeps
the state in the tensor cores' accumulators, and leaves nothing to be read again but what the backward needs.

Written in Gluon, which comes with triton: tiles go by the tensor memory accelerator into rings in shared memory, each
filled by one warp ahead of the two groups of four warps that multiply, which have 64 value dimensions each. README.md
beside this file derives them.
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
from .hopper import BLOCK, TILE_BYTES, barriers, halves, load_async, reinterpret, sigmoid, store_async


# Tiles of 128 by 128: of the rings of totals, and of the values of `whole_kernel`, whose tiles stay longer.
SLOTS, VALUE_SLOTS = 3, 3
# Warps that activate a forward scan's values, and those of its totals, their registers, and the tokens that fit these.
ACTIVATING, TOTALS_ACTIVATING, ACTIVATING_REGISTERS = gl.constexpr(4), gl.constexpr(8), gl.constexpr(72)
PART = gl.constexpr(64)
# Of `whole_kernel`: the ring's tiles and their columns, tiles of the ends and their columns, and registers of the two
# groups of warps. Backward: halves of tiles of x, tiles of the ends, which are those of one half, and registers.
DEPTH_SLOTS, DEPTH, END_TILES, END = 5, gl.constexpr(64), gl.constexpr(2), gl.constexpr(32)
GROUP_REGISTERS = gl.constexpr(208)
BACK_VALUE_SLOTS, BACK_END_TILES, BACK_REGISTERS = 4, gl.constexpr(4), gl.constexpr(240)
# Of `scan_kernel`: the ring's tiles, those of values, and value dimensions of a group of warps.
SIDE_SLOTS, SIDE_VALUE_SLOTS, SIDE = 6, 4, gl.constexpr(64)


@gluon.jit
def tasks_of(TASKS, SPLIT: gl.constexpr):
    """This program's tasks: the first, the end and the distance of the others. Programs take tasks in turn, but with
    SPLIT "ends" the first half of the tasks have a program each, and the other programs share the second."""
    first = gl.program_id(0)
    end = TASKS
    distance = gl.num_programs(0)
    if SPLIT == "ends":
        long = TASKS // 2
        end = gl.where(first < long, long, TASKS)
        distance = gl.where(first < long, distance, distance - long)
    return first, end, distance


@gluon.jit
def walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, BACK: gl.constexpr, SPLIT: gl.constexpr):
    """Row or piece of a task, and the first and last chunk (exclusive) of its walk, see `scan_kernel`; with SPLIT
    "cut" only the `cut` chunks that "ends" cuts off."""
    walk = task // E_BLOCKS
    if SPLIT == "pieces":
        begin = gl.load(begin_ptr + walk)
        end = gl.load(end_ptr + walk)
    else:
        if SPLIT == "ends":
            walk = walk % (TASKS // (2 * E_BLOCKS))
        begin = walk * G
        end = begin + G
        if SPLIT == "ends":
            border = end - cut if BACK else begin + cut
            if (task >= TASKS // 2) == BACK:
                begin = border
            else:
                end = border
        elif SPLIT == "cut":
            if BACK:
                begin = end - cut
            else:
                end = begin + cut
    return walk, begin, end


@gluon.jit
def has_tokens(first, N):
    """Whether a row has tokens in the 128 slots from that of token `first` on."""
    return (first > -BLOCK) & (first < N)


@gluon.jit
def fetch(x, place, ring, full, empty, step, SLOTS: gl.constexpr):
    """Load a tile into the ring's next slot, once it is free."""
    slot = step % SLOTS
    mbarrier.wait(empty.index(slot), ((step // SLOTS) & 1) ^ 1)
    mbarrier.expect(full.index(slot), TILE_BYTES)
    load_async(x, place, full.index(slot), ring.index(slot))
    return step + 1


@gluon.jit
def fetch_tokens(
    x, place, ring, full, empty, step, SLOTS: gl.constexpr, WIDTH: gl.constexpr = BLOCK, ROWS: gl.constexpr = BLOCK
):
    slot = step % SLOTS
    mbarrier.wait(empty.index(slot), ((step // SLOTS) & 1) ^ 1)
    mbarrier.expect(full.index(slot), ROWS * WIDTH * 2)
    load_async(x, place, full.index(slot), ring.index(slot).reshape([1, ROWS, WIDTH]))
    return step + 1


@gluon.jit
def high(tile):
    """Half a tile of 128 by 64 as one of 64 by 128."""
    return reinterpret(tile, gl.bfloat16, [DEPTH, BLOCK], tile.layout)


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
def gain_of(rms_ptr, gain, row, token, N, EVEN: gl.constexpr, layout: gl.constexpr, COUNT: gl.constexpr = BLOCK):
    """`g / rms(x)` of `COUNT` tokens of a row from `token` on, and which of them there are."""
    place = token + gl.arange(0, COUNT, layout)
    real = (place >= 0) & (place < N)
    if EVEN:
        return gl.load(rms_ptr + row * N + place) * gain, real
    else:
        return gl.load(rms_ptr + row * N + place, mask=real, other=0.0) * gain, real


@gluon.jit
def activate(values, scale, real, bias, EVEN: gl.constexpr, layout: gl.constexpr):
    """In shared memory: what the projection gave becomes values `silu(h)`, 0 where there is no token. A fence must
    follow before products read them."""
    h = values.load(layout).to(gl.float32) * gl.expand_dims(scale, 1) + gl.expand_dims(bias, 0)
    value = h * sigmoid(h)
    if not EVEN:
        value = gl.where(gl.expand_dims(real, 1), value, 0.0)
    values.store(value.to(gl.bfloat16))


@gluon.jit
def activate_tiles(
    values, x_full, ready, rms_ptr, gain_ptr, bias_ptr, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS,
    SPLIT: gl.constexpr, SKIP: gl.constexpr, EVEN: gl.constexpr, VALUE_SLOTS: gl.constexpr, WARPS: gl.constexpr,
    WIDTH: gl.constexpr = BLOCK, SIDES: gl.constexpr = 1,
):  # fmt: skip
    """`activate` for all tiles of values of a forward scan, or of its totals, in its order: what has arrived becomes
    `ready`. Tokens have as many tiles as SIDES."""
    grid_wait()
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in `multiply_side`
    step = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        _, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, False, SPLIT)
        columns = (task % E_BLOCKS) * (SIDES * WIDTH) + gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
        bias = gl.load(bias_ptr + columns).to(gl.float32)
        if SIDES == 2:
            bias_1 = gl.load(bias_ptr + columns + WIDTH).to(gl.float32)
        for half in range(2 * begin, 2 * end):
            token = (half % (2 * G)) * BLOCK - shift
            if not SKIP or has_tokens(token, N):
                row = half // (2 * G)
                # Before the tile arrives, and in parts, since more does not fit the registers.
                rows: gl.constexpr = gl.SliceLayout(1, wide)
                scale_0, real_0 = gain_of(rms_ptr, gain, row, token, N, EVEN, rows, PART)
                scale_1, real_1 = gain_of(rms_ptr, gain, row, token + PART, N, EVEN, rows, PART)
                for side in gl.static_range(SIDES):
                    slot = step % VALUE_SLOTS
                    mbarrier.wait(x_full.index(slot), (step // VALUE_SLOTS) & 1)
                    tile = values.index(slot)
                    side_bias = bias if side == 0 else bias_1
                    activate(tile.slice(0, PART, dim=0), scale_0, real_0, side_bias, EVEN, wide)
                    activate(tile.slice(PART, PART, dim=0), scale_1, real_1, side_bias, EVEN, wide)
                    fence_async_shared()
                    mbarrier.arrive(ready.index(slot), count=1)
                    step += 1


@gluon.jit
def gate(
    tile, values, acc, scale, real, bias_ptr, sums_ptr, out_ptr, out_stride, value_ptr, E, token, before,
    BACK: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr, layout: gl.constexpr, h=None,
):  # fmt: skip
    """The end of `END` columns: `tile` holds `h`, if it is not given, and takes `silu(h) acc`; BACK, it takes
    `silu'(h) acc`, whose sums go to `sums`, and `values` takes `silu(h)`.

    SHIFTED: where the tile begins `before` its row, which the memory accelerator reads but does not write, its tokens,
    from `token` on, are stored from here."""
    columns = gl.arange(0, END, gl.SliceLayout(0, layout))
    held: gl.constexpr = h is not None
    if not held:
        h = tile.load(layout)
    h = h.to(gl.float32) * scale + gl.expand_dims(gl.load(bias_ptr + columns).to(gl.float32), 0)
    if BACK:
        s = sigmoid(h)
        value = (h * s).to(gl.bfloat16)
        if not held:
            # The values before have been stored from the same tile, and then `out`.
            tma.store_wait(1)
            values.store(value)
        acc = acc * (s * (1.0 + h * (1.0 - s)))
        if not EVEN:
            acc = gl.where(real, acc, 0.0)
        gl.store(sums_ptr + columns, gl.sum(acc, 0))
        acc = acc * scale
        if held:
            # Late, so that nothing waits: both tiles are still being stored.
            tma.store_wait(0)
            values.store(value)
    else:
        # The backward recovers the attended value as out / silu(h): h must not be 0.
        h = gl.where(h == 0.0, 1e-20, h)
        acc = acc * (h * sigmoid(h))
    result = acc.to(gl.bfloat16)
    tile.store(result)
    if SHIFTED:
        if before:
            place = gl.expand_dims(token + gl.arange(0, BLOCK, gl.SliceLayout(1, layout)), 1).to(gl.int64)
            gl.store(out_ptr + place * out_stride + gl.expand_dims(columns, 0), result, mask=real)
            if BACK:
                gl.store(value_ptr + place * E + gl.expand_dims(columns, 0), value, mask=real)


@gluon.jit
def no_sums(sums_ptr, layout: gl.constexpr, COUNT: gl.constexpr = BLOCK):
    """The sums of half a chunk without tokens."""
    gl.store(sums_ptr + gl.arange(0, COUNT, layout), gl.zeros([COUNT], gl.float32, layout))


@gluon.jit
def half_of(number, begin, end, DOWN: gl.constexpr):
    """The half, of all chunks' halves, of this number in a walk, or with DOWN in one from the last chunk to the first,
    in which a chunk's halves keep their order."""
    if DOWN:
        return 2 * (end - 1 - number // 2) + number % 2
    else:
        return 2 * begin + number


@gluon.jit
def load_values(
    x, values, x_full, x_empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT: gl.constexpr,
    SKIP: gl.constexpr, VALUE_SLOTS: gl.constexpr, WIDTH: gl.constexpr = BLOCK, ROWS: gl.constexpr = BLOCK,
    SIDES: gl.constexpr = 1, DOWN: gl.constexpr = False,
):  # fmt: skip
    """The values' tiles that `multiply_half` reads, of `ROWS` tokens, in its order; or with two SIDES those of
    `multiply_side`, one for each group."""
    grid_wait()
    step = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        _, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, DOWN, SPLIT)
        for number in range(0, 2 * (end - begin)):
            half = half_of(number, begin, end, DOWN)
            token = (half % (2 * G)) * BLOCK - shift
            if not SKIP or has_tokens(token, N):
                for first in gl.static_range(0, BLOCK, ROWS):
                    for side in gl.static_range(SIDES):
                        place = [half // (2 * G), token + first, ((task % E_BLOCKS) * SIDES + side) * WIDTH]
                        step = fetch_tokens(x, place, values, x_full, x_empty, step, VALUE_SLOTS, WIDTH, ROWS)


@gluon.jit
def load_ends(
    h, tiles, full, empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT: gl.constexpr,
    SKIP: gl.constexpr, WIDTH: gl.constexpr, TILES: gl.constexpr, OWN: gl.constexpr = False,
    DOWN: gl.constexpr = False,
):  # fmt: skip
    """What `finish_half` reads: for both groups the same tiles, whose arrivals each group waits for at barriers of its
    own; or with OWN those of groups that have tiles of their own."""
    grid_wait()
    step = 0
    group = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        _, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, DOWN, SPLIT)
        for number in range(0, 2 * (end - begin)):
            half = half_of(number, begin, end, DOWN)
            token = (half % (2 * G)) * BLOCK - shift
            if not SKIP or has_tokens(token, N):
                for first in gl.static_range(0, WIDTH, END):
                    place = [half // (2 * G), token, (task % E_BLOCKS) * WIDTH + first]
                    slot = step % TILES
                    arrived = full.index(slot if OWN else group * TILES + slot)
                    mbarrier.wait(empty.index(slot), ((step // TILES) & 1) ^ 1)
                    mbarrier.expect(arrived, BLOCK * END * 2)
                    load_async(h, place, arrived, tiles.index(slot).reshape([1, BLOCK, END]))
                    step += 1
                group = 1 - group


@gluon.jit
def fetch_half(x, row, column, ring, full, empty, step, SLOTS: gl.constexpr, HIGH: gl.constexpr = False):
    """Load half a tile, 128 by 64, or with HIGH 64 by 128, into the ring's next slot, once it is free."""
    slot = step % SLOTS
    mbarrier.wait(empty.index(slot), ((step // SLOTS) & 1) ^ 1)
    mbarrier.expect(full.index(slot), BLOCK * DEPTH * 2)
    load_async(x, [row, column], full.index(slot), high(ring.index(slot)) if HIGH else ring.index(slot))
    return step + 1


@gluon.jit
def fetch_depths(x, row, column, ring, full, empty, step, SLOTS: gl.constexpr, HIGH: gl.constexpr = False):
    """Load the left and the right half of a tile, or with HIGH the upper and the lower."""
    for depth in gl.static_range(0, BLOCK, DEPTH):
        if HIGH:
            step = fetch_half(x, row + depth, column, ring, full, empty, step, SLOTS, HIGH)
        else:
            step = fetch_half(x, row, column + depth, ring, full, empty, step, SLOTS)
    return step


@gluon.jit
def load_sides(
    a, reader, writer, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, BACK: gl.constexpr,
    SPLIT: gl.constexpr, SKIP: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The left factors that `multiply_side` reads, in its order."""
    grid_wait()
    step = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        _, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, BACK, SPLIT)
        border = end if BACK else begin
        for number in range(0, 2 * (end - begin)):
            half = half_of(number, begin, end, BACK)
            chunk = half // 2
            reads = number > 1
            if SPLIT != "rows":
                reads = reads | (border % G != 0)
            token = (chunk % G) * (2 * BLOCK) - shift
            if not SKIP or has_tokens(token + (half % 2) * BLOCK, N):
                if reads:
                    step = fetch_depths(reader, half * BLOCK, 0, ring, full, empty, step, SLOTS)
                for other in gl.static_range(2):
                    seen = half % 2 <= other if BACK else half % 2 >= other
                    if SKIP:
                        seen = seen & has_tokens(token + other * BLOCK, N)
                    if seen:
                        if BACK:
                            slot = (2 * chunk + other) * BLOCK
                            step = fetch_depths(a, slot, (half % 2) * BLOCK, ring, full, empty, step, SLOTS, True)
                        else:
                            step = fetch_depths(a, half * BLOCK, other * BLOCK, ring, full, empty, step, SLOTS)
                if chunk > begin if BACK else chunk < end - 1:
                    step = fetch_depths(writer, half * BLOCK, 0, ring, full, empty, step, SLOTS, True)


@gluon.jit
def finish_back(
    acc, out, value_out, sums_ptr, out_ptr, out_stride, value_ptr, scale, real, bias_ptr, tiles, full, number, row,
    token, column, E, N, GROUP: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """`finish_half`, BACK, for 64 columns: each group has two of the ends' tiles. h goes to registers, so that values
    leave by the first and `out` by the second, which are still being stored."""
    scale = gl.expand_dims(scale, 1)
    real = gl.expand_dims(real, 1)
    before = token < 0
    sides = halves(acc, layout)
    value_tile = tiles.index(2 * GROUP)
    tile = tiles.index(2 * GROUP + 1)
    mbarrier.wait(full.index(2 * GROUP), number & 1)
    mbarrier.wait(full.index(2 * GROUP + 1), number & 1)
    h_0 = value_tile.load(layout)
    h_1 = tile.load(layout)
    for part in gl.static_range(2):
        first = column + part * END
        gate(
            tile, value_tile, sides[part], scale, real, bias_ptr + first, sums_ptr + first, out_ptr + first,
            out_stride, value_ptr + first, E, row * N + token, before, True, EVEN, SHIFTED, layout,
            h_0 if part == 0 else h_1,
        )  # fmt: skip
        fence_async_shared()
        if not SHIFTED or not before:
            store_async(value_out, [row, token, first], value_tile.reshape([1, BLOCK, END]))
            store_async(out, [row, token, first], tile.reshape([1, BLOCK, END]))


@gluon.jit
def leave_ends(end_empty, stores, GROUP: gl.constexpr, BACK: gl.constexpr):
    """Frees the tiles of the group's end before, whose stores have had the time of a product; forward, the first is
    free. A state that this chunk `stores` came last."""
    if stores:
        tma.store_wait(1)
    else:
        tma.store_wait(0)
    if BACK:
        mbarrier.arrive(end_empty.index(2 * GROUP), count=1)
    mbarrier.arrive(end_empty.index(2 * GROUP + 1), count=1)


@gluon.jit
def multiply_side(
    out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, sums_ptr, values, ready, x_empty, ring, full,
    empty, tiles, end_full, end_empty, state_tiles, begin_ptr, end_ptr, out_ptr, out_stride, value_ptr, N, G, shift,
    cut, E_BLOCKS, TASKS, GROUP: gl.constexpr, BACK: gl.constexpr, SPLIT: gl.constexpr, SKIP: gl.constexpr,
    EVEN: gl.constexpr, SHIFTED: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr,
):  # fmt: skip
    """The scan itself, see `scan_kernel`, for `SIDE` of a task's value dimensions."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SIDE, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, END, 16])
    E = E_BLOCKS * BLOCK
    CHUNK: gl.constexpr = 2 * BLOCK
    gain = gl.load(gain_ptr).to(gl.float32)
    # A gain of exactly 0 would hide its own gradient, which is recovered by a division.
    gain = gl.where(gain == 0.0, 1e-20, gain)
    state_tile = state_tiles.index(GROUP)
    # Halves with tokens before.
    count = 0
    step = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        walk, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, BACK, SPLIT)
        border = end if BACK else begin
        first_e = (task % E_BLOCKS) * BLOCK + GROUP * SIDE
        state = gl.zeros([BLOCK, SIDE], gl.float32, mma)
        if SPLIT != "rows":
            if border % G != 0:
                s = gl.arange(0, BLOCK, gl.SliceLayout(1, mma))
                columns = first_e + gl.arange(0, SIDE, gl.SliceLayout(0, mma))
                place = walk.to(gl.int64) * BLOCK * E + gl.expand_dims(s * E, 1) + gl.expand_dims(columns, 0)
                state = gl.load(carry_ptr + place).to(gl.float32) * CHUNK
        for number in range(0, 2 * (end - begin)):
            half = half_of(number, begin, end, BACK)
            chunk = half // 2
            row = chunk // G
            token = (chunk % G) * CHUNK - shift
            start = token + (half % 2) * BLOCK
            reads = number > 1
            if SPLIT != "rows":
                reads = reads | (border % G != 0)
            stores = reads & (half % 2 == 0)
            if stores:
                # The state before has been stored: each chunk has tokens, and ends wait.
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
                if BACK or reads:
                    if count > 0:
                        leave_ends(end_empty, stores, GROUP, BACK)
                # Of the chunk's two halves, those that this one sees: BACK the later, else the earlier.
                others = 2 - half % 2 if BACK else 1 + half % 2
                if SKIP:
                    others = gl.where(has_tokens(token + (BLOCK if BACK else 0), N), others, 1)
                first = count if BACK else count + 1 - others
                for other in range(others):
                    value = 2 * (first + other) + GROUP
                    mbarrier.wait(ready.index(value % VALUE_SLOTS), (value // VALUE_SLOTS) & 1)
                    x = values.index(value % VALUE_SLOTS)
                    upper = x.slice(0, DEPTH, dim=0)
                    lower = x.slice(DEPTH, DEPTH, dim=0)
                    acc, step = two_products(ring, full, empty, step, upper, lower, acc, BACK, SLOTS)
                    if not BACK:
                        if first + other < count:
                            mbarrier.arrive(x_empty.index(value % VALUE_SLOTS), count=1)
                if not BACK:
                    if count > 0 and not reads:
                        leave_ends(end_empty, stores, GROUP, BACK)
                value = (2 * count + GROUP) % VALUE_SLOTS
                if chunk > begin if BACK else chunk < end - 1:
                    x = values.index(value)
                    upper = x.slice(0, DEPTH, dim=0)
                    lower = x.slice(DEPTH, DEPTH, dim=0)
                    state, step = two_products(ring, full, empty, step, upper, lower, state, True, SLOTS)
                if BACK:
                    mbarrier.arrive(x_empty.index(value), count=1)
                    finish_back(
                        acc, out, value_out, sums, out_ptr, out_stride, value_ptr, scale, real, bias_h_ptr, tiles,
                        end_full, count, row, start, first_e, E, N, GROUP, EVEN, SHIFTED, narrow,
                    )  # fmt: skip
                else:
                    # The chunk's second half reads the first's values, too.
                    last = half % 2 == 1
                    if SKIP:
                        last = last | (token + BLOCK >= N)
                    if last:
                        mbarrier.arrive(x_empty.index(value), count=1)
                    finish_half(
                        acc, out, out_ptr, out_stride, scale, real, bias_h_ptr, tiles, end_full, end_empty, count, row,
                        start, first_e, N, GROUP, EVEN, SHIFTED, narrow, SIDE, OWN=True,
                    )  # fmt: skip
                count += 1
            elif BACK:
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

    Two groups of four warps have `SIDE` of a task's value dimensions each, and share the left factors: `reader` and
    forward a are described for tiles of 128 by 64, which come in a ring of `SLOTS`, `writer` and backward a, which are
    transposed, for tiles of 64 by 128, x and the states for tiles of 128 by `SIDE`, h, `out` and `value_out` for tiles
    of 128 by `END`.

    reader, writer: the linear head that multiplies the state, and that whose product with x is added to it.
    SPLIT: what a task walks along: "rows"; "pieces", whose first states are `carry`; or "ends", rows without their
    first `cut` chunks (BACK: the last), which are tasks of their own and before which (behind which) `carry` is the
    rows' state. Where the state is 0 it is neither read nor stored. SKIP: leave out halves of chunks without tokens.
    EVEN: all slots, of what is not left out, have tokens. SHIFTED: a row's first slots have none.
    """
    layout: gl.constexpr = a.layout
    end_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    values = gl.allocate_shared_memory(gl.bfloat16, [VALUE_SLOTS, BLOCK, SIDE], layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, DEPTH], layout)
    state_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, SIDE], layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [BACK_END_TILES, BLOCK, END], end_layout)
    x_full = barriers(VALUE_SLOTS)
    x_empty = barriers(VALUE_SLOTS)
    full = barriers(SLOTS)
    # Both groups read the ring.
    empty = barriers(SLOTS, 2)
    end_full = barriers(BACK_END_TILES)
    end_empty = barriers(BACK_END_TILES)
    ready = x_full if BACK else barriers(VALUE_SLOTS)
    fence_async_shared()
    if BACK:
        gl.warp_specialize(
            [
                (
                    multiply_side,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, sums_ptr, values, ready,
                        x_empty, ring, full, empty, tiles, end_full, end_empty, state_tiles, begin_ptr,
                        end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, cut, E_BLOCKS, TASKS, 0, BACK, SPLIT,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_side,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, sums_ptr, values, ready,
                        x_empty, ring, full, empty, tiles, end_full, end_empty, state_tiles, begin_ptr,
                        end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, cut, E_BLOCKS, TASKS, 1, BACK, SPLIT,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    load_values,
                    (
                        x, values, x_full, x_empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT, SKIP,
                        VALUE_SLOTS, SIDE, BLOCK, 2, BACK,
                    ),
                ),
                (
                    load_sides,
                    (
                        a, reader, writer, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS,
                        BACK, SPLIT, SKIP, SLOTS,
                    ),
                ),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT,
                        SKIP, BLOCK, BACK_END_TILES, True, BACK,
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
                    multiply_side,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, sums_ptr, values, ready,
                        x_empty, ring, full, empty, tiles, end_full, end_empty, state_tiles, begin_ptr,
                        end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, cut, E_BLOCKS, TASKS, 0, BACK, SPLIT,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    multiply_side,
                    (
                        out, states, value_out, rms_ptr, gain_ptr, bias_h_ptr, carry_ptr, sums_ptr, values, ready,
                        x_empty, ring, full, empty, tiles, end_full, end_empty, state_tiles, begin_ptr,
                        end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, cut, E_BLOCKS, TASKS, 1, BACK, SPLIT,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS,
                    ),
                ),
                (
                    activate_tiles,
                    (
                        values, x_full, ready, rms_ptr, gain_ptr, bias_x_ptr, begin_ptr, end_ptr, N, G, shift, cut,
                        E_BLOCKS, TASKS, SPLIT, SKIP, EVEN, VALUE_SLOTS, ACTIVATING, SIDE, 2,
                    ),
                ),
                (
                    load_values,
                    (
                        x, values, x_full, x_empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT, SKIP,
                        VALUE_SLOTS, SIDE, BLOCK, 2, BACK,
                    ),
                ),
                (
                    load_sides,
                    (
                        a, reader, writer, ring, full, empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS,
                        BACK, SPLIT, SKIP, SLOTS,
                    ),
                ),
                (
                    load_ends,
                    (
                        h, tiles, end_full, end_empty, begin_ptr, end_ptr, N, G, shift, cut, E_BLOCKS, TASKS, SPLIT,
                        SKIP, BLOCK, BACK_END_TILES, True, BACK,
                    ),
                ),
            ],
            [4, ACTIVATING, 1, 1, 1],
            [GROUP_REGISTERS, ACTIVATING_REGISTERS, 24, 24, 24],
        )  # fmt: skip


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
def finish_half(
    acc, out, out_ptr, out_stride, scale, real, bias_ptr, tiles, full, empty, number, row, token, column, N,
    GROUP: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr, layout: gl.constexpr, WIDTH: gl.constexpr = BLOCK,
    TILES: gl.constexpr = END_TILES, BACK: gl.constexpr = False, value_out=None, value_tile=None, value_ptr=None,
    sums_ptr=None, E=0, OWN: gl.constexpr = False,
):  # fmt: skip
    """The end of the group's half of this number: `gate` in parts of `END` columns, since more does not fit the
    registers. BACK, values leave by a tile of the group's own. OWN, each group has `TILES` of its own, of which the
    last is still being stored."""
    middle: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH // 2, 16]
    )
    scale = gl.expand_dims(scale, 1)
    real = gl.expand_dims(real, 1)
    before = token < 0
    step = number * (WIDTH // END // TILES)
    own: gl.constexpr = GROUP * TILES if OWN else 0
    sides = halves(acc, middle)
    for side in gl.static_range(2):
        if WIDTH == BLOCK:
            quarters = halves(sides[side], layout)
        for quarter in gl.static_range(WIDTH // END // 2):
            part = side * (WIDTH // END // 2) + quarter
            first = column + part * END
            tile = tiles.index(own + part % TILES)
            mbarrier.wait(full.index(GROUP * TILES + part % TILES), (step + part // TILES) & 1)
            gate(
                tile, value_tile if BACK else tile, quarters[quarter] if WIDTH == BLOCK else sides[side], scale, real,
                bias_ptr + first, sums_ptr + first if BACK else bias_ptr, out_ptr + first, out_stride,
                value_ptr + first if BACK else out_ptr, E, row * N + token, before, BACK, EVEN, SHIFTED, layout,
            )  # fmt: skip
            fence_async_shared()
            if not SHIFTED or not before:
                if BACK:
                    store_async(value_out, [row, token, first], value_tile.reshape([1, BLOCK, END]))
                store_async(out, [row, token, first], tile.reshape([1, BLOCK, END]))
            if part > 0:
                tma.store_wait(2 if BACK else 1)
                mbarrier.arrive(empty.index(own + (part - 1) % TILES), count=1)
    if not OWN:
        tma.store_wait(0)
        mbarrier.arrive(empty.index((WIDTH // END - 1) % TILES), count=1)


@gluon.jit
def multiply_half(
    out, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full, empty, turns, tiles,
    value_tiles, end_full, end_empty, state_tile, state_full, state_empty, begin_ptr, end_ptr, out_ptr, out_stride,
    value_ptr, N, G, shift, E_BLOCKS, TASKS, GROUP: gl.constexpr, BACK: gl.constexpr, SKIP: gl.constexpr,
    EVEN: gl.constexpr, SHIFTED: gl.constexpr, SLOTS: gl.constexpr, VALUE_SLOTS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """What `whole_kernel` computes, for every other half of a chunk."""
    grid_wait()
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, END, 16])
    E = E_BLOCKS * BLOCK
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in `multiply_side`
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
                    start, (task % E_BLOCKS) * BLOCK, N, GROUP, EVEN, SHIFTED, narrow, BLOCK, TILES, BACK, value_out,
                    value_tiles.index(GROUP), value_ptr, sums_ptr + (chunk * 2 + half) * E, E,
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
    TILES: gl.constexpr = BACK_END_TILES
    values = gl.allocate_shared_memory(gl.bfloat16, [VALUE_SLOTS, ROWS, BLOCK], layout)
    state_tile = gl.allocate_shared_memory(gl.bfloat16, [BLOCK, BLOCK], layout)
    ring = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, BLOCK, DEPTH], layout)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [TILES, BLOCK, END], end_layout)
    # Both groups read values and states.
    x_full = barriers(VALUE_SLOTS)
    x_empty = barriers(VALUE_SLOTS, 2)
    state_full = barriers(1)
    state_empty = barriers(1, 2)
    full = barriers(SLOTS)
    empty = barriers(SLOTS)
    turns = barriers(2)
    end_full = barriers(2 * TILES)
    end_empty = barriers(TILES)
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
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS, TILES,
                    ),
                ),
                (
                    multiply_half,
                    (
                        out, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full,
                        empty, turns, tiles, value_tiles, end_full, end_empty, state_tile, state_full, state_empty,
                        begin_ptr, end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 1, BACK,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS, TILES,
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
                        SKIP, BLOCK, TILES,
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
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS, TILES,
                    ),
                ),
                (
                    multiply_half,
                    (
                        out, value_out, rms_ptr, gain_ptr, bias_h_ptr, sums_ptr, values, ready, x_empty, ring, full,
                        empty, turns, tiles, value_tiles, end_full, end_empty, state_tile, state_full, state_empty,
                        begin_ptr, end_ptr, out_ptr, out_stride, value_ptr, N, G, shift, E_BLOCKS, TASKS, 1, BACK,
                        SKIP, EVEN, SHIFTED, SLOTS, VALUE_SLOTS, TILES,
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
                        SKIP, BLOCK, TILES,
                    ),
                ),
            ],
            [4, ACTIVATING, 1, 1, 1],
            [GROUP_REGISTERS, ACTIVATING_REGISTERS, 24, 24, 24],
        )  # fmt: skip


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
