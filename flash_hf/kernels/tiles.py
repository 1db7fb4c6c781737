# SPDX-License-Identifier: Apache-2.0
"""Sizes of tiles, the shape of a call, and the tensors that launches read and return."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import fast_math
from .dispatch import Described, Form
from .plan import ChunkIndex


# Cached, since triton's take 1.5 microseconds per call, and a layer's training step has about thirty calls.
cdiv, power_of_2 = functools.lru_cache(4096)(triton.cdiv), functools.cache(triton.next_power_of_2)


@dataclass(frozen=True)
class Tiles:
    """Block sizes for one shape and type.

    Attributes:
        CP, SP: chunk and key dimension padded to whole tiles.
        block: slots of a tile. block_e: value dimensions of a tile. block_k, block_s: step of a product.
        warps, stages, registers: of the tiled kernels; a limit on registers lets two programs share a multiprocessor.
        long_stages: stages of the products over the value dimensions.
        gate_k, gate_stages: slots per step, and steps in flight, of the pass over the gate, which loads four tiles per
            step.
    """

    CP: int
    SP: int
    block: int
    block_e: int
    block_k: int
    block_s: int
    warps: int
    stages: int
    registers: int | None = None
    long_stages: int = 2
    gate_k: int = 32
    gate_stages: int = 3

    @property
    def launch(self) -> dict:
        return {"num_warps": self.warps, "maxnreg": self.registers}


@functools.cache
def tiles_for(C: int, S: int, dtype: torch.dtype) -> Tiles:
    """Tiles that fit a Hopper or Ampere multiprocessor; float32 halves them."""
    block = max(16, power_of_2(C)) if C <= 64 else 128
    if dtype == torch.float32:
        block = min(block, 64)
    SP = max(16, power_of_2(S))
    step = 32 if dtype == torch.float32 else 64
    large = block == 128
    return Tiles(
        CP=cdiv(C, block) * block,
        SP=SP,
        block=block,
        block_e=64 if dtype == torch.float32 else 128,
        block_k=min(step, block),
        block_s=min(step, SP),
        warps=8 if large else 4,
        stages=2,
        registers=128 if large and SP <= 128 else None,
        long_stages=3 if large and SP <= 128 else 2,
    )


@dataclass(frozen=True)
class Shape:
    """The sizes and switches of one call. Operators take them by name; kernels are compiled for them. Calls get theirs
    from `shape_of`.

    Attributes:
        B, N: rows, and tokens per row. G, C, shift: of the chunks, as in `ChunkPlan`.
        D, E, S: widths of the layer (0 for gated attention alone), of values, and of queries and keys. H: heads.
        quad, lin: the branches. previous: values go under the key of the token before them.
        local_shift: every second pair of dimensions of the local keys comes from the token before.
        delta: the state is that of the gated delta rule, see delta.py. Then two rows follow the H heads, those that
            states are read and made with.
        silu: the kernels apply SiLU to u, v and z.
        interleaved, rotary_dim: how RoPE pairs dimensions, and how many it rotates.
        scale: factor of the scores. dtype: of products.
        residual: whether a layer's output includes its input.
    """

    B: int
    N: int
    G: int
    C: int
    shift: int
    D: int
    E: int
    S: int
    H: int
    causal: bool
    quad: bool
    lin: bool
    previous: bool
    local_shift: bool
    delta: bool
    silu: bool
    interleaved: bool
    rotary_dim: int
    scale: float
    dtype: torch.dtype
    residual: bool = True

    @functools.cached_property
    def tapes(self) -> dict:
        """Recorded launches, see replay.py."""
        return {}

    @functools.cached_property
    def tiles(self) -> Tiles:
        return tiles_for(self.C, self.S, self.dtype)

    @functools.cached_property
    def scaled(self) -> bool:
        """Whether kernels apply the norm's scale and the biases to u, v and z."""
        return self.D > 0

    @functools.cached_property
    def T(self) -> int:
        """Tokens of all rows."""
        return self.B * self.N

    @functools.cached_property
    def GT(self) -> int:
        """Chunks of all rows."""
        return self.B * self.G

    @functools.cached_property
    def halves(self) -> range:
        """Of the half chunks of a row, 128 slots each, those that the kernels for Hopper compute: all with tokens. The
        first has none behind a shift of 128, and the last may have none. Not left out with the delta rule, nor where
        whole chunks have no tokens (in an exported program)."""
        halves = range(self.shift // 128, cdiv(self.N + self.shift, 128))
        fits = self.C == 256 and not self.delta and halves.stop >= 2 * self.G - 1
        return halves if fits else range(2 * self.G)

    @functools.cached_property
    def skips(self) -> bool:
        """Whether some halves of chunks are left out."""
        return len(self.halves) < 2 * self.G

    @functools.cached_property
    def even(self) -> bool:
        """Whether all slots of the halves have tokens."""
        return len(self.halves) * 128 == self.N

    @functools.cached_property
    def grid(self) -> tuple[int, int, int, int]:
        """The sizes from which kernels compute the token of a slot."""
        return self.N, self.G, self.C, self.shift

    @functools.cached_property
    def rows(self) -> int:
        """Rows of the heads."""
        return self.H + 2 * self.delta

    @functools.cached_property
    def lin_row(self) -> int:
        """Row of the query that reads states, before that of the key that makes them, or -1."""
        return self.rows - 2 if self.lin else -1

    @functools.cached_property
    def key_rows(self) -> list[int]:
        """Rows of the quadratic and the linear key among the heads, without absent branches."""
        return [1] * self.quad + [self.H - 1] * self.lin

    @functools.cached_property
    def keeps_attended(self) -> bool:
        """Whether the backward needs the attended value itself. Otherwise it divides the output by `silu(u)`, which
        float16 cannot represent near 0, and other activations than SiLU can be exactly 0."""
        return self.dtype == torch.float16 or not self.silu

    @functools.cached_property
    def pairs(self) -> dict:
        """Pairs of key dimensions that RoPE rotates, and dimensions that it does not, padded to powers of two."""
        rest = self.S - self.rotary_dim
        return {"HALF": power_of_2(self.rotary_dim // 2), "REST": power_of_2(rest)}

    def tma(self, inputs: Inputs) -> int:
        """Number of dimensions of token descriptors, or 0 to use pointers.

        Descriptors need every tile of a chunk to be a rectangle of memory: no padding, whole tiles, and rows aligned
        to 16 bytes. Whole chunks need 2 dimensions; otherwise rows are a third one, so that loads outside of a row
        give 0.
        """
        size = self.dtype.itemsize
        fits = (
            has_tma(inputs.v.device)
            and inputs.source is None
            and self.C == self.tiles.CP
            and self.E * size % 16 == 0
            and all(x.stride(0) * size % 16 == 0 and x.data_ptr() % 16 == 0 for x in (inputs.u, inputs.v))
        )
        if not fits:
            return 0
        return 2 if self.shift == 0 and self.N == self.G * self.C else 3

    def tokens(self, x: Tensor, tma: int, *block: int):
        """A descriptor of x, `[T, width]`, with `tma` dimensions, for loads of blocks of tokens; x itself for 0."""
        if tma != 3:
            return tiled(x, tma, *block)
        return Described(x, tokens_form(self.B, self.N, x.shape[1], x.stride(0), block))

    @functools.cached_property
    def row_tiles(self) -> int:
        return self.tiles.CP // self.tiles.block

    @functools.cached_property
    def score_tiles(self) -> int:
        n = self.row_tiles
        return n * (n + 1) // 2 if self.causal else n * n


# One object for all layers and steps, with what it has computed.
shape_of = functools.lru_cache(256)(Shape)


@functools.cache
def absent(device: torch.device, dtype: torch.dtype) -> Tensor:
    """What stands for a tensor without a meaning for a call."""
    with torch.inference_mode(False):
        return torch.empty(0, device=device, dtype=dtype)


def has_tma(device: torch.device) -> bool:
    """Whether the device has a tensor memory accelerator and enough shared memory to gain from it (Hopper, and data
    center Blackwell). Elsewhere descriptors cost more than they save."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def on_device(x: Tensor):
    """A context in which x's device is the current one, on which Triton launches."""
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


@functools.lru_cache(4096)
def matrix_form(size: tuple, strides: tuple, block: tuple) -> Form:
    return Form.matrix(TensorDescriptor, size, strides, block)


@functools.lru_cache(4096)
def tokens_form(B: int, N: int, width: int, stride: int, block: tuple) -> Form:
    return Form(TensorDescriptor, (B, N, width), (N * stride, stride, 1), (1, *block))


def tiled(x: Tensor, tma: int, *block: int):
    """A descriptor of x, as a matrix of its last dimension, for loads of whole blocks; x itself without TMA."""
    if not tma or x.numel() == 0:
        return x
    return Described(x, matrix_form(x.shape, x.stride(), block))


class Projections(NamedTuple):
    """Outputs of the projections, or their gradients: `[T, E]`, `[T, E]` and `[T, S]`; with `Shape.delta` also the
    gates', `[T, 2 or more]`, in the first two columns."""

    u: Tensor
    v: Tensor
    z: Tensor
    gates: Tensor | None = None


class Cached(NamedTuple):
    """What each row's first document takes from the cache; None for nothing.

    Attributes:
        initial: the sum over its closed chunks, or the delta rule's state after the cached tokens, float32
            `[B, SP, E]`.
        kept: keys for slots of the first chunk, `[keys, B, C, S]`.
        kept_mask: where these replace the keys made from z, bool `[keys, B, C, S]`.
        opened: the delta rule's state before the open chunk, float32 `[B, SP, E]`.
        since: the sum of its log decays since then, float32 `[B]`.
    """

    initial: Tensor | None = None
    kept: Tensor | None = None
    kept_mask: Tensor | None = None
    opened: Tensor | None = None
    since: Tensor | None = None


class Own(NamedTuple):
    """Which of the tokens that attention reads, `[B * M]`, are those of x, `[B * N]`: all, or of rows that are cut
    over processes all but `left` before each row and some behind it."""

    B: int
    N: int
    M: int
    left: int

    @property
    def whole(self) -> bool:
        return self.N == self.M

    @property
    def parts(self) -> list[tuple[slice, slice]]:
        """Runs of tokens of equal length among those of x, and the same among those that attention reads."""
        if self.whole:
            return [(slice(None), slice(None))]
        begins = [(row * self.N, row * self.M + self.left) for row in range(self.B)]
        return [(slice(x, x + self.N), slice(h, h + self.N)) for x, h in begins]

    def clear(self, x: Tensor) -> None:
        """Set the other tokens' rows of x, `[B * M, ...]`, to 0."""
        if not self.whole:
            x_BM = x.unflatten(0, (self.B, self.M))
            x_BM[:, : self.left] = 0
            x_BM[:, self.left + self.N :] = 0


def rows_of(x: Tensor, rows: slice) -> Tensor:
    """`x[rows]`, without a view of all."""
    return x if rows == slice(None) else x[rows]


class AttentionResults(NamedTuple):
    """Results of the forward launches; tensors without a meaning for the call are empty.

    Attributes:
        out: `silu(u)` times the attended value, `[T, E]`.
        heads: queries and keys on the chunk grid, `[Shape.rows, GT, CP, SP]`.
        prefix: the state before each chunk within its piece, over C, `[GT, SP, E]` (causal).
        carry: the same before each piece, `[pieces, SP, E]`; of bidirectional models that of each document.
        attended: the attended value, `[T, E]`, if `Shape.keeps_attended`.
        final: the sum over each document, or the delta rule's state behind it, float32 `[documents, SP, E]`, on
            request.
        slots, inverse, erase, decay: with `Shape.delta`, see `delta.Prepared`.
    """

    out: Tensor
    heads: Tensor
    prefix: Tensor
    carry: Tensor
    attended: Tensor
    final: Tensor
    slots: Tensor
    inverse: Tensor
    erase: Tensor
    decay: Tensor


@dataclass
class Inputs:
    """Tensors that the launches of attention read. The gates are there if `Shape.delta`, those from `rms` on if
    `Shape.scaled`."""

    u: Tensor
    v: Tensor
    z: Tensor
    gamma: Tensor
    beta: Tensor
    bias_R: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    source: Tensor | None
    index: ChunkIndex
    gates: Tensor | None = None
    gate_bias: Tensor | None = None
    rms: Tensor | None = None
    gain: Tensor | None = None
    bias_u: Tensor | None = None
    bias_v: Tensor | None = None
    bias_z: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor, Tensor, int]:
        """cos, sin and their number of rows; without RoPE any tensor."""
        if self.cos is None:
            return self.index.factor_G, self.index.factor_G, 1
        return self.cos, self.sin, self.cos.numel() // self.cos.shape[-1]

    @property
    def tokens(self) -> Tensor:
        """`source`, or any tensor if it is not read."""
        return self.index.group_G if self.source is None else self.source

    def norm(self, bias: str) -> tuple:
        """The norm's factor and gain, and one bias; any tensor if they are not read."""
        if self.rms is None:
            return self.u, self.u, self.u
        return self.rms, self.gain, getattr(self, bias)


def switches(shape: Shape, inputs: Inputs) -> dict:
    """Constants of all kernels that read tokens."""
    return {
        "SCALED": shape.scaled,
        "SILU": shape.silu,
        "FAST": fast_math(shape.dtype),
        "RAGGED": inputs.source is not None,
    }
