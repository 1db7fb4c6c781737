# SPDX-License-Identifier: Apache-2.0
"""Functions that kernels share: lookup of tokens, SiLU, tiles, states and rotation.

Alphabet: as in attention_flash.py; GT chunks of all rows together, CP slots of a chunk and SP key dimensions padded to
tile sizes (the padding is zero), T = B * N tokens. README.md beside this file has the derivation.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl


# triton's interpreter runs kernels on the CPU, for tests, and without inline assembly.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Types of inputs, parameters and caches.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as torch's own are, in full unless the user allowed tf32."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def fast_math(dtype: torch.dtype) -> bool:
    """Whether SiLU may use the hardware's tanh, whose error (2^-11) is below 16-bit rounding."""
    return dtype in (torch.bfloat16, torch.float16) and not INTERPRET


def grid_wait(_semantic=None):
    """Wait until the kernels before this one have ended and what they wrote can be read, if this one may begin earlier
    (`dispatch.overlaps`); otherwise nothing is compiled. In every kernel this precedes all access to memory, in each
    group of warps that has any. It is called from kernels in triton and in Gluon."""
    if _semantic is not None and _semantic.builder.options.launch_pdl:
        from triton.language.extra.cuda import gdc_wait  # not in triton for other hardware

        gdc_wait(_semantic=_semantic)


if not INTERPRET:
    grid_wait = tl.core.builtin(grid_wait)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """Logistic function. FAST: one special-function instruction instead of two, `(1 + tanh(x / 2)) / 2`."""
    if FAST:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1
        )
        return half * 0.5 + 0.5
    else:
        return tl.sigmoid(x)


@triton.jit
def silu(x, SILU: tl.constexpr, FAST: tl.constexpr):
    """`x sigmoid(x)`, or x itself where the activation was applied before."""
    if SILU:
        return x * sigmoid(x, FAST)
    else:
        return x


@triton.jit
def silu_grad(x, SILU: tl.constexpr, FAST: tl.constexpr):
    """Derivative of `silu`: `s (1 + x (1 - s))` with `s = sigmoid(x)`."""
    if SILU:
        s = sigmoid(x, FAST)
        return s * (1.0 + x * (1.0 - s))
    else:
        return x * 0.0 + 1.0


@triton.jit
def token_rows(source_ptr, chunk, slot, N, G, C, shift, RAGGED: tl.constexpr):
    """Token index (int64, flat over rows) of a chunk's slots, and whether there is one.

    Plain layouts are a reshape with `shift` slots before each row's tokens. Ragged ones look tokens up, and padding
    can be anywhere.
    """
    if RAGGED:
        token = tl.load(source_ptr + chunk.to(tl.int64) * C + slot, mask=slot < C, other=-1)
        real = token >= 0
        token = tl.where(real, token, 0).to(tl.int64)
    else:
        row = chunk // G
        column = (chunk % G) * C + slot - shift
        real = (slot < C) & (column >= 0) & (column < N)
        token = row.to(tl.int64) * N + tl.where(real, column, 0)
    return token, real


@triton.jit
def has_tokens(chunk, slot, N, G, C, shift):
    """Whether a plain row has tokens in the half of a chunk, 128 slots, in which `slot` is."""
    first = (chunk % G) * C + slot // 128 * 128 - shift
    return (first > -128) & (first < N)


@triton.jit
def previous_rows(source_ptr, opens_ptr, chunk, slot, N, G, C, shift, RAGGED: tl.constexpr):
    """`token_rows` of the slots before: the token before each in its document. `opens` marks the chunks in which a
    document begins."""
    inside = (slot < C) & ((slot > 0) | (tl.load(opens_ptr + chunk) == 0))
    return token_rows(source_ptr, chunk, tl.where(inside, slot - 1, C), N, G, C, shift, RAGGED)


@triton.jit
def load_rows(ptr, stride, token, real, column, width, EVEN_E: tl.constexpr):
    """`x[token, column]` in its own type, 0 at slots without a token and beyond the width."""
    pointers = ptr + token[:, None] * stride + column[None, :]
    if EVEN_E:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=real[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def load_tile(
    x, stride, token, real, chunk, slot, column, start, width, G, C, shift, EVEN_E: tl.constexpr, TMA: tl.constexpr
):
    """A tile of a chunk's tokens from `slot` on, and of columns from `start` on. TMA: dimensions of x, a tensor
    descriptor, as in `Shape.tma`; 0 if x is a pointer, from which `load_rows` loads the tokens one by one."""
    if TMA == 3:
        tile = x.load([chunk // G, (chunk % G) * C + slot - shift, start])
        return tl.reshape(tile, (tile.shape[1], tile.shape[2]))
    elif TMA == 2:
        return x.load([chunk * C + slot, start])
    else:
        return load_rows(x, stride, token, real, column, width, EVEN_E)


@triton.jit
def load_grid(x, width, row, rows, start, columns, TMA: tl.constexpr):
    """A tile of a chunk grid, `[all slots, width]` in whole tiles, by descriptor or by pointer."""
    if TMA:
        return x.load([row, start])
    else:
        return tl.load(x + (row.to(tl.int64) + rows)[:, None] * width + (start + columns)[None, :])


@triton.jit
def store_grid(x, width, row, rows, start, columns, value, TMA: tl.constexpr):
    """The counterpart of `load_grid`."""
    if TMA:
        x.store([row, start], value.to(x.dtype))
    else:
        pointers = x + (row.to(tl.int64) + rows)[:, None] * width + (start + columns)[None, :]
        tl.store(pointers, value.to(x.dtype.element_ty))


@triton.jit
def store_rows(ptr, stride, token, real, column, width, value, EVEN_E: tl.constexpr):
    pointers = ptr + token[:, None] * stride + column[None, :]
    if EVEN_E:
        tl.store(pointers, value.to(ptr.dtype.element_ty), mask=real[:, None])
    else:
        tl.store(pointers, value.to(ptr.dtype.element_ty), mask=real[:, None] & (column < width)[None, :])


@triton.jit
def store_tile(
    x, stride, token, real, chunk, slot, column, start, width, value, C, EVEN_E: tl.constexpr, TMA: tl.constexpr
):
    """The counterpart of `load_tile`. With TMA 3, x is a pointer here: a descriptor can load a tile that begins before
    the tensor (the slots of a shift), but not store one."""
    if TMA == 2:
        x.store([chunk * C + slot, start], value.to(x.dtype))
    else:
        store_rows(x, stride, token, real, column, width, value, EVEN_E)


@triton.jit
def row_gain(rms_ptr, gain_ptr, token, real):
    """`g / rms(x)` of each token: ScaleNorm's gain is one scalar, so it can be applied after the projection."""
    gain = tl.load(gain_ptr).to(tl.float32)
    # Not exactly 0: the gain's gradient is recovered by dividing by it.
    gain = tl.where(gain == 0.0, 1e-20, gain)
    return tl.load(rms_ptr + token, mask=real, other=0.0) * gain


@triton.jit
def preactivation(raw, bias_ptr, column, width, gain, SCALED: tl.constexpr):
    """float32 input of an activation: `gain * (x W) + b` if the norm is applied here, else a projection's output."""
    value = raw.to(tl.float32)
    if SCALED:
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        value = value * gain[:, None] + bias[None, :]
    return value


@triton.jit
def values_of(
    raw, rms_ptr, gain_ptr, bias_ptr, token, real, column, E,
    SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Values `silu(h)` of a block of tokens, float32; 0 at slots without a token."""
    if SCALED:
        gain = row_gain(rms_ptr, gain_ptr, token, real)
        # silu(b) is not 0 where there is no token.
        return tl.where(real[:, None], silu(preactivation(raw, bias_ptr, column, E, gain, SCALED), SILU, FAST), 0.0)
    else:
        return silu(raw.to(tl.float32), SILU, FAST)


@triton.jit
def load_sums(x, index, s, first, column, start, E, SP: tl.constexpr, EVEN_E: tl.constexpr, TMA: tl.constexpr):
    """A tile of `x[index]`, x `[.., SP, E]`: rows from `first` on, columns from `start` on."""
    if TMA:
        return x.load([index * SP + first, start])
    else:
        pointers = x + index.to(tl.int64) * (SP * E) + (first + s)[:, None] * E + column[None, :]
        if EVEN_E:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(column < E)[None, :], other=0.0)


@triton.jit
def add_state_product(
    acc, left, prefix, carry, chunk, piece, s, first, column, start, E,
    SP: tl.constexpr, EVEN_E: tl.constexpr, PREFIX: tl.constexpr, CARRY: tl.constexpr, TMA: tl.constexpr,
    TRANS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + left state`, or `acc + left state^T` with TRANS, for a tile of the state before a chunk, over C: the part
    from its own piece, plus the part from earlier pieces.

    Without PREFIX (bidirectional) a document has one state, at `carry[piece]`. Two products cost less than one of the
    sum, which would pass through registers on its way from memory to the tensor cores.
    """
    if PREFIX:
        state = load_sums(prefix, chunk, s, first, column, start, E, SP, EVEN_E, TMA)
        acc = tl.dot(left, tl.trans(state) if TRANS else state, acc, input_precision=PRECISION)
    if CARRY or not PREFIX:
        state = load_sums(carry, piece, s, first, column, start, E, SP, EVEN_E, TMA)
        acc = tl.dot(left, tl.trans(state) if TRANS else state, acc, input_precision=PRECISION)
    return acc


@triton.jit
def state_depth(opens_ptr, chunk, GT, depth, AFTER: tl.constexpr, SKIP: tl.constexpr):
    """Depth of a product with a chunk's state: 0 where the state is 0, for the first chunk of a document (with AFTER,
    for gradients of states, the last)."""
    if SKIP:
        if AFTER:
            opens = tl.load(opens_ptr + chunk + 1, mask=chunk + 1 < GT, other=1)
        else:
            opens = tl.load(opens_ptr + chunk)
        return tl.where(opens == 0, depth, 0)
    else:
        return depth


@triton.jit
def rotated_pair(rotary_dim, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Pairs of key dimensions that RoPE rotates, `[HALF]` each, and which of them exist."""
    i = tl.arange(0, HALF)
    if INTERLEAVED:
        return 2 * i, 2 * i + 1, i < rotary_dim // 2
    else:
        return i, i + rotary_dim // 2, i < rotary_dim // 2


@triton.jit
def basis(z_ptr, stride, token, real, column, inside, gain, bias_ptr, SCALED: tl.constexpr):
    """float32 input of the basis' activation at some key dimensions."""
    raw = tl.load(z_ptr + token[:, None] * stride + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    value = raw.to(tl.float32)
    if SCALED:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        value = value * gain[:, None] + bias[None, :]
    return value


@triton.jit
def vector(ptr, row, width, column, inside):
    """`ptr[row, column]` as float32 `[1, columns]`."""
    return tl.load(ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)[None, :]
