# SPDX-License-Identifier: Apache-2.0
"""FLASH-pytorch (lucidrains)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..configuration_flash import FlashConfig
from .parts import (
    CLAMP_NOTE,
    ENCODER_NOTE,
    GROUP_SIZE,
    LAYER_NORM_EPS,
    Converted,
    Source,
    final_layer_norm,
    fold_decoder,
    identity_norm,
    lucidrains_layer,
    lucidrains_layers,
)


MASK_NOTE = (
    "Under a padding mask FLASH-pytorch divides the global sum by the padded length, FLASH by the number of real "
    "tokens. Without padding the two agree."
)


def constructor_fields(
    kind: str,
    causal: bool | None,
    shift_tokens: bool | None,
    group_size: int,
    laplace_attn_fn: bool,
    reduce_group_non_causal_attn: bool,
) -> dict:
    """Configuration fields for arguments of the original constructor. ValueError if one is missing, or no FlashConfig
    can express it."""
    if causal is None:
        raise ValueError(
            f"`causal` must be given for {kind!r}, got None. Pass True (--causal) or False (--no-causal)."
        )
    if shift_tokens is None:
        raise ValueError(
            f"`shift_tokens` must be given for {kind!r}: pass what the original was built with (--shift or "
            "--no-shift), by default True for FLASHTransformer and False for FLASH."
        )
    if shift_tokens:
        raise ValueError(
            f"`shift_tokens` must be False for {kind!r}, got {shift_tokens!r}: FlashConfig has no token shift (half "
            "of the normalized channels come from the previous token). Train the original with shift_tokens=False."
        )
    if not causal and not reduce_group_non_causal_attn:
        raise ValueError(
            f"`reduce_group_non_causal_attn` must be True for a bidirectional {kind!r}, got "
            f"{reduce_group_non_causal_attn!r}: the linear part of a group then sees its own group only, divided by "
            "the full length, which no FlashConfig does. Train the original with reduce_group_non_causal_attn=True."
        )
    return {
        "chunk_size": group_size,
        "attention_divisor": group_size,
        "attention_activation": "laplace" if laplace_attn_fn else "relu2",
        # If causal, the original divides the sum over earlier groups by the group size alone.
        "global_normalization": "chunk" if causal else "mean",
        "is_decoder": causal,
    }


def convert_lucidrains_transformer(
    state: Mapping[str, Tensor],
    *,
    causal: bool | None = None,
    shift_tokens: bool | None = None,
    group_size: int = GROUP_SIZE,
    laplace_attn_fn: bool = False,
    reduce_group_non_causal_attn: bool = True,
    encoder_only: bool = False,
) -> Converted:
    """Convert `FLASHTransformer`, bare or in its `AutoregressiveWrapper`.

    Args:
        state: `model.state_dict()`.
        causal, shift_tokens, group_size, laplace_attn_fn, reduce_group_non_causal_attn: what the original was built
            with.
        encoder_only: convert embeddings and layers to a FlashModel, without the final norm and the logits.

    Returns:
        A FlashForCausalLM or FlashForMaskedLM with the original's logits, or a FlashModel.

    Raises:
        ValueError: an argument is missing, or FlashConfig cannot express the model.
    """
    kind = "lucidrains_transformer"
    fields = constructor_fields(kind, causal, shift_tokens, group_size, laplace_attn_fn, reduce_group_non_causal_attn)
    source = Source({name.removeprefix("net."): tensor for name, tensor in state.items()}, kind)
    base = "" if encoder_only else "model."
    tensors, inferred = lucidrains_layers(source, "layers.", base, ("gamma", "beta"))
    D = inferred["hidden_size"]
    embedding_VD = source.take("token_emb.weight", None, D)
    V = len(embedding_VD)
    tensors[f"{base}embed_tokens.weight"] = embedding_VD
    tensors[f"{base}embed_positions.scale"] = source.take("abs_pos_emb.scale", 1).reshape(())
    check_sinusoid(source.take("abs_pos_emb.inv_freq", D // 2))
    gain, shift = source.take("to_logits.0.weight", D), source.take("to_logits.0.bias", D)
    decoder, bias = source.take("to_logits.1.weight", V, D), source.take("to_logits.1.bias", V)
    source.finish()
    fields = {**inferred, **fields, "vocab_size": V, "tie_word_embeddings": False}
    notes = (() if causal else (MASK_NOTE,)) + ((CLAMP_NOTE,) if inferred["norm_type"] == "scale_norm" else ())
    if encoder_only:
        tensors |= identity_norm(inferred, base, embedding_VD.dtype)
        return Converted(FlashConfig(**fields), tensors, "FlashModel", (*notes, ENCODER_NOTE))
    tensors |= fold_decoder(decoder, bias, gain, shift)
    config = FlashConfig(**fields, **final_layer_norm(inferred, LAYER_NORM_EPS))
    return Converted(config, tensors, "FlashForCausalLM" if causal else "FlashForMaskedLM", notes)


def convert_lucidrains_layer(
    state: Mapping[str, Tensor],
    *,
    causal: bool | None = None,
    shift_tokens: bool | None = None,
    group_size: int = GROUP_SIZE,
    laplace_attn_fn: bool = False,
    reduce_group_non_causal_attn: bool = True,
) -> Converted:
    """Convert one `FLASH` module to a FlashModel of one layer, without positions at the input and with a vocabulary
    of 1, to be called with `inputs_embeds`. For the arguments see [`convert_lucidrains_transformer`]."""
    kind = "lucidrains_layer"
    fields = constructor_fields(kind, causal, shift_tokens, group_size, laplace_attn_fn, reduce_group_non_causal_attn)
    source = Source(state, kind)
    tensors, inferred = lucidrains_layer(source, "", "layers.0.", ("gamma", "beta"))
    source.finish()
    dtype = tensors["layers.0.gau.o_proj.bias"].dtype
    tensors |= identity_norm(inferred, "", dtype)
    tensors["embed_tokens.weight"] = torch.zeros(1, inferred["hidden_size"], dtype=dtype)
    config = FlashConfig(**inferred, **fields, num_hidden_layers=1, vocab_size=1, use_scaled_sinusoid=False)
    notes = () if causal else (MASK_NOTE,)
    return Converted(config, tensors, "FlashModel", (*notes, ENCODER_NOTE))


def check_sinusoid(inv_freq: Tensor) -> None:
    """Raise ValueError unless the stored frequencies `[D / 2]` are those of the scaled sinusoid."""
    half = len(inv_freq)
    if not torch.allclose(inv_freq.double(), 10000.0 ** (-torch.arange(half).double() / half), rtol=1e-3, atol=0):
        raise ValueError(
            "state: `abs_pos_emb.inv_freq` must be 10000^(-2i/D), got others, for which FlashConfig has no field."
        )
