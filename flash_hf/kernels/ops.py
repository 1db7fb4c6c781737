# SPDX-License-Identifier: Apache-2.0
"""The kernels as `torch.library` operators with gradients: gated attention between the projections, a whole layer,
ScaleNorm, and the rotary bias. A layer adds the norm, the projections and the residual sum to the launches of gated
attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from operator import itemgetter
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.nn import Parameter

from ..chunking_flash import is_transformed, refuse_second_derivatives
from . import choice, delta
from .launches import (
    GATE_COLUMNS,
    Product,
    Sums,
    launch_backward,
    launch_forward,
    launch_norm,
    launch_norm_gradient,
    launch_open_chunk,
    launch_residual,
    launch_rotary_bias,
    launch_rotary_bias_gradient,
    launch_sums,
)
from .plan import ChunkIndex
from .replay import replayed
from .tiles import AttentionResults, Cached, Inputs, Own, Projections, Shape, absent, on_device, rows_of


# ------------------------------------------------------------------------------------------------------------------
# Operators and gradients in named tensors
# ------------------------------------------------------------------------------------------------------------------
# Types of the fields of a shape, which every operator takes by name.
SHAPE = {field.name: get_type_hints(Shape)[field.name] for field in fields(Shape)}


def group(name: str, tensors: str, optional: str) -> type:
    """A NamedTuple of tensors, of others that may be None, and of the index."""
    types = dict.fromkeys(tensors.split(), Tensor) | dict.fromkeys(optional.split(), Tensor | None)
    return NamedTuple(name, [*types.items(), ("index", list[Tensor])])


def schema(tensors: dict[str, type], options: dict[str, type]) -> str:
    """An operator's schema: tensors by position, since only these can have gradients, and options by name."""
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(name, kind, annotation=hint)
        for kind, hints in zip(kinds, (tensors, options), strict=True)
        for name, hint in hints.items()
    ]

    def prototype():
        pass

    prototype.__signature__ = inspect.Signature(parameters, return_annotation=list[Tensor])
    return torch.library.infer_schema(prototype, mutates_args=())


# What operations take, as is.
PLAIN = frozenset((Tensor, Parameter, type(None), ChunkIndex))


def is_watched(tensors: tuple) -> bool:
    """Whether operators have to be called, not just their results computed: under a compiler, an exporter, a function
    transform or a dispatch mode (fake tensors, selective checkpointing), and with tensor subclasses."""
    return torch.compiler.is_compiling() or is_transformed() or not PLAIN.issuperset(map(type, tensors))


def plain(tensors: NamedTuple) -> list:
    """Tensors as operators take them."""
    return [*tensors[:-1], list(tensors.index)]


def named(kind: type, tensors: tuple) -> NamedTuple:
    """Tensors as an operator got them, as a `kind`."""
    return kind(*tensors[:-1], ChunkIndex(*tensors[-1]))


def by_name(shape: Shape) -> dict:
    return {name: getattr(shape, name) for name in SHAPE}


def take_shape(options: dict) -> Shape:
    """The shape among an operator's options, removed from them."""
    return Shape(**{name: options.pop(name) for name in SHAPE})


def operators(operation: type) -> tuple[Callable, Callable]:
    """The operators of an operation and of its gradient, which take tensors by position and the rest by name."""
    Tensors, Saved = operation.Tensors, operation.Saved

    def forward_by(run: Callable) -> Callable:
        def forward(*tensors, **options):
            shape = take_shape(options)
            results = run(named(Tensors, tensors), shape, **options)
            # An operator must not return a tensor twice, and an absent one is.
            return [x if x.numel() else x.new_empty(x.shape) for x in results]

        return forward

    def backward_by(run: Callable) -> Callable:
        return lambda d_out, *saved, **shape: run(d_out, named(Saved, saved), Shape(**shape))

    def operator(name: str, run: Callable, fake: Callable, *hints: dict) -> Callable:
        made = torch.library.custom_op(f"flash_hf::{name}", run, mutates_args=(), schema=schema(*hints))
        made.register_fake(fake)
        return made

    forward = operator(
        operation.name, forward_by(operation.forward), forward_by(operation.fake_forward), get_type_hints(Tensors),
        SHAPE | operation.options,
    )  # fmt: skip
    backward = operator(
        operation.name + "_backward", backward_by(operation.backward), backward_by(operation.fake_backward),
        {"d_out": Tensor} | get_type_hints(Saved), SHAPE,
    )  # fmt: skip
    return forward, backward


def register(operation: type) -> Callable:
    """Register an operation and its gradient with torch.

    Args:
        operation: a class with the attributes

            - `name`: of the operator; that of its gradient ends in `_backward`;
            - `Tensors` and `Results`: NamedTuples of what it takes, `index` last, and of what it returns; only the
              first result has a gradient;
            - `Saved`: NamedTuple of what the backward reads of both, under the same names, `index` last;
            - `options`: types of what it takes besides the fields of `Shape`;

            and the static methods

            - `forward(tensors, shape, **options)`, which returns `Results`;
            - `to_save(tensors, results)`: the tensors, with what `Saved` has instead of one of them;
            - `backward(d_out, saved, shape)`, which returns a list of tensors;
            - `fake_forward` and `fake_backward`, which return empty tensors of the same shapes;
            - `gradients(found, saved, shape)`: the gradients in that list, by names of `Tensors`.

    Returns:
        `call(tensors, shape, **options)`, which returns `Results`. Eager calls bypass the dispatcher, whose Python
        costs more than a layer's launches.
    """
    Tensors, Results, Saved = operation.Tensors, operation.Results, operation.Saved
    forward_op, backward_op = operators(operation)
    no_gradients = Tensors(*[None] * len(Tensors._fields))
    place = {name: i for i, name in enumerate(Tensors._fields + Results._fields)}
    pick_saved = itemgetter(*(place[name] for name in Saved._fields))

    def save(ctx, tensors, shape: Shape, results, exchange=None):
        *saved, index = pick_saved((*operation.to_save(tensors, results), *results))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, *index)
        ctx.shape, ctx.exchange = shape, exchange

    def gradients(backward: Callable, ctx, d_out: Tensor | None):
        if d_out is None:
            return no_gradients
        tensors, others = ctx.saved_tensors, len(Saved._fields) - 1
        saved = named(Saved, (*tensors[:others], tensors[others:]))
        # Descriptors cannot describe an expanded gradient.
        return backward(d_out.contiguous(), saved, ctx.shape)

    def by_place(found: list[Tensor], saved, shape: Shape):
        # Autograd casts a gradient to its input's type.
        return no_gradients._replace(**operation.gradients(found, saved, shape))

    def operator_context(ctx, inputs, keyword_only_inputs, output):
        save(ctx, named(Tensors, inputs), take_shape(dict(keyword_only_inputs)), Results(*output))

    def operator_gradients(ctx, grads: list[Tensor | None]):
        def backward(d_out, saved, shape):
            return by_place(backward_op(d_out, *plain(saved), **by_name(shape)), saved, shape)

        # An operator's list of tensors has a list of gradients.
        return *gradients(backward, ctx, grads[0])[:-1], [None] * len(ChunkIndex._fields)

    forward_op.register_autograd(operator_gradients, setup_context=operator_context)

    def run_forward(tensors, shape: Shape, options: dict):
        run = partial(operation.forward, tensors, shape, **options)
        if options.get("exchange") is not None:
            return run()
        return replayed(operation.forward, run, shape, tensors[:-1], tensors.index, *options.values())

    def run_backward(exchange, d_out: Tensor, saved, shape: Shape):
        def run():
            return by_place(operation.backward(d_out, saved, shape, exchange), saved, shape)

        if exchange is not None:
            return run()
        return replayed(operation.backward, run, shape, [d_out, *saved[:-1]], saved.index)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, shape, options, kept, *tensors):
            tensors = Tensors(*tensors)
            results = run_forward(tensors, shape, options)
            kept += results
            save(ctx, tensors, shape, results, options.get("exchange"))
            return kept[0]

        @staticmethod
        def backward(ctx, d_out):
            refuse_second_derivatives()
            return None, None, None, *gradients(partial(run_backward, ctx.exchange), ctx, d_out)

    # What `Function.apply` ends in. First it looks for tensors of function transforms that have ended, which takes as
    # long.
    apply = super(torch.autograd.Function, Direct).apply

    def call(tensors, shape: Shape, **options):
        # An operator cannot take the processes that hold the other parts of rows.
        if options.get("exchange") is None and is_watched(tensors):
            options.pop("exchange", None)
            return Results(*forward_op(*plain(tensors), **by_name(shape), **options))
        if torch.is_grad_enabled():
            # Outputs without a gradient would cost autograd as much as others.
            kept: list[Tensor] = []
            first = apply(shape, options, kept, *tensors)
            return Results(first, *kept[1:])
        return run_forward(tensors, shape, options)

    call.operator = forward_op
    return call


# ------------------------------------------------------------------------------------------------------------------
# Gated attention, between the projections
# ------------------------------------------------------------------------------------------------------------------
# What both operations read besides the projections: offset-scale `[H, S]`, the bias of the delta rule's gates `[2]`,
# relative bias `[2 C - 1]`, cos and sin of the slots' positions `[slots, r / 2]`, the plan's source, and what a cache
# brings, see `Cached`.
HEADS, OPTIONAL, CACHED = "gamma beta", "gate_bias bias_R cos sin source", " ".join(Cached._fields)
STATES = "heads prefix carry out slots inverse erase decay"


def cached_of(tensors) -> Cached:
    return Cached(*(getattr(tensors, name) for name in Cached._fields))


def inputs_of(x, projections: Projections, *norm: Tensor) -> Inputs:
    """The inputs of launches, from an operation's tensors or from what it saved."""
    u, v, z, gates = projections
    return Inputs(
        u, v, z, x.gamma, x.beta, x.bias_R, x.cos, x.sin, x.source, x.index, gates, x.gate_bias, *norm
    )  # fmt: skip


def projections_of(x) -> Projections:
    return Projections(x.u, x.v, x.z, x.gates)


def fake_attention(tensors, shape: Shape, want_final: bool) -> AttentionResults:
    """Empty tensors like those that `launch_forward` returns."""
    scanned = choice.scans(shape, tensors.source, tensors.gamma.device)
    t, E, pieces, documents = shape.tiles, shape.E, tensors.index.pieces, tensors.index.documents
    initial = tensors.initial is not None

    def new(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return tensors.gamma.new_empty(size, dtype=dtype)

    prefix = carry = final = (0,)
    if shape.lin:
        if shape.causal:
            prefix = shape.GT, t.SP, E
        if not shape.causal:
            carry = documents, t.SP, E
        elif shape.delta:
            pass
        elif initial or (pieces > documents and not scanned):
            carry = pieces, t.SP, E
        if want_final:
            final = documents, t.SP, E
    own = delta.sizes(shape) if shape.delta else delta.Prepared((0,), (0,), (0,), (0,))
    return AttentionResults(
        out=new(shape.T, E),
        heads=new(shape.rows, shape.GT, t.CP, t.SP),
        prefix=new(*prefix),
        carry=new(*carry),
        attended=new(shape.T, E) if shape.keeps_attended else new(0),
        final=new(*final, dtype=torch.float32 if want_final else shape.dtype),
        slots=new(*own.slots, dtype=torch.float32),
        inverse=new(*own.inverse, dtype=torch.float32),
        erase=new(*own.erase),
        decay=new(*own.decay, dtype=torch.float32),
    )


# u, v, z and gates are outputs of the projections, see `Projections`.
AttentionTensors = group("AttentionTensors", f"u v z {HEADS}", f"gates {OPTIONAL} {CACHED}")
SavedAttention = group("SavedAttention", f"u v z {HEADS} {STATES} attended", f"gates {OPTIONAL}")


class GatedAttention:
    name = "gated_attention"
    Tensors, Results, Saved = AttentionTensors, AttentionResults, SavedAttention
    options = {"want_final": bool}

    @staticmethod
    def forward(tensors: AttentionTensors, shape: Shape, *, want_final: bool, exchange=None) -> AttentionResults:
        inputs = inputs_of(tensors, projections_of(tensors))
        with on_device(tensors.u):
            return launch_forward(shape, inputs, cached_of(tensors), want_final, exchange)

    @staticmethod
    def fake_forward(tensors: AttentionTensors, shape: Shape, *, want_final: bool) -> AttentionResults:
        return fake_attention(tensors, shape, want_final)

    @staticmethod
    def to_save(tensors: AttentionTensors, results: AttentionResults) -> AttentionTensors:
        return tensors

    @staticmethod
    def backward(d_out: Tensor, saved: SavedAttention, shape: Shape, exchange=None) -> list[Tensor]:
        # Padding is in no chunk, and no kernel writes its gradient.
        make = torch.empty if saved.source is None else torch.zeros
        own = projections_of(saved)
        d_h = Projections(*(None if x is None else make(x.shape, dtype=x.dtype, device=x.device) for x in own))
        inputs = inputs_of(saved, own)
        with on_device(saved.u):
            parts = launch_backward(shape, inputs, saved, d_out, d_h, False, exchange)
            small = launch_sums(shape, Sums.of(shape, saved.bias_R is not None), parts, torch.float32)
        return [*d_h[:3], small, *([d_h.gates, parts.gates.sum(0)] if shape.delta else [])]

    @staticmethod
    def fake_backward(d_out: Tensor, saved: SavedAttention, shape: Shape) -> list[Tensor]:
        size = Sums.of(shape, saved.bias_R is not None).size
        d_h = (x.new_empty(x.shape) for x in (saved.u, saved.v, saved.z))
        small = d_out.new_empty((size,), dtype=torch.float32)
        gates = [saved.gates.new_empty(saved.gates.shape), small.new_empty(2)] if shape.delta else []
        return [*d_h, small, *gates]

    @staticmethod
    def gradients(results: list[Tensor], saved: SavedAttention, shape: Shape) -> dict[str, Tensor]:
        d_u, d_v, d_z, small, *gates = results
        sums = Sums.of(shape, saved.bias_R is not None).split(small, shape)
        return {"u": d_u, "v": d_v, "z": d_z, **sums, **dict(zip(("gates", "gate_bias"), gates, strict=False))}


gated_attention = register(GatedAttention)


# ------------------------------------------------------------------------------------------------------------------
# The whole layer
# ------------------------------------------------------------------------------------------------------------------
# x is the layer's input `[B, tokens, D]`; gain is of its norm; w and b are weights and biases of projections.
LayerTensors = group("LayerTensors", f"x gain w_u b_u w_v b_v w_z b_z w_o b_o {HEADS}", f"w_gates {OPTIONAL} {CACHED}")
# y is the layer's output; rms is `1 / sqrt(mean(x^2) + eps)` per token; cast is x in the products' type, `[T, D]`, or
# empty if x has that type; h is `x w^T`, where w joins the weights of u, v, z and the gates; the others are as in
# `AttentionResults`.
LayerResults = NamedTuple("LayerResults", [(name, Tensor) for name in f"y rms cast h w {STATES} final".split()])
# Here x is in the products' type.
SavedLayer = group("SavedLayer", f"x gain w b_u b_v b_z w_o b_o rms h {HEADS} {STATES}", OPTIONAL)


def layer_inputs(x, h: Tensor, rms: Tensor, shape: Shape) -> Inputs:
    return inputs_of(x, split_columns(h, shape), rms, x.gain, x.b_u, x.b_v, x.b_z)


def layer_results(attention: AttentionResults, **others: Tensor) -> LayerResults:
    return LayerResults(
        **others, **{name: getattr(attention, name) for name in LayerResults._fields if name not in others}
    )  # fmt: skip


def own_tokens(x: Tensor, shape: Shape, exchange) -> Own:
    """Where the tokens of x, `[B, N, D]`, are among those that attention reads."""
    if exchange is None:
        return Own(shape.B, shape.N, shape.N, 0)
    return Own(shape.B, x.shape[1], shape.N, exchange.left)


def project(x: Tensor, w: Tensor, own: Own) -> Tensor:
    """`x w^T` where attention reads it, `[B * M, F]`; other rows are not filled."""
    if own.whole:
        return torch.mm(x, w.t())
    h = x.new_empty(own.B * own.M, len(w))
    for x_rows, h_rows in own.parts:
        torch.mm(x[x_rows], w.t(), out=h[h_rows])
    return h


def product_over_tokens(left: Tensor, right: Tensor, parts: list[tuple[slice, slice]]) -> Tensor:
    """`left^T right` over the tokens of parts, which are given for either."""
    (here, there), *others = parts
    out = torch.mm(rows_of(left, here).t(), rows_of(right, there))
    for here, there in others:
        out.addmm_(left[here].t(), right[there])
    return out


def columns(shape: Shape) -> list[int]:
    """Widths of u, v, z and, if there are any, gates in h."""
    return [shape.E, shape.E, shape.S, *[GATE_COLUMNS] * shape.delta]


def split_columns(h: Tensor, shape: Shape) -> Projections:
    return Projections(*torch.split_with_sizes(h, columns(shape), 1))


def sums_dtype(saved: SavedLayer) -> torch.dtype:
    """The type of the small parameters' gradients: their common type, or float32."""
    small = saved.gain, saved.b_u, saved.b_v, saved.b_z, saved.b_o, saved.gamma, saved.beta, saved.bias_R
    dtypes = {x.dtype for x in small if x is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


class Layer:
    name = "layer"
    Tensors, Results, Saved = LayerTensors, LayerResults, SavedLayer
    options = {"eps": float, "want_final": bool}

    @staticmethod
    def forward(
        tensors: LayerTensors, shape: Shape, *, eps: float, want_final: bool, exchange=None
    ) -> LayerResults:  # fmt: skip
        # A view outside of the operation would have its own node in autograd's graph.
        x, dtype = tensors.x.view(-1, shape.D), shape.dtype
        own = own_tokens(tensors.x, shape, exchange)
        casts = x.dtype != dtype
        rms = x.new_empty(shape.T, dtype=torch.float32)
        cast = x.new_empty(x.shape, dtype=dtype) if casts else absent(x.device, dtype)
        w = x.new_empty((sum(columns(shape)), shape.D), dtype=dtype)
        weights = [tensors.w_u, tensors.w_v, tensors.w_z, *[tensors.w_gates] * shape.delta]
        with on_device(x):
            for number, (here, there) in enumerate(own.parts):
                joined = {} if number else {"weights": weights, "joined": w}
                launch_norm(
                    rows_of(x, here), tensors.gain, eps, rows_of(rms, there), rows_of(cast, here), cast=casts, **joined
                )  # fmt: skip
            h = project(cast if casts else x, w, own)
            if exchange is not None:
                exchange.take_halo(h, rms)
            inputs = layer_inputs(tensors, h, rms, shape)
            attention = launch_forward(shape, inputs, cached_of(tensors), want_final, exchange)
            w_o = tensors.w_o.to(dtype)
            if own.whole:
                y = launch_residual(tensors.x, attention.out, w_o, tensors.b_o, add=shape.residual)
            else:
                y = torch.empty_like(tensors.x)
                for here, there in own.parts:
                    launch_residual(
                        x[here], attention.out[there], w_o, tensors.b_o, y.view(x.shape)[here], add=shape.residual
                    )
        return layer_results(attention, y=y, rms=rms, cast=cast, h=h, w=w)

    @staticmethod
    def fake_forward(tensors: LayerTensors, shape: Shape, *, eps: float, want_final: bool) -> LayerResults:
        x, width = tensors.x, sum(columns(shape))
        return layer_results(
            fake_attention(tensors, shape, want_final),
            y=torch.empty_like(x),
            rms=x.new_empty(shape.T, dtype=torch.float32),
            cast=x.new_empty((shape.T, shape.D) if x.dtype != shape.dtype else (0,), dtype=shape.dtype),
            h=x.new_empty((shape.T, width), dtype=shape.dtype),
            w=x.new_empty((width, shape.D), dtype=shape.dtype),
        )

    @staticmethod
    def to_save(tensors: LayerTensors, results: LayerResults) -> LayerTensors:
        return tensors if tensors.x.dtype == results.h.dtype else tensors._replace(x=results.cast)

    @staticmethod
    def backward(d_out: Tensor, saved: SavedLayer, shape: Shape, exchange=None) -> list[Tensor]:
        d_y, x, h = d_out.view(-1, shape.D), saved.x.view(-1, shape.D), saved.h
        own = own_tokens(d_out, shape, exchange)
        parts_of_h = [(there, here) for here, there in own.parts]
        raw_dy = d_y.to(h.dtype)
        with on_device(d_y):
            d_h = h.new_empty(h.shape) if saved.source is None else h.new_zeros(h.shape)
            d_w_o = product_over_tokens(raw_dy, saved.out, own.parts)
            inputs = layer_inputs(saved, h, saved.rms, shape)
            d_attention = Product(raw_dy, saved.w_o.to(h.dtype), own)
            d_projections = split_columns(d_h, shape)
            parts = launch_backward(shape, inputs, saved, d_attention, d_projections, True, exchange)
            rms = saved.rms
            if exchange is not None:
                exchange.return_halo(d_h)
            if own.whole:
                p = torch.mm(d_h, saved.w)
            else:
                p = torch.empty_like(x)
                for here, there in own.parts:
                    torch.mm(d_h[there], saved.w, out=p[here])
                rms = torch.cat([rms[there] for _, there in own.parts])
            d_w = product_over_tokens(d_h, x, parts_of_h)
            del d_h
            d_x = torch.empty_like(d_out)
            norm = launch_norm_gradient(p, x, d_y, rms, saved.gain, d_x, add=shape.residual)
            sums = Sums.of(shape, saved.bias_R is not None)
            small = launch_sums(shape, sums, parts._replace(norm=norm), sums_dtype(saved))
        gates = [parts.gates.sum(0)] if shape.delta else []
        return [d_x, d_w, d_w_o, small, *gates]

    @staticmethod
    def fake_backward(d_out: Tensor, saved: SavedLayer, shape: Shape) -> list[Tensor]:
        sums = Sums.of(shape, saved.bias_R is not None)
        small = d_out.new_empty((sums.size,), dtype=sums_dtype(saved))
        w_o = saved.h.new_empty((shape.D, shape.E))
        gates = [small.new_empty(2, dtype=torch.float32)] if shape.delta else []
        return [torch.empty_like(d_out), torch.empty_like(saved.w), w_o, small, *gates]

    @staticmethod
    def gradients(results: list[Tensor], saved: SavedLayer, shape: Shape) -> dict[str, Tensor]:
        d_x, d_w, d_w_o, small, *d_gate_bias = results
        d_w_u, d_w_v, d_w_z, *d_w_gates = torch.split_with_sizes(d_w, columns(shape))
        sums = Sums.of(shape, saved.bias_R is not None).split(small, shape)
        if shape.delta:
            sums |= {"w_gates": d_w_gates[0][:2], "gate_bias": d_gate_bias[0]}
        return {"x": d_x, "w_u": d_w_u, "w_v": d_w_v, "w_z": d_w_z, "w_o": d_w_o, **sums}


layer = register(Layer)


# ------------------------------------------------------------------------------------------------------------------
# The open chunk, for a decoding state
# ------------------------------------------------------------------------------------------------------------------
# v and z are outputs of the projections, chunk and seen are `chunk_B` and `seen_B` of `launch_open_chunk`; rms, gain
# and biases are there in a whole layer.
OpenChunkTensors = group("OpenChunkTensors", "heads v z gamma beta seen", "rms gain b_v b_z cos sin source chunk")
OPEN_CHUNK_OPTIONS = {"slots": int, "skipped": int}


def run_open_chunk(x: OpenChunkTensors, shape: Shape, slots: int, skipped: int) -> list[Tensor]:
    inputs = Inputs(
        u=x.v, v=x.v, z=x.z, gamma=x.gamma, beta=x.beta, bias_R=None, cos=x.cos, sin=x.sin, source=x.source,
        index=x.index, rms=x.rms, gain=x.gain, bias_v=x.b_v, bias_z=x.b_z,
    )  # fmt: skip
    with on_device(x.v):
        return list(launch_open_chunk(shape, inputs, x.heads, x.chunk, x.seen, slots, skipped))


open_chunk_op = torch.library.custom_op(
    "flash_hf::open_chunk",
    lambda *tensors, **options: run_open_chunk(named(OpenChunkTensors, tensors), take_shape(options), **options),
    mutates_args=(),
    schema=schema(get_type_hints(OpenChunkTensors), SHAPE | OPEN_CHUNK_OPTIONS),
)  # fmt: skip


@open_chunk_op.register_fake
def _(*tensors, **options):
    x, shape, slots = named(OpenChunkTensors, tensors), take_shape(options), options["slots"]
    B, S, new = shape.B, shape.S, x.heads.new_empty
    quad_k = new((B, slots + shape.local_shift, S) if shape.quad else (0,))
    lin_k = new((B, slots + shape.previous, S) if shape.lin else (0,))
    return [quad_k, lin_k, new((B, slots, shape.E)), x.seen.new_empty(B)]


def open_chunk(tensors: OpenChunkTensors, shape: Shape, **options) -> list[Tensor]:
    """What `launch_open_chunk` returns."""
    if is_watched(tensors):
        return open_chunk_op(*plain(tensors), **by_name(shape), **options)
    return run_open_chunk(tensors, shape, **options)


# ------------------------------------------------------------------------------------------------------------------
# ScaleNorm on its own, for the end of the model
# ------------------------------------------------------------------------------------------------------------------
def run_norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rms = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    with on_device(x):
        launch_norm(x, gain, eps, rms, y, scale=True)
    return y, rms


def run_norm_gradient(d_y: Tensor, x: Tensor, rms: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    d_x = torch.empty_like(x)
    with on_device(x):
        sums = launch_norm_gradient(None, x, d_y, rms, gain, d_x)
    return d_x, sums.sum()


scale_norm_op = torch.library.custom_op("flash_hf::scale_norm", run_norm, mutates_args=())
scale_norm_backward_op = torch.library.custom_op("flash_hf::scale_norm_backward", run_norm_gradient, mutates_args=())


@scale_norm_op.register_fake
def _(x, gain, eps):
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@scale_norm_backward_op.register_fake
def _(d_y, x, rms, gain):
    return torch.empty_like(x), x.new_empty((), dtype=torch.float32)


def _save_norm(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1], inputs[1])


def _norm_gradients(backward: Callable, ctx, d_y: Tensor | None):
    if d_y is None:
        return None, None, None
    x, rms, gain = ctx.saved_tensors
    d_x, d_gain = backward(d_y.contiguous(), x, rms, gain)
    return d_x, d_gain.to(gain.dtype), None


scale_norm_op.register_autograd(
    lambda ctx, d_y, _: _norm_gradients(scale_norm_backward_op, ctx, d_y), setup_context=_save_norm
)


class DirectNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = run_norm(*inputs)
        _save_norm(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, d_y):
        refuse_second_derivatives()
        return _norm_gradients(run_norm_gradient, ctx, d_y)


def scale_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """ScaleNorm over the last dimension of x."""
    return scale_norm_op(x, gain, eps)[0] if is_watched((x, gain)) else DirectNorm.apply(x, gain, eps)


# ------------------------------------------------------------------------------------------------------------------
# The rotary relative bias
# ------------------------------------------------------------------------------------------------------------------
def run_rotary_bias(weight: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    with on_device(weight):
        return launch_rotary_bias(weight, cos, sin, interleaved)


def run_rotary_bias_gradient(d_bias: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    with on_device(weight):
        return launch_rotary_bias_gradient(d_bias, weight, cos, sin, interleaved)


rotary_bias_op = torch.library.custom_op("flash_hf::rotary_bias", run_rotary_bias, mutates_args=())
rotary_bias_backward_op = torch.library.custom_op(
    "flash_hf::rotary_bias_backward", run_rotary_bias_gradient, mutates_args=()
)


@rotary_bias_op.register_fake
def _(weight, cos, sin, interleaved):
    return weight.new_empty(cos.shape[0])


@rotary_bias_backward_op.register_fake
def _(d_bias, weight, cos, sin, interleaved):
    return torch.empty_like(weight)


def _save_rotary_bias(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3])
    ctx.interleaved = inputs[3]


def _rotary_bias_gradients(backward: Callable, ctx, d_bias: Tensor | None):
    d_weight = None if d_bias is None else backward(d_bias.contiguous(), *ctx.saved_tensors, ctx.interleaved)
    return d_weight, None, None, None


rotary_bias_op.register_autograd(
    partial(_rotary_bias_gradients, rotary_bias_backward_op), setup_context=_save_rotary_bias
)


class DirectRotaryBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        _save_rotary_bias(ctx, inputs, None)
        return run_rotary_bias(*inputs)

    @staticmethod
    def backward(ctx, d_bias):
        refuse_second_derivatives()
        return _rotary_bias_gradients(run_rotary_bias_gradient, ctx, d_bias)


def rotary_bias(weight: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`<a, RoPE_o(b)>` of each offset o in the type of the weight, whose rows are a and b, `[2, S]`; cos and sin are
    those of the offsets, float32 `[offsets, r / 2]`."""
    call = rotary_bias_op if is_watched((weight,)) else DirectRotaryBias.apply
    return call(weight, cos, sin, interleaved)
