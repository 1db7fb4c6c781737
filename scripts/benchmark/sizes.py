# SPDX-License-Identifier: Apache-2.0
"""Sizes of the models, and their floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass

from flash_hf.configuration_flash import FlashConfig
from flash_hf.training import training_flops


@dataclass(frozen=True)
class Size:
    """One size for all models: two FLASH layers replace one Transformer block; about 85 M parameters by default."""

    width: int = 768
    layers: int = 24
    query_key_dim: int = 128
    chunk_size: int = 256
    heads: int = 12
    feed_forward: int = 2048

    @property
    def blocks(self) -> int:
        return self.layers // 2


BASE = Size()
# Size m of the study: on a fast GPU Python takes longer than the kernels.
LITTLE = Size(width=512, layers=12, heads=8, feed_forward=1376)
# A step takes about a second on two cores.
SMALL = Size(width=256, layers=4, heads=4, feed_forward=688)
SMOKE = Size(width=32, layers=2, query_key_dim=16, chunk_size=16, heads=2, feed_forward=88)


def mean_keys(length: int, causal: bool) -> float:
    """Average number of keys visible to a query in a span of `length` (about half of them if causal)."""
    return (length + 1) / 2 if causal else float(length)


def flash_flops(size: Size, context: int, causal: bool, attention_type: str = "mixed_chunk") -> float:
    """Floating-point operations per token of a FLASH forward without a head, see `training_flops`."""
    config = flash_config(size, causal, None, attention_type=attention_type)
    return training_flops(config, context, causal=causal, head=False) / 3


def transformer_flops(size: Size, context: int, causal: bool) -> float:
    """The same for Transformer++ and Llama: per block `8 D^2 + 6 D F` in projections and `4 D keys` in attention."""
    D = size.width
    return size.blocks * (8 * D * D + 6 * D * size.feed_forward + 4 * D * mean_keys(context, causal))


def model_flops(name: str, size: Size, context: int, causal: bool) -> float | None:
    """Operations per token of a forward pass; None for models without a formula here.

    A training step counts as three forward passes, since the backward of a product is two products of its size;
    recomputation is not counted.
    """
    if name == "flash-quad":
        return flash_flops(size, context, causal, "quadratic")
    if name.startswith("flash"):
        return flash_flops(size, context, causal)
    if name.startswith(("transformer++", "llama")):
        return transformer_flops(size, context, causal)
    return None


def utilisation(flops_per_token: float | None, tokens: int, ms: float, peak_flops: float | None) -> float | None:
    """MFU: the model's operations per second over the measured rate of matrix products."""
    if flops_per_token is None or not peak_flops:
        return None
    return flops_per_token * tokens / (ms * 1e-3) / peak_flops


def flash_config(size: Size, causal: bool, backend: str | None, *, plus: bool = False, **changes) -> FlashConfig:
    """A FLASH configuration of a size, FLASH+ with `plus`; `backend=None` keeps the default of FlashConfig."""
    if backend is not None:
        changes["backend"] = backend
    options = {
        "vocab_size": 128, "hidden_size": size.width, "num_hidden_layers": size.layers,
        "query_key_dim": size.query_key_dim, "chunk_size": size.chunk_size, "is_decoder": causal,
    }  # fmt: skip
    return (FlashConfig.plus if plus else FlashConfig)(**{**options, **changes})
