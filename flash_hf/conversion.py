# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other FLASH implementations as flash_hf configurations and weights, exactly or not at all.

Each function takes a state dict of the original and gives the class, configuration and state dict that compute the
same function; where none does, a ValueError says why and what can be done. What a state dict does not tell (direction,
chunk size, ...) is an argument. No original code is needed.

Algebra that is used: an embedding that is added to every token is folded into the word embeddings; a LayerNorm's
output before its gain sums to zero, so that a decoder's bias has a place along the ones vector (`fold_decoder`); and a
fixed divisor of the global sum is folded into the linear queries, whose own divisor is then `chunk_size`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from . import modeling_flash
from .command_line import read_json
from .configuration_flash import FlashConfig, nearest
from .hub import pad_on_the_left, vocabulary_size


# The originals with a ScaleNorm clamp the root mean square at 1e-5; ours adds eps inside the root. With this eps both
# are the same to 1e-10 for every row that the clamp leaves alone.
CLAMPED_EPS = 1e-20

# FLASH-pytorch and the port of it have these in their code.
T5_BUCKETS, T5_MAX_DISTANCE, LAYER_NORM_EPS, GROUP_SIZE = 32, 128, 1e-5, 256

WEIGHT_FILES = (
    "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class Converted(NamedTuple):
    """What a conversion gives.

    Attributes:
        config: of the model.
        state_dict: its weights, under the names of `architecture`.
        architecture: name of the class in flash_hf.
        notes: what a user should know of the limits of equality.
    """

    config: FlashConfig
    state_dict: dict[str, Tensor]
    architecture: str
    notes: tuple[str, ...] = ()

    def build(self) -> modeling_flash.FlashPreTrainedModel:
        """The model in eval mode, every parameter taken from `state_dict`."""
        model = getattr(modeling_flash, self.architecture)(self.config)
        model.to(self.state_dict[next(iter(self.state_dict))].dtype)
        model.load_state_dict(self.state_dict)
        return model.eval()


class Source:
    """The original's tensors, each to be taken once, so that none is forgotten.

    Args:
        state: names to tensors.
        kind: named in messages.
    """

    def __init__(self, state: Mapping[str, Tensor], kind: str):
        self.left, self.kind = dict(state), kind

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor `name`, at least float32; `shape` has None where any length will do.

        Raises:
            ValueError: it is missing, not of this shape, or not finite.
        """
        if name not in self.left:
            raise ValueError(
                f"state: `{name}` must be there in a checkpoint of kind {self.kind!r}, and is not."
                f"{nearest(name, list(self.left))} If it is of another kind, pass kind=..."
            )
        tensor = self.left.pop(name).detach()
        fits = tensor.ndim == len(shape) and all(
            want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"state: `{name}` must have shape {shape} (None: any), got {tuple(tensor.shape)}.")
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if not tensor.isfinite().all():
            raise ValueError(f"state: `{name}` must be finite, but it has NaN or infinity: the file is damaged.")
        return tensor

    def drop(self, *names: str) -> None:
        """Forget tensors that the function does not depend on."""
        for name in names:
            self.left.pop(name, None)

    def layers(self, prefix: str) -> int:
        """The number of layers under `prefix`, counted from 0 without a gap.

        Raises:
            ValueError: there is none, or one is missing.
        """
        found = {int(name[len(prefix) :].split(".")[0]) for name in self.left if name.startswith(prefix)}
        if not found or found != set(range(len(found))):
            raise ValueError(f"state: layers {prefix}0, 1, 2, ... must be there without a gap, got {sorted(found)}.")
        return len(found)

    def finish(self) -> None:
        """Every tensor has been used.

        Raises:
            ValueError: some are left, so that the checkpoint is not what it was taken for.
        """
        if self.left:
            raise ValueError(
                f"state: a checkpoint of kind {self.kind!r} has no {', '.join(map(repr, sorted(self.left)[:8]))}"
                f"{' and more' if len(self.left) > 8 else ''}; how its function depends on them is not known here. "
                "Remove tensors that are not part of the model, or pass another kind=..."
            )


# ------------------------------------------------------------------------------------------------------------------
# Parts that several originals share
# ------------------------------------------------------------------------------------------------------------------
def fold_decoder(weight_VD: Tensor, bias_V: Tensor, gain_D: Tensor, shift_D: Tensor) -> dict[str, Tensor]:
    """`Linear(LayerNorm(x))` with a bias as one without: gain, shift and bias move into the decoder, exactly.

    The normalised rows `n` sum to zero, so a multiple of the ones vector may be added to any row of the decoder; with
    a shift of 1 everywhere, `(W + c 1^T / D) (n + 1) = W n + c` when the rows of W sum to zero.

    Args:
        weight_VD, bias_V: the decoder's.
        gain_D, shift_D: the LayerNorm's.

    Returns:
        `model.norm.weight [D]`, `model.norm.bias [D]` and `lm_head.weight [V, D]`.
    """
    weight, bias, gain, shift = (x.double() for x in (weight_VD, bias_V, gain_D, shift_D))
    total_V = bias + weight @ shift
    centred_VD = weight * gain
    centred_VD = centred_VD - centred_VD.mean(1, keepdim=True)
    ones = torch.ones_like(gain_D)
    folded_VD = (centred_VD + total_V[:, None] / len(gain)).to(weight_VD.dtype)
    return {"model.norm.weight": ones, "model.norm.bias": ones.clone(), "lm_head.weight": folded_VD}


def rotary_settings(freqs: Tensor, key_dim: int) -> dict:
    """RoPE settings for frequencies stored by rotary-embedding-torch, `[r / 2]`.

    Raises:
        ValueError: they are not those of base 10000 (learned, rescaled, or for pixels).
    """
    r = 2 * len(freqs)
    expected = 10000.0 ** (-torch.arange(0, r, 2).double() / r)
    if r > key_dim or not torch.allclose(freqs.double(), expected, rtol=1e-3, atol=0):
        raise ValueError(
            f"state: `rotary_pos_emb.freqs` must be 10000^(-2p/r) for r = {r} at most {key_dim}, as "
            f"`RotaryEmbedding(dim)` makes them, got {freqs.tolist()[:4]}... Custom or learned frequencies have no "
            "field in FlashConfig."
        )
    factor = r / key_dim
    # The configuration truncates the product.
    while int(key_dim * factor) < r:
        factor = math.nextafter(factor, 2)
    return {
        "rope_interleaved": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor},
    }


def build_config(kind: str, known: dict, needed: dict[str, tuple[object, str]], cure: str) -> FlashConfig:
    """`FlashConfig(**known, **needed)`.

    Args:
        kind: named in messages.
        known: fields that every FlashConfig has.
        needed: fields that FlashConfig may not have, each with its value and with what in the checkpoint asks for it.
        cure: what to do where one is missing.

    Raises:
        ValueError: FlashConfig has not got a needed field, so that the function cannot be expressed.
    """
    available = {field.name for field in fields(FlashConfig)}
    missing = {name: reason for name, (_, reason) in needed.items() if name not in available}
    if missing:
        reasons = "; ".join(f"{reason} (no field `{name}`)" for name, reason in missing.items())
        raise ValueError(
            f"kind: {kind!r} cannot be converted exactly to this version's FlashConfig, and an approximation is not "
            f"made: {reasons}. {cure}"
        )
    return FlashConfig(**known, **{name: value for name, (value, _) in needed.items()})


def tell(name: str, value: object, kind: str, why: str) -> None:
    """Raise ValueError if the caller has not said what the state dict does not tell."""
    if value is None:
        raise ValueError(f"`{name}` must be given for {kind!r}, got None: its state dict does not tell {why}.")


# Ours to theirs: where the rows quad_q, quad_k, lin_q, lin_k stand.
ROWS = [0, 2, 1, 3]


def lucidrains_layer(source: Source, theirs: str, ours: str, offset_scale: tuple[str, str]) -> tuple[dict, dict]:
    """One layer of FLASH-pytorch, or of a port of it.

    Args:
        theirs, ours: prefixes of names, with their dot.
        offset_scale: names of scale and offset under `qk_offset_scale.`.

    Returns:
        Tensors under our names, and the configuration fields that this layer tells.

    Raises:
        ValueError: a tensor is missing or has a wrong shape.
    """
    hidden = source.take(f"{theirs}to_hidden.0.weight", None, None)
    E, D = hidden.shape[0] // 2, hidden.shape[1]
    if hidden.shape[0] % 2:
        raise ValueError(f"state: `{theirs}to_hidden.0.weight` must have an even number of rows, got {len(hidden)}.")
    hidden_bias = source.take(f"{theirs}to_hidden.0.bias", 2 * E)
    basis = source.take(f"{theirs}to_qk.0.weight", None, D)
    S = basis.shape[0]
    scale, offset = (source.take(f"{theirs}qk_offset_scale.{name}", 4, S) for name in offset_scale)
    layer_norm = f"{theirs}norm.weight" in source
    told = {
        "hidden_size": D,
        "expansion_factor": E / D,
        "query_key_dim": S,
        "relative_bias": "t5",
        "t5_num_buckets": T5_BUCKETS,
        "t5_max_distance": T5_MAX_DISTANCE,
        "norm_type": "layer_norm" if layer_norm else "scale_norm",
        "norm_eps": LAYER_NORM_EPS if layer_norm else CLAMPED_EPS,
        "use_rope": False,
    }
    tensors = {
        # Values come first in the original, the gate second.
        "gau.u_proj.weight": hidden[E:], "gau.u_proj.bias": hidden_bias[E:],
        "gau.v_proj.weight": hidden[:E], "gau.v_proj.bias": hidden_bias[:E],
        "gau.z_proj.weight": basis, "gau.z_proj.bias": source.take(f"{theirs}to_qk.0.bias", S),
        "gau.o_proj.weight": source.take(f"{theirs}to_out.weight", D, E),
        "gau.o_proj.bias": source.take(f"{theirs}to_out.bias", D),
        "gau.offset_scale.weight": scale[ROWS], "gau.offset_scale.bias": offset[ROWS],
        "gau.relative_bias.weight": source.take(
            f"{theirs}rel_pos_bias.relative_attention_bias.weight", T5_BUCKETS, 1
        ),
    }  # fmt: skip
    if layer_norm:
        tensors["norm.weight"] = source.take(f"{theirs}norm.weight", D)
        tensors["norm.bias"] = source.take(f"{theirs}norm.bias", D)
    else:
        tensors["norm.weight"] = source.take(f"{theirs}norm.g", 1).reshape(())
    if f"{theirs}rotary_pos_emb.freqs" in source:
        told["use_rope"] = True
        told.update(rotary_settings(source.take(f"{theirs}rotary_pos_emb.freqs", None), S))
    return {ours + name: tensor for name, tensor in tensors.items()}, told


def lucidrains_layers(source: Source, prefix: str, ours: str, offset_scale: tuple[str, str]) -> tuple[dict, dict]:
    """All layers under `prefix`, which must agree in what they tell; returns as `lucidrains_layer`.

    Raises:
        ValueError: they do not agree.
    """
    count = source.layers(prefix)
    tensors, told = {}, None
    for i in range(count):
        layer, tells = lucidrains_layer(source, f"{prefix}{i}.", f"{ours}layers.{i}.", offset_scale)
        if told not in (None, tells):
            raise ValueError(f"state: all layers must be alike, but layer {i} is {tells} and those before {told}.")
        tensors, told = tensors | layer, tells
    return tensors, {**told, "num_hidden_layers": count}


def identity_norm(told: dict, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gain 1 (and shift 0) for the final norm that FlashModel has and an original's encoder has not."""
    D = told["hidden_size"]
    if told["norm_type"] == "layer_norm":
        return {f"{prefix}norm.weight": torch.ones(D, dtype=dtype), f"{prefix}norm.bias": torch.zeros(D, dtype=dtype)}
    return {f"{prefix}norm.weight": torch.ones((), dtype=dtype)}


ENCODER_NOTE = (
    "The original's encoder ends with its last layer; FlashModel normalises that once more (gain 1). The original's "
    "own output is what the last layer gives: model.config.tie_last_hidden_states=False makes it hidden_states[-1]."
)
CLAMP_NOTE = "Rows of the stream with a root mean square below 1e-5, where the original clamps, are not the same."


def final_layer_norm(needed_eps: float) -> dict[str, tuple[object, str]]:
    """Fields for a LayerNorm after layers that have another norm."""
    reason = "its layers have ScaleNorm and its head LayerNorm, while FlashConfig has one `norm_type` for both"
    return {
        "final_norm_type": ("layer_norm", reason),
        "final_norm_eps": (needed_eps, f"the head's LayerNorm has an eps of its own, {needed_eps}"),
    }


# ------------------------------------------------------------------------------------------------------------------
# FLASH-pytorch (lucidrains)
# ------------------------------------------------------------------------------------------------------------------
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


MASK_NOTE = (
    "Under a padding mask FLASH-pytorch divides the global sum by the padded length; here it is the number of real "
    "tokens, as it is for the original without padding."
)


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


# ------------------------------------------------------------------------------------------------------------------
# JunnYu's ports
# ------------------------------------------------------------------------------------------------------------------
def convert_junnyu_flash(
    state: Mapping[str, Tensor],
    *,
    settings: Mapping | None = None,
    padded_length: int | None = 512,
    encoder_only: bool = False,
) -> Converted:
    """JunnYu's FLASH (`flash.*`): flash_small_wwm_cluecorpussmall, flash_base_wwm_cluecorpussmall.

    Args:
        state: `model.state_dict()` of FLASHForMaskedLM, or of FLASHModel under `flash.` with `encoder_only`.
        settings: the checkpoint's `config.json`; `group_size` 256 and `layer_norm_eps` 1e-5 without it.
        padded_length: the original divides its global sum by the padded length. The checkpoints were trained on inputs
            padded to 512 and are to be used so: our result for a text of any length is then what the original gives
            for it padded to 512 tokens. None divides by the number of real tokens: the original's result for a text
            without padding.
        encoder_only: convert embeddings and layers to a FlashModel, without the masked-LM head.

    Returns:
        A FlashForMaskedLM with the original's logits, or a FlashModel.

    Raises:
        ValueError: FlashConfig cannot express the checkpoint, or an argument is wrong.
    """
    kind = "junnyu_flash"
    settings = settings or {}
    if padded_length is not None and padded_length < 1:
        raise ValueError(f"`padded_length` must be at least 1, or None, got {padded_length!r}.")
    source = Source(state, kind)
    base = "" if encoder_only else "model."
    tensors, told = lucidrains_layers(source, "flash.encoder.layers.", base, ("weight", "bias"))
    D = told["hidden_size"]
    chunk_size = settings.get("group_size", GROUP_SIZE)
    if padded_length is not None:
        for name in tensors:
            if name.endswith("offset_scale.weight") or name.endswith("offset_scale.bias"):
                factor = torch.ones(4, 1, dtype=tensors[name].dtype)
                factor[2] = chunk_size / padded_length  # lin_q
                tensors[name] = tensors[name] * factor
    embedding_VD = source.take("flash.embeddings.word_embeddings.weight", None, D)
    tensors[f"{base}embed_tokens.weight"] = embedding_VD
    tensors[f"{base}embed_positions.scale"] = source.take("flash.embeddings.scale", 1).reshape(())
    source.drop("flash.embeddings.position_ids", "flash.embeddings.scaledsin_embeddings")
    known = {
        **told,
        "vocab_size": len(embedding_VD),
        "chunk_size": chunk_size,
        "attention_divisor": chunk_size,
        "global_normalization": "mean" if padded_length is None else "chunk",
        "max_position_embeddings": settings.get("max_position_embeddings", 512),
        "pad_token_id": settings.get("pad_token_id", 0),
    }
    notes = (CLAMP_NOTE,) if told["norm_type"] == "scale_norm" else ()
    if padded_length is not None:
        notes += (f"The global sum is divided by {padded_length}: the original's for inputs padded to that length.",)
    if encoder_only:
        source.drop(*[name for name in source.left if name.startswith("cls.")])
        source.finish()
        tensors |= identity_norm(told, base, embedding_VD.dtype)
        return Converted(FlashConfig(**known), tensors, "FlashModel", (*notes, ENCODER_NOTE))
    head = "cls.predictions."
    V = len(embedding_VD)
    tensors |= fold_decoder(
        source.take(f"{head}decoder.weight", V, D), source.take(f"{head}decoder.bias", V),
        source.take(f"{head}LayerNorm.weight", D), source.take(f"{head}LayerNorm.bias", D),
    )  # fmt: skip
    source.finish()
    eps = settings.get("layer_norm_eps", LAYER_NORM_EPS)
    same = told["norm_type"] == "layer_norm" and eps == told["norm_eps"]
    config = build_config(
        kind, {**known, "tie_word_embeddings": False}, {} if same else final_layer_norm(eps),
        "Pass encoder_only=True (--encoder_only) for embeddings and layers without the masked-LM head, to fine-tune "
        "with another head.",
    )  # fmt: skip
    return Converted(config, tensors, "FlashForMaskedLM", notes)


def convert_junnyu_flash_quad(state: Mapping[str, Tensor], *, settings: Mapping | None = None) -> Converted:
    """JunnYu's FLASHQuad (`flash_quad.*`): flashquad_small_wwm_cluecorpussmall.

    Args:
        state: `model.state_dict()` of FLASHQuadForMaskedLM.
        settings: the checkpoint's `config.json`; `layer_norm_eps` 1e-5 and `hidden_act` silu without it.

    Returns:
        A FlashForMaskedLM with the original's logits for token type 0.

    Raises:
        ValueError: FlashConfig cannot express the checkpoint.
    """
    kind = "junnyu_flash_quad"
    settings = settings or {}
    source = Source(state, kind)
    count = source.layers("flash_quad.encoder.layer.")
    embeddings = "flash_quad.embeddings."
    words_VD = source.take(f"{embeddings}word_embeddings.weight", None, None)
    V, D = words_VD.shape
    # Token types other than 0 are lost; the decoder keeps the words as they were.
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
            raise ValueError(f"state: `{theirs}w` must be as long as that of layer 0, got {len(w_R)}.")
        span = (len(w_R) + 1) // 2
        rotary_2S = torch.cat([source.take(f"{theirs}a", 1, S), source.take(f"{theirs}b", 1, S)])
        for name, tensor in (("weight", weight), ("bias", bias)):
            for short, part in zip("uvz", tensor.split([E, E, S]), strict=True):
                tensors[f"{ours}gau.{short}_proj.{name}"] = part
        tensors[f"{ours}gau.o_proj.weight"] = source.take(f"{theirs}o.weight", D, E)
        tensors[f"{ours}gau.o_proj.bias"] = source.take(f"{theirs}o.bias", D)
        tensors[f"{ours}gau.offset_scale.weight"] = scale_2S
        tensors[f"{ours}gau.offset_scale.bias"] = source.take(f"{theirs}bias", 2, S)
        # The original's listing: one weight an offset up to 512 tokens, two rotated vectors beyond.
        tensors[f"{ours}gau.relative_bias.weight"] = w_R if span <= 512 else rotary_2S
        take_norm(f"{theirs}LayerNorm", f"{ours}norm")
    head = "cls.predictions."
    tensors["lm_head.weight"] = source.take(f"{head}decoder.weight", V, D)
    # One parameter under two names; some versions of transformers save only the first.
    biases = [source.take(name, V) for name in (f"{head}bias", f"{head}decoder.bias") if name in source]
    if not biases or not torch.equal(biases[0], biases[-1]):
        raise ValueError(
            f"state: `{head}bias` and `{head}decoder.bias` must be the same (one of them may be missing). Keep the "
            "one that the original code loads last."
        )
    tensors["lm_head.bias"] = biases[0]
    tensors["transform.dense.weight"] = source.take(f"{head}transform.dense.weight", D, D)
    tensors["transform.dense.bias"] = source.take(f"{head}transform.dense.bias", D)
    take_norm(f"{head}transform.LayerNorm", "transform.norm")
    source.finish()
    known = {
        "vocab_size": V,
        "hidden_size": D,
        "num_hidden_layers": count,
        "expansion_factor": E / D,
        "query_key_dim": S,
        "attention_type": "quadratic",
        "relative_bias": "toeplitz" if span <= 512 else "rotary",
        "max_position_embeddings": span,
        # The length of training, whatever the length of the input.
        "attention_divisor": span,
        "norm_type": "layer_norm" if layer_norm else "scale_norm",
        "norm_eps": settings.get("layer_norm_eps", 1e-5),
        "hidden_act": settings.get("hidden_act", "silu"),
        "pad_token_id": settings.get("pad_token_id", 0),
        "tie_word_embeddings": False,
    }
    needed = {
        "embedding_norm": (True, "it normalises the sum of its embeddings before the first layer"),
        "final_norm_type": ("none", "its encoder ends without a norm"),
        "mlm_transform": (True, "its masked-LM head has a dense layer, an activation and a norm before the decoder"),
        "lm_head_bias": (True, "its decoder has a bias, which only a LayerNorm before it could take up"),
    }
    config = build_config(
        kind, known, needed, "Nothing in this version makes up for it: use a version whose FlashConfig has the "
        "fields, or the original code.",
    )  # fmt: skip
    notes = ("Inputs of token type 0 only; the other types are dropped.",)
    return Converted(config, tensors, "FlashForMaskedLM", notes)


def convert_gau_alpha(state: Mapping[str, Tensor], **options) -> Converted:
    """Refuses GAU-alpha (`gau_alpha.*`).

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "kind: 'gau_alpha' cannot be converted exactly: it normalises after each residual sum (post-norm), which no "
        "pre-norm layer can imitate, and its softmax_plus scales scores by log(keys) / log(512), where FlashConfig's "
        "softmax has a constant. Use its own code, github.com/ZhuiyiTechnology/GAU-alpha, or train a FlashForMaskedLM "
        "with attention_type='quadratic', attention_activation='softmax', relative_bias=None."
    )


CONVERTERS: dict[str, Callable[..., Converted]] = {
    "junnyu_flash": convert_junnyu_flash,
    "junnyu_flash_quad": convert_junnyu_flash_quad,
    "gau_alpha": convert_gau_alpha,
    "lucidrains_transformer": convert_lucidrains_transformer,
    "lucidrains_layer": convert_lucidrains_layer,
    "lucidrains_gau": convert_lucidrains_gau,
}


# ------------------------------------------------------------------------------------------------------------------
# Any of them, and files
# ------------------------------------------------------------------------------------------------------------------
def detect_kind(state: Mapping[str, Tensor]) -> str:
    """The key of `CONVERTERS` whose checkpoints have names like these.

    Raises:
        ValueError: none has.
    """
    names = {name.removeprefix("net.") for name in state}
    for kind, prefix in (
        ("junnyu_flash_quad", "flash_quad."),
        ("gau_alpha", "gau_alpha."),
        ("junnyu_flash", "flash.encoder."),
    ):
        if any(name.startswith(prefix) for name in names):
            return kind
    if "token_emb.weight" in names and "abs_pos_emb.scale" in names:
        return "lucidrains_transformer"
    if "qk_offset_scale.gamma" in names:
        return "lucidrains_layer"
    if "offsetscale.gamma" in names:
        return "lucidrains_gau"
    raise ValueError(
        f"state: its names must be those of one of {', '.join(CONVERTERS)}, got {sorted(names)[:6]}... If they only "
        "have a prefix more, remove it; pass kind=... to have the first difference named."
    )


def convert(state: Mapping[str, Tensor], *, kind: str | None = None, **options) -> Converted:
    """The conversion that fits `state`.

    Args:
        state: names to tensors, as saved by the original.
        kind: key of `CONVERTERS`; detected from the names by default.
        options: of that function.

    Raises:
        ValueError: the checkpoint is unknown, cannot be expressed exactly, or an option does not belong to its kind.
    """
    kind = detect_kind(state) if kind is None else kind
    if kind not in CONVERTERS:
        raise ValueError(f"`kind` must be one of {', '.join(CONVERTERS)}, got {kind!r}.{nearest(kind, [*CONVERTERS])}")
    converter = CONVERTERS[kind]
    # Those that refuse whatever they get have no options.
    accepted = set(converter.__kwdefaults__ or options)
    unknown = sorted(set(options) - accepted)
    if unknown:
        raise ValueError(f"options of {kind!r} must be among {', '.join(sorted(accepted))}, got {', '.join(unknown)}.")
    return converter(state, **options)


def read_state_dict(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Tensors and `config.json` of a checkpoint; no code of the file is run.

    Args:
        path: a `.safetensors`, `.bin`, `.pt`, `.pth` or `.ckpt` file, or a folder with one of those (or shards and
            their index).

    Returns:
        Names to tensors, and the settings in the `config.json` beside them ({} without one).

    Raises:
        ValueError: nothing is there, or the file holds something else than tensors.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        known = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        found = known or sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        if not known and len(found) > 1:
            names = [file.name for file in found]
            raise ValueError(f"`path` must hold one file of weights, got {names} in {path}. Name one.")
        if not found:
            raise ValueError(f"`path` must hold weights (.safetensors, .bin, .pt), got none in {path}.")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"`path` must be a file or a folder, but {path} does not exist.")
    settings_path = folder / "config.json"
    settings = read_json(settings_path, dict) if settings_path.is_file() else {}
    if path.name.endswith(".index.json"):
        shards = sorted(set(read_json(path, dict)["weight_map"].values()))
        if any(name != os.path.basename(name) for name in shards):
            raise ValueError(f"`path`: the index {path} must name files beside it, got {shards}.")
        state = {}
        for name in shards:
            state |= read_tensors(folder / name)
        return state, settings
    return read_tensors(path), settings


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Names to tensors of one file; a `state_dict` or `model` entry of a training checkpoint is opened.

    Raises:
        ValueError: it holds something else.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # Never the whole pickle: that could run code.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file raises
        # Torch's message is left to the chain: it advises to trust the file.
        raise ValueError(
            f"`path` must hold tensors that torch.load(weights_only=True) reads, and {path} does not. Save "
            "model.state_dict() with the original code, not the module."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"`path` must hold a state dict of tensors, but {path} holds something else.")
    return dict(state)


def save_tokenizer(source: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Copy a BERT tokenizer (`vocab.txt`) or a `tokenizer.json` beside a converted model; whether there was one.

    Args:
        source: the original's folder, or a file in it.
        folder: the converted model's.

    Raises:
        ValueError: the tokenizer has ids beyond the model's embeddings.
    """
    from transformers import AutoConfig, BertTokenizerFast, PreTrainedTokenizerFast

    source = Path(source) if Path(source).is_dir() else Path(source).parent
    if (source / "vocab.txt").is_file():
        tokenizer_class = BertTokenizerFast
    elif (source / "tokenizer.json").is_file():
        tokenizer_class = PreTrainedTokenizerFast
    else:
        return False
    # FLASH has no token types; type 0 is in the word embeddings.
    names = ["input_ids", "attention_mask"]
    tokenizer = tokenizer_class.from_pretrained(str(source), model_input_names=names)
    config = AutoConfig.from_pretrained(folder)
    if config.is_decoder:
        pad_on_the_left(tokenizer)
    rows, needed = config.vocab_size, vocabulary_size(tokenizer)
    if rows < needed:
        raise ValueError(
            f"The tokenizer in {source} must belong to the model: it has ids up to {needed - 1}, the model's "
            f"vocab_size is {rows}."
        )
    tokenizer.save_pretrained(str(folder))
    return True


__all__ = [
    "CONVERTERS",
    "Converted",
    "convert",
    "convert_gau_alpha",
    "convert_junnyu_flash",
    "convert_junnyu_flash_quad",
    "convert_lucidrains_gau",
    "convert_lucidrains_layer",
    "convert_lucidrains_transformer",
    "detect_kind",
    "fold_decoder",
    "read_state_dict",
    "read_tensors",
    "save_tokenizer",
]
