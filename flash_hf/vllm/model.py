# SPDX-License-Identifier: Apache-2.0
"""The library's causal model behind vLLM's model interface, with decoding states in vLLM's cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec

from ..attention_flash import DecodingState
from ..cache_flash import FlashChunkCacheLayer, StateForm
from ..configuration_flash import FlashConfig
from ..modeling_flash import FlashForCausalLM
from .requests import RequestRows, StateBackend


# The state of a request and layer takes a multiple of so many bytes, so that its tensors are aligned.
ALIGNMENT = 64


def stored_tensors(config: FlashConfig, form: StateForm, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer's `DecodingState` of one request, on the meta device, `[1, ...]`, by name: all but the
    number of tokens seen, which vLLM counts. The widest type comes first, which keeps each tensor aligned."""
    layer = FlashChunkCacheLayer()
    layer.form = form
    layer.lazy_initialization(torch.empty(1, 1, config.intermediate_size, dtype=dtype, device="meta"))
    named = {field.name: getattr(layer.state, field.name) for field in fields(DecodingState) if field.name != "seen"}
    stored = [(name, tensor) for name, tensor in named.items() if tensor is not None]
    return dict(sorted(stored, key=lambda item: -item[1].element_size()))


class StatePages(MambaBase):
    """One layer's states of all requests: one block of vLLM's cache per request, given and taken by its manager.

    Attributes:
        stored: see `stored_tensors`.
        kv_cache: for each of them, `[blocks, ...]`.
    """

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, stored: dict[str, Tensor]):
        self.stored = stored
        self.kv_cache: tuple[Tensor, ...] = ()

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tensor.shape[1:]) for tensor in self.stored.values())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(tensor.dtype for tensor in self.stored.values())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        return replace(spec, page_size_padded=-(-spec.page_size_bytes // ALIGNMENT) * ALIGNMENT)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def read(self, rows: RequestRows) -> DecodingState:
        """The states of `rows`: a copy, or the pages themselves where these are adjacent."""
        tensors = dict.fromkeys(field.name for field in fields(DecodingState))
        for name, page in zip(self.stored, self.kv_cache, strict=True):
            tensors[name] = page.index_select(0, rows.page_B) if rows.span is None else page[rows.span]
        return DecodingState(**tensors | {"seen": rows.seen_B.clone()})

    def write(self, rows: RequestRows, state: DecodingState) -> None:
        for name, page in zip(self.stored, self.kv_cache, strict=True):
            new = getattr(state, name)
            if rows.span is None:
                page.index_copy_(0, rows.page_B, new)
            elif new.data_ptr() != page[rows.span].data_ptr():
                page[rows.span] = new


class PagedCacheLayer(FlashChunkCacheLayer):
    """A layer of the library's cache for one forward of some requests. It reads their states at first use and writes
    them back after the layer, so that only one layer's copies exist at a time."""

    _layer_type = None  # else DynamicCache would build its layers from this class

    def __init__(self, pages: StatePages, rows: RequestRows, form: StateForm, before: PagedCacheLayer | None):
        self._copy: DecodingState | None = None
        super().__init__()
        self.pages, self.rows, self.form, self.before = pages, rows, form, before
        if rows.seen_B is not None:
            self.is_initialized, self.cumulative_length = True, 1  # any number but 0: not empty

    @property
    def batch_size(self) -> int:
        return len(self.rows.page_B)

    @property
    def seen_B(self) -> Tensor | None:
        return self.rows.seen_B

    @property
    def state(self) -> DecodingState | None:
        if self._copy is None and self.rows.seen_B is not None:
            self._copy = self.pages.read(self.rows)
        return self._copy

    @state.setter
    def state(self, state: DecodingState | None) -> None:
        self._copy = state

    def begin_step(self, *args, **kwargs) -> DecodingState:
        if self.before is not None:
            self.before.write_back()  # its step is done
        return super().begin_step(*args, **kwargs)

    def _set(self, state: DecodingState) -> None:
        self.state = state
        self.write_back()

    def write_back(self) -> None:
        """Store the state in vLLM's cache, and drop the copy."""
        if self._copy is not None:
            self.pages.write(self.rows, self._copy)
            self._copy = None


class FlashServed(nn.Module, HasInnerState, IsAttentionFree):
    """`FlashForCausalLM` as vLLM calls it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.flash = FlashForCausalLM(config).eval()
        self.forms = StateForm.pair(self.flash.config)
        layers = vllm_config.compilation_config.static_forward_context
        self.pages: list[StatePages] = []
        for index in range(config.num_hidden_layers):
            stored = stored_tensors(self.flash.config, self.forms[index % 2], vllm_config.model_config.dtype)
            self.pages.append(StatePages(stored))
            layers[f"{prefix}.layers.{index}.state".removeprefix(".")] = self.pages[-1]
        self.first_layer = f"{prefix}.layers.0.state".removeprefix(".")

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.flash.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Last hidden states `[T, D]` of the tokens `[T]` of all requests of a step. `positions` are not read: the
        library counts them from the tokens seen."""
        name, tokens = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a trial run, in which vLLM measures memory
            return self.flash.model(**{name: tokens[None]}, use_cache=False).last_hidden_state[0]
        embedding = self.flash.model.embed_tokens.weight
        hidden_TD = embedding.new_zeros(len(tokens), embedding.shape[1])  # vLLM may pad the tokens
        for rows in metadata[self.first_layer]:
            hidden_BND = self.run(rows, **{name: tokens[rows.token_BN]})
            if rows.valid_BN is None:
                hidden_TD[rows.token_BN] = hidden_BND
            else:
                hidden_TD[rows.token_BN[rows.valid_BN]] = hidden_BND[rows.valid_BN]
        return hidden_TD

    def run(self, rows: RequestRows, **tokens: Tensor) -> Tensor:
        """Last hidden states of some requests, `[B, N, D]`; advances their states."""
        layers: list[PagedCacheLayer] = []
        for index, pages in enumerate(self.pages):
            before = layers[-1] if layers else None
            layers.append(PagedCacheLayer(pages, rows, self.forms[index % 2], before))
        cache = Cache(layers=layers)
        out = self.flash.model(**tokens, attention_mask=rows.valid_BN, past_key_values=cache)
        layers[-1].write_back()
        return out.last_hidden_state

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.flash.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the parameters from a checkpoint's tensors by their names in the library.

        Raises:
            ValueError: unknown or missing names, or another shape.
        """
        own = dict(self.flash.named_parameters())
        tied = () if "lm_head.weight" in own else ("lm_head.weight",)
        missing = set(own)
        for name, tensor in weights:
            if name in tied:
                continue
            if name not in own or own[name].shape != tensor.shape:
                expected = f"of shape {tuple(own[name].shape)}" if name in own else "not in the model"
                raise ValueError(f"The checkpoint's {name} has shape {tuple(tensor.shape)}, expected {expected}.")
            own[name].data.copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"The checkpoint lacks {', '.join(sorted(missing))}.")
        return {f"flash.{name}" for name in own}
