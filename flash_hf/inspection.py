# SPDX-License-Identifier: Apache-2.0
"""Look inside a model: which tokens each token reads in each layer, and how much comes from the global branch.

The attention is linear in its values, `out = W v`. A forward never builds the N x N weights W: here they are
computed as the output for the identity matrix as values.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .modeling_flash import FlashGatedAttentionUnit, FlashPreTrainedModel


@dataclass(eq=False)
class LayerView:
    """One layer's attention over one text of N tokens. Row i belongs to the token that reads, column j to the token
    that is read.

    Attributes:
        unit: the layer's gated attention unit.
        u_NE, v_NE: its gate and values (eq. 2), `[N, E]`.
        local_NN: weights of the local branch (eq. 4), float32 `[N, N]`; 0 without that branch.
        global_NN: weights of the global branch (eq. 5), float32 `[N, N]`; 0 without that branch.
    """

    unit: FlashGatedAttentionUnit
    u_NE: Tensor
    v_NE: Tensor
    local_NN: Tensor
    global_NN: Tensor

    @property
    def weights_NN(self) -> Tensor:
        """Weights of both branches together, `[N, N]`."""
        return self.local_NN + self.global_NN

    @torch.no_grad()
    def project(self, gated_XE: Tensor) -> Tensor:
        """The output projection without its bias, `[X, D]`, by the module, which may be an adapter."""
        return (self.unit.o_proj(gated_XE) - self.unit.o_proj(torch.zeros_like(gated_XE[:1]))).float()

    def added(self, weights_NN: Tensor) -> Tensor:
        """What attention with these weights adds to the residual stream (eq. 6, without the bias), `[N, D]`."""
        return self.project(self.u_NE * (weights_NN.to(self.v_NE.dtype) @ self.v_NE))

    def global_share(self) -> Tensor:
        """The share of the global branch in what each token receives, `[N]` between 0 and 1: the norm of its output
        divided by the sum of both branches' norms."""
        local_N, global_N = (self.added(weights).norm(dim=-1) for weights in (self.local_NN, self.global_NN))
        return global_N / (local_N + global_N).clamp(min=1e-30)

    def drawn(self, token: int) -> Tensor:
        """How much each token contributes to token number `token`, `[N]`: the norm of what it adds to the output."""
        weight_N1 = self.weights_NN[token, :, None].to(self.v_NE.dtype)
        return self.project(self.u_NE[token] * weight_N1 * self.v_NE).norm(dim=-1)


@contextmanager
def without(unit: FlashGatedAttentionUnit, names: tuple[str, ...]):
    """The unit without the queries and keys of one branch."""
    made = unit.query_keys
    # An attribute of this unit, found before the method of its class.
    unit.query_keys = lambda z, rotary: made(z, rotary)._replace(**dict.fromkeys(names))
    try:
        yield
    finally:
        del unit.query_keys


@torch.no_grad()
def look_inside(model: FlashPreTrainedModel, input_ids: Tensor) -> list[LayerView]:
    """The attention of every layer over one text.

    Args:
        model: FLASH with any head or none, in eval mode.
        input_ids: int64 `[1, N]`, without padding. Two float32 matrices of N x N are kept per layer.

    Raises:
        ValueError: `input_ids` has more than one row.
    """
    if input_ids.ndim != 2 or len(input_ids) != 1:
        raise ValueError(
            f"input_ids must be one text of shape (1, tokens), got {tuple(input_ids.shape)}. Pass one row."
        )
    calls: list[tuple[FlashGatedAttentionUnit, Tensor, object]] = []

    def record(unit: nn.Module, inputs: tuple) -> None:
        calls.append((unit, *inputs[:2]))

    base = model.base_model
    hooks = [layer.gau.register_forward_pre_hook(record) for layer in base.layers]
    try:
        base(input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    identity = torch.eye(input_ids.shape[1], device=input_ids.device, dtype=calls[0][1].dtype)[None]
    views = []
    for unit, x_BND, places in calls:
        u_BNE, v_BNE, z_BNS = (unit.act_fn(project(x_BND)) for project in (unit.u_proj, unit.v_proj, unit.z_proj))
        weights = []
        for present, other in ((unit.has_quad, ("lin_q", "lin_k")), (unit.has_lin, ("quad_q", "quad_k"))):
            weights.append(torch.zeros_like(identity[0], dtype=torch.float32))
            if present:
                with without(unit, other):
                    weights[-1] = unit.attend(z_BNS, identity, places, None, unit.gates(x_BND))[0].float()
        views.append(LayerView(unit, u_BNE[0], v_BNE[0], *weights))
    return views


__all__ = ["LayerView", "look_inside"]
