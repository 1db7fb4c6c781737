# SPDX-License-Identifier: Apache-2.0
"""FLASH-pytorch (lucidrains), and JunnYu's FLASH, which has the same layers under other names."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..configuration_flash import FlashConfig
from .parts import Converted, Source, fold_decoder


# The originals' ScaleNorm clamps the root mean square at 1e-5; FlashScaleNorm adds eps inside the root. With this eps
# the two agree to 1e-10 on every token that is not clamped.
CLAMPED_EPS = 1e-20

# Constants in the code of FLASH-pytorch and of JunnYu's port.
T5_BUCKETS, T5_MAX_DISTANCE, LAYER_NORM_EPS, GROUP_SIZE = 32, 128, 1e-5, 256

CLAMP_NOTE = "Tokens whose root mean square is below 1e-5, which the original clamps, give other results."
MASK_NOTE = (
    "Under a padding mask FLASH-pytorch divides the global sum by the padded length, FLASH by the number of real "
    "tokens. Without padding the two agree."
)

# JunnYu's names of what FLASH-pytorch names otherwise.
JUNNYU_NAMES = {
    "flash.encoder.": "",
    "flash.embeddings.word_embeddings.": "token_emb.",
    "flash.embeddings.scale": "abs_pos_emb.scale",
    "qk_offset_scale.weight": "qk_offset_scale.gamma",
    "qk_offset_scale.bias": "qk_offset_scale.beta",
    "cls.predictions.LayerNorm.": "to_logits.0.",
    "cls.predictions.decoder.": "to_logits.1.",
}


def rotary_settings(freqs: Tensor, key_dim: int) -> dict:
    """RoPE fields for the frequencies `[r / 2]` that rotary-embedding-torch stores, checked to be of base 10000."""
    r = 2 * len(freqs)
    expected = 10000.0 ** (-torch.arange(0, r, 2).double() / r)
    if r > key_dim or not torch.allclose(freqs.double(), expected, rtol=1e-3, atol=0):
        raise ValueError(
            f"`rotary_pos_emb.freqs` must be 10000^(-2p/r) for r = {r} at most {key_dim}, as `RotaryEmbedding(dim)` "
            f"makes them, got {freqs.tolist()[:4]}... FlashConfig has no field for custom or learned frequencies."
        )
    factor = r / key_dim
    while int(key_dim * factor) < r:  # FlashConfig truncates the product
        factor = math.nextafter(factor, 2)
    return {
        "rope_interleaved": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor},
    }


# Our row i of the offset scale (quad_q, quad_k, lin_q, lin_k) is their row ROWS[i].
ROWS = [0, 2, 1, 3]


def convert_layer(source: Source, theirs: str, ours: str) -> tuple[dict, dict]:
    """One layer's tensors under our names, and the configuration fields that follow from their shapes and names;
    `theirs` and `ours` are prefixes of the names, with their dots."""
    layer_norm = f"{theirs}norm.weight" in source
    tensors = source.take_norm(f"{theirs}norm", "norm", "g")
    for kind, scale in (("weight", "gamma"), ("bias", "beta")):
        # The original has the values first, then the gate.
        values, gate = source.take(f"{theirs}to_hidden.0.{kind}").chunk(2)
        tensors |= {
            f"gau.u_proj.{kind}": gate,
            f"gau.v_proj.{kind}": values,
            f"gau.z_proj.{kind}": source.take(f"{theirs}to_qk.0.{kind}"),
            f"gau.o_proj.{kind}": source.take(f"{theirs}to_out.{kind}"),
            f"gau.offset_scale.{kind}": source.take(f"{theirs}qk_offset_scale.{scale}")[ROWS],
        }
    tensors["gau.relative_bias.weight"] = source.take(f"{theirs}rel_pos_bias.relative_attention_bias.weight")
    E, D = tensors["gau.v_proj.weight"].shape
    S = len(tensors["gau.z_proj.weight"])
    inferred = {
        "hidden_size": D,
        "expansion_factor": E / D,
        "query_key_dim": S,
        "relative_bias": "t5",
        "t5_num_buckets": T5_BUCKETS,
        "t5_max_distance": T5_MAX_DISTANCE,
        "norm_type": "layer_norm" if layer_norm else "scale_norm",
        "norm_eps": LAYER_NORM_EPS if layer_norm else CLAMPED_EPS,
        "use_rope": f"{theirs}rotary_pos_emb.freqs" in source,
    }
    if inferred["use_rope"]:
        inferred |= rotary_settings(source.take(f"{theirs}rotary_pos_emb.freqs"), S)
    return {ours + name: tensor for name, tensor in tensors.items()}, inferred


def convert_model(
    state: Mapping[str, Tensor], kind: str, fields: dict, *, encoder_only: bool, eps: float = LAYER_NORM_EPS
) -> Converted:
    """Convert a state dict under FLASH-pytorch's names, with the `fields` of the configuration that do not follow from
    shapes and names; `eps` is that of the final LayerNorm."""
    source, single = Source(state, kind), "token_emb.weight" not in state
    source.drop("abs_pos_emb.inv_freq")  # always 10000^(-2i/D)
    if encoder_only:
        source.drop(*[name for name in state if name.startswith("to_logits.")])
    base, tensors, inferred = "" if encoder_only or single else "model.", {}, None
    for i in range(source.layers("layers.")):
        layer, current = convert_layer(source, f"layers.{i}.", f"{base}layers.{i}.")
        if inferred not in (None, current):
            raise ValueError(f"All layers must be alike, but layer {i} has {current}, those before {inferred}.")
        tensors, inferred = tensors | layer, current
    fields = {**inferred, "num_hidden_layers": i + 1, "use_scaled_sinusoid": not single, **fields}
    notes = (CLAMP_NOTE,) if inferred["norm_type"] == "scale_norm" else ()
    if single:
        like = tensors["layers.0.gau.o_proj.bias"]
        tensors["embed_tokens.weight"] = torch.zeros(1, inferred["hidden_size"], dtype=like.dtype)
    else:
        tensors[f"{base}embed_tokens.weight"] = source.take("token_emb.weight")
        tensors[f"{base}embed_positions.scale"] = source.take("abs_pos_emb.scale").reshape(())
    fields["vocab_size"] = len(tensors[f"{base}embed_tokens.weight"])
    if not base:
        source.finish()
        return Converted(FlashConfig(**fields, final_norm_type="none"), tensors, "FlashModel", notes)
    names = ("1.weight", "1.bias", "0.weight", "0.bias")
    tensors |= fold_decoder(*[source.take(f"to_logits.{name}") for name in names])
    source.finish()
    config = FlashConfig(**fields, final_norm_type="layer_norm", final_norm_eps=eps, tie_word_embeddings=False)
    return Converted(config, tensors, "FlashForCausalLM" if config.is_decoder else "FlashForMaskedLM", notes)


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
        encoder_only: convert embeddings and layers to a FlashModel, without the final norm and the logits. That of a
            single module has one layer, no positions and a vocabulary of 1, to be called with `inputs_embeds`.
    """
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
    fields = {
        "chunk_size": chunk_size,
        "attention_divisor": chunk_size,
        "attention_activation": "laplace" if laplace else "relu2",
        # If causal, the original divides the sum over earlier groups by the group size alone.
        "global_normalization": "chunk" if causal else "mean",
        "is_decoder": causal,
    }
    state = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    if "token_emb.weight" not in state:
        state = {f"layers.0.{name}": tensor for name, tensor in state.items()}
    converted = convert_model(state, "lucidrains", fields, encoder_only=encoder_only)
    return converted if causal else converted._replace(notes=(MASK_NOTE, *converted.notes))
