# SPDX-License-Identifier: Apache-2.0
"""Shared by the gate and the tests: small seeded models with weights large enough to show a bug."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from flash_hf.configuration_flash import FlashConfig


def tiny_config(**changes) -> FlashConfig:
    """A configuration small enough for O(N^2) references: chunks of 8, three layers of width 24."""
    defaults = {
        "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "query_key_dim": 12, "chunk_size": 8,
        "max_position_embeddings": 128, "t5_num_buckets": 8, "t5_max_distance": 16,
    }  # fmt: skip
    return FlashConfig(**{**defaults, **changes})


def make_model(cls, config: FlashConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 0.3):
    """`cls(config)` in eval mode with every parameter sampled again, biases around 0 and gains around 1.

    At the usual standard deviation of 0.02 scores are so small that wrong attention hardly shows in the output. The
    rotary frequencies are recomputed in float64, so that a float64 model can be compared to 1e-9.
    """
    generator = torch.Generator().manual_seed(seed)
    model = cls(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith("norm.weight") or name.endswith("positions.scale")
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.copy_(noise + 1 if gain else noise)
    base = getattr(model, model.base_model_prefix, model)
    r = config.rotary_dim
    exponents = torch.arange(0, r, 2, dtype=torch.float64) / r
    base.rotary_emb.inv_freq = (config.rope_parameters["rope_theta"] ** -exponents).to(
        torch.promote_types(dtype, torch.float32)
    )
    return model


def random_ids(config: FlashConfig, *shape: int, seed: int = 0) -> Tensor:
    """Token ids, int64 `shape`."""
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def naive_config(config: FlashConfig) -> SimpleNamespace:
    """`config` as naive.py reads it, where missing `rope_parameters` mean no RoPE on queries and keys."""
    values = {**config.to_dict(), "attention_divisor": config.attention_divisor}
    return SimpleNamespace(**{**values, "rope_parameters": config.rope_parameters if config.use_rope else None})


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """`|actual - expected| / |expected|` over all elements; infinite if any element is not finite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


__all__ = ["error_ratio", "make_model", "naive_config", "random_ids", "tiny_config"]
