# SPDX-License-Identifier: Apache-2.0
"""Cheap kernel launches: a layer's training step has about fifteen, with up to forty arguments each, and triton's own
dispatch takes longer per launch than many kernels run."""

from __future__ import annotations

import functools
import threading
from inspect import getclosurevars

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .common import INTERPRET
from .support import tried_triton, triton_version


class Form:
    """How a tensor descriptor of triton or Gluon sees its tensor: all but the address. Made once, since launches are
    kept by it: by cached functions."""

    def __init__(self, descriptor: type, shape: tuple, strides: tuple, block: tuple, **more):
        self.descriptor, self.shape, self.strides, self.block, self.more = descriptor, shape, strides, block, more
        self.sizes = *shape, *strides

    @classmethod
    def matrix(cls, descriptor: type, size: tuple, strides: tuple, block: tuple, **more):
        """Of a tensor of this size as a matrix of its last dimension."""
        x = torch.empty_strided(size, strides, device="meta").view(-1, size[-1])
        return cls(descriptor, tuple(x.shape), x.stride(), block, **more)


class Described:
    """A tensor that a kernel takes as a tensor descriptor."""

    __slots__ = ("base", "form")

    def __init__(self, base: Tensor, form: Form):
        self.base, self.form = base, form

    def descriptor(self):
        """That of triton or Gluon, without its constructor's checks, which repeat those of `Shape.tma` and
        `choice.scans`."""
        form, base = self.form, self.base
        if base.data_ptr() % 16:  # a parameter within a flat buffer (DeepSpeed), or of a memory-mapped file
            base = base.clone()
        shape, strides, block = list(form.shape), list(form.strides), list(form.block)
        if INTERPRET:
            return form.descriptor(base, shape, strides, block, **form.more)
        made = form.descriptor.__new__(form.descriptor)
        made.__dict__.update(base=base, shape=shape, strides=strides, block_shape=block, **form.more)
        return made


def _kind(value) -> object:
    """What triton specialises a kernel for: type, a descriptor's tile, divisibility by 16, and being 1."""
    if type(value) is int:
        return (value % 16 == 0) + 2 * (value == 1) + 4 * (value >= 2**31)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, Described):
        return value.base.dtype, *value.form.block
    return type(value)


def _as_triton_takes(value) -> object:
    return value.descriptor() if type(value) is Described else value


def has_hooks() -> bool:
    """Whether a profiler wants to see launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Launch:
    """Launches of a compiled kernel with the same numbers, types and forms, by the function in C that triton ends in.
    Its own way there takes longer, and asks the driver about every tensor."""

    # The stream's place among the arguments.
    STREAM = 3
    # Kept tensor maps of an argument. The addresses in a training step are mostly those of the step before.
    MOST_MAPS = 256

    def __init__(self, compiled, forms: list[Form], constants: list):
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        run, metas = compiled.run, compiled.metadata.tensordesc_meta or ()
        function = getclosurevars(run.launch).nonlocals["launcher"] if metas else run.launch
        program, metadata = (compiled.function, run.launch_cooperative_grid, run.launch_pdl), compiled.packed_metadata
        if triton_version() == (3, 6):
            self.function, self.head = function, (*program, None, None, metadata, None, None, None)
        else:
            # One function for all kernels, which is given the types of a kernel's arguments, and these as one.
            self.head = (*program, metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature)
            first = self.STREAM + 1 + len(self.head)
            self.function = lambda *passed: function(*passed[:first], passed[first:])
        self.constants = constants
        self.maps: list[tuple[dict, tuple]] = []
        for form, meta in zip(forms, metas, strict=True):
            tile = meta["swizzle"], meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["block_size"]
            self.maps.append(({}, (*tile, form.shape, form.strides, 0)))

    @staticmethod
    def fits(compiled, forms: list[Form]) -> bool:
        """Whether these are launched as in the tried versions of triton, with nothing besides their arguments."""
        if not tried_triton():
            return False
        run, metas = compiled.run, compiled.metadata.tensordesc_meta or ()
        more = run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False)
        return not more and len(metas) == len(forms) and None not in metas

    def map(self, number: int, address: int):
        """The tensor map of a described argument at this address."""
        maps, rest = self.maps[number]
        found = maps.get(address)
        if found is None:
            if len(maps) == self.MOST_MAPS:
                maps.clear()
            utils = driver.active.utils
            # The second name is that of triton 3.6.
            fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor
            found = maps[address] = fill(address, *rest)
        return found

    def begin(self, grid: tuple[int, ...], stream: int | None) -> list:
        """The function's arguments before those of the kernel."""
        return [*(*grid, 1, 1)[:3], stream, *self.head]

    def __call__(self, grid: tuple[int, ...], stream: int, values: list, places: list[tuple[int, int]]) -> None:
        for number, (place, address) in enumerate(places):
            values[place] = self.map(number, address)
        self.function(*self.begin(grid, stream), *values, *self.constants)


@functools.cache
def overlaps(device: int) -> bool:
    """Whether a kernel's programs may begin while the kernel before ends (programmatic dependent launch, from Hopper
    on), so that launches hide behind each other. `common.grid_wait` orders their memory."""
    return torch.cuda.get_device_capability(device) >= (9, 0) and tried_triton()


def current_stream(device: int) -> int:
    """The current stream's handle."""
    return driver.active.get_current_stream(device)


class Recorder(threading.local):
    """What launches of this thread are shown to, see replay.py."""

    recording = None


recorder = Recorder()


class Kernel:
    """A jitted function with a cache of its compiled kernels.

    Called with its grid, its run-time arguments in order, and its constants by name, in the same order and of the same
    types in every call: `kernel(grid, x, y, BLOCK=64, num_warps=4)`.
    """

    # Kept launches: rows of ever new lengths have ever new numbers.
    MOST = 256

    def __init__(self, function: triton.JITFunction):
        self.function = function
        self.compiled: dict = {}
        self.launches: dict = {}

    def __call__(self, grid: tuple[int, ...], *arguments, num_warps: int, maxnreg: int | None = None, **constants):
        if INTERPRET:
            return self.function[grid](*map(_as_triton_takes, arguments), **constants)
        device = torch.cuda.current_device()
        # What launches depend on, and the values that they are given: addresses for tensors.
        key, values, places, foreign = [device, num_warps, maxnreg, *constants.values()], [], [], False
        for x in arguments:
            if isinstance(x, Tensor):
                address = x.data_ptr()
                key.append(x.dtype)
                if address & 15:
                    key.append("unaligned")
                foreign = foreign or x.get_device() != device
                values.append(address)
            elif type(x) is Described:
                base, form = x.base, x.form
                key += base.dtype, form
                address = base.data_ptr()
                foreign = foreign or base.get_device() != device or address & 15
                places.append((len(values), address))
                values.append(None)
                values += form.sizes
            else:
                key.append(x)
                values.append(x)
        key = tuple(key)
        launch = self.launches.get(key)
        straight = not (launch is None or foreign or has_hooks())
        if recorder.recording is not None:
            recorder.recording.launch(launch if straight else None, grid, values, arguments)
        if straight:
            launch(grid, current_stream(device), values, places)
        else:
            self.launch_by_triton(key, device, grid, arguments, constants, num_warps, maxnreg)

    def launch_by_triton(self, key: tuple, device: int, grid, arguments: tuple, constants: dict, num_warps, maxnreg):
        """Launch, compiling the kernel if need be, and keep what later launches with the same key need."""
        kinds = device, num_warps, maxnreg, *map(_kind, arguments), *constants.values()
        forms = [x.form for x in arguments if type(x) is Described]
        arguments = [*map(_as_triton_takes, arguments)]
        compiled = self.compiled.get(kinds)
        if compiled is None:
            # Multiplications and additions are joined, which triton 3.10 will not do unless it is asked to.
            options: dict = {"enable_fp_fusion": True} | ({} if maxnreg is None else {"maxnreg": maxnreg})
            if overlaps(device):
                options["launch_pdl"] = True
            self.compiled[kinds] = self.function[grid](*arguments, **constants, num_warps=num_warps, **options)
            return
        names = self.function.arg_names
        ordered = [constants[name] for name in names[len(arguments) :]]
        compiled[(*grid, 1, 1)[:3]](*arguments, *ordered)
        if Launch.fits(compiled, forms):
            if len(self.launches) == self.MOST:
                self.launches.clear()
            self.launches[key] = Launch(compiled, forms, ordered)


def kernel(function: triton.JITFunction) -> Kernel:
    """Decorator above `triton.jit`, for functions that are launched rather than called by others."""
    return Kernel(function)
