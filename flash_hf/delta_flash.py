# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule (Yang et al., arXiv 2412.06464) as the state of the global branch, `global_state="delta"`.

Token t of a document, with key k and query q of length 1, value v, decay a and strength w, both in (0, 1), changes a
state of [S, E] that begins as 0: `S_t = a_t (1 - w_t k_t k_t^T) S_(t-1) + w_t k_t v_t^T`. What the state returns for
k_t moves by w_t towards v_t, where a sum would grow. As with the mean, a token reads the state from before its chunk:
`q_t S_b a_(b+1) ... a_t`, if the chunk begins after token b.

By chunks (the WY form): let F be the running sum of log a inside the chunk. The state behind a chunk of C tokens is
`exp(F_C) S_b + sum_i exp(F_C - F_i) k_i u_i^T`, where token i writes
`u_i = w_i (v_i - exp(F_i) S_b^T k_i - sum_(j<i) exp(F_i - F_j) (k_i k_j) u_j)`. With
`L_ij = w_i exp(F_i - F_j) k_i k_j` for j < i, these are `U = (1 + L)^-1 diag(w) (V - diag(exp F) K S_b)`. Only states
are read, so the inverse is applied to the keys, of width S, instead of to the values: with
`P = diag(w) (1 + L)^-T diag(exp(F_C - F)) K`, the state becomes `exp(F_C) S_b - (P^T diag(exp F) K) S_b + P^T V`.

Causal only. Alphabet as in attention_flash.py. Gates, and all that is made from them, have at least float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_flash import (
    DecodingState,
    QueryKeys,
    at_final,
    mixed_chunk_append,
    mixed_chunk_attention,
    mixed_chunk_step,
    previous_keys,
)
from .chunking_flash import AppendLayout, ChunkLayout, StepLayout, has_function_transforms, is_exporting, is_tracing


# Programs for any length take rows of up to this many tokens.
LONGEST_ROW = 2**24


def takes_any_length(chunks: int) -> bool:
    """Whether a program is being recorded in which the number of chunks is a variable, which a loop would fix. Also
    under function transforms, which take operations alone, no functions with gradients of their own."""
    if torch.jit.is_tracing():
        return True
    if not torch.compiler.is_compiling():
        return has_function_transforms()
    if is_exporting():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    # For training, one graph per number of chunks needs less memory.
    return not (torch.is_grad_enabled() or has_static_value(chunks))


def exactly(x: Tensor):
    """Without autocast, which would round what is computed in float32 on purpose."""
    kind = x.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def unit_length(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`F.normalize(x.to(dtype), dim=-1)` in fewer operations."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).clamp(min=1e-12)


# ------------------------------------------------------------------------------------------------------------------
# Inside the chunks
# ------------------------------------------------------------------------------------------------------------------
def lower_inverse(strict_XCC: Tensor, block: int = 32) -> Tensor:
    """`(1 + L)^-1` for L below the diagonal of the argument, from the diagonal outwards: the inverse of
    `[[A, 0], [B, D]]` has `-D^-1 B A^-1` in place of B. Stable, unlike a series of powers of L.

    Args:
        block: up to blocks of this size the corners B are masked in place, since small products cost launches only;
            from there on they are cut out.
    """
    width = int(strict_XCC.shape[-1])  # a tensor in torch.jit.trace
    size = max(2, 1 << (width - 1).bit_length())
    block = min(block, size)
    strict_XCC = F.pad(strict_XCC.tril(-1), (0, size - width, 0, size - width))

    def diagonal(count: int) -> Tensor:
        blocks = strict_XCC.unflatten(2, (count, -1)).unflatten(1, (count, -1))
        return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # [X, count, own, own]

    small, place = diagonal(size // block), torch.arange(block, device=strict_XCC.device)
    inverse = torch.eye(block, dtype=small.dtype, device=small.device)
    own = 1
    while own < block:
        part, half = place // (2 * own), place // own % 2
        corner = small.masked_fill(~((part[:, None] == part) & (half[:, None] > half)), 0)
        inverse = inverse - (corner if own == 1 else inverse @ (corner @ inverse))
        own *= 2
    while own < size:
        corner, upper, lower = diagonal(size // own // 2)[..., own:, :own], inverse[:, 0::2], inverse[:, 1::2]
        corner = -(lower @ (corner @ upper))
        inverse = torch.cat([F.pad(upper, (0, own)), torch.cat([corner, lower], -1)], -2)
        own *= 2
    return inverse[:, 0, :width, :width]


class TransposedSolve(torch.autograd.Function):
    """`(1 + L)^-T y` for L below the diagonal of a tensor `[X, C, C]` and y `[X, C, S]`.

    With `twice`, which allows second derivatives, the inverse `(1 + L)^-1` is another output: they pass through what
    backward reads if it is an input or output.
    """

    @staticmethod
    def forward(ctx, strict_XCC: Tensor, y_XCS: Tensor, twice: bool) -> Tensor | tuple[Tensor, Tensor]:
        inverse = lower_inverse(strict_XCC)
        solved = inverse.transpose(1, 2) @ y_XCS
        ctx.save_for_backward(inverse, solved)
        if not twice:
            return solved
        ctx.set_materialize_grads(False)
        return solved, inverse

    @staticmethod
    def backward(ctx, grad_XCS: Tensor | None, grad_inverse: Tensor | None = None) -> tuple[Tensor | None, ...]:
        inverse, solved = ctx.saved_tensors
        grad_strict = grad_y = None
        if grad_XCS is not None:
            grad_y = inverse @ grad_XCS
            grad_strict = -(solved @ grad_y.transpose(1, 2)).tril(-1)
        if grad_inverse is not None:
            turned = inverse.transpose(1, 2)
            of_inverse = -(turned @ grad_inverse @ turned).tril(-1)
            grad_strict = of_inverse if grad_strict is None else grad_strict + of_inverse
        return grad_strict, grad_y, None


def solve_chunks(strict_XCC: Tensor, y_XCS: Tensor) -> Tensor:
    """[`TransposedSolve`], with second derivatives except in compiled graphs, which have none and would compute the
    inverse's gradient in the first."""
    if torch.compiler.is_compiling():
        return TransposedSolve.apply(strict_XCC, y_XCS, False)
    return TransposedSolve.apply(strict_XCC, y_XCS, True)[0]


def solve_any(strict_XCC: Tensor, y_XCS: Tensor) -> Tensor:
    """[`TransposedSolve`] as operations that compilers know."""
    return torch.bmm(lower_inverse(strict_XCC).transpose(1, 2), y_XCS)


def solve_few(strict_XCC: Tensor, y_XCS: Tensor) -> Tensor:
    """[`TransposedSolve`] by one call of a library, which pays for a few tokens."""
    return torch.linalg.solve_triangular(strict_XCC.transpose(1, 2), y_XCS, upper=True, unitriangular=True)


def writes(k_XCS: Tensor, since_XC: Tensor, write_XC1: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What tokens in a row write into the state, `[X, C, S]`: `S' = decay S + entering^T (value - diag(exp F) K S)`.

    Args:
        k_XCS: keys of length 1.
        since_XC: F, the running sums of log a.
        write_XC1: w, 0 at empty slots.
        solve: `(1 + L)^-T y` for L below the diagonal of its first argument.
    """
    apart_XCC = torch.exp((since_XC[..., None] - since_XC[:, None]).clamp(max=0))
    solved = solve(write_XC1 * apart_XCC * torch.bmm(k_XCS, k_XCS.transpose(1, 2)), apart_XCC[:, -1, :, None] * k_XCS)
    return solved * write_XC1


def transitions(k_BGCS: Tensor, forget_BGC: Tensor, write_BGC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each chunk writes, and what it erases as a matrix, which states then pass through:
    `S' = decay S - erased S + entering^T value`.

    Args:
        k_BGCS: keys of length 1.
        forget_BGC: log a, 0 at empty slots.
        write_BGC: w, 0 at empty slots.

    Returns:
        entering `[B, G, C, S]`, erased `[B, G, S, S]`, decay `[B, G]`, and the running sums F `[B, G, C]`.
    """
    C = forget_BGC.shape[2]
    if is_tracing():  # torch 2.11 cannot compile a cumsum here; a product may be in tf32
        since_BGC = forget_BGC @ torch.ones(C, C, dtype=forget_BGC.dtype, device=forget_BGC.device).triu()
    else:
        since_BGC = forget_BGC.cumsum(-1)
    solve = solve_any if takes_any_length(forget_BGC.shape[1]) else solve_chunks
    write_XC1 = write_BGC.flatten(0, 1)[..., None]
    entering_BGCS = writes(k_BGCS.flatten(0, 1), since_BGC.flatten(0, 1), write_XC1, solve).view_as(k_BGCS)
    faded_BGC = torch.exp(since_BGC)
    erased_BGSS = entering_BGCS.transpose(2, 3) @ (faded_BGC[..., None] * k_BGCS)
    return entering_BGCS, erased_BGSS, faded_BGC[..., -1], since_BGC


# ------------------------------------------------------------------------------------------------------------------
# Across the chunks
# ------------------------------------------------------------------------------------------------------------------
class DeltaStates(torch.autograd.Function):
    """The states before each chunk, `[B, G, S, E]`: `S' = decay S - erased S + entering^T value` from `initial`.

    They are carried in float32 and returned in the values' type, or in that of `initial`. Backward needs no others.

    Args:
        entering_BGCS, value_BGCE: of one type.
        erased_BGSS, decay_BG: at least float32.
        initial_BSE: None for 0. It gets no gradient.
    """

    @staticmethod
    def forward(
        ctx, entering_BGCS: Tensor, value_BGCE: Tensor, erased_BGSS: Tensor, decay_BG: Tensor,
        initial_BSE: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        G, dtype = value_BGCE.shape[1], value_BGCE.dtype
        product_BGSE = entering_BGCS[:, :-1].transpose(2, 3) @ value_BGCE[:, :-1]
        low_BGSS = erased_BGSS.to(dtype)
        state = initial_BSE
        if state is None:
            B, S, E = *erased_BGSS.shape[::3], value_BGCE.shape[3]
            state = value_BGCE.new_zeros(B, S, E, dtype=decay_BG.dtype)
        kept = dtype if initial_BSE is None else state.dtype
        states = [state.to(kept)]
        for g in range(G - 1):
            erased = low_BGSS[:, g] @ states[-1].to(dtype)
            state = state * decay_BG[:, g, None, None] + (product_BGSE[:, g].to(state.dtype) - erased)
            states.append(state.to(kept))
        states = torch.stack(states, 1)
        ctx.save_for_backward(entering_BGCS, value_BGCE, erased_BGSS, decay_BG, states)
        return states

    @staticmethod
    def backward(ctx, grad_BGSE: Tensor) -> tuple[Tensor | None, ...]:
        entering_BGCS, value_BGCE, erased_BGSS, decay_BG, states_BGSE = ctx.saved_tensors
        G, dtype = value_BGCE.shape[1], value_BGCE.dtype
        low_BGSS = erased_BGSS.to(dtype).transpose(2, 3)
        grad, grads = grad_BGSE[:, -1].to(decay_BG.dtype), []
        for g in reversed(range(G - 1)):
            grads.append(grad.to(dtype))
            erased = low_BGSS[:, g] @ grads[-1]
            grad = grad * decay_BG[:, g, None, None] + (grad_BGSE[:, g].to(grad.dtype) - erased)
        # Gradients of the states behind each chunk; nothing reads the last one.
        after_BGSE = torch.stack([*grads[::-1], torch.zeros_like(states_BGSE[:, 0], dtype=dtype)], 1)
        grad_entering = value_BGCE @ after_BGSE.transpose(2, 3)
        grad_value = entering_BGCS @ after_BGSE
        grad_erased = -(after_BGSE @ states_BGSE.to(dtype).transpose(2, 3)).to(erased_BGSS.dtype)
        grad_decay = (after_BGSE.to(decay_BG.dtype) * states_BGSE).sum((2, 3))
        return grad_entering, grad_value, grad_erased, grad_decay, None


def doubled_states(
    entering_BGCS: Tensor, value_BGCE: Tensor, erased_BGSS: Tensor, decay_BG: Tensor, initial_BSE: Tensor | None = None
) -> Tensor:
    """[`DeltaStates`] without a loop over chunks: in round n, each chunk's change takes in that of 2^n chunks ago."""
    G, C, S = entering_BGCS.shape[1:]
    dtype = decay_BG.dtype
    product = entering_BGCS.to(dtype).transpose(2, 3) @ value_BGCE.to(dtype)
    change = decay_BG[..., None, None] * torch.eye(S, dtype=dtype, device=decay_BG.device) - erased_BGSS
    # Those of the chunk before; the first state depends on no other. Selected, since slices would fix their length.
    chunk_G = torch.arange(G, device=decay_BG.device)
    first_G11, before_G = (chunk_G == 0)[:, None, None], (chunk_G - 1).clamp(min=0)
    change = change.index_select(1, before_G).masked_fill(first_G11, 0)
    initial = 0 if initial_BSE is None else initial_BSE[:, None].to(dtype)
    states = torch.where(first_G11, initial, product.index_select(1, before_G))
    for n in range((LONGEST_ROW // int(C)).bit_length()):
        before_G = (chunk_G - 2**n).clamp(min=0)
        states = states + change @ states.index_select(1, before_G)
        change = change @ change.index_select(1, before_G)
    return states if initial_BSE is not None else states.to(value_BGCE.dtype)


def delta_attention(
    qk: QueryKeys,
    value_BGCE: Tensor,
    layout: ChunkLayout,
    *,
    previous_key: bool,
    state: DecodingState | None = None,
    return_state: bool = False,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """What queries read from the state before their chunk, `[B, G, C, E]`.

    Args:
        qk: with lin_q, lin_k and gates, on the grid of `layout`.
        previous_key: write values under shifted keys.
        state: the state to continue.
        return_state: also return the fields of [`DecodingState`] after these tokens.
    """
    q, own_k, gates_BGC2 = qk.lin_q, qk.lin_k, qk.gates
    B, G, C, _ = value_BGCE.shape
    dtype, low = gates_BGC2.dtype, value_BGCE.dtype
    k, initial, read_BSE, before_B = own_k, None, None, None
    newest_B1S = None if state is None else state.lin_k
    if state is not None:
        amid_B = layout.phase_B > 0
        fresh_B11 = (layout.continues_B[:, None, None]).to(dtype)
        initial = state.total * fresh_B11
        read_BSE = torch.where(amid_B[:, None, None], state.opened, state.total) * fresh_B11
        before_B = torch.where(amid_B & layout.continues_B, state.since, 0)
    elif return_state:
        initial = value_BGCE.new_zeros(B, q.shape[-1], value_BGCE.shape[-1], dtype=dtype)
    if previous_key:
        before_BS = None
        if state is not None:  # also in front of the call's first slot inside of a chunk
            before_BS = newest_B1S[:, 0].to(own_k.dtype)
            slot_C = torch.arange(C, device=own_k.device)
            last_BC1 = (slot_C == layout.phase_B[:, None] - 1)[..., None]
            own_k = torch.cat([torch.where(last_BC1, before_BS[:, None], own_k[:, 0])[:, None], own_k[:, 1:]], 1)
        k = previous_keys(own_k, layout, before_BS)

    with exactly(value_BGCE):
        q, k = (unit_length(x, dtype) for x in (q, k))
        entering, erased, decay, since = transitions(k, *gates_BGC2.unbind(-1))
        entering = entering.to(low)
        linked = entering, value_BGCE, erased, decay
        if layout.first_BG is not None:
            # Packed rows: 0 behind the last chunk of a document, where the next one begins.
            goes_on_BG = F.pad(layout.first_BG[:, 1:] <= torch.arange(G - 1, device=k.device), (0, 1))
            linked = (
                entering * goes_on_BG[..., None, None], value_BGCE, erased * goes_on_BG[..., None, None],
                decay * goes_on_BG,
            )  # fmt: skip
        chain = doubled_states if takes_any_length(G) else DeltaStates.apply
        states = chain(*linked, initial)
        read = states if read_BSE is None else torch.cat([read_BSE[:, None], states[:, 1:]], 1)
        if before_B is not None:
            since = torch.cat([since[:, :1] + before_B[:, None, None], since[:, 1:]], 1)
        out = (torch.exp(since)[..., None] * q).to(low) @ read.to(low)
        if not return_state:
            return out, {}
        last = at_final(states, layout)
        behind = (at_final(entering, layout).transpose(1, 2) @ at_final(value_BGCE, layout)).to(dtype)
        if takes_any_length(G) or G > 1 or state is not None:  # else the state before is 0
            behind = behind + last * at_final(decay[..., None, None], layout) - at_final(erased, layout) @ last
        after = {
            "total": behind,
            "opened": at_final(read, layout),
            "since": at_final(since[..., None], layout)[:, -1, 0],
        }
    after["lin_k"] = None
    if previous_key:
        held_BC = at_final(layout.occupied_BGC.expand(B, -1, -1)[..., None], layout)[..., 0]
        last_B = torch.where(held_BC, torch.arange(C, device=held_BC.device), -1).amax(1)
        index_B1S = last_B.clamp(min=0)[:, None, None].expand(-1, 1, own_k.shape[-1])
        newest = at_final(own_k, layout).gather(1, index_B1S)
        if state is not None:  # a row of padding at the border of a chunk
            newest = torch.where((last_B < 0)[:, None, None], newest_B1S.to(newest.dtype), newest)
        after["lin_k"] = newest
    return out, {name: None if x is None else x.detach().clone() for name, x in after.items()}


def delta_chunk_attention(
    qk: QueryKeys,
    value_BGCE: Tensor,
    layout: ChunkLayout,
    *,
    previous_key: bool = False,
    state: DecodingState | None = None,
    return_state: bool = False,
    **options: Any,
) -> tuple[Tensor, DecodingState | None]:
    """[`mixed_chunk_attention`] with the delta rule for its global part; `qk` has gates."""
    own = qk._replace(lin_q=None, lin_k=None)
    out, after = mixed_chunk_attention(own, value_BGCE, layout, state=state, return_state=return_state, **options)
    # A first chunk reads nothing, as in the mean.
    short = value_BGCE.shape[1] == 1 and state is None and not return_state and not torch.jit.is_tracing()
    if qk.lin_q is None or (short and qk.quad_q is not None):
        # Zeros, so that the gates have a gradient: DistributedDataParallel waits for that of every parameter.
        return out + (0 * qk.gates).sum().to(out.dtype), after
    remote, fields = delta_attention(
        qk, value_BGCE, layout, previous_key=previous_key, state=state, return_state=return_state
    )
    return out + remote, replace(after, **fields) if return_state else None


# ------------------------------------------------------------------------------------------------------------------
# Decoding
# ------------------------------------------------------------------------------------------------------------------
def delta_chunk_step(
    qk: QueryKeys,
    value_B1E: Tensor,
    layout: StepLayout,
    state: DecodingState,
    *,
    previous_key: bool = False,
    **options: Any,
) -> Tensor:
    """[`mixed_chunk_step`] with the delta rule for its global part; `qk` has gates, `[B, 1, 2]`."""
    seen_B, valid_B1, dtype = state.seen, layout.valid_BN, qk.gates.dtype
    opens_B = (seen_B + layout.shift) % state.value.shape[1] == 0
    key = qk.lin_k
    if previous_key:
        key = state.lin_k.masked_fill((seen_B == 0)[:, None, None], 0)
        own = qk.lin_k.detach().to(state.lin_k.dtype)
        state.lin_k.copy_(own if valid_B1 is None else torch.where(valid_B1[..., None], own, state.lin_k))
    forget_B1, write_B1 = qk.gates.detach().unbind(-1)
    if valid_B1 is not None:
        forget_B1, write_B1 = forget_B1 * valid_B1, write_B1 * valid_B1
    with exactly(value_B1E):
        q, k = (unit_length(x, dtype) for x in (qk.lin_q, key.detach()))
        state.opened.copy_(torch.where(opens_B[:, None, None], state.total, state.opened))
        state.since.copy_(torch.where(opens_B, 0, state.since) + forget_B1[:, 0])
        remote_B1E = torch.bmm(torch.exp(state.since)[:, None, None] * q, state.opened).to(value_B1E.dtype)
        decay_B11 = torch.exp(forget_B1)[..., None]
        missing_B1E = value_B1E.detach().to(dtype) - decay_B11 * torch.bmm(k, state.total)
        state.total.mul_(decay_B11).baddbmm_(k.transpose(1, 2) * write_B1[..., None], missing_B1E)
    if qk.quad_q is None:
        seen_B.add_(1 if valid_B1 is None else valid_B1[:, 0].to(seen_B.dtype))
        return remote_B1E
    own = qk._replace(lin_q=None, lin_k=None)
    return remote_B1E + mixed_chunk_step(own, value_B1E, layout, replace(state, lin_k=None), **options)


def delta_chunk_append(
    qk: QueryKeys,
    value_BNE: Tensor,
    layout: AppendLayout,
    state: DecodingState,
    *,
    previous_key: bool = False,
    **options: Any,
) -> tuple[Tensor | None, DecodingState]:
    """[`mixed_chunk_append`] with the delta rule for its global part; `qk` has gates, `[B, N, 2]`, 0 at padding."""
    dtype, key, after = qk.gates.dtype, qk.lin_k, {}
    if previous_key:
        key, newest_B1S = layout.tokens_before(state.lin_k, qk.lin_k)
        after["lin_k"] = newest_B1S.to(state.lin_k.dtype)
    opens_B11, G = layout.opens_B11, layout.chunks
    (B, N, S), value, total = key.shape, value_BNE.to(dtype), state.total
    with exactly(value_BNE):
        # The state after those tokens that belong to the open chunk, and after all of them.
        gates = [qk.gates] if G == 1 else [qk.gates.masked_fill(layout.second_BN1, 0), qk.gates]
        forget_BGN, write_BGN = torch.stack(gates, 1).unbind(-1)
        since_BGN, k_BNS = forget_BGN.cumsum(-1), unit_length(key, dtype)
        faded_BGN1 = torch.exp(since_BGN)[..., None]
        k_BGNS = k_BNS[:, None].expand(-1, G, -1, -1)
        entering = writes(k_BGNS.flatten(0, 1), since_BGN.flatten(0, 1), write_BGN.flatten(0, 1)[..., None], solve_few)
        # With fewer tokens than S, what is erased is cheaper by token than as a matrix [S, S].
        erased = torch.bmm((faded_BGN1 * k_BGNS).flatten(1, 2), total).view(B, G, N, -1)
        written = torch.bmm(entering.transpose(1, 2), (value[:, None] - erased).flatten(0, 1)).view(B, G, S, -1)
        decays = faded_BGN1[:, :, -1:].unbind(1)
        # Not at once: a part of the result would keep all of it alive as long as the cache.
        states = [torch.addcmul(*each, total) for each in zip(written.unbind(1), decays, strict=True)]
        # Tokens of the open chunk read the state before it, those of the next chunk that before themselves.
        opened, out = torch.where(opens_B11, total, state.opened), None
        reads = [(since_BGN[:, 0] + state.since[:, None].masked_fill(opens_B11[..., 0], 0), opened)]
        if G > 1:
            reads.append((since_BGN[:, 1] - since_BGN[:, 0], states[0]))
        if qk.lin_q is not None:
            q_BNS = unit_length(qk.lin_q, dtype)
            for (since_BN, read_BSE), other_BN in zip(reads, layout.others_BN, strict=True):
                part = torch.exp(since_BN.masked_fill(other_BN, -math.inf))[..., None] * q_BNS
                out = torch.bmm(part, read_BSE) if out is None else torch.baddbmm(out, part, read_BSE)
            out = out.to(value_BNE.dtype)
        since_B = reads[0][0][:, -1]
        if G > 1:
            since_B = torch.where(layout.crosses_B11[:, 0, 0], reads[1][0][:, -1], since_B)
            opened = torch.where(layout.crosses_B11, states[0], opened)
    after |= {"total": states[-1], "opened": opened, "since": since_B}
    after = {name: x.detach() for name, x in after.items()}
    if qk.quad_k is None:
        return out, replace(state.map(torch.detach), seen=layout.seen_after_B.clone(), **after)
    own = qk._replace(lin_q=None, lin_k=None)
    local, local_state = mixed_chunk_append(own, value_BNE, layout, replace(state, lin_k=None), **options)
    return None if out is None else local + out, replace(local_state, **after)
