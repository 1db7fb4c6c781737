# SPDX-License-Identifier: Apache-2.0
"""Forward kernels of gated mixed chunk attention: heads, scores, states, and the gated output."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    add_state_product,
    basis,
    grid_wait,
    has_tokens,
    load_grid,
    load_rows,
    load_tile,
    preactivation,
    previous_rows,
    rotated_pair,
    row_gain,
    silu,
    state_depth,
    store_rows,
    token_rows,
    values_of,
    vector,
)
from .dispatch import kernel


@triton.jit
def copy_part(from_ptr, to_ptr, count, padded, block, BLOCK: tl.constexpr):
    """A block of the `padded` numbers at `to_ptr`: `count` from elsewhere, in its type, and zeros."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(from_ptr + place, mask=place < count, other=0.0)
    tl.store(to_ptr + place, part.to(to_ptr.dtype.element_ty), mask=place < padded)


@triton.jit
def join_weights(
    u_ptr, v_ptr, z_ptr, gates_ptr, w_ptr, wide, narrow, gates, padded, block, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of the joined weights: `wide` numbers of u and of v, `narrow` of z, and `gates`, with zeros after them
    up to `padded`."""
    wide_blocks, narrow_blocks = tl.cdiv(wide, BLOCK), tl.cdiv(narrow, BLOCK)
    if block < wide_blocks:
        copy_part(u_ptr, w_ptr, wide, wide, block, BLOCK)
    elif block < 2 * wide_blocks:
        copy_part(v_ptr, w_ptr + wide, wide, wide, block - wide_blocks, BLOCK)
    elif block < 2 * wide_blocks + narrow_blocks:
        copy_part(z_ptr, w_ptr + 2 * wide, narrow, narrow, block - 2 * wide_blocks, BLOCK)
    else:
        rest = block - 2 * wide_blocks - narrow_blocks
        copy_part(gates_ptr, w_ptr + 2 * wide + narrow, gates, padded, rest, BLOCK)


@kernel
@triton.jit
def norm_kernel(
    x_ptr, gain_ptr, rms_ptr, out_ptr, u_ptr, v_ptr, z_ptr, gates_ptr, w_ptr, T, D, token_blocks, wide, narrow, gates,
    padded, eps, CAST: tl.constexpr, SCALE: tl.constexpr, JOIN: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`1 / sqrt(mean(x^2) + eps)` of each token; with CAST also x in the products' type, with SCALE the norm. For
    `STEPS` blocks of tokens, of which some are loaded ahead. With JOIN, programs behind those of the tokens join the
    weights of the projections."""
    grid_wait()
    if JOIN:
        block = tl.program_id(0) - token_blocks
        if block >= 0:
            join_weights(
                u_ptr, v_ptr, z_ptr, gates_ptr, w_ptr, wide, narrow, gates, padded, block, BLOCK_T * BLOCK_D
            )  # fmt: skip
            return
    column = tl.arange(0, BLOCK_D)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        token = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        real = token < T
        mask = real[:, None] & (column < D)[None, :]
        offset = token[:, None] * D + column[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        tl.store(rms_ptr + token, rms, mask=real)
        if SCALE:
            x = x * (rms * tl.load(gain_ptr).to(tl.float32))[:, None]
        if CAST or SCALE:
            tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=mask)


@kernel
@triton.jit
def heads_kernel(
    z_ptr, z_stride, rms_ptr, gain_ptr, bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, factor_ptr, source_ptr,
    opens_ptr, heads_ptr, N, G, C, shift, GT, S, rotary_dim, table_rows, first_block, row_blocks,
    H: tl.constexpr, LIN_Q: tl.constexpr, PREVIOUS: tl.constexpr, LOCAL: tl.constexpr, CP: tl.constexpr,
    SP: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, SCALED: tl.constexpr,
    SILU: tl.constexpr, FAST: tl.constexpr, RAGGED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Heads `RoPE(gamma_h silu(z) + beta_h)` on the chunk grid, `[H, GT, CP, SP]`; the linear query times its chunk's
    factor. HALF pairs of dimensions are turned, REST pass through. With PREVIOUS the last two heads, the linear ones,
    are not turned, and the last one is made from the z of the token before. With LOCAL the local key has every second
    pair of dimensions from the token before, turned by that token's position. Of each row's blocks of slots,
    `row_blocks` are computed, from `first_block` on."""
    grid_wait()
    blocks: tl.constexpr = CP // BLOCK_M
    block = first_block + tl.program_id(0) % row_blocks
    chunk = tl.program_id(0) // row_blocks * G + block // blocks
    slot = (block % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, real = token_rows(source_ptr, chunk, slot, N, G, C, shift, RAGGED)
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    factor = tl.load(factor_ptr + chunk)
    if PREVIOUS or LOCAL:
        before, has_before = previous_rows(source_ptr, opens_ptr, chunk, slot, N, G, C, shift, RAGGED)
        gain_before = row_gain(rms_ptr, gain_ptr, before, has_before) if SCALED else has_before.to(tl.float32)
    if HALF > 0:
        one, two, inside = rotated_pair(rotary_dim, HALF, INTERLEAVED)
        z_one = silu(basis(z_ptr, z_stride, token, real, one, inside, gain, bias_ptr, SCALED), SILU, FAST)
        z_two = silu(basis(z_ptr, z_stride, token, real, two, inside, gain, bias_ptr, SCALED), SILU, FAST)
        table = ((chunk * C + slot) % table_rows)[:, None] * (rotary_dim // 2) + tl.arange(0, HALF)[None, :]
        # A token's slots alone: an empty slot's head is 0.
        mask = real[:, None] & inside[None, :]
        cos = tl.load(cos_ptr + table, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
        if LOCAL:
            odd = (tl.arange(0, HALF) % 2 == 1)[None, :]
            other = has_before[:, None] & inside[None, :] & odd
            before_table = ((chunk * C + slot - 1) % table_rows)[:, None] * (rotary_dim // 2) + tl.arange(0, HALF)[
                None, :
            ]
            before_cos = tl.load(cos_ptr + before_table, mask=other, other=0.0)
            before_sin = tl.load(sin_ptr + before_table, mask=other, other=0.0)
            local_one = basis(z_ptr, z_stride, before, has_before, one, inside, gain_before, bias_ptr, SCALED)
            local_two = basis(z_ptr, z_stride, before, has_before, two, inside, gain_before, bias_ptr, SCALED)
            local_one, local_two = silu(local_one, SILU, FAST), silu(local_two, SILU, FAST)
        for head in tl.static_range(H):
            row = real
            if PREVIOUS and head == H - 1:
                row = has_before
                z_one = basis(z_ptr, z_stride, before, row, one, inside, gain_before, bias_ptr, SCALED)
                z_two = basis(z_ptr, z_stride, before, row, two, inside, gain_before, bias_ptr, SCALED)
                z_one, z_two = silu(z_one, SILU, FAST), silu(z_two, SILU, FAST)
            p_one = z_one * vector(gamma_ptr, head, S, one, inside) + vector(beta_ptr, head, S, one, inside)
            p_two = z_two * vector(gamma_ptr, head, S, two, inside) + vector(beta_ptr, head, S, two, inside)
            if head == LIN_Q:
                p_one *= factor
                p_two *= factor
            out = heads_ptr + ((head * GT + chunk).to(tl.int64) * CP + slot)[:, None] * SP
            dtype = heads_ptr.dtype.element_ty
            if PREVIOUS and head >= H - 2:
                turned_one, turned_two = tl.where(row[:, None], p_one, 0.0), tl.where(row[:, None], p_two, 0.0)
            else:
                turned_one, turned_two = p_one * cos - p_two * sin, p_two * cos + p_one * sin
            if LOCAL and head == 1:
                p_one = local_one * vector(gamma_ptr, head, S, one, inside) + vector(beta_ptr, head, S, one, inside)
                p_two = local_two * vector(gamma_ptr, head, S, two, inside) + vector(beta_ptr, head, S, two, inside)
                turned_one = tl.where(odd, p_one * before_cos - p_two * before_sin, turned_one)
                turned_two = tl.where(odd, p_two * before_cos + p_one * before_sin, turned_two)
            tl.store(out + one[None, :], turned_one.to(dtype), mask=inside[None, :])
            tl.store(out + two[None, :], turned_two.to(dtype), mask=inside[None, :])
    if REST > 0:
        column = rotary_dim + tl.arange(0, REST)
        inside = column < S
        z = silu(basis(z_ptr, z_stride, token, real, column, inside, gain, bias_ptr, SCALED), SILU, FAST)
        for head in tl.static_range(H):
            row = real
            if PREVIOUS and head == H - 1:
                row = has_before
                z = basis(z_ptr, z_stride, before, row, column, inside, gain_before, bias_ptr, SCALED)
                z = silu(z, SILU, FAST)
            p = z * vector(gamma_ptr, head, S, column, inside) + vector(beta_ptr, head, S, column, inside)
            if head == LIN_Q:
                p *= factor
            p = tl.where(row[:, None], p, 0.0)
            if LOCAL and head == 1:
                local = basis(z_ptr, z_stride, before, has_before, column, inside, gain_before, bias_ptr, SCALED)
                local = silu(local, SILU, FAST)
                local = local * vector(gamma_ptr, head, S, column, inside) + vector(beta_ptr, head, S, column, inside)
                odd = ((column // 2 if INTERLEAVED else column) % 2 == 1)[None, :]
                p = tl.where(odd, tl.where(has_before[:, None], local, 0.0), p)
            out = heads_ptr + ((head * GT + chunk).to(tl.int64) * CP + slot)[:, None] * SP + column[None, :]
            tl.store(out, p.to(heads_ptr.dtype.element_ty), mask=inside[None, :])


@triton.jit
def lower_tile(index, TILES: tl.constexpr, CAUSAL: tl.constexpr):
    """The `index`-th tile (query block, key block) that attention needs: all, or those not above the diagonal."""
    if CAUSAL:
        m = 0
        for _ in tl.static_range(1, TILES):
            m += (index >= (m + 1) * (m + 2) // 2).to(tl.int32)
        return m, index - m * (m + 1) // 2
    else:
        return index // TILES, index % TILES


@kernel
@triton.jit
def scores_kernel(
    q_ptr, k_ptr, bias_ptr, a_ptr, N, G, C, shift, scale,
    CP: tl.constexpr, SP: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr, SKIP: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention weights `A = relu(scale q k^T + b)^2` of one tile, `[GT, CP, CP]`. Tiles above the diagonal of a
    causal model, and with SKIP those of halves of chunks without tokens, are neither written nor read."""
    grid_wait()
    tiles: tl.constexpr = TILES * (TILES + 1) // 2 if CAUSAL else TILES * TILES
    chunk = (tl.program_id(0) // tiles).to(tl.int64)
    block_m, block_n = lower_tile(tl.program_id(0) % tiles, TILES, CAUSAL)
    if SKIP:
        has_m = has_tokens(chunk, block_m * BLOCK, N, G, C, shift)
        if not (has_m & has_tokens(chunk, block_n * BLOCK, N, G, C, shift)):
            return
    m = block_m * BLOCK + tl.arange(0, BLOCK)
    n = block_n * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.static_range(0, SP, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        q = tl.load(q_ptr + (chunk * CP + m)[:, None] * SP + s[None, :])
        k = tl.load(k_ptr + (chunk * CP + n)[:, None] * SP + s[None, :])
        acc = tl.dot(q, tl.trans(k), acc, input_precision=PRECISION)
    score = acc * scale
    offset = n[None, :] - m[:, None]
    inside = (m < C)[:, None] & (n < C)[None, :]
    if BIAS:
        score += tl.load(bias_ptr + offset + C - 1, mask=inside, other=0.0).to(tl.float32)
    if CAUSAL:
        inside = inside & (offset <= 0)
    score = tl.where(inside, tl.maximum(score, 0.0), 0.0)
    tl.store(a_ptr + (chunk * CP + m)[:, None] * CP + n[None, :], (score * score).to(a_ptr.dtype.element_ty))


@kernel
@triton.jit
def states_kernel(
    keys, v, v_stride, rms_ptr, gain_ptr, bias_ptr, source_ptr, begin_ptr, end_ptr, value_ptr, prefix_ptr, total_ptr,
    N, G, C, shift, E,
    CP: tl.constexpr, SP: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
    RAGGED: tl.constexpr, EVEN_E: tl.constexpr, TMA: tl.constexpr, PREFIX: tl.constexpr, TOTAL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`sum k v^T` over the chunks of one piece (consecutive chunks of one document): with TOTAL `[pieces, SP, E]` in
    float32, and with PREFIX what the sum was before each chunk, over C, `[GT, SP, E]`. The values are computed here,
    from their input, and stored for the other kernels."""
    grid_wait()
    # From the last piece on: the projection ended there, and the cache still holds what it wrote.
    piece = tl.num_programs(0) - 1 - tl.program_id(0)
    first_e = tl.program_id(1) * BLOCK_E
    column = first_e + tl.arange(0, BLOCK_E)
    s = tl.arange(0, SP)
    k = tl.arange(0, BLOCK_K)
    begin = tl.load(begin_ptr + piece)
    end = tl.load(end_ptr + piece)
    offset = s[:, None] * E + column[None, :]
    mask = (column < E)[None, :]
    acc = tl.zeros((SP, BLOCK_E), tl.float32)
    inverse = 1.0 / C
    STEPS: tl.constexpr = CP // BLOCK_K
    # One loop, so that loads run ahead across the chunks' borders.
    for step in tl.range(0, (end - begin) * STEPS, num_stages=STAGES):
        chunk = begin + step // STEPS
        if PREFIX:
            if step % STEPS == 0:
                pointers = prefix_ptr + chunk.to(tl.int64) * (SP * E) + offset
                tl.store(pointers, (acc * inverse).to(prefix_ptr.dtype.element_ty), mask=mask)
        slot = (step % STEPS) * BLOCK_K
        row = chunk * CP + slot
        token, real = token_rows(source_ptr, chunk, slot + k, N, G, C, shift, RAGGED)
        key = load_grid(keys, SP, row, k, 0, s, TMA)
        value = load_tile(v, v_stride, token, real, chunk, slot, column, first_e, E, G, C, shift, EVEN_E, TMA)
        if SILU:
            value = values_of(value, rms_ptr, gain_ptr, bias_ptr, token, real, column, E, SCALED, SILU, FAST)
            value = value.to(value_ptr.dtype.element_ty)
            store_rows(value_ptr, E, token, real, column, E, value, EVEN_E)
        acc = tl.dot(tl.trans(key), value, acc, input_precision=PRECISION)
    if TOTAL:
        tl.store(total_ptr + piece.to(tl.int64) * (SP * E) + offset, acc, mask=mask)


@kernel
@triton.jit
def values_kernel(
    v_ptr, v_stride, rms_ptr, gain_ptr, bias_ptr, value_ptr, T, E,
    SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Values `silu(h)`, where no sum over them is needed."""
    grid_wait()
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    real = token < T
    raw = load_rows(v_ptr, v_stride, token, real, column, E, False)
    value = values_of(raw, rms_ptr, gain_ptr, bias_ptr, token, real, column, E, SCALED, SILU, FAST)
    store_rows(value_ptr, E, token, real, column, E, value, False)


@kernel
@triton.jit
def carry_kernel(
    total_ptr, initial_ptr, begin_ptr, end_ptr, carry_ptr, final_ptr, size, carry_scale, final_scale,
    INITIAL: tl.constexpr, CARRY: tl.constexpr, FINAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running sums over a document's pieces: CARRY, the sum before each piece; FINAL, the sum of all."""
    grid_wait()
    document = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    begin = tl.load(begin_ptr + document)
    end = tl.load(end_ptr + document)
    acc = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        acc += tl.load(initial_ptr + document.to(tl.int64) * size + place, mask=mask, other=0.0).to(tl.float32)
    for step in range(0, end - begin):
        piece = (end - 1 - step if REVERSE else begin + step).to(tl.int64)
        if CARRY:
            tl.store(carry_ptr + piece * size + place, (acc * carry_scale).to(carry_ptr.dtype.element_ty), mask=mask)
        acc += tl.load(total_ptr + piece * size + place, mask=mask, other=0.0)
    if FINAL:
        final = (acc * final_scale).to(final_ptr.dtype.element_ty)
        tl.store(final_ptr + document.to(tl.int64) * size + place, final, mask=mask)


@triton.jit
def newest_key(
    z_ptr, gain, bias_ptr, gamma_ptr, beta_ptr, cos_ptr, sin_ptr, angle, s, inside, rotary_dim,
    INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """`RoPE(gamma silu(z) + beta)` of one token at key dimensions s, turned by row `angle` of the tables."""
    half = rotary_dim // 2
    if INTERLEAVED:
        first, pair, place = s % 2 == 0, s ^ 1, s // 2
    else:
        first = s < half
        pair, place = tl.where(first, s + half, s - half), tl.where(first, s, s - half)
    turned = s < rotary_dim
    own = scaled_basis(z_ptr, gain, bias_ptr, gamma_ptr, beta_ptr, s, inside, SCALED, SILU, FAST)
    other = scaled_basis(z_ptr, gain, bias_ptr, gamma_ptr, beta_ptr, pair, turned, SCALED, SILU, FAST)
    cos = tl.load(cos_ptr + angle * half + place, mask=turned, other=1.0)
    sin = tl.load(sin_ptr + angle * half + place, mask=turned, other=0.0)
    return own * cos + other * tl.where(first, -sin, sin)


@triton.jit
def scaled_basis(
    z_ptr, gain, bias_ptr, gamma_ptr, beta_ptr, column, mask, SCALED: tl.constexpr, SILU: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """`gamma silu(z) + beta` of one token at some key dimensions."""
    z = tl.load(z_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        z = z * gain + tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return gamma * silu(z, SILU, FAST) + tl.load(beta_ptr + column, mask=mask, other=0.0).to(tl.float32)


@kernel
@triton.jit
def open_chunk_kernel(
    heads_ptr, v_ptr, v_stride, z_ptr, z_stride, rms_ptr, gain_ptr, bias_v_ptr, bias_z_ptr, gamma_ptr, beta_ptr,
    cos_ptr, sin_ptr, source_ptr, chunk_ptr, seen_ptr, quad_k_ptr, lin_k_ptr, value_ptr, new_seen_ptr, N, G, C, shift,
    GT, E, S, rotary_dim, table_rows, slots, skipped, seen_stride,
    QUAD: tl.constexpr, LIN: tl.constexpr, H: tl.constexpr, PREVIOUS: tl.constexpr, LOCAL: tl.constexpr,
    CP: tl.constexpr, SP: tl.constexpr, INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr,
    FAST: tl.constexpr, RAGGED: tl.constexpr, LAST: tl.constexpr, SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A row's open chunk as a decoding state has it, see `DecodingState`: its values, `[rows, slots, E]`, its keys,
    `[rows, slots, S]`, with a slot more where they are shifted, and the row's count of tokens.

    The open chunk is `chunk` of all rows, or with LAST each row's last one. Slots without tokens are 0. Programs
    behind those of the values copy the keys. Where these are shifted, the slot behind the last token gets that token's
    own key: it is made here, but in ragged rows where the heads have that slot.
    """
    grid_wait()
    blocks = tl.cdiv(slots + 1, BLOCK_C)
    row = tl.program_id(0) // blocks
    chunk = row * G + G - 1
    if not LAST:
        chunk = tl.load(chunk_ptr + row).to(tl.int32)
    out_slot = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = out_slot - skipped
    slot = tl.where(slot < 0, C, slot)
    out_row = row.to(tl.int64)
    if tl.program_id(1) < tl.num_programs(1) - 1:
        column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        token, real = token_rows(source_ptr, chunk, slot, N, G, C, shift, RAGGED)
        raw = load_rows(v_ptr, v_stride, token, real, column, E, False)
        value = values_of(raw, rms_ptr, gain_ptr, bias_v_ptr, token, real, column, E, SCALED, SILU, FAST)
        store_rows(value_ptr, E, out_row * slots + out_slot, out_slot < slots, column, E, value, False)
    else:
        if tl.program_id(0) % blocks == 0:
            tl.store(new_seen_ptr + row, tl.load(seen_ptr + row * seen_stride))
        s = tl.arange(0, SP)
        inside = s < S
        token, real = token_rows(source_ptr, chunk, slot, N, G, C, shift, RAGGED)
        copied = slot < C
        if not RAGGED:
            # Kernels leave out halves of chunks without tokens.
            copied = real
        heads = heads_ptr + (chunk.to(tl.int64) * CP + slot)[:, None] * SP + s[None, :]
        mask = copied[:, None] & inside[None, :]
        head_size = tl.cast(GT, tl.int64) * CP * SP  # an argument of 1 is a constant
        if PREVIOUS or LOCAL:
            every = tl.arange(0, SLOTS)
            every_token, every_real = token_rows(source_ptr, chunk, every, N, G, C, shift, RAGGED)
            last = tl.max(tl.where(every_real, every, -1), 0)
            last_token = tl.max(tl.where(every_real & (every == last), every_token, 0), 0)
            # A row of padding keeps the key that the cache had behind a full chunk, now in the first slot.
            none = last < 0
            newest = skipped + tl.where(none, C, last + 1)
            made = (last == C - 1) | (not RAGGED)
            first = heads_ptr + chunk.to(tl.int64) * CP * SP + s
            is_newest = (out_slot == newest) & (made | none)
            z_gain = 1.0
            if SCALED:
                z_gain = tl.load(rms_ptr + last_token) * tl.load(gain_ptr).to(tl.float32)
        if QUAD:
            key = tl.load(heads + head_size, mask=mask, other=0.0)
            if LOCAL:
                own = newest_key(
                    z_ptr + last_token * z_stride, z_gain, bias_z_ptr, gamma_ptr + S, beta_ptr + S, cos_ptr, sin_ptr,
                    (chunk * C + last) % table_rows, s, inside, rotary_dim, INTERLEAVED, SCALED, SILU, FAST,
                )  # fmt: skip
                own = own.to(heads_ptr.dtype.element_ty)
                own = tl.where(none, tl.load(first + head_size, mask=inside, other=0.0), own)
                key = tl.where(is_newest[:, None], own[None, :], key)
            at = out_row * (slots + LOCAL) + out_slot
            store_rows(quad_k_ptr, S, at, out_slot < slots + LOCAL, s, S, key, False)
        if LIN:
            key = tl.load(heads + (H - 1) * head_size, mask=mask, other=0.0)
            if PREVIOUS:
                own = newest_key(
                    z_ptr + last_token * z_stride, z_gain, bias_z_ptr, gamma_ptr + (H - 1) * S, beta_ptr + (H - 1) * S,
                    cos_ptr, sin_ptr, 0, s, inside, 0, INTERLEAVED, SCALED, SILU, FAST,
                )  # fmt: skip
                own = own.to(heads_ptr.dtype.element_ty)
                own = tl.where(none, tl.load(first + (H - 1) * head_size, mask=inside, other=0.0), own)
                key = tl.where(is_newest[:, None], own[None, :], key)
            at = out_row * (slots + PREVIOUS) + out_slot
            store_rows(lin_k_ptr, S, at, out_slot < slots + PREVIOUS, s, S, key, False)


@kernel
@triton.jit
def output_kernel(
    a, q, prefix, carry, u_ptr, u_stride, value, value_stride, rms_ptr, gain_ptr, bias_ptr, source_ptr, piece_ptr,
    opens_ptr, out_ptr, attended_ptr, N, G, C, shift, GT, E, E_BLOCKS,
    CP: tl.constexpr, SP: tl.constexpr, QUAD: tl.constexpr, LIN: tl.constexpr, PREFIX: tl.constexpr,
    CARRY: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr,
    RAGGED: tl.constexpr, EVEN_E: tl.constexpr, TMA: tl.constexpr, SKIP: tl.constexpr, ATTENDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`silu(u) * (A V + q_lin state)` of one tile of tokens and value dimensions.

    The query blocks of one chunk and value block run next to each other and share V and the state in the L2 cache.
    """
    grid_wait()
    M_BLOCKS: tl.constexpr = CP // BLOCK_M
    program = tl.program_id(0)
    block_m = program % M_BLOCKS
    first_e = ((program // M_BLOCKS) % E_BLOCKS) * BLOCK_E
    chunk = program // (M_BLOCKS * E_BLOCKS)
    column = first_e + tl.arange(0, BLOCK_E)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    row = chunk * CP + block_m * BLOCK_M
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if QUAD:
        last = (block_m + 1) * BLOCK_M if CAUSAL else CP
        for start in tl.range(0, last, BLOCK_K, num_stages=STAGES):
            token, real = token_rows(source_ptr, chunk, start + k, N, G, C, shift, RAGGED)
            weight = load_grid(a, CP, row, m, start, k, TMA)
            v = load_tile(value, value_stride, token, real, chunk, start, column, first_e, E, G, C, shift, EVEN_E, TMA)
            acc = tl.dot(weight, v, acc, input_precision=PRECISION)
    if LIN:
        piece = tl.load(piece_ptr + chunk)
        s = tl.arange(0, BLOCK_S)
        depth = state_depth(opens_ptr, chunk, GT, SP, False, SKIP)
        for start in tl.range(0, depth, BLOCK_S, num_stages=STAGES):
            query = load_grid(q, SP, row, m, start, s, TMA)
            acc = add_state_product(
                acc, query, prefix, carry, chunk, piece, s, start, column, first_e, E, SP, EVEN_E, PREFIX, CARRY, TMA,
                False, PRECISION,
            )  # fmt: skip
    token, real = token_rows(source_ptr, chunk, block_m * BLOCK_M + m, N, G, C, shift, RAGGED)
    if ATTENDED:
        store_rows(attended_ptr, E, token, real, column, E, acc, EVEN_E)
    u = load_rows(u_ptr, u_stride, token, real, column, E, EVEN_E)
    gain = row_gain(rms_ptr, gain_ptr, token, real) if SCALED else real.to(tl.float32)
    u = preactivation(u, bias_ptr, column, E, gain, SCALED)
    if SILU:
        # The backward recovers the attended value as out / silu(u): u must not be 0.
        u = tl.where(u == 0.0, 1e-20, u)
    store_rows(out_ptr, E, token, real, column, E, acc * silu(u, SILU, FAST), EVEN_E)


@kernel
@triton.jit
def rotary_bias_kernel(
    weight_ptr, cos_ptr, sin_ptr, out_ptr, offsets, S, rotary_dim,
    HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`<a, RoPE_o(b)>` of a block of offsets o, where a and b are the rows of the weight, `[2, S]`: over the pairs
    that RoPE turns, `sum (a1 b1 + a2 b2) cos + (a2 b1 - a1 b2) sin`, and what it does not turn. cos and sin are
    `[offsets, rotary_dim / 2]`."""
    grid_wait()
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    one, two, inside = rotated_pair(rotary_dim, HALF, INTERLEAVED)
    a_one, a_two = vector(weight_ptr, 0, S, one, inside), vector(weight_ptr, 0, S, two, inside)
    b_one, b_two = vector(weight_ptr, 1, S, one, inside), vector(weight_ptr, 1, S, two, inside)
    place = offset[:, None] * (rotary_dim // 2) + tl.arange(0, HALF)[None, :]
    mask = (offset < offsets)[:, None] & inside[None, :]
    cos = tl.load(cos_ptr + place, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + place, mask=mask, other=0.0)
    bias = tl.sum((a_one * b_one + a_two * b_two) * cos + (a_two * b_one - a_one * b_two) * sin, 1)
    if REST > 0:
        column = rotary_dim + tl.arange(0, REST)
        a, b = vector(weight_ptr, 0, S, column, column < S), vector(weight_ptr, 1, S, column, column < S)
        bias += tl.sum(a * b, 1)
    tl.store(out_ptr + offset, bias.to(out_ptr.dtype.element_ty), mask=offset < offsets)
