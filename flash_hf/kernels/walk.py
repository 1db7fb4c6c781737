# SPDX-License-Identifier: Apache-2.0
"""What the scans for Hopper share: walks along chunks, loads, activations and ends. scan.py says what a scan is."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .common import grid_wait
from .hopper import BLOCK, TILE_BYTES, halves, load_async, reinterpret, sigmoid, store_async


# Warps that activate a forward scan's values, their registers, and the tokens that fit these.
ACTIVATING, ACTIVATING_REGISTERS, PART = gl.constexpr(4), gl.constexpr(72), gl.constexpr(64)
# Columns of a half tile of left factors; tiles of the ends, which are those of one half of a chunk, and their columns.
DEPTH, END_TILES, END = gl.constexpr(64), gl.constexpr(4), gl.constexpr(32)
# Registers of two groups of warps, beside those that activate, and backward.
GROUP_REGISTERS, BACK_REGISTERS = gl.constexpr(208), gl.constexpr(240)


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
def high(tile):
    """Half a tile of 128 by 64 as one of 64 by 128."""
    return reinterpret(tile, gl.bfloat16, [DEPTH, BLOCK], tile.layout)


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
    WIDTH: gl.constexpr = BLOCK,
):  # fmt: skip
    """`activate` for all tiles of values of a forward scan, or of its totals, in its order: what has arrived becomes
    `ready`."""
    grid_wait()
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply`
    step = 0
    first_task, last_task, distance = tasks_of(TASKS, SPLIT)
    for task in range(first_task, last_task, distance):
        _, begin, end = walk_of(task, begin_ptr, end_ptr, G, cut, E_BLOCKS, TASKS, False, SPLIT)
        columns = (task % E_BLOCKS) * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
        bias = gl.load(bias_ptr + columns).to(gl.float32)
        for half in range(2 * begin, 2 * end):
            token = (half % (2 * G)) * BLOCK - shift
            if not SKIP or has_tokens(token, N):
                slot = step % VALUE_SLOTS
                row = half // (2 * G)
                # Before the tile arrives, and in parts, since more does not fit the registers.
                rows: gl.constexpr = gl.SliceLayout(1, wide)
                scale_0, real_0 = gain_of(rms_ptr, gain, row, token, N, EVEN, rows, PART)
                scale_1, real_1 = gain_of(rms_ptr, gain, row, token + PART, N, EVEN, rows, PART)
                mbarrier.wait(x_full.index(slot), (step // VALUE_SLOTS) & 1)
                tile = values.index(slot)
                activate(tile.slice(0, PART, dim=0), scale_0, real_0, bias, EVEN, wide)
                activate(tile.slice(PART, PART, dim=0), scale_1, real_1, bias, EVEN, wide)
                fence_async_shared()
                mbarrier.arrive(ready.index(slot), count=1)
                step += 1


@gluon.jit
def gate(
    tile, values, acc, scale, real, bias_ptr, sums_ptr, out_ptr, out_stride, value_ptr, E, token, before,
    first: gl.constexpr, BACK: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr, layout: gl.constexpr,
    WIDTH: gl.constexpr = BLOCK // 2, h=None,
):  # fmt: skip
    """The end of `WIDTH` columns of a tile, which begin at `first`: `tile` holds `h`, if it is not given, and takes
    `silu(h) acc`; BACK, it takes `silu'(h) acc`, whose sums go to `sums`, and `values` takes `silu(h)`.

    SHIFTED: where the tile begins `before` its row, which the memory accelerator reads but does not write, its tokens,
    from `token` on, are stored from here."""
    columns = first + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    tile = tile.slice(first, WIDTH, dim=1)
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
def finish_half(
    acc, out, out_ptr, out_stride, scale, real, bias_ptr, tiles, full, empty, number, row, token, column, N,
    GROUP: gl.constexpr, EVEN: gl.constexpr, SHIFTED: gl.constexpr, layout: gl.constexpr, WIDTH: gl.constexpr = BLOCK,
    TILES: gl.constexpr = END_TILES, BACK: gl.constexpr = False, value_out=None, value_tile=None, value_ptr=None,
    sums_ptr=None, E=0,
):  # fmt: skip
    """The end of the group's half of this number: `gate` in parts of `END` columns, since more does not fit the
    registers. With more tiles than parts each group has tiles of its own. BACK, values leave by a tile of the group's
    own."""
    middle: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH // 2, 16]
    )
    scale = gl.expand_dims(scale, 1)
    real = gl.expand_dims(real, 1)
    before = token < 0
    own: gl.constexpr = GROUP * (WIDTH // END) % TILES
    step = number * ((WIDTH // END + TILES - 1) // TILES)
    sides = halves(acc, middle)
    for side in gl.static_range(2):
        if WIDTH == BLOCK:
            quarters = halves(sides[side], layout)
        for quarter in gl.static_range(WIDTH // END // 2):
            part = side * (WIDTH // END // 2) + quarter
            first = column + part * END
            tile = tiles.index((own + part) % TILES)
            mbarrier.wait(full.index(GROUP * TILES + (own + part) % TILES), (step + part // TILES) & 1)
            gate(
                tile, value_tile if BACK else tile, quarters[quarter] if WIDTH == BLOCK else sides[side], scale, real,
                bias_ptr + first, sums_ptr + first if BACK else bias_ptr, out_ptr + first, out_stride,
                value_ptr + first if BACK else out_ptr, E, row * N + token, before, 0, BACK, EVEN, SHIFTED, layout,
                END,
            )  # fmt: skip
            fence_async_shared()
            if not SHIFTED or not before:
                if BACK:
                    store_async(value_out, [row, token, first], value_tile.reshape([1, BLOCK, END]))
                store_async(out, [row, token, first], tile.reshape([1, BLOCK, END]))
            if part > 0:
                tma.store_wait(2 if BACK else 1)
                mbarrier.arrive(empty.index((own + part - 1) % TILES), count=1)
    tma.store_wait(0)
    mbarrier.arrive(empty.index((own + WIDTH // END - 1) % TILES), count=1)


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
            out_stride, value_ptr + first, E, row * N + token, before, 0, True, EVEN, SHIFTED, layout, END,
            h_0 if part == 0 else h_1,
        )  # fmt: skip
        fence_async_shared()
        if not SHIFTED or not before:
            store_async(value_out, [row, token, first], value_tile.reshape([1, BLOCK, END]))
            store_async(out, [row, token, first], tile.reshape([1, BLOCK, END]))


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
    DOWN: gl.constexpr = False,
):  # fmt: skip
    """The values' tiles that `multiply_half` reads, of `ROWS` tokens, in its order; or with DOWN those of
    `multiply_back`, one for each group."""
    grid_wait()
    step = 0
    SIDES: gl.constexpr = 2 if DOWN else 1
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
    SKIP: gl.constexpr, WIDTH: gl.constexpr = BLOCK, TILES: gl.constexpr = END_TILES, OWN: gl.constexpr = False,
    DOWN: gl.constexpr = False,
):  # fmt: skip
    """What `finish_half` reads: for both groups the same tiles, or with `TILES` for two halves those of each group,
    whose arrivals each group waits for at barriers of its own; or with OWN what `finish_back` reads, whose groups have
    tiles of their own."""
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
