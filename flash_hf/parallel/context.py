# SPDX-License-Identifier: Apache-2.0
"""How the rows of a model are cut over processes, before its first layer."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from ..backend_flash import compute_dtype, is_bare, is_stock, kernels_for
from ..chunking_flash import (
    ChunkLayout,
    Documents,
    check_mask,
    chunk_layout,
    count_positions,
    is_tracing,
    resolve_documents,
)  # fmt: skip
from ..loss_flash import IGNORE
from ..modeling_flash import (
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashModel,
    FlashPreTrainedModel,
    check_inputs,
    check_labels,
    without_first_tokens,
)  # fmt: skip
from .cuts import Cuts, facts_of, first_positions
from .exchange import Neighbours, Total, fused_layout, with_ends


logger = logging.get_logger(__name__)

# The last `context_parallel` of each process group, for `shard_sequence`.
_contexts: dict[str, Context] = {}


def context_parallel(model: nn.Module, mesh: dist.device_mesh.DeviceMesh | None) -> nn.Module:
    """Context parallelism, in place: `model` then takes one piece of every row on each process of `mesh`.

    Call the model with what [`shard_sequence`] returns, on every process, and call `backward` on every process if on
    one. `loss` is the loss of the whole rows, the same number on every process; logits and hidden states are the
    piece's. **Gradients are to be averaged over the mesh**, as DDP and FSDP do: the backward of `loss` has the factor
    `mesh.size()`, so that the average over processes is the gradient of the loss. A loss of your own from a piece's
    logits has no such factor.

    With `use_cache=True`, the cache on each process holds the state after its piece: that of the last process
    continues the whole prompt, after `context_parallel(model, None)`.

    Args:
        model: `FlashForCausalLM`, `FlashForMaskedLM` or `FlashModel`, possibly inside of PEFT, DDP or FSDP.
        mesh: one dimension of a device mesh, such as `mesh["cp"]`; None to take whole rows again.

    Returns:
        `model`.

    Raises:
        ValueError: a model whose rows cannot be cut, or a mesh of several dimensions.
    """
    flash = next((module for module in model.modules() if isinstance(module, FlashPreTrainedModel)), None)
    if not isinstance(flash, (FlashModel, FlashForCausalLM, FlashForMaskedLM)):
        raise ValueError(
            "context_parallel takes FlashForCausalLM, FlashForMaskedLM or FlashModel of the installed flash_hf, got "
            f"{type(model if flash is None else flash).__name__}. Heads that give one answer per row need the whole "
            "row on one process; a checkpoint's remote code is to be loaded without trust_remote_code."
        )
    base = flash if isinstance(flash, FlashModel) else flash.model
    if flash.context is not None:
        flash.context.detach(flash)
    flash.context = base.context = None
    if mesh is not None:
        flash.context = base.context = Context(flash, mesh)
        _contexts[flash.context.group.group_name] = flash.context
    return model


def shard_sequence(
    batch: dict[str, Any], mesh: dist.device_mesh.DeviceMesh, model: nn.Module | None = None
) -> dict[str, Any]:
    """This process's piece of a batch of whole rows, which every process of `mesh` passes alike.

    Rows are padded on the right to pieces of whole chunks, the same number for each process: at lengths that are
    multiples of `mesh.size() * chunk_size` nothing is padded. Causal labels are shifted before the cut
    (`shift_labels`). Packed rows, marked by `position_ids`, `cu_seq_lens_q` or `seq_idx`, keep their `position_ids`.

    Args:
        batch: arguments of the model for whole rows: `input_ids` or `inputs_embeds`, and optionally `labels`,
            `attention_mask` and marks of packing. Other entries of shape `(batch, tokens, ...)` are cut alike.
        mesh: as given to [`context_parallel`], which is called first.
        model: the model, if several share the mesh.

    Raises:
        ValueError: fewer chunks than processes, or arguments that the model refuses for whole rows.
    """
    context = _contexts.get(mesh.get_group().group_name) if model is None else find_context(model)
    if context is None:
        raise ValueError("shard_sequence needs the model's chunk_size: call context_parallel(model, mesh) first.")
    tokens = batch.get("input_ids") if batch.get("input_ids") is not None else batch.get("inputs_embeds")
    if tokens is None or tokens.ndim < 2:
        raise ValueError("shard_sequence needs input_ids (batch, tokens) or inputs_embeds (batch, tokens, width).")
    (B, N), C, size = tokens.shape[:2], context.chunk_size, context.size
    chunks = -(-N // C)
    if chunks < size:
        raise ValueError(
            f"A row of {N} tokens has {chunks} chunks of chunk_size={C}, fewer than the {size} processes of the mesh. "
            f"Use at most {chunks} processes for context parallelism, or rows of at least {size * C - C + 1} tokens."
        )
    length = -(-chunks // size) * C
    marks = {"cu_seq_lens": batch.get("cu_seq_lens_q"), "seq_idx": batch.get("seq_idx")}
    for name in ("attention_mask", "position_ids"):
        marks[name] = batch.get(name)
    documents = resolve_documents(B, N, tokens.device, **marks)
    dropped = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", *marks)
    whole = {name: value for name, value in batch.items() if name not in dropped}
    if documents.valid_BN is not None or size * length > N:
        real_BN = documents.valid_BN
        real_BN = torch.ones(B, N, dtype=torch.bool, device=tokens.device) if real_BN is None else real_BN
        whole["attention_mask"] = real_BN.long()
    if documents.start_BN is not None:
        whole["position_ids"] = documents.position_BN.expand(B, -1)
    labels = whole.get("labels")
    if labels is not None and context.causal and whole.get("shift_labels") is None:
        labels = without_first_tokens(labels, batch)
        whole["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORE)

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != (B, N):
            return value
        fill = IGNORE if name in ("labels", "shift_labels") else 0
        behind = (0, 0) * (value.ndim - 2) + (0, size * length - N)
        begin = context.rank * length
        return F.pad(value, behind, value=fill)[:, begin : begin + length].contiguous()

    return {name: cut(name, value) for name, value in whole.items()}


def find_context(model: nn.Module) -> Context | None:
    """What `context_parallel` attached to a model, or None."""
    return next((module.context for module in model.modules() if isinstance(module, FlashPreTrainedModel)), None)


class Context:
    """How the rows of one model are cut over the processes of a mesh."""

    def __init__(self, model: FlashPreTrainedModel, mesh: dist.device_mesh.DeviceMesh):
        config = model.config
        if getattr(mesh, "ndim", None) != 1:
            raise ValueError(
                f"context_parallel needs one dimension of a DeviceMesh, got {mesh!r}. Select one by its name, as in "
                'mesh["cp"].'
            )
        if config.attention_type == "quadratic":
            raise ValueError(
                "context_parallel cuts rows at chunks, and FLASH-Quad (attention_type='quadratic') has none: every "
                "token attends to the whole row. Use attention_type='mixed_chunk'."
            )
        if config.global_state != "mean":
            raise ValueError(
                f"context_parallel exchanges sums, but the state of global_state={config.global_state!r} is no sum: "
                "each write depends on earlier ones. Use global_state='mean', or whole rows on each process."
            )
        if config.local_window != 1:
            raise ValueError(
                f"context_parallel does not send a chunk's values, which local_window={config.local_window} needs for "
                "the next chunk. Use local_window=1, or whole rows on each process."
            )
        rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        if config.use_rope and rope_type in ("dynamic", "longrope"):
            raise ValueError(
                f"context_parallel needs frequencies that do not depend on the row's length, got rope_type="
                f"{rope_type!r} in rope_parameters. Use 'default', 'linear', 'yarn' or 'llama3'."
            )
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.device_type = mesh.device_type
        self.chunk_size = config.chunk_size
        self.causal = model.is_causal if isinstance(model, FlashModel) else model.model.is_causal
        self._signature = inspect.signature(model.forward)
        self._own: tuple | None = None
        self._call: tuple | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        if hasattr(model, "generate"):
            model.generate = self._refuse_generate

    def __deepcopy__(self, memo) -> Context:
        return self  # a process group cannot be copied

    def detach(self, model: nn.Module) -> None:
        """Remove everything that was attached to the model."""
        for hook in self._hooks:
            hook.remove()
        vars(model).pop("generate", None)

    @staticmethod
    def _refuse_generate(*args, **kwargs):
        raise ValueError(
            "generate() cannot run on pieces of rows. Read the prompt without its last token on all processes "
            "(use_cache=True), then context_parallel(model, None), and call generate(prompt, cache=...) on the last "
            "process, whose cache has the whole prompt's state."
        )

    def loss_options(self, labels: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a loss over this piece: the number of labels in whole rows, which a sum is divided by."""
        if options.get("num_items_in_batch") is not None:
            return options
        wanted = options["shift_labels"] if self.causal else labels
        items = (wanted != IGNORE).sum()
        dist.all_reduce(items, group=self.group)
        return {**options, "num_items_in_batch": items}

    def total(self, loss: Tensor) -> Tensor:
        """The loss of whole rows from the loss of this piece."""
        return Total.apply(loss, self.group)

    # -- before the first layer
    def _begin(self, model: FlashPreTrainedModel, args: tuple, kwargs: dict) -> None:
        """Check the call on all processes, so that an error on one is raised on all, and none waits for another."""
        own, error = {}, None
        try:
            own = self._check(model, args, kwargs)
        except Exception as caught:  # of any kind: it is raised again below
            error = caught
        own["error"] = None if error is None else f"{type(error).__name__}: {error}"
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, own, group=self.group)
        if error is not None:
            raise error
        for process, part in enumerate(parts):
            if part["error"] is not None:
                raise ValueError(f"Process {process} of {self.size} for context parallelism raised {part['error']}")
        for name in own:
            if name != "facts" and any(part[name] != own[name] for part in parts):
                raise ValueError(
                    f"All processes must be called alike, but `{name}` differs for context parallelism: "
                    f"{[part[name] for part in parts]}. Cut the same batch on all of them with shard_sequence, and "
                    "hook or replace modules on all or on none."
                )
        cuts = Cuts([part["facts"] for part in parts])
        if (message := cuts.unexpected()) is not None:
            raise ValueError(message)
        self._call = cuts, *self._own

    def _check(self, model: FlashPreTrainedModel, args: tuple, kwargs: dict) -> dict[str, Any]:
        """This process's call, for comparison with the others'."""
        given = self._signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        ids, embeds, labels = (given.get(name) for name in ("input_ids", "inputs_embeds", "labels"))
        check_inputs(model.base_model, ids, embeds, given.get("is_causal"))
        tokens = embeds if ids is None else ids
        (B, N), device = tokens.shape[:2], tokens.device
        if is_tracing():
            raise ValueError("context_parallel cannot be compiled or exported: call the model without torch.compile.")
        if device.type != self.device_type:
            raise ValueError(
                f"The mesh is of {self.device_type} devices, but the input is on {device}. Move it there."
            )
        if N % self.chunk_size:
            raise ValueError(
                f"A piece of {N} tokens does not end at a border of chunks (chunk_size={self.chunk_size}): cut rows "
                "with shard_sequence, which pads them."
            )
        for name in ("cache", "past_key_values"):
            if given.get(name) is not None:
                raise ValueError(f"`{name}` cannot be continued by pieces of rows. Pass use_cache=True for a new one.")
        for name in ("cu_seq_lens_q", "seq_idx"):
            if given.get(name) is not None:
                raise ValueError(f"`{name}` describes whole rows: shard_sequence turns it into position_ids.")
        if labels is not None:
            check_labels(labels, ids, embeds, given.get("logits_to_keep", 0))
            if self.causal and given.get("shift_labels") is None:
                raise ValueError(
                    "labels of a piece must be shifted before the cut: pass shard_sequence's shift_labels."
                )
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if isinstance(mask, Tensor):
            mask = mask.to(device)
        valid_BN = None if mask is None else check_mask(mask, B, N, 0)
        if positions is not None:
            positions = positions.to(device).expand(B, -1)
            real_BN = torch.ones(B, N, dtype=torch.bool, device=device) if valid_BN is None else valid_BN
            claimed = SimpleNamespace(seen_B=first_positions(real_BN, positions), get_seq_length=lambda: 0)
            resolve_documents(B, N, device, attention_mask=mask, position_ids=positions, cache=claimed)
        facts, start_BN = facts_of(B, N, valid_BN, positions)
        self._own = valid_BN, start_BN
        # What kernels exchange for a whole layer is not what its modules exchange.
        kernels = model.config.backend == "triton" or (model.config.backend == "auto" and device.type == "cuda")
        layers = model.base_model.layers if kernels else []
        return {
            "rows": B,
            "tokens": N,
            "position_ids": positions is not None,
            "labels": labels is not None,
            "gradients": torch.is_grad_enabled(),
            "training": model.training,
            "layers with hooks or other modules": [i for i, layer in enumerate(layers) if not is_stock(layer)],
            "facts": facts,
        }

    def _end(self, *_) -> None:
        self._own = self._call = None

    def piece(self, model: FlashModel, x_BND: Tensor, *, cached: bool) -> tuple[Documents, list[ChunkLayout]]:
        """The documents of this process's tokens, and the layouts that layers take in turn.

        Args:
            x_BND: the embedded tokens.
            cached: whether the call fills a cache.
        """
        if self._call is None:
            raise ValueError("Call the model that context_parallel was given, not its base alone.")
        cuts, valid_BN, start_BN = self._call
        (B, N), device, rank = x_BND.shape[:2], x_BND.device, self.rank
        if cuts.is_plain(N):
            documents = Documents(torch.arange(rank * N, rank * N + N, device=device)[None])
        else:
            seen_B = (cuts.seen[rank] * cuts.continues[rank]).to(device)
            if start_BN is not None:
                # The first token of a row begins a document anyway, and `seen` is 0 then.
                real_BN = torch.ones_like(start_BN) if valid_BN is None else valid_BN
                start_BN = start_BN if bool((start_BN & (real_BN.cumsum(1) > 1)).any()) else None
            documents = count_positions(B, N, device, valid_BN, start_BN, seen_B)
        config = model.config
        shifts = (0, config.chunk_shift) if config.chunk_shift else (0,)
        fused = self._fuses(model, x_BND, cuts, cached)
        return documents, [self._layout(model, x_BND, cuts, documents, shift, fused, cached) for shift in shifts]

    def _fuses(self, model: FlashModel, x_BND: Tensor, cuts: Cuts, cached: bool) -> bool:
        """Whether kernels compute this call; the same on all processes."""
        dropout = bool(model.config.attention_dropout) and model.training
        if kernels_for(model.config, x_BND.device, compute_dtype(x_BND), dropout=dropout) is None:
            return False
        fits = not (cached and cuts.packed) and all(is_bare(layer.gau.offset_scale) for layer in model.layers)
        if not fits:
            logger.warning_once(
                "This call is computed in plain torch: kernels take neither packed rows with a cache, nor layers "
                "whose offset_scale has hooks."
            )
        return fits

    def _layout(
        self, model: FlashModel, x_BND: Tensor, cuts: Cuts, own: Documents, shift: int, fused: bool, cached: bool
    ) -> ChunkLayout:
        """The layout of this process's tokens and their halo, in layers whose chunks begin `shift` slots early."""
        (B, N), device, config = x_BND.shape[:2], x_BND.device, model.config
        C, rank, size, causal = self.chunk_size, self.rank, self.size, self.causal
        # At each cut: does a chunk cross it, and how many of its tokens are on the left and on the right?
        phase = (cuts.seen + shift) % C
        crossed = cuts.continues & (phase > 0) & (True if causal else ~cuts.ends)
        left = torch.minimum(phase, cuts.seen) * crossed
        right = torch.minimum(C - phase, cuts.rest) * (crossed & (not causal))
        earlier = cuts.continues & (cuts.seen > left)
        if not (config.previous_key or config.local_key_shift):
            earlier = torch.zeros_like(earlier)
        inner = slice(1, size)
        tails, heads = (int(F.pad(x[inner], (0, 0, 0, 1)).max()) for x in (left + earlier, right))

        def from_left(distance: Tensor) -> Tensor:
            """Places, among what all processes give, of the tokens at a distance (1, 2, ...) before this piece."""
            place, behind = torch.full_like(distance, -1), torch.zeros_like(distance)
            for q in reversed(range(rank)):
                k, count = distance - behind, cuts.count[q][:, None]
                place = torch.where((k > 0) & (k <= count), q * (tails + heads) + tails - k, place)
                behind = behind + count
            return place

        def from_right(distance: Tensor) -> Tensor:
            """The same at a distance (0, 1, ...) behind it."""
            place, before = torch.full_like(distance, -1), torch.zeros_like(distance)
            for q in range(rank + 1, size):
                k, count = distance - before, cuts.count[q][:, None]
                place = torch.where((k >= 0) & (k < count), q * (tails + heads) + tails + k, place)
                before = before + count
            return place

        alone = earlier[rank][:, None]  # the token before, without its chunk
        if fused:  # the token before is in the grid
            left, earlier = left + earlier, torch.zeros_like(earlier)
        own_left, own_right = left[rank][:, None], right[rank + 1][:, None] * (rank + 1 < size)
        before_H = torch.arange(int(own_left.max()), 0, -1).expand(B, -1)
        behind_H = torch.arange(int(own_right.max())).expand(B, -1)
        first_B1 = cuts.seen[rank][:, None] - own_left  # position of the first token with its halo
        total_B1 = (cuts.seen + cuts.rest)[rank + 1][:, None]
        filled = 0, 0

        if fused and cuts.is_plain(N):
            first, length = int(first_B1[0]), before_H.shape[1] + N + behind_H.shape[1]
            layout, *filled = fused_layout(
                length, first, C, shift, B, device, last=rank == size - 1, fill=not cached
            )  # fmt: skip
        elif cuts.is_plain(N):
            # A reshape, as of whole rows.
            length = before_H.shape[1] + N + behind_H.shape[1]
            documents = Documents(torch.arange(length, device=device)[None])
            layout = chunk_layout(documents, B, C, causal=causal, shift=0 if rank else shift)
            offset = int(first_B1[0])
            layout = replace(
                layout,
                position_BGC=layout.position_BGC + offset,
                seen_after_B=layout.seen_after_B + offset,
                count_BG=layout.count_BG + offset,
            )
        else:
            valid_BN = own.valid_BN
            valid_BN = torch.ones(B, N, dtype=torch.bool, device=device) if valid_BN is None else valid_BN
            around = before_H.shape[1], behind_H.shape[1]
            position = cuts.seen[rank][:, None] - before_H, cuts.seen[rank + 1][:, None] + behind_H
            position = [x.clamp(min=0).to(device) for x in position]
            real = (before_H <= own_left).to(device), (behind_H < own_right).to(device)
            seen_B = (first_B1[:, 0] * cuts.continues[rank]).to(device)
            documents = Documents(
                torch.cat([position[0], own.position_BN.expand(B, -1), position[1]], 1),
                torch.cat([real[0], valid_BN, real[1]], 1),
                None if own.start_BN is None else F.pad(own.start_BN, around),
                seen_B if rank else None,
            )
            layout = chunk_layout(documents, B, C, causal=causal, shift=shift)
            layout = with_ends(layout) if fused else layout
        final_B = layout.final_B
        if final_B is None:
            final_B = torch.full((B,), layout.position_BGC.shape[1] - 1, device=device)
        first_BG = layout.first_BG
        ones_BG = torch.ones(B, layout.position_BGC.shape[1], dtype=torch.bool, device=device)
        last_BG = ones_BG if first_BG is None else first_BG == first_BG.gather(1, final_B[:, None])
        if not causal:
            cut_B1 = (cuts.continues & ~cuts.ends)[rank + 1][:, None].to(device)
            count_BG = torch.where(last_BG & cut_B1, total_B1.to(device), layout.count_BG)
            layout = replace(layout, count_BG=count_BG if first_BG is not None else count_BG[:, :1])
        sums = [last_BG]
        if not causal and bool(cuts.starts.any()):
            sums.insert(0, ones_BG if first_BG is None else first_BG == 0)
        crossed_B = crossed[rank + 1].to(device)
        sums_KBG = torch.stack(sums).float()
        row_B = torch.arange(B, device=device)
        sums_KBG[:, row_B, final_B] *= (~crossed_B).float()
        same = [cuts.same(q, rank) if q != rank else torch.zeros(B, dtype=torch.bool) for q in range(size)]
        weight = torch.stack(same).float()[..., None, None].to(device)
        side = torch.arange(size, device=device)[:, None, None, None] < rank

        hidden = None
        if fused:
            # Tokens whose keys this process must not add to sums: causal, the token before its first chunk, and
            # otherwise all of the halo, whose sum is that of the process that has them; and those that fill the ends.
            until_B1 = before_H.shape[1] - own_left + alone if causal else torch.full((B, 1), before_H.shape[1])
            until_B1, slots = until_B1.to(device), torch.arange(layout.position_BGC[0].numel(), device=device)
            token_BK = (slots - layout.shift).expand(B, -1) if layout.source_BK is None else layout.source_BK
            token_BK = token_BK - filled[0]
            others_BK = (token_BK < until_B1) | (token_BK >= before_H.shape[1] + N)
            others_BGC = others_BK.view(B, -1, C) & layout.occupied_BGC
            hidden = others_BGC.flatten(0, 1).nonzero(as_tuple=True)
        before_B1 = before_rotary = None
        if bool(earlier[inner].any()):
            before_B1 = torch.where(earlier[rank][:, None], from_left(own_left + 1), -1).to(device)
            if config.use_rope:
                before_rotary = model.rotary_emb(x_BND, (first_B1 - 1).clamp(min=0).to(device))
        left_BH = F.pad(torch.where(before_H <= own_left, from_left(before_H), -1), (filled[0], 0), value=-1)
        right_BH = F.pad(torch.where(behind_H < own_right, from_right(behind_H), -1), (0, filled[1]), value=-1)
        give_BK = self._given(own, B, N, tails, heads, device) if tails + heads else None
        # Where the kernels have these tokens: rows of M tokens, the halo's around the own ones.
        M, K, row_B1 = left_BH.shape[1] + N + right_BH.shape[1], max(1, tails + heads), torch.arange(B)[:, None]
        given_rows = None
        if give_BK is not None:
            given_rows = (give_BK.clamp(min=0) + left_BH.shape[1] + (row_B1 * M).to(device)).flatten()
        place_BH = torch.cat([left_BH, right_BH], 1)
        slot_BH = torch.cat([torch.arange(left_BH.shape[1]), torch.arange(M - right_BH.shape[1], M)]) + row_B1 * M
        source_BH = place_BH // K * (B * K) + row_B1 * K + place_BH % K
        neighbours = Neighbours(
            group=self.group,
            causal=causal,
            halo=fused or bool((left + right)[inner].any()),
            give_BK=give_BK,
            tails=tails,
            left_BH=left_BH.to(device),
            right_BH=right_BH.to(device),
            before_B1=before_B1,
            given_rows=given_rows,
            halo_rows=(slot_BH[place_BH >= 0].to(device), source_BH[place_BH >= 0].to(device)),
            before_rotary=before_rotary,
            crossed=bool(crossed[rank + 1].all()),
            open_B=crossed_B,
            final_B=final_B,
            sum_KBG=sums_KBG,
            left_weight=weight * side,
            right_weight=weight * ~side,
            first_BG=first_BG if fused else None,
            hidden=hidden,
            columns=max(1, max(q * N + int(cuts.end[q].max()) for q in range(rank + 1) if cuts.end[q].any() or not q)),
            fused=fused,
        )
        return replace(layout, neighbours=neighbours)

    @staticmethod
    def _given(own: Documents, batch: int, length: int, tails: int, heads: int, device) -> Tensor:
        """Columns of the last `tails` and the first `heads` real tokens of each row, -1 for none."""
        rank_K = torch.cat([torch.arange(-tails, 0), torch.arange(heads)]).to(device)
        if own.valid_BN is None:
            return (rank_K % length).expand(batch, -1)
        rank_BN = own.valid_BN.cumsum(1) - 1
        count_B1 = rank_BN[:, -1:] + 1
        column_BN = torch.arange(length, device=device).expand(batch, -1)
        by_rank = torch.full((batch, length + 1), -1, device=device)
        by_rank.scatter_(1, torch.where(own.valid_BN, rank_BN, length), column_BN)
        rank_BK = torch.where(rank_K < 0, rank_K + count_B1, rank_K)
        found = by_rank.gather(1, rank_BK.clamp(min=0, max=length - 1))
        return torch.where((rank_BK >= 0) & (rank_BK < count_B1), found, -1)
