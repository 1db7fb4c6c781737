# SPDX-License-Identifier: Apache-2.0
"""Parts of a conversion that several originals share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import modeling_flash
from ..configuration_flash import FlashConfig, nearest


# The originals' ScaleNorm clamps the root mean square at 1e-5; FlashScaleNorm adds eps inside the root. With this eps
# the two agree to 1e-10 on every token that is not clamped.
CLAMPED_EPS = 1e-20

# Constants in the code of FLASH-pytorch and of JunnYu's port.
T5_BUCKETS, T5_MAX_DISTANCE, LAYER_NORM_EPS, GROUP_SIZE = 32, 128, 1e-5, 256

CLAMP_NOTE = "Tokens whose root mean square is below 1e-5, which the original clamps, give other results."


class Converted(NamedTuple):
    """The result of a conversion.

    Attributes:
        config: configuration of the model.
        state_dict: weights, under the parameter names of `architecture`.
        architecture: class name in flash_hf.
        notes: where the converted model differs from the original.
    """

    config: FlashConfig
    state_dict: dict[str, Tensor]
    architecture: str
    notes: tuple[str, ...] = ()

    def build(self) -> modeling_flash.FlashPreTrainedModel:
        """The model in eval mode, with every parameter taken from `state_dict`.

        Raises:
            RuntimeError: a tensor has another shape than the configuration gives it.
        """
        model = getattr(modeling_flash, self.architecture)(self.config)
        model.to(next(iter(self.state_dict.values())).dtype)
        model.load_state_dict(self.state_dict)
        return model.eval()


class Source:
    """Tensors of an original state dict. Each is taken once, so [`finish`] can tell whether any was overlooked. A
    missing, unexpected or damaged tensor raises a ValueError that names the `kind` of checkpoint."""

    def __init__(self, state: Mapping[str, Tensor], kind: str):
        self.left, self.kind = dict(state), kind

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        """Remove and return the tensor `name` in float32 or wider, checked to be finite."""
        if name not in self.left:
            raise ValueError(
                f"A checkpoint of kind {self.kind!r} must have `{name}`, which is missing."
                f"{nearest(name, list(self.left))} Is it of another --kind?"
            )
        tensor = self.left.pop(name).detach()
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if not tensor.isfinite().all():
            raise ValueError(f"`{name}` must be finite, but has NaN or infinity: the file is damaged.")
        return tensor

    def take_norm(self, theirs: str, ours: str, gain: str) -> dict[str, Tensor]:
        """Weight and bias of a LayerNorm, or the scalar `gain` of a ScaleNorm, under our names."""
        if f"{theirs}.{gain}" in self:
            return {f"{ours}.weight": self.take(f"{theirs}.{gain}").reshape(())}
        return {f"{ours}.{name}": self.take(f"{theirs}.{name}") for name in ("weight", "bias")}

    def drop(self, *names: str) -> None:
        """Discard tensors that do not affect the outputs."""
        for name in names:
            self.left.pop(name, None)

    def layers(self, prefix: str) -> int:
        """The number of layers under `prefix`."""
        return 1 + max(
            (int(name[len(prefix) :].split(".")[0]) for name in self.left if name.startswith(prefix)), default=0
        )

    def finish(self) -> None:
        """Check that every tensor has been used."""
        if self.left:
            names = ", ".join(map(repr, sorted(self.left)[:8])) + " and more" * (len(self.left) > 8)
            raise ValueError(
                f"A checkpoint of kind {self.kind!r} must not have {names}: how they affect the outputs is not known. "
                "Remove tensors that are not part of the model, or give another --kind."
            )


def fold_decoder(weight_VD: Tensor, bias_V: Tensor, gain_D: Tensor, shift_D: Tensor) -> dict[str, Tensor]:
    """Fold a LayerNorm's gain and shift, and the bias of the linear decoder after it, into the decoder's weight.

    A normalized token `n` sums to zero, so any multiple of the ones vector may be added to a row of the decoder. With
    a shift of 1 everywhere, `(W + c 1^T / D) (n + 1) = W n + c` if the rows of W sum to zero.

    Args:
        weight_VD, bias_V: of the decoder.
        gain_D, shift_D: of the LayerNorm.

    Returns:
        `model.norm.weight [D]`, `model.norm.bias [D]` and `lm_head.weight [V, D]`.
    """
    weight, bias, gain, shift = (x.double() for x in (weight_VD, bias_V, gain_D, shift_D))
    total_V = bias + weight @ shift
    centered_VD = weight * gain
    centered_VD = centered_VD - centered_VD.mean(1, keepdim=True)
    ones = torch.ones_like(gain_D)
    folded_VD = (centered_VD + total_V[:, None] / len(gain)).to(weight_VD.dtype)
    return {"model.norm.weight": ones, "model.norm.bias": ones.clone(), "lm_head.weight": folded_VD}


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


def lucidrains_layer(source: Source, theirs: str, ours: str, offset_scale: tuple[str, str]) -> tuple[dict, dict]:
    """Convert one layer of FLASH-pytorch, or of JunnYu's port.

    Args:
        theirs, ours: prefixes of the parameter names, with their dots.
        offset_scale: names of scale and offset under `qk_offset_scale.`.

    Returns:
        Tensors under our names, and the configuration fields that follow from their shapes and names.
    """
    layer_norm = f"{theirs}norm.weight" in source
    tensors = source.take_norm(f"{theirs}norm", "norm", "g")
    for kind, scale in zip(("weight", "bias"), offset_scale, strict=True):
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


def lucidrains_layers(source: Source, prefix: str, ours: str, offset_scale: tuple[str, str]) -> tuple[dict, dict]:
    """Convert all layers under `prefix` as [`lucidrains_layer`] does one, checked to have one configuration."""
    count = source.layers(prefix)
    tensors, inferred = {}, None
    for i in range(count):
        layer, current = lucidrains_layer(source, f"{prefix}{i}.", f"{ours}layers.{i}.", offset_scale)
        if inferred not in (None, current):
            raise ValueError(f"All layers must be alike, but layer {i} has {current}, those before {inferred}.")
        tensors, inferred = tensors | layer, current
    return tensors, {**inferred, "num_hidden_layers": count}


def final_layer_norm(inferred: dict, eps: float) -> dict:
    """Fields for a LayerNorm with `eps` after layers of `inferred`."""
    if inferred["norm_type"] == "layer_norm" and eps == inferred["norm_eps"]:
        return {}
    return {"final_norm_type": "layer_norm", "final_norm_eps": eps}
