# SPDX-License-Identifier: Apache-2.0
"""Parts of a conversion that several originals share."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import modeling_flash
from ..configuration_flash import FlashConfig, nearest


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
        """The model in eval mode, with every parameter taken from `state_dict`."""
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
        numbers = [int(name[len(prefix) :].split(".")[0]) for name in self.left if name.startswith(prefix)]
        return 1 + max(numbers, default=0)

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
