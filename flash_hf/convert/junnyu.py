# SPDX-License-Identifier: Apache-2.0
"""JunnYu's ports, FLASH and FLASHQuad."""

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
    lucidrains_layers,
)


def convert_junnyu_flash(
    state: Mapping[str, Tensor],
    *,
    settings: Mapping | None = None,
    padded_length: int | None = 512,
    encoder_only: bool = False,
) -> Converted:
    """Convert JunnYu's FLASH (`flash.*`), such as flash_small_wwm_cluecorpussmall and flash_base_wwm_cluecorpussmall.

    Args:
        state: `model.state_dict()` of FLASHForMaskedLM; with `encoder_only` also of FLASHModel, under `flash.`.
        settings: contents of the checkpoint's `config.json`; without it `group_size` is 256, `layer_norm_eps` 1e-5.
        padded_length: length in tokens that inputs of the original are padded to. The original divides its global sum
            by this length, and the public checkpoints were trained with 512: a text of any length then gets what the
            original returns for it padded to 512. None divides by the number of real tokens instead, as the original
            does without padding.
        encoder_only: convert embeddings and layers to a FlashModel, without the masked-LM head.

    Returns:
        A FlashForMaskedLM with the original's logits, or a FlashModel.

    Raises:
        ValueError: a tensor is missing or unexpected, or `padded_length` is below 1.
    """
    settings = settings or {}
    if padded_length is not None and padded_length < 1:
        raise ValueError(f"`padded_length` must be at least 1, or None, got {padded_length!r}.")
    source = Source(state, "junnyu_flash")
    base = "" if encoder_only else "model."
    tensors, inferred = lucidrains_layers(source, "flash.encoder.layers.", base, ("weight", "bias"))
    D = inferred["hidden_size"]
    chunk_size = settings.get("group_size", GROUP_SIZE)
    if padded_length is not None:
        for name in tensors:
            if name.endswith(("offset_scale.weight", "offset_scale.bias")):
                tensors[name][2] *= chunk_size / padded_length  # lin_q
    embedding_VD = source.take("flash.embeddings.word_embeddings.weight", None, D)
    tensors[f"{base}embed_tokens.weight"] = embedding_VD
    tensors[f"{base}embed_positions.scale"] = source.take("flash.embeddings.scale", 1).reshape(())
    source.drop("flash.embeddings.position_ids", "flash.embeddings.scaledsin_embeddings")
    known = {
        **inferred,
        "vocab_size": len(embedding_VD),
        "chunk_size": chunk_size,
        "attention_divisor": chunk_size,
        "global_normalization": "mean" if padded_length is None else "chunk",
        "max_position_embeddings": settings.get("max_position_embeddings", 512),
        "pad_token_id": settings.get("pad_token_id", 0),
    }
    notes = (CLAMP_NOTE,) if inferred["norm_type"] == "scale_norm" else ()
    if padded_length is not None:
        notes += (f"The global sum is divided by {padded_length}, as for inputs padded to that length.",)
    if encoder_only:
        source.drop(*[name for name in source.left if name.startswith("cls.")])
        source.finish()
        tensors |= identity_norm(inferred, base, embedding_VD.dtype)
        return Converted(FlashConfig(**known), tensors, "FlashModel", (*notes, ENCODER_NOTE))
    head = "cls.predictions."
    V = len(embedding_VD)
    tensors |= fold_decoder(
        source.take(f"{head}decoder.weight", V, D), source.take(f"{head}decoder.bias", V),
        source.take(f"{head}LayerNorm.weight", D), source.take(f"{head}LayerNorm.bias", D),
    )  # fmt: skip
    source.finish()
    final_norm = final_layer_norm(inferred, settings.get("layer_norm_eps", LAYER_NORM_EPS))
    config = FlashConfig(**known, **final_norm, tie_word_embeddings=False)
    return Converted(config, tensors, "FlashForMaskedLM", notes)


def convert_junnyu_flash_quad(state: Mapping[str, Tensor], *, settings: Mapping | None = None) -> Converted:
    """Convert JunnYu's FLASHQuad (`flash_quad.*`), such as flashquad_small_wwm_cluecorpussmall.

    Args:
        state: `model.state_dict()` of FLASHQuadForMaskedLM.
        settings: contents of the checkpoint's `config.json`; without it `layer_norm_eps` is 1e-5, `hidden_act` silu.

    Returns:
        A FlashForMaskedLM with the original's logits for token type 0.

    Raises:
        ValueError: a tensor is missing or unexpected.
    """
    settings = settings or {}
    source = Source(state, "junnyu_flash_quad")
    count = source.layers("flash_quad.encoder.layer.")
    embeddings = "flash_quad.embeddings."
    words_VD = source.take(f"{embeddings}word_embeddings.weight", None, None)
    V, D = words_VD.shape
    # Token type 0 is added to every embedding here; the decoder's weight stays as it is.
    types_TD = source.take(f"{embeddings}token_type_embeddings.weight", None, D)
    tensors = {
        "model.embed_tokens.weight": words_VD + types_TD[0],
        "model.embed_positions.scale": source.take(f"{embeddings}scaledsin_scalar", 1).reshape(()),
    }
    source.drop(f"{embeddings}position_ids", f"{embeddings}scaledsin_embeddings")

    def take_norm(theirs: str, ours: str) -> None:
        if f"{theirs}.scala" in source:
            tensors[f"{ours}.weight"] = source.take(f"{theirs}.scala", 1).reshape(())
        else:
            tensors[f"{ours}.weight"] = source.take(f"{theirs}.weight", D)
            tensors[f"{ours}.bias"] = source.take(f"{theirs}.bias", D)

    layer_norm = f"{embeddings}LayerNorm.weight" in source
    take_norm(f"{embeddings}LayerNorm", "model.embed_norm")
    span = None
    for i in range(count):
        theirs, ours = f"flash_quad.encoder.layer.{i}.", f"model.layers.{i}."
        scale_2S = source.take(f"{theirs}weight", 2, None)
        S = scale_2S.shape[1]
        weight, bias = source.take(f"{theirs}uv.weight", None, D), source.take(f"{theirs}uv.bias", None)
        E = (len(weight) - S) // 2
        w_R = source.take(f"{theirs}w", None)
        if span not in (None, (len(w_R) + 1) // 2):
            raise ValueError(f"state: `{theirs}w` must be as long as in layer 0 ({2 * span - 1}), got {len(w_R)}.")
        span = (len(w_R) + 1) // 2
        rotary_2S = torch.cat([source.take(f"{theirs}a", 1, S), source.take(f"{theirs}b", 1, S)])
        for name, tensor in (("weight", weight), ("bias", bias)):
            for short, part in zip("uvz", tensor.split([E, E, S]), strict=True):
                tensors[f"{ours}gau.{short}_proj.{name}"] = part
        tensors[f"{ours}gau.o_proj.weight"] = source.take(f"{theirs}o.weight", D, E)
        tensors[f"{ours}gau.o_proj.bias"] = source.take(f"{theirs}o.bias", D)
        tensors[f"{ours}gau.offset_scale.weight"] = scale_2S
        tensors[f"{ours}gau.offset_scale.bias"] = source.take(f"{theirs}bias", 2, S)
        # As the original does: one weight per offset up to 512 tokens, beyond that two rotated vectors.
        tensors[f"{ours}gau.relative_bias.weight"] = w_R if span <= 512 else rotary_2S
        take_norm(f"{theirs}LayerNorm", f"{ours}norm")
    head = "cls.predictions."
    tensors["lm_head.weight"] = source.take(f"{head}decoder.weight", V, D)
    # One parameter under two names; some versions of transformers save the first only.
    biases = [source.take(name, V) for name in (f"{head}bias", f"{head}decoder.bias") if name in source]
    if not biases or not torch.equal(biases[0], biases[-1]):
        raise ValueError(
            f"state: `{head}bias` and `{head}decoder.bias` must be the same (or one of them missing). Keep the one "
            "that the original code loads last."
        )
    tensors["lm_head.bias"] = biases[0]
    tensors["transform.dense.weight"] = source.take(f"{head}transform.dense.weight", D, D)
    tensors["transform.dense.bias"] = source.take(f"{head}transform.dense.bias", D)
    take_norm(f"{head}transform.LayerNorm", "transform.norm")
    source.finish()
    config = FlashConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=count,
        expansion_factor=E / D,
        query_key_dim=S,
        attention_type="quadratic",
        relative_bias="toeplitz" if span <= 512 else "rotary",
        max_position_embeddings=span,
        attention_divisor=span,  # the length in training, for inputs of any length
        norm_type="layer_norm" if layer_norm else "scale_norm",
        norm_eps=settings.get("layer_norm_eps", LAYER_NORM_EPS),
        hidden_act=settings.get("hidden_act", "silu"),
        pad_token_id=settings.get("pad_token_id", 0),
        tie_word_embeddings=False,
        embedding_norm=True,
        final_norm_type="none",
        mlm_transform=True,
        lm_head_bias=True,
    )
    note = "Inputs of token type 0 only; the other types are dropped."
    return Converted(config, tensors, "FlashForMaskedLM", (note,))
