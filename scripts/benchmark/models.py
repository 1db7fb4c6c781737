# SPDX-License-Identifier: Apache-2.0
"""The measured models behind one interface; backbones only, from embeddings to hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel, StaticCache

from flash_hf.cache_flash import CACHE_NAME
from flash_hf.configuration_flash import FlashConfig
from flash_hf.modeling_flash import FlashForCausalLM, FlashModel

from .lean import LeanTransformer
from .sizes import Size, flash_config


class Unsupported(Exception):
    """The model does not support a case; the reason becomes the note of a row without numbers."""


class Candidate:
    """A measured model: `module`, `hidden(x)`, and `prefill(x)` and `decoder(...)` if it decodes."""

    note = ""
    compile_layers = False  # whether `first_layers` must still be compiled
    module: nn.Module

    def hidden(self, x: Tensor) -> Tensor:
        return self.module(x)

    def layers(self) -> list[nn.Module]:
        """The modules to compile one by one."""
        return []

    def recompute(self, on: bool) -> None:
        raise Unsupported("no gradient checkpointing")

    def prefill(self, x: Tensor):
        raise Unsupported("no prefill with a cache")

    def decoder(self, batch: int, context: int, steps: int, like: Tensor) -> tuple[Callable, Callable]:
        """`(step, rewind)`: decode one token per sequence after `context - 1` others; go back to there."""
        raise Unsupported("no decoding with a static cache")


class HostCandidate(Candidate):
    """A transformers model."""

    def __init__(self, module: nn.Module):
        self.module = module.train()

    def hidden(self, x: Tensor) -> Tensor:
        return self.module(inputs_embeds=x, use_cache=False).last_hidden_state

    def recompute(self, on: bool) -> None:
        if on:
            # The first name is that of transformers 5.23 and later; both use non-reentrant checkpointing.
            getattr(self.module, "activation_checkpointing_enable", self.module.gradient_checkpointing_enable)()
        else:
            getattr(self.module, "activation_checkpointing_disable", self.module.gradient_checkpointing_disable)()

    def prefill(self, x: Tensor):
        cache = DynamicCache(config=self.module.config)
        return self.module(inputs_embeds=x, use_cache=True, **{CACHE_NAME: cache})

    def step_on(self, cache, x: Tensor) -> Callable:
        def step():
            return self.module(inputs_embeds=x, use_cache=True, **{CACHE_NAME: cache}).last_hidden_state

        return step


class FlashCandidate(HostCandidate):
    def __init__(self, config: FlashConfig):
        super().__init__(FlashModel(config))
        self.note = f"backend {config.backend}"

    def layers(self) -> list[nn.Module]:
        return list(self.module.layers)

    def decoder(self, batch, context, steps, like):
        if self.module.config.attention_type == "quadratic":
            raise Unsupported("not measured: its cache grows like a Transformer's")
        cache = StaticCache(config=self.module.config, max_cache_len=context + steps)
        row = torch.randn(1, context - 1, like.shape[-1], dtype=like.dtype, device=like.device)
        # One sequence is enough: the cost of a step does not depend on the contents of the state.
        self.module(inputs_embeds=row, use_cache=True, cache=cache)
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        # The state has no maximum length and every step costs the same, so there is nothing to rewind.
        return self.step_on(cache, like), lambda: None


class LlamaCandidate(HostCandidate):
    def decoder(self, batch, context, steps, like):
        config = self.module.config
        cache = StaticCache(config=config, max_cache_len=context + steps)
        dim = config.hidden_size // config.num_attention_heads
        cache.early_initialization(batch, config.num_attention_heads, dim, like.dtype, like.device)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()

        def rewind():
            for layer in cache.layers:
                layer.cumulative_length.fill_(context - 1)

        rewind()
        return self.step_on(cache, like), rewind


class LeanCandidate(Candidate):
    def __init__(self, size: Size, causal: bool):
        self.module = LeanTransformer(size, causal).train()

    def layers(self) -> list[nn.Module]:
        return list(self.module.layers)

    def recompute(self, on: bool) -> None:
        self.module.recompute = on

    def prefill(self, x: Tensor):
        return self.module.prefill(x)

    def decoder(self, batch, context, steps, like):
        size = self.module.size
        shape = (batch, size.heads, context, size.width // size.heads)
        # Exactly as many columns as tokens, so that no mask is needed; a real cache is slower.
        caches = [
            tuple(torch.empty(shape, dtype=like.dtype, device=like.device).normal_() for _ in "kv")
            for _ in self.module.layers
        ]
        place = torch.tensor([context - 1], device=like.device)
        return lambda: self.module.step(like, caches, place), lambda: None


class PlainCandidate(Candidate):
    def __init__(self, module: nn.Module):
        self.module = module.train()


def build_flash_pytorch(size: Size, causal: bool) -> Candidate:
    from flash_pytorch import FLASH

    layer = {"dim": size.width, "group_size": size.chunk_size, "causal": causal, "query_key_dim": size.query_key_dim}
    return PlainCandidate(nn.Sequential(*(FLASH(**layer) for _ in range(size.layers))))


def build_flash_pytorch_full(size: Size, causal: bool) -> Candidate:
    """The layers as in its own model: with rotary positions, ScaleNorm and token shift."""
    from flash_pytorch import FLASHTransformer

    model = FLASHTransformer(
        dim=size.width, num_tokens=128, depth=size.layers, group_size=size.chunk_size, causal=causal,
        query_key_dim=size.query_key_dim,
    )  # fmt: skip
    return PlainCandidate(nn.Sequential(*model.layers))


def build_fla(name: str, size: Size, causal: bool) -> Candidate:
    import fla.models

    if not causal:
        raise Unsupported("causal only")
    # Head widths are powers of two, as their kernels expect. A Gated DeltaNet layer has more parameters than a
    # Transformer block, hence 11 of them for 12 blocks.
    cls, options = {
        "gla": ("GLA", {"num_heads": max(1, size.width // 256), "num_hidden_layers": size.blocks}),
        "gated-deltanet": (
            "GatedDeltaNet",
            {"num_heads": max(1, size.width // 192), "head_dim": 128, "expand_v": 2,
             "num_hidden_layers": max(1, round(size.blocks * 11 / 12))},
        ),
    }[name]  # fmt: skip
    config = getattr(fla.models, cls + "Config")(
        vocab_size=128, hidden_size=size.width, use_cache=False, max_position_embeddings=1 << 20, **options
    )
    return HostCandidate(getattr(fla.models, cls + "Model")(config))


def llama_config(size: Size, **changes) -> LlamaConfig:
    options = {
        "vocab_size": 128, "hidden_size": size.width, "intermediate_size": size.feed_forward,
        "num_hidden_layers": size.blocks, "num_attention_heads": size.heads, "attn_implementation": "sdpa",
        "max_position_embeddings": 1 << 20,
    }  # fmt: skip
    return LlamaConfig(**{**options, **changes})


def build_llama(size: Size, causal: bool) -> Candidate:
    if not causal:
        raise Unsupported("causal only")
    return LlamaCandidate(LlamaModel(llama_config(size)))


def build_baseline(size: Size, causal: bool) -> Candidate:
    from ..baselines import TransformerPPConfig, TransformerPPModel

    config = TransformerPPConfig(
        vocab_size=128, hidden_size=size.width, num_hidden_layers=size.blocks, num_attention_heads=size.heads,
        intermediate_size=size.feed_forward, is_decoder=causal,
    )  # fmt: skip
    candidate = HostCandidate(TransformerPPModel(config))
    candidate.layers = lambda: list(candidate.module.layers)
    return candidate


class Model(NamedTuple):
    """A model's constructor, and whether its layers are compiled one by one on a GPU."""

    build: Callable[[Size, bool, str], Candidate]
    compiled: bool = False


def _backend(backend: str, device: str) -> str:
    """On a GPU a silent fallback must not be measured; elsewhere there are no kernels."""
    return backend if device == "cuda" else "torch"


def _flash(backend: str, **changes) -> Callable[[Size, bool, str], Candidate]:
    def build(size: Size, causal: bool, device: str) -> Candidate:
        return FlashCandidate(flash_config(size, causal, _backend(backend, device), **changes))

    return build


FORMS: dict[str, dict] = {
    "flash": {}, "flash-plus": {"plus": True, "local_key_shift": False}, "flash-plus-keys": {"plus": True},
    "flash-plus-delta": {"plus": True, "global_state": "delta"},
}  # fmt: skip
MODELS = {
    **{name: Model(_flash("triton", **form)) for name, form in FORMS.items()},
    "flash-compiled": Model(_flash("triton"), compiled=True),
    "flash-torch": Model(_flash("torch"), compiled=True),
    # The rotary bias, since the Toeplitz bias is limited to max_position_embeddings. Kernels take rows of up to 8,192
    # tokens without a cache; the rest is plain torch.
    "flash-quad": Model(_flash("triton", attention_type="quadratic", relative_bias="rotary")),
    "transformer++": Model(lambda size, causal, device: LeanCandidate(size, causal), compiled=True),
    "transformer++-baseline": Model(lambda size, causal, device: build_baseline(size, causal), compiled=True),
    "llama": Model(lambda size, causal, device: build_llama(size, causal)),
    "flash-pytorch": Model(lambda size, causal, device: build_flash_pytorch(size, causal)),
    "flash-pytorch-full": Model(lambda size, causal, device: build_flash_pytorch_full(size, causal)),
    "gla": Model(lambda size, causal, device: build_fla("gla", size, causal)),
    "gated-deltanet": Model(lambda size, causal, device: build_fla("gated-deltanet", size, causal)),
}


def build(name: str, size: Size, causal: bool, device: str, dtype: torch.dtype, *, compile: bool = True) -> Candidate:
    """A model on its device, its layers compiled one by one if it is one of those and the device is a GPU.

    Raises:
        Unsupported: its package is missing, or it does not have this direction.
    """
    torch.manual_seed(0)
    model = MODELS[name]
    try:
        candidate = model.build(size, causal, device)
    except ImportError as error:
        raise Unsupported(f"not installed: {error}") from error
    candidate.module.to(device, dtype)
    if model.compiled and compile and device == "cuda":
        for layer in candidate.layers():
            layer.compile(dynamic=False)
        candidate.note = (candidate.note + "; layers compiled one by one").lstrip("; ")
    return candidate


def build_head(name: str, size: Size, vocabulary: int, device: str, dtype: torch.dtype) -> nn.Module:
    """A model with a head, for `generate()`; its embeddings are tied.

    Raises:
        Unsupported: it has none here.
    """
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(llama_config(size, vocab_size=vocabulary, tie_word_embeddings=True))
    elif name in FORMS:
        backend = _backend("triton", device)
        model = FlashForCausalLM(flash_config(size, True, backend, vocab_size=vocabulary, **FORMS[name]))
    else:
        raise Unsupported("not measured with a head")
    return model.to(device, dtype).eval()


def parameter_count(module: nn.Module) -> int:
    """Parameters, without the embedding, which no measurement uses."""
    return sum(p.numel() for name, p in module.named_parameters() if "embed" not in name)


def first_layers(candidate: Candidate, layers: int, x: Tensor) -> tuple[nn.ModuleList, Callable[[Tensor], Tensor]]:
    """A model's first layers alone, and their forward with the arguments that the model passes them for `x`."""
    chosen, seen = nn.ModuleList(candidate.module.layers[:layers]), []
    hook = chosen[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[1:], kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        candidate.hidden(x)
    hook.remove()
    args, kwargs = seen[0]

    def forward(hidden: Tensor) -> Tensor:
        for layer in chosen:
            hidden = layer(hidden, *args, **kwargs)
        return hidden

    return chosen, forward
