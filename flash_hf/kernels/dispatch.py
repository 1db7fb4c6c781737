# SPDX-License-Identifier: Apache-2.0
"""Cheap kernel launches: a layer's training step has about fifteen, with up to forty arguments each, and triton's own
dispatch takes about as long per launch as the GPU takes to run it."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from .common import INTERPRET
from .support import tried_triton


def _kind(value) -> object:
    """What triton specialises a kernel for: type, a descriptor's tile, divisibility by 16, and being 1."""
    if type(value) is int:
        return (value % 16 == 0) + 2 * (value == 1) + 4 * (value >= 2**31)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return value.base.dtype, *value.block_shape
    return type(value)


def described(descriptor: type, x: Tensor, shape: list[int], strides: list[int], block: list[int], **more):
    """A tensor descriptor of triton or Gluon, without its constructor's checks, which take several microseconds and
    repeat those of `Shape.tma` and `choice.scans`."""
    if x.data_ptr() % 16:  # a parameter within a flat buffer (DeepSpeed), or of a memory-mapped file
        x = x.clone()
    if INTERPRET:
        return descriptor(x, shape, strides, block, **more)
    made = descriptor.__new__(descriptor)
    made.__dict__.update(base=x, shape=shape, strides=strides, block_shape=block, **more)
    return made


@functools.cache
def overlaps(device: int) -> bool:
    """Whether a kernel's programs may begin while the kernel before ends (programmatic dependent launch, from Hopper
    on), so that launches hide behind each other. `common.grid_wait` orders their memory."""
    return torch.cuda.get_device_capability(device) >= (9, 0) and tried_triton()


class Kernel:
    """A jitted function with a cache of its compiled kernels.

    Called with its grid, its run-time arguments in order, and its constants by name, in the same order in every call:
    `kernel(grid, x, y, BLOCK=64, num_warps=4)`.
    """

    def __init__(self, function: triton.JITFunction):
        self.function = function
        self.compiled: dict = {}

    def __call__(self, grid: tuple[int, ...], *arguments, num_warps: int, maxnreg: int | None = None, **constants):
        if INTERPRET:
            return self.function[grid](*arguments, **constants)
        device = torch.cuda.current_device()
        key = device, num_warps, maxnreg, *map(_kind, arguments), *constants.values()
        compiled = self.compiled.get(key)
        if compiled is None:
            options = {} if maxnreg is None else {"maxnreg": maxnreg}
            if overlaps(device):
                options["launch_pdl"] = True
            self.compiled[key] = self.function[grid](*arguments, **constants, num_warps=num_warps, **options)
            return None
        names = self.function.arg_names
        return compiled[(*grid, 1, 1)[:3]](*arguments, *[constants[name] for name in names[len(arguments) :]])


def kernel(function: triton.JITFunction) -> Kernel:
    """Decorator above `triton.jit`, for functions that are launched rather than called by others."""
    return Kernel(function)
