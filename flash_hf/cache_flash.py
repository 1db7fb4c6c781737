# SPDX-License-Identifier: Apache-2.0
"""FLASH's decoding state as transformers cache layers: constant in size for the chunked forms, growing for FLASH-Quad.

`DynamicCache(config=...)` and `StaticCache(config=...)` find these classes through `FlashConfig.layer_types`: a class
that sets `_layer_type` registers itself. Each sequence has its own phase (tokens in its open chunk), so a left-padded
batch decodes exactly as its sequences would alone.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention_flash import DecodingState, QueryKeys, mixed_chunk_append, mixed_chunk_attention, shifted_dims, wide
from .chunking_flash import (
    AppendLayout,
    ChunkLayout,
    Places,
    QuadraticLayout,
    append_layout,
    can_append,
    chunk_layout,
    count_positions,
    is_distributed,
    is_exporting,
    is_tracing,
    padding_of,
    recall,
    without_padding,
)
from .configuration_flash import CHUNK_LAYER_TYPE, QUADRATIC_LAYER_TYPE, FlashConfig
from .delta_flash import delta_chunk_append, delta_chunk_attention


# transformers 5.24 renamed `past_key_values` to `cache`. A model takes both; this is the name that the installed
# version passes, reads from outputs, and drops under gradient checkpointing.
CACHE_NAME, OTHER_CACHE_NAME = "cache", "past_key_values"
if CACHE_NAME not in BaseModelOutputWithPast.__dataclass_fields__:
    CACHE_NAME, OTHER_CACHE_NAME = OTHER_CACHE_NAME, CACHE_NAME


def resolve_cache(cache: Cache | None, past_key_values: Cache | None, **options: Any) -> Cache | None:
    """The cache, under whichever of its two names it was passed. One under another name, among the call's other
    `options`, would be silently ignored: it is refused, as are two different caches."""
    for name, value in options.items():
        looks_like_one = name in ("mems", "state") or "cache" in name or "past" in name or isinstance(value, Cache)
        if looks_like_one and value is not None and name not in ("use_cache", "cache_position"):
            raise ValueError(
                f"Unknown argument `{name}`: the decoding state is passed as `cache` (or `past_key_values`), as a "
                f"transformers Cache; got {type(value).__name__}."
            )
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(
            "`cache` and `past_key_values` are two names of one argument, got different objects. Pass one of them."
        )
    return past_key_values if cache is None else cache


def takes_both_cache_names(function: Callable) -> Callable:
    """A method of transformers that accepts the cache under both names."""

    @functools.wraps(function)
    def renamed(*args, **kwargs):
        given = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        if (cache := resolve_cache(*given)) is not None:
            kwargs[CACHE_NAME] = cache
        return function(*args, **kwargs)

    return renamed


def _each(change, tensors: tuple) -> list:
    return [None if x is None else change(x) for x in tensors]


def _joined(parts: Sequence[Tensor], keep: int) -> Tensor:
    """The first `keep` columns of some calls' tensors."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, :keep]


def _entry(qk: QueryKeys, value_BNE: Tensor, places: Places) -> tuple:
    """What a recorded call leaves for a rollback: keys, gates, values, and the marks of its documents."""
    documents = places.documents
    entry = (qk.quad_k, qk.lin_k, qk.gates, value_BNE, documents.valid_BN, documents.start_BN)
    return tuple(_each(lambda x: x.detach() if x.requires_grad else x, entry))


@dataclass  # not frozen: transformers' exporters assign to the fields
class StateForm:
    """What shapes the state of one layer, apart from the width of its values."""

    chunk_size: int
    key_dim: int
    has_quad: bool
    has_lin: bool
    previous_key: bool
    local_key_shift: bool
    delta: bool
    interleaved: bool
    window: int
    shift: int

    @classmethod
    def pair(cls, config: FlashConfig) -> list["StateForm"]:
        """The forms that layers have in turn."""
        return [
            cls(
                chunk_size=config.chunk_size, key_dim=config.query_key_dim, has_quad=config.has_quad,
                has_lin=config.has_lin, previous_key=config.previous_key, local_key_shift=config.local_key_shift,
                delta=config.global_state == "delta", interleaved=config.rope_interleaved, window=config.local_window,
                shift=config.shift_of(index),
            )
            for index in range(2)
        ]  # fmt: skip


class StepRecord(Protocol):
    """Recorded tokens that kernels took as steps, whose keys are made only if they are needed."""

    def keys(self, places: Places) -> tuple[QueryKeys, Tensor]:
        """Queries and keys of the tokens, and their values, 0 at padding."""

    def advance(self, state: DecodingState, places: Places, columns: int) -> None:
        """Take the first `columns` tokens again, on the state before them."""


class BatchOperations:
    """What transformers asks of every layer, for tensors whose first dimension is the batch."""

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor of the layer."""
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))


class FlashChunkCacheLayer(BatchOperations, CacheLayerMixin):
    """The constant-size state (`DecodingState`) of one layer with chunked attention.

    `crop`, which assisted decoding needs, requires `activate_past_recording()` first: the layer then keeps a copy of
    its state and the keys and values since (of steps by kernels, the projections), until `crop` decides how many of
    them stay.
    """

    _layer_type = CHUNK_LAYER_TYPE
    is_croppable = True
    supports_early_init = False
    is_sliding = False

    def __init__(self, **kwargs):
        CacheLayerMixin.__init__(self)
        self.state: DecodingState | None = None
        self.cumulative_length = 0
        self.record_past = False
        self.form: StateForm | None = None
        self._snapshot: DecodingState | None = None
        self._recorded: list[tuple | StepRecord] = []  # tuples as of `_entry`
        self._calls: list[Places] = []

    @property
    def cumulative_length(self) -> int | Tensor:
        """Columns of input so far, padding included. Stored as a size, since a number would become a constant of an
        exported program."""
        return self._columns.shape[0]

    @cumulative_length.setter
    def cumulative_length(self, columns: int) -> None:
        self._columns = torch.empty(columns, 0)

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.value.shape[0]

    @property
    def is_empty(self) -> bool:
        """Whether the host knows that nothing was seen yet: the first call then skips what a continuation needs."""
        return not self.is_initialized or (isinstance(self.cumulative_length, int) and self.cumulative_length == 0)

    @property
    def seen_B(self) -> Tensor | None:
        """Real tokens of each sequence's open document, int64 `[B]`; None if empty."""
        return None if self.is_empty else self.state.seen

    def lazy_initialization(self, value_states: Tensor) -> None:
        """Allocate an empty state of `form`, which `check_cache` sets, for values like these, `[B, ..., E]` (a shard
        under tensor parallelism)."""
        (batch, *_, E), dtype, device = value_states.shape, value_states.dtype, value_states.device
        form, C, S = self.form, self.form.chunk_size, self.form.key_dim
        keys = form.previous_key + (0 if form.delta else C)

        def zeros(*shape, dtype=dtype):
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        self.state = DecodingState(
            quad_k=zeros(C + form.local_key_shift, S) if form.has_quad else None,
            lin_k=zeros(keys, S) if form.has_lin and keys else None,
            value=zeros(C, E),
            total=zeros(S, E, dtype=wide(dtype)) if form.has_lin else None,
            seen=zeros(dtype=torch.long),
            opened=zeros(S, E, dtype=wide(dtype)) if form.delta else None,
            since=zeros(dtype=wide(dtype)) if form.delta else None,
            previous_k=zeros(C, S) if form.window > 1 else None,
            previous_value=zeros(C, E) if form.window > 1 else None,
        )
        self._begin(value_states)

    def _begin(self, value_states: Tensor) -> None:
        self.device, self.dtype = value_states.device, value_states.dtype
        self.is_initialized = True

    def update(
        self, state: DecodingState, places: Places, qk: QueryKeys | None = None, value_BNE: Tensor | None = None
    ) -> None:
        """Store the state after a call of several tokens. With `record_past` it needs their keys, `[B, N, S]` or on
        the grid of `places.layout`, and their values `[B, N, E]`."""
        if not self.is_initialized:
            # Fixed addresses, and a state to come back to, are those of tensors of its own.
            begin = self.lazy_initialization if self.is_compileable or self.record_past else self._begin
            begin(state.value)
        if self.record_past:
            if isinstance(places.layout, ChunkLayout):
                quad_k, lin_k, gates = _each(places.layout.merge, (qk.quad_k, qk.lin_k, qk.gates))
                qk = QueryKeys(None, quad_k, None, lin_k, gates)
            self._record(_entry(qk, value_BNE, places), places)
        self._set(state)
        self.cumulative_length += places.documents.position_BN.shape[1]

    def begin_step(
        self, value_BNE: Tensor, places: Places, tokens: "QueryKeys | StepRecord | None" = None
    ) -> DecodingState:
        """The state before one token, or a few taken one after another, to be advanced in place; arguments as in
        `update`, with keys `[B, N, S]`. The tokens are counted by `count_step`."""
        self._record_step(value_BNE, places, tokens)
        if self.record_past and self._snapshot is self.state:
            # The step overwrites the state, but not the snapshot.
            self.state = self.state.map(torch.clone)
        return self.state

    def begin_steps(
        self, value_BNE: Tensor, places: Places, tokens: "StepRecord | None" = None
    ) -> tuple[DecodingState, DecodingState]:
        """As `begin_step`, for kernels, which need the keys only for a rollback. Of a few tokens, the state before
        them and the one to fill with that after them, which is another if a rollback needs the former."""
        if places.documents.position_BN.shape[1] == 1:
            return (self.begin_step(value_BNE, places, tokens),) * 2
        self._record_step(value_BNE, places, tokens)
        state = self.state
        if self.record_past and self._snapshot is state:
            self.state = state.map(torch.empty_like)
        return state, self.state

    def _record_step(self, value_BNE: Tensor, places: Places, tokens: "QueryKeys | StepRecord | None") -> None:
        if not self.is_initialized:
            self.lazy_initialization(value_BNE)
        if self.record_past:
            if isinstance(tokens, QueryKeys):
                tokens = _entry(tokens, value_BNE, places)
            elif is_tracing() or is_distributed():  # a rollback will not have the weights
                tokens = _entry(*tokens.keys(places), places)
            self._record(tokens, places)

    def begin_append(self) -> DecodingState:
        """The state before a few tokens. With gradients a copy: backward reads it when the cache may have overwritten
        its own, and torch saves no inference tensors for it."""
        return self.state.map(torch.clone) if torch.is_grad_enabled() else self.state

    def _set(self, state: DecodingState) -> None:
        # Kernels take dense tensors, and a view would keep what it is a part of.
        self.state = state.map(Tensor.contiguous)

    # -- rollback
    def activate_past_recording(self) -> None:
        self.record_past = True

    def _record(self, tokens: "tuple | StepRecord", places: Places) -> None:
        self._snapshot = self.state if self._snapshot is None else self._snapshot
        self._recorded.append(tokens)
        self._calls.append(places)

    def _with_keys(self) -> list[tuple]:
        """The recorded calls, steps of kernels, too, by their keys."""
        calls = zip(self._recorded, self._calls, strict=True)
        return [x if isinstance(x, tuple) else _entry(*x.keys(places), places) for x, places in calls]

    def __getstate__(self) -> dict:
        """For copies and files, which must not hold the model."""
        return self.__dict__ | {"_recorded": self._with_keys()}

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns of input, of those recorded since `activate_past_recording` or
        the last `crop`; 0 keeps all."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}. A length to "
                "keep is not supported."
            )
        recorded = sum(places.documents.position_BN.shape[1] for places in self._calls)
        if -tokens_to_remove > recorded:
            raise RuntimeError(
                f"crop({tokens_to_remove}): only the {recorded} tokens recorded since the last crop can be removed, "
                "since closed chunks are stored as a sum. Call activate_past_recording() before calls to be undone."
            )
        if tokens_to_remove:
            self._set(self._replay(recorded + tokens_to_remove))
            self.cumulative_length += tokens_to_remove
        self._snapshot, self._recorded, self._calls = None, [], []

    def _replay(self, keep: int) -> DecodingState:
        """The state after the first `keep` recorded columns."""
        if keep == 0:
            return self._snapshot
        if not any(isinstance(tokens, tuple) for tokens in self._recorded):
            for tokens, places in zip(self._recorded, self._calls, strict=True):
                columns = min(keep, places.documents.position_BN.shape[1])
                if columns:
                    tokens.advance(self._snapshot, places, columns)
                keep -= columns
            return self._snapshot
        *kept, valid, starts = zip(*self._with_keys(), strict=True)
        quad_k, lin_k, gate, value = (None if parts[0] is None else _joined(parts, keep) for parts in kept)
        shapes, form = [part.shape[:2] for part in kept[3]], self.form

        def make() -> tuple[ChunkLayout | AppendLayout, Tensor | None, Tensor | None]:
            """Where the tokens are, which of them are padding, and the dimensions that local keys shift."""
            seen_B, device = self._snapshot.seen, value.device

            def marks(parts: tuple, fill: bool) -> Tensor | None:
                if all(part is None for part in parts):
                    return None
                pairs = zip(parts, shapes, strict=True)
                made = [torch.full(shape, fill, device=device) if part is None else part for part, shape in pairs]
                return _joined(made, keep)

            valid_BN = marks(valid, True)
            documents = count_positions(len(value), keep, device, valid_BN, marks(starts, False), seen_B)
            if can_append(documents, form.chunk_size):
                layout = append_layout(documents, form.chunk_size, window=form.window, shift=form.shift)
            else:
                layout = chunk_layout(documents, len(value), form.chunk_size, causal=True, shift=form.shift)
            shifted_S = shifted_dims(form.key_dim, form.interleaved, device) if form.local_key_shift else None
            return layout, padding_of(valid_BN), shifted_S

        # Layers that recorded the same calls are rolled back one after another, to the same token.
        key = keep, tuple(map(id, self._calls))
        layout, padding_BN1, shifted_S = recall(self._calls[0], key, make, value)
        (value,) = without_padding(padding_BN1, value)
        qk = QueryKeys(None, quad_k, None, lin_k, gate)
        options = {"divisor": 1.0, "previous_key": form.previous_key, "shifted_S": shifted_S, "window": form.window}
        if isinstance(layout, AppendLayout):
            append = delta_chunk_append if form.delta else mixed_chunk_append
            return append(qk, value, layout, self._snapshot, **options)[1]
        attention = delta_chunk_attention if form.delta else mixed_chunk_attention
        options |= {"causal": True, "chunk_size": form.chunk_size, "state": self._snapshot, "return_state": True}
        qk = QueryKeys(*_each(layout.split, qk._replace(lin_q=lin_k)))  # any queries will do: the output is dropped
        return attention(qk, layout.split(value), layout, **options)[1]

    # -- transformers' interface
    def get_seq_length(self) -> int | Tensor:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.state, self._snapshot, self._recorded, self._calls = None, None, [], []
        self.cumulative_length, self.is_initialized = 0, False

    def _map(self, change) -> None:
        if not self.is_initialized:
            return
        shared = self._snapshot is self.state
        self.state = self.state.map(change)
        if self._snapshot is not None:
            self._snapshot = self.state if shared else self._snapshot.map(change)
        self._recorded = [tuple(_each(change, entry)) for entry in self._with_keys()]
        self._calls = [replace(places) for places in self._calls]  # which were those of other layers, too


class Irreversible:
    """Static layers overwrite their tensors, so nothing can be rolled back; the first call allocates them."""

    is_croppable = False
    _keys: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        if self._keys is None:
            raise AttributeError(
                "FLASH's cache has no keys before its first call. transformers' recipes for ExecuTorch "
                "(convert_and_export_with_cache, TorchExportableModuleForDecoderOnlyLM) only keep keys and values: "
                "use export_for_generation of transformers.exporters, whose programs take the cache as an input."
            )
        return self._keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = keys

    def activate_past_recording(self) -> None:
        raise ValueError(
            "A static cache cannot be rolled back, which assisted decoding needs. Leave out "
            "cache_implementation='static', or pass DynamicCache(config=model.config)."
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, except for 0."""
        if tokens_to_remove:
            self.activate_past_recording()


class FlashStaticChunkCacheLayer(Irreversible, FlashChunkCacheLayer, StaticLayer):
    """The same state at fixed addresses, with its counter on the device, for `torch.compile` and CUDA graphs.
    `max_cache_len` is ignored: the state has one size for any context."""

    _layer_type = CHUNK_LAYER_TYPE
    is_compileable = True
    cumulative_length: Tensor = None

    def __init__(self, max_cache_len: int = -1, **kwargs):
        FlashChunkCacheLayer.__init__(self)
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.tensor(0, dtype=torch.long, device="cpu")  # moved with the first values

    def lazy_initialization(self, value_states: Tensor) -> None:
        super().lazy_initialization(value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._pin()

    def _pin(self) -> None:
        if not is_tracing():
            _each(torch._dynamo.mark_static_address, (*self.state, self.cumulative_length))

    def _set(self, state: DecodingState) -> None:
        for mine, new in zip(self.state, state, strict=True):
            if mine is not None:
                mine.copy_(new)

    def reset(self) -> None:
        if self.is_initialized:
            _each(torch.Tensor.zero_, (*self.state, self.cumulative_length))

    def _map(self, change) -> None:
        if not self.is_initialized:
            return
        state = self.state.map(change)
        if state.value.shape == self.state.value.shape and state.value.device == self.state.value.device:
            self._set(state)
        else:
            self.state = state
            self._pin()


class CountsDocuments:
    """Bookkeeping of FLASH-Quad's layers: the position and the document of every key."""

    position: Tensor | None = None
    document: Tensor | None = None

    @property
    def seen_B(self) -> Tensor | None:
        """Real tokens of each sequence's open document, int64 `[B]`; None if empty."""
        if not self.is_initialized:
            return None
        open_BM = self.document == self.document.amax(1, keepdim=True).clamp(min=0)
        return torch.where(open_BM, self.position + 1, 0).amax(1)

    def extend(self, key_BNS: Tensor, value_BNE: Tensor, layout: QuadraticLayout) -> tuple[Tensor, Tensor]:
        """Append a call's keys and values, and return all, `[B, M, S]` and `[B, M, E]`."""
        books = layout.key_position_BN, layout.key_document_BN
        keys, values = self.update(key_BNS[:, None], value_BNE[:, None], *books)
        return keys[:, 0], values[:, 0]


class FlashQuadraticCacheLayer(CountsDocuments, BatchOperations, DynamicLayer):
    """Keys and values of FLASH-Quad, which grow with the context.

    Attributes:
        keys, values: `[B, 1, M, S]`, `[B, 1, M, E]`.
        position, document: int64 `[B, M]`; document -1 marks padding.
    """

    _layer_type = QUADRATIC_LAYER_TYPE

    @property
    def batch_size(self) -> int:
        return self.position.shape[0] if self.position is not None else -1

    def past(self, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
        """The cached keys as arguments of `quadratic_layout`, for a call of `length` tokens."""
        if not self.is_initialized:
            return {}
        return {"past_position_BM": self.position.to(device), "past_document_BM": self.document.to(device)}

    def update(self, key_states, value_states, position_BN=None, document_BN=None, **kwargs):
        """Append keys `[B, 1, N, S]` and values `[B, 1, N, E]`, and return all."""
        self.position = position_BN if self.position is None else torch.cat([self.position, position_BN], 1)
        self.document = document_BN if self.document is None else torch.cat([self.document, document_BN], 1)
        keys, values = super().update(key_states, value_states)
        # Gradients flow through this call's tokens, but not into later calls.
        self.keys, self.values = keys.detach(), values.detach()
        return keys, values

    def _map(self, change) -> None:
        if self.is_initialized:
            tensors = self.keys, self.values, self.position, self.document
            self.keys, self.values, self.position, self.document = _each(change, tensors)

    def reset(self) -> None:
        self.keys = self.values = self.position = self.document = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0 and self.is_initialized:
            self.position = self.position[:, :tokens_to_remove]
            self.document = self.document[:, :tokens_to_remove]
            if not self.position.shape[1]:
                self.reset()  # to what it was before its first call


class FlashStaticQuadraticCacheLayer(Irreversible, CountsDocuments, StaticLayer):
    """FLASH-Quad's keys and values in tensors of `max_cache_len` slots; unused slots belong to document -1."""

    _layer_type = QUADRATIC_LAYER_TYPE
    supports_early_init = False  # early init would allocate the values with the keys' width

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        shape = (key_states.shape[0], self.max_cache_len)
        self.position = torch.zeros(shape, dtype=torch.long, device=key_states.device)
        self.document = torch.full(shape, -1, dtype=torch.long, device=key_states.device)
        if not is_tracing():
            _each(torch._dynamo.mark_static_address, (self.position, self.document))

    def _next(self, length: int) -> Tensor:
        """Where the next `length` tokens go, int64 `[length]`."""
        return torch.arange(length, device=self.cumulative_length.device) + self.cumulative_length

    def past(self, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
        # On a GPU the number of tokens is on the device, and not read here.
        if not is_tracing() and (not self.is_initialized or self.cumulative_length.device.type == "cpu"):
            held = int(self.cumulative_length) if self.is_initialized else 0
            if held + length > self.max_cache_len:
                raise ValueError(
                    f"The static cache has max_cache_len = {self.max_cache_len} slots for FLASH-Quad's keys, got "
                    f"{held} tokens in it and {length} more. Make it with a larger max_cache_len, or pass "
                    "DynamicCache(config=model.config), which grows."
                )
        if self.is_initialized:
            position, document, write_N = self.position.to(device), self.document.to(device), self._next(length)
        else:
            position = torch.zeros(batch, self.max_cache_len, dtype=torch.long, device=device)
            document, write_N = position - 1, torch.arange(length, device=device)
        return {"past_position_BM": position, "past_document_BM": document, "write_N": write_N}

    def update(self, key_states, value_states, position_BN=None, document_BN=None, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        write_N = self._next(key_states.shape[2])
        self.position.index_copy_(1, write_N, position_BN)
        self.document.index_copy_(1, write_N, document_BN)
        keys, values = super().update(key_states.detach(), value_states.detach())
        if torch.is_grad_enabled() and value_states.requires_grad:
            keys, values = keys.index_copy(2, write_N, key_states), values.index_copy(2, write_N, value_states)
        return keys, values

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self.document.fill_(-1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            for tensor in (self.keys, self.values, self.position, self.document):
                tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))


LAYER_KINDS = {
    CHUNK_LAYER_TYPE: (FlashChunkCacheLayer, FlashStaticChunkCacheLayer),
    QUADRATIC_LAYER_TYPE: (FlashQuadraticCacheLayer, FlashStaticQuadraticCacheLayer),
}


def check_cache(cache: Cache, config: FlashConfig, forms: list[StateForm], batch: int) -> None:
    """Check that `cache` can hold this model's state for `batch` rows (else a ValueError), and prepare an empty one
    for it. `forms` is `StateForm.pair(config)`, which is not made again for every token."""
    wanted = LAYER_KINDS[config.layer_types[0]]
    wrong = "`cache` (or `past_key_values`) must be a transformers Cache, and a cache of this model"
    if not isinstance(cache, Cache):
        raise ValueError(f"{wrong}, got {type(cache).__name__}. Use DynamicCache(config=model.config).")
    if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(wanted[0]() for _ in range(config.num_hidden_layers))
        cache.layer_class_to_replicate = None
    if cache.layers and not cache.layers[0].is_initialized:
        _adopt(cache, config.layer_types[0], forms)
    if len(cache.layers) != config.num_hidden_layers or not all(isinstance(layer, wanted) for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise ValueError(
            f"{wrong} ({config.num_hidden_layers} layers, attention_type {config.attention_type!r}), got "
            f"{len(cache.layers)} layers of {', '.join(kinds) or 'no kind'}. Build it with DynamicCache(config="
            "model.config) or StaticCache(config=model.config, max_cache_len=...). FLASH cannot take the keys and "
            "values of PEFT's prefix tuning: use prompt tuning, p-tuning or LoRA."
        )
    layer = cache.layers[0]
    if not layer.is_initialized:
        return
    if layer.batch_size != batch:
        raise ValueError(
            f"The cache holds {layer.batch_size} rows but the input has {batch}. Continue with the same batch, or "
            "change the cache with batch_select_indices or batch_repeat_interleave."
        )
    if isinstance(layer, FlashChunkCacheLayer):
        if not is_tracing() and not torch.is_inference_mode_enabled():
            _leave_inference_mode(cache)
        found, expected = [own.form for own in cache.layers[:2]], forms[: len(cache.layers)]
        width = layer.state.value.shape[2]
    else:
        found, expected, width = layer.keys.shape[3], config.query_key_dim, layer.values.shape[3]
    # A tensor-parallel shard of the values is narrower.
    E, fits = config.intermediate_size, width == config.intermediate_size
    if found != expected or not (fits or (is_distributed() and E % width == 0)):
        raise ValueError(
            f"The cache was filled by a model of another shape ({found}, values of width {width}); this model needs "
            f"{expected}, {E}. Start with an empty cache."
        )


def _leave_inference_mode(cache: Cache) -> None:
    """Copy what a dynamic cache holds from torch.inference_mode(): outside of it steps could not overwrite that."""
    held = cache.layers[0]
    if not held.is_compileable and any(x is not None and x.is_inference() for x in held.state):
        for layer in cache.layers:
            layer._map(torch.clone)


def count_step(layers: list[FlashChunkCacheLayer], columns: int) -> None:
    """Count the columns of steps; in a static cache in all layers at once, since each alone would take a launch."""
    if isinstance(layers[0].cumulative_length, Tensor) and not is_exporting():
        torch._foreach_add_([layer.cumulative_length for layer in layers], columns)
        return
    for layer in layers:
        layer.cumulative_length += columns


def _adopt(cache: Cache, kind: str, forms: list[StateForm]) -> None:
    """Tell the empty layers of a cache what they will hold."""
    dynamic, static = wanted = LAYER_KINDS[kind]
    for index, layer in enumerate(cache.layers):
        # With two copies of this code in one process (the package, and a checkpoint's remote code), transformers
        # builds caches from the layers registered last, possibly the other copy's. Empty ones are replaced.
        if getattr(layer, "_layer_type", None) == kind and not isinstance(layer, wanted):
            own = static(max_cache_len=layer.max_cache_len) if isinstance(layer, StaticLayer) else dynamic()
            own.record_past = getattr(layer, "record_past", False)
            cache.layers[index] = layer = own
        if isinstance(layer, FlashChunkCacheLayer):
            layer.form = forms[index % 2]
