# SPDX-License-Identifier: Apache-2.0
"""What scripts/benchmark.py measures: models of equal size, their arithmetic, the timer, and the gate before it.

Backbones only: embeddings in, hidden states out. `D` model width, `E` value width, `S` query/key width, `C`
chunk size.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaConfig, LlamaModel, StaticCache

from .cache_flash import CACHE_NAME
from .configuration_flash import FlashConfig
from .modeling_flash import FlashModel
from .naive import naive_model
from .testing import error_ratio, make_model, naive_config, random_ids, tiny_config
from .throughput import training_flops


# ------------------------------------------------------------------------------------------------------------------
# Sizes and arithmetic
# ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Size:
    """One size for all models: two FLASH layers stand for one Transformer block, about 85 M parameters by default."""

    width: int = 768
    layers: int = 24
    query_key_dim: int = 128
    chunk_size: int = 256
    heads: int = 12
    feed_forward: int = 2048

    @property
    def blocks(self) -> int:
        return self.layers // 2

    @property
    def value_dim(self) -> int:
        return 2 * self.width


BASE = Size()
# What two cores train in a second.
SMALL = Size(width=256, layers=4, heads=4, feed_forward=688)
SMOKE = Size(width=32, layers=2, query_key_dim=16, chunk_size=16, heads=2, feed_forward=88)


def mean_keys(length: int, causal: bool) -> float:
    """Keys that a query sees on average in a span of `length`: the causal half is counted as the half it is."""
    return (length + 1) / 2 if causal else float(length)


def flash_flops(size: Size, context: int, causal: bool, attention_type: str = "mixed_chunk") -> float:
    """Floating-point operations of FLASH a token, forward, without a head: see `throughput.training_flops`."""
    config = flash_config(size, causal, None, attention_type=attention_type)
    return training_flops(config, context, causal=causal, head=False) / 3


def transformer_flops(size: Size, context: int, causal: bool) -> float:
    """The same of Transformer++ and Llama: a block has `8 D^2 + 6 D F` in projections and `4 D keys` in attention."""
    D = size.width
    return size.blocks * (8 * D * D + 6 * D * size.feed_forward + 4 * D * mean_keys(context, causal))


def model_flops(name: str, size: Size, context: int, causal: bool) -> float | None:
    """Operations a token, forward; None for models whose own arithmetic is not written down here. A training step
    counts three times as many: a product's backward is two of its size. Recomputation counts nothing."""
    if name == "flash-quad":
        return flash_flops(size, context, causal, "quadratic")
    if name.startswith("flash"):
        return flash_flops(size, context, causal)
    if name.startswith(("transformer++", "llama")):
        return transformer_flops(size, context, causal)
    return None


def utilisation(flops_per_token: float | None, tokens: int, ms: float, peak_flops: float | None) -> float | None:
    """MFU: the model's own arithmetic over what the measured matrix-product rate (operations a second) could do."""
    if flops_per_token is None or not peak_flops:
        return None
    return flops_per_token * tokens / (ms * 1e-3) / peak_flops


# ------------------------------------------------------------------------------------------------------------------
# The strongest plain opponent
# ------------------------------------------------------------------------------------------------------------------
def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class LeanBlock(nn.Module):
    """The block of flash_hf.baselines' Transformer++ written for speed: fused q, k, v and gate, up; no mask anywhere.

    The baseline keeps projections apart, for checkpoints and LoRA; this one is what a fast Transformer++ looks like.
    """

    def __init__(self, size: Size, causal: bool):
        super().__init__()
        D, hidden = size.width, size.feed_forward
        self.heads, self.causal = size.heads, causal
        self.attention_norm, self.mlp_norm = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.qkv_proj, self.o_proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_up_proj, self.down_proj = nn.Linear(D, 2 * hidden, bias=False), nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keep: bool = False, cache=None):
        """`x`, or `(x, key, value)` to keep for decoding; `cache = (keys, values, place)` takes one token in."""
        B, N, D = x.shape
        qkv = self.qkv_proj(self.attention_norm(x)).view(B, N, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = rotate_half(query, cos, sin), rotate_half(key, cos, sin)
        keys, values = key, value
        if cache is not None:
            keys, values, place = cache
            keys.index_copy_(2, place, key)
            values.index_copy_(2, place, value)
        out = F.scaled_dot_product_attention(query, keys, values, is_causal=self.causal and cache is None)
        x = x + self.o_proj(out.transpose(1, 2).reshape(B, N, D))
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, -1)
        x = x + self.down_proj(F.silu(gate) * up)
        return (x, key, value) if keep else x


class LeanTransformer(nn.Module):
    """Transformer++ without a head: `size.blocks` blocks and a norm."""

    def __init__(self, size: Size, causal: bool):
        super().__init__()
        self.size, self.recompute = size, False
        self.layers = nn.ModuleList(LeanBlock(size, causal) for _ in range(size.blocks))
        self.norm = nn.RMSNorm(size.width, eps=1e-5)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def angles(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dim = self.size.width // self.size.heads
        steps = torch.arange(0, dim, 2, device=position.device).float()
        angle = torch.outer(position.float(), 1.0 / (10000 ** (steps / dim)))
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        angles = self.angles(torch.arange(x.shape[1], device=x.device), x.dtype)
        for layer in self.layers:
            x = checkpoint(layer, x, *angles, use_reentrant=False) if self.recompute else layer(x, *angles)
        return self.norm(x)

    def prefill(self, x: Tensor) -> tuple[Tensor, list]:
        """Hidden states, and keys and values of every layer."""
        angles, cache = self.angles(torch.arange(x.shape[1], device=x.device), x.dtype), []
        for layer in self.layers:
            x, *kept = layer(x, *angles, keep=True)
            cache.append(kept)
        return self.norm(x), cache

    def step(self, x: Tensor, caches: list[tuple[Tensor, Tensor]], place: Tensor) -> Tensor:
        """One token a row at column `place` (int64 `[1]`) of the caches, which every token before it fills."""
        angles = self.angles(place, x.dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, *angles, cache=(*cache, place))
        return self.norm(x)


# ------------------------------------------------------------------------------------------------------------------
# Candidates: one interface to every model
# ------------------------------------------------------------------------------------------------------------------
class Unsupported(Exception):
    """A model that cannot do what was asked for; the reason becomes the note of a row without numbers."""


class Candidate:
    """A model under measurement: `module`, `hidden(x)`, and, where it decodes, `prefill(x)` and `decoder(...)`."""

    note = ""
    compile_layers = False  # whether first_layers still have to be compiled
    module: nn.Module

    def hidden(self, x: Tensor) -> Tensor:
        return self.module(x)

    def layers(self) -> list[nn.Module]:
        """What torch.compile is applied to, one by one."""
        return []

    def recompute(self, on: bool) -> None:
        raise Unsupported("no gradient checkpointing")

    def prefill(self, x: Tensor):
        raise Unsupported("no prefill with a cache")

    def decoder(self, batch: int, context: int, steps: int, like: Tensor) -> tuple[Callable, Callable]:
        """`(step, rewind)`: one token a row after `context - 1` others, and back to there, every `steps` steps."""
        raise Unsupported("no decoding with a static cache")


class HostCandidate(Candidate):
    """A transformers model."""

    def __init__(self, module: nn.Module):
        self.module = module.train()

    def hidden(self, x: Tensor) -> Tensor:
        return self.module(inputs_embeds=x, use_cache=False).last_hidden_state

    def recompute(self, on: bool) -> None:
        if on:
            # The first is the name since transformers 5.23; both recompute without reentrance.
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


def flash_config(size: Size, causal: bool, backend: str | None, **changes) -> FlashConfig:
    """FLASH of a size, with FlashConfig's own backend for None."""
    if backend is not None:
        changes["backend"] = backend
    return FlashConfig(
        vocab_size=128, hidden_size=size.width, num_hidden_layers=size.layers, query_key_dim=size.query_key_dim,
        chunk_size=size.chunk_size, is_decoder=causal, **changes,
    )  # fmt: skip


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
        # One row is enough: what a step costs does not depend on what the state holds.
        self.module(inputs_embeds=row, use_cache=True, cache=cache)
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        # A state has no longest context, and every step costs the same: nothing to rewind.
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
        # Exactly as many columns as there are tokens, so that no mask is needed: a real cache is slower than this.
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
    """Its layers as its own model has them: with rotary positions, ScaleNorm and token shift."""
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
    # Head widths that are powers of two, which their kernels are tuned for. A Gated DeltaNet layer is wider than a
    # Transformer block, hence 11 of them for 12: equal parameters.
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


def build_llama(size: Size, causal: bool) -> Candidate:
    if not causal:
        raise Unsupported("causal only")
    config = LlamaConfig(
        vocab_size=128, hidden_size=size.width, intermediate_size=size.feed_forward, num_hidden_layers=size.blocks,
        num_attention_heads=size.heads, attn_implementation="sdpa", max_position_embeddings=1 << 20,
    )  # fmt: skip
    return LlamaCandidate(LlamaModel(config))


def build_baseline(size: Size, causal: bool) -> Candidate:
    from .baselines import TransformerPPConfig, TransformerPPModel

    config = TransformerPPConfig(
        vocab_size=128, hidden_size=size.width, num_hidden_layers=size.blocks, num_attention_heads=size.heads,
        intermediate_size=size.feed_forward, is_decoder=causal,
    )  # fmt: skip
    candidate = HostCandidate(TransformerPPModel(config))
    candidate.layers = lambda: list(candidate.module.layers)
    return candidate


class Model(NamedTuple):
    """How a model is made, and whether its layers are compiled one by one on a GPU."""

    build: Callable[[Size, bool, str], Candidate]
    compiled: bool = False


def _flash(backend: str, **changes) -> Callable[[Size, bool, str], Candidate]:
    def build(size: Size, causal: bool, device: str) -> Candidate:
        # On a GPU nothing may fall back in silence; elsewhere there are no kernels.
        chosen = backend if device == "cuda" else "torch"
        return FlashCandidate(flash_config(size, causal, chosen, **changes))

    return build


MODELS = {
    "flash": Model(_flash("triton")),
    "flash-compiled": Model(_flash("triton"), compiled=True),
    "flash-torch": Model(_flash("torch"), compiled=True),
    # A bias by rotation: the Toeplitz one would be bound to max_position_embeddings.
    "flash-quad": Model(_flash("torch", attention_type="quadratic", relative_bias="rotary"), compiled=True),
    "transformer++": Model(lambda size, causal, device: LeanCandidate(size, causal), compiled=True),
    "transformer++-baseline": Model(lambda size, causal, device: build_baseline(size, causal), compiled=True),
    "llama": Model(lambda size, causal, device: build_llama(size, causal)),
    "flash-pytorch": Model(lambda size, causal, device: build_flash_pytorch(size, causal)),
    "flash-pytorch-full": Model(lambda size, causal, device: build_flash_pytorch_full(size, causal)),
    "gla": Model(lambda size, causal, device: build_fla("gla", size, causal)),
    "gated-deltanet": Model(lambda size, causal, device: build_fla("gated-deltanet", size, causal)),
}


def build(name: str, size: Size, causal: bool, device: str, dtype: torch.dtype, *, compile: bool = True) -> Candidate:
    """A model on its device, its layers compiled one by one (on a GPU) if it is one of those.

    Raises:
        Unsupported: its package is missing, or it has no such direction.
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


def parameter_count(module: nn.Module) -> int:
    """Parameters without the embedding, which no measurement uses."""
    return sum(p.numel() for name, p in module.named_parameters() if "embed" not in name)


# ------------------------------------------------------------------------------------------------------------------
# Timing
# ------------------------------------------------------------------------------------------------------------------
class Timing(NamedTuple):
    """Milliseconds of one call: median, first and third quartile."""

    median: float
    q25: float
    q75: float
    samples: int


def quartiles(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q25, q75, len(samples))


def once(call: Callable, device: str, calls: int = 1) -> float:
    """Milliseconds of one call, by events on a GPU, the mean of `calls` in a row."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) * 1e3 / calls


def measure(
    call: Callable, device: str, *, reps: int, warmup: int = 2, calls: int = 1, before: Callable = lambda: None,
    limit_s: float = 20.0,
) -> Timing:  # fmt: skip
    """Time `call` after warming it up: `reps` samples, fewer (at least 2) once they have taken `limit_s` seconds.

    Args:
        calls: calls in a row that make one sample, for what is too short to time alone.
        before: run before every sample, outside of the time.
    """
    for _ in range(warmup):
        before()
        for _ in range(calls):
            call()
    if device == "cuda":
        torch.cuda.synchronize()
    samples, begin = [], time.perf_counter()
    while len(samples) < reps and (len(samples) < 2 or time.perf_counter() - begin < limit_s):
        before()
        samples.append(once(call, device, calls))
    return quartiles(samples)


def clean(device: str) -> None:
    """Free what earlier measurements left behind, and count memory anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def matmul_rate(device: str, dtype: torch.dtype, side: int, reps: int = 20) -> tuple[Timing, float]:
    """Time of a `side`^3 matrix product of random numbers, and operations a second: what MFU is a share of."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = measure(lambda: a @ b, device, reps=reps, warmup=3)
    return timing, 2 * side**3 / (timing.median * 1e-3)


def copy_rate(device: str, size: int, reps: int = 20) -> tuple[Timing, float]:
    """Time of copying `size` bytes on the device, and bytes read and written a second."""
    source = torch.randint(0, 256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, reps=reps, warmup=3)
    return timing, 2 * size / (timing.median * 1e-3)


def training_step(module: nn.Module, hidden: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable:
    """Forward and backward of the backbone, the input's gradient too (below is an embedding)."""

    def step():
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        hidden(x).backward(gradient)

    return step


def capture(step: Callable, rewind: Callable) -> Callable:
    """`step` as one CUDA graph, to be replayed: no launch costs, and the same buffers every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    rewind()
    return graph.replay


def first_layers(candidate: Candidate, layers: int, x: Tensor) -> tuple[nn.ModuleList, Callable[[Tensor], Tensor]]:
    """A candidate's first layers alone, and their forward with the arguments that its model gives them for `x`."""
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


# ------------------------------------------------------------------------------------------------------------------
# The gate: no number before the fast path is right
# ------------------------------------------------------------------------------------------------------------------
class Check(NamedTuple):
    """One comparison: `error` may be at most `limit`."""

    what: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@torch.no_grad()
def enlarge(model: nn.Module, seed: int = 1) -> None:
    """Draw all parameters so large that every part of a layer shows in the result, biases and gains included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("norm.weight", "positions.scale")):
            noise = 1 + 0.3 * noise
        elif name.endswith("offset_scale.weight"):
            noise = noise + 0.5
        else:
            # Unit variance in, unit variance out; vectors (biases b and of projections) keep 0.3.
            noise = noise * (parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3)
        parameter.copy_(noise)


def results(model: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of a model on embeddings, in float64 on the CPU."""
    x = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(inputs_embeds=x, use_cache=False).last_hidden_state
    out.backward(gradient.to(out.dtype))
    found = {"output": out, "gradient of the input": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return {name: value.detach().double().cpu() for name, value in found.items()}


def check_kernels(size: Size, device: str, length: int, batch: int = 2) -> list[Check]:
    """The `"triton"` backend against the torch tier in float64: output, every gradient, and decoding.

    float32: an error ratio of at most 1e-3. bfloat16: at most twice the torch tier's own in bfloat16, plus 1e-3.
    """
    checks = []
    for causal in (True, False):
        direction = "causal" if causal else "bidirectional"
        # A divisor below the paper's: scores of the size of the bias, so that a wrong query or key shows.
        config = {
            backend: flash_config(size, causal, backend, attention_divisor=16) for backend in ("triton", "torch")
        }
        exact = FlashModel(config["torch"]).double().to(device).train()
        enlarge(exact)
        generator = torch.Generator().manual_seed(2)
        x, gradient = (torch.randn(batch, length, size.width, generator=generator).to(device) for _ in range(2))

        def run(backend, dtype, config=config, exact=exact, x=x, gradient=gradient):
            model = FlashModel(config[backend]).to(device, dtype).train()
            model.load_state_dict(exact.state_dict())
            return results(model, x, gradient)

        for dtype in (torch.float32, torch.bfloat16):
            # Both see the weights and inputs that this type can hold.
            rounded = {name: value.to(dtype).double() for name, value in exact.state_dict().items()}
            exact.load_state_dict(rounded)
            expected = results(exact, x.to(dtype).double(), gradient.to(dtype).double())
            ours = run("triton", dtype)
            plain = run("torch", dtype) if dtype == torch.bfloat16 else None
            for name, value in expected.items():
                limit = 1e-3 if plain is None else 2 * error_ratio(plain[name], value) + 1e-3
                checks.append(Check(f"{direction} {dtype} {name}", error_ratio(ours[name], value), limit))
        if causal:
            checks.append(check_decoding(config["triton"], exact, x))
    return checks


@torch.no_grad()
def check_decoding(config: FlashConfig, exact: nn.Module, x: Tensor) -> Check:
    """Prefill, then steps over a chunk's end with a static cache, against the whole in float64."""
    model = FlashModel(config).to(x.device, torch.float32).eval()
    model.load_state_dict(exact.state_dict())
    expected = exact.eval()(inputs_embeds=x.double(), use_cache=False).last_hidden_state
    chunk, length = config.chunk_size, x.shape[1]
    first = length // chunk * chunk - 3
    cache = StaticCache(config=config, max_cache_len=length)
    found = [model(inputs_embeds=x[:, :first], cache=cache, use_cache=True).last_hidden_state]
    for t in range(first, min(first + 8, length)):
        found.append(model(inputs_embeds=x[:, t : t + 1], cache=cache, use_cache=True).last_hidden_state)
    found = torch.cat(found, 1)
    return Check("decoding, static cache", error_ratio(found[:, first:], expected[:, first : found.shape[1]]), 1e-3)


def check_torch_tier() -> list[Check]:
    """The torch tier against naive.py, in float64 and float32: output and every gradient (there are no kernels)."""
    checks = []
    for causal in (True, False):
        config = tiny_config(is_decoder=causal)
        ids = random_ids(config, 1, 3 * config.chunk_size + 3)
        for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
            model = make_model(FlashModel, config, dtype=dtype)
            weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
            expected, _ = naive_model(ids[0], weights, naive_config(config), causal=causal)
            gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            expected.backward(gradient)
            out = model(ids, use_cache=False).last_hidden_state[0]
            out.backward(gradient.to(dtype))
            direction = "causal" if causal else "bidirectional"
            checks.append(Check(f"{direction} {dtype} output", error_ratio(out, expected), limit))
            for name, parameter in model.named_parameters():
                error = error_ratio(parameter.grad, weights[name].grad)
                checks.append(Check(f"{direction} {dtype} gradient of {name}", error, limit))
    return checks


def gate(device: str, size: Size = BASE) -> list[Check]:
    """All comparisons that must hold before anything is timed: kernels against torch on a GPU, torch against naive."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        checks = check_torch_tier()
        if device == "cuda":
            two_layers = dataclasses.replace(size, layers=2)
            # Neither a multiple of the chunk nor of a power of two.
            checks += check_kernels(two_layers, device, 3 * size.chunk_size + 37)
        return checks
    finally:
        torch.set_float32_matmul_precision(before)


__all__ = [
    "BASE", "MODELS", "SMALL", "SMOKE", "Candidate", "Check", "LeanTransformer", "Size", "Timing", "Unsupported",
    "build", "capture", "clean", "copy_rate", "first_layers", "flash_flops", "gate", "matmul_rate", "measure",
    "model_flops", "parameter_count", "peak_gib", "quartiles", "training_step", "transformer_flops", "utilisation",
]  # fmt: skip
