# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels: the forward and the backward of gated attention, the norm, the residual product."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import backward, choice, delta, forward, residual
from .choice import gate, hopper, product, quadratic, reduce, rowscan, scan, scores, totals, walk, wholescan
from .common import dot_precision, fast_math
from .plan import ChunkIndex
from .tiles import (
    AttentionResults,
    Cached,
    Inputs,
    Own,
    Projections,
    Shape,
    absent,
    cdiv,
    has_tma,
    power_of_2,
    rows_of,
    switches,
    tiled,
)


def has_carry(shape: Shape, index: ChunkIndex, initial: bool) -> bool:
    """Whether a sum precedes any piece: not if every document is one piece and no cache is continued."""
    return shape.causal and (index.pieces > index.documents or initial)


def state_buffers(shape: Shape, index: ChunkIndex, new, total: bool) -> tuple[Tensor, Tensor]:
    """Buffers `(prefix, total)`: sums before each chunk (causal) and, with `total`, over each piece in float32. The
    delta rule has only these, over single chunks."""
    size = (shape.tiles.SP, shape.E)
    prefix = new((shape.GT, *size)) if shape.causal and not shape.delta else new((0,))
    return prefix, new((index.pieces if total or shape.delta else 0, *size), dtype=torch.float32)


def launch_carry(shape: Shape, index: ChunkIndex, total: Tensor, initial, carried: bool, final: str, reverse: bool):
    """Sums over a document's pieces: `(carry, final)`, empty if not requested.

    Args:
        carried: fill `carry`, the sum over C before each piece.
        final: `"total"` for float32 sums over documents, `"state"` for these divided by C (bidirectional), or `""`.
        reverse: from the last piece to the first, for gradients.
    """
    documents, size = index.documents, shape.tiles.SP * shape.E
    carry = total.new_empty(total.shape if carried else (0,), dtype=shape.dtype)
    dtype = torch.float32 if final == "total" else shape.dtype
    last = total.new_empty((documents, *total.shape[1:]) if final else (0,), dtype=dtype)
    if carried or final:
        forward.carry_kernel(
            (documents, cdiv(size, 512)),
            total, total if initial is None else initial, index.document_begin, index.document_end, carry, last, size,
            1.0 / shape.C, 1.0 / shape.C if final == "state" else 1.0, INITIAL=initial is not None, CARRY=carried,
            FINAL=bool(final), REVERSE=reverse, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return carry, last


def start_carry(
    shape: Shape, index: ChunkIndex, total: Tensor, initial, carried: bool, final: str, reverse: bool, exchange
) -> Callable[[], tuple[Tensor, Tensor]]:  # fmt: skip
    """`launch_carry`, with the sums that come from pieces of rows on other processes (`parallel.Neighbours`), if
    `exchange` is not None. Begins to exchange these; what is launched before the returned function is called runs
    meanwhile."""
    if exchange is None:
        results = launch_carry(shape, index, total, initial, carried, final, reverse)
        return lambda: results
    if shape.causal and not reverse:
        sums_before = exchange.start_sums(total, index)
        return lambda: launch_carry(shape, index, total, sums_before(), carried, final, reverse)
    if shape.causal:
        add_gradients = exchange.start_gradients(total, 1.0 / shape.C, index)
        carry, last = launch_carry(shape, index, total, None, carried, final, reverse)
        return lambda: (add_gradients(carry), last)
    carry, last = launch_carry(shape, index, total, None, carried, "total", reverse)
    add_documents = exchange.start_documents(last, index)
    return lambda: (carry, (add_documents() / shape.C).to(shape.dtype))


def piece_launch(shape: Shape, inputs: Inputs) -> dict:
    """Constants that both passes over pieces share."""
    t = shape.tiles
    block_e = t.block_e if t.SP <= 128 else t.block_e // 2
    return {
        "CP": t.CP, "SP": t.SP, **switches(shape, inputs), "EVEN_E": shape.E % block_e == 0,
        "TMA": shape.tma(inputs), "PREFIX": shape.causal and not shape.delta, "BLOCK_E": block_e, "BLOCK_K": t.block_k,
        "PRECISION": dot_precision(shape.dtype), "num_warps": t.warps,
    }  # fmt: skip


def launch_scores(shape: Shape, inputs: Inputs, heads: Tensor, skip: bool = False) -> Tensor:
    """Attention weights within chunks, `[GT, CP, CP]`; empty without the quadratic branch. With `skip` those of
    `Shape.halves` alone."""
    t = shape.tiles
    if not shape.quad:
        return heads.new_empty((0,))
    weights = heads.new_empty((shape.GT, t.CP, t.CP))
    biased = inputs.bias_R is not None
    if choice.weighs(shape, heads.device):
        launch_hopper_scores(shape, inputs, heads, weights, skip)
        return weights
    forward.scores_kernel(
        (shape.score_tiles * shape.GT,),  # a grid's second dimension ends at 65,535
        heads[0], heads[1], inputs.bias_R if biased else inputs.index.factor_G, weights, *shape.grid, shape.scale,
        CP=t.CP, SP=t.SP, BIAS=biased, CAUSAL=shape.causal, SKIP=skip and shape.skips, TILES=shape.row_tiles,
        BLOCK=t.block, BLOCK_S=t.block_s, PRECISION=dot_precision(shape.dtype), num_warps=4,
    )  # fmt: skip
    return weights


def launch_hopper_scores(shape: Shape, inputs: Inputs, heads: Tensor, weights: Tensor, skip: bool) -> None:
    """`launch_scores` where `choice.weighs` is true, into `weights`."""
    blocks, biased = shape.C // 128, inputs.bias_R is not None
    run, tasks = scores.tasks_of(shape.GT, blocks, shape.causal, multiprocessors(heads.device))
    scores.scores_kernel(
        scan_grid(tasks, heads.device),
        hopper.matrix(heads[0], 64, 128), hopper.matrix(heads[1]), hopper.matrix(weights, 64, 128),
        inputs.bias_R if biased else inputs.index.factor_G, shape.N, shape.G, shape.shift, shape.scale, shape.GT,
        blocks, run, tasks, BIAS=biased, CAUSAL=shape.causal, SKIP=skip and shape.skips, STAGES=scores.STAGES,
        num_warps=4,
    )  # fmt: skip


def launch_states(
    shape: Shape, inputs: Inputs, keys: Tensor, total: Tensor, prefix: Tensor, value: Tensor
) -> None:  # fmt: skip
    """Fill `value`, and sums of `keys^T values` over pieces; see `states_kernel`.

    Args:
        total: float32 sums to be filled, unless it is empty.
        prefix: states before each chunk to be filled (causal, not with the delta rule).
    """
    options = piece_launch(shape, inputs)
    tma, block_e, block_k = options["TMA"], options["BLOCK_E"], options["BLOCK_K"]
    forward.states_kernel(
        (inputs.index.pieces, cdiv(shape.E, block_e)),
        tiled(keys, tma, block_k, shape.tiles.SP), shape.tokens(inputs.v, tma, block_k, block_e), inputs.v.stride(0),
        *inputs.norm("bias_v"), inputs.tokens, inputs.index.piece_begin, inputs.index.piece_end, value, prefix, total,
        *shape.grid, shape.E, **options, TOTAL=total.numel() > 0, STAGES=2 if shape.dtype == torch.float32 else 3,
    )  # fmt: skip


def start_totals(
    shape: Shape, inputs: Inputs, keys: Tensor, x: Tensor, cut: int, *, back: bool = False, exchange=None,
    final: bool = False,
) -> Callable[[], tuple[Tensor, Tensor]]:  # fmt: skip
    """The sum of `keys^T values` before each piece, over C, `[pieces, SP, E]`: of the values made from x, or with
    `back` of `keys^T x` behind each piece. `[rows, SP, E]` with `cut`, over the first (with `back` the last) `cut`
    chunks of each row, and of bidirectional models, over all; with the delta rule over each piece itself, a chunk.
    With `final`, which needs pieces, also the float32 sum over each document; otherwise an empty tensor. As
    `start_carry`, this returns a function that gives them."""
    index, E = inputs.index, shape.E
    pieces = shape.B if cut else index.pieces
    # A row of one piece needs no second pass.
    one_piece = not shape.causal and index.pieces == index.documents and exchange is None
    whole = cut > 0 or shape.delta or one_piece
    total = x.new_empty((pieces, shape.tiles.SP, E), dtype=shape.dtype if whole else torch.float32)
    tasks = pieces * (E // 128)
    totals.totals_kernel(
        scan_grid(tasks, x.device),
        hopper.tokens(x, shape.B, shape.N), hopper.matrix(keys), total, inputs.rms, inputs.gain, inputs.bias_v,
        index.piece_begin, index.piece_end, shape.N, shape.G, shape.shift, cut, 1.0 / shape.C if whole else 1.0,
        E // 128, tasks, BACK=back, SPLIT="cut" if cut else "pieces", SKIP=shape.skips, EVEN=shape.even,
        SLOTS=totals.SLOTS, num_warps=8,
    )  # fmt: skip
    if whole:
        return lambda: (total, total.new_empty((0,)))
    kept = ("total" if final else "") if shape.causal else "state"
    finish = start_carry(shape, index, total, None, shape.causal, kept, back, exchange)
    return finish if shape.causal else lambda: finish()[::-1]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def scan_grid(tasks: int, device: torch.device) -> tuple[int]:
    """Programs that take tasks in turn, one per multiprocessor: their tiles fill its shared memory."""
    return (min(tasks, multiprocessors(device)),)


def scan_parts(
    shape: Shape, index: ChunkIndex, exchange, device: torch.device, final: bool = False
) -> tuple[bool, int]:  # fmt: skip
    """Whether scans begin from sums of other chunks, and `launch_scan`'s `cut`. The sums over documents are `final`:
    with these, too, they walk along pieces."""
    carried = shape.delta or not shape.causal or final
    if carried or (exchange or choice.splits(shape)) and has_carry(shape, index, False):
        return True, 0
    cut = 0 if exchange else choice.cut_chunks(shape, multiprocessors(device))
    return cut > 0, cut


def scan_tiles() -> tuple[tuple[int, int], tuple[int, int]]:
    """Tiles of the left factors and of the ends of a scan over bidirectional rows."""
    return (128, walk.DEPTH.value), (128, walk.END.value)


def launch_scan(
    shape: Shape, inputs: Inputs, weights: Tensor, heads: Tensor, x: Tensor, h: Tensor, biases: tuple[Tensor, Tensor],
    out: Tensor, states: Tensor, carry: Tensor | None, cut: int, value: Tensor | None = None,
    sums: Tensor | None = None,
):  # fmt: skip
    """One scan, see `scan_kernel`: forward, or with `value` and `sums` backward.

    Args:
        biases: of x and of h.
        states: of the chunks, to be filled (causal).
        carry: what comes before each piece, or in the backward behind it; None walks along whole rows. Of
            bidirectional models, the rows' states.
        cut: chunks at the begin (backward: at the end) of rows that are walks of their own; `carry` has their sums.
    """
    (B, N), row, back = (shape.B, shape.N), shape.lin_row, value is not None
    reader, writer = (row + 1, row) if back else (row, row + 1)
    walks = 2 * B if cut else B if carry is None else inputs.index.pieces
    tasks = walks * (shape.E // 128)
    # Tiles that begin before a row are not those of a shift of whole halves.
    slots = {"SKIP": shape.skips, "EVEN": shape.even, "SHIFTED": shape.halves.start * 128 < shape.shift}
    if not shape.causal:
        step, end = scan_tiles()
        held, left = (step[::-1], step[::-1]) if back else ((128, 128), step)
        wholescan.whole_kernel(
            scan_grid(tasks, x.device),
            hopper.tokens(x, B, N, *held), hopper.tokens(h, B, N, *end), hopper.matrix(weights, *left),
            hopper.matrix(heads[reader], *step), hopper.matrix(carry), hopper.tokens(out, B, N, *end),
            hopper.tokens(out if value is None else value, B, N, *end), inputs.rms, inputs.gain, *biases,
            inputs.rms if sums is None else sums, inputs.index.piece_begin, inputs.index.piece_end, out, out.stride(0),
            out if value is None else value, N, shape.G, shape.shift, shape.E // 128, tasks, BACK=back, **slots,
            SLOTS=wholescan.BACK_SLOTS if back else wholescan.SLOTS,
            VALUE_SLOTS=wholescan.BACK_VALUE_SLOTS if back else wholescan.VALUE_SLOTS, num_warps=4,
        )  # fmt: skip
        return
    held = end = read = left = ()
    slots |= {"SLOTS": scan.SLOTS, "VALUE_SLOTS": scan.VALUE_SLOTS}
    if back:
        (read, end), held = scan_tiles(), (128, scan.SIDE.value)
        left = read[::-1]
        slots |= {"SLOTS": scan.BACK_SLOTS, "VALUE_SLOTS": scan.BACK_VALUE_SLOTS}
    scan.scan_kernel(
        (multiprocessors(x.device),) if cut else scan_grid(tasks, x.device),
        hopper.tokens(x, B, N, *held), hopper.tokens(h, B, N, *end), hopper.matrix(weights, *left),
        hopper.matrix(heads[reader], *read), hopper.matrix(heads[writer], *left), hopper.tokens(out, B, N, *end),
        hopper.matrix(states, *held), hopper.tokens(out if value is None else value, B, N, *end), inputs.rms,
        inputs.gain, *biases,
        states if carry is None else carry, inputs.rms if sums is None else sums, inputs.index.piece_begin,
        inputs.index.piece_end, out, out.stride(0), out if value is None else value, N, shape.G, shape.shift, cut,
        shape.E // 128, tasks, BACK=back, SPLIT="ends" if cut else "rows" if carry is None else "pieces", **slots,
        num_warps=4 if back else 8,
    )  # fmt: skip


def launch_row_scan(
    shape: Shape, inputs: Inputs, weights: Tensor, heads: Tensor, x: Tensor, h: Tensor, biases: tuple[Tensor, Tensor],
    out: Tensor, value: Tensor | None = None, sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`launch_scan` by `row_kernel`; returns the rows' states, `[B, SP, E]`."""
    (B, N), row, back = (shape.B, shape.N), shape.lin_row, value is not None
    reader, writer = (row + 1, row) if back else (row, row + 1)
    states = x.new_empty((B, shape.tiles.SP, shape.E))
    width = rowscan.WIDTH.value
    tasks, held = B * (shape.E // width), (128, width)
    step, end = scan_tiles()
    slots = {"SLOTS": rowscan.SLOTS, "VALUE_SLOTS": rowscan.VALUE_SLOTS}
    if back:
        slots = {"SLOTS": rowscan.BACK_SLOTS, "VALUE_SLOTS": rowscan.BACK_VALUE_SLOTS}
    rowscan.row_kernel(
        scan_grid(tasks, x.device),
        hopper.tokens(x, B, N, *held), hopper.tokens(h, B, N, *end),
        hopper.matrix(weights, *(reversed(step) if back else step)), hopper.matrix(heads[reader], *step),
        hopper.matrix(heads[writer], *step), hopper.tokens(out, B, N, *end), hopper.matrix(states, *held),
        hopper.tokens(out if value is None else value, B, N, *end), inputs.rms, inputs.gain, *biases,
        inputs.rms if sums is None else sums, out, out.stride(0), out if value is None else value, N, shape.G,
        shape.shift, shape.E // width, tasks, BACK=back, EVEN=shape.even, SHIFTED=shape.shift > 0, **slots,
        num_warps=4,
    )  # fmt: skip
    return states


def launch_heads(shape: Shape, inputs: Inputs, cached: Cached, skip: bool = False) -> Tensor:
    """Queries and keys on the chunk grid, `[H, GT, CP, SP]`; with `skip` those of `Shape.halves` alone."""
    t, S, v = shape.tiles, shape.S, inputs.v
    cos, sin, table_rows = inputs.tables
    size = (shape.rows, shape.GT, t.CP, t.SP)
    heads = v.new_empty(size) if t.SP == S else v.new_zeros(size)
    block = min(t.block, 32)
    first, blocks = 0, shape.G * t.CP // block
    if skip:
        first, blocks = (128 // block * x for x in (shape.halves.start, len(shape.halves)))
    forward.heads_kernel(
        (shape.B * blocks,),
        inputs.z, inputs.z.stride(0), *inputs.norm("bias_z"), inputs.gamma, inputs.beta, cos, sin,
        inputs.index.factor_G, inputs.tokens, inputs.index.opens_G, heads, *shape.grid, shape.GT, S, shape.rotary_dim,
        table_rows, first, blocks, H=shape.H, LIN_Q=shape.lin_row, PREVIOUS=shape.previous, LOCAL=shape.local_shift,
        CP=t.CP, SP=t.SP, **shape.pairs, INTERLEAVED=shape.interleaved, **switches(shape, inputs), BLOCK_M=block,
        num_warps=8,
    )  # fmt: skip
    if cached.kept is not None:
        for row, keys, mask in zip(shape.key_rows, cached.kept, cached.kept_mask, strict=True):
            first = heads[row].view(shape.B, shape.G, t.CP, t.SP)[:, 0, : shape.C, :S]
            first.copy_(torch.where(mask, keys.to(first.dtype), first))
    return heads


def launch_values(shape: Shape, inputs: Inputs) -> Tensor:
    """Values, for layers without a sum over them."""
    if not shape.silu:
        return inputs.v
    T, E = shape.T, shape.E
    value = inputs.v.new_empty((T, E))
    forward.values_kernel(
        (cdiv(T, 32), cdiv(E, 128)),
        inputs.v, inputs.v.stride(0), *inputs.norm("bias_v"), value, T, E, SCALED=shape.scaled, SILU=True,
        FAST=fast_math(shape.dtype), BLOCK_M=32, BLOCK_E=128, num_warps=4,
    )  # fmt: skip
    return value


# Most attention weights per launch. FLASH-Quad, which can have more, is computed in parts of some rows each.
MOST_WEIGHTS = 1 << 27


def row_parts(shape: Shape, inputs: Inputs) -> Iterator[tuple[Shape, Inputs, slice, slice]]:
    """The call in parts of whole rows, of at most `MOST_WEIGHTS` weights or of one row each: their shapes, inputs,
    rows and tokens. One part, unless rows are single chunks without states."""
    rows = max(1, MOST_WEIGHTS // shape.tiles.CP**2)
    if shape.G > 1 or shape.lin or inputs.source is not None or rows >= shape.B:
        yield shape, inputs, slice(None), slice(None)
        return
    for first in range(0, shape.B, rows):
        last = min(first + rows, shape.B)
        tokens = slice(first * shape.N, last * shape.N)
        rms = None if inputs.rms is None else inputs.rms[tokens]
        own = replace(inputs, u=inputs.u[tokens], v=inputs.v[tokens], z=inputs.z[tokens], rms=rms)
        yield replace(shape, B=last - first), own, slice(first, last), tokens


def launch_quadratic(
    kind: str, shape: Shape, inputs: Inputs, x: Tensor, y: Tensor, held: Tensor, result: Tensor, bias: Tensor,
    sums: Tensor, value: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill `result`, and with kind `"values"` `sums` and `value`; see `quadratic_kernel`."""
    B, N, E, step = shape.B, shape.N, shape.E, quadratic.STEP
    tasks = quadratic.task_count(kind, B, N, E, shape.causal)
    x_block = (step, 128) if kind == "values" else (128, step)
    y_block = (128, step) if kind == "scores" else (step, 128)
    ends = (held, result, result if value is None else value)
    quadratic.quadratic_kernel(
        scan_grid(tasks, x.device),
        hopper.matrix(x, *x_block), hopper.matrix(y, *y_block),
        *(hopper.matrix(end, 128, quadratic.HALF.value) for end in ends), inputs.rms, inputs.gain, bias, sums, B, N, E,
        tasks, KIND=kind, CAUSAL=shape.causal, STEP=step, STAGES=quadratic.STAGES, num_warps=4,
    )  # fmt: skip


def launch_output(
    shape: Shape, inputs: Inputs, heads: Tensor, weights: Tensor | None, prefix: Tensor, carry: Tensor, value: Tensor,
    skip: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`(out, attended)`, see `AttentionResults`.

    Args:
        weights: of `launch_scores`; None for rows that are computed in parts.
        skip: whether nothing precedes the first chunk of a row or document.
    """
    size = shape.T, shape.E
    out = value.new_zeros(size) if inputs.source is not None else value.new_empty(size)
    attended = torch.zeros_like(out) if shape.keeps_attended else value.new_empty((0,))
    for part, own, rows, tokens in row_parts(shape, inputs):
        scores = launch_scores(part, own, heads[:, rows]) if weights is None else weights
        if choice.spans_rows(part, own.source, out.device):
            launch_quadratic("output", part, own, scores, value[tokens], own.u, out[tokens], own.bias_u, own.rms)
        else:
            launch_chunk_outputs(
                part, own, scores, heads[part.lin_row, rows], prefix, carry, value[tokens], out[tokens],
                attended[tokens], skip,
            )  # fmt: skip
    return out, attended


def launch_chunk_outputs(
    shape: Shape, inputs: Inputs, weights: Tensor, query: Tensor, prefix: Tensor, carry: Tensor, value: Tensor,
    out: Tensor, attended: Tensor, skip: bool,
) -> None:  # fmt: skip
    """Fill `out`, and `attended` where it is kept; `query` is the linear one, otherwise as `launch_output`."""
    t, E, tma = shape.tiles, shape.E, shape.tma(inputs)
    e_blocks = cdiv(E, t.block_e)
    forward.output_kernel(
        (shape.GT * e_blocks * shape.row_tiles,),
        tiled(weights, tma, t.block, t.block_k), tiled(query, tma, t.block, t.block_s),
        tiled(prefix, tma, t.block_s, t.block_e), tiled(carry, tma, t.block_s, t.block_e), inputs.u,
        inputs.u.stride(0), shape.tokens(value, tma, t.block_k, t.block_e), value.stride(0), *inputs.norm("bias_u"),
        inputs.tokens, inputs.index.group_G, inputs.index.opens_G, out, attended, *shape.grid, shape.GT, E, e_blocks,
        CP=t.CP, SP=t.SP, QUAD=shape.quad, LIN=shape.lin, PREFIX=shape.causal, CARRY=carry.numel() > 0,
        CAUSAL=shape.causal, **switches(shape, inputs), EVEN_E=E % t.block_e == 0, TMA=tma, SKIP=skip,
        ATTENDED=shape.keeps_attended, BLOCK_M=t.block, BLOCK_E=t.block_e, BLOCK_K=t.block_k, BLOCK_S=t.block_s,
        PRECISION=dot_precision(shape.dtype), STAGES=t.stages, **t.launch,
    )  # fmt: skip


def launch_forward(
    shape: Shape, inputs: Inputs, cached: Cached, want_final: bool, exchange=None
) -> AttentionResults:  # fmt: skip
    """Heads, attention and the gate; `exchange` as of `start_carry`."""
    new, index, row = inputs.v.new_empty, inputs.index, shape.lin_row

    def nothing() -> Tensor:
        return absent(inputs.v.device, inputs.v.dtype)

    scanned = cached.initial is None and choice.scans(shape, inputs.source, inputs.v.device)
    heads = launch_heads(shape, inputs, cached, scanned)
    if exchange is not None and shape.lin:
        exchange.hide(heads[row + 1])
    own = [nothing() for _ in delta.Prepared._fields]
    if shape.delta:
        own = delta.launch_prepare(shape, inputs, heads, cached.since)
    if scanned:
        out = new((shape.T, shape.E))
        carried, cut = scan_parts(shape, index, exchange, inputs.v.device, want_final)
        held = choice.holds_rows(shape, exchange)
        before, final, finish = None, nothing(), None
        if carried and not held:
            finish = start_totals(
                shape, inputs, heads[row + 1], inputs.v, cut, exchange=exchange, final=want_final
            )  # fmt: skip
        weights = launch_scores(shape, inputs, heads, True)  # while sums are exchanged
        if finish is not None:
            before, final = finish()
        if shape.delta:
            # The scan writes what it reads, chunk by chunk.
            before, final = delta.launch_states(shape, inputs, before, own, scaled=True, want_final=want_final)
            prefix = before
        else:
            prefix = new((shape.GT, shape.tiles.SP, shape.E)) if shape.causal else nothing()
        biases = inputs.bias_v, inputs.bias_u
        if held:
            before = launch_row_scan(shape, inputs, weights, heads, inputs.v, inputs.u, biases, out)
        else:
            launch_scan(shape, inputs, weights, heads, inputs.v, inputs.u, biases, out, prefix, before, cut)
        carry = nothing() if shape.causal else before
        return AttentionResults(out, heads, prefix, carry, nothing(), final, *own)
    prefix, carry, final, weights = nothing(), nothing(), nothing(), None
    if shape.lin:
        carried = has_carry(shape, index, cached.initial is not None or exchange is not None)
        kept = "total" if want_final else "" if shape.causal else "state"
        prefix, total = state_buffers(shape, index, new, carried or bool(kept))
        value = new((shape.T, shape.E)) if shape.silu else inputs.v
        launch_states(shape, inputs, heads[row + 1], total, prefix, value)
        if shape.delta:
            prefix, final = delta.launch_states(shape, inputs, total, own, cached=cached, want_final=want_final)
        else:
            finish = start_carry(shape, index, total, cached.initial, carried, kept, False, exchange)
            weights = launch_scores(shape, inputs, heads)  # while sums are exchanged
            carry, final = finish()
        if not shape.causal:
            carry, final = final, nothing()
    else:
        value = launch_values(shape, inputs)
    skip = shape.causal and cached.initial is None
    out, attended = launch_output(shape, inputs, heads, weights, prefix, carry, value, skip)
    return AttentionResults(out, heads, prefix, carry, attended, final, *own)


def launch_open_chunk(
    shape: Shape, inputs: Inputs, heads: Tensor, chunk_B: Tensor | None, seen_B: Tensor, slots: int, skipped: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Local keys, linear keys, values and counts of tokens of a decoding state, see `open_chunk_kernel`; keys of an
    absent branch are empty.

    Args:
        chunk_B: each row's open chunk, of all rows' chunks; None for its last.
        seen_B: tokens of the open document, int64 `[B or 1]`.
        slots: of a chunk in the state. skipped: empty ones before those of the grid.
    """
    B, E, S, t = shape.B, shape.E, shape.S, shape.tiles
    cos, sin, table_rows = inputs.tables
    new = heads.new_empty
    quad_k = new((B, slots + shape.local_shift, S) if shape.quad else (0,))
    lin_k = new((B, slots + shape.previous, S) if shape.lin else (0,))
    value, seen = new((B, slots, E)), seen_B.new_empty(B)
    block_c, block_e = 32, 128
    forward.open_chunk_kernel(
        (B * cdiv(slots + 1, block_c), cdiv(E, block_e) + 1),
        heads, inputs.v, inputs.v.stride(0), inputs.z, inputs.z.stride(0), *inputs.norm("bias_v"),
        inputs.norm("bias_z")[2], inputs.gamma, inputs.beta, cos, sin, inputs.tokens,
        seen_B if chunk_B is None else chunk_B, seen_B, quad_k, lin_k, value, seen, *shape.grid, shape.GT, E, S,
        shape.rotary_dim, table_rows, slots, skipped, 0 if len(seen_B) == 1 else 1, QUAD=shape.quad, LIN=shape.lin,
        H=shape.H, PREVIOUS=shape.previous, LOCAL=shape.local_shift, CP=t.CP, SP=t.SP, INTERLEAVED=shape.interleaved,
        **switches(shape, inputs), LAST=chunk_B is None, SLOTS=power_of_2(t.CP), BLOCK_C=block_c, BLOCK_E=block_e,
        num_warps=4,
    )  # fmt: skip
    return quad_k, lin_k, value, seen


def launch_gate(
    shape: Shape, inputs: Inputs, gated: Tensor, d_out: Tensor, d_attended: Tensor, d_u: Tensor, value: Tensor | None
) -> Tensor:
    """Fill `d_attended`, `d_u` and `value` (unless that is None or not to be computed); partial sums for u's bias."""
    E, T = shape.E, shape.T
    block_m, block_e = 64, 128
    d_bias_u = gated.new_empty((cdiv(T, block_m) if shape.scaled else 0, E), dtype=torch.float32)
    backward.gate_kernel(
        (cdiv(T, block_m), cdiv(E, block_e)),
        d_out, d_out.stride(0), inputs.u, inputs.u.stride(0), gated, inputs.v, inputs.v.stride(0),
        *inputs.norm("bias_u"), inputs.norm("bias_v")[2], d_attended, d_u, d_u.stride(0),
        inputs.v if value is None else value, d_bias_u, T, E, SCALED=shape.scaled, SILU=shape.silu,
        FAST=fast_math(shape.dtype), ATTENDED=shape.keeps_attended, EVEN=E % block_e == 0,
        VALUES=shape.silu and value is not None, BLOCK_M=block_m, BLOCK_E=block_e, num_warps=8,
    )  # fmt: skip
    return d_bias_u


class Product(NamedTuple):
    """The output's gradient as a product, `left right`, which the kernel that reads it computes: of the `own` tokens,
    and 0 for others."""

    left: Tensor
    right: Tensor
    own: Own

    def made(self) -> Tensor:
        if self.own.whole:
            return torch.mm(self.left, self.right)
        out = self.left.new_empty(self.own.B * self.own.M, self.right.shape[1])
        for x, h in self.own.parts:
            torch.mm(self.left[x], self.right, out=out[h])
        self.own.clear(out)
        return out


def launch_gate_product(
    shape: Shape, inputs: Inputs, gated: Tensor, d_out: Product, d_u: Tensor
) -> tuple[Tensor, Tensor]:
    """`launch_gate` without the gradient of the output in memory: `(d_attended, d_bias_u)`."""
    D, E, right, parts = shape.D, shape.E, d_out.right.contiguous(), d_out.own.parts
    T = len(d_out.left) // len(parts)
    blocks = cdiv(T, 128)
    d_attended = gated.new_empty((shape.T, E))
    d_bias_u = gated.new_empty((len(parts) * blocks, E), dtype=torch.float32)
    tasks = blocks * (E // 128)
    for number, (x, h) in enumerate(parts):
        gate.gate_product_kernel(
            scan_grid(tasks, gated.device),
            hopper.matrix(rows_of(d_out.left, x), 128, gate.STEP), hopper.matrix(right, gate.STEP, 128),
            *(hopper.matrix(rows_of(each, h), 128, gate.END.value) for each in (inputs.u, gated, d_attended, d_u)),
            rows_of(inputs.rms, h), inputs.gain, inputs.bias_u,
            d_bias_u[number * blocks :] if number else d_bias_u, T, D, E // 128, tasks, STEP=gate.STEP,
            STAGES=gate.STAGES, num_warps=4,
        )  # fmt: skip
    d_out.own.clear(d_attended)
    d_out.own.clear(d_u)
    return d_attended, d_bias_u


def launch_gate_states(
    shape: Shape, inputs: Inputs, queries: Tensor, gated: Tensor, d_out: Tensor, d_attended: Tensor, d_u: Tensor,
    value: Tensor, d_prefix: Tensor, total: Tensor,
) -> Tensor:  # fmt: skip
    """`launch_gate` and the gradients of the states: after each chunk in `d_prefix` (causal), and over each piece in
    `total` (unless it is empty)."""
    t, E = shape.tiles, shape.E
    pieces = inputs.index.pieces
    options = piece_launch(shape, inputs)
    tma, block_e = options["TMA"], options["BLOCK_E"]
    block = min(t.gate_k, t.block_k), block_e
    options |= {"BLOCK_K": block[0], "STAGES": t.gate_stages}
    d_bias_u = gated.new_empty((pieces if shape.scaled else 0, E), dtype=torch.float32)
    backward.gate_states_kernel(
        (pieces, cdiv(E, block_e)),
        tiled(queries, tma, block[0], t.SP), shape.tokens(d_out, tma, *block), d_out.stride(0),
        shape.tokens(inputs.u, tma, *block), inputs.u.stride(0), shape.tokens(gated, tma, *block),
        shape.tokens(inputs.v, tma, *block), inputs.v.stride(0), *inputs.norm("bias_u"), inputs.norm("bias_v")[2],
        inputs.tokens, inputs.index.piece_begin, inputs.index.piece_end, d_attended, d_u, d_u.stride(0),
        value, d_bias_u, d_prefix, total, *shape.grid, E, **options,
        ATTENDED=shape.keeps_attended, TOTAL=total.numel() > 0,
    )  # fmt: skip
    return d_bias_u


def launch_attention_gradients(
    shape: Shape, inputs: Inputs, saved, d_out: Tensor | Product, d_h: Projections, d_heads: Tensor, reuse: bool,
    exchange=None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Fill u and v of `d_h`, and `d_heads`; otherwise as `launch_backward`.

    Returns:
        `(d_bias_u, d_bias_v, squares)`, see `PartialSums`, and the gradients of the states behind each chunk, over C.
    """
    heads, prefix, carry = saved.heads, saved.prefix, saved.carry
    gated = saved.attended if shape.keeps_attended else saved.out
    T, E, row = shape.T, shape.E, shape.lin_row
    new = gated.new_empty
    carried = carry.numel() > 0 and shape.causal
    d_prefix, d_carry, weights = new((0,)), new((0,)), None
    # The launches for whole rows make the values beside the gradient of their input.
    spans = choice.spans_rows(shape, inputs.source, gated.device)
    if isinstance(d_out, Product):
        d_attended, d_bias_u = launch_gate_product(shape, inputs, gated, d_out, d_h.u)
        value = None if spans else launch_values(shape, inputs)
    else:
        d_attended = d_out if reuse else new((T, E))
        value = None if spans else new((T, E)) if shape.silu else inputs.v
        if shape.lin:
            d_prefix, total = state_buffers(shape, inputs.index, new, carried or not shape.causal)
            d_bias_u = launch_gate_states(
                shape, inputs, heads[row], gated, d_out, d_attended, d_h.u, value, d_prefix, total
            )
            if shape.delta:
                d_prefix, _ = delta.launch_states(shape, inputs, total, saved, reverse=True)
            else:
                kept = "" if shape.causal else "state"
                finish = start_carry(shape, inputs.index, total, None, carried, kept, True, exchange)
                weights = launch_scores(shape, inputs, heads)  # while sums are exchanged
                d_carry, final = finish()
                d_carry = d_carry if shape.causal else final
        else:
            d_bias_u = launch_gate(shape, inputs, gated, d_out, d_attended, d_h.u, value)

    d_bias_v = new((shape.GT * shape.row_tiles if shape.scaled else 0, E), dtype=torch.float32)
    squares = None
    for part, own, rows, tokens in row_parts(shape, inputs):
        own_heads, d_own_heads = heads[:, rows], d_heads[:, rows]
        scores = launch_scores(part, own, own_heads) if weights is None else weights
        d_scores = torch.empty_like(scores)
        d_own, own_value = d_attended[tokens], new((part.T, E)) if spans else value[tokens]
        own_sums = d_bias_v[(rows.start or 0) * part.row_tiles :]
        if spans:
            launch_quadratic(
                "values", part, own, scores, d_own, own.v, d_h.v[tokens], own.bias_v, own_sums, own_value
            )  # fmt: skip
            launch_quadratic("scores", part, own, d_own, own_value, scores, d_scores, own.bias_v, own_sums)
        else:
            launch_chunk_gradients(
                part, own, (own_heads, prefix, carry), scores, d_own, own_value, d_prefix, d_carry, d_scores,
                d_h.v[tokens], d_own_heads, own_sums,
            )  # fmt: skip
        own_squares = launch_quadratic_heads_gradient(part, own, own_heads, d_scores, d_own_heads)
        if part is not shape and own_squares is not None:
            # One square for all parts: it is as large as a row's attention weights.
            own_squares = own_squares.sum(0, keepdim=True)
        squares = own_squares if squares is None else squares.add_(own_squares)
    return d_bias_u, d_bias_v, squares, d_prefix


def launch_chunk_gradients(
    shape: Shape, inputs: Inputs, saved: tuple, weights: Tensor, d_attended: Tensor, value: Tensor, d_prefix: Tensor,
    d_carry: Tensor, d_scores: Tensor, d_v: Tensor, d_heads: Tensor, d_bias_v: Tensor,
) -> None:  # fmt: skip
    """Fill `d_scores`, `d_v`, the linear heads of `d_heads`, and partial sums for v's bias."""
    heads, prefix, carry = saved
    t, E, row = shape.tiles, shape.E, shape.lin_row
    carried = carry.numel() > 0 and shape.causal
    e_blocks, tma = cdiv(E, t.block_e), shape.tma(inputs)
    programs = shape.score_tiles * shape.quad + 2 * shape.row_tiles * shape.lin + shape.row_tiles * e_blocks
    score_block, head_block = (t.block, t.block), (t.block, t.SP)
    value_block = t.block, t.block_e
    backward.chunk_gradients_kernel(
        (programs * shape.GT,),
        tiled(weights, tma, *score_block), tiled(weights, tma, t.block_k, t.block),
        shape.tokens(d_attended, tma, t.block, t.block_k), shape.tokens(d_attended, tma, t.block_k, t.block_e),
        shape.tokens(value, tma, t.block, t.block_k), value.stride(0),
        tiled(heads[row + 1], tma, t.block, t.block_s), tiled(prefix, tma, t.SP, t.block_k),
        tiled(carry, tma, t.SP, t.block_k), tiled(d_prefix, tma, t.SP, t.block_k),
        tiled(d_carry, tma, t.SP, t.block_k), tiled(d_prefix, tma, t.block_s, t.block_e),
        tiled(d_carry, tma, t.block_s, t.block_e), inputs.index.group_G,
        inputs.index.factor_G, inputs.index.opens_G,
        shape.tokens(inputs.v, tma, *value_block), inputs.v.stride(0), *inputs.norm("bias_v"), inputs.tokens,
        tiled(d_scores, tma, *score_block), tiled(d_heads[row], tma, *head_block),
        tiled(d_heads[row + 1], tma, *head_block), tiled(d_v, tma == 2, *value_block), d_v.stride(0), d_bias_v,
        *shape.grid, shape.GT, E, e_blocks, CP=t.CP, SP=t.SP, TILES=shape.row_tiles,
        SCORE_TILES=shape.score_tiles, QUAD=shape.quad, LIN=shape.lin, PREFIX=shape.causal, CARRY=carried,
        CAUSAL=shape.causal, **switches(shape, inputs), EVEN_E=E % t.block_e == 0, EVEN_K=E % t.block_k == 0, TMA=tma,
        SKIP=shape.causal and not carried, SKIP_AFTER=shape.causal, BLOCK=t.block, BLOCK_E=t.block_e,
        BLOCK_K=t.block_k, BLOCK_S=t.block_s, PRECISION=dot_precision(shape.dtype), STAGES=t.stages,
        LONG_STAGES=t.long_stages, **t.launch,
    )  # fmt: skip


def launch_quadratic_heads_gradient(
    shape: Shape, inputs: Inputs, heads: Tensor, d_scores: Tensor, d_heads: Tensor, skip: bool = False
) -> Tensor | None:
    """Fill the quadratic heads of `d_heads`, with `skip` for `Shape.halves` alone; partial sums for the relative bias,
    or None where there is none."""
    if not shape.quad:
        return None
    t, skip = shape.tiles, skip and shape.skips
    if choice.weighs(shape, heads.device):
        launch_hopper_heads_gradient(shape, heads, d_scores, d_heads, skip)
    else:
        backward.quadratic_heads_kernel(
            (shape.GT, shape.row_tiles, 2),
            d_scores, heads[0], heads[1], d_heads[0], d_heads[1], *shape.grid, shape.scale, CP=t.CP, SP=t.SP,
            CAUSAL=shape.causal, SKIP=skip, BLOCK=t.block, BLOCK_K=t.block_k, PRECISION=dot_precision(shape.dtype),
            STAGES=t.stages, **t.launch,
        )  # fmt: skip
    return None if inputs.bias_R is None else launch_bias(shape, d_scores, skip)


def launch_hopper_heads_gradient(shape: Shape, heads: Tensor, d_scores: Tensor, d_heads: Tensor, skip: bool) -> None:
    """`launch_quadratic_heads_gradient` where `choice.weighs` is true, without the bias."""
    step, blocks = scores.STEP, shape.C // 128
    tasks = shape.GT * blocks
    scores.score_heads_kernel(
        scan_grid(tasks, heads.device),
        hopper.matrix(d_scores, 128, step), hopper.matrix(d_scores, step, 128), hopper.matrix(heads[0], step, 128),
        hopper.matrix(heads[1], step, 128), hopper.matrix(d_heads[0], 128, step),
        hopper.matrix(d_heads[1], 128, step), shape.N, shape.G, shape.shift, shape.scale, blocks, tasks,
        CAUSAL=shape.causal, SKIP=skip, STEP=step, STAGES=scores.GRADIENT_STAGES, num_warps=4,
    )  # fmt: skip


def launch_scan_gradients(
    shape: Shape, inputs: Inputs, saved, d_out: Tensor | Product, d_h: Projections, d_heads: Tensor, reuse: bool,
    exchange=None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """`launch_attention_gradients` by the kernels for Hopper."""
    heads, prefix, carry = saved.heads, saved.prefix, saved.carry
    gated = saved.attended if shape.keeps_attended else saved.out
    E, T, row = shape.E, shape.T, shape.lin_row
    new = gated.new_empty
    carried, cut = scan_parts(shape, inputs.index, exchange, gated.device)
    if isinstance(d_out, Product):
        d_attended, d_bias_u = launch_gate_product(shape, inputs, gated, d_out, d_h.u)
    else:
        d_attended = d_out if reuse else new((T, E))
        d_bias_u = launch_gate(shape, inputs, gated, d_out, d_attended, d_h.u, None)
    behind, finish, held = None, None, choice.holds_rows(shape, exchange)
    if carried and not held:
        finish = start_totals(shape, inputs, heads[row], d_attended, cut, back=True, exchange=exchange)
    weights = launch_scores(shape, inputs, heads, True)  # while sums are exchanged
    d_scores = torch.empty_like(weights)
    if finish is not None:
        behind, _ = finish()
    if shape.delta:
        behind, _ = delta.launch_states(shape, inputs, behind, saved, scaled=True, reverse=True)
    value, d_prefix = new((T, E)), behind if shape.delta else torch.empty_like(prefix)
    d_bias_v = new((shape.GT * 2, E), dtype=torch.float32)
    biases = inputs.bias_v, inputs.bias_v
    if held:
        behind = launch_row_scan(
            shape, inputs, weights, heads, d_attended, inputs.v, biases, d_h.v, value, d_bias_v
        )  # fmt: skip
    else:
        launch_scan(
            shape, inputs, weights, heads, d_attended, inputs.v, biases, d_h.v, d_prefix, behind, cut, value, d_bias_v
        )  # fmt: skip
    states = (prefix, d_prefix) if shape.causal else (carry, behind)
    launch_reduce(shape, inputs, weights, d_attended, value, *states, d_scores, d_heads[row : row + 2])
    squares = launch_quadratic_heads_gradient(shape, inputs, heads, d_scores, d_heads, True)
    return d_bias_u, d_bias_v, squares, d_prefix


def launch_reduce(
    shape: Shape, inputs: Inputs, weights: Tensor, d_attended: Tensor, value: Tensor, state: Tensor, d_state: Tensor,
    d_scores: Tensor, d_linear: Tensor,
) -> None:  # fmt: skip
    """Fill `d_scores` and the gradients of the linear heads, `[2, GT, CP, SP]`; see `reduce_kernel`."""
    B, N, step = shape.B, shape.N, reduce.STEP
    tasks = reduce.task_count(B, shape.G, shape.halves, shape.causal)
    reduce.reduce_kernel(
        scan_grid(tasks, value.device),
        hopper.tokens(d_attended, B, N, 128, step), hopper.tokens(value, B, N, 128, step),
        hopper.matrix(state, 128, step), hopper.matrix(d_state, 128, step), hopper.matrix(weights),
        hopper.matrix(d_scores), hopper.matrix(d_linear[0]), hopper.matrix(d_linear[1]), d_linear,
        inputs.index.factor_G, B, N, shape.G, shape.shift, shape.E, tasks, CAUSAL=shape.causal, SKIP=shape.skips,
        STEP=step, STAGES=reduce.STAGES, num_warps=4,
    )  # fmt: skip


class PartialSums(NamedTuple):
    """Gradients that are sums over tokens, summed over some tokens or chunks each, `[programs, ...]` in float32.

    Attributes:
        u, v: of the biases of u and v.
        heads: of gammas, betas and z's bias, `2 H + 1` rows of S.
        norm: of the output bias and the norm's gain, `D + 1`; None outside of a whole layer.
        squares: of the scores, `CP x CP`, for the relative bias; None where there is none.
        gates: of the bias of the delta rule's gates, 2; None where there are none.
    """

    u: Tensor
    v: Tensor
    heads: Tensor
    norm: Tensor | None
    squares: Tensor | None
    gates: Tensor | None


def launch_backward(
    shape: Shape, inputs: Inputs, saved, d_out: Tensor | Product, d_h: Projections, reuse: bool, exchange=None
) -> PartialSums:  # fmt: skip
    """Gradients of the projections' outputs, written to `d_h`, and of parameters.

    Args:
        saved: has heads, prefix, carry, out, the fields of `delta.Prepared` and, if `Shape.keeps_attended`, attended
            of the forward. The weights are computed again, which is cheaper than their memory.
        d_out: gradient of the output, `[T, E]`, or the product that gives it; overwritten with `reuse`.
        exchange: as of `start_carry`.
    """
    heads = saved.heads
    # Branches that a first chunk alone does not need have no gradient.
    used = 2 * (shape.quad + shape.lin) == shape.H
    d_heads = torch.empty_like(heads) if used else torch.zeros_like(heads)
    # What a cache contributes is in `carry`, not in the states of the chunks, which scans read.
    scanned = not (shape.causal and saved.carry.numel()) and choice.scans(shape, inputs.source, heads.device)
    if isinstance(d_out, Product) and not choice.multiplies(shape, inputs.source, scanned, heads.device):
        d_out = d_out.made()
    launch = launch_scan_gradients if scanned else launch_attention_gradients
    d_bias_u, d_bias_v, squares, d_prefix = launch(shape, inputs, saved, d_out, d_h, d_heads, reuse, exchange)
    if exchange is not None and shape.lin:
        exchange.hide(d_heads[shape.lin_row + 1])
    gates = None
    if shape.delta:
        gates = delta.launch_prepare_gradient(
            shape, inputs, heads, saved, d_heads, saved.prefix, d_prefix, d_h.gates
        )  # fmt: skip
    d_gamma_beta = launch_heads_gradient(shape, inputs, d_heads, d_h.z)
    return PartialSums(u=d_bias_u, v=d_bias_v, heads=d_gamma_beta, norm=None, squares=squares, gates=gates)


# Of `heads_gradient_kernel`: numbers in a step, and the slots of a program, of which four run on a multiprocessor.
HEADS_STEP, HEADS_ROWS = 256, 128


def launch_heads_gradient(shape: Shape, inputs: Inputs, d_heads: Tensor, d_z: Tensor) -> Tensor:
    """Fill `d_z`; partial sums for gammas, betas and z's bias."""
    t, S = shape.tiles, shape.S
    rows = min(t.block, HEADS_ROWS)
    blocks = shape.GT * t.CP // rows
    cos, sin, table_rows = inputs.tables
    sums = d_heads.new_empty((blocks, 2 * shape.H + 1, S), dtype=torch.float32)
    backward.heads_gradient_kernel(
        (blocks,),
        d_heads, inputs.z, inputs.z.stride(0), *inputs.norm("bias_z"), inputs.gamma, cos, sin, inputs.tokens,
        inputs.index.opens_G, d_z, d_z.stride(0), sums, *shape.grid, shape.GT, S, shape.rotary_dim, table_rows,
        H=shape.H, PREVIOUS=shape.previous, LOCAL=shape.local_shift, CP=t.CP, SP=t.SP, **shape.pairs,
        INTERLEAVED=shape.interleaved, **switches(shape, inputs), SKIP=shape.skips and inputs.source is None,
        ROWS=rows, BLOCK_M=min(rows, max(1, HEADS_STEP // max(shape.pairs.values()))), num_warps=4,
        maxnreg=128,
    )  # fmt: skip
    return sums


def launch_bias(shape: Shape, d_scores: Tensor, skip: bool) -> Tensor:
    """Score gradients summed over some chunks, float32 `[programs, CP, CP]`."""
    block = min(shape.tiles.block, 32)
    tiles = shape.tiles.CP // block
    n_tiles = tiles * (tiles + 1) // 2 if shape.causal else tiles * tiles
    programs = min(shape.GT, max(1, 288 // n_tiles))
    squares = d_scores.new_empty((programs, shape.tiles.CP, shape.tiles.CP), dtype=torch.float32)
    backward.bias_kernel(
        (n_tiles, programs),
        d_scores, squares, *shape.grid, shape.GT, cdiv(shape.GT, programs), CP=shape.tiles.CP, TILES=tiles,
        CAUSAL=shape.causal, SKIP=skip and shape.skips, BLOCK=block, num_warps=2,
    )  # fmt: skip
    return squares


SUM_BLOCK = 32


class Sums(NamedTuple):
    """The layout of the gradients that are sums over tokens in one vector, each aligned to `SUM_BLOCK` elements.

    Attributes:
        u, v, heads, norm: widths of the parts, as in `PartialSums`, 0 for none. bias: of the relative bias.
    """

    u: int
    v: int
    heads: int
    norm: int
    bias: int

    @staticmethod
    def of(shape: Shape, biased: bool) -> Sums:
        heads, bias = (2 * shape.H + 1) * shape.S, 2 * shape.C - 1 if shape.quad and biased else 0
        return Sums(shape.E, shape.E, heads, shape.D + 1, bias) if shape.scaled else Sums(0, 0, heads, 0, bias)

    @property
    def blocks(self) -> list[int]:
        return [cdiv(width, SUM_BLOCK) for width in self]

    @property
    def size(self) -> int:
        return sum(self.blocks) * SUM_BLOCK

    def split(self, out: Tensor, shape: Shape) -> dict[str, Tensor]:
        """The gradients in `out`, by the names of an operation's tensors."""
        H, S = shape.H, shape.S
        heads, norm = (H * S, H * S, S), (max(self.norm - 1, 0), min(self.norm, 1))
        # Each part and what fills its last block.
        sizes = [x for own in ((self.u,), (self.v,), heads, norm, (self.bias,)) for x in (*own, -sum(own) % SUM_BLOCK)]
        u, _, v, _, gamma, beta, b_z, _, b_o, gain, _, bias, _ = torch.split_with_sizes(out, sizes)
        found = {"gamma": gamma.view(H, S), "beta": beta.view(H, S)}
        if self.norm:
            found |= {"b_u": u, "b_v": v, "b_z": b_z, "b_o": b_o, "gain": gain.view(())}
        return found | {"bias_R": bias} if self.bias else found


def launch_sums(shape: Shape, sums: Sums, parts: PartialSums, dtype: torch.dtype) -> Tensor:
    """The gradients that are sums over tokens, laid out as in `Sums`."""
    blocks = sums.blocks
    u, v, heads, norm, squares = (parts.heads if x is None else x for x in parts[:-1])
    out = heads.new_empty((sum(blocks) * SUM_BLOCK,), dtype=dtype)
    backward.sums_kernel(
        (sum(blocks),),
        u, u.shape[0], v, v.shape[0], heads, heads.shape[0], norm, norm.shape[0], squares, squares.shape[0], out,
        shape.E, sums.heads, sums.norm, shape.C, *blocks[:4], CP=shape.tiles.CP, CAUSAL=shape.causal,
        BLOCK=SUM_BLOCK, ROWS=128, num_warps=8,
    )  # fmt: skip
    return out


def product_blocks(dtype: torch.dtype) -> dict:
    """Tiles of the output projection."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "STAGES": 2, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "STAGES": 4, "num_warps": 8}


# Columns of the gates in h: two, and zeros that keep its rows aligned to 16 bytes.
GATE_COLUMNS = 8
# Blocks of tokens from which on a program of the norm takes several, and how many.
NORM_BLOCKS, NORM_STEPS = 8192, 16


def fits_ahead(tile: int, *loaded: Tensor) -> bool:
    """Whether a pass over tokens loads its next tiles ahead: the shared memory has to hold them beside those of other
    programs."""
    return tile * sum(x.element_size() for x in loaded) <= 24 * 1024


def launch_norm(
    x: Tensor, gain: Tensor, eps: float, rms: Tensor, out: Tensor, *, cast: bool = False, scale: bool = False,
    weights: list[Tensor] | None = None, joined: Tensor | None = None,
) -> None:  # fmt: skip
    """Fill `rms`, with `cast` or `scale` `out`, and with `weights` `joined`; see `norm_kernel`.

    Args:
        weights: of u, v, z and, with the delta rule, the gates.
    """
    T, D = x.shape[:-1].numel(), x.shape[-1]
    block_d = power_of_2(D)
    block_t = max(1, 4096 // block_d)
    steps = NORM_STEPS if cdiv(T, block_t) >= NORM_BLOCKS else 1
    parts, sizes = [x] * 5, [0] * 4
    if weights is not None:
        u, v, z, *gates = (w.contiguous() for w in weights)
        parts = [u, v, z, *(gates or [z]), joined]
        sizes = [u.numel(), z.numel(), sum(w.numel() for w in gates), GATE_COLUMNS * D * len(gates)]
    blocks = cdiv(T, block_t * steps)
    wide, narrow, _, padded = (cdiv(size, block_t * block_d) for size in sizes)
    forward.norm_kernel(
        (blocks + 2 * wide + narrow + padded,),
        x, gain, rms, out, *parts, T, D, blocks, *sizes, eps, CAST=cast, SCALE=scale, JOIN=weights is not None,
        BLOCK_T=block_t, BLOCK_D=block_d, STEPS=steps,
        STAGES=3 if steps > 1 and fits_ahead(block_t * block_d, x) else 1, num_warps=8,
    )  # fmt: skip


def launch_norm_gradient(
    p: Tensor | None, x: Tensor, d_y: Tensor, rms: Tensor, gain: Tensor, d_x: Tensor, *, add: bool = False
) -> Tensor:  # fmt: skip
    """Fill `d_x`, and return partial sums for the output bias and the gain; see `norm_gradient_kernel`.

    Args:
        add: whether to add d_y to d_x.
    """
    T, D = x.shape[:-1].numel(), x.shape[-1]
    block_d = power_of_2(D)
    block_t, steps = max(1, 4096 // block_d), 16
    programs = cdiv(T, block_t * steps)
    sums = x.new_empty((programs, 1 if p is None else D + 1), dtype=torch.float32)
    loaded = (x, d_y) if p is None else (x, d_y, p)
    backward.norm_gradient_kernel(
        (programs,),
        d_y if p is None else p, x, d_y, rms, gain, d_x, sums, T, D, LAYER=p is not None, RESIDUAL=add,
        BLOCK_T=block_t, BLOCK_D=block_d, STEPS=steps, STAGES=2 if fits_ahead(block_t * block_d, *loaded) else 1,
        num_warps=4,
    )  # fmt: skip
    return sums


def launch_residual(
    x: Tensor, out: Tensor, w_o: Tensor, b_o: Tensor, y: Tensor | None = None, *, add: bool = True
) -> Tensor:  # fmt: skip
    """`x + out w_o^T + b_o`, `[..., D]` like x and in its type, in y if it is given; without `add`, x is left out."""
    ends = add and choice.ends_layer(x, out)
    if not ends and not (add and has_tma(x.device)):
        result = torch.addmm(b_o.to(out.dtype), out, w_o.t()).view(x.shape)
        result = x + result if add else result.to(x.dtype)
        return result if y is None else y.copy_(result)
    y = torch.empty_like(x) if y is None else y
    if ends:
        return launch_product(x, out, w_o, b_o, y)
    (T, E), D = out.shape, x.shape[-1]
    blocks = product_blocks(out.dtype)
    residual.residual_kernel(
        (cdiv(T, blocks["BLOCK_M"]) * cdiv(D, blocks["BLOCK_N"]),),
        tiled(out, True, blocks["BLOCK_M"], blocks["BLOCK_K"]),
        tiled(w_o.contiguous(), True, blocks["BLOCK_N"], blocks["BLOCK_K"]), b_o, x, y, T, D, E,
        EVEN=T % blocks["BLOCK_M"] == 0 and D % blocks["BLOCK_N"] == 0, PRECISION=dot_precision(out.dtype), **blocks,
    )  # fmt: skip
    return y


def launch_product(x: Tensor, out: Tensor, w_o: Tensor, b_o: Tensor, y: Tensor) -> Tensor:
    """`launch_residual` where `choice.ends_layer` is true, into y."""
    (T, E), D, step = out.shape, x.shape[-1], product.STEP
    rows, columns = product.tile_of(D)
    column_blocks = D // columns
    tasks = cdiv(T, 2 * rows) * column_blocks
    w_o = w_o.contiguous()
    product.product_kernel(
        scan_grid(tasks, x.device),
        hopper.matrix(out, rows, step), hopper.matrix(w_o, 128 if columns == 192 else columns, step),
        hopper.matrix(w_o, step, step), hopper.matrix(x, rows, step), hopper.matrix(y, rows, step), b_o, E // step,
        column_blocks, tasks, ROWS=rows, COLUMNS=columns, STEP=step, STAGES=product.STAGES, num_warps=4,
    )  # fmt: skip
    return y


def launch_rotary_bias(weight: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`<a, RoPE_o(b)>` of each offset o, in the weight's type; see `rotary_bias_kernel`."""
    (offsets, half), S = cos.shape, weight.shape[1]
    out = weight.new_empty(offsets)
    forward.rotary_bias_kernel(
        (cdiv(offsets, 32),),
        weight, cos, sin, out, offsets, S, 2 * half, HALF=power_of_2(half), REST=power_of_2(S - 2 * half),
        INTERLEAVED=interleaved, BLOCK=32, num_warps=4,
    )  # fmt: skip
    return out


def launch_rotary_bias_gradient(
    d_bias: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Tensor:  # fmt: skip
    """Gradient of the weight of `launch_rotary_bias`."""
    (offsets, half), S = cos.shape, weight.shape[1]
    d_weight = torch.empty_like(weight)
    backward.rotary_bias_gradient_kernel(
        (cdiv(half, 4),),
        d_bias, weight, cos, sin, d_weight, offsets, S, 2 * half, PAIRS=4, REST=power_of_2(S - 2 * half),
        INTERLEAVED=interleaved, ROWS=1024, num_warps=8,
    )  # fmt: skip
    return d_weight
