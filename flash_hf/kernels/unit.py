# SPDX-License-Identifier: Apache-2.0
"""The gated attention unit by kernels: from the model's tensors, chunk layout and cache to the operators and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from ..attention_flash import DecodingState, closed_total, score_scale
from ..chunking_flash import ChunkLayout, Places
from . import ops
from .plan import ChunkPlan
from .tiles import saved_attended


def _flat_rotary(rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None, int]:
    """cos and sin as tables `[slots, r / 2]`, and r."""
    if rotary is None:
        return None, None, 0
    half = rotary[0].shape[-1]
    return *(table.float().reshape(-1, half).contiguous() for table in rotary), 2 * half


def _branches(layout: ChunkLayout, has_quad: bool, has_lin: bool, causal: bool, initial, return_state: bool):
    # Within a first chunk the causal global part is zero.
    needed = not causal or layout.position_BGC.shape[1] > 1 or initial is not None or return_state
    return has_quad, has_lin and (needed or not has_quad)


def _decoding_state(
    heads: Tensor,
    final: Tensor,
    value_of: Callable[[Tensor], Tensor],
    key_of: Callable[[Tensor], Tensor] | None,
    places: Places,
    chunk_size: int,
    S: int,
    has_quad: bool,
    has_lin: bool,
) -> DecodingState:
    """The state after these tokens, from what the kernels left.

    Args:
        value_of, key_of: values, and linear keys, of flat tokens. Without `key_of` values go under their own keys.
    """
    layout: ChunkLayout = places.layout
    plan: ChunkPlan = places.plan
    G, C, N = plan.chunks, plan.chunk_size, plan.tokens
    B = heads.shape[1] // G
    device = heads.device
    if layout.final_B is None:
        chunk_B = torch.full((B,), G - 1, device=device)
    else:
        chunk_B = layout.final_B
    flat_B = torch.arange(B, device=device) * G + chunk_B
    if plan.source_K is None:
        column = chunk_B[:, None] * C - plan.shift + torch.arange(C, device=device)
        first = torch.arange(B, device=device)[:, None] * N
        token_BC = torch.where((column >= 0) & (column < N), column + first, -1)
    else:
        token_BC = plan.source_K.view(B * G, C)[flat_B].long()
    value = torch.where((token_BC >= 0)[..., None], value_of(token_BC.clamp(min=0)), 0)
    around = 0, 0, layout.skipped, chunk_size - C - layout.skipped

    def key(row: int) -> Tensor:
        return heads[row].view(B * G, -1, heads.shape[-1])[flat_B, :C, :S]

    lin_k = key(heads.shape[0] - 1) if has_lin else None
    if has_lin and key_of is not None:
        last_B1 = token_BC[:, -1:]
        newest_BS = torch.where(last_B1 >= 0, key_of(token_BC[:, -1].clamp(min=0)).to(lin_k.dtype), lin_k[:, 0])
        lin_k = torch.cat([lin_k, newest_BS[:, None]], 1)
    return DecodingState(
        quad_k=F.pad(key(1), around) if has_quad else None,
        lin_k=F.pad(lin_k, around) if has_lin else None,
        value=F.pad(value, around),
        total=final[:, :S].clone() if has_lin else None,
        seen=layout.seen_after_B.expand(B).clone(),
    )


def gated_attention(
    unit: nn.Module,
    u_BNE: Tensor,
    v_BNE: Tensor,
    z_BNS: Tensor,
    places: Places,
    *,
    bias_R: Tensor | None,
    silu: bool,
    state: DecodingState | None,
    return_state: bool,
) -> tuple[Tensor, DecodingState | None]:
    """`u * mixed_chunk_attention(queries and keys of z, v)` between the projections, `[B, N, E]`, and the state.

    Args:
        unit: a `FlashGatedAttentionUnit`; its configuration and offset-scale are read.
        u_BNE, v_BNE, z_BNS: what the projections gave, bfloat16, float16 or float32.
        places: with its plan.
        bias_R: relative bias, `[2 * C - 1]` for the grid's C, or None.
        silu: whether u, v and z are still to be activated.
        state: what the cache holds, at the border of a chunk in every row unless the plan has `cached` rows; or None.
        return_state: also return the state after these tokens.
    """
    layout: ChunkLayout = places.layout
    plan: ChunkPlan = places.plan
    config, has_quad, has_lin = unit.config, unit.has_quad, unit.has_lin
    gamma_HS, beta_HS = unit.offset_scale.weight, unit.offset_scale.bias
    if plan.cached:
        # The cached slots in front, as tokens whose keys the state has, and whose outputs are dropped.
        if silu:
            u_BNE, v_BNE, z_BNS, silu = F.silu(u_BNE), F.silu(v_BNE), F.silu(z_BNS), False
        value_BCE = torch.where(layout.cached_BC[..., None], state.value, 0)
        v_BNE = torch.cat([value_BCE.to(v_BNE.dtype), v_BNE], 1)
        u_BNE, z_BNS = (F.pad(x, (0, 0, plan.cached, 0)) for x in (u_BNE, z_BNS))
    B, N, E = v_BNE.shape
    S = z_BNS.shape[2]
    cos, sin, rotary_dim = _flat_rotary(places.rotary)
    initial, *kept = _from_cache(state, places, S, has_quad, has_lin, config.previous_key)
    quad, lin = _branches(layout, has_quad, has_lin, unit.is_causal, initial, return_state)
    u, v, z = (_rows(x) for x in (u_BNE, v_BNE, z_BNS))
    out, heads, *_, final = ops.gated_attention(
        u, v, z, gamma_HS, beta_HS, bias_R, cos, sin, plan.source_K, plan.index, initial, *kept, N, plan.chunks,
        plan.chunk_size, plan.shift, unit.is_causal, quad, lin, config.previous_key, silu, config.rope_interleaved,
        rotary_dim, score_scale("relu2", config.attention_divisor, S), return_state and has_lin,
        saved_attended(v.dtype, silu),
    )  # fmt: skip
    new_state = None
    if return_state:

        def activated(x: Tensor, token: Tensor) -> Tensor:
            x = x.detach()[token]
            return F.silu(x) if silu else x

        def key_of(token: Tensor) -> Tensor:
            return activated(z, token).float() * gamma_HS[-1].detach() + beta_HS[-1].detach()

        new_state = _decoding_state(
            heads.detach(), final.detach(), partial(activated, v), key_of if config.previous_key else None, places,
            config.chunk_size, S, has_quad, has_lin,
        )  # fmt: skip
    return out.view(B, N, E)[:, plan.cached :], new_state


def _rows(x_BNF: Tensor) -> Tensor:
    x = x_BNF.reshape(-1, x_BNF.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _from_cache(
    state: DecodingState | None, places: Places, S: int, has_quad: bool, has_lin: bool, previous_key: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What a row's first document brings from the cache: the sum of its closed chunks, on the kernels' padded key
    dimension, the keys of its open chunk `[keys, B, C, S]`, and where these are `[keys, B, C]`; None for nothing."""
    if state is None:
        return None, None, None
    layout: ChunkLayout = places.layout
    amid = places.plan.cached > 0
    initial = None
    if has_lin:
        total = closed_total(state, layout.cached_BC) if amid else state.total
        SP = max(16, triton.next_power_of_2(S))
        initial = F.pad(total * layout.continues_B[:, None, None], (0, 0, 0, SP - S)).contiguous()
    if not amid and not (has_lin and previous_key):
        return initial, None, None
    held_BC, keys, masks = layout.cached_BC, [], []
    if has_quad:
        keys.append(state.quad_k)
        masks.append(held_BC)
    if has_lin:
        key_BCS = state.lin_k[:, : held_BC.shape[1]]
        if previous_key:
            # The next value, too, goes under a key of a cached token.
            slot_C = torch.arange(held_BC.shape[1], device=held_BC.device)
            next_BC = (slot_C == layout.phase_B[:, None]) & layout.continues_B[:, None]
            held_BC = held_BC | next_BC
            # At a border the state has it behind the chunk.
            key_BCS = torch.where((next_BC & (slot_C == 0))[..., None], state.lin_k[:, -1:], key_BCS)
        keys.append(key_BCS)
        masks.append(held_BC)
    return initial, torch.stack(keys), torch.stack(masks)


def layer(
    block: nn.Module,
    x_BND: Tensor,
    places: Places,
    *,
    bias_R: Tensor | None,
    dtype: torch.dtype,
    state: DecodingState | None,
    return_state: bool,
) -> tuple[Tensor, DecodingState | None]:
    """A whole layer with ScaleNorm and SiLU, `x + o_proj(gated attention of norm(x))`, `[B, N, D]`, and the state.

    Args:
        block: a `FlashLayer` whose modules are the stock ones, without hooks.
        dtype: what products are computed in, bfloat16 or float32; x and the parameters may be wider (autocast).

    Otherwise as `gated_attention`.
    """
    B, N, D = x_BND.shape
    layout: ChunkLayout = places.layout
    plan: ChunkPlan = places.plan
    unit, gain = block.gau, block.norm.weight
    config, has_quad, has_lin = unit.config, unit.has_quad, unit.has_lin
    u_proj, v_proj, z_proj, o_proj = unit.u_proj, unit.v_proj, unit.z_proj, unit.o_proj
    gamma_HS, beta_HS = unit.offset_scale.weight, unit.offset_scale.bias
    S, E = z_proj.weight.shape[0], v_proj.weight.shape[0]
    cos, sin, rotary_dim = _flat_rotary(places.rotary)
    initial, *kept = _from_cache(state, places, S, has_quad, has_lin, config.previous_key)
    quad, lin = _branches(layout, has_quad, has_lin, unit.is_causal, initial, return_state)
    y, rms, _, h, _, heads, *_, final = ops.layer(
        x_BND.reshape(B * N, D).contiguous(), gain, u_proj.weight, u_proj.bias, v_proj.weight, v_proj.bias,
        z_proj.weight, z_proj.bias, o_proj.weight, o_proj.bias, gamma_HS, beta_HS, bias_R, cos, sin, plan.source_K,
        plan.index, initial, *kept, block.norm.eps, N, plan.chunks, plan.chunk_size, plan.shift, unit.is_causal, quad,
        lin, config.previous_key, config.rope_interleaved, rotary_dim,
        score_scale("relu2", config.attention_divisor, S), return_state and has_lin, dtype,
    )  # fmt: skip
    new_state = None
    if return_state:
        with torch.no_grad():

            def activated(x: Tensor, bias: Tensor, token: Tensor) -> Tensor:
                scale = (rms[token] * gain.float())[..., None]
                return F.silu(x[token].float() * scale + bias.float())

            def value_of(token: Tensor) -> Tensor:
                return activated(h[:, E : 2 * E], v_proj.bias, token).to(dtype)

            def key_of(token: Tensor) -> Tensor:
                return activated(h[:, 2 * E :], z_proj.bias, token) * gamma_HS[-1].float() + beta_HS[-1].float()

            new_state = _decoding_state(
                heads.detach(), final.detach(), value_of, key_of if config.previous_key else None, places,
                config.chunk_size, S, has_quad, has_lin,
            )  # fmt: skip
    return y.view(B, N, D), new_state


def scale_norm(x_BND: Tensor, gain: Tensor, eps: float) -> Tensor:
    """ScaleNorm, `x / sqrt(mean(x^2) + eps) * gain`, in the type of x."""
    x = x_BND.reshape(-1, x_BND.shape[-1])
    return torch.ops.flash_hf.scale_norm(x.contiguous(), gain, eps)[0].view(x_BND.shape)


def attention_step(
    unit: nn.Module,
    u_B1E: Tensor,
    v_B1E: Tensor,
    z_B1S: Tensor,
    places: Places,
    *,
    bias_R: Tensor | None,
    silu: bool,
    state: DecodingState,
) -> Tensor:
    """`u * mixed_chunk_step(queries and keys of z, v)` between the projections, `[B, 1, E]`; advances `state`.

    Arguments as of `gated_attention`. Not `gated_step`, whose checks hold for all layers of a model at once.
    """
    config, layout = unit.config, places.layout
    u_B1E, v_B1E, z_B1S = (x if x.stride(-1) == 1 else x.contiguous() for x in (u_B1E, v_B1E, z_B1S))
    cos, sin = (None, None) if places.rotary is None else places.rotary
    return torch.ops.flash_hf.gated_step.default(
        u_B1E, v_B1E, z_B1S, unit.offset_scale.weight, unit.offset_scale.bias, cos, sin, layout.position_BN,
        layout.valid_BN, *state, bias_R, config.attention_divisor, config.global_normalization == "mean",
        config.rope_interleaved, silu, layout.shift, config.previous_key,
    )  # fmt: skip
