# SPDX-License-Identifier: Apache-2.0
"""What the layers of one process give to those of the others and take from them: collectives with gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention_flash import QueryKeys
from ..backend_flash import fused_layer, fuses_layer, normalise
from ..chunking_flash import ChunkLayout, Places, take_rows


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
        left: slots of the halo before the own tokens.
        halo: whether the own tokens of any process have a halo.
        give_BK: own tokens that others need, -1 for none, int64 `[B, K]`; None if there are none.
        left_BH, right_BH, before_B1: the halo's tokens, and the one before, among those of all processes,
            int64 `[B, ..]` into `size * K`; -1 for none.
        before_rotary: cos and sin of the position of the token before.
        crossed: whether that is so for all rows (which are plain, for kernels).
        open_B: whether the last chunk of a row's grid goes on in another piece, which then counts it, bool `[B]`.
        final_B: that chunk, int64 `[B]`.
        sum_KBG: chunks whose sum goes to others, float `[1 or 2, B, G]`: of the first and last document.
        left_weight, right_weight: which sums of other processes to take, float `[size, B, 1, 1]`.
        columns: columns of the rows up to the end of this piece, without padding behind the last row's end.
        fused: whether kernels compute this; see `fused_layout`.
    """

    group: dist.ProcessGroup
    causal: bool
    left: int
    halo: bool
    give_BK: Tensor | None
    left_BH: Tensor | None
    right_BH: Tensor | None
    before_B1: Tensor | None
    before_rotary: tuple[Tensor, Tensor] | None
    crossed: bool
    open_B: Tensor
    final_B: Tensor
    sum_KBG: Tensor
    left_weight: Tensor
    right_weight: Tensor
    columns: int
    fused: bool

    def gather(self, x: Tensor) -> tuple[Tensor, Callable[[], Any]]:
        """`[size, ...]` of all processes, and what to call before reading it."""
        works: list = []
        out = AllGather.apply(x, self.group, works)
        return out, works[0].wait

    def extend(self, x_BND: Tensor) -> tuple[Tensor, Tensor | None]:
        """The own tokens with their halo, and the token before."""
        if self.give_BK is None:
            return x_BND, None
        given, wait = self.gather(take_rows(x_BND, self.give_BK))
        wait()
        given_BTD = given.transpose(0, 1).flatten(1, 2)
        before = None if self.before_B1 is None else take_rows(given_BTD, self.before_B1)
        if self.halo:  # on every process, even for a halo of no tokens: see AllGather
            x_BND = torch.cat([take_rows(given_BTD, self.left_BH), x_BND, take_rows(given_BTD, self.right_BH)], 1)
        return x_BND, before

    def compute(self, layer: nn.Module, x_BND: Tensor, places: Places, cache) -> Tensor:
        """A `FlashLayer`'s output for the own tokens, `[B, N, D]`."""
        x_BMD, before_B1D = self.extend(x_BND)
        own = slice(self.left, self.left + x_BND.shape[1])
        if fuses_layer(layer, x_BMD, places):
            out_BND = fused_layer(layer, x_BMD, places, cache)[:, own]
            if cache is not None:
                cache.cumulative_length = self.columns
            return out_BND
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

    # -- for kernels, whose sums are over runs of a row's chunks, one after the other: see `flash_hf.kernels.plan`
    def piece_borders(self, chunks: int, longest: int) -> list[int]:
        """Where a row's runs of at most `longest` chunks begin, and the last one ends. The first and the last chunk of
        a `fused_layout` are runs of their own, and one that goes on in another process."""
        end = chunks - 1 - self.crossed
        return [0, *range(1, end, longest), end, *[chunks - 1] * self.crossed, chunks]

    def given_runs(self, x_PSE: Tensor) -> Tensor:
        """What belongs to runs whose sums go to other processes, `[B, runs, S, E]`, a view."""
        runs_BPSE = x_PSE.view(len(self.open_B), -1, *x_PSE.shape[1:])
        return runs_BPSE[:, : runs_BPSE.shape[1] - 1 - self.crossed]

    def sums_before(self, total_PSE: Tensor) -> Tensor:
        """The sums before rows, float32 `[B, S, E]`, from those over runs."""
        given = self.given_runs(total_PSE).sum(1)
        taken = given.new_empty(self.left_weight.shape[0], *given.shape)
        all_gather(taken.view(-1), given.view(-1), group=self.group)
        return (taken * self.left_weight).sum(0)

    def add_gradients(self, d_total_PSE: Tensor, d_carry_PSE: Tensor, scale: float) -> None:
        """Add to the gradients behind runs what other processes return for the sums given to them, and return theirs.

        Args:
            d_total_PSE: gradients of `sums_before` over `scale`, by runs.
        """
        d_initial = d_total_PSE.view(len(self.open_B), -1, *d_total_PSE.shape[1:]).sum(1) * scale
        d_given = torch.empty_like(d_initial)
        reduce_scatter(d_given.view(-1), (d_initial * self.left_weight).view(-1), group=self.group)
        self.given_runs(d_carry_PSE).add_(d_given[:, None])


def fused_layout(
    length: int, first: int, chunk_size: int, shift: int, batch: int, device: torch.device
) -> ChunkLayout:
    """The layout of plain rows for kernels, with a chunk more at either end of a row. A row's first chunk has nothing
    before it, and its last nothing behind it: so sums before and behind the real chunks may come from other processes.
    The first chunk's last slot holds the token before, if any: its value, under no key, adds nothing.

    Args:
        length: tokens with the halo. first: position of the first one.
        shift: empty slots before a document's first token.
    """
    C, slot = chunk_size, (first + shift) % chunk_size
    before = slot if first and slot == C - 1 else C + slot
    G = -(-(before + length) // C) + 1
    position_K = torch.arange(-before, G * C - before, device=device)
    return ChunkLayout(
        token_BN=torch.arange(length, device=device)[None],
        position_BGC=(position_K + first).clamp(min=0).view(1, G, C),
        occupied_BGC=((position_K >= 0) & (position_K < length)).view(1, G, C),
        seen_after_B=torch.full((1,), first + length, device=device),
        final_B=torch.full((batch,), G - 2, device=device),
        shift=before,
    )
