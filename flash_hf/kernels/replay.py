# SPDX-License-Identifier: Apache-2.0
"""An operation's launches, recorded once and then replayed on other tensors of the same kind.

What a layer launches depends on its shape and on types and layouts of tensors alone. Computed again for each layer and
step, it takes Python longer than a narrow model's kernels run. Tapes are kept by shapes: whoever changes the rules of
choice.py in a running process clears the cache of `shape_of`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .common import INTERPRET, dot_precision
from .dispatch import Described, Launch, current_stream, has_hooks, recorder
from .plan import ChunkIndex
from .tiles import Shape


class Slot(int):
    """A tensor's number on a tape: those that the operation is given come first, then those made in it."""


def fill(value, tensors: list):
    """An argument with tensors for their slots."""
    if type(value) is Slot:
        return tensors[value]
    return [fill(x, tensors) for x in value] if type(value) is list else value


def slots_in(value) -> set[int]:
    if type(value) is list:
        return set().union(*map(slots_in, value))
    return {value} if type(value) is Slot else set()


# ------------------------------------------------------------------------------------------------------------------
# Steps. Each runs on the tensors by slot and their addresses; `reads` and `fills` are slots.
# ------------------------------------------------------------------------------------------------------------------
# That of inductor, which takes half as long; on the current device.
empty_strided_cuda = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


class Allocation:
    """A new tensor, not filled."""

    is_view, reads = False, frozenset()

    def __init__(self, like: Tensor, slot: Slot):
        self.slot, self.fills = slot, {slot}
        layout, kind = (tuple(like.shape), like.stride()), {"dtype": like.dtype, "device": like.device}
        self.make = functools.partial(torch.empty_strided, *layout, **kind)
        if like.is_cuda and empty_strided_cuda is not None:
            self.make = functools.partial(empty_strided_cuda, *layout, like.dtype)

    def run(self, tensors: list, addresses: list[int], stream: int) -> None:
        tensors[self.slot] = made = self.make()
        addresses[self.slot] = made.data_ptr()


# Torch's own functions take half as long as operators called by name.
aten = torch.ops.aten
BINDINGS = {
    aten.cat.default: torch.cat,
    aten.mm.default: torch.mm,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.t.default: torch.t,
    aten.view.default: Tensor.view,
}


class Call:
    """A call of torch: a product, a copy, a view of one of its arguments.

    Args:
        made: slots of what it returns: one, or a list.
    """

    def __init__(self, function: Callable, arguments: list, options: dict, made: Slot | list[Slot], is_view: bool):
        self.function, self.arguments, self.options = BINDINGS.get(function, function), arguments, options
        self.made, self.is_view = made, is_view
        self.reads, self.fills = slots_in(arguments), slots_in(made)

    def run(self, tensors: list, addresses: list[int], stream: int) -> None:
        result = self.function(*fill(self.arguments, tensors), **self.options)
        for slot, x in ((self.made, result),) if type(self.made) is Slot else zip(self.made, result, strict=True):
            tensors[slot] = x
            if not self.is_view:
                addresses[slot] = x.data_ptr()


class Start:
    """A launch by its function in C.

    Args:
        arguments: of this function, as they were when it was recorded.
        pointers: `(place, slot, offset)` of those that are addresses, offsets in bytes from the slot's tensor.
        maps: the same of those that are tensor maps.
    """

    is_view, fills = False, frozenset()

    def __init__(self, launch: Launch, arguments: list, pointers: list, maps: list):
        self.launch, self.arguments, self.pointers = launch, arguments, pointers
        self.maps = [(number, launch.maps[number][0], *map_) for number, map_ in enumerate(maps)]
        self.reads = {slot for _, slot, _ in pointers + maps}

    def run(self, tensors: list, addresses: list[int], stream: int) -> None:
        arguments, launch = self.arguments.copy(), self.launch
        arguments[Launch.STREAM] = stream
        for place, slot, offset in self.pointers:
            arguments[place] = addresses[slot] + offset
        for number, kept, place, slot, offset in self.maps:
            address = addresses[slot] + offset
            arguments[place] = kept.get(address) or launch.map(number, address)
        launch.function(*arguments)


class Tape:
    """What an operation did, in order.

    Args:
        given: how many tensors the operation is given.
        rest: for each slot behind these, the empty tensor that is always there, or None.
        results: slots of what the operation returns, or None. make: of a list of these, what it returns.
    """

    def __init__(self, steps: list, given: int, rest: list[Tensor | None], results: list, make: Callable):
        # The last is of a result that is None.
        self.rest, self.make = [*rest, None], make
        self.results = [-1 if slot is None else slot for slot in results]
        # From the end: what later steps need. Views that only launches read are not made, and a tensor is dropped
        # behind the last step that needs it.
        needed, self.steps = slots_in(results), []
        for step in reversed(steps):
            if step.is_view and not step.fills & needed:
                continue
            touched = step.reads | step.fills
            self.steps.append((step.run, tuple(slot for slot in touched - needed if slot >= given)))
            needed |= touched
        self.steps.reverse()

    def replay(self, given: list[Tensor | None], addresses: list[int], stream: int):
        tensors, addresses = given + self.rest, addresses + [0] * len(self.rest)
        for run, last in self.steps:
            run(tensors, addresses, stream)
            for slot in last:
                tensors[slot] = None
        return self.make([tensors[slot] for slot in self.results])


# ------------------------------------------------------------------------------------------------------------------
# Recording
# ------------------------------------------------------------------------------------------------------------------
ALLOCATIONS = frozenset((
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default,
    aten.new_empty_strided.default,
))  # fmt: skip


class Recording(TorchDispatchMode):
    """Sees the calls of torch, and is shown the launches, of an operation that is given these tensors."""

    def __init__(self, given: list[Tensor | None]):
        super().__init__()
        self.given, self.steps, self.failed = len(given), [], False
        # Weak, so that tensors are freed as they are without a recording.
        self.slots = WeakIdKeyDictionary()
        # Of each slot, the one whose memory it is in, and how many bytes behind its begin.
        self.origins: list[tuple[int, int]] = []
        self.empty: dict[int, Tensor] = {}
        for x in given:
            # One tensor in two places might be two the next time.
            self.failed |= x is not None and x in self.slots and x.numel() > 0
            self.add(x)

    def __enter__(self):
        recorder.recording = self
        return super().__enter__()

    def __exit__(self, *error):
        recorder.recording = None
        return super().__exit__(*error)

    def add(self, x: Tensor | None, origin: int | None = None, offset: int = 0) -> Slot:
        slot = Slot(len(self.origins))
        self.origins.append((slot, 0) if origin is None else (origin, offset))
        if x is not None and x not in self.slots:
            self.slots[x] = slot
        return slot

    def slot(self, x: Tensor) -> Slot:
        found = self.slots.get(x)
        if found is None:
            # What comes from elsewhere may only stand for an absent tensor.
            self.failed |= x.numel() > 0
            found = self.add(x)
            self.empty[found] = x
        return found

    def by_slot(self, value):
        if isinstance(value, Tensor):
            return self.slot(value)
        return [self.by_slot(x) for x in value] if isinstance(value, (list, tuple)) else value

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function in ALLOCATIONS:
            self.steps.append(Allocation(result, self.add(result)))
            return result
        read, is_view = self.by_slot(arguments), False
        self.failed |= bool(slots_in(self.by_slot([*(options or {}).values()])))
        if not isinstance(result, (Tensor, list, tuple)):
            self.failed |= bool(slots_in(read))  # a number that depends on what tensors hold
            return result
        memory = {x.untyped_storage()._cdata: x for x in arguments if isinstance(x, Tensor)}

        def slot_of(x: Tensor) -> Slot:
            nonlocal is_view
            base = memory.get(x.untyped_storage()._cdata)
            if base is None:
                return self.add(x)
            if x in self.slots:  # changed in place
                return self.slots[x]
            is_view = True
            origin, offset = self.origins[self.slots[base]]
            return self.add(x, origin, offset + x.data_ptr() - base.data_ptr())

        made = slot_of(result) if isinstance(result, Tensor) else [slot_of(x) for x in result]
        self.steps.append(Call(function, read, options or {}, made, is_view))
        return result

    def launch(self, launch: Launch | None, grid: tuple[int, ...], values: list, arguments: tuple) -> None:
        """Take a launch with these arguments, `values` in C; by triton if `launch` is None."""
        if launch is None:
            self.failed = True
            return
        head = launch.begin(grid, 0)
        place, pointers, maps = len(head), [], []
        for x in arguments:
            if isinstance(x, Tensor):
                pointers.append((place, *self.origins[self.slot(x)]))
            elif type(x) is Described:
                maps.append((place, *self.origins[self.slot(x.base)]))
                place += len(x.form.sizes)
            place += 1
        self.steps.append(Start(launch, [*head, *values, *launch.constants], pointers, maps))

    def tape(self, results: Sequence) -> Tape | None:
        """What was recorded, or None if it cannot be replayed."""
        make, slots = getattr(type(results), "_make", list), self.by_slot(results)
        rest = [self.empty.get(slot) for slot in range(self.given, len(self.origins))]
        return None if self.failed else Tape(self.steps, self.given, rest, slots, make)


# Calls of a kind before one is recorded: by then kernels are compiled, and launched by their function in C.
EARLIER = 3
# Kinds of calls that a shape keeps: packed rows have ever other numbers of documents.
MOST_KINDS = 64


def replayed(
    operation: Callable, run: Callable[[], Any], shape: Shape, tensors: list[Tensor | None], index: ChunkIndex, *more
):  # fmt: skip
    """`run()`, or the same by its launches if these were recorded.

    Args:
        operation: what runs. It depends on `more` and the other arguments alone, and returns tensors and None.
        tensors: all that it reads besides the index.
    """
    if INTERPRET or has_hooks():
        return run()
    given = [x for x in tensors if x is not None]
    device = torch.cuda.current_device()
    if set(map(Tensor.get_device, given)) != {device} or not all(map(Tensor.is_contiguous, given)):
        return run()
    every = [*tensors, *index]
    addresses = [0 if x is None else x.data_ptr() for x in every]
    unaligned = functools.reduce(operator.or_, addresses) % 16
    # The shape tells all of a tensor's sizes but one, as that of a table of angles.
    key = (
        operation, device, *more, dot_precision(shape.dtype), torch.is_autocast_enabled("cuda"), index.pieces,
        index.documents, *[x if x is None else x.dtype for x in tensors], *map(Tensor.numel, given),
        *([address % 16 for address in addresses] if unaligned else ()),
    )  # fmt: skip
    found = shape.tapes.get(key, 0)
    if type(found) is Tape:
        return found.replay(every, addresses, current_stream(device))
    if found is None:  # cannot be replayed
        return run()
    if len(shape.tapes) >= MOST_KINDS and key not in shape.tapes:
        shape.tapes.clear()
    shape.tapes[key] = found + 1
    if found < EARLIER:
        return run()
    with Recording(every) as recording:
        results = run()
    shape.tapes[key] = recording.tape(results)
    return results
