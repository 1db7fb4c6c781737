# SPDX-License-Identifier: Apache-2.0
"""Variants of the gated attention unit, for studies: the ablations of the paper's table 1 that `FlashConfig` cannot
express, and forms of the global branch that were tried against the paper's.

Only what differs is here: the model, its documents, heads and losses are FLASH's. Plain torch, no decoding cache.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from flash_hf.attention_flash import Heads, chunk_products, local_attention, offset_scale, quadratic_attention, wide
from flash_hf.chunking_flash import ChunkLayout, QuadraticLayout, chunk_layout
from flash_hf.configuration_flash import FlashConfig
from flash_hf.modeling_flash import (
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashGatedAttentionUnit,
    FlashLayer,
    FlashModel,
    FlashPreTrainedModel,
)


CHUNK_WEIGHTINGS = ("mean", "decay")


@strict
class GAUConfig(FlashConfig):
    r"""
    `FlashConfig` with what only studies change.

    Args:
        num_heads (`int`, defaults to 1): Queries, keys and values are cut into as many parts; the relative bias is
            shared.
        gated (`bool`, defaults to `True`): Multiply the attended values by u. Without it there is no `u_proj`; an
            `expansion_factor` of 3 instead of 2 then keeps the parameters.
        chunk_weighting (`str`, defaults to `"mean"`): How chunks enter the global state: all alike (`"mean"`), or by
            `decay^age` with a learnt decay for each pair of key dimensions (`"decay"`); either way their weights add
            up to 1.
        global_norm (`bool`, defaults to `False`): Normalise the global branch's output (RMS, one learnt gain a
            channel, which begins at 0).
        attended_norm (`bool`, defaults to `False`): Normalise what the unit gates, both branches together (RMS, one
            learnt gain a channel, which begins at 1): the unit then has an output from the first step on.
        global_rope (`bool`, defaults to `True`): Turn the global queries and keys by RoPE.
        key_shift (`bool`, defaults to `False`): Make a token's global key from the token before it, so that values
            are stored under what precedes them.
        conv_size (`int`, defaults to 0): Add to the unit's normalised input a convolution of each channel over so
            many tokens, the last of which is its own, within the document; causal models only, documents without
            holes.
        conv_init (`float`, defaults to 0.0): It begins at random up to this, evenly.
        token_shift (`bool`, defaults to `False`): Take the first half of the channels of the unit's normalised input
            from the token before, within the document (0 at its first); documents without holes.
        wide_every, wide_chunk (`int`, default to 0): Every `wide_every`-th layer has chunks of `wide_chunk` tokens.
    """

    model_type = "flash_hf_gau"

    num_heads: int = 1
    gated: bool = True
    chunk_weighting: str = "mean"
    global_norm: bool = False
    attended_norm: bool = False
    global_rope: bool = True
    key_shift: bool = False
    conv_size: int = 0
    conv_init: float = 0.0
    token_shift: bool = False
    wide_every: int = 0
    wide_chunk: int = 0
    use_cache: bool = False
    backend: str = "torch"

    def validate_variants(self):
        """Check the fields that FLASH does not have."""

        def refuse(name: str, rule: str):
            raise ValueError(f"GAUConfig: `{name}` must be {rule}, got {getattr(self, name)!r}.")

        if self.chunk_weighting not in CHUNK_WEIGHTINGS:
            refuse("chunk_weighting", f"one of {', '.join(map(repr, CHUNK_WEIGHTINGS))}")
        if self.global_form != "paper":
            refuse("global_form", "'paper': key_shift and global_rope stand for the other one")
        half = self.query_key_dim // 2  # RoPE turns pairs, which stay in one head
        if self.num_heads < 1 or half % self.num_heads or self.intermediate_size % self.num_heads:
            refuse("num_heads", "a divisor of half of query_key_dim and of the width of the values")
        if self.num_heads > 1 and self.rope_interleaved:
            refuse("rope_interleaved", "False with several heads")
        if self.num_heads > 1 and self.attention_type != "quadratic" and self.chunk_weighting != "mean":
            refuse("chunk_weighting", "'mean' with several heads")
        if self.conv_size < 0 or (self.conv_size and not self.is_decoder):
            refuse("conv_size", "0, or with is_decoder=True the tokens of a convolution")
        if bool(self.wide_every) != bool(self.wide_chunk) or self.wide_every < 0 or self.wide_chunk < 0:
            refuse("wide_every", "given together with wide_chunk")
        if self.backend != "torch":
            refuse("backend", "'torch': variants have no kernels")


# ------------------------------------------------------------------------------------------------------------------
# Forms of the global branch
# ------------------------------------------------------------------------------------------------------------------
def chunk_weights(
    layout: ChunkLayout, decay_S: Tensor | None, *, causal: bool, tokens_BG: Tensor, dtype: torch.dtype
) -> Tensor:
    """How much chunk h counts in the state that chunk g reads, `[B or 1, S or 1, G, G]`, over the sum of
    `weight * tokens`: `decay^(g - 1 - h)` for earlier chunks of the document, or, if not causal, `decay^|g - h|`.

    Args:
        decay_S: in (0, 1), or None for 1.
        tokens_BG: real tokens of every chunk.
    """
    G = tokens_BG.shape[-1]
    chunk_G = torch.arange(G, device=tokens_BG.device)
    age_GG = chunk_G[:, None] - chunk_G[None, :]
    seen_BGG = (age_GG > 0)[None] if causal else torch.ones_like(age_GG, dtype=torch.bool)[None]
    if layout.first_BG is not None:
        seen_BGG = seen_BGG & (layout.first_BG[:, :, None] == layout.first_BG[:, None, :])
    weight = seen_BGG[:, None].to(dtype)
    if decay_S is not None:
        age_GG = (age_GG - 1).clamp(min=0) if causal else age_GG.abs()
        weight = weight * decay_S[:, None, None] ** age_GG
    total = (weight * tokens_BG[:, None, None, :]).sum(-1, keepdim=True)
    return torch.where(total > 0, weight / total.clamp(min=torch.finfo(total.dtype).tiny), 0)


def global_attention(
    lin_q_BGCS: Tensor, lin_k_BGCS: Tensor, value_BGCE: Tensor, layout: ChunkLayout, decay_S: Tensor | None,
    *, causal: bool,
) -> Tensor:  # fmt: skip
    """`lin_q (sum_h w_gh sum_c k v^T)` with [`chunk_weights`] w, `[B, G, C, E]`. G^2 weights: for studies only."""
    product_BGSE = chunk_products(lin_k_BGCS, value_BGCE)
    B, _, S, _ = product_BGSE.shape
    tokens_BG = layout.occupied_BGC.sum(-1)
    weight = chunk_weights(layout, decay_S, causal=causal, tokens_BG=tokens_BG, dtype=product_BGSE.dtype)
    states = torch.einsum("bsgh,bhse->bgse", weight.expand(B, S, -1, -1), product_BGSE)
    return lin_q_BGCS @ states.to(lin_q_BGCS.dtype)


class RMSGain(nn.Module):
    """`x / rms(x)` times one gain a channel."""

    def __init__(self, width: int, eps: float, gain: float):
        super().__init__()
        self.weight, self.eps, self.gain = nn.Parameter(torch.empty(width)), eps, gain

    def forward(self, x: Tensor) -> Tensor:
        x_wide = x.to(wide(x.dtype))
        return (x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def positions_of(layout: ChunkLayout | QuadraticLayout) -> Tensor:
    """Position of every token in its document, `[B or 1, N]`."""
    if isinstance(layout, QuadraticLayout):
        return layout.position_BN
    return layout.merge(layout.position_BGC[..., None])[..., 0]


def earlier(x_BND: Tensor, j: int, position_BN: Tensor) -> Tensor:
    """Of every token the one that is j before it in the document; 0 where there is none."""
    return F.pad(x_BND, (0, 0, j, 0))[:, : x_BND.shape[1]].masked_fill((position_BN < j)[..., None], 0)


def convolved(x_BND: Tensor, weight_KD: Tensor, position_BN: Tensor) -> Tensor:
    """`sum_j weight_j x_(t - j)` over the K last tokens of the document."""
    return sum(weight_D * (earlier(x_BND, j, position_BN) if j else x_BND) for j, weight_D in enumerate(weight_KD))


# ------------------------------------------------------------------------------------------------------------------
# The unit
# ------------------------------------------------------------------------------------------------------------------
class VariantGatedAttentionUnit(FlashGatedAttentionUnit):
    """The unit with the variants of [`GAUConfig`]."""

    def __init__(self, config: GAUConfig, layer_idx: int, causal: bool):
        super().__init__(config, layer_idx, causal)
        if not config.gated:
            self.u_proj = None
        self.chunk_size = config.chunk_size
        if config.wide_every and layer_idx % config.wide_every == config.wide_every - 1:
            self.chunk_size = config.wide_chunk
            if config.relative_bias == "toeplitz" and self.has_quad:
                self.relative_bias.span = self.chunk_size
                self.relative_bias.weight = nn.Parameter(torch.empty(2 * self.chunk_size - 1))
        self.conv = nn.Parameter(torch.empty(config.conv_size, config.hidden_size)) if config.conv_size else None
        self.decay_logit = self.out_norm = self.attended_norm = None
        if self.has_lin and config.chunk_weighting == "decay":
            # RoPE's pairs share one decay, or turning them would not be a turn.
            self.decay_logit = nn.Parameter(torch.empty(config.query_key_dim // 2))
        if self.has_lin and config.global_norm:
            self.out_norm = RMSGain(config.intermediate_size, config.norm_eps, 0.0)
        if config.attended_norm:
            # The mean square of what the paper's scales let through begins at 1e-9 or less.
            self.attended_norm = RMSGain(config.intermediate_size, 1e-12, 1.0)

    def own_grid(self, layout: ChunkLayout, documents, rotary, batch: int):
        """Layout and angles of this layer, where its chunks are not those of all."""
        if self.chunk_size == self.config.chunk_size:
            return layout, rotary
        own = chunk_layout(
            documents, batch, self.chunk_size, causal=self.is_causal, shift=self.config.shift_of(self.layer_idx)
        )
        return own, None if rotary is None else [own.split(layout.merge(table)) for table in rotary]

    def forward(self, x_BND, layout, documents, rotary, bias_rotary, bias_length, past_key_values=None) -> Tensor:
        """As [`FlashGatedAttentionUnit`]; without a cache."""
        if past_key_values is not None:
            raise ValueError("past_key_values must be None: variants of the unit have no decoding cache.")
        config = self.config
        if self.conv is not None:
            x_BND = x_BND + convolved(x_BND, self.conv, positions_of(layout))
        if config.token_shift:
            half = x_BND.shape[2] // 2
            x_BND = torch.cat([earlier(x_BND[..., :half], 1, positions_of(layout)), x_BND[..., half:]], -1)
        u_BNE = None if self.u_proj is None else self.act_fn(self.u_proj(x_BND))
        v_BNE, z_BNS = self.act_fn(self.v_proj(x_BND)), self.act_fn(self.z_proj(x_BND))
        settings = {
            "causal": self.is_causal, "activation": config.attention_activation, "divisor": config.attention_divisor,
            "dropout": config.attention_dropout if self.training else 0.0,
        }  # fmt: skip
        if isinstance(layout, QuadraticLayout):
            bias_R = None if self.relative_bias is None else self.relative_bias(bias_length, bias_rotary)
            heads = self.heads(z_BNS, rotary)
            out_BNE = multi_head(heads, v_BNE, layout, config.num_heads, bias_R=bias_R, **settings)
        else:
            layout, rotary = self.own_grid(layout, documents, rotary, v_BNE.shape[0])
            out_BNE = self.mixed(v_BNE, z_BNS, layout, rotary, bias_rotary, settings)
        if self.attended_norm is not None:
            out_BNE = self.attended_norm(out_BNE)
        return self.o_proj(out_BNE if u_BNE is None else u_BNE * out_BNE)

    def mixed(self, v_BNE, z_BNS, layout: ChunkLayout, rotary, bias_rotary, settings: dict) -> Tensor:
        heads, bias_R = self.heads(layout.split(z_BNS), rotary), None
        if self.has_quad and self.relative_bias is not None:
            bias_R = self.relative_bias(layout.position_BGC.shape[2], bias_rotary)
        if self.has_lin:
            lin_q, lin_k = self.lin_heads(heads, z_BNS, layout, rotary)
            heads = heads._replace(lin_q=lin_q, lin_k=lin_k)
        decay_S = None if self.decay_logit is None else torch.sigmoid(self.decay_logit.to(wide(z_BNS.dtype)))
        decay_S = None if decay_S is None else torch.cat([decay_S, decay_S])
        locals_, remotes = [], []
        for part, value in cut(heads, layout.split(v_BNE), self.config.num_heads):
            if self.has_quad:
                locals_.append(local_attention(part.quad_q, part.quad_k, value, layout, bias_R=bias_R, **settings))
            if self.has_lin:
                remotes.append(global_attention(part.lin_q, part.lin_k, value, layout, decay_S, causal=self.is_causal))
        out = torch.cat(locals_, -1) if locals_ else 0
        if remotes:
            remote = torch.cat(remotes, -1)
            out = out + (remote if self.out_norm is None else self.out_norm(remote))
        return layout.merge(out)

    def lin_heads(self, heads: Heads, z_BNS: Tensor, layout: ChunkLayout, rotary) -> tuple[Tensor, Tensor]:
        """Global queries and keys, with the variants' changes."""
        config = self.config
        if config.global_rope and not config.key_shift:
            return heads.lin_q, heads.lin_k
        made = []
        for row, shift in ((-2, False), (-1, config.key_shift)):
            z = earlier(z_BNS, 1, positions_of(layout)) if shift else z_BNS
            gamma, beta = self.offset_scale.weight[row][None], self.offset_scale.bias[row][None]
            turned = rotary if config.global_rope else None
            made.append(offset_scale(layout.split(z), gamma, beta, turned,
                                     interleaved=config.rope_interleaved)[..., 0, :])  # fmt: skip
        return tuple(made)


def cut(heads: Heads, value: Tensor, count: int) -> Iterator[tuple[Heads, Tensor]]:
    """`count` parts of queries, keys and values, each as one head. Of the basis a head takes every `count`-th
    dimension: the two of a pair that RoPE turns are half of the dimensions apart."""
    for index, part in enumerate(value.chunk(count, -1)):
        yield Heads(*(None if x is None else x[..., index::count] for x in heads)), part


def multi_head(heads: Heads, v_BNE: Tensor, layout: QuadraticLayout, count: int, **settings) -> Tensor:
    """[`quadratic_attention`] for `count` parts of queries, keys and values by themselves, `[B, N, E]`."""
    return torch.cat([quadratic_attention(part.quad_q, part.quad_k, value, layout, **settings)
                      for part, value in cut(heads, v_BNE, count)], -1)  # fmt: skip


class GAULayer(FlashLayer):
    """`x + GAU(norm(x))` with a variant of the unit."""

    def __init__(self, config: GAUConfig, layer_idx: int, causal: bool):
        super().__init__(config, layer_idx, causal)
        self.gau = VariantGatedAttentionUnit(config, layer_idx, causal)


class GAUPreTrainedModel(FlashPreTrainedModel):
    config: GAUConfig
    _no_split_modules = ["GAULayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, RMSGain):
            init.constant_(module.weight, module.gain)
        elif isinstance(module, VariantGatedAttentionUnit):
            if module.decay_logit is not None:
                # From the last chunk alone to hundreds of chunks.
                init.copy_(module.decay_logit, torch.linspace(-3, 6, len(module.decay_logit)))
            if module.conv is not None:
                init.uniform_(module.conv, -self.config.conv_init, self.config.conv_init)


class GAUModel(GAUPreTrainedModel, FlashModel):
    """FLASH without a head, of [`GAUConfig`]."""

    def __init__(self, config: GAUConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [GAULayer(config, layer_idx, self.is_causal) for layer_idx in range(config.num_hidden_layers)]
        )
        self.post_init()


class GAUForCausalLM(GAUPreTrainedModel, FlashForCausalLM):
    """A causal language model of [`GAUConfig`]; it has no cache, so it does not generate."""

    def __init__(self, config: GAUConfig):
        super().__init__(config)
        self.model = GAUModel(self.config)
        self.post_init()


class GAUForMaskedLM(GAUPreTrainedModel, FlashForMaskedLM):
    """A masked language model of [`GAUConfig`]."""

    def __init__(self, config: GAUConfig):
        super().__init__(config)
        self.model = GAUModel(self.config)
        self.post_init()


__all__ = ["CHUNK_WEIGHTINGS", "GAUConfig", "GAUForCausalLM", "GAUForMaskedLM", "GAUModel"]
