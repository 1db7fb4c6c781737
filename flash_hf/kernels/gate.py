# SPDX-License-Identifier: Apache-2.0
"""The gate's gradient as the epilogue of the product that gives the gated output's gradient, for Hopper.

Written in Gluon like scan.py: one warp loads tiles ahead of the eight that multiply. README.md beside this file has
the derivation and the bytes.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .dispatch import described, kernel
from .scan import BLOCK, TILE_BYTES, halves, load_async, sigmoid, store_async


# Model dimensions of one step of the product, and steps in flight: with the four tiles of the epilogue they fill the
# shared memory.
STEP, STAGES = 32, 4
# A row of 32 bfloat16 numbers has 64 bytes.
NARROW = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)


def narrow(x: Tensor) -> TensorDescriptor:
    """The matrix `x`, described for tiles of 256 rows and a step of the product."""
    return described(TensorDescriptor, x, list(x.shape), list(x.stride()), [256, STEP], layout=NARROW)


@gluon.jit
def load_operands(
    d_y, w, u, out, left, right, full, empty, u_tiles, out_tiles, end_full, end_empty, D, E_BLOCKS, TASKS,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What `multiply` reads, in its order."""
    step = 0
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row = (task // E_BLOCKS) * (2 * BLOCK)
        column = (task % E_BLOCKS) * BLOCK
        for start in range(0, D, STEP):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(slot), 3 * BLOCK * STEP * 2)
            load_async(d_y, [row, start], full.index(slot), left.index(slot))
            load_async(w, [start, column], full.index(slot), right.index(slot))
            step += 1
            if start == STAGES * STEP:
                # The task before has stored its tiles by now, and these have the rest of the product to arrive.
                mbarrier.wait(end_empty, number & 1)
                mbarrier.expect(end_full, 4 * TILE_BYTES)
                for half in gl.static_range(2):
                    load_async(u, [row + half * BLOCK, column], end_full, u_tiles.index(half))
                    load_async(out, [row + half * BLOCK, column], end_full, out_tiles.index(half))
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
    d_gate = d_out * out_tile.load(layout).to(gl.float32) * (1.0 / h + 1.0 - s)
    out_tile.store((d_out * h * s).to(gl.bfloat16))
    gl.store(sums_ptr + columns, gl.sum(d_gate, 0))
    u_tile.store((d_gate * scale).to(gl.bfloat16))


@gluon.jit
def row_halves(acc, layout: gl.constexpr):
    """Upper and lower half of a tile, without moving anything."""
    upper, lower = gl.split(gl.permute(gl.reshape(acc, [2, BLOCK, BLOCK]), (1, 2, 0)))
    return gl.convert_layout(upper, layout, True), gl.convert_layout(lower, layout, True)


@gluon.jit
def multiply(
    d_attended, d_u, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, u_tiles, out_tiles, end_full,
    end_empty, T, D, E_BLOCKS, TASKS, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The product and its epilogue, see `gate_product_kernel`."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK // 2, 16]
    )
    E = E_BLOCKS * BLOCK
    gain = gl.load(gain_ptr).to(gl.float32)
    gain = gl.where(gain == 0.0, 1e-20, gain)  # as in scan.py's `multiply`
    step = 0
    number = 0
    for task in range(gl.program_id(0), TASKS, gl.num_programs(0)):
        row = (task // E_BLOCKS) * (2 * BLOCK)
        column = (task % E_BLOCKS) * BLOCK
        acc = gl.zeros([2 * BLOCK, BLOCK], gl.float32, mma)
        for start in range(0, D, STEP):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            acc = warpgroup_mma(left.index(slot), right.index(slot), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if start > 0:
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            if start == STEP:
                # The stores of the task before have had the time of a step.
                tma.store_wait(0)
                mbarrier.arrive(end_empty, count=1)
            step += 1
        # Early, so that nothing waits for it.
        token = row + gl.arange(0, BLOCK, gl.SliceLayout(1, narrow))
        scale_0 = gl.load(rms_ptr + token, mask=token < T, other=0.0) * gain
        scale_1 = gl.load(rms_ptr + token + BLOCK, mask=token + BLOCK < T, other=0.0) * gain
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        mbarrier.wait(end_full, number & 1)
        number += 1
        upper, lower = row_halves(acc, mma)
        for half in gl.static_range(2):
            scale = gl.expand_dims(scale_0 if half == 0 else scale_1, 1)
            u_tile = u_tiles.index(half)
            out_tile = out_tiles.index(half)
            sums = sums_ptr + ((task // E_BLOCKS) * 2 + half) * E + column
            # In two steps, since more does not fit the registers.
            one, two = halves(upper if half == 0 else lower, narrow)
            gate_gradient(u_tile, out_tile, one, scale, bias_ptr + column, sums, 0, narrow)
            gate_gradient(u_tile, out_tile, two, scale, bias_ptr + column, sums, BLOCK // 2, narrow)
            fence_async_shared()
            store_async(d_u, [row + half * BLOCK, column], u_tile)
            store_async(d_attended, [row + half * BLOCK, column], out_tile)
    tma.store_wait(0)


@kernel
@gluon.jit
def gate_product_kernel(
    d_y, w, u, out, d_attended, d_u, rms_ptr, gain_ptr, bias_ptr, sums_ptr, T, D, E_BLOCKS, TASKS,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`d_out = d_y w`, of which only what the gate `out = silu(h) a`, h from u, makes of it is stored: the gradient of
    a, that of u, and per block of 128 tokens the sums of h's gradient for the bias, `[blocks, E]`.

    Rows behind the last token are read as 0 and not written. Tasks are tiles of 256 tokens by 128 value dimensions.
    """
    layout: gl.constexpr = u.layout
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    left = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK, STEP], d_y.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, STEP, BLOCK], w.layout)
    u_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, BLOCK], layout)
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, BLOCK], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    end_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    end_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    mbarrier.init(end_full, count=1)
    mbarrier.init(end_empty, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    d_attended, d_u, rms_ptr, gain_ptr, bias_ptr, sums_ptr, left, right, full, empty, u_tiles,
                    out_tiles, end_full, end_empty, T, D, E_BLOCKS, TASKS, STEP, STAGES,
                ),
            ),
            (
                load_operands,
                (
                    d_y, w, u, out, left, right, full, empty, u_tiles, out_tiles, end_full, end_empty, D, E_BLOCKS,
                    TASKS, STEP, STAGES,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
