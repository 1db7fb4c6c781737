# SPDX-License-Identifier: Apache-2.0
"""FLASH-pytorch (lucidrains)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..configuration_flash import FlashConfig
from .parts import (
    CLAMP_NOTE,
    GROUP_SIZE,
    LAYER_NORM_EPS,
    Converted,
    Source,
    final_layer_norm,
    fold_decoder,
    lucidrains_layers,
)


MASK_NOTE = (
    "Under a padding mask FLASH-pytorch divides the global sum by the padded length, FLASH by the number of real "
    "tokens. Without padding the two agree."
)


def constructor_fields(
    causal: bool | None, shift: bool | None, chunk_size: int, laplace: bool, separate_groups: bool
) -> dict:
    """Configuration fields for arguments of the original constructor. ValueError if one is missing, or no FlashConfig
    can express it."""
    if causal is None or shift is None:
        raise ValueError(
            "FLASH-pytorch checkpoints do not store how they were built: give --causal or --no-causal, and --shift or "
            "--no-shift (shift_tokens is True by default in FLASHTransformer, False in FLASH)."
        )
    if shift:
        raise ValueError(
            "Only models built with shift_tokens=False (--no-shift) can be converted: FlashConfig has no token shift "
            "(half of the normalized channels come from the previous token)."
        )
    if separate_groups and not causal:
        raise ValueError(
            "--separate_groups (reduce_group_non_causal_attn=False) is for causal models: in a bidirectional one the "
            "linear part of a group then sees its own group only, for which FlashConfig has no field."
        )
    return {
        "chunk_size": chunk_size,
        "attention_divisor": chunk_size,
        "attention_activation": "laplace" if laplace else "relu2",
        # If causal, the original divides the sum over earlier groups by the group size alone.
        "global_normalization": "chunk" if causal else "mean",
        "is_decoder": causal,
    }


def convert_lucidrains(
    state: Mapping[str, Tensor],
    *,
    causal: bool | None = None,
    shift: bool | None = None,
    chunk_size: int = GROUP_SIZE,
    laplace: bool = False,
    separate_groups: bool = False,
    encoder_only: bool = False,
) -> Converted:
    """Convert a `FLASHTransformer`, bare or in its `AutoregressiveWrapper`, or a single `FLASH` module.

    Args:
        state: `model.state_dict()`.
        causal, shift, chunk_size, laplace, separate_groups: what the original was built with: `causal`,
            `shift_tokens`, `group_size`, `laplace_attn_fn`, and the opposite of `reduce_group_non_causal_attn`.
        encoder_only: convert embeddings and layers to a FlashModel, without the final norm and the logits.

    Returns:
        A FlashForCausalLM or FlashForMaskedLM with the original's logits, or a FlashModel. That of a single module
        has one layer, no positions at the input and a vocabulary of 1, to be called with `inputs_embeds`.

    Raises:
        ValueError: an argument is missing, or FlashConfig cannot express the model.
    """
    fields = constructor_fields(causal, shift, chunk_size, laplace, separate_groups)
    state = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    single = "token_emb.weight" not in state
    source = Source({f"layers.0.{name}": tensor for name, tensor in state.items()} if single else state, "lucidrains")
    base = "" if single or encoder_only else "model."
    tensors, inferred = lucidrains_layers(source, "layers.", base, ("gamma", "beta"))
    notes = (() if causal else (MASK_NOTE,)) + ((CLAMP_NOTE,) if inferred["norm_type"] == "scale_norm" else ())
    if single:
        embedding_VD = torch.zeros(1, inferred["hidden_size"], dtype=tensors["layers.0.gau.o_proj.bias"].dtype)
        fields["use_scaled_sinusoid"] = False
    else:
        embedding_VD = source.take("token_emb.weight")
        tensors[f"{base}embed_positions.scale"] = source.take("abs_pos_emb.scale").reshape(())
        source.drop("abs_pos_emb.inv_freq")  # always 10000^(-2i/D)
        decoder = [source.take(f"to_logits.{name}") for name in ("1.weight", "1.bias", "0.weight", "0.bias")]
    source.finish()
    tensors[f"{base}embed_tokens.weight"] = embedding_VD
    fields = {**inferred, **fields, "vocab_size": len(embedding_VD)}
    if single or encoder_only:
        return Converted(FlashConfig(**fields, final_norm_type="none"), tensors, "FlashModel", notes)
    tensors |= fold_decoder(*decoder)
    config = FlashConfig(**fields, **final_layer_norm(inferred, LAYER_NORM_EPS), tie_word_embeddings=False)
    return Converted(config, tensors, "FlashForCausalLM" if causal else "FlashForMaskedLM", notes)
