# SPDX-License-Identifier: Apache-2.0
"""What the kernels for Hopper share: tiles, their descriptors, barriers, and products by groups of warps in turn.

Written in Gluon, which comes with triton. In a product one warp loads tiles by the tensor memory accelerator into a
ring in shared memory, task by task. Two groups of four warps multiply, each for every other task, so that the end of
one group's task (loads, activations, stores) runs while the tensor cores work for the other. The groups take turns at
the ring: a barrier tells only whether its last phase was even or odd, so that a group must not wait for a tile before
the other group has had the one before it in the same slot.
"""

from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .dispatch import Described, Form


# Names of triton 3.8 on, and those before.
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_async = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
# A tile in shared memory in another shape, by a name of triton 3.9 on, or the one before.
SHARED = gl.shared_memory_descriptor
reinterpret = getattr(SHARED, "reinterpret", None) or SHARED._reinterpret

BLOCK = gl.constexpr(128)
TILE_BYTES = gl.constexpr(128 * 128 * 2)
MATRIX = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# A row of 32 bfloat16 numbers has 64 bytes.
NARROW = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
TOKENS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
NARROW_TOKENS = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=3)


def tile_layout(block: tuple[int, ...]):
    """The layout in shared memory of a matrix's tile, or of a tile of rows' tokens, which has three sizes."""
    wide, narrow = (MATRIX, NARROW) if len(block) == 2 else (TOKENS, NARROW_TOKENS)
    return narrow if block[-1] == 32 else wide


@functools.lru_cache(4096)
def matrix_form(size: tuple, strides: tuple, block: tuple) -> Form:
    return Form.matrix(TensorDescriptor, size, strides, block, layout=tile_layout(block))


@functools.lru_cache(4096)
def tokens_form(B: int, N: int, width: int, stride: int, block: tuple) -> Form:
    return Form(TensorDescriptor, (B, N, width), (N * stride, stride, 1), (1, *block), layout=tile_layout((1, *block)))


def matrix(x: Tensor, *block: int):
    """`x` as a matrix of its last dimension, described for tiles."""
    return Described(x, matrix_form(x.shape, x.stride(), block or (128, 128)))


def tokens(x: Tensor, B: int, N: int, *block: int):
    """`x` `[B * N, width]`, described for tiles of one row's tokens: outside of a row there is 0."""
    return Described(x, tokens_form(B, N, x.shape[1], x.stride(0), block or (128, 128)))


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr = 1):
    """Barriers of one arrival each, or of more. A fence must follow before other warps use them."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(COUNT):
        mbarrier.init(made.index(number), count=ARRIVALS)
    return made


@gluon.jit
def lower_tile(tile):
    """Row and column of the tile of this number among those not above a square's diagonal, row by row."""
    # The last row whose tiles, and those of all before it, are at most `tile`.
    row = ((gl.sqrt((8 * tile + 1).to(gl.float32)) - 1.0) * 0.5).to(gl.int32)
    row = gl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = gl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@gluon.jit
def tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def sigmoid(x):
    return tanh(x * 0.5) * 0.5 + 0.5


@gluon.jit
def halves(acc, layout: gl.constexpr):
    """Left and right half of a tile, without moving anything."""
    rows: gl.constexpr = acc.shape[0]
    columns: gl.constexpr = acc.shape[1]
    left, right = gl.split(gl.permute(gl.reshape(acc, [rows, 2, columns // 2]), (0, 2, 1)))
    return gl.convert_layout(left, layout, True), gl.convert_layout(right, layout, True)


@gluon.jit
def upper_and_lower(x, layout: gl.constexpr):
    """The first and the second half of a tile's rows, without moving anything."""
    rows: gl.constexpr = x.shape[0]
    first, second = gl.split(gl.permute(gl.reshape(x, [2, rows // 2, x.shape[1]]), (1, 2, 0)))
    return gl.convert_layout(first, layout, True), gl.convert_layout(second, layout, True)


@gluon.jit
def accumulate(
    left, right, full, empty, turns, number, step, steps, GROUP: gl.constexpr, TRANS_LEFT: gl.constexpr,
    TRANS_RIGHT: gl.constexpr, STAGES: gl.constexpr, end_empty=None,
):  # fmt: skip
    """The product of `steps` pairs of tiles from the ring, of which `step` is the first, 128 by 128, for the group's
    task `number`. Also frees at `end_empty`, if given, the tiles of the end of its task before, whose stores have had
    the time since."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    acc = gl.zeros([BLOCK, BLOCK], gl.float32, mma)
    # The first group has the first turn.
    mbarrier.wait(turns.index(GROUP), (number + 1 - GROUP) & 1)
    for part in range(steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        x = left.index(slot).permute((1, 0)) if TRANS_LEFT else left.index(slot)
        y = right.index(slot).permute((1, 0)) if TRANS_RIGHT else right.index(slot)
        acc = warpgroup_mma(x, y, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        if part > 0:
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        elif end_empty is not None:
            tma.store_wait(0)
            mbarrier.arrive(end_empty.index(GROUP), count=1)
        step += 1
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    return acc
