# SPDX-License-Identifier: Apache-2.0
"""Rules for which kernels compute a call: those for Hopper or the general ones."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from transformers.utils import logging

from .support import TRIED_TRITON, tried_triton
from .tiles import Shape, cdiv


try:
    from . import gate, hopper, product, quadratic, reduce, rowscan, scan, scores, totals, walk, wholescan
except ImportError:  # a triton without Gluon, or with another version of it
    gate = hopper = product = quadratic = reduce = rowscan = scan = scores = totals = walk = wholescan = None


logger = logging.get_logger(__name__)

# With fewer walks of 128 value dimensions, a large GPU (132 multiprocessors) idles more than a second pass costs.
FEW_SCANS = 90
# With fewer tiles of an output projection, idle multiprocessors at its end cost what large tiles save (estimated).
FEW_TILES = 500


@functools.cache
def scan_for(device: torch.device) -> bool:
    """Whether the kernels for Hopper run on this device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if scan is not None and tried_triton():
        return True
    first, last = (".".join(map(str, version)) for version in TRIED_TRITON)
    tried = first if first == last else f"{first} to {last}"
    logger.warning_once(
        f"FLASH does not use its fastest kernels, those for Hopper: they need triton {tried}, and the installed one "
        f"is {triton.__version__}."
    )
    return False


def scans(shape: Shape, source: Tensor | None, device: torch.device) -> bool:
    """Whether the scans for Hopper compute this call: the common form of a layer, on Hopper."""
    fits = (
        shape.quad and shape.lin and shape.scaled and shape.silu and source is None
        and shape.dtype == torch.bfloat16 and (shape.C, shape.S) == (256, 128) and shape.E % 128 == 0
    )  # fmt: skip
    return fits and scan_for(device)


def splits(shape: Shape) -> bool:
    """Whether scans walk along pieces of rows, since there are too few rows for the multiprocessors."""
    return shape.B * (shape.E // 128) < FEW_SCANS


def cut_chunks(shape: Shape, programs: int) -> int:
    """How many chunks scans along rows leave to programs that have no row, since there are fewer walks than programs:
    as many as take these no longer. Each needs a sum over the chunks cut off, so that one chunk is not worth it."""
    walks = shape.B * (shape.E // 128)
    if walks >= programs:
        return 0
    cut = shape.G // (1 + cdiv(walks, programs - walks))
    return cut if cut > 1 else 0


def holds_rows(shape: Shape, exchange) -> bool:
    """Whether rowscan.py's kernel scans these rows, where `scans` is true: bidirectional, with at most two chunks,
    whose values fit the shared memory, none on other processes (`exchange`), and tokens in every half chunk."""
    fits = not shape.causal and not shape.delta and shape.G <= 2 and not shape.skips
    return fits and exchange is None


def spans_rows(shape: Shape, source: Tensor | None, device: torch.device) -> bool:
    """Whether quadratic.py's kernels compute this, on Hopper: chunks are whole rows (FLASH-Quad)."""
    fits = (
        shape.quad and not shape.lin and shape.scaled and shape.silu and source is None and shape.G == 1
        and shape.dtype == torch.bfloat16 and shape.N == shape.C and shape.N % 128 == 0 and shape.E % 128 == 0
    )  # fmt: skip
    return fits and scan_for(device)


def weighs(shape: Shape, device: torch.device) -> bool:
    """Whether scores.py's kernels compute the attention weights within chunks, and their heads' gradients: on Hopper,
    for whole tiles. Ragged rows have whole chunks, too."""
    fits = shape.quad and shape.dtype == torch.bfloat16 and shape.S == 128 and shape.C % 128 == 0
    return fits and scan_for(device)


def multiplies(shape: Shape, source: Tensor | None, scanned: bool, device: torch.device) -> bool:
    """Whether gate.py's kernel takes the product with the output projection: on Hopper, where the gate is not part of
    a pass over states."""
    fits = (
        (scanned or not shape.lin) and shape.scaled and shape.silu and source is None
        and shape.dtype == torch.bfloat16 and shape.E % 128 == 0 and shape.D % 8 == 0
    )  # fmt: skip
    return fits and scan_for(device)


def ends_layer(x: Tensor, out: Tensor) -> bool:
    """Whether product.py's kernel takes the output projection of `out` and its sum with x: on Hopper, for both in
    bfloat16, whole tiles of columns, and many tokens."""
    (T, E), D = out.shape, x.shape[-1]
    fits = x.dtype == out.dtype == torch.bfloat16 and E % 64 == 0 and (D % 192 == 0 or D % 256 == 0)
    if not (fits and scan_for(x.device)):
        return False
    rows, columns = product.tile_of(D)
    return cdiv(T, 2 * rows) * (D // columns) >= FEW_TILES
