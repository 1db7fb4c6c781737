# SPDX-License-Identifier: Apache-2.0
"""The order in which kernels process a batch: once per forward, `ChunkLayout` becomes flat lists of chunks and pieces.

A piece is a run of consecutive chunks of one document. One program sums over the chunks of a piece, and a second,
short pass sums over the pieces of a document: so a few long documents fill the GPU as well as many short ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..attention_flash import Normalization, global_scale
from ..chunking_flash import ChunkLayout, Movable


# Multiprocessors of a large GPU, and the fewest programs of a pass over pieces: about two on each.
MULTIPROCESSORS, PROGRAMS = 132, 250
LONGEST_PIECE = 16


class ChunkIndex(NamedTuple):
    """What chunks (flat, all rows one after the other) belong to.

    Attributes:
        factor_G: factor on the linear queries against states kept over `chunk_size`, float32 `[B * G]`.
        group_G: the piece (causal) or document (bidirectional) of each chunk, int32 `[B * G]`.
        piece_begin, piece_end: chunks of each piece, int32 `[pieces]`.
        document_begin, document_end: pieces of each document, int32 `[documents]`.
        opens_G: 1 for chunks in which a row or a document begins, int32 `[B * G]`.
    """

    factor_G: Tensor
    group_G: Tensor
    piece_begin: Tensor
    piece_end: Tensor
    document_begin: Tensor
    document_end: Tensor
    opens_G: Tensor

    @property
    def pieces(self) -> int:
        return self.piece_begin.shape[0]

    @property
    def documents(self) -> int:
        return self.document_begin.shape[0]


@dataclass(frozen=True)
class ChunkPlan(Movable):
    """How kernels walk through a batch.

    Attributes:
        tokens: N, tokens per row. chunks: G, chunks per row. chunk_size: slots of a chunk in this layout.
        cached: of the N tokens per row, how many at its beginning stand for the slots of a cached chunk.
        shift: slots before a row's first token.
        source_K: token index (flat over rows) of every slot, -1 for none, int32 `[B * G * chunk_size]`; None if
            consecutive tokens fill consecutive slots.
        index: the tensors that every kernel reads.
    """

    tokens: int
    cached: int
    chunks: int
    chunk_size: int
    shift: int
    source_K: Tensor | None
    index: ChunkIndex


def piece_length(rows: int, chunks: int, blocks: int) -> int:
    """The most chunks of a piece, where rows of `chunks` have a program per piece and block of value dimensions: that
    with which the programs, one on each multiprocessor at a time, end soonest. A piece's own sum counts as a chunk."""

    def end(length: int) -> int:
        return triton.cdiv(rows * triton.cdiv(chunks, length) * blocks, MULTIPROCESSORS) * (length + 1)

    lengths = range(1, min(LONGEST_PIECE, chunks) + 1)
    enough = [length for length in lengths if rows * triton.cdiv(chunks, length) * blocks >= PROGRAMS]
    return min(enough or [1], key=lambda length: (end(length), -length))


def chunk_plan(
    layout: ChunkLayout,
    batch: int,
    *,
    causal: bool,
    width: int,
    normalization: Normalization,
    chunk_size: int,
    amid: bool = False,
    delta: bool = False,
) -> ChunkPlan:
    """The plan for `layout`, on its device. Packed rows are read on the host once; others are not.

    Args:
        width: E, from which follows how many chunks a piece should have.
        chunk_size: the configured C, which `normalization="chunk"` divides by.
        amid: whether some row goes on inside of a cached chunk, whose slots then are tokens, too.
        delta: whether the state is that of the gated delta rule: pieces are single chunks, and nothing is divided.
    """
    G, C = layout.position_BGC.shape[1:]
    cached = C if amid else 0
    N = cached + layout.token_BN.shape[1]
    device = layout.position_BGC.device
    chunks = batch * G
    longest = 1 if delta else piece_length(batch, G, triton.cdiv(width, 128))

    chunk = torch.arange(chunks, dtype=torch.int32, device=device)
    neighbours = layout.neighbours if causal else None
    if neighbours is not None and layout.first_BG is None:
        borders = neighbours.piece_borders(G, longest)
        per_row, border = len(borders) - 1, torch.tensor(borders, dtype=torch.int32, device=device)
        row = torch.arange(batch, dtype=torch.int32, device=device)
        piece_begin, piece_end = ((row[:, None] * G + x).flatten() for x in (border[:-1], border[1:]))
        document_begin, document_end = row * per_row, (row + 1) * per_row
        group = (chunk // G) * per_row + torch.bucketize(chunk % G, border[1:], right=True)
        starts_document = chunk % G == 0
    elif layout.first_BG is None:
        per_row = triton.cdiv(G, longest)
        piece = torch.arange(batch * per_row, dtype=torch.int32, device=device)
        row, part = piece // per_row, piece % per_row
        piece_begin = row * G + part * longest
        piece_end = row * G + ((part + 1) * longest).clamp(max=G)
        row = torch.arange(batch, dtype=torch.int32, device=device)
        document_begin, document_end = row * per_row, (row + 1) * per_row
        group = (chunk // G) * per_row + (chunk % G) // longest if causal else chunk // G
        starts_document = chunk % G == 0
    else:
        place = torch.arange(G, device=device) - layout.first_BG
        starts_document = (place == 0).flatten()
        starts_piece = place % longest == 0
        if neighbours is not None:
            starts_piece = starts_piece | neighbours.starts_piece(G)
        starts_piece = starts_piece.flatten()
        piece_G = starts_piece.cumsum(0) - 1
        piece_begin = starts_piece.nonzero()[:, 0]
        piece_end = torch.cat([piece_begin[1:], piece_begin.new_tensor([chunks])])
        document_begin = piece_G[starts_document]
        document_end = torch.cat([document_begin[1:], piece_begin.new_tensor([len(piece_begin)])])
        group = piece_G if causal else starts_document.cumsum(0) - 1

    count_BG = layout.before_BG if causal else layout.count_BG
    factor = global_scale(count_BG, normalization, chunk_size, torch.float32) * C
    if delta:
        factor = torch.full_like(factor, C)
    source = None
    if layout.source_BK is not None:
        first = torch.arange(batch, device=device)[:, None] * N
        source = torch.where(layout.source_BK >= 0, layout.source_BK + first + cached, -1)
        if amid:
            slot = torch.arange(C, device=device)
            source[:, :C] = torch.where(layout.cached_BC, first + slot, source[:, :C])
        source = source.flatten().int()
    borders = (x.int() for x in (group, piece_begin, piece_end, document_begin, document_end, starts_document))
    index = ChunkIndex(factor.expand(batch, G).reshape(-1).contiguous(), *borders)
    return ChunkPlan(tokens=N, cached=cached, chunks=G, chunk_size=C, shift=layout.shift, source_K=source, index=index)
