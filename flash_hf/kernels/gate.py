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
from .hopper import BLOCK, TILE_BYTES, accumulate, barriers, halves, load_async, sigmoid, store_async


# Model dimensions of one step of the product, and steps in flight: with four tiles for the ends of the tasks they fill
# the shared memory.
STEP, STAGES = 32, 6


@gluon.jit
def load_operands(
    d_y, w, u, out, left, right, full, empty, u_tiles, out_tiles, end_full, end_empty, D, E_BLOCKS, TASKS,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order."""
    grid_wait()
    steps = (D + STEP - 1) // STEP
    step = 0
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row = (task // E_BLOCKS) * BLOCK
        column = (task % E_BLOCKS) * BLOCK
        group = number % 2
        for part in range(steps):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 2 * BLOCK * STEP * 2)
            load_async(d_y, [row, part * STEP], full.index(slot), left.index(slot))
            load_async(w, [part * STEP, column], full.index(slot), right.index(slot))
            step += 1
            if part == gl.minimum(steps, STAGES) - 1:
                # The group's task before has stored its tiles by now, and these have the rest of the product to
                # arrive.
                mbarrier.wait(end_empty.index(group), (number // 2) & 1)
                mbarrier.expect(end_full.index(group), 2 * TILE_BYTES)
                load_async(u, [row, column], end_full.index(group), u_tiles.index(group))
                load_async(out, [row, column], end_full.index(group), out_tiles.index(group))
        number += 1


@gluon.jit
def gate_gradient(
    u_tile, out_tile, d_out, scale, bias_ptr, sums_ptr, first: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Of half a tile, whose columns begin at `first`: `u_tile` holds h and takes the gradient of h, times the norm's
    gain, `out_tile` holds `out = silu(h) a` and takes that of a. See `backward.gate_gradient`."""
    columns = first + gl.arange(0, BLOCK // 2, gl.SliceLayout(0, layout))
    u_tile = u_tile.slice(first, BLOCK // 2, dim=1)
    out_tile = out_tile.slice(first, BLOCK // 2, dim=1)
    h = u_tile.load(layout).to(gl.float32) * scale + gl.expand_dims(gl.load(bias_ptr + columns).to(gl.float32), 0)
    h = gl.where(h == 0.0, 1e-20, h)
    s = sigmoid(h)
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [h], dtype=gl.float32, is_pure=True, pack=1
    )
    d_gate = d_out * out_tile.load(layout).to(gl.float32) * (inverse + 1.0 - s)
    out_tile.store((d_out * h * s).to(gl.bfloat16))
    gl.store(sums_ptr + columns, gl.sum(d_gate, 0))
    u_tile.store((d_gate * scale).to(gl.bfloat16))


@gluon.jit
def multiply(
    d_attended, d_u, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, turns, u_tiles, out_tiles,
    end_full, end_empty, T, D, E_BLOCKS, TASKS, GROUP: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The product and its epilogue, see `gate_product_kernel`, for every other task."""
    grid_wait()
    narrow: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK // 2, 16]
    )
    u_tile = u_tiles.index(GROUP)
    out_tile = out_tiles.index(GROUP)
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply`
    steps = (D + STEP - 1) // STEP
    step = GROUP * steps
    number = 0
    for task in range(gl.program_id(0) + GROUP * gl.num_programs(0), TASKS, 2 * gl.num_programs(0)):
        block = task // E_BLOCKS
        column = (task % E_BLOCKS) * BLOCK
        # Early, so that nothing waits for it.
        token = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, narrow))
        scale = gl.expand_dims(gl.load(rms_ptr + token, mask=token < T, other=0.0) * gain, 1)
        acc = accumulate(
            left, right, full, empty, turns, end_empty, number, step, steps, GROUP, False, False, STAGES
        )  # fmt: skip
        step += 2 * steps
        mbarrier.wait(end_full.index(GROUP), number & 1)
        number += 1
        sums = sums_ptr + block * (E_BLOCKS * BLOCK) + column
        # In two steps, since more does not fit the registers.
        one, two = halves(acc, narrow)
        gate_gradient(u_tile, out_tile, one, scale, bias_ptr + column, sums, 0, narrow)
        gate_gradient(u_tile, out_tile, two, scale, bias_ptr + column, sums, BLOCK // 2, narrow)
        fence_async_shared()
        store_async(d_u, [block * BLOCK, column], u_tile)
        store_async(d_attended, [block * BLOCK, column], out_tile)
    tma.store_wait(0)


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
    layout: gl.constexpr = u.layout
    left = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, STEP], d_y.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, STEP, BLOCK], w.layout)
    u_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, BLOCK], layout)
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, BLOCK], layout)
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
            (
                load_operands,
                (
                    d_y, w, u, out, left, right, full, empty, u_tiles, out_tiles, end_full, end_empty, D,
                    E_BLOCKS, TASKS, STEP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
