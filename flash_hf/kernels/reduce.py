# SPDX-License-Identifier: Apache-2.0
"""The products of a chunk's backward that are sums over the value dimensions, for Hopper.

Groups of warps take turns, as hopper.py describes. README.md beside this file has the derivation and the bytes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .common import grid_wait
from .dispatch import kernel
from .hopper import BLOCK, TILE_BYTES, accumulate, barriers, load_async, store_async


# Value dimensions of one step, and steps in flight: with two tiles for the ends they fill the shared memory.
STEP, STAGES = 64, 5


def task_count(rows: int, chunks: int, halves: range, causal: bool) -> int:
    """Tiles of 128 by 128 that are not 0, of so many rows of so many chunks, of which `halves` have tokens."""
    per_row = 7 * chunks - 4 if causal else 8 * chunks
    fewer = (2 if chunks == 1 else 3) if causal else 5
    return rows * (per_row - fewer * (2 * chunks - len(halves)))


@gluon.jit
def place_of(task, N, G, shift, CAUSAL: gl.constexpr, SKIP: gl.constexpr):
    """Row and chunk of a task, which product it belongs to (0: linear queries, 1: scores, 2: linear keys), and the
    halves of the chunk whose tile it is, of the left and of the right factor.

    A chunk has two tiles of linear queries, three (bidirectional: four) of scores, and two of linear keys. CAUSAL: no
    queries in a row's first chunk and no keys in its last, since the state before the first and the gradient of that
    behind the last are 0. SKIP: without tokens in its first or last half, a row has no tiles of that half.
    """
    opens = 0
    closes = 0
    if SKIP:
        opens = gl.where(shift >= BLOCK, 1, 0)
        closes = gl.where(N + shift <= (2 * G - 1) * BLOCK, 1, 0)
    if CAUSAL:
        fewer = gl.where(G == 1, 2, 3)
        per_row = 7 * G - 4 - fewer * (opens + closes)
        row = task // per_row
        tile = task % per_row + 2
        if SKIP:
            # Of the first chunk the tiles 4 and 6, of the last 0 and 2.
            tile = gl.where(opens > 0, gl.where(tile < 4, 2 * tile, tile + fewer), tile)
            tile = gl.where((closes > 0) & (tile == 7 * G - 6), tile + 1, tile)
        chunk = tile // 7
        tile = tile % 7
        product = gl.where(tile < 2, 0, gl.where(tile < 5, 1, 2))
        left = gl.where(tile < 2, tile, gl.where(tile < 5, (tile - 1) // 2, tile - 5))
        right = gl.where(product == 1, tile - 2 - left, 0)
    else:
        per_row = 8 * G - 5 * (opens + closes)
        row = task // per_row
        tile = task % per_row
        if SKIP:
            # Of the first chunk the tiles 1, 5 and 7, of the last 0, 2 and 6.
            tile = gl.where(opens > 0, gl.where(tile < 3, gl.where(tile == 0, 1, 3 + 2 * tile), tile + 5), tile)
            last = tile - 8 * (G - 1)
            tile = gl.where((closes > 0) & (last > 0), tile + gl.where(last == 1, 1, 4), tile)
        chunk = tile // 8
        tile = tile % 8
        product = gl.where(tile < 2, 0, gl.where(tile < 6, 1, 2))
        left = gl.where(product == 1, (tile - 2) // 2, tile % 2)
        right = gl.where(product == 1, tile % 2, 0)
    return row, chunk, product, left, right


@gluon.jit
def load_factors(
    d_attended, value, state, d_state, a, left, right, full, empty, ends, end_full, end_empty, N, G, shift, E, TASKS,
    CAUSAL: gl.constexpr, SKIP: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order."""
    grid_wait()
    step = 0
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row, chunk, product, half, other = place_of(task, N, G, shift, CAUSAL, SKIP)
        group = number % 2
        first = chunk * (2 * BLOCK) - shift
        token = first + half * BLOCK
        state_row = row * BLOCK
        if CAUSAL:
            state_row = (row * G + chunk) * BLOCK
        for start in range(0, E, STEP):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * BLOCK * STEP * 2)
            x = left.index(slot).reshape([1, BLOCK, STEP])
            if product == 2:
                load_async(value, [row, token, start], full.index(slot), x)
                load_async(d_state, [state_row, start], full.index(slot), right.index(slot))
            else:
                load_async(d_attended, [row, token, start], full.index(slot), x)
                if product == 0:
                    load_async(state, [state_row, start], full.index(slot), right.index(slot))
                else:
                    y = right.index(slot).reshape([1, BLOCK, STEP])
                    load_async(value, [row, first + other * BLOCK, start], full.index(slot), y)
            step += 1
        # The tile of the result, in which its weights come.
        mbarrier.wait(end_empty.index(group), (number // 2) & 1)
        if product == 1:
            mbarrier.expect(end_full.index(group), TILE_BYTES)
            place = [(row * G + chunk) * (2 * BLOCK) + half * BLOCK, other * BLOCK]
            load_async(a, place, end_full.index(group), ends.index(group))
        else:
            mbarrier.arrive(end_full.index(group), count=1)
        number += 1


@gluon.jit
def fill_zeros(target_ptr, chunk):
    """256 rows of a head, `[.., 128]`, from a chunk on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    slot = chunk.to(gl.int64) * (2 * BLOCK) + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
    place = gl.expand_dims(slot * BLOCK, 1) + gl.expand_dims(column, 0)
    zeros = gl.zeros([BLOCK, BLOCK], target_ptr.dtype.element_ty, layout)
    gl.store(target_ptr + place, zeros)
    gl.store(target_ptr + place + BLOCK * BLOCK, zeros)


@gluon.jit
def multiply(
    d_score, d_query, d_key, zero_ptr, factor_ptr, left, right, full, empty, turns, ends, end_full, end_empty, ROWS, N,
    G, shift, E, TASKS, GROUP: gl.constexpr, CAUSAL: gl.constexpr, SKIP: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The products themselves, see `reduce_kernel`, for every other task."""
    grid_wait()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    end = ends.index(GROUP)
    if CAUSAL:
        for row in range(gl.program_id(0), ROWS, gl.num_programs(0)):
            if GROUP == 0:
                fill_zeros(zero_ptr, row * G)
            else:
                fill_zeros(zero_ptr, (ROWS + row) * G + G - 1)
    steps = E // STEP
    step = GROUP * steps
    number = 0
    for task in range(gl.program_id(0) + GROUP * gl.num_programs(0), TASKS, 2 * gl.num_programs(0)):
        row, chunk, product, half, other = place_of(task, N, G, shift, CAUSAL, SKIP)
        factor = gl.load(factor_ptr + row * G + chunk)
        acc = accumulate(
            left, right, full, empty, turns, number, step, steps, GROUP, False, True, STAGES, end_empty
        )  # fmt: skip
        step += 2 * steps
        mbarrier.wait(end_full.index(GROUP), number & 1)
        number += 1
        if product == 1:
            acc = acc * 2.0 * gl.sqrt(end.load(mma).to(gl.float32))
        elif product == 0:
            acc = acc * factor
        end.store(acc.to(gl.bfloat16))
        fence_async_shared()
        slot = (row * G + chunk) * (2 * BLOCK) + half * BLOCK
        if product == 1:
            store_async(d_score, [slot, other * BLOCK], end)
        elif product == 0:
            store_async(d_query, [slot, 0], end)
        else:
            store_async(d_key, [slot, 0], end)
    tma.store_wait(0)


@kernel
@gluon.jit
def reduce_kernel(
    d_attended, value, state, d_state, a, d_score, d_query, d_key, zero_ptr, factor_ptr, ROWS, N, G, shift, E, TASKS,
    CAUSAL: gl.constexpr, SKIP: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The products of a chunk's backward that are sums over the value dimensions: the scores' gradients
    `2 sqrt(A) (d_attended V^T)`, the linear query's `f d_attended S^T`, and the linear key's `V dS^T`. CAUSAL: states
    are those of chunks, what lies above the diagonal of the scores' is not written, and what is 0 is not multiplied
    but filled: the query's in each row's first chunk, from `zero` on, where the key's follow, in each row's last;
    otherwise states are those of rows. SKIP: of halves of chunks without tokens nothing else is written.

    Tasks are tiles of 128 by 128.
    """
    left = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, STEP], state.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, STEP], state.layout)
    ends = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, BLOCK], a.layout)
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
                    d_score, d_query, d_key, zero_ptr, factor_ptr, left, right, full, empty, turns, ends,
                    end_full, end_empty, ROWS, N, G, shift, E, TASKS, 0, CAUSAL, SKIP, STEP, STAGES,
                ),
            ),
            (
                multiply,
                (
                    d_score, d_query, d_key, zero_ptr, factor_ptr, left, right, full, empty, turns, ends,
                    end_full, end_empty, ROWS, N, G, shift, E, TASKS, 1, CAUSAL, SKIP, STEP, STAGES,
                ),
            ),
            (
                load_factors,
                (
                    d_attended, value, state, d_state, a, left, right, full, empty, ends, end_full, end_empty, N, G,
                    shift, E, TASKS, CAUSAL, SKIP, STEP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
