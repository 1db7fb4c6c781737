# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule (arXiv 2412.06464) for the global state: kernels and their launches.

With keys `k` of length 1, weights `w` and decays `a` of tokens, `F_i` the sum of `log a` over a chunk up to token i,
and over the whole chunk `F_C`, a chunk takes the state S before it to

    S' = decay S - erase S + P^T V        decay = exp(F_C),   erase = P^T diag(exp F) K
    P = T^T diag(exp(F_C - F)) K          T = (1 + L)^-1 diag(w),   L_ij = w_i exp(F_i - F_j) k_i k_j for j < i

and its token t reads `exp(F_t) q_t S`. So P and `exp(F) q` stand for keys and queries of the mean over chunks, and the
kernels that read states, and make their gradients, are those of the mean. New are `prepare` (this file's first half),
which makes P, erase and decay from keys, weights and decays, and the chain, which takes states from chunk to chunk.

A chunk is prepared in blocks of 64 slots. With the erase E of the blocks behind it and `d` the decay over them, a
block's own P, from its own T, becomes `d P - P E^T`, and E becomes `decay E + P^T diag(exp F) K`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dot_precision, grid_wait, row_gain, token_rows
from .dispatch import kernel
from .tiles import Cached, Inputs, Shape, cdiv


# ------------------------------------------------------------------------------------------------------------------
# Kernels: the gates and the inverse of each block
# ------------------------------------------------------------------------------------------------------------------
@triton.jit
def gate_inputs(gates_ptr, stride, column: tl.constexpr, bias_ptr, token, real, gain, SCALED: tl.constexpr):
    """float32 input of a gate of some tokens: column 0 is the forget gate's, column 1 the write gate's."""
    raw = tl.load(gates_ptr + token * stride + column, mask=real, other=0.0).to(tl.float32)
    if SCALED:
        raw = raw * gain
    return raw + tl.load(bias_ptr + column).to(tl.float32)


@triton.jit
def log_sigmoid(x):
    # log(1 + y), exact for small y.
    y = tl.exp(-tl.abs(x))
    one = 1.0 + y
    log = tl.where(one == 1.0, y, tl.log(one) * y / tl.where(one == 1.0, 1.0, one - 1.0))
    return tl.minimum(x, 0.0) - log


@triton.jit
def log_decays(
    gates_ptr, stride, rms_ptr, gain_ptr, bias_ptr, source_ptr, chunk, slot, N, G, C, shift,
    SCALED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    token, real = token_rows(source_ptr, chunk, slot, N, G, C, shift, RAGGED)
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    x = gate_inputs(gates_ptr, stride, 0, bias_ptr, token, real, gain, SCALED)
    return tl.where(real, log_sigmoid(x), 0.0), token, real, gain


@triton.jit
def inverse_lengths(x):
    """One over the lengths of rows, at most 1e12."""
    x = x.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)


@triton.jit
def unit_keys(ptr, row, column, length, SP: tl.constexpr):
    """Some columns of keys on the chunk grid times `length`, one over their lengths, float32."""
    return tl.load(ptr + row[:, None] * SP + column[None, :]).to(tl.float32) * length[:, None]


@kernel
@triton.jit
def gates_kernel(
    q_ptr, k_ptr, gates_ptr, gates_stride, rms_ptr, gain_ptr, bias_ptr, source_ptr, read_ptr, since_ptr, write_ptr,
    length_ptr, inverse_ptr, cached_ptr, N, G, C, shift, factor,
    CP: tl.constexpr, SP: tl.constexpr, SUB: tl.constexpr, LEVELS: tl.constexpr, SCALED: tl.constexpr,
    RAGGED: tl.constexpr, CACHED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one block of slots: F, w, one over the key's length, the query that reads states, `factor exp(F) q`, and the
    block's own T. With CACHED queries in a row's first chunk also have the decay since that chunk began, before these
    tokens."""
    grid_wait()
    blocks: tl.constexpr = CP // SUB
    chunk = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    i = tl.arange(0, SUB)
    before = 0.0
    for other in range(0, block):
        f, _, _, _ = log_decays(
            gates_ptr, gates_stride, rms_ptr, gain_ptr, bias_ptr, source_ptr, chunk, other * SUB + i, N, G, C, shift,
            SCALED, RAGGED,
        )  # fmt: skip
        before += tl.sum(f, 0)
    slot = block * SUB + i
    f, token, real, gain = log_decays(
        gates_ptr, gates_stride, rms_ptr, gain_ptr, bias_ptr, source_ptr, chunk, slot, N, G, C, shift, SCALED, RAGGED
    )
    since = before + tl.cumsum(f, 0)
    x = gate_inputs(gates_ptr, gates_stride, 1, bias_ptr, token, real, gain, SCALED)
    write = tl.where(real, tl.sigmoid(x), 0.0)
    row = chunk.to(tl.int64) * CP + slot
    tl.store(since_ptr + row, since)
    tl.store(write_ptr + row, write)
    s = tl.arange(0, SP)
    grid = row[:, None] * SP + s[None, :]
    k = tl.load(k_ptr + grid)
    length = inverse_lengths(k)
    tl.store(length_ptr + row, length)
    q = tl.load(q_ptr + grid)
    faded = since
    if CACHED:
        faded += tl.load(cached_ptr + chunk // G, mask=chunk % G == 0, other=0.0)
    read = q.to(tl.float32) * (factor * tl.exp(faded) * inverse_lengths(q))[:, None]
    tl.store(read_ptr + grid, read.to(read_ptr.dtype.element_ty))
    # Read from memory, which lays them out along the other axis.
    tl.debug_barrier()
    since_j = tl.load(since_ptr + row)
    write_j = tl.load(write_ptr + row)
    length_j = tl.load(length_ptr + row)
    # Keys in their own type, whose products are exact.
    products = tl.dot(k, tl.trans(k), input_precision=PRECISION) * length[:, None] * length_j[None, :]
    m = i[:, None]
    n = i[None, :]
    lower = write[:, None] * tl.exp(tl.minimum(since[:, None] - since_j[None, :], 0.0)) * products
    lower = tl.where(m > n, lower, 0.0)
    # From the diagonal outwards: the inverse of [[A, 0], [B, D]] has -D^-1 B A^-1 in place of B.
    inverse = tl.where(m == n, 1.0, 0.0) - tl.where((m // 2 == n // 2) & (m > n), lower, 0.0)
    for level in tl.static_range(1, LEVELS):
        corner = tl.where((m >> (level + 1) == n >> (level + 1)) & (m >> level > n >> level), lower, 0.0)
        half = tl.dot(corner, inverse, input_precision=PRECISION)
        inverse -= tl.dot(inverse, half, input_precision=PRECISION)
    place = tl.program_id(0).to(tl.int64) * (SUB * SUB) + m * SUB + n
    tl.store(inverse_ptr + place, inverse * write_j[None, :])


# ------------------------------------------------------------------------------------------------------------------
# Kernels: the chunk
# ------------------------------------------------------------------------------------------------------------------
@triton.jit
def decays_of(since_ptr, chunk, block, i, CP: tl.constexpr, SUB: tl.constexpr):
    """Of a block of slots: F, and its value before and at the end of the block, and of the chunk."""
    first = since_ptr + chunk.to(tl.int64) * CP
    since = tl.load(first + block * SUB + i)
    begin = tl.load(first + block * SUB - 1, mask=block > 0, other=0.0)
    return since, begin, tl.load(first + block * SUB + SUB - 1), tl.load(first + CP - 1)


@kernel
@triton.jit
def prepare_kernel(
    k_ptr, since_ptr, length_ptr, inverse_ptr, enter_ptr, erase_ptr, decay_ptr,
    CP: tl.constexpr, SP: tl.constexpr, SUB: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of P and rows of erase, of one chunk, from its last block to its first; and its decay."""
    grid_wait()
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    blocks: tl.constexpr = CP // SUB
    i = tl.arange(0, SUB)
    s = tl.arange(0, SP)
    square = i[:, None] * SUB + i[None, :]
    erase = tl.zeros((SP, WIDTH), tl.float32)  # transposed
    decay = 1.0
    for step in tl.range(0, blocks, num_stages=1):
        block = blocks - 1 - step
        row = chunk * CP + block * SUB + i
        since, begin, end, _ = decays_of(since_ptr, chunk, block, i, CP, SUB)
        length = tl.load(length_ptr + row)
        k = unit_keys(k_ptr, row, s, length, SP)
        # What is left, at the chunk's end, of what the block's keys bring to its own end.
        left = decay * unit_keys(k_ptr, row, column, length, SP) - tl.dot(k, erase, input_precision=PRECISION)
        inverse = tl.load(inverse_ptr + (chunk * blocks + block) * (SUB * SUB) + square)
        enter = tl.dot(tl.trans(inverse), left * tl.exp(end - since)[:, None], input_precision=PRECISION)
        tl.store(enter_ptr + row[:, None] * SP + column[None, :], enter.to(enter_ptr.dtype.element_ty))
        passed = tl.exp(end - begin)
        erase *= passed
        erase = tl.dot(tl.trans(k * tl.exp(since - begin)[:, None]), enter, erase, input_precision=PRECISION)
        decay *= passed
    place = erase_ptr + chunk * (SP * SP) + column[None, :] * SP + s[:, None]
    tl.store(place, erase.to(erase_ptr.dtype.element_ty))
    tl.store(decay_ptr + chunk, decay)


@kernel
@triton.jit
def chain_kernel(
    added_ptr, erase_ptr, decay_ptr, begin_ptr, end_ptr, initial_ptr, opened_ptr, states_ptr, final_ptr, E,
    added_scale, size,
    SP: tl.constexpr, REVERSE: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`S' = decay S - erase S + added_scale added` from chunk to chunk of a document: the state before each chunk.
    REVERSE: from the last chunk to the first, with `erase^T`: the gradient of the state behind each chunk.

    With INITIAL the first state is `initial` over `size`, and its chunk reads `opened` over `size` instead. With FINAL
    the last state times `size` goes to `final`.
    """
    grid_wait()
    document = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    s = tl.arange(0, SP)
    mask = (column < E)[None, :]
    place = s[:, None] * E + column[None, :]
    if REVERSE:
        square = s[None, :] * SP + s[:, None]
    else:
        square = s[:, None] * SP + s[None, :]
    begin = tl.load(begin_ptr + document)
    end = tl.load(end_ptr + document)
    dtype = states_ptr.dtype.element_ty
    state = tl.zeros((SP, BLOCK_E), tl.float32)
    own = document.to(tl.int64) * (SP * E) + place
    if INITIAL:
        state = tl.load(initial_ptr + own, mask=mask, other=0.0) / size
    for step in tl.range(0, end - begin, num_stages=STAGES):
        chunk = (end - 1 - step if REVERSE else begin + step).to(tl.int64)
        erase = tl.load(erase_ptr + chunk * (SP * SP) + square)
        added = tl.load(added_ptr + chunk * (SP * E) + place, mask=mask, other=0.0).to(tl.float32)
        low = state.to(dtype)
        tl.store(states_ptr + chunk * (SP * E) + place, low, mask=mask)
        state = state * tl.load(decay_ptr + chunk) + added * added_scale
        state -= tl.dot(erase, low, input_precision=PRECISION)
    if INITIAL:
        opened = tl.load(opened_ptr + own, mask=mask, other=0.0) / size
        tl.debug_barrier()  # over what the loop has stored, which other threads may have
        tl.store(states_ptr + begin.to(tl.int64) * (SP * E) + place, opened.to(dtype), mask=mask)
    if FINAL:
        tl.store(final_ptr + own, state * size, mask=mask)


# ------------------------------------------------------------------------------------------------------------------
# Kernels: gradients
# ------------------------------------------------------------------------------------------------------------------
# With the gradient dM of `M = decay - erase`, and H_ij = -exp(F_i - F_j) P_i Y_j for j < i:
#
#     D = dP - diag(exp F) K dM^T,   (1 + L) Y = diag(w) D
#     dk_i = (sum_j H_ij k_j - exp(F_i) dM^T P_i) + (sum_j H_ji k_j + exp(F_C - F_i) Y_i)
#
# The first half of dk grows with F_i, the second one fades with it.
@kernel
@triton.jit
def solve_kernel(
    k_ptr, since_ptr, length_ptr, inverse_ptr, d_enter_ptr, d_move_ptr, y_ptr, move_scale,
    CP: tl.constexpr, SP: tl.constexpr, SUB: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of one chunk's Y, from its first block to its last. dM is `d_move` times `move_scale`."""
    grid_wait()
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    blocks: tl.constexpr = CP // SUB
    i = tl.arange(0, SUB)
    s = tl.arange(0, SP)
    square = i[:, None] * SUB + i[None, :]
    moved = d_move_ptr + chunk * (SP * SP) + column[None, :] * SP + s[:, None]
    state = tl.zeros((SP, WIDTH), tl.float32)
    for block in tl.range(0, blocks, num_stages=1):
        row = chunk * CP + block * SUB + i
        grid = row[:, None] * SP + column[None, :]
        since, begin, end, _ = decays_of(since_ptr, chunk, block, i, CP, SUB)
        k = unit_keys(k_ptr, row, s, tl.load(length_ptr + row), SP)
        # Both states in one product: what precedes the block decays by exp(F) up to here.
        before = state + tl.exp(begin) * move_scale * tl.load(moved).to(tl.float32)
        d = tl.load(d_enter_ptr + grid).to(tl.float32)
        d -= tl.dot(k * tl.exp(since - begin)[:, None], before, input_precision=PRECISION)
        inverse = tl.load(inverse_ptr + (chunk * blocks + block) * (SUB * SUB) + square)
        y = tl.dot(inverse, d, input_precision=PRECISION)
        tl.store(y_ptr + grid, y)
        state *= tl.exp(end - begin)
        state = tl.dot(tl.trans(k * tl.exp(end - since)[:, None]), y, state, input_precision=PRECISION)


@triton.jit
def unit_gradient(x, d, inverse):
    """Gradient of what was divided by its length, `1 / inverse`, to x; 0 where it was 0."""
    d = (d - x * tl.sum(x * d, 1)[:, None]) * inverse[:, None]
    return tl.where((inverse < 1e11)[:, None], d, 0.0)


@triton.jit
def pair_sums(
    left_ptr, right_ptr, k_ptr, since_ptr, length_ptr, chunk, block, other, since, length, out, d_since, i,
    AFTER: tl.constexpr, CP: tl.constexpr, SP: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add `sum_j H_ij k_j` over the slots of another block that come before those of this one, or with AFTER `sum_j
    H_ji k_j` over those that come after; and what these pairs give to F's gradient, `H_ij k_i k_j` and its opposite.
    """
    s = tl.arange(0, SP)
    row = chunk * CP + other * SUB + i
    since_j = tl.load(since_ptr + row)
    length_j = tl.load(length_ptr + row)
    own = (chunk * CP + block * SUB + i)[:, None] * SP + s[None, :]
    grid = row[:, None] * SP + s[None, :]
    left = tl.load(left_ptr + own).to(tl.float32)
    right = tl.load(right_ptr + grid).to(tl.float32)
    h = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    h *= tl.exp(-tl.abs(since[:, None] - since_j[None, :]))
    m, n = block * SUB + i[:, None], other * SUB + i[None, :]
    if AFTER:
        h = tl.where(m < n, h, 0.0)
    else:
        h = tl.where(m > n, h, 0.0)
    h *= length_j[None, :]
    k_j = tl.load(k_ptr + grid)
    products = tl.dot(tl.load(k_ptr + own), tl.trans(k_j), input_precision=PRECISION)
    sums = tl.sum(h * products, 1) * length
    d_since += sums if AFTER else -sums
    return out - tl.dot(h, k_j.to(tl.float32), input_precision=PRECISION), d_since


@kernel
@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, since_ptr, length_ptr, enter_ptr, y_ptr, d_read_ptr, d_move_ptr, d_q_ptr, d_k_ptr, d_since_ptr,
    leaves_ptr, d_write_ptr, move_scale,
    CP: tl.constexpr, SP: tl.constexpr, SUB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the heads of one block. Also stored, per slot: what F's gradient gets from all but
    `exp(F_C - F_i) K`, what that gives, and `P Y`.

    F's gradients nearly cancel in their sums: those of each pair of slots are the same number for both."""
    grid_wait()
    blocks: tl.constexpr = CP // SUB
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    i = tl.arange(0, SUB)
    s = tl.arange(0, SP)
    row = chunk * CP + block * SUB + i
    grid = row[:, None] * SP + s[None, :]
    since = tl.load(since_ptr + row)
    length = tl.load(length_ptr + row)
    move = tl.load(d_move_ptr + chunk * (SP * SP) + s[:, None] * SP + s[None, :])
    out = tl.dot(tl.load(enter_ptr + grid), move, input_precision=PRECISION) * -(move_scale * tl.exp(since))[:, None]
    d_since = tl.sum(out * unit_keys(k_ptr, row, s, length, SP), 1)
    for other in tl.range(0, block + 1, num_stages=1):
        out, d_since = pair_sums(
            enter_ptr, y_ptr, k_ptr, since_ptr, length_ptr, chunk, block, other, since, length, out, d_since, i, False,
            CP, SP, SUB, PRECISION,
        )  # fmt: skip
    for other in tl.range(block, blocks, num_stages=1):
        out, d_since = pair_sums(
            y_ptr, enter_ptr, k_ptr, since_ptr, length_ptr, chunk, block, other, since, length, out, d_since, i, True,
            CP, SP, SUB, PRECISION,
        )  # fmt: skip
    y = tl.load(y_ptr + grid)
    tl.store(d_write_ptr + row, tl.sum(tl.load(enter_ptr + grid).to(tl.float32) * y, 1))
    leaving = tl.exp(tl.load(since_ptr + chunk * CP + CP - 1) - since)[:, None] * y
    unit = unit_keys(k_ptr, row, s, length, SP)
    tl.store(leaves_ptr + row, tl.sum(leaving * unit, 1))
    tl.store(d_k_ptr + grid, unit_gradient(unit, out + leaving, length).to(d_k_ptr.dtype.element_ty))
    q = tl.load(q_ptr + grid).to(tl.float32)
    q_length = inverse_lengths(q)
    q = q * q_length[:, None]
    d_query = tl.load(d_read_ptr + grid).to(tl.float32) * tl.exp(since)[:, None]
    tl.store(d_since_ptr + row, d_since + tl.sum(d_query * q, 1))
    tl.store(d_q_ptr + grid, unit_gradient(q, d_query, q_length).to(d_q_ptr.dtype.element_ty))


@kernel
@triton.jit
def gates_gradient_kernel(
    gates_ptr, gates_stride, rms_ptr, gain_ptr, bias_ptr, source_ptr, since_ptr, write_ptr, d_move_ptr, d_since_ptr,
    leaves_ptr, d_write_ptr, d_gates_ptr, d_gates_stride, d_bias_ptr, N, G, C, shift, width, move_scale,
    CP: tl.constexpr, SP: tl.constexpr, SUB: tl.constexpr, SCALED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates' inputs of one chunk, from what `key_gradient_kernel` has stored. `d_gates` has `width`
    columns, of which those from the third on are 0; `d_bias`, `[chunks, 2]`, sums them over the chunk.

    A log decay's gradient is that of F over this and all later tokens, and what leaves the chunk from all earlier
    ones."""
    grid_wait()
    chunk = tl.program_id(0)
    blocks: tl.constexpr = CP // SUB
    i = tl.arange(0, SUB)
    s = tl.arange(0, SP)
    first = chunk.to(tl.int64) * CP
    diagonal = tl.load(d_move_ptr + chunk.to(tl.int64) * (SP * SP) + s * (SP + 1)).to(tl.float32)
    around = tl.exp(tl.load(since_ptr + first + CP - 1)) * move_scale * tl.sum(diagonal, 0)
    behind = 0.0
    for block in range(0, blocks):
        behind += tl.sum(tl.load(d_since_ptr + first + block * SUB + i), 0)
    before = 0.0
    d_forget_sum = 0.0
    d_write_sum = 0.0
    for block in range(0, blocks):
        slot = block * SUB + i
        d_since = tl.load(d_since_ptr + first + slot)
        leaves = tl.load(leaves_ptr + first + slot)
        behind -= tl.sum(d_since, 0)
        d_forget = around + (behind + tl.cumsum(d_since, 0, reverse=True)) + (before + tl.cumsum(leaves, 0) - leaves)
        before += tl.sum(leaves, 0)
        token, real = token_rows(source_ptr, chunk, slot, N, G, C, shift, RAGGED)
        gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
        x = gate_inputs(gates_ptr, gates_stride, 0, bias_ptr, token, real, gain, SCALED)
        d_forget = tl.where(real, d_forget * tl.sigmoid(-x), 0.0)
        # dw_i = P_i Y_i / w_i^2
        write = tl.load(write_ptr + first + slot)
        d_write = tl.load(d_write_ptr + first + slot) * (1.0 - write) / tl.where(write > 0.0, write, 1.0)
        d_write = tl.where(real & (write > 0.0), d_write, 0.0)
        d_forget_sum += tl.sum(d_forget, 0)
        d_write_sum += tl.sum(d_write, 0)
        if SCALED:
            d_forget *= gain
            d_write *= gain
        column = tl.arange(0, 8)[None, :]
        d_gates = tl.where(column == 0, d_forget[:, None], tl.where(column == 1, d_write[:, None], 0.0))
        place = d_gates_ptr + token[:, None] * d_gates_stride + column
        tl.store(place, d_gates.to(d_gates_ptr.dtype.element_ty), mask=real[:, None] & (column < width))
    tl.store(d_bias_ptr + chunk * 2, d_forget_sum)
    tl.store(d_bias_ptr + chunk * 2 + 1, d_write_sum)


# ------------------------------------------------------------------------------------------------------------------
# Launches
# ------------------------------------------------------------------------------------------------------------------
# Slots of a block. Float32 products need more registers.
BLOCK, BLOCK_FLOAT32 = 64, 32
# Warps of programs, and columns of P and Y that one of them computes.
PREPARE, SOLVE, KEYS = {"width": 32, "warps": 4}, {"width": 32, "warps": 4}, {"warps": 8}
# Programs of a chain, below which its tiles are narrower.
FEW_CHAINS = 256


class Prepared(NamedTuple):
    """What a layer's chunks are to the state, besides P, which takes the place of the linear key.

    Attributes:
        slots: F, w, and one over the key's length, of every slot, float32 `[3, GT, CP]`.
        inverse: T of every block, float32 `[blocks, block, block]`.
        erase: `[GT, SP, SP]`. decay: float32 `[GT]`.
    """

    slots: Tensor
    inverse: Tensor
    erase: Tensor
    decay: Tensor


def block_of(shape: Shape) -> int:
    return min(BLOCK_FLOAT32 if shape.dtype == torch.float32 else BLOCK, shape.tiles.CP)


def warps_of(group: dict, dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float32 else group["warps"]


def sizes(shape: Shape) -> Prepared:
    """Shapes of `Prepared`."""
    CP, SP, block = shape.tiles.CP, shape.tiles.SP, block_of(shape)
    return Prepared(
        (3, shape.GT, CP), (shape.GT * CP // block, block, block), (shape.GT, SP, SP), (shape.GT,)
    )  # fmt: skip


def gate_arguments(inputs: Inputs) -> tuple:
    rms, gain, _ = inputs.norm("bias_u")
    return inputs.gates, inputs.gates.stride(0), rms, gain, inputs.gate_bias, inputs.tokens


def launch_prepare(shape: Shape, inputs: Inputs, heads: Tensor, since: Tensor | None = None) -> Prepared:
    """Fill the rows of `heads` that states are read and made with, `shape.lin_row` and the one after it, from the last
    two heads before them; `since` as of `Cached`."""
    CP, SP, block, row = shape.tiles.CP, shape.tiles.SP, block_of(shape), shape.lin_row
    size = sizes(shape)
    slots, inverse, decay = (heads.new_empty(x, dtype=torch.float32) for x in (size.slots, size.inverse, size.decay))
    erase = heads.new_empty(size.erase)
    options = {"CP": CP, "SP": SP, "SUB": block}
    width, precision = min(PREPARE["width"], SP), dot_precision(shape.dtype)
    gates_kernel(
        (shape.GT * CP // block,),
        heads[row - 2], heads[row - 1], *gate_arguments(inputs), heads[row], *slots, inverse,
        decay if since is None else since, *shape.grid, float(shape.C), **options, LEVELS=block.bit_length() - 1,
        SCALED=shape.scaled, RAGGED=inputs.source is not None, CACHED=since is not None, PRECISION=precision,
        num_warps=4,
    )  # fmt: skip
    prepare_kernel(
        (shape.GT, SP // width),
        heads[row - 1], slots[0], slots[2], inverse, heads[row + 1], erase, decay, **options, WIDTH=width,
        PRECISION=precision, num_warps=warps_of(PREPARE, shape.dtype),
    )  # fmt: skip
    return Prepared(slots, inverse, erase, decay)


def launch_states(
    shape: Shape, inputs: Inputs, added: Tensor, prepared, *, scaled: bool = False, reverse: bool = False,
    cached: Cached | None = None, want_final: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state before each chunk, or with `reverse` the gradient of that behind it, over C, `[GT, SP, E]`; and on
    request the state behind each document, float32 `[documents, SP, E]`.

    Args:
        added: what each chunk adds, `[GT, SP, E]`, with `scaled` over C. prepared: has the fields of `Prepared`.
        cached: what documents, which are rows, begin from.
    """
    E, index, wide = shape.E, inputs.index, shape.dtype == torch.float32
    states = torch.empty_like(added, dtype=shape.dtype)
    final = added.new_empty((index.documents, shape.tiles.SP, E) if want_final else (0,), dtype=torch.float32)
    initial, opened = (None, None) if cached is None else (cached.initial, cached.opened)
    begins = initial is not None
    block_e = 64 if index.documents * cdiv(E, 64) >= FEW_CHAINS and not wide else 32
    chain_kernel(
        (index.documents, cdiv(E, block_e)),
        # Pieces are chunks.
        added, prepared.erase, prepared.decay, index.document_begin, index.document_end,
        *((initial, opened) if begins else (final, final)), states, final, E, 1.0 if scaled else 1.0 / shape.C,
        float(shape.C), SP=shape.tiles.SP, REVERSE=reverse, INITIAL=begins, FINAL=want_final, BLOCK_E=block_e,
        PRECISION=dot_precision(shape.dtype), STAGES=2 if wide else 3, num_warps=8 if wide else 4,
    )  # fmt: skip
    return states, final


def launch_prepare_gradient(
    shape: Shape, inputs: Inputs, heads: Tensor, prepared, d_heads: Tensor, prefix: Tensor,
    d_prefix: Tensor, d_gates: Tensor,
) -> Tensor:  # fmt: skip
    """Fill the last two heads of `d_heads`, and `d_gates`; sums of the gates' gradients, float32 `[GT, 2]`.

    Args:
        d_heads: has the gradients of what `launch_prepare` has filled.
        prefix, d_prefix: states before each chunk, and gradients of those behind it, both over C.
    """
    CP, SP, block, row = shape.tiles.CP, shape.tiles.SP, block_of(shape), shape.lin_row
    new = prepared.decay.new_empty
    d_move = torch.bmm(d_prefix, prefix.transpose(1, 2))
    y = new((shape.GT, CP, SP))
    d_since, leaves, d_write = new((3, shape.GT, CP))
    d_bias = new((shape.GT, 2))
    since, write, length = prepared.slots
    width, scale = min(SOLVE["width"], SP), float(shape.C)
    options = {"CP": CP, "SP": SP, "SUB": block}
    precision = dot_precision(shape.dtype)
    solve_kernel(
        (shape.GT, SP // width),
        heads[row - 1], since, length, prepared.inverse, d_heads[row + 1], d_move, y, scale, **options, WIDTH=width,
        PRECISION=precision, num_warps=warps_of(SOLVE, shape.dtype),
    )  # fmt: skip
    key_gradient_kernel(
        (shape.GT * CP // block,),
        heads[row - 2], heads[row - 1], since, length, heads[row + 1], y, d_heads[row], d_move, d_heads[row - 2],
        d_heads[row - 1], d_since, leaves, d_write, scale, **options, PRECISION=precision,
        num_warps=warps_of(KEYS, shape.dtype),
    )  # fmt: skip
    gates_gradient_kernel(
        (shape.GT,),
        *gate_arguments(inputs), since, write, d_move, d_since, leaves, d_write, d_gates, d_gates.stride(0),
        d_bias, *shape.grid, d_gates.shape[1], scale, **options, SCALED=shape.scaled, RAGGED=inputs.source is not None,
        num_warps=4,
    )  # fmt: skip
    return d_bias
