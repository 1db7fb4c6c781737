# SPDX-License-Identifier: Apache-2.0
"""JunnYu's ports, FLASH and FLASHQuad."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..configuration_flash import FlashConfig
from .lucidrains import GROUP_SIZE, JUNNYU_NAMES, LAYER_NORM_EPS, convert_model
from .parts import Converted, Source


def convert_junnyu_flash(
    state: Mapping[str, Tensor],
    *,
    settings: Mapping | None = None,
    padded_length: int = 512,
    encoder_only: bool = False,
) -> Converted:
    """Convert JunnYu's FLASH (`flash.*`), such as flash_small_wwm_cluecorpussmall and flash_base_wwm_cluecorpussmall.

    Args:
        state: `model.state_dict()` of FLASHForMaskedLM; with `encoder_only` also of FLASHModel, under `flash.`.
        settings: contents of the checkpoint's `config.json`; without it `group_size` is 256, `layer_norm_eps` 1e-5.
        padded_length: length in tokens that inputs of the original are padded to. The original divides its global sum
            by this length, and the public checkpoints were trained with 512: a text of any length then gets what the
            original returns for it padded to 512. 0 divides by the number of real tokens instead, as the original
            does without padding.
        encoder_only: convert embeddings and layers to a FlashModel, without the masked-LM head.
    """
    settings = settings or {}
    if padded_length < 0:
        raise ValueError(f"padded_length must be at least 1, or 0 for no padding, got {padded_length}.")
    unused = ("flash.embeddings.position_ids", "flash.embeddings.scaledsin_embeddings", *["cls."] * encoder_only)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    for theirs, ours in JUNNYU_NAMES.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    chunk_size = settings.get("group_size", GROUP_SIZE)
    fields = {
        "chunk_size": chunk_size,
        "attention_divisor": chunk_size,
        "global_normalization": "chunk" if padded_length else "mean",
        "max_position_embeddings": settings.get("max_position_embeddings", 512),
        "pad_token_id": settings.get("pad_token_id", 0),
    }
    eps = settings.get("layer_norm_eps", LAYER_NORM_EPS)
    converted = convert_model(state, "junnyu_flash", fields, encoder_only=encoder_only, eps=eps)
    if not padded_length:
        return converted
    for name, tensor in converted.state_dict.items():
        if "offset_scale" in name:
            tensor[2] *= chunk_size / padded_length  # lin_q
    note = f"The global sum is divided by {padded_length}, as for inputs padded to that length."
    return converted._replace(notes=(*converted.notes, note))


def convert_junnyu_flash_quad(state: Mapping[str, Tensor], *, settings: Mapping | None = None) -> Converted:
    """Convert JunnYu's FLASHQuad (`flash_quad.*`), such as flashquad_small_wwm_cluecorpussmall.

    Args:
        state: `model.state_dict()` of FLASHQuadForMaskedLM.
        settings: contents of the checkpoint's `config.json`; without it `layer_norm_eps` is 1e-5, `hidden_act` silu.
    """
    settings = settings or {}
    source = Source(state, "junnyu_flash_quad")
    count, layer_norm = source.layers("flash_quad.encoder.layer."), "flash_quad.embeddings.LayerNorm.weight" in source
    embeddings, head = "flash_quad.embeddings.", "cls.predictions."
    words_VD = source.take(f"{embeddings}word_embeddings.weight")
    V, D = words_VD.shape
    tensors = {
        # Token type 0 is added to every embedding here; the decoder's weight stays as it is.
        "model.embed_tokens.weight": words_VD + source.take(f"{embeddings}token_type_embeddings.weight")[0],
        "model.embed_positions.scale": source.take(f"{embeddings}scaledsin_scalar").reshape(()),
        "lm_head.weight": source.take(f"{head}decoder.weight"),
        **source.take_norm(f"{embeddings}LayerNorm", "model.embed_norm", "scala"),
        **source.take_norm(f"{head}transform.LayerNorm", "transform.norm", "scala"),
    }
    source.drop(f"{embeddings}position_ids", f"{embeddings}scaledsin_embeddings")
    for i in range(count):
        theirs, ours = f"flash_quad.encoder.layer.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            scale_2S, uvz = source.take(theirs + kind), source.take(f"{theirs}uv.{kind}")
            S = scale_2S.shape[1]
            E = (len(uvz) - S) // 2
            for short, part in zip("uvz", uvz.split([E, E, S]), strict=True):
                tensors[f"{ours}gau.{short}_proj.{kind}"] = part
            tensors[f"{ours}gau.o_proj.{kind}"] = source.take(f"{theirs}o.{kind}")
            tensors[f"{ours}gau.offset_scale.{kind}"] = scale_2S
        # As the original does: one weight per offset up to 512 tokens, beyond that two rotated vectors.
        w_R, rotary_2S = source.take(f"{theirs}w"), torch.cat([source.take(f"{theirs}a"), source.take(f"{theirs}b")])
        span = (len(w_R) + 1) // 2
        tensors[f"{ours}gau.relative_bias.weight"] = w_R if span <= 512 else rotary_2S
        tensors |= source.take_norm(f"{theirs}LayerNorm", f"{ours}norm", "scala")
    # One parameter under two names; some versions of transformers save the first only.
    biases = [source.take(name) for name in (f"{head}bias", f"{head}decoder.bias") if name in source]
    if not biases or not torch.equal(biases[0], biases[-1]):
        raise ValueError(
            f"`{head}bias` and `{head}decoder.bias` must be the same (or one of them missing). Keep the one that the "
            "original code loads last."
        )
    tensors["lm_head.bias"] = biases[0]
    for kind in ("weight", "bias"):
        tensors[f"transform.dense.{kind}"] = source.take(f"{head}transform.dense.{kind}")
    source.finish()
    sizes = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": count, "query_key_dim": S}
    config = FlashConfig(
        **sizes, expansion_factor=E / D, attention_type="quadratic", max_position_embeddings=span,
        attention_divisor=span,  # the length in training, for inputs of any length
        relative_bias="toeplitz" if span <= 512 else "rotary",
        norm_type="layer_norm" if layer_norm else "scale_norm",
        norm_eps=settings.get("layer_norm_eps", LAYER_NORM_EPS), hidden_act=settings.get("hidden_act", "silu"),
        pad_token_id=settings.get("pad_token_id", 0), tie_word_embeddings=False, embedding_norm=True,
        final_norm_type="none", mlm_transform=True, lm_head_bias=True,
    )  # fmt: skip
    note = "Inputs of token type 0 only; the other types are dropped."
    return Converted(config, tensors, "FlashForMaskedLM", (note,))
