# SPDX-License-Identifier: Apache-2.0
"""The gated attention unit by kernels: between the model's modules, places and cache and the operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn

from ..attention_flash import DecodingState, closed_total, score_scale, shifted_dims
from ..chunking_flash import ChunkLayout, Places, child, is_tracing, parameter, projections
from . import ops
from .plan import ChunkPlan
from .step import (
    add_output,
    delta_operator,
    delta_step,
    gated_step,
    output_operator,
    project,
    project_operator,
    step_delta,
    step_gates,
    step_operator,
)
from .steps import advance
from .tiles import Cached, Shape, shape_of


def _tables(rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None, int]:
    """cos and sin as kernels read them, `[..., r / 2]`, and r."""
    if rotary is None:
        return None, None, 0
    # They are float32, unless whoever calls layers has cast all that these take.
    cos, sin = (table if table.dtype == torch.float32 else table.float() for table in rotary)
    return cos.contiguous(), sin.contiguous(), 2 * cos.shape[-1]


def _shape_and_tensors(
    unit: nn.Module, places: Places, bias_R: Tensor | None, state: DecodingState | None, return_state: bool, **others
) -> tuple[Shape, dict]:
    """The shape of a call, with `others` of its fields, and by name the tensors that both operators take."""
    plan, causal = places.plan, unit.is_causal
    offset_scale = child(unit, "offset_scale")
    gamma_HS, beta_HS = parameter(offset_scale, "weight"), parameter(offset_scale, "bias")
    H, S = gamma_HS.shape
    cos, sin, rotary_dim = _tables(places.rotary)
    cached = _from_cache(unit, places, state)
    # Within a first chunk the causal global part is zero.
    needs_lin = not causal or plan.chunks > 1 or cached.initial is not None or return_state or not unit.has_quad
    lin = unit.has_lin and needs_lin
    shape = (Shape if is_tracing() else shape_of)(
        N=plan.tokens, G=plan.chunks, C=plan.chunk_size, shift=plan.shift, S=S, H=H, causal=causal,
        quad=unit.has_quad, lin=lin, previous=unit.previous_key, local_shift=unit.local_key_shift,
        delta=unit.delta and lin, interleaved=unit.interleaved, rotary_dim=rotary_dim,
        scale=score_scale("relu2", unit.divisor, S), **others,
    )  # fmt: skip
    return shape, {
        "gamma": gamma_HS, "beta": beta_HS, "gate_bias": unit.gate_bias if shape.delta else None, "bias_R": bias_R,
        "cos": cos, "sin": sin, "source": plan.source_K, "index": plan.index, **cached._asdict(),
    }  # fmt: skip


def _decoding_state(
    results: ops.AttentionResults | ops.LayerResults, shape: Shape, tensors: dict, places: Places, unit: nn.Module,
    v: Tensor, z: Tensor, **norm: Tensor,
) -> DecodingState:  # fmt: skip
    """The state after these tokens, from the results of the kernels.

    Args:
        tensors: as of `_shape_and_tensors`. v, z: outputs of the projections.
        norm: in a whole layer `rms`, `gain` and the biases `b_v` and `b_z`.
    """
    layout: ChunkLayout = places.layout
    plan: ChunkPlan = places.plan
    B, G, S = shape.B, plan.chunks, shape.S
    chunk_B = None
    if layout.final_B is not None:
        chunk_B = torch.arange(B, device=v.device) * G + layout.final_B
    made = ops.OpenChunkTensors(
        heads=results.heads.detach(), v=v.detach(), z=z.detach(), seen=layout.seen_after_B, chunk=chunk_B,
        **{name: tensors[name] for name in ("gamma", "beta", "cos", "sin", "source", "index")},
        **dict.fromkeys(("rms", "gain", "b_v", "b_z")) | norm,
    )  # fmt: skip
    with torch.no_grad():
        quad_k, lin_k, value, seen = ops.open_chunk(
            made, shape, slots=unit.config.chunk_size, skipped=layout.skipped
        )  # fmt: skip
    total, delta = None, {}
    if chunk_B is None and (shape.delta or plan.index.documents > B):
        chunk_B = torch.arange(1, B + 1, device=v.device) * G - 1
    if shape.delta:
        since_B = results.slots.detach()[0, chunk_B, -1]
        if tensors["since"] is not None:
            since_B = since_B + torch.where(chunk_B % G == 0, tensors["since"], 0)
        # As the tokens of the open chunk have read it.
        delta = {"opened": results.prefix.detach()[chunk_B, :S].float() * shape.C, "since": since_B}
        newest_B = (seen - 1 + layout.shift + layout.skipped) % unit.config.chunk_size + 1
        lin_k = lin_k[torch.arange(B, device=v.device), newest_B][:, None] if shape.previous else None
    if shape.lin:
        total = results.final.detach()
        if plan.index.documents > B:
            total = total[torch.searchsorted(plan.index.document_end, plan.index.group_G[chunk_B], right=True)]
        if total.shape[1] > S or is_tracing():
            total = total[:, :S].clone()
    return DecodingState(
        quad_k=quad_k if shape.quad else None,
        lin_k=lin_k if shape.lin else None,
        value=value,
        total=total,
        seen=seen,
        **delta,
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
    gates_BN2: Tensor | None = None,
) -> tuple[Tensor, DecodingState | None]:
    """`u * mixed_chunk_attention(queries and keys of z, v)` between the projections, `[B, N, E]`, and the state.

    Args:
        unit: a `FlashGatedAttentionUnit`; its configuration and offset-scale are read.
        u_BNE, v_BNE, z_BNS: outputs of the projections, bfloat16, float16 or float32.
        places: with its plan.
        bias_R: relative bias, `[2 * C - 1]` for the grid's C, or None.
        silu: whether to apply SiLU to u, v and z.
        state: the cache's, at a chunk border in every row unless the plan has `cached` slots; or None.
        return_state: also return the state after these tokens.
        gates_BN2: output of the projection of the delta rule's gates.
    """
    layout: ChunkLayout = places.layout
    plan: ChunkPlan = places.plan
    if plan.cached:
        # Prepend the open chunk's cached slots as tokens: their keys come from the cache, their outputs are dropped.
        if silu:
            u_BNE, v_BNE, z_BNS, silu = F.silu(u_BNE), F.silu(v_BNE), F.silu(z_BNS), False
        value_BCE = torch.where(layout.cached_BC[..., None], state.value, 0)
        v_BNE = torch.cat([value_BCE.to(v_BNE.dtype), v_BNE], 1)
        u_BNE, z_BNS = (F.pad(x, (0, 0, plan.cached, 0)) for x in (u_BNE, z_BNS))
        if gates_BN2 is not None:
            # They neither forget nor write: the state has them already.
            inputs = zip(gates_BN2.split(1, -1), (math.inf, -math.inf), strict=True)
            gates_BN2 = torch.cat([F.pad(x, (0, 0, plan.cached, 0), value=value) for x, value in inputs], -1)
    B, N, E = v_BNE.shape
    shape, others = _shape_and_tensors(
        unit, places, bias_R, state, return_state, B=B, D=0, E=E, silu=silu, dtype=v_BNE.dtype
    )
    u, v, z = (_rows(x) for x in (u_BNE, v_BNE, z_BNS))
    gates = _rows(gates_BN2) if shape.delta else None
    tensors = ops.AttentionTensors(u=u, v=v, z=z, gates=gates, **others)
    results = ops.gated_attention(tensors, shape, want_final=return_state and shape.lin, exchange=layout.neighbours)
    new_state = None
    if return_state:
        new_state = _decoding_state(results, shape, others, places, unit, v, z)
    return results.out.view(B, N, E)[:, plan.cached :], new_state


def _rows(x_BNF: Tensor) -> Tensor:
    x = x_BNF.reshape(-1, x_BNF.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _from_cache(unit: nn.Module, places: Places, state: DecodingState | None) -> Cached:
    if state is None:
        return Cached()
    layout: ChunkLayout = places.layout
    amid, S = places.plan.cached > 0, unit.offset_scale.weight.shape[1]
    cached, continues_B = Cached(), layout.continues_B

    def padded(state_BSE: Tensor) -> Tensor:
        rest = max(16, triton.next_power_of_2(S)) - S
        return F.pad(state_BSE * continues_B[:, None, None], (0, 0, 0, rest)).contiguous()

    if unit.delta:
        amid_B = layout.phase_B > 0
        opened = torch.where(amid_B[:, None, None], state.opened, state.total)
        since_B = torch.where(amid_B & continues_B, state.since, 0)
        cached = Cached(initial=padded(state.total), opened=padded(opened), since=since_B)
    elif unit.has_lin:
        cached = Cached(initial=padded(closed_total(state, layout.cached_BC) if amid else state.total))
    moved = unit.has_quad and unit.local_key_shift, unit.has_lin and unit.previous_key
    if not amid and not any(moved):
        return cached
    held_BC1 = layout.cached_BC[..., None]
    C = held_BC1.shape[1]
    slot_C = torch.arange(C, device=held_BC1.device)
    # The next key, too, has dimensions of a cached token's: all, or every second pair.
    next_BC1 = ((slot_C == layout.phase_B[:, None]) & layout.continues_B[:, None])[..., None]
    keys, masks = [], []
    # The delta rule's state has only the newest linear key, if any: its tokens' keys are read no more.
    none_B1S = state.value.new_zeros(len(state.value), 1, S) if unit.delta else None
    lin_k = none_B1S if state.lin_k is None else state.lin_k
    for cached_BKS, shifted, local in ((state.quad_k, moved[0], True), (lin_k, moved[1], False)):
        if cached_BKS is None:
            continue
        key_BCS, mask_BCS = cached_BKS[:, :C].expand(-1, C, -1), held_BC1.expand(-1, -1, S)
        if shifted:
            # At a border the state has it behind the chunk.
            key_BCS = torch.where(next_BC1 & (slot_C == 0)[:, None], cached_BKS[:, -1:], key_BCS)
            taken_S = shifted_dims(S, unit.interleaved, slot_C.device) if local else True
            mask_BCS = mask_BCS | (next_BC1 & taken_S)
        keys.append(key_BCS)
        masks.append(mask_BCS)
    return cached._replace(kept=torch.stack(keys), kept_mask=torch.stack(masks))


def layer(
    block: nn.Module,
    x_BND: Tensor,
    places: Places,
    *,
    bias_R: Tensor | None,
    dtype: torch.dtype,
    state: DecodingState | None,
    return_state: bool,
    residual: bool = True,
) -> tuple[Tensor, DecodingState | None]:
    """A whole layer with ScaleNorm and SiLU, `x + o_proj(gated attention of norm(x))`, `[B, N, D]`, and the state.

    Args:
        block: a `FlashLayer` whose modules are the stock ones, without hooks.
        dtype: what products are computed in, bfloat16 or float32; x and the parameters may be wider (autocast).
        residual: whether to add x.

    Otherwise as `gated_attention`.
    """
    B, N, D = x_BND.shape
    unit, norm = child(block, "gau"), child(block, "norm")
    gain = parameter(norm, "weight")
    w_u, w_v, w_z, w_o = (parameter(module, "weight") for module in projections(unit))
    b_u, b_v, b_z, b_o = (parameter(module, "bias") for module in projections(unit))
    E = w_v.shape[0]
    shape, others = _shape_and_tensors(
        unit, places, bias_R, state, return_state, B=B, D=D, E=E, silu=True, dtype=dtype, residual=residual
    )
    tensors = ops.LayerTensors(
        x=x_BND.contiguous(), gain=gain, w_u=w_u, b_u=b_u, w_v=w_v, b_v=b_v, w_z=w_z, b_z=b_z, w_o=w_o, b_o=b_o,
        w_gates=unit.gate_proj.weight if shape.delta else None, **others,
    )  # fmt: skip
    results = ops.layer(
        tensors, shape, eps=norm.eps, want_final=return_state and shape.lin, exchange=places.layout.neighbours
    )
    new_state = None
    if return_state:
        _, v, z, *_ = ops.split_columns(results.h, shape)
        new_state = _decoding_state(
            results, shape, others, places, unit, v, z, rms=results.rms, gain=gain, b_v=b_v, b_z=b_z
        )  # fmt: skip
    return results.y, new_state


def scale_norm(x_BND: Tensor, gain: Tensor, eps: float) -> Tensor:
    """ScaleNorm, `x / sqrt(mean(x^2) + eps) * gain`, in the type of x."""
    return ops.scale_norm(x_BND.contiguous(), gain, eps)


def rotary_bias(bias: nn.Module, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The vector over offsets of a `FlashRotaryBias`; `rotary` is cos and sin of the offsets."""
    cos, sin, _ = _tables(rotary)
    return ops.rotary_bias(bias.weight.contiguous(), cos, sin, bias.interleaved)


def attention_step(
    unit: nn.Module,
    u_BNE: Tensor,
    v_BNE: Tensor,
    z_BNS: Tensor,
    places: Places,
    *,
    bias_R: Tensor | None,
    silu: bool,
    states: tuple[DecodingState, DecodingState],
    gates_BN2: Tensor | None = None,
) -> Tensor:
    """`u * mixed_chunk_step(queries and keys of z, v)` between the projections of one token per row or of a few, one
    after another, `[B, N, E]`.

    Args:
        states: before these tokens, and the one to become that after them, of a single token the same.

    Other arguments as of `gated_attention`.
    """
    tokens = (u_BNE, v_BNE, z_BNS)
    if not u_BNE.stride(-1) == v_BNE.stride(-1) == z_BNS.stride(-1) == 1:
        tokens = [x.contiguous() for x in tokens]
    return _steps(unit, *tokens, places, bias_R, silu, states, ops.is_watched((u_BNE,)), gates_BN2)


def _steps(
    unit: nn.Module, u: Tensor, v: Tensor, z: Tensor, places: Places, bias_R: Tensor | None, silu: bool,
    states: tuple[DecodingState, DecodingState], watched: bool, gates_BN2: Tensor | None, *projected,
) -> Tensor:  # fmt: skip
    """`projected` are the arguments of [`step_gates`] from x on, which then fills `gates_BN2`."""
    # Once per layer: no lookup that costs, and arguments by position, which saves 3 microseconds.
    layout, scale, (state, target) = places.layout, unit.offset_scale, states
    cos, sin = (None, None) if places.rotary is None else places.rotary
    tokens = u, v, z, scale.weight, scale.bias, cos, sin, layout.position_BN, layout.valid_BN
    form = (
        bias_R, unit.divisor, unit.normalization == "mean", unit.interleaved, silu, layout.shift, unit.previous_key,
        unit.local_key_shift,
    )  # fmt: skip
    if layout.position_BN.shape[1] > 1:
        gates = None
        if unit.delta:
            gates = step_gates(
                gates_BN2, unit.gate_bias, layout.position_BN, layout.valid_BN, state, target.since, layout.shift,
                None, *projected,
            )  # fmt: skip
        return advance(state, target, *tokens, *form, gates)
    # Inductor computes positions, which it takes from the first layer's `seen`, again for the next layer. An operator
    # that had written to it would be before that.
    seen = None if watched and unit.layer_idx == 0 else state.seen
    arguments = *tokens, state.quad_k, state.lin_k, state.value, state.total, seen, *form
    if not unit.delta:
        out = (step_operator if watched else gated_step)(*arguments)
    elif watched:
        more = projected or (None, None, None, 0.0)
        out = delta_operator(*arguments, state.opened, state.since, gates_BN2, unit.gate_bias, *more)
    else:
        out = delta_step(step_delta(
            gates_BN2, unit.gate_bias, layout.position_BN, layout.valid_BN, state, layout.shift, scale.weight.shape[1],
            *projected,
        ), *arguments)  # fmt: skip
    if seen is None:
        state.seen.add_(1 if layout.valid_BN is None else layout.valid_BN[:, 0])
    return out


def layer_step(
    block: nn.Module,
    x_BND: Tensor,
    places: Places,
    *,
    bias_R: Tensor | None,
    begin: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[DecodingState, DecodingState]],
) -> Tensor:
    """A whole layer's step in three launches, or for a few tokens four, and with the delta rule one more,
    `x + o_proj(gated attention of norm(x))`, `[B, N, D]`, without gradients.

    Args:
        begin: gives the states as of `attention_step`, from the projections u, v and z without SiLU, and those of the
            gates, `[B, N, 2]`, which are filled later.

    Otherwise as of `layer`.
    """
    unit = block.gau
    u, v, z, o = unit.u_proj, unit.v_proj, unit.z_proj, unit.o_proj
    B, N, D = x_BND.shape
    E, S = v.weight.shape[0], z.weight.shape[0]
    x = x_BND.contiguous().view(B * N, D)
    watched = ops.is_watched((x,))
    projection, output = (project_operator, output_operator) if watched else (project, add_output)
    h = projection(x, block.norm.weight, u.weight, v.weight, z.weight, u.bias, v.bias, z.bias, block.norm.eps)
    gates_BN2, projected = None, ()
    if unit.delta:
        gates_BN2 = None if watched else x.new_empty(B, N, 2, dtype=torch.float32)
        projected = x, block.norm.weight, unit.gate_proj.weight.contiguous(), block.norm.eps
    tokens = h.view(B, N, 2 * E + S).split([E, E, S], 2)
    states = begin(*tokens, gates_BN2)
    attended = _steps(unit, *tokens, places, bias_R, True, states, watched, gates_BN2, *projected)
    return output(x, attended.view(B * N, E), o.weight, o.bias).view(B, N, D)
