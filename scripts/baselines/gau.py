# SPDX-License-Identifier: Apache-2.0
"""Variants of the gated attention unit, for studies: the ablations of the paper's table 1 that `FlashConfig` cannot
express, and forms of the local and global branch that were tried against the paper's.

Only the differences are here: model, documents, heads and losses are FLASH's. Plain PyTorch, without a decoding cache.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from flash_hf.attention_flash import (
    QueryKeys,
    activate,
    chunk_products,
    local_attention,
    offset_scale,
    previous_keys,
    quadratic_attention,
    score_scale,
    shifted_dims,
    toeplitz,
    wide,
)
from flash_hf.chunking_flash import ChunkLayout, Places, QuadraticLayout, chunk_layout, quadratic_layout
from flash_hf.configuration_flash import FlashConfig
from flash_hf.delta_flash import delta_attention
from flash_hf.modeling_flash import (
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashGatedAttentionUnit,
    FlashLayer,
    FlashModel,
    FlashOffsetScale,
    FlashPreTrainedModel,
    FlashToeplitzBias,
)


CHUNK_WEIGHTINGS = ("mean", "decay")


@strict
class GAUConfig(FlashConfig):
    r"""
    `FlashConfig` with options for studies.

    Args:
        num_heads (`int`, defaults to 1): Queries, keys and values are cut into this many parts; the relative bias is
            shared.
        gated (`bool`, defaults to `True`): Multiply the attended values by u. Without it there is no `u_proj`; an
            `expansion_factor` of 3 instead of 2 then keeps the parameters.
        chunk_weighting (`str`, defaults to `"mean"`): Weights of chunks in the global state: equal (`"mean"`), or
            `decay^age` with a learnt decay for each pair of key dimensions (`"decay"`); in both cases they sum to 1.
        global_norm (`bool`, defaults to `False`): Normalise the output of the global branch (RMS, one learnt gain
            per channel, which starts at 0).
        attended_norm (`bool`, defaults to `False`): Normalise the sum of both branches before the gate (RMS, one
            learnt gain per channel, which starts at 1), so that the unit has an output from the first step on.
        global_rope (`bool`, defaults to `True`): Apply RoPE to global queries and keys.
        key_shift (`bool`, defaults to `False`): Shifted keys: make a token's global key from the token before it.
        conv_size (`int`, defaults to 0): Add to the unit's normalised input a causal convolution of each channel over
            this many tokens of the document; causal models only, documents without padding inside.
        conv_init (`float`, defaults to 0.0): Its weights are sampled uniformly up to this magnitude.
        token_shift (`bool`, defaults to `False`): Take the first half of the channels of the unit's normalised input
            from the token before (0 at the first of a document); documents without padding inside.
        wide_every, wide_chunk (`int`, default to 0): Every `wide_every`-th layer has chunks of `wide_chunk` tokens.
        local_heads (`int`, defaults to 1): Heads of the local part, each with its own scales of the whole basis, its
            own relative bias and its part of the values.
        gated_mean (`bool`, defaults to `False`): Global queries read a mean with learnt weights and decays, see
            [`gated_global`]. Causal models only.
        global_gates (`int`, defaults to 8): With `gated_mean`, parts of the values with separate decays.
        global_features (`bool`, defaults to `False`): With `gated_mean`, exponential features, see [`gated_global`].
        quadratic_every (`int`, defaults to 0): Every `quadratic_every`-th layer is one attention over the
            document with softmax, T5's bias and RoPE: a hybrid, with quadratic cost and a cache that grows.
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
    local_heads: int = 1
    gated_mean: bool = False
    global_gates: int = 8
    global_features: bool = False
    quadratic_every: int = 0
    use_cache: bool = False
    backend: str = "torch"

    def validate_variants(self):
        """Check the fields beyond FlashConfig's."""

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
        for name, plain in (("gated_mean", False), ("global_state", "mean")):
            if getattr(self, name) == plain:
                continue
            if not self.is_decoder or self.attention_type not in ("mixed_chunk", "global"):
                refuse(name, f"{plain!r} unless is_decoder=True and there is a global part")
            if self.chunk_weighting != "mean" or self.num_heads != 1:
                refuse(name, f"{plain!r} with a decay of chunks or several heads")
        if self.gated_mean and self.global_state != "mean":
            refuse("gated_mean", "False with another global_state")
        if self.global_gates < 1 or self.intermediate_size % self.global_gates:
            refuse("global_gates", "a divisor of the width of the values")
        if self.global_features and not self.gated_mean:
            refuse("global_features", "False without gated_mean=True")
        if self.local_window > 1 and not self.is_decoder:
            refuse("local_window", "1 unless is_decoder=True")
        if self.local_heads < 1 or self.intermediate_size % self.local_heads:
            refuse("local_heads", "a divisor of the width of the values")
        for name, plain in (("local_window", 1), ("local_heads", 1), ("local_key_shift", False)):
            if getattr(self, name) != plain and (
                self.attention_type in ("quadratic", "global")
                or self.num_heads > 1
                or self.wide_every
                or self.relative_bias != "toeplitz"
                or self.attention_dropout
            ):
                refuse(name, f"{plain} without a local part, and with num_heads, wide_every, dropout or another bias "
                       "than 'toeplitz'")  # fmt: skip
        if self.quadratic_every < 0 or (self.quadratic_every and self.attention_type == "quadratic"):
            refuse("quadratic_every", "0 or more, and 0 where all layers are quadratic")
        if self.backend != "torch":
            refuse("backend", "'torch': variants have no kernels")


# ------------------------------------------------------------------------------------------------------------------
# Forms of the global branch
# ------------------------------------------------------------------------------------------------------------------
def chunk_weights(
    layout: ChunkLayout, decay_S: Tensor | None, *, causal: bool, tokens_BG: Tensor, dtype: torch.dtype
) -> Tensor:
    """Weights of chunks h in the state that chunk g reads, `[B or 1, S or 1, G, G]`, normalised by the sum of
    `weight * tokens`: `decay^(g - 1 - h)` for earlier chunks of the document, or, if not causal, `decay^|g - h|`.

    Args:
        decay_S: In (0, 1), or None for 1.
        tokens_BG: Real tokens of every chunk.
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


def window_of(x_BGCF: Tensor, chunks: int) -> Tensor:
    """For each chunk, its own slots and those of the `chunks - 1` before it, `[B, G, chunks * C, F]`; 0 where there
    are none."""
    padded = F.pad(x_BGCF, (0, 0, 0, 0, chunks - 1, 0))
    G = x_BGCF.shape[1]
    return torch.cat([padded[:, index : index + G] for index in range(chunks)], 2)


def window_attention(
    q_BGHCS: Tensor, k_BGHWS: Tensor, value_BGWE: Tensor, layout: ChunkLayout, bias_HR: Tensor, *, causal: bool,
    activation: str, divisor: float,
) -> Tensor:  # fmt: skip
    """Local attention of several heads over windows of chunks, `[B, G, C, E]`; W is a multiple of C, and the last C
    slots are the chunk's own.

    Args:
        bias_HR: Relative bias of each head for the offsets `-(W-1) ... W-1`.
    """
    B, G, H, C, S = q_BGHCS.shape
    W = k_BGHWS.shape[3]
    chunks = W // C
    scores = (q_BGHCS @ (k_BGHWS * score_scale(activation, divisor, S)).transpose(-1, -2)).to(bias_HR.dtype)
    scores = scores + torch.stack([toeplitz(bias_R, W)[W - C :] for bias_R in bias_HR])
    seen_BGW = window_of(layout.occupied_BGC[..., None].to(torch.uint8), chunks)[..., 0] > 0
    if layout.first_BG is not None:
        # Packed rows: mask the chunks of other documents.
        age_W = torch.arange(chunks - 1, -1, -1, device=seen_BGW.device).repeat_interleave(C)
        chunk_G = torch.arange(G, device=seen_BGW.device)
        seen_BGW = seen_BGW & (chunk_G[:, None] - age_W >= layout.first_BG[..., None])
    seen = seen_BGW[:, :, None, None]
    if causal:
        seen = seen & torch.ones(C, W, dtype=torch.bool, device=seen.device).tril(W - C)
    # As in local_attention: under a softmax an empty slot without visible keys must stay finite.
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min if activation == "softmax" else -torch.inf)
    weights = activate(scores, activation).to(value_BGWE.dtype)
    out = weights @ value_BGWE.unflatten(3, (H, -1)).transpose(2, 3)
    return out.transpose(2, 3).flatten(3)


def carried_on(layout: ChunkLayout, g: int, *states: Tensor) -> tuple[Tensor, ...]:
    """States `[B, ...]` as read by chunk g: 0 where it starts a document of a packed row."""
    if layout.first_BG is None:
        return states
    same_B = layout.first_BG[:, g] < g
    return tuple(torch.where(same_B.view(-1, *[1] * (state.ndim - 1)), state, 0) for state in states)


def summed(forget_BGCX: Tensor) -> Tensor:
    """Running sums over the slots of each chunk, by a product, since torch 2.11 cannot compile this cumsum."""
    C = forget_BGCX.shape[2]
    lower = torch.ones(C, C, dtype=forget_BGCX.dtype, device=forget_BGCX.device).tril()
    with torch.autocast(forget_BGCX.device.type, enabled=False):
        return lower @ forget_BGCX


def gated_global(
    lin_q_BGCS: Tensor, lin_k_BGCS: Tensor, value_BGCE: Tensor, forget_BGCH: Tensor, write_BGCH: Tensor,
    layout: ChunkLayout, *, features: bool = False,
) -> Tensor:  # fmt: skip
    """A mean over earlier chunks with learnt weights and decays of tokens, separate for each of H parts of the values,
    `[B, G, C, E]`.

    With `a = exp(forget)` and the weights `w_tj = write_j a_(j+1) ... a_t`, token t of a chunk whose first token is b
    reads `q_t (sum_(j<b) w_tj k_j v_j^T) / (sum_(j<b) w_(b-1)j)`. Without decay and with equal writes
    this is FLASH's mean. The weights are those of Mamba-2 (arXiv 2405.21060): one scalar per token and head.

    Args:
        forget_BGCH: Logarithms of the decays, at most 0; 0 at empty slots.
        write_BGCH: At least 0; 0 at empty slots.
        features: Use `exp(k)` and `softmax(q)` instead of k and q, and one denominator per dimension, so that the
            state is S means of the values and a token reads a mean of these.
    """
    G, H = value_BGCE.shape[1], forget_BGCH.shape[3]
    since_BGCH = summed(forget_BGCH)
    all_BGH = since_BGCH[:, :, -1]
    kept_BGCH = write_BGCH * torch.exp(all_BGH[:, :, None] - since_BGCH)
    weighted = (value_BGCE.unflatten(3, (H, -1)) * kept_BGCH[..., None].to(value_BGCE.dtype)).flatten(3)
    if features:
        key = torch.exp(lin_k_BGCS.to(kept_BGCH.dtype).clamp(-15, 15))
        mass_BGSH = chunk_products(key, kept_BGCH)
        lin_q_BGCS = torch.softmax(lin_q_BGCS.to(kept_BGCH.dtype), -1).to(value_BGCE.dtype)
        product_BGSE = chunk_products(key.to(value_BGCE.dtype), weighted)
    else:
        mass_BGSH = kept_BGCH.sum(2, keepdim=True)
        product_BGSE = chunk_products(lin_k_BGCS, weighted)
    product_BGSHP, factor_BGH = product_BGSE.unflatten(3, (H, -1)), torch.exp(all_BGH)
    state, mass = torch.zeros_like(product_BGSHP[:, 0]), torch.zeros_like(mass_BGSH[:, 0])
    means = []
    for g in range(G):
        state, mass = carried_on(layout, g, state, mass)
        means.append(state / mass.clamp(min=1e-6)[..., None])
        factor = factor_BGH[:, g, None, :]
        state, mass = state * factor[..., None] + product_BGSHP[:, g], mass * factor + mass_BGSH[:, g]
    states = torch.stack(means, 1).flatten(3).to(lin_q_BGCS.dtype)
    read_BGCH1 = torch.exp(since_BGCH).to(lin_q_BGCS.dtype)[..., None]
    return ((lin_q_BGCS @ states).unflatten(3, (H, -1)) * read_BGCH1).flatten(3)


class RMSGain(nn.Module):
    """`x / rms(x)` times one gain per channel."""

    def __init__(self, width: int, eps: float, gain: float):
        super().__init__()
        self.weight, self.eps, self.gain = nn.Parameter(torch.empty(width)), eps, gain

    def forward(self, x: Tensor) -> Tensor:
        x_wide = x.to(wide(x.dtype))
        return (x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class LocalBias(FlashToeplitzBias):
    """A relative bias for each of H heads over a window, `[H, 2 * span - 1]`."""

    def __init__(self, config: GAUConfig, span: int):
        nn.Module.__init__(self)
        self.span, self.softmax = span, config.attention_activation == "softmax"
        self.weight = nn.Parameter(torch.empty(config.local_heads, 2 * span - 1))

    def recent(self) -> Tensor:
        """As in FLASH. A softmax starts with the same ratios and half of the weight of a full window here."""
        if not self.softmax:
            return super().recent()
        distance = (torch.arange(2 * self.span - 1, device=self.weight.device) - self.span + 1).abs()
        share = self.weight.new_tensor(self.RECENT).square()
        raised = self.weight.new_zeros(max(self.span, len(share)))
        raised[: len(share)] = (share / share.sum() * self.span).log()
        return self.weight + raised[distance]

    def forward(self, length: int, rotary=None) -> Tensor:
        return self.weight[:, self.span - length : self.span + length - 1]


class ScaleRows(FlashOffsetScale):
    """The rotated queries and keys that a variant needs."""

    def __init__(self, config: GAUConfig, rows: int):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(rows, config.query_key_dim))
        self.bias = nn.Parameter(torch.zeros(rows, config.query_key_dim))
        self.rotated = rows


def positions_of(layout: ChunkLayout | QuadraticLayout) -> Tensor:
    """Position of every token in its document, `[B or 1, N]`."""
    if isinstance(layout, QuadraticLayout):
        return layout.position_BN
    return layout.merge(layout.position_BGC[..., None])[..., 0]


def earlier(x_BND: Tensor, j: int, position_BN: Tensor) -> Tensor:
    """The token j places before each token in its document; 0 where there is none."""
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
        self.quadratic = bool(config.quadratic_every) and layer_idx % config.quadratic_every == (
            config.quadratic_every - 1
        )
        if self.quadratic:
            self.has_quad, self.has_lin, self.relative_bias = True, False, None
            self.offset_scale = ScaleRows(config, 2)
        H = config.local_heads
        self.windowed = not self.quadratic and self.has_quad and (
            max(config.local_window, H) > 1 or config.local_key_shift or (
                config.attention_activation == "softmax" and config.attention_type != "quadratic"
            )
        )  # fmt: skip
        if self.windowed:
            self.relative_bias = LocalBias(config, config.local_window * config.chunk_size)
            self.offset_scale = ScaleRows(config, 2 * (H + self.has_lin))
        # Not the library's gates: those of kept trainings have this shape.
        self.gate_proj, self.gate_bias, self.delta = None, None, False
        if self.has_lin and (config.gated_mean or config.global_state == "delta"):
            gates = config.global_gates if config.gated_mean else 1
            self.gate_proj = nn.Linear(config.hidden_size, 2 * gates, bias=False)
            self.gate_bias = nn.Parameter(torch.empty(2, gates))
        self.chunk_size = config.chunk_size
        if config.wide_every and layer_idx % config.wide_every == config.wide_every - 1:
            self.chunk_size = config.wide_chunk
            if config.relative_bias == "toeplitz" and self.has_quad:
                self.relative_bias.span = self.chunk_size
                self.relative_bias.weight = nn.Parameter(torch.empty(2 * self.chunk_size - 1))
        self.conv = nn.Parameter(torch.empty(config.conv_size, config.hidden_size)) if config.conv_size else None
        self.decay_logit = self.out_norm = self.attended_norm = None
        if self.has_lin and config.chunk_weighting == "decay":
            # The two dimensions of a RoPE pair share one decay, so that rotation stays a rotation.
            self.decay_logit = nn.Parameter(torch.empty(config.query_key_dim // 2))
        if self.has_lin and config.global_norm:
            self.out_norm = RMSGain(config.intermediate_size, config.norm_eps, 0.0)
        if config.attended_norm:
            # With the paper's scales the mean square starts at 1e-9 or less.
            self.attended_norm = RMSGain(config.intermediate_size, 1e-12, 1.0)

    def own_grid(self, layout: ChunkLayout, documents, rotary, batch: int):
        """Layout and angles of this layer, if its chunks differ from those of the other layers."""
        if self.chunk_size == self.config.chunk_size:
            return layout, rotary
        own = chunk_layout(
            documents, batch, self.chunk_size, causal=self.is_causal, shift=self.config.shift_of(self.layer_idx)
        )
        return own, None if rotary is None else [own.split(layout.merge(table)) for table in rotary]

    def forward(self, x_BND: Tensor, places: Places, cache=None) -> Tensor:
        """As [`FlashGatedAttentionUnit`], without a cache."""
        if cache is not None:
            raise ValueError("cache must be None: variants of the unit have no decoding cache.")
        config, layout, rotary = self.config, places.layout, places.rotary
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
        if self.quadratic:
            rotary = None if rotary is None else [layout.merge(table) for table in rotary]
            layout = quadratic_layout(places.documents, x_BND.shape[0], causal=self.is_causal)
            settings["activation"] = "softmax"
        if isinstance(layout, QuadraticLayout):
            heads = self.query_keys(z_BNS, rotary)
            out_BNE = multi_head(heads, v_BNE, layout, config.num_heads, bias_R=self.bias(places), **settings)
        else:
            layout, rotary = self.own_grid(layout, places.documents, rotary, v_BNE.shape[0])
            out_BNE = self.mixed(x_BND, v_BNE, z_BNS, layout, rotary, places.bias_rotary, settings)
        if self.attended_norm is not None:
            out_BNE = self.attended_norm(out_BNE)
        return self.o_proj(out_BNE if u_BNE is None else u_BNE * out_BNE)

    def mixed(self, x_BND, v_BNE, z_BNS, layout: ChunkLayout, rotary, bias_rotary, settings: dict) -> Tensor:
        if self.windowed or self.gate_proj is not None:
            return layout.merge(self.mixed_variant(x_BND, layout.split(v_BNE), z_BNS, layout, rotary))
        heads, bias_R = self.query_keys(layout.split(z_BNS), rotary), None
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

    def mixed_variant(self, x_BND, v_BGCE, z_BNS, layout: ChunkLayout, rotary) -> Tensor:
        """Both parts, with another local part or another state for the global one, `[B, G, C, E]`."""
        config, out = self.config, 0
        made = self.offset_scale(layout.split(z_BNS), rotary)
        if self.has_quad and self.windowed:
            H, chunks = config.local_heads, config.local_window
            key = torch.stack(made[H : 2 * H], 2)
            if config.local_key_shift:
                before = torch.stack([previous_keys(head, layout, None) for head in made[H : 2 * H]], 2)
                key = torch.where(shifted_dims(key.shape[-1], config.rope_interleaved, key.device), before, key)
            key = torch.stack([window_of(head, chunks) for head in key.unbind(2)], 2)
            bias_HR = self.relative_bias(chunks * v_BGCE.shape[2]).to(wide(v_BGCE.dtype))
            out = window_attention(
                torch.stack(made[:H], 2), key, window_of(v_BGCE, chunks), layout, bias_HR, causal=self.is_causal,
                activation=config.attention_activation, divisor=config.attention_divisor,
            )  # fmt: skip
        elif self.has_quad:
            bias_R = None if self.relative_bias is None else self.relative_bias(v_BGCE.shape[2])
            out = local_attention(
                made[0], made[1], v_BGCE, layout, causal=self.is_causal, activation=config.attention_activation,
                divisor=config.attention_divisor, bias_R=bias_R,
            )  # fmt: skip
        if self.has_lin:
            lin_q, lin_k = self.lin_heads(QueryKeys(None, None, *made[-2:]), z_BNS, layout, rotary)
            remote = self.remote(x_BND, lin_q, lin_k, v_BGCE, layout)
            out = out + (remote if self.out_norm is None else self.out_norm(remote))
        return out

    def remote(self, x_BND, lin_q, lin_k, v_BGCE, layout: ChunkLayout) -> Tensor:
        config = self.config
        occupied = layout.occupied_BGC[..., None].to(wide(v_BGCE.dtype))
        if self.gate_proj is None:
            if not self.is_causal:
                return global_attention(lin_q, lin_k, v_BGCE, layout, None, causal=False)
            return gated_global(lin_q, lin_k, v_BGCE, torch.zeros_like(occupied), occupied, layout)
        gate = layout.split(self.gate_proj(x_BND)).to(wide(v_BGCE.dtype)).unflatten(-1, (2, -1)) + self.gate_bias
        forget, write = gate.unbind(-2)
        forget, write = F.logsigmoid(forget) * occupied, torch.sigmoid(write) * occupied
        if config.gated_mean:
            return gated_global(lin_q, lin_k, v_BGCE, forget, write, layout, features=config.global_features)
        qk = QueryKeys(None, None, lin_q, lin_k, torch.cat([forget, write], -1))
        return delta_attention(qk, v_BGCE, layout, previous_key=False)[0]

    def lin_heads(self, heads: QueryKeys, z_BNS: Tensor, layout: ChunkLayout, rotary) -> tuple[Tensor, Tensor]:
        """Global queries and keys with the changes of the variant."""
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


def cut(heads: QueryKeys, value: Tensor, count: int) -> Iterator[tuple[QueryKeys, Tensor]]:
    """`count` parts of queries, keys and values, each as one head. A head takes every `count`-th dimension of
    the basis, since the two dimensions of a RoPE pair are half of the width apart."""
    for index, part in enumerate(value.chunk(count, -1)):
        yield QueryKeys(*(None if x is None else x[..., index::count] for x in heads)), part


def multi_head(heads: QueryKeys, v_BNE: Tensor, layout: QuadraticLayout, count: int, **settings) -> Tensor:
    """[`quadratic_attention`] for `count` separate parts of queries, keys and values, `[B, N, E]`."""
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
            if module.gate_bias is not None:
                gates = module.gate_bias.shape[1]
                # Memories of about 256 to 8,192 tokens; the weight of a token starts at one half.
                memory = torch.logspace(8, 13, gates, 2.0) if gates > 1 else torch.full((1,), 8192.0)
                init.copy_(module.gate_bias, torch.stack([memory.log(), torch.zeros(gates)]))
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
