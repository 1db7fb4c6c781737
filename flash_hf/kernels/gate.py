# SPDX-License-Identifier: Apache-2.0
"""The gate's gradient as the epilogue of the product that gives the gated output's gradient, for Hopper.

Groups of warps take turns, as hopper.py describes. README.md beside this file has the derivation and the bytes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .common import grid_wait
from .dispatch import kernel
from .hopper import BLOCK, accumulate, barriers, halves, load_async, store_async, tanh, upper_and_lower


# Model dimensions of one step of the product, and steps in flight.
STEP, STAGES = 64, 5
# Columns of the tiles in which the end of a task comes and goes, and how many a task has.
END = gl.constexpr(32)
PARTS = gl.constexpr(4)


@gluon.jit
def load_operands(
    d_y, w, left, right, full, empty, D, E_BLOCKS, TASKS, STEP: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The factors that `multiply` reads, in its order."""
    grid_wait()
    step = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row = (task // E_BLOCKS) * BLOCK
        column = (task % E_BLOCKS) * BLOCK
        for part in range((D + STEP - 1) // STEP):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * BLOCK * STEP * 2)
            load_async(d_y, [row, part * STEP], full.index(slot), left.index(slot))
            load_async(w, [part * STEP, column], full.index(slot), right.index(slot))
            step += 1


@gluon.jit
def load_ends(u, out, u_tiles, out_tiles, full, empty, E_BLOCKS, TASKS):
    """What `finish_columns` reads: for both groups the same tiles, whose arrivals each group waits for at barriers of
    its own."""
    grid_wait()
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row = (task // E_BLOCKS) * BLOCK
        column = (task % E_BLOCKS) * BLOCK
        for part in gl.static_range(PARTS):
            arrived = full.index((number % 2) * PARTS + part)
            mbarrier.wait(empty.index(part), (number & 1) ^ 1)
            mbarrier.expect(arrived, 2 * BLOCK * END * 2)
            load_async(u, [row, column + part * END], arrived, u_tiles.index(part))
            load_async(out, [row, column + part * END], arrived, out_tiles.index(part))
        number += 1


@gluon.jit
def gate_gradient(u_tile, out_tile, d_out, scale, half_bias, layout: gl.constexpr):
    """`u_tile` holds h and takes the gradient of h, times the norm's gain, `out_tile` holds `out = silu(h) a` and
    takes that of a. Returns the gradient of h. See `backward.gate_gradient`; here with t = tanh(h / 2),

        silu(h) = h / 2 (1 + t),  silu'(h) / silu(h) = 1 / h + 1 - sigmoid(h) = (1 / (h / 2) - t + 1) / 2.
    """
    half = u_tile.load(layout).to(gl.float32) * (scale * 0.5) + half_bias
    half = gl.where(half == 0.0, 0.5e-20, half)
    t = tanh(half)
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [half], dtype=gl.float32, is_pure=True, pack=1
    )
    d_gate = d_out * out_tile.load(layout).to(gl.float32) * ((inverse - t) * 0.5 + 0.5)
    out_tile.store((d_out * (half * t + half)).to(gl.bfloat16))
    u_tile.store((d_gate * scale).to(gl.bfloat16))
    return d_gate


@gluon.jit
def finish_columns(
    d_attended, d_u, acc, scale_0, scale_1, half_bias, sums_ptr, u_tiles, out_tiles, full, empty, number, row, column,
    PART: gl.constexpr, GROUP: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The end of `END` columns of the group's task of this number, from `column` on: part `PART` of the tile. In
    halves of its rows, since more does not fit the registers."""
    mbarrier.wait(full.index(GROUP * PARTS + PART), number & 1)
    u_tile = u_tiles.index(PART)
    out_tile = out_tiles.index(PART)
    upper, lower = upper_and_lower(acc, layout)
    ROWS: gl.constexpr = BLOCK // 2
    sum_0 = gate_gradient(
        u_tile.slice(0, ROWS, dim=0), out_tile.slice(0, ROWS, dim=0), upper, scale_0, half_bias, layout
    )
    sum_1 = gate_gradient(
        u_tile.slice(ROWS, ROWS, dim=0), out_tile.slice(ROWS, ROWS, dim=0), lower, scale_1, half_bias, layout
    )
    gl.store(sums_ptr + gl.arange(0, END, gl.SliceLayout(0, layout)), gl.sum(sum_0 + sum_1, 0))
    fence_async_shared()
    store_async(d_u, [row, column], u_tile)
    store_async(d_attended, [row, column], out_tile)
    if PART > 0:
        tma.store_wait(2)
        mbarrier.arrive(empty.index(PART - 1), count=1)
    if PART == PARTS - 1:
        tma.store_wait(0)
        mbarrier.arrive(empty.index(PART), count=1)


@gluon.jit
def multiply(
    d_attended, d_u, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns, u_tiles, out_tiles,
    end_full, end_empty, T, D, E_BLOCKS, TASKS, GROUP: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The product and its epilogue, see `gate_product_kernel`, for every other task."""
    grid_wait()
    half: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK // 2, 16]
    )
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, END, 16])
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply_side`
    steps = (D + STEP - 1) // STEP
    step = GROUP * steps
    number = 0
    for task in range(gl.program_id(0) + GROUP * gl.num_programs(0), TASKS, 2 * gl.num_programs(0)):
        block = task // E_BLOCKS
        column = (task % E_BLOCKS) * BLOCK
        # Early, so that nothing waits for it.
        token = block * BLOCK + gl.arange(0, BLOCK // 2, gl.SliceLayout(1, narrow))
        scale_0 = gl.expand_dims(gl.load(rms_ptr + token, mask=token < T, other=0.0) * gain, 1)
        token += BLOCK // 2
        scale_1 = gl.expand_dims(gl.load(rms_ptr + token, mask=token < T, other=0.0) * gain, 1)
        columns = bias_ptr + column + gl.arange(0, END, gl.SliceLayout(0, narrow))
        bias_0 = gl.expand_dims(gl.load(columns).to(gl.float32) * 0.5, 0)
        bias_1 = gl.expand_dims(gl.load(columns + END).to(gl.float32) * 0.5, 0)
        bias_2 = gl.expand_dims(gl.load(columns + 2 * END).to(gl.float32) * 0.5, 0)
        bias_3 = gl.expand_dims(gl.load(columns + 3 * END).to(gl.float32) * 0.5, 0)
        acc = accumulate(left, right, full, empty, turns, number, step, steps, GROUP, False, False, STAGES)
        step += 2 * steps
        sides = halves(acc, half)
        parts = halves(sides[0], narrow) + halves(sides[1], narrow)
        biases = (bias_0, bias_1, bias_2, bias_3)
        for part in gl.static_range(PARTS):
            first = column + part * END
            finish_columns(
                d_attended, d_u, parts[part], scale_0, scale_1, biases[part],
                sums_ptr + block * (E_BLOCKS * BLOCK) + first, u_tiles, out_tiles, end_full, end_empty, number,
                block * BLOCK, first, part, GROUP, narrow,
            )  # fmt: skip
        number += 1


@kernel
@gluon.jit
def gate_product_kernel(
    d_y, w, u, out, d_attended, d_u, rms_ptr, gain_ptr, bias_ptr, sums_ptr, T, D, E_BLOCKS, TASKS,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`d_out = d_y w`, of which only what the gate `out = silu(h) a`, h from u, makes of it is stored: the gradient of
    a, that of u, and per block of 128 tokens the sums of h's gradient for the bias, `[blocks, E]`.

    Rows behind the last token are read as 0 and not written. Tasks are tiles of 128 tokens by 128 value dimensions.
    """
    left = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, STEP], d_y.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, STEP, BLOCK], w.layout)
    u_tiles = gl.allocate_shared_memory(gl.bfloat16, [PARTS, BLOCK, END], u.layout)
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [PARTS, BLOCK, END], u.layout)
    full = barriers(STAGES)
    empty = barriers(STAGES)
    turns = barriers(2)
    end_full = barriers(2 * PARTS)
    end_empty = barriers(PARTS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    d_attended, d_u, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns,
                    u_tiles, out_tiles, end_full, end_empty, T, D, E_BLOCKS, TASKS, 0, STEP, STAGES,
                ),
            ),
            (
                multiply,
                (
                    d_attended, d_u, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns,
                    u_tiles, out_tiles, end_full, end_empty, T, D, E_BLOCKS, TASKS, 1, STEP, STAGES,
                ),
            ),
            (load_operands, (d_y, w, left, right, full, empty, D, E_BLOCKS, TASKS, STEP, STAGES)),
            (load_ends, (u, out, u_tiles, out_tiles, end_full, end_empty, E_BLOCKS, TASKS)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
