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
from collections.abc import Mapping
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from .. import modeling_flash
from ..configuration_flash import FlashConfig, nearest


# The originals with a ScaleNorm clamp the root mean square at 1e-5; ours adds eps inside the root. With this eps both
# are the same to 1e-10 for every row that the clamp leaves alone.
CLAMPED_EPS = 1e-20

# FLASH-pytorch and the port of it have these in their code.
T5_BUCKETS, T5_MAX_DISTANCE, LAYER_NORM_EPS, GROUP_SIZE = 32, 128, 1e-5, 256


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
