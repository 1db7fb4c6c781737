# SPDX-License-Identifier: Apache-2.0
"""The kernels as `torch.library` operators with gradients: the gated attention between the projections, and the whole
layer. Both run the same launches; the layer also folds the norm, the residual sum and the gate's gradient into its
matrix products.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from transformers.utils import logging
from triton.tools.tensor_descriptor import TensorDescriptor

from . import backward, forward, matmul
from .common import dot_precision, fast_math
from .launch import described


try:
    from . import scan
except ImportError:  # triton without Gluon, or with another one
    scan = None


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Tiles:
    """Block sizes for one shape and type.

    Attributes:
        CP, SP: chunk and key dimension padded to whole tiles.
        block: slots of a tile. block_e: value dimensions of a tile. block_k, block_s: step of a product.
        warps, stages, registers: of the tiled kernels; a limit on registers lets two programs share a multiprocessor.
        long_stages: stages of the products over the value dimensions.
        gate_k, gate_stages: slots a step, and steps under way, in the pass over the gate, which loads four tiles a
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


def tiles_for(C: int, S: int, dtype: torch.dtype) -> Tiles:
    """Tiles that fit a Hopper or Ampere multiprocessor; float32 halves them."""
    block = max(16, power_of_two(C)) if C <= 64 else 128
    if dtype == torch.float32:
        block = min(block, 64)
    SP = max(16, power_of_two(S))
    step = 32 if dtype == torch.float32 else 64
    large = block == 128
    return Tiles(
        CP=-(-C // block) * block,
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
    """The sizes and switches of one call, as the launches need them."""

    B: int
    N: int
    G: int
    C: int
    shift: int
    E: int
    S: int
    H: int
    causal: bool
    quad: bool
    lin: bool
    previous: bool
    scaled: bool
    silu: bool
    interleaved: bool
    rotary_dim: int
    scale: float
    dtype: torch.dtype
    tiles: Tiles

    @property
    def GT(self) -> int:
        return self.B * self.G

    @property
    def pairs(self) -> dict:
        """Key dimensions in pairs that RoPE turns, and those it leaves alone, each padded to a power of two."""
        rest = self.S - self.rotary_dim
        return {"HALF": power_of_two(self.rotary_dim // 2), "REST": power_of_two(rest)}

    def tma(self, inputs: Inputs) -> int:
        """Dimensions of the descriptors of tokens, or 0 where pointers are used. Every tile of a chunk has to be a
        rectangle of memory: no padding, whole tiles, rows that begin at multiples of 16 bytes. 2 dimensions do for
        whole chunks; otherwise the tokens of a row are a dimension of their own, outside of which there is 0."""
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
        """`x` `[B * N, width]`, described for loads of tokens by blocks as `tma` says."""
        if tma != 3:
            return tiled(x, tma, *block)
        stride = x.stride(0)
        shape, strides = [self.B, self.N, x.shape[1]], [self.N * stride, stride, 1]
        return described(TensorDescriptor, x, shape, strides, [1, *block])

    def scans(self, source: Tensor | None, device: torch.device) -> bool:
        """Whether the kernels of scan.py compute this, which are for the layers that most people train, on Hopper."""
        fits = (
            self.quad and self.lin and self.scaled and self.silu and source is None
            and self.dtype == torch.bfloat16 and (self.C, self.S) == (256, 128) and self.E % 128 == 0
        )  # fmt: skip
        return fits and scan_for(device)

    @property
    def splits(self) -> bool:
        """Whether a scan walks along pieces of rows: there are too few rows for the multiprocessors."""
        return self.B * (self.E // 128) < FEW_SCANS

    @property
    def row_tiles(self) -> int:
        return self.tiles.CP // self.tiles.block

    @property
    def score_tiles(self) -> int:
        n = self.row_tiles
        return n * (n + 1) // 2 if self.causal else n * n


def has_tma(device: torch.device) -> bool:
    """Whether the device has a tensor memory accelerator and the shared memory to use it well (Hopper, and Blackwell
    of data centres). Elsewhere descriptors cost more than they save."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] in (9, 10)


# Walks of 128 value dimensions that leave a large GPU (132 multiprocessors) so idle that a second pass costs less.
FEW_SCANS = 90
# Versions of triton that the kernels of scan.py have run with.
TRIED_TRITON = ((3, 6), (3, 6))


@functools.cache
def scan_for(device: torch.device) -> bool:
    """Whether the kernels of scan.py run on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if scan is not None and TRIED_TRITON[0] <= found <= TRIED_TRITON[1]:
        return True
    first, last = (".".join(map(str, version)) for version in TRIED_TRITON)
    tried = first if first == last else f"{first} to {last}"
    logger.warning_once(
        f"FLASH's fastest kernels, those for Hopper, are left out: they need triton {tried}, and this is "
        f"{triton.__version__}."
    )
    return False


def on_device(x: Tensor):
    """Triton launches on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def tiled(x: Tensor, tma: int, *block: int):
    """`x` as a matrix of its last dimension, described for loads of whole blocks by the tensor memory accelerator."""
    if not tma or x.numel() == 0:
        return x
    x = x.view(-1, x.shape[-1])
    return described(TensorDescriptor, x, list(x.shape), list(x.stride()), list(block))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def lin_row(shape: Shape) -> int:
    """Row of the linear query among the heads, or -1."""
    return shape.H - 2 if shape.lin else -1


@dataclass
class Inputs:
    """What the attention launches read. Without `rms` the projections are complete and the biases are not used."""

    u: Tensor
    v: Tensor
    z: Tensor
    gamma: Tensor
    beta: Tensor
    bias_R: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    source: Tensor | None
    index: list[Tensor]
    rms: Tensor | None = None
    gain: Tensor | None = None
    bias_u: Tensor | None = None
    bias_v: Tensor | None = None
    bias_z: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor, Tensor, int]:
        """cos, sin and their number of rows; any tensor where there is no RoPE."""
        if self.cos is None:
            return self.index[0], self.index[0], 1
        return self.cos, self.sin, self.cos.shape[0]

    @property
    def tokens(self) -> Tensor:
        """`source`, or any tensor where it is not read."""
        return self.index[1] if self.source is None else self.source

    def norm(self, bias: str) -> tuple:
        """The pointers of the norm and of one bias; any tensor where they are not read."""
        if self.rms is None:
            return self.u, self.u, self.u
        return self.rms, self.gain, getattr(self, bias)


def ints(shape: Shape) -> tuple[int, int, int, int]:
    return shape.N, shape.G, shape.C, shape.shift


def switches(shape: Shape, inputs: Inputs) -> dict:
    """What every kernel that reads tokens is compiled for."""
    return {
        "SCALED": shape.scaled,
        "SILU": shape.silu,
        "FAST": fast_math(shape.dtype),
        "RAGGED": inputs.source is not None,
    }


def has_carry(shape: Shape, index: list[Tensor], initial: bool) -> bool:
    """Whether anything comes before some piece: not with one piece a document."""
    return shape.causal and (index[2].shape[0] > index[4].shape[0] or initial)


def state_buffers(shape: Shape, index: list[Tensor], new, total: bool) -> tuple[Tensor, Tensor]:
    """`(prefix, total)`: what a sum was before each chunk (causal), and that over each piece in float32, if asked."""
    size = (shape.tiles.SP, shape.E)
    prefix = new((shape.GT, *size)) if shape.causal else new((0,))
    return prefix, new((index[2].shape[0] if total else 0, *size), dtype=torch.float32)


def launch_carry(shape: Shape, index: list[Tensor], total: Tensor, initial, carried: bool, final: str, reverse: bool):
    """Sums over a document's pieces: `(carry, final)`, empty where not needed.

    Args:
        carried: fill `carry`, the sum over C before each piece.
        final: `"total"` for float32 sums over documents, `"state"` for these over C (bidirectional), or `""`.
        reverse: go through documents backwards, for gradients.
    """
    documents, size = index[4].shape[0], shape.tiles.SP * shape.E
    carry = total.new_empty(total.shape if carried else (0,), dtype=shape.dtype)
    dtype = torch.float32 if final == "total" else shape.dtype
    last = total.new_empty((documents, *total.shape[1:]) if final else (0,), dtype=dtype)
    if carried or final:
        forward.carry_kernel(
            (documents, cdiv(size, 512)),
            total, total if initial is None else initial, index[4], index[5], carry, last, size, 1.0 / shape.C,
            1.0 / shape.C if final == "state" else 1.0, INITIAL=initial is not None, CARRY=carried,
            FINAL=bool(final), REVERSE=reverse, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return carry, last


def piece_launch(shape: Shape, inputs: Inputs) -> dict:
    """What both passes over pieces take."""
    t = shape.tiles
    block_e = t.block_e if t.SP <= 128 else t.block_e // 2
    return {
        "CP": t.CP, "SP": t.SP, **switches(shape, inputs), "EVEN_E": shape.E % block_e == 0,
        "TMA": shape.tma(inputs), "PREFIX": shape.causal, "BLOCK_E": block_e, "BLOCK_K": t.block_k,
        "PRECISION": dot_precision(shape.dtype), "num_warps": t.warps,
    }  # fmt: skip


def launch_scores(shape: Shape, inputs: Inputs, heads: Tensor) -> Tensor:
    """Attention weights inside the chunks, `[GT, CP, CP]`; empty without that branch."""
    t = shape.tiles
    if not shape.quad:
        return heads.new_empty((0,))
    weights = heads.new_empty((shape.GT, t.CP, t.CP))
    biased = inputs.bias_R is not None
    forward.scores_kernel(
        (shape.score_tiles, shape.GT),
        heads[0], heads[1], inputs.bias_R if biased else inputs.index[0], weights, shape.C, shape.scale, CP=t.CP,
        SP=t.SP, BIAS=biased, CAUSAL=shape.causal, TILES=shape.row_tiles, BLOCK=t.block, BLOCK_S=t.block_s,
        PRECISION=dot_precision(shape.dtype), num_warps=4,
    )  # fmt: skip
    return weights


def key_rows(shape: Shape) -> list[int]:
    """Rows of the quadratic and the linear key among the heads, those that there are."""
    return [1] * shape.quad + [shape.H - 1] * shape.lin


def launch_totals(shape: Shape, inputs: Inputs, keys: Tensor, x: Tensor, *, back: bool = False) -> Tensor:
    """The sum of `keys^T values` before each piece, over C, `[pieces, SP, E]`: of the values made from x, or with
    `back` of `keys^T x` behind each piece. Of bidirectional models that of all pieces, `[rows, SP, E]`."""
    options = piece_launch(shape, inputs)
    tma, block_e, block_k = options["TMA"], options["BLOCK_E"], options["BLOCK_K"]
    options |= {"PREFIX": False, "SCALED": shape.scaled and not back, "SILU": shape.silu and not back}
    _, total = state_buffers(shape, inputs.index, x.new_empty, True)
    forward.states_kernel(
        (inputs.index[2].shape[0], cdiv(shape.E, block_e)),
        tiled(keys, tma, block_k, shape.tiles.SP), shape.tokens(x, tma, block_k, block_e), x.stride(0),
        *inputs.norm("bias_v"), inputs.tokens, inputs.index[2], inputs.index[3], x, x, total, *ints(shape), shape.E,
        **options, TOTAL=True, VALUES=False, STAGES=3,
    )  # fmt: skip
    final = "" if shape.causal else "state"
    before, whole = launch_carry(shape, inputs.index, total, None, shape.causal, final, back)
    return before if shape.causal else whole


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def scan_grid(tasks: int, device: torch.device) -> tuple[int]:
    """Programs that take tasks in turn, one a multiprocessor: their tiles fill its shared memory."""
    return (min(tasks, multiprocessors(device)),)


def launch_scan(
    shape: Shape, inputs: Inputs, weights: Tensor, heads: Tensor, x: Tensor, h: Tensor, biases: tuple[Tensor, Tensor],
    out: Tensor, states: Tensor, carry: Tensor | None, value: Tensor | None = None, sums: Tensor | None = None,
):  # fmt: skip
    """One scan, see `scan_kernel`: forward, or with `value` and `sums` backward.

    Args:
        biases: of x and of h.
        states: of the chunks, to be filled (causal).
        carry: what comes before each piece, or in the backward behind it; None walks along whole rows. Of
            bidirectional models, the rows' states.
    """
    (B, N), row, back = (shape.B, shape.N), lin_row(shape), value is not None
    reader, writer = (row + 1, row) if back else (row, row + 1)
    walks = B if carry is None else inputs.index[2].shape[0]
    tasks = walks * shape.E // 128
    even = shape.shift == 0 and N == shape.G * shape.C
    if not shape.causal:
        scan.whole_kernel(
            scan_grid(tasks, x.device),
            scan.tokens(x, B, N), scan.tokens(h, B, N), scan.matrix(weights), scan.matrix(heads[reader]),
            scan.tokens(out, B, N), scan.tokens(out if value is None else value, B, N), inputs.rms, inputs.gain,
            *biases, carry, inputs.rms if sums is None else sums, inputs.index[2], inputs.index[3], out, out.stride(0),
            out if value is None else value, N, shape.G, shape.shift, shape.E // 128, tasks, BACK=back, EVEN=even,
            SHIFTED=shape.shift > 0, SLOTS=scan.SLOTS, VALUE_SLOTS=scan.VALUE_SLOTS, num_warps=8,
        )  # fmt: skip
        return
    scan.scan_kernel(
        scan_grid(tasks, x.device),
        scan.tokens(x, B, N), scan.tokens(h, B, N), scan.matrix(weights), scan.matrix(heads[reader]),
        scan.matrix(heads[writer]), scan.tokens(out, B, N), scan.matrix(states),
        scan.tokens(out if value is None else value, B, N), inputs.rms, inputs.gain, *biases,
        states if carry is None else carry, inputs.rms if sums is None else sums, inputs.index[2], inputs.index[3],
        out, out.stride(0), out if value is None else value, N, shape.G, shape.shift, shape.E // 128, tasks, BACK=back,
        SPLIT=carry is not None, EVEN=even, SHIFTED=shape.shift > 0, SLOTS=scan.SLOTS,
        VALUE_SLOTS=scan.VALUE_SLOTS, num_warps=8,
    )  # fmt: skip


def launch_forward(
    shape: Shape, inputs: Inputs, initial: Tensor | None, kept: Tensor | None, kept_mask: Tensor | None,
    want_final: bool, want_attended: bool,
):  # fmt: skip
    """`(out, heads, prefix, carry, attended, final)`; see the operators for what each is.

    Args:
        initial: the sum of the closed chunks that a row's first document brings from a cache, `[B, SP, E]`, or None.
        kept, kept_mask: keys that a cache brings for slots of each row's first chunk, `[key_rows, B, C, S]`, and which
            of them to take instead of those made from z, bool `[key_rows, B, C]`.
    """
    t, (N, G, C, shift), E, S, T = shape.tiles, ints(shape), shape.E, shape.S, shape.B * shape.N
    new = inputs.v.new_empty
    flags, precision = switches(shape, inputs), dot_precision(shape.dtype)
    factor, group = inputs.index[:2]
    row = lin_row(shape)

    cos, sin, table_rows = inputs.tables
    size = (shape.H, shape.GT, t.CP, t.SP)
    heads = new(size) if t.SP == S else inputs.v.new_zeros(size)
    block = min(t.block, 32)
    forward.heads_kernel(
        (shape.GT * t.CP // block,),
        inputs.z, inputs.z.stride(0), *inputs.norm("bias_z"), inputs.gamma, inputs.beta, cos, sin, factor,
        inputs.tokens, inputs.index[6], heads, N, G, C, shift, shape.GT, S, shape.rotary_dim, table_rows, H=shape.H,
        LIN_Q=row, PREVIOUS=shape.previous, CP=t.CP, SP=t.SP, **shape.pairs, INTERLEAVED=shape.interleaved, **flags,
        BLOCK_M=block, num_warps=4,
    )  # fmt: skip
    if kept is not None:
        for row_of_key, keys, mask in zip(key_rows(shape), kept, kept_mask, strict=True):
            first = heads[row_of_key].view(shape.B, G, t.CP, t.SP)[:, 0, :C, :S]
            first.copy_(torch.where(mask[..., None], keys.to(first.dtype), first))
    weights = launch_scores(shape, inputs, heads)
    if initial is None and not want_final and shape.scans(inputs.source, inputs.v.device):
        out, prefix = new((T, E)), new((shape.GT, t.SP, E) if shape.causal else (0,))
        split = not shape.causal or shape.splits and has_carry(shape, inputs.index, False)
        before = launch_totals(shape, inputs, heads[row + 1], inputs.v) if split else None
        biases = inputs.bias_v, inputs.bias_u
        launch_scan(shape, inputs, weights, heads, inputs.v, inputs.u, biases, out, prefix, before)
        return out, heads, prefix, new((0,)) if shape.causal else before, new((0,)), new((0,))
    value = new((T, E)) if shape.silu else None
    prefix, carry, final = (new((0,)) for _ in range(3))
    if shape.lin:
        carried = has_carry(shape, inputs.index, initial is not None)
        asked = "total" if want_final else "" if shape.causal else "state"
        needed = carried or bool(asked)
        prefix, total = state_buffers(shape, inputs.index, new, needed)
        options = piece_launch(shape, inputs)
        tma, block_e = options["TMA"], options["BLOCK_E"]
        forward.states_kernel(
            (inputs.index[2].shape[0], cdiv(E, block_e)),
            tiled(heads[row + 1], tma, t.block_k, t.SP), shape.tokens(inputs.v, tma, t.block_k, block_e),
            inputs.v.stride(0), *inputs.norm("bias_v"), inputs.tokens, inputs.index[2], inputs.index[3],
            inputs.v if value is None else value, prefix, total, N, G, C, shift, E, **options,
            TOTAL=needed, VALUES=True, STAGES=2 if shape.dtype == torch.float32 else 3,
        )  # fmt: skip
        carry, final = launch_carry(shape, inputs.index, total, initial, carried, asked, False)
        if not shape.causal:
            carry, final = final, new((0,))
    elif shape.silu:
        forward.values_kernel(
            (cdiv(T, 32), cdiv(E, 128)),
            inputs.v, inputs.v.stride(0), *inputs.norm("bias_v"), value, T, E, SCALED=shape.scaled, SILU=True,
            FAST=fast_math(shape.dtype), BLOCK_M=32, BLOCK_E=128, num_warps=4,
        )  # fmt: skip
    value = inputs.v if value is None else value
    out = inputs.v.new_zeros((T, E)) if inputs.source is not None else new((T, E))
    attended = torch.zeros_like(out) if want_attended else new((0,))
    e_blocks, tma = cdiv(E, t.block_e), shape.tma(inputs)
    forward.output_kernel(
        (shape.GT * e_blocks * shape.row_tiles,),
        tiled(weights, tma, t.block, t.block_k), tiled(heads[row], tma, t.block, t.block_s),
        tiled(prefix, tma, t.block_s, t.block_e), tiled(carry, tma, t.block_s, t.block_e), inputs.u,
        inputs.u.stride(0), shape.tokens(value, tma, t.block_k, t.block_e), value.stride(0), *inputs.norm("bias_u"),
        inputs.tokens, group, inputs.index[6], out, attended, N, G, C, shift, shape.GT, E, e_blocks, CP=t.CP, SP=t.SP,
        QUAD=shape.quad, LIN=shape.lin, PREFIX=shape.causal, CARRY=carry.numel() > 0, CAUSAL=shape.causal, **flags,
        EVEN_E=E % t.block_e == 0, TMA=tma, SKIP=shape.causal and initial is None, ATTENDED=want_attended,
        BLOCK_M=t.block, BLOCK_E=t.block_e, BLOCK_K=t.block_k, BLOCK_S=t.block_s, PRECISION=precision,
        STAGES=t.stages, **t.launch,
    )  # fmt: skip
    return out, heads, prefix, carry, attended, final


def launch_gate(
    shape: Shape, inputs: Inputs, gated: Tensor, d_out: Tensor, d_attended: Tensor, d_u: Tensor, value: Tensor | None
) -> Tensor:
    """Fill `d_attended`, `d_u` and `value` (unless that is None or not to be computed); partial sums for u's bias."""
    E, T = shape.E, shape.B * shape.N
    block_m, block_e = 64, 128
    d_bias_u = gated.new_empty((cdiv(T, block_m) if shape.scaled else 0, E), dtype=torch.float32)
    backward.gate_kernel(
        (cdiv(T, block_m), cdiv(E, block_e)),
        d_out, d_out.stride(0), inputs.u, inputs.u.stride(0), gated, inputs.v, inputs.v.stride(0),
        *inputs.norm("bias_u"), inputs.norm("bias_v")[2], d_attended, d_u, d_u.stride(0),
        inputs.v if value is None else value, d_bias_u, T, E, SCALED=shape.scaled, SILU=shape.silu,
        FAST=fast_math(shape.dtype), ATTENDED=saved_attended(shape.dtype, shape.silu), EVEN=E % block_e == 0,
        VALUES=shape.silu and value is not None, BLOCK_M=block_m, BLOCK_E=block_e, num_warps=8,
    )  # fmt: skip
    return d_bias_u


def launch_gate_states(
    shape: Shape, inputs: Inputs, queries: Tensor, gated: Tensor, d_out: Tensor, d_attended: Tensor, d_u: Tensor,
    value: Tensor, d_prefix: Tensor, total: Tensor,
) -> Tensor:  # fmt: skip
    """`launch_gate` and the gradient of the states: what it is behind each chunk in `d_prefix` (causal), and over each
    piece in `total` (if that is not empty)."""
    t, E = shape.tiles, shape.E
    pieces = inputs.index[2].shape[0]
    options = piece_launch(shape, inputs)
    tma, block_e = options["TMA"], options["BLOCK_E"]
    block = min(t.gate_k, t.block_k), block_e
    options |= {"BLOCK_K": block[0], "STAGES": t.gate_stages}
    d_bias_u = gated.new_empty((pieces if shape.scaled else 0, E), dtype=torch.float32)
    backward.gate_states_kernel(
        (pieces, cdiv(E, block_e)),
        tiled(queries, tma, block[0], t.SP), shape.tokens(d_out, tma, *block), d_out.stride(0),
        shape.tokens(inputs.u, tma, *block), inputs.u.stride(0), shape.tokens(gated, tma, *block),
        shape.tokens(inputs.v, tma, *block), inputs.v.stride(0), *inputs.norm("bias_u"), inputs.norm("bias_v")[2],
        inputs.tokens, inputs.index[2], inputs.index[3], d_attended, d_u, d_u.stride(0),
        value, d_bias_u, d_prefix, total, *ints(shape), E, **options,
        ATTENDED=saved_attended(shape.dtype, shape.silu), TOTAL=total.numel() > 0,
    )  # fmt: skip
    return d_bias_u


def launch_attention_gradients(
    shape: Shape, inputs: Inputs, saved: tuple, weights: Tensor, gated: Tensor, d_out: Tensor, d_u: Tensor,
    d_v: Tensor, d_scores: Tensor, d_heads: Tensor, reuse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `d_u`, `d_v`, `d_scores` and the linear heads of `d_heads`; otherwise as `launch_backward`.

    Returns:
        `(d_bias_u, d_bias_v)` as partial sums.
    """
    heads, prefix, carry = saved
    t, (N, G, C, shift), E, T = shape.tiles, ints(shape), shape.E, shape.B * shape.N
    new = gated.new_empty
    flags, precision = switches(shape, inputs), dot_precision(shape.dtype)
    factor, group = inputs.index[:2]
    row = lin_row(shape)
    d_attended = d_out if reuse else new((T, E))
    value = new((T, E)) if shape.silu else inputs.v
    carried = carry.numel() > 0 and shape.causal
    d_prefix, d_carry = new((0,)), new((0,))
    if shape.lin:
        needed = carried or not shape.causal
        d_prefix, total = state_buffers(shape, inputs.index, new, needed)
        d_bias_u = launch_gate_states(shape, inputs, heads[row], gated, d_out, d_attended, d_u, value, d_prefix, total)
        d_carry, final = launch_carry(shape, inputs.index, total, None, carried, "" if shape.causal else "state", True)
        d_carry = d_carry if shape.causal else final
    else:
        d_bias_u = launch_gate(shape, inputs, gated, d_out, d_attended, d_u, value)

    e_blocks, tma = cdiv(E, t.block_e), shape.tma(inputs)
    programs = shape.score_tiles * shape.quad + 2 * shape.row_tiles * shape.lin + shape.row_tiles * e_blocks
    d_bias_v = new((shape.GT * shape.row_tiles if shape.scaled else 0, E), dtype=torch.float32)
    score_block, head_block = (t.block, t.block), (t.block, t.SP)
    value_block = t.block, t.block_e
    backward.chunk_gradients_kernel(
        (programs * shape.GT,),
        tiled(weights, tma, *score_block), tiled(weights, tma, t.block_k, t.block),
        shape.tokens(d_attended, tma, t.block, t.block_k), shape.tokens(d_attended, tma, t.block_k, t.block_e),
        shape.tokens(value, tma, t.block, t.block_k), value.stride(0),
        tiled(heads[row + 1], tma, t.block, t.block_s), tiled(prefix, tma, t.SP, t.block_k),
        tiled(carry, tma, t.SP, t.block_k), tiled(d_prefix, tma, t.SP, t.block_k),
        tiled(d_carry, tma, t.SP, t.block_k), tiled(d_prefix, tma, t.block_s, t.block_e),
        tiled(d_carry, tma, t.block_s, t.block_e), group, factor, inputs.index[6],
        shape.tokens(inputs.v, tma, *value_block), inputs.v.stride(0), *inputs.norm("bias_v"), inputs.tokens,
        tiled(d_scores, tma, *score_block), tiled(d_heads[row], tma, *head_block),
        tiled(d_heads[row + 1], tma, *head_block), tiled(d_v, tma == 2, *value_block), d_v.stride(0), d_bias_v,
        N, G, C, shift, shape.GT, E, e_blocks, CP=t.CP, SP=t.SP, TILES=shape.row_tiles,
        SCORE_TILES=shape.score_tiles, QUAD=shape.quad, LIN=shape.lin, PREFIX=shape.causal, CARRY=carried,
        CAUSAL=shape.causal, **flags, EVEN_E=E % t.block_e == 0, EVEN_K=E % t.block_k == 0, TMA=tma,
        SKIP=shape.causal and not carried, SKIP_AFTER=shape.causal, BLOCK=t.block, BLOCK_E=t.block_e,
        BLOCK_K=t.block_k, BLOCK_S=t.block_s, PRECISION=precision, STAGES=t.stages, LONG_STAGES=t.long_stages,
        **t.launch,
    )  # fmt: skip
    return d_bias_u, d_bias_v


def launch_scan_gradients(
    shape: Shape, inputs: Inputs, saved: tuple, weights: Tensor, gated: Tensor, d_out: Tensor, d_u: Tensor,
    d_v: Tensor, d_scores: Tensor, d_heads: Tensor, reuse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`launch_attention_gradients` by the kernels of scan.py."""
    heads, prefix, carry = saved
    E, T, B, N, row = shape.E, shape.B * shape.N, shape.B, shape.N, lin_row(shape)
    new = gated.new_empty
    d_attended = d_out if reuse else new((T, E))
    split = not shape.causal or shape.splits and has_carry(shape, inputs.index, False)
    d_bias_u = launch_gate(shape, inputs, gated, d_out, d_attended, d_u, None)
    behind = launch_totals(shape, inputs, heads[row], d_attended, back=True) if split else None
    value, d_prefix = new((T, E)), torch.empty_like(prefix)
    d_bias_v = new((shape.GT * 2, E), dtype=torch.float32)
    biases = inputs.bias_v, inputs.bias_v
    launch_scan(shape, inputs, weights, heads, d_attended, inputs.v, biases, d_v, d_prefix, behind, value, d_bias_v)
    tasks, block_k = 4 * shape.GT, scan.REDUCE_K
    scan.reduce_kernel(
        scan_grid(tasks, d_out.device),
        scan.tokens(d_attended, B, N, 256, block_k), scan.tokens(value, B, N, 256, block_k),
        scan.tokens(value, B, N, 128, block_k), scan.matrix(prefix if shape.causal else carry, 128, block_k),
        scan.matrix(d_prefix if shape.causal else behind, 128, block_k), scan.matrix(weights, 256, 128),
        scan.matrix(d_scores, 256, 128), scan.matrix(d_heads[row], 256, 128),
        scan.matrix(d_heads[row + 1], 256, 128), inputs.index[0], shape.G, shape.shift, E, tasks, CAUSAL=shape.causal,
        BLOCK_K=block_k, STAGES=scan.REDUCE_STAGES, num_warps=8,
    )  # fmt: skip
    return d_bias_u, d_bias_v


def launch_backward(shape: Shape, inputs: Inputs, saved: tuple, gated: Tensor, d_out: Tensor, d_h: tuple, reuse: bool):
    """Gradients of the projections' outputs, written to `d_h`, those of u, v and z.

    Args:
        saved: heads, prefix, carry of the forward. The weights are computed again: cheaper than their memory.
        gated: the forward's output, or the attended value itself where it was kept.
        d_out: gradient of the output, `[B * N, E]`; overwritten with `reuse`.

    Returns:
        What `launch_sums` takes of each program: `(d_bias_u, d_bias_v, heads, squares)`; the relative bias' `squares`
        is None where there is none.
    """
    heads, _, carry = saved
    d_u, d_v, d_z = d_h
    t, (N, G, C, shift), S = shape.tiles, ints(shape), shape.S
    new = gated.new_empty
    flags, precision = switches(shape, inputs), dot_precision(shape.dtype)

    weights = launch_scores(shape, inputs, heads)
    # Branches that a first chunk alone does not need have no gradient.
    used = 2 * (shape.quad + shape.lin) == shape.H
    d_heads = torch.empty_like(heads) if used else torch.zeros_like(heads)
    d_scores = torch.empty_like(weights)
    # What a cache brought is in `carry`, and not in the states of the chunks.
    scanned = not (shape.causal and carry.numel()) and shape.scans(inputs.source, gated.device)
    launch = launch_scan_gradients if scanned else launch_attention_gradients
    d_bias_u, d_bias_v = launch(shape, inputs, saved, weights, gated, d_out, d_u, d_v, d_scores, d_heads, reuse)
    squares = None
    if shape.quad:
        backward.quadratic_heads_kernel(
            (shape.GT, shape.row_tiles, 2),
            d_scores, heads[0], heads[1], d_heads[0], d_heads[1], shape.scale, CP=t.CP, SP=t.SP, CAUSAL=shape.causal,
            BLOCK=t.block, BLOCK_K=t.block_k, PRECISION=precision, STAGES=t.stages, **t.launch,
        )  # fmt: skip
        if inputs.bias_R is not None:
            squares = launch_bias(shape, d_scores)
    block = min(t.block, 32)
    blocks = shape.GT * t.CP // block
    cos, sin, table_rows = inputs.tables
    sums = new((blocks, 2 * shape.H + 1, S), dtype=torch.float32)
    backward.heads_gradient_kernel(
        (blocks,),
        d_heads, inputs.z, inputs.z.stride(0), *inputs.norm("bias_z"), inputs.gamma, cos, sin, inputs.tokens,
        inputs.index[6], d_z, d_z.stride(0), sums, N, G, C, shift, shape.GT, S, shape.rotary_dim, table_rows,
        H=shape.H, PREVIOUS=shape.previous, CP=t.CP, SP=t.SP, **shape.pairs, INTERLEAVED=shape.interleaved, **flags,
        BLOCK_M=block, num_warps=4,
    )  # fmt: skip
    return d_bias_u, d_bias_v, sums, squares


def launch_bias(shape: Shape, d_scores: Tensor) -> Tensor:
    """Score gradients summed over some chunks, float32 `[programs, CP, CP]`."""
    block = min(shape.tiles.block, 32)
    tiles = shape.tiles.CP // block
    n_tiles = tiles * (tiles + 1) // 2 if shape.causal else tiles * tiles
    programs = min(shape.GT, max(1, 288 // n_tiles))
    squares = d_scores.new_empty((programs, shape.tiles.CP, shape.tiles.CP), dtype=torch.float32)
    backward.bias_kernel(
        (n_tiles, programs),
        d_scores, squares, shape.GT, cdiv(shape.GT, programs), CP=shape.tiles.CP, TILES=tiles, CAUSAL=shape.causal,
        BLOCK=block, num_warps=2,
    )  # fmt: skip
    return squares


SUM_BLOCK = 32


@dataclass(frozen=True)
class Sums:
    """Where the gradients that are sums over tokens lie in one vector, each from a whole block of `SUM_BLOCK` on.

    Attributes:
        u, v: widths of the biases of u and v, 0 for none; heads: of gammas, betas and z's bias, `2 H + 1` rows of S;
        norm: of the output bias and the norm's gain, `D + 1` or 0; bias: of the relative bias, `2 C - 1` or 0.
    """

    u: int
    v: int
    heads: int
    norm: int
    bias: int

    @staticmethod
    def of(shape: Shape, D: int, biased: bool) -> Sums:
        E, C = shape.E, shape.C
        heads = (2 * shape.H + 1) * shape.S
        bias = 2 * C - 1 if shape.quad and biased else 0
        return Sums(E, E, heads, D + 1, bias) if shape.scaled else Sums(0, 0, heads, 0, bias)

    @property
    def blocks(self) -> list[int]:
        return [cdiv(width, SUM_BLOCK) for width in (self.u, self.v, self.heads, self.norm, self.bias)]

    def split(self, out: Tensor) -> list[Tensor]:
        """The five gradients in `out`."""
        sizes = [blocks * SUM_BLOCK for blocks in self.blocks]
        widths = self.u, self.v, self.heads, self.norm, self.bias
        return [part[:width] for part, width in zip(out.split(sizes), widths, strict=True)]


def launch_sums(
    shape: Shape, sums: Sums, u: Tensor, v: Tensor, heads: Tensor, norm: Tensor | None, squares: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The gradients that are sums over tokens, as `Sums` says, from partial sums `[programs, width]` of each, and of
    the relative bias `[programs, CP, CP]`."""
    blocks = sums.blocks
    out = heads.new_empty((sum(blocks) * SUM_BLOCK,), dtype=dtype)
    norm, squares = (heads if x is None else x for x in (norm, squares))
    backward.sums_kernel(
        (sum(blocks),),
        u, u.shape[0], v, v.shape[0], heads, heads.shape[0], norm, norm.shape[0], squares, squares.shape[0], out,
        shape.E, sums.heads, sums.norm, shape.C, *blocks[:4], CP=shape.tiles.CP, CAUSAL=shape.causal,
        BLOCK=SUM_BLOCK, ROWS=128, num_warps=8,
    )  # fmt: skip
    return out


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
        interleaved, rotary_dim, scale, u.dtype, tiles_for(C, S, u.dtype),
    )  # fmt: skip


def saved_attended(dtype: torch.dtype, silu: bool) -> bool:
    """Whether the backward needs the attended value itself: float16 cannot hold what it would be recovered from, and
    activations other than SiLU may be exactly 0."""
    return dtype == torch.float16 or not silu


def attention_forward(
    u: Tensor, v: Tensor, z: Tensor, gamma: Tensor, beta: Tensor, bias_R: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, source: Tensor | None, index: list[Tensor], initial: Tensor | None, kept: Tensor | None,
    kept_mask: Tensor | None, N: int, G: int, C: int, shift: int, causal: bool, quad: bool, lin: bool, previous: bool,
    silu: bool, interleaved: bool, rotary_dim: int, scale: float, want_final: bool, want_attended: bool,
) -> list[Tensor]:  # fmt: skip
    shape = attention_shape(
        u, z, gamma, N, G, C, shift, causal, quad, lin, previous, silu, interleaved, rotary_dim, scale
    )
    inputs = Inputs(u, v, z, gamma, beta, bias_R, cos, sin, source, index)
    with on_device(u):
        return list(launch_forward(shape, inputs, initial, kept, kept_mask, want_final, want_attended))


gated_attention_op = torch.library.custom_op("flash_hf::gated_attention", attention_forward, mutates_args=())


@gated_attention_op.register_fake
def _(u, v, z, gamma, beta, bias_R, cos, sin, source, index, initial, kept, kept_mask, N, G, C, shift, causal, quad,
      lin, previous, silu, interleaved, rotary_dim, scale, want_final, want_attended):  # fmt: skip
    shape = attention_shape(
        u, z, gamma, N, G, C, shift, causal, quad, lin, previous, silu, interleaved, rotary_dim, scale
    )
    return fake_forward(shape, v, source, index, initial is not None, want_final, want_attended)


def fake_forward(
    shape: Shape, v: Tensor, source: Tensor | None, index: list[Tensor], initial: bool, want_final: bool,
    want_attended: bool,
):  # fmt: skip
    """Empty tensors of the shapes that `launch_forward` returns."""
    scanned = shape.scans(source, v.device)
    t, E, new = shape.tiles, shape.E, v.new_empty
    pieces, documents = index[2].shape[0], index[4].shape[0]
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
    inputs = Inputs(u, v, z, gamma, beta, bias_R, cos, sin, source, index)
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
def product_blocks(dtype: torch.dtype) -> dict:
    """Tiles of the output projection."""
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "STAGES": 2, "num_warps": 4}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "STAGES": 4, "num_warps": 8}


def layer_shape(
    h_dtype, T, E, S, gamma, N, G, C, shift, causal, quad, lin, previous, interleaved, rotary_dim, scale
) -> Shape:  # fmt: skip
    return Shape(
        T // N, N, G, C, shift, E, S, gamma.shape[0], causal, quad, lin, previous, True, True, interleaved,
        rotary_dim, scale, h_dtype, tiles_for(C, S, h_dtype),
    )  # fmt: skip


def split_columns(h: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    return h[:, :E], h[:, E : 2 * E], h[:, 2 * E :]


def launch_norm(x: Tensor, gain: Tensor, eps: float, rms: Tensor, out: Tensor, *, cast: bool, scale: bool) -> None:
    """Fill `rms` and, with `cast` or `scale`, `out`; see `norm_kernel`."""
    T, D = x.shape
    block_d = power_of_two(D)
    block_t = max(1, 4096 // block_d)
    forward.norm_kernel(
        (cdiv(T, block_t),),
        x,
        gain,
        rms,
        out,
        T,
        D,
        eps,
        CAST=cast,
        SCALE=scale,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=8,
    )


def launch_norm_gradient(p: Tensor | None, x: Tensor, d_y: Tensor, rms: Tensor, gain: Tensor, d_x: Tensor) -> Tensor:
    """Fill `d_x`, and return partial sums for the output bias and the gain; see `norm_gradient_kernel`."""
    T, D = x.shape
    block_d = power_of_two(D)
    block_t, steps = max(1, 4096 // block_d), 16
    programs = cdiv(T, block_t * steps)
    sums = x.new_empty((programs, 1 if p is None else D + 1), dtype=torch.float32)
    backward.norm_gradient_kernel(
        (programs,),
        d_y if p is None else p, x, d_y, rms, gain, d_x, sums, T, D, RESIDUAL=p is not None, BLOCK_T=block_t,
        BLOCK_D=block_d, STEPS=steps, num_warps=4,
    )  # fmt: skip
    return sums


def launch_residual(x: Tensor, out: Tensor, w_o: Tensor, b_o: Tensor) -> Tensor:
    """`x + out w_o^T + b_o`, in the type of x."""
    if not has_tma(x.device):
        return x + torch.addmm(b_o.to(out.dtype), out, w_o.t())
    (T, D), E = x.shape, out.shape[1]
    y = torch.empty_like(x)
    blocks = product_blocks(out.dtype)
    matmul.residual_kernel(
        (cdiv(T, blocks["BLOCK_M"]) * cdiv(D, blocks["BLOCK_N"]),),
        tiled(out, True, blocks["BLOCK_M"], blocks["BLOCK_K"]),
        tiled(w_o.contiguous(), True, blocks["BLOCK_N"], blocks["BLOCK_K"]), b_o, x, y, T, D, E,
        EVEN=T % blocks["BLOCK_M"] == 0 and D % blocks["BLOCK_N"] == 0, PRECISION=dot_precision(out.dtype), **blocks,
    )  # fmt: skip
    return y


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
        inputs = Inputs(u, v, z, gamma, beta, bias_R, cos, sin, source, index, rms, gain, b_u, b_v, b_z)
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
    out, heads, prefix, carry, _, final = fake_forward(shape, h, source, index, initial is not None, want_final, False)
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
        inputs = Inputs(u, v, z, gamma, beta, bias_R, cos, sin, source, index, rms, gain, b_u, b_v, b_z)
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
