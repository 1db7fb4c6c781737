# SPDX-License-Identifier: Apache-2.0
"""Launching kernels cheaply: a layer's training step has some fifteen launches of up to forty arguments each, and
triton's own dispatch takes about as long over each as the GPU does."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import INTERPRET


def _kind(value) -> tuple:
    """What triton compiles a kernel anew for, besides types: sizes of described tiles, what divides by 16 or is 1."""
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape)
    if isinstance(value, int):
        return value % 16 == 0, value == 1, value < 2**31
    return (type(value),)


class Kernel:
    """A jitted function that remembers what it was compiled to.

    Called with its grid, its run-time arguments in order, and the others by name: `kernel(grid, x, y, BLOCK=64,
    num_warps=4)`.
    """

    def __init__(self, function: triton.JITFunction):
        self.function = function
        self.compiled: dict = {}

    def __call__(self, grid: tuple[int, ...], *arguments, num_warps: int, maxnreg: int | None = None, **constants):
        if INTERPRET:
            return self.function[grid](*arguments, **constants)
        key = [torch.cuda.current_device(), num_warps, maxnreg, *constants.values()]
        # Addresses instead of tensors: these the launcher would ask for theirs, and then the driver whether it is one.
        plain = []
        for value in arguments:
            if isinstance(value, Tensor):
                address = value.data_ptr()
                key += value.dtype, address % 16 == 0
                plain.append(address)
            else:
                key += _kind(value)
                plain.append(value)
        key = tuple(key)
        compiled = self.compiled.get(key)
        if compiled is None:
            options = {} if maxnreg is None else {"maxnreg": maxnreg}
            self.compiled[key] = self.function[grid](*arguments, **constants, num_warps=num_warps, **options)
            return
        names = self.function.arg_names
        compiled[(*grid, 1, 1)[:3]](*plain, *[constants[name] for name in names[len(arguments):]])


def kernel(function: triton.JITFunction) -> Kernel:
    """Decorator over `triton.jit` for functions that are launched, not called by others."""
    return Kernel(function)
