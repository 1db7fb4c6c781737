# SPDX-License-Identifier: Apache-2.0
"""The kernels as `torch.library` operators with gradients: the gated attention between the projections, and the whole
layer. Both run the same launches; the layer also folds the norm, the residual sum and the gate's gradient into its
matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from . import choice
from .launches import (
    SUM_BLOCK,
    Sums,
    launch_backward,
    launch_forward,
    launch_norm,
    launch_norm_gradient,
    launch_residual,
    launch_sums,
)
from .plan import ChunkIndex
from .tiles import Inputs, Shape, on_device, tiles_for


def is_watched(tensors: tuple) -> bool:
    """Whether somebody looks at operators and not at results: a compiler, an exporter, a function transform, a
    dispatch mode (fake tensors, selective checkpointing), a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(isinstance(x, Tensor) and type(x) not in (Tensor, Parameter) for x in tensors)
    )


def direct(forward: Callable, backward: Callable, save: Callable, gradients: Callable, operator: Callable) -> Callable:
    """`operator` for eager callers without the dispatcher, whose Python costs more than a layer's launches do.

    Args:
        forward, backward: what the operator and its gradient's operator do.
        save, gradients: the context's set-up and the gradient, as `register_autograd` takes them, after `backward`.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            outputs = forward(*inputs)
            save(ctx, inputs, outputs)
            ctx.mark_non_differentiable(*outputs[1:])
            return tuple(outputs)

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            # An operator's list of tensors has a list of gradients, a function's has none.
            return tuple(None if isinstance(grad, list) else grad for grad in gradients(backward, ctx, grads))

    def call(*inputs) -> list[Tensor] | tuple[Tensor, ...]:
        if is_watched(inputs):
            return operator(*inputs)
        return Direct.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)

    return call


# ------------------------------------------------------------------------------------------------------------------
# Gated attention, between the projections
# ------------------------------------------------------------------------------------------------------------------
def attention_shape(
    u: Tensor, z: Tensor, gamma: Tensor, N: int, G: int, C: int, shift: int, causal: bool, quad: bool, lin: bool,
    previous: bool, silu: bool, interleaved: bool, rotary_dim: int, scale: float,
) -> Shape:  # fmt: skip
    S = z.shape[1]
    return Shape(
        u.shape[0] // N, N, G, C, shift, u.shape[1], S, gamma.shape[0], causal, quad, lin, previous, False, silu,
        interleaved, rotary_dim, scale, u.dtype, tiles_for(C, int(S), u.dtype),
    )  # fmt: skip


def attention_forward(
    u: Tensor, v: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, bias_R: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, source: Tensor | None, index: list[Tensor], initial: Tensor | None, kept: Tensor | None,
    kept_mask: Tensor | None, N: int, G: int, C: int, shift: int, causal: bool, quad: bool, lin: bool, previous: bool,
    silu: bool, interleaved: bool, rotary_dim: int, scale: float, want_final: bool, want_attended: bool,
) -> list[Tensor]:  # fmt: skip
    shape = attention_shape(
        u, z, gamma, N, G, C, shift, causal, quad, lin, previous, silu, interleaved, rotary_dim, scale
    )
    inputs = Inputs(u, v, z, gamma, beta, bias_R, cos, sin, source, ChunkIndex(*index))
    with on_device(u):
        return list(launch_forward(shape, inputs, initial, kept, kept_mask, want_final, want_attended))


gated_attention_op = torch.library.custom_op("flash_hf::gated_attention", attention_forward, mutates_args=())


@gated_attention_op.register_fake
def _(u, v, z, gamma, beta, bias_R, cos, sin, source, index, initial, kept, kept_mask, N, G, C, shift, causal, quad,
      lin, previous, silu, interleaved, rotary_dim, scale, want_final, want_attended):  # fmt: skip
    shape = attention_shape(
        u, z, gamma, N, G, C, shift, causal, quad, lin, previous, silu, interleaved, rotary_dim, scale
    )
    return fake_forward(shape, v, source, ChunkIndex(*index), initial is not None, want_final, want_attended)


def fake_forward(
    shape: Shape, v: Tensor, source: Tensor | None, index: ChunkIndex, initial: bool, want_final: bool,
    want_attended: bool,
):  # fmt: skip
    """Empty tensors of the shapes that `launch_forward` returns."""
    scanned = choice.scans(shape, source, v.device)
    t, E, new = shape.tiles, shape.E, v.new_empty
    pieces, documents = index.pieces, index.documents
    state = (t.SP, E)
    prefix, carry, final = (new((0,)) for _ in range(3))
    if shape.lin:
        prefix = new((shape.GT, *state)) if shape.causal else new((0,))
        if not shape.causal:
            carry = new((documents, *state))
        elif (pieces > documents or initial) and (initial or want_final or not scanned):
            carry = new((pieces, *state))
        if want_final:
            final = new((documents, *state), dtype=torch.float32)
    return [
        new((shape.B * shape.N, E)),
        new((shape.H, shape.GT, t.CP, t.SP)),
        prefix,
        carry,
        new((shape.B * shape.N, E)) if want_attended else new((0,)),
        final,
    ]


def attention_backward(
    d_out: Tensor, u: Tensor, v: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, bias_R: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, source: Tensor | None, index: list[Tensor], heads: Tensor, prefix: Tensor,
    carry: Tensor, gated: Tensor, N: int, G: int, C: int, shift: int, causal: bool, quad: bool,
    lin: bool, previous: bool, silu: bool, interleaved: bool, rotary_dim: int, scale: float,
) -> list[Tensor]:  # fmt: skip
    shape = attention_shape(
        u, z, gamma, N, G, C, shift, causal, quad, lin, previous, silu, interleaved, rotary_dim, scale
    )
    inputs = Inputs(u, v, z, gamma, beta, bias_R, cos, sin, source, ChunkIndex(*index))
    make = torch.zeros if source is not None else torch.empty  # padding is in no chunk: nobody writes its gradient
    d_u, d_v, d_z = (make(x.shape, dtype=x.dtype, device=x.device) for x in (u, v, z))
    with on_device(u):
        saved = heads, prefix, carry
        *parts, squares = launch_backward(shape, inputs, saved, gated, d_out, (d_u, d_v, d_z), False)
        sums = Sums.of(shape, 0, bias_R is not None)
        small = launch_sums(shape, sums, *parts, None, squares, torch.float32)
    return [d_u, d_v, d_z, small]


gated_attention_backward_op = torch.library.custom_op(
    "flash_hf::gated_attention_backward", attention_backward, mutates_args=()
)


@gated_attention_backward_op.register_fake
def _(d_out, u, v, z, gamma, beta, bias_R, cos, sin, source, index, heads, prefix, carry, gated, N, G, C, shift,
      causal, quad, lin, previous, silu, interleaved, rotary_dim, scale):  # fmt: skip
    shape = attention_shape(
        u, z, gamma, N, G, C, shift, causal, quad, lin, previous, silu, interleaved, rotary_dim, scale
    )
    blocks = Sums.of(shape, 0, bias_R is not None).blocks
    return [*(x.new_empty(x.shape) for x in (u, v, z)), u.new_empty((sum(blocks) * SUM_BLOCK,), dtype=torch.float32)]


def _save_attention(ctx, inputs, output):
    u, v, z, gamma, beta, bias_R, cos, sin, source, index, _, _, _, *static, want_final, want_attended = inputs
    out, heads, prefix, carry, attended, final = output
    ctx.set_materialize_grads(False)
    gated = attended if want_attended else out
    ctx.optional = bias_R is not None, cos is not None, source is not None
    optional = [x for x in (bias_R, cos, sin, source) if x is not None]
    ctx.save_for_backward(u, v, z, gamma, beta, heads, prefix, carry, gated, *index, *optional)
    ctx.static = static


def _optional(ctx, tensors: list) -> list:
    """`[bias_R, cos, sin, source]` with None where there was none."""
    has_bias, has_rope, has_source = ctx.optional
    tensors = iter(tensors)
    return [next(tensors) if has else None for has in (has_bias, has_rope, has_rope, has_source)]


def _attention_gradients(backward, ctx, grads):
    if grads[0] is None:
        return (None,) * 27
    u, v, z, gamma, beta, heads, prefix, carry, gated, *rest = ctx.saved_tensors
    index, optional = rest[:7], _optional(ctx, rest[7:])
    bias_R = optional[0]
    # Descriptors cannot describe an expanded gradient.
    d_out = grads[0].contiguous()
    d_u, d_v, d_z, small = backward(
        d_out, u, v, z, gamma, beta, *optional, index, heads, prefix, carry, gated, *ctx.static
    )
    H, S = gamma.shape
    shape = attention_shape(u, z, gamma, *ctx.static)
    _, _, rows, _, d_bias = Sums.of(shape, 0, bias_R is not None).split(small)
    rows = rows.view(2 * H + 1, S)
    d_bias = None if d_bias.numel() == 0 else d_bias.to(bias_R.dtype)
    none = (None, None, None, [None] * 7, None, None, None) + (None,) * 14
    return d_u, d_v, d_z, rows[:H].to(gamma.dtype), rows[H : 2 * H].to(beta.dtype), d_bias, *none


gated_attention_op.register_autograd(
    partial(_attention_gradients, gated_attention_backward_op), setup_context=_save_attention
)
gated_attention = direct(
    attention_forward, attention_backward, _save_attention, _attention_gradients, gated_attention_op
)


# ------------------------------------------------------------------------------------------------------------------
# The whole layer
# ------------------------------------------------------------------------------------------------------------------


def layer_shape(
    h_dtype, T, E, S, gamma, N, G, C, shift, causal, quad, lin, previous, interleaved, rotary_dim, scale
) -> Shape:  # fmt: skip
    return Shape(
        T // N, N, G, C, shift, E, S, gamma.shape[0], causal, quad, lin, previous, True, True, interleaved,
        rotary_dim, scale, h_dtype, tiles_for(C, int(S), h_dtype),
    )  # fmt: skip


def split_columns(h: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    return h[:, :E], h[:, E : 2 * E], h[:, 2 * E :]


def layer_forward(
    x: Tensor, gain: Tensor, w_u: Tensor, b_u: Tensor, w_v: Tensor, b_v: Tensor, w_z: Tensor, b_z: Tensor,
    w_o: Tensor, b_o: Tensor, gamma: Tensor, beta: Tensor, bias_R: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, source: Tensor | None, index: list[Tensor], initial: Tensor | None, kept: Tensor | None,
    kept_mask: Tensor | None, eps: float, N: int, G: int, C: int, shift: int, causal: bool, quad: bool, lin: bool,
    previous: bool, interleaved: bool, rotary_dim: int, scale: float, want_final: bool, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    T, D = x.shape
    shape = layer_shape(
        dtype, T, len(w_u), len(w_z), gamma, N, G, C, shift, causal, quad, lin, previous, interleaved, rotary_dim,
        scale,
    )  # fmt: skip
    E = shape.E
    rms = x.new_empty(T, dtype=torch.float32)
    cast = x.new_empty((T, D), dtype=dtype) if x.dtype != dtype else x.new_empty((0,), dtype=dtype)
    with on_device(x):
        launch_norm(x, gain, eps, rms, cast, cast=x.dtype != dtype, scale=False)
        raw_x = cast if x.dtype != dtype else x
        w = torch.cat([w_u, w_v, w_z]).to(dtype)
        h = torch.mm(raw_x, w.t())
        u, v, z = split_columns(h, E)
        inputs = Inputs(u, v, z, gamma, beta, bias_R, cos, sin, source, ChunkIndex(*index), rms, gain, b_u, b_v, b_z)
        out, heads, prefix, carry, _, final = launch_forward(
            shape, inputs, initial, kept, kept_mask, want_final, False
        )
        y = launch_residual(x, out, w_o.to(dtype), b_o)
    return [y, rms, cast, h, w, heads, prefix, carry, out, final]


layer_op = torch.library.custom_op("flash_hf::layer", layer_forward, mutates_args=())


@layer_op.register_fake
def _(x, gain, w_u, b_u, w_v, b_v, w_z, b_z, w_o, b_o, gamma, beta, bias_R, cos, sin, source, index, initial, kept,
      kept_mask, eps, N, G, C, shift, causal, quad, lin, previous, interleaved, rotary_dim, scale, want_final,
      dtype):  # fmt: skip
    T, D = x.shape
    shape = layer_shape(
        dtype, T, len(w_u), len(w_z), gamma, N, G, C, shift, causal, quad, lin, previous, interleaved, rotary_dim,
        scale,
    )  # fmt: skip
    cast = x.new_empty((T, D) if x.dtype != dtype else (0,), dtype=dtype)
    h = x.new_empty((T, 2 * shape.E + shape.S), dtype=dtype)
    out, heads, prefix, carry, _, final = fake_forward(
        shape, h, source, ChunkIndex(*index), initial is not None, want_final, False
    )
    return [
        torch.empty_like(x), x.new_empty(T, dtype=torch.float32), cast, h, h.new_empty((h.shape[1], D)), heads,
        prefix, carry, out, final,
    ]  # fmt: skip


def layer_backward(
    d_y: Tensor, x: Tensor, gain: Tensor, w: Tensor, b_u: Tensor, b_v: Tensor, b_z: Tensor, w_o: Tensor,
    gamma: Tensor, beta: Tensor, bias_R: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    source: Tensor | None, index: list[Tensor], rms: Tensor, h: Tensor, heads: Tensor, prefix: Tensor, carry: Tensor,
    out: Tensor, N: int, G: int, C: int, shift: int, causal: bool, quad: bool, lin: bool, previous: bool,
    interleaved: bool, rotary_dim: int, scale: float, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    T, D = d_y.shape
    E, S = out.shape[1], gamma.shape[1]
    shape = layer_shape(
        h.dtype, T, E, S, gamma, N, G, C, shift, causal, quad, lin, previous, interleaved, rotary_dim, scale
    )
    raw_dy = d_y.to(h.dtype)
    with on_device(d_y):
        d_h = h.new_zeros(h.shape) if source is not None else h.new_empty(h.shape)
        u, v, z = split_columns(h, E)
        d_w_o = torch.mm(raw_dy.t(), out)
        d_out = torch.mm(raw_dy, w_o.to(h.dtype))
        inputs = Inputs(u, v, z, gamma, beta, bias_R, cos, sin, source, ChunkIndex(*index), rms, gain, b_u, b_v, b_z)
        saved = heads, prefix, carry
        *parts, squares = launch_backward(shape, inputs, saved, out, d_out, split_columns(d_h, E), True)
        del d_out
        p = torch.mm(d_h, w)
        d_w = torch.mm(d_h.t(), x)
        del d_h
        d_x = torch.empty_like(d_y)
        norm = launch_norm_gradient(p, x, d_y, rms, gain, d_x)
        small = launch_sums(shape, Sums.of(shape, D, bias_R is not None), *parts, norm, squares, dtype)
    return [d_x, d_w, d_w_o, small]


layer_backward_op = torch.library.custom_op("flash_hf::layer_backward", layer_backward, mutates_args=())


@layer_backward_op.register_fake
def _(d_y, x, gain, w, b_u, b_v, b_z, w_o, gamma, beta, bias_R, cos, sin, source, index, rms, h, heads, prefix, carry,
      out, N, G, C, shift, causal, quad, lin, previous, interleaved, rotary_dim, scale, dtype):  # fmt: skip
    (T, D), E, S = d_y.shape, out.shape[1], gamma.shape[1]
    shape = layer_shape(
        h.dtype, T, E, S, gamma, N, G, C, shift, causal, quad, lin, previous, interleaved, rotary_dim, scale
    )
    blocks = Sums.of(shape, D, bias_R is not None).blocks
    small = h.new_empty((sum(blocks) * SUM_BLOCK,), dtype=dtype)
    return [torch.empty_like(d_y), h.new_empty((2 * E + S, D)), h.new_empty((D, E)), small]


def _save_layer(ctx, inputs, output):
    x, gain, w_u, b_u, w_v, b_v, w_z, b_z, w_o, b_o, gamma, beta, bias_R, cos, sin, source, index, *rest = inputs
    _, _, _, _, *static, want_final, dtype = rest
    y, rms, cast, h, w, heads, prefix, carry, out, final = output
    ctx.set_materialize_grads(False)
    ctx.optional = bias_R is not None, cos is not None, source is not None
    optional = [t for t in (bias_R, cos, sin, source) if t is not None]
    raw_x = cast if x.dtype != dtype else x
    ctx.save_for_backward(
        raw_x, gain, w, b_u, b_v, b_z, w_o, gamma, beta, rms, h, heads, prefix, carry, out, *index, *optional,
    )  # fmt: skip
    ctx.static, ctx.bias_dtype, ctx.weight_dtypes = static, b_o.dtype, (w_u.dtype, w_v.dtype, w_z.dtype)


def _layer_gradients(backward, ctx, grads):
    if grads[0] is None:
        return (None,) * 34
    (raw_x, gain, w, b_u, b_v, b_z, w_o, gamma, beta, rms, h, heads, prefix, carry, out, *rest) = ctx.saved_tensors
    index, optional = rest[:7], _optional(ctx, rest[7:])
    bias_R = optional[0]
    small = [x.dtype for x in (gain, b_u, b_v, b_z, gamma, beta, bias_R) if x is not None] + [ctx.bias_dtype]
    dtype = small[0] if len(set(small)) == 1 else torch.float32
    d_x, d_w, d_w_o, small = backward(
        grads[0].contiguous(), raw_x, gain, w, b_u, b_v, b_z, w_o, gamma, beta, *optional, index, rms, h, heads,
        prefix, carry, out, *ctx.static, dtype,
    )  # fmt: skip
    (D, E), (H, S) = w_o.shape, gamma.shape
    shape = layer_shape(h.dtype, raw_x.shape[0], E, S, gamma, *ctx.static)
    d_b_u, d_b_v, rows, norm, d_bias_R = Sums.of(shape, D, bias_R is not None).split(small)
    rows = rows.view(2 * H + 1, S)
    d_bias_R = None if d_bias_R.numel() == 0 else d_bias_R.to(bias_R.dtype)
    d_w_u, d_w_v, d_w_z = (x.to(t) for x, t in zip(d_w.split((E, E, S)), ctx.weight_dtypes, strict=True))
    none = (None, None, None, [None] * 7, None, None, None) + (None,) * 14
    return (
        d_x, norm[D].to(gain.dtype), d_w_u, d_b_u.to(b_u.dtype), d_w_v, d_b_v.to(b_v.dtype), d_w_z,
        rows[2 * H].to(b_z.dtype), d_w_o.to(w_o.dtype), norm[:D].to(ctx.bias_dtype), rows[:H].to(gamma.dtype),
        rows[H : 2 * H].to(beta.dtype), d_bias_R, *none,
    )  # fmt: skip


layer_op.register_autograd(partial(_layer_gradients, layer_backward_op), setup_context=_save_layer)
layer = direct(layer_forward, layer_backward, _save_layer, _layer_gradients, layer_op)


# ------------------------------------------------------------------------------------------------------------------
# ScaleNorm on its own, for the end of the model
# ------------------------------------------------------------------------------------------------------------------
@torch.library.custom_op("flash_hf::scale_norm", mutates_args=())
def scale_norm_op(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rms = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
    with on_device(x):
        launch_norm(x, gain, eps, rms, y, cast=False, scale=True)
    return y, rms


@scale_norm_op.register_fake
def _(x, gain, eps):
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("flash_hf::scale_norm_backward", mutates_args=())
def scale_norm_backward_op(d_y: Tensor, x: Tensor, rms: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(x)
    with on_device(x):
        sums = launch_norm_gradient(None, x, d_y, rms, gain, d_x)
    return d_x, sums.sum()


@scale_norm_backward_op.register_fake
def _(d_y, x, rms, gain):
    return torch.empty_like(x), x.new_empty((), dtype=torch.float32)


def _save_norm(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1], inputs[1])


def _norm_backward(ctx, d_y, _):
    if d_y is None:
        return None, None, None
    x, rms, gain = ctx.saved_tensors
    d_x, d_gain = torch.ops.flash_hf.scale_norm_backward(d_y.contiguous(), x, rms, gain)
    return d_x, d_gain.to(gain.dtype), None


scale_norm_op.register_autograd(_norm_backward, setup_context=_save_norm)
