# SPDX-License-Identifier: Apache-2.0
"""The strongest baseline for speed: a Transformer++ with fused projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .sizes import Size


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class LeanBlock(nn.Module):
    """The block of Transformer++ (scripts.baselines) for speed: fused q, k, v and gate, up projections, and no masks.

    The baseline keeps the projections separate, for checkpoints and LoRA.
    """

    def __init__(self, size: Size, causal: bool):
        super().__init__()
        D, hidden = size.width, size.feed_forward
        self.heads, self.causal = size.heads, causal
        self.attention_norm, self.mlp_norm = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.qkv_proj, self.o_proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_up_proj, self.down_proj = nn.Linear(D, 2 * hidden, bias=False), nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keep: bool = False, cache=None):
        """`x`, or `(x, key, value)` with `keep`; `cache = (keys, values, place)` adds one token to the cache."""
        B, N, D = x.shape
        qkv = self.qkv_proj(self.attention_norm(x)).view(B, N, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = rotate_half(query, cos, sin), rotate_half(key, cos, sin)
        keys, values = key, value
        if cache is not None:
            keys, values, place = cache
            keys.index_copy_(2, place, key)
            values.index_copy_(2, place, value)
        out = F.scaled_dot_product_attention(query, keys, values, is_causal=self.causal and cache is None)
        x = x + self.o_proj(out.transpose(1, 2).reshape(B, N, D))
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, -1)
        x = x + self.down_proj(F.silu(gate) * up)
        return (x, key, value) if keep else x


class LeanTransformer(nn.Module):
    """Transformer++ without a head: `size.blocks` blocks and a norm."""

    def __init__(self, size: Size, causal: bool):
        super().__init__()
        self.size, self.recompute = size, False
        self.layers = nn.ModuleList(LeanBlock(size, causal) for _ in range(size.blocks))
        self.norm = nn.RMSNorm(size.width, eps=1e-5)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def angles(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dim = self.size.width // self.size.heads
        steps = torch.arange(0, dim, 2, device=position.device).float()
        angle = torch.outer(position.float(), 1.0 / (10000 ** (steps / dim)))
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        angles = self.angles(torch.arange(x.shape[1], device=x.device), x.dtype)
        for layer in self.layers:
            x = checkpoint(layer, x, *angles, use_reentrant=False) if self.recompute else layer(x, *angles)
        return self.norm(x)

    def prefill(self, x: Tensor) -> tuple[Tensor, list]:
        """Hidden states, and keys and values of every layer."""
        angles, cache = self.angles(torch.arange(x.shape[1], device=x.device), x.dtype), []
        for layer in self.layers:
            x, *kept = layer(x, *angles, keep=True)
            cache.append(kept)
        return self.norm(x), cache

    def step(self, x: Tensor, caches: list[tuple[Tensor, Tensor]], place: Tensor) -> Tensor:
        """One token per sequence at column `place` (int64 `[1]`) of the caches, whose earlier columns are filled."""
        angles = self.angles(place, x.dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, *angles, cache=(*cache, place))
        return self.norm(x)
