# SPDX-License-Identifier: Apache-2.0
"""What the layers of one process give to those of the others and take from them: collectives with gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention_flash import QueryKeys
from ..backend_flash import fused_layer, fuses_layer, normalise
from ..chunking_flash import ChunkLayout, Places, refuse_second_derivatives, take_rows


if TYPE_CHECKING:
    from ..kernels.plan import ChunkIndex


# torch 2.13 renamed them.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class AllGather(torch.autograd.Function):
    """`[...]` of every process as `[size, ...]`; gradients are summed over processes. Every process must use the
    result, or the backward of the others would wait for it."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup, works: list) -> Tensor:
        ctx.group, size = group, dist.get_world_size(group)
        out = x.new_empty(size, *x.shape)
        works.append(all_gather(out.view(-1), x.contiguous().view(-1), group=group, async_op=True))
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor):
        refuse_second_derivatives()
        d_x = d_out.new_empty(d_out.shape[1:])
        reduce_scatter(d_x.view(-1), d_out.contiguous().view(-1), group=ctx.group)
        return d_x, None, None


class Total(torch.autograd.Function):
    """The sum over processes, whose gradient has the factor that averaging gradients over processes takes away."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = dist.get_world_size(group)
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, d_total: Tensor):
        return d_total * ctx.size, None


@dataclass(frozen=True)
class Neighbours:
    """What one process gives to the others and takes from them, for layers of one `chunk_shift`. It is the field of
    that name of a `ChunkLayout` over the process's own tokens and the `left` and right ones of the halo.

    Attributes:
        group: the processes. causal: the model's direction.
        halo: whether the own tokens of any process have a halo.
        give_BK: own tokens that others need, -1 for none, int64 `[B, K]`; None if there are none. The first `tails`
            are a piece's last ones.
        left_BH, right_BH, before_B1: the halo's tokens, and the one before, among those of all processes,
            int64 `[B, ..]` into `size * K`; -1 for none, as of the slots that fill the ends of a `fused_layout`.
        given_rows: for kernels, the rows of give_BK in what the projections give, `[B * M, F]`, int64 `[B * K]`; any
            for -1, which nobody takes.
        halo_rows: for kernels, the rows there that take a token, and its rows in what all processes give,
            `[size * B * K, F]`.
        before_rotary: cos and sin of the position of the token before.
        crossed: whether a chunk goes on in another piece, in all rows (which are alike if they are plain).
        open_B: whether the last chunk of a row's grid goes on in another piece, which then counts it, bool `[B]`.
        final_B: that chunk, int64 `[B]`.
        sum_KBG: chunks whose sum goes to others, float `[1 or 2, B, G]`: of the first and last document.
        left_weight, right_weight: which sums of other processes to take, float `[size, B, 1, 1]`.
        first_BG: for kernels, the first chunk of the chunk's document, int64 `[B, G]`; None for plain rows.
        hidden: for kernels, chunks (flat over rows) and slots of tokens whose linear keys are left out, int64 each:
            their values are in the sums of another process, or they fill an end.
        columns: columns of the rows up to the end of this piece, without padding behind the last row's end.
        fused: whether kernels compute this; see `fused_layout` and `with_ends`.
    """

    group: dist.ProcessGroup
    causal: bool
    halo: bool
    give_BK: Tensor | None
    tails: int
    left_BH: Tensor | None
    right_BH: Tensor | None
    before_B1: Tensor | None
    given_rows: Tensor | None
    halo_rows: tuple[Tensor, Tensor]
    before_rotary: tuple[Tensor, Tensor] | None
    crossed: bool
    open_B: Tensor
    final_B: Tensor
    sum_KBG: Tensor
    left_weight: Tensor
    right_weight: Tensor
    first_BG: Tensor | None
    hidden: tuple[Tensor, Tensor] | None
    columns: int
    fused: bool

    def gather(self, x: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """`[size, ...]` of all processes, and what to call before reading it."""
        works: list = []
        out = AllGather.apply(x, self.group, works)
        return out, works[0].wait

    @property
    def left(self) -> int:
        """Slots of the halo before the own tokens."""
        return self.left_BH.shape[1]

    @property
    def right(self) -> int:
        return self.right_BH.shape[1]

    def extend(self, x_BND: Tensor) -> tuple[Tensor, Tensor | None]:
        """The own tokens with their halo, and the token before."""
        if self.give_BK is None:
            return F.pad(x_BND, (0, 0, self.left, self.right)) if self.left + self.right else x_BND, None
        given, wait = self.gather(take_rows(x_BND, self.give_BK))
        wait()
        given_BTD = given.transpose(0, 1).flatten(1, 2)
        before = None if self.before_B1 is None else take_rows(given_BTD, self.before_B1)
        if self.halo:  # on every process, even for a halo of no tokens: see AllGather
            x_BND = torch.cat([take_rows(given_BTD, self.left_BH), x_BND, take_rows(given_BTD, self.right_BH)], 1)
        return x_BND, before

    def compute(self, layer: nn.Module, x_BND: Tensor, places: Places, cache) -> Tensor:
        """A `FlashLayer`'s output for the own tokens, `[B, N, D]`."""
        if fuses_layer(layer, x_BND, places):
            out_BND = fused_layer(layer, x_BND, places, cache)
            if cache is not None:
                cache.cumulative_length = self.columns
            return out_BND
        x_BMD, before_B1D = self.extend(x_BND)
        own = slice(self.left, self.left + x_BND.shape[1])
        if before_B1D is not None:
            before_B1D = layer.norm(before_B1D)
        normed_BMD = normalise(layer.norm, x_BMD, places)
        attended_BND = layer.gau(normed_BMD, places, cache=cache, before_B1D=before_B1D)[:, own]
        if cache is not None:
            cache.cumulative_length = self.columns
        if layer.training:
            attended_BND = F.dropout(attended_BND, layer.hidden_dropout)
        return x_BND + attended_BND

    def keys_before(self, unit: nn.Module, z_B1S: Tensor) -> QueryKeys:
        """Queries and keys of the token before, each `[B, S]`."""
        return QueryKeys(*(None if x is None else x[:, 0] for x in unit.query_keys(z_B1S, self.before_rotary)))

    def start_exchange(self, product_BGSE: Tensor) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Begin to exchange sums over chunks; local attention does not need them.

        Returns:
            A function that waits, and returns the chunks' sums with those that other processes add to a document
            (bidirectional), and the sum before the first chunk (causal).
        """
        product = product_BGSE
        with torch.autocast(product.device.type, enabled=False):
            given = torch.einsum("kbg,bgse->kbse", self.sum_KBG.to(product.dtype), product)
        taken, wait = self.gather(given)

        def finish() -> tuple[Tensor, Tensor | None]:
            wait()
            left_BSE = (taken[:, -1] * self.left_weight.to(taken.dtype)).sum(0)
            if self.causal:
                return product, left_BSE
            right_BSE = (taken[:, 0] * self.right_weight.to(taken.dtype)).sum(0)
            row_B = torch.arange(len(product), device=product.device)
            final_BSE = torch.where(self.open_B[:, None, None], 0, product[row_B, self.final_B]) + right_BSE
            whole = product.index_put((row_B, self.final_B), final_BSE)
            return whole.index_put((row_B, torch.zeros_like(row_B)), left_BSE, accumulate=True), None

        return finish

    # -- for kernels
    def take_halo(self, h: Tensor, rms: Tensor) -> None:
        """Fill the halo's rows of what the projections give, `[B * M, F]`, and of the norms, float32 `[B * M]`, with
        those of other processes, and the ends with 0. So nothing is projected twice, nor copied for its halo."""
        width, (slots, sources) = h.shape[1], self.halo_rows
        for x in (h, rms):
            x_BM = x.unflatten(0, (len(self.open_B), -1))
            x_BM[:, : self.left] = 0
            x_BM[:, x_BM.shape[1] - self.right :] = 0
        if self.give_BK is None:
            return
        # A collective takes one type, and a norm has more bits than bfloat16.
        given = torch.cat([h[self.given_rows], rms[self.given_rows, None].view(h.dtype)], 1)
        taken, wait = self.gather(given)
        wait()
        halo = taken.flatten(0, 1)[sources]
        h[slots] = halo[:, :width]
        rms[slots] = halo[:, width:].contiguous().view(rms.dtype)[:, 0]

    def return_halo(self, d_h: Tensor) -> None:
        """Add to the gradients of what the projections gave, `[B * M, F]`, those from the halos of other processes."""
        if self.give_BK is None:
            return
        (B, K), width, (slots, sources) = self.give_BK.shape, d_h.shape[1], self.halo_rows
        d_taken = d_h.new_zeros(len(self.left_weight) * B * K, width)
        d_taken[sources] = d_h[slots]
        d_given = d_h.new_empty(B, K, width)
        reduce_scatter(d_given.view(-1), d_taken.view(-1), group=self.group)
        # One by one: in a short piece a token may be among those of both ends.
        for end in (slice(self.tails), slice(self.tails, K)):
            if end.start != end.stop:
                d_h.index_add_(0, self.given_rows.view(B, K)[:, end].flatten(), d_given[:, end].flatten(0, 1))

    def hide(self, keys: Tensor) -> None:
        """Leave the `hidden` tokens out of linear keys, or of their gradient, `[B * G, C, S]`."""
        keys[self.hidden] = 0

    def start_documents(self, total_DSE: Tensor, index: ChunkIndex) -> Callable[[], Tensor]:
        """Begin to exchange sums over documents (bidirectional).

        Returns:
            A function that adds those of the same documents on other processes to `total_DSE`, and returns it. The
            gradients of sums are added alike, since all of these processes read the same sum.
        """
        first_B = torch.arange(len(self.open_B), device=total_DSE.device) * (len(index.group_G) // len(self.open_B))
        own_KB = torch.stack([first_B, first_B + self.final_B])
        own_KB = index.group_G.long()[own_KB[-len(self.sum_KBG) :]]
        taken, wait = self.gather(total_DSE[own_KB])

        def finish() -> Tensor:
            wait()
            total_DSE.index_add_(0, own_KB[0], (taken[:, -1] * self.left_weight).sum(0))
            return total_DSE.index_add_(0, own_KB[-1], (taken[:, 0] * self.right_weight).sum(0))

        return finish

    # Causal sums are over runs of a row's chunks, one after the other: see `flash_hf.kernels.plan`.
    def piece_borders(self, chunks: int, longest: int) -> list[int]:
        """Where a plain row's runs of at most `longest` chunks begin, and the last one ends. The first and the last
        chunk of a `fused_layout` are runs of their own, and one that goes on in another process."""
        end = chunks - 1 - self.crossed
        return sorted({0, *range(1, end, longest), end, chunks - 1, chunks})

    def starts_piece(self, chunks: int) -> Tensor:
        """The same borders in other rows, which `with_ends` gives their chunks at either end, bool `[B, G]`."""
        chunk_G = torch.arange(chunks, device=self.final_B.device)
        final_B1 = self.final_B[:, None]
        return (chunk_G == 1) | (chunk_G == final_B1) | (chunk_G == final_B1 + 1)

    def given_runs(self, x_PSE: Tensor) -> Tensor:
        """What belongs to runs of plain rows whose sums go to other processes, `[B, runs, S, E]`, a view."""
        runs_BPSE = x_PSE.view(len(self.open_B), -1, *x_PSE.shape[1:])
        return runs_BPSE[:, : runs_BPSE.shape[1] - 1 - self.crossed]

    def runs(self, index: ChunkIndex, value_BG: Tensor) -> tuple[Tensor, Tensor]:
        """The row of every run, int64 `[runs]`, and the value of its chunks, float `[runs, 1, 1]`."""
        begin_P = index.piece_begin.long()
        return begin_P // value_BG.shape[1], value_BG.flatten()[begin_P].float()[:, None, None]

    def start_sums(self, total_PSE: Tensor, index: ChunkIndex) -> Callable[[], Tensor]:
        """Begin to exchange sums over runs.

        Returns:
            A function that waits, and returns the sums before documents, float32 `[documents, S, E]`. Only the first
            document of a row goes on from another process.
        """
        if self.first_BG is None:
            given = self.given_runs(total_PSE).sum(1)
        else:
            row_P, weight_P = self.runs(index, self.sum_KBG[-1])
            given = total_PSE.new_zeros(len(self.open_B), *total_PSE.shape[1:])
            given.index_add_(0, row_P, total_PSE * weight_P)
        taken, wait = self.gather(given)

        def finish() -> Tensor:
            wait()
            before_BSE = (taken * self.left_weight).sum(0)
            if self.first_BG is None:
                return before_BSE
            B, G = self.first_BG.shape
            chunk_D = index.piece_begin[index.document_begin.long()]
            document_B = torch.searchsorted(chunk_D, torch.arange(B, dtype=chunk_D.dtype, device=chunk_D.device) * G)
            return before_BSE.new_zeros(index.documents, *given.shape[1:]).index_copy_(0, document_B, before_BSE)

        return finish

    def start_gradients(
        self, d_total_PSE: Tensor, scale: float, index: ChunkIndex
    ) -> Callable[[Tensor], Tensor]:  # fmt: skip
        """Begin to return the gradients of the sums that other processes gave.

        Args:
            d_total_PSE: gradients of the sums before documents over `scale`, by runs.

        Returns:
            A function that adds, to the gradients behind runs, what other processes return for the sums given to them.
        """
        if self.first_BG is None:
            d_initial = d_total_PSE.view(len(self.open_B), -1, *d_total_PSE.shape[1:]).sum(1)
        else:
            row_P, first_P = self.runs(index, self.first_BG == 0)
            d_initial = d_total_PSE.new_zeros(len(self.open_B), *d_total_PSE.shape[1:])
            d_initial.index_add_(0, row_P, d_total_PSE * first_P)
        parts = d_initial * scale * self.left_weight
        d_given = torch.empty_like(d_initial)
        work = reduce_scatter(d_given.view(-1), parts.view(-1), group=self.group, async_op=True)

        def finish(d_carry_PSE: Tensor) -> Tensor:
            work.wait()
            if self.first_BG is None:
                self.given_runs(d_carry_PSE).add_(d_given[:, None])
                return d_carry_PSE
            row_P, weight_P = self.runs(index, self.sum_KBG[-1])
            return d_carry_PSE.add_(d_given[row_P] * weight_P)

        return finish


def with_ends(layout: ChunkLayout) -> ChunkLayout:
    """A layout of rows for kernels, with an empty chunk at either end of what a row has of its first and of its last
    document. The first chunk of a document has nothing before it, and the last one nothing behind it: so sums
    before and behind the real ones may come from other processes."""
    (B, G, C), device = layout.position_BGC.shape, layout.position_BGC.device
    chunk_G = torch.arange(G + 2, device=device).expand(B, -1)
    final_B = layout.final_B + 1
    first_BG = torch.zeros_like(chunk_G[:, 1:-1]) if layout.first_BG is None else layout.first_BG
    # Chunk 0 becomes one of the row's first document, and that behind the last one of its last document.
    first_BG = F.pad(torch.where(first_BG == 0, 0, first_BG + 1), (1, 1))
    last_B1 = first_BG.gather(1, final_B[:, None])
    first_BG = torch.where(chunk_G == final_B[:, None] + 1, last_B1, first_BG)
    first_BG = torch.where(chunk_G > final_B[:, None] + 1, (final_B + 2)[:, None], first_BG)
    count_BG = None if layout.count_BG is None else F.pad(layout.count_BG.expand(B, G), (1, 1))
    ends = (0, 0, 1, 1)
    return replace(
        layout,
        position_BGC=F.pad(layout.position_BGC, ends), occupied_BGC=F.pad(layout.occupied_BGC, ends),
        source_BK=F.pad(layout.source_BK, (C, C), value=-1),
        slot_BN=torch.where(layout.slot_BN >= 0, layout.slot_BN + C, -1), first_BG=first_BG, last_BG=None,
        count_BG=count_BG, phase_B=None, continues_B=None, final_B=final_B,
    )  # fmt: skip


def fused_layout(
    length: int, first: int, chunk_size: int, shift: int, batch: int, device: torch.device, *, last: bool, fill: bool
) -> tuple[ChunkLayout, int, int]:
    """The layout of plain rows for kernels, with a chunk more at either end that is not the row's own. A first chunk
    has nothing before it, and a last one nothing behind it: so sums before and behind the others may come from other
    processes. The first chunk's last slot holds the token before, if any, which is `hidden` and adds nothing.

    From the middle of the first of these chunks, and to that of the last, slots without a token are filled with tokens
    that are hidden, too. Then whole halves of chunks have tokens, as in whole rows.

    Args:
        length: tokens with the halo. first: position of the first one.
        shift: empty slots before a document's first token.
        last: whether the row ends here.
        fill: whether to fill the end, too. The chunk of a decoding state must not be.

    Returns:
        The layout, and how many slots are filled at either end.
    """
    C, slot = chunk_size, (first + shift) % chunk_size
    before = slot if not first or slot == C - 1 else C + slot
    end = before + length
    G = -(-end // C) + (not last)
    empty = C // 2 if first else before
    filled = (G - 1) * C + C // 2 - end if fill and not last else 0
    position_K = torch.arange(-before, G * C - before, device=device)
    layout = ChunkLayout(
        token_BN=torch.arange(end + filled - empty, device=device)[None],
        position_BGC=(position_K + first).clamp(min=0).view(1, G, C),
        occupied_BGC=((position_K >= empty - before) & (position_K < length + filled)).view(1, G, C),
        seen_after_B=torch.full((1,), first + length, device=device),
        count_BG=torch.full((1, 1), first + length, device=device),
        final_B=torch.full((batch,), G - 1 - (not last), device=device),
        shift=empty,
    )
    return layout, before - empty, filled
