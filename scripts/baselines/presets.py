# SPDX-License-Identifier: Apache-2.0
"""The paper's baselines by name, and any of them at the size of a given FLASH."""

from typing import Any

import torch

from flash_hf.configuration_flash import FlashConfig, nearest
from flash_hf.modeling_flash import FlashForMaskedLM

from .transformer import TransformerPPConfig, TransformerPPForMaskedLM


TRANSFORMER = {
    "feed_forward": "mlp", "hidden_act": "gelu", "position_embedding": "sinusoidal", "norm_type": "layer_norm",
}  # fmt: skip

# Differences to Transformer++. README.md beside this file maps the paper's figures and tables to these names.
BASELINES: dict[str, dict[str, Any]] = {
    "transformer": TRANSFORMER,
    "transformer-relu": TRANSFORMER | {"hidden_act": "relu"},
    "transformer++": {},
    "performer": {"mixer": "performer"},
    "performer-relu": {"mixer": "performer", "performer_kernel": "relu"},
    "combiner": {"mixer": "combiner", "chunk_size": 128},
    "mc-transformer++": {"mixer": "mixed_chunk"},
    "mhsa-relu2": {"mixer": "relu2"},
    "mhsa-single-head": {"num_attention_heads": 1},
    "mhsa-gated": {"gated_attention": True},
}


def baseline_config(name: str, **changes) -> TransformerPPConfig:
    """The configuration of the baseline `name` (a key of `BASELINES`) with `changes`.

    Raises:
        ValueError: there is no such baseline, or [`TransformerPPConfig`] refuses the changes.
    """
    if name not in BASELINES:
        raise ValueError(
            f"baseline_config: `name` must be one of {', '.join(map(repr, BASELINES))}, got {name!r}."
            f"{nearest(name, [*BASELINES])}"
        )
    return TransformerPPConfig(**(BASELINES[name] | changes))


def matched_config(name: str, flash: FlashConfig, *, tolerance: float = 0.01, **changes) -> TransformerPPConfig:
    """The baseline `name` with as many parameters as a language model of `flash`, to within `tolerance`.

    Width, vocabulary, training length and special tokens are FLASH's, one block replaces two of its layers, and a head
    has 64 dimensions unless the baseline or `changes` differ; the feed-forward width is chosen to match.

    Raises:
        ValueError: no feed-forward width gives that size.
    """
    shared = ("vocab_size", "hidden_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
              "tie_word_embeddings", "initializer_range")  # fmt: skip
    settings = {key: getattr(flash, key) for key in shared}
    settings |= {
        "num_hidden_layers": max(1, flash.num_hidden_layers // 2),
        "num_attention_heads": max(1, flash.hidden_size // 64),
    }
    settings |= BASELINES.get(name, {}) | changes

    def size(model_class, config) -> int:
        with torch.device("meta"):
            return model_class(config).num_parameters()

    def sized(inner: int) -> int:
        return size(TransformerPPForMaskedLM, baseline_config(name, **settings | {"intermediate_size": inner}))

    # The size is linear in the feed-forward width; GPUs are fast at multiples of 8.
    target, small = size(FlashForMaskedLM, flash), sized(8)
    inner = 8 + 8 * round((target - small) / (sized(16) - small))
    if inner < 8 or abs(sized(inner) / target - 1) > tolerance:
        raise ValueError(
            f"matched_config: `name` {name!r} cannot come within {tolerance:.0%} of {target} parameters with "
            f"{settings['num_hidden_layers']} blocks of width {settings['hidden_size']}: intermediate_size would be "
            f"{inner}. Pass another num_hidden_layers."
        )
    return baseline_config(name, **settings | {"intermediate_size": inner})


__all__ = ["BASELINES", "baseline_config", "matched_config"]
