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
    build_config,
    final_layer_norm,
    fold_decoder,
    identity_norm,
    lucidrains_layer,
    lucidrains_layers,
    tell,
)


MASK_NOTE = (
    "Under a padding mask FLASH-pytorch divides the global sum by the padded length; here it is the number of real "
    "tokens, as it is for the original without padding."
)


def refuse_lucidrains_options(kind: str, causal, shift_tokens, reduce_group_non_causal_attn) -> None:
    """Raise ValueError for options of the original that cannot be expressed, or that were not told."""
    tell("causal", causal, kind, "whether it was built with causal=True. Pass True (--causal) or False (--no-causal)")
    tell(
        "shift_tokens", shift_tokens, kind,
        "whether it was built with shift_tokens (FLASHTransformer's default is True, FLASH's is False). Pass what its "
        "constructor got (--shift or --no-shift)",
    )  # fmt: skip
    if shift_tokens:
        raise ValueError(
            f"`shift_tokens` must be False for {kind!r}, got {shift_tokens!r}: FlashConfig has no token shift (half "
            "of the normalised channels come from the token before), and no weights make up for it. Train the "
            "original with shift_tokens=False."
        )
    if not causal and not reduce_group_non_causal_attn:
        raise ValueError(
            f"`reduce_group_non_causal_attn` must be True for a bidirectional {kind!r}, got "
            f"{reduce_group_non_causal_attn!r}: its linear part then sees its own group only, divided by the whole "
            "length, which no FlashConfig does. Train the original with reduce_group_non_causal_attn=True."
        )


def lucidrains_fields(causal: bool, group_size: int, laplace_attn_fn: bool) -> dict:
    """Configuration fields that the caller tells."""
    return {
        "chunk_size": group_size,
        "attention_divisor": group_size,
        "attention_activation": "laplace" if laplace_attn_fn else "relu2",
        # Causal, the original's sum over earlier groups is divided by the group's size alone.
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
    """`FLASHTransformer` of FLASH-pytorch, bare or in its `AutoregressiveWrapper`.

    Args:
        state: `model.state_dict()`.
        causal, shift_tokens, group_size, laplace_attn_fn, reduce_group_non_causal_attn: as the original was built.
        encoder_only: convert embeddings and layers to a FlashModel, without the final norm and the logits.

    Returns:
        A FlashForCausalLM or FlashForMaskedLM with the original's logits, or a FlashModel.

    Raises:
        ValueError: the original was built with an option that cannot be expressed, or an argument is missing.
    """
    kind = "lucidrains_transformer"
    refuse_lucidrains_options(kind, causal, shift_tokens, reduce_group_non_causal_attn)
    source = Source({name.removeprefix("net."): tensor for name, tensor in state.items()}, kind)
    base = "" if encoder_only else "model."
    tensors, told = lucidrains_layers(source, "layers.", base, ("gamma", "beta"))
    D = told["hidden_size"]
    embedding_VD = source.take("token_emb.weight", None, D)
    tensors[f"{base}embed_tokens.weight"] = embedding_VD
    tensors[f"{base}embed_positions.scale"] = source.take("abs_pos_emb.scale", 1).reshape(())
    check_sinusoid(source.take("abs_pos_emb.inv_freq", D // 2))
    gain, shift = source.take("to_logits.0.weight", D), source.take("to_logits.0.bias", D)
    decoder = source.take("to_logits.1.weight", len(embedding_VD), D)
    bias = source.take("to_logits.1.bias", len(embedding_VD))
    source.finish()
    known = {
        **told, **lucidrains_fields(causal, group_size, laplace_attn_fn),
        "vocab_size": len(embedding_VD), "tie_word_embeddings": False,
    }  # fmt: skip
    notes = () if causal else (MASK_NOTE,)
    if told["norm_type"] == "scale_norm":
        notes += (CLAMP_NOTE,)
    if encoder_only:
        tensors |= identity_norm(told, base, embedding_VD.dtype)
        return Converted(FlashConfig(**known), tensors, "FlashModel", (*notes, ENCODER_NOTE))
    tensors |= fold_decoder(decoder, bias, gain, shift)
    needed = final_layer_norm(LAYER_NORM_EPS) if told["norm_type"] == "scale_norm" else {}
    config = build_config(
        kind, known, needed, "Pass encoder_only=True (--encoder_only) for embeddings and layers without the logits, "
        "or train the original with norm_type='layernorm'.",
    )  # fmt: skip
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
    """One `FLASH` module of FLASH-pytorch as a FlashModel of one layer, to be fed `inputs_embeds`.

    Args:
        state: `layer.state_dict()`.
        causal, shift_tokens, group_size, laplace_attn_fn, reduce_group_non_causal_attn: as the original was built.

    Returns:
        A FlashModel without positions at the input, of a vocabulary of 1; its layer computes what the original does.

    Raises:
        ValueError: as for `convert_lucidrains_transformer`.
    """
    kind = "lucidrains_layer"
    refuse_lucidrains_options(kind, causal, shift_tokens, reduce_group_non_causal_attn)
    source = Source(state, kind)
    tensors, told = lucidrains_layer(source, "", "layers.0.", ("gamma", "beta"))
    source.finish()
    dtype = tensors["layers.0.gau.o_proj.bias"].dtype
    tensors |= identity_norm(told, "", dtype)
    tensors["embed_tokens.weight"] = torch.zeros(1, told["hidden_size"], dtype=dtype)
    config = FlashConfig(
        **told, **lucidrains_fields(causal, group_size, laplace_attn_fn),
        num_hidden_layers=1, vocab_size=1, use_scaled_sinusoid=False,
    )  # fmt: skip
    notes = () if causal else (MASK_NOTE,)
    return Converted(config, tensors, "FlashModel", (*notes, ENCODER_NOTE))


def convert_lucidrains_gau(state: Mapping[str, Tensor], **options) -> Converted:
    """Refuses `GAU` of FLASH-pytorch.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "kind: 'lucidrains_gau' (the standalone GAU of FLASH-pytorch) cannot be converted exactly: it divides its "
        "scores, bias included, by the length of the input, so that it is another function at every length, while "
        "`attention_divisor` is a constant. Convert FLASH or FLASHTransformer modules instead."
    )


def check_sinusoid(inv_freq: Tensor) -> None:
    """Raise ValueError unless the stored frequencies `[D / 2]` are those of the sinusoid."""
    half = len(inv_freq)
    if not torch.allclose(inv_freq.double(), 10000.0 ** (-torch.arange(half).double() / half), rtol=1e-3, atol=0):
        raise ValueError("state: `abs_pos_emb.inv_freq` must be 10000^(-2i/D), got others: FlashConfig has no field.")
