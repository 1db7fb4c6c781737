# SPDX-License-Identifier: Apache-2.0
"""The warps of the kernels for Hopper, without a GPU: barriers, rings and copies are emulated, and the groups of warps
run as threads, one at a time in a random order. Numbers are not: a tile is what was loaded into it, and a product the
pairs of tiles that it multiplied."""

import dataclasses
import itertools
import random
import threading
from types import SimpleNamespace

import pytest
import torch

from flash_hf.kernels import choice


if choice.scan is None:
    pytest.skip("triton has no Gluon", allow_module_level=True)
gate, hopper, quadratic, reduce = choice.gate, choice.hopper, choice.quadratic, choice.reduce


class Fault(Exception):
    """What a GPU answers with a launch failure, a hang or wrong numbers."""


class Warps:
    """Runs functions and asynchronous copies in a random order, of which each waits for its condition."""

    def __init__(self, seed):
        self.random, self.copies, self.fault = random.Random(seed), [], None
        self.waiting, self.turn, self.back, self.here = {}, {}, threading.Semaphore(0), threading.local()

    def wait(self, ready=lambda: True):
        name = self.here.name
        self.waiting[name] = ready
        self.back.release()
        self.turn[name].acquire()
        if self.fault:
            raise Fault

    def run(self, functions):
        def body(name, function):
            self.here.name = name
            try:
                self.wait()
                function()
            except Exception as fault:
                self.fault = self.fault or fault
            self.waiting[name] = None
            self.back.release()

        for name, function in enumerate(functions):
            self.turn[name] = threading.Semaphore(0)
            threading.Thread(target=body, args=(name, function), daemon=True).start()
            self.back.acquire()
        while any(self.waiting.values()):
            ready = [name for name, condition in self.waiting.items() if condition and (self.fault or condition())]
            ready += self.copies
            if not ready:
                self.fault = Fault("every group of warps waits")
                continue
            chosen = self.random.choice(ready)
            if callable(chosen):
                self.copies.remove(chosen)
                chosen()
            else:
                self.turn[chosen].release()
                self.back.acquire()
        if self.fault:
            raise self.fault


class Barrier:
    """A barrier of one arrival: a phase ends when that and the bytes it expects are there."""

    def __init__(self):
        self.phase, self.pending, self.bytes = 0, 1, 0

    def arrive(self, bytes=0):
        if self.pending == 0:
            raise Fault("more arrivals than the phase has")
        self.pending -= 1
        self.receive(-bytes)

    def receive(self, bytes):
        self.bytes += bytes
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, 1


@dataclasses.dataclass(eq=False)
class Tile:
    bytes: int
    held: object = None
    readers: int = 0

    def permute(self, order):
        return self

    reshape = slice = permute

    def load(self, layout):
        if self.held is None:
            raise Fault("a tile is read before it has arrived")
        return Product((self.held,))

    def store(self, product):
        if self.readers:
            raise Fault("a tile is written while it is stored")
        self.held = product


@dataclasses.dataclass(frozen=True)
class Product:
    """A sum of products of tiles, and what its end multiplies it by."""

    parts: tuple = ()

    def to(self, dtype):
        return self

    def __mul__(self, other):
        return Product(self.parts + getattr(other, "parts", ()))

    __rmul__ = __mul__


class Number(float):
    def to(self, dtype):
        return self


@dataclasses.dataclass
class Described:
    name: str
    layout: object = None


def root(x):
    return x.sqrt() if isinstance(x, torch.Tensor) else x


class Emulated:
    """Programs of a kernel, one after the other: `stored` has what each stored where."""

    def __init__(self, monkeypatch, seed):
        self.warps, self.seed, self.stored = None, seed, {}
        gl = SimpleNamespace(
            program_id=lambda axis: self.program, num_programs=lambda axis: self.programs, static_range=range,
            bfloat16=2, int64=8, int32=torch.int32, float32=torch.float32, minimum=min, sqrt=root,
            where=lambda condition, x, y: x if condition else y, zeros=lambda *a: Product(), arange=lambda *a: 0,
            load=lambda *a, **k: Number(1.0), expand_dims=lambda x, axis: x, allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize, SliceLayout=lambda *a: None, NVMMADistributedLayout=lambda **k: None,
        )  # fmt: skip
        barrier = SimpleNamespace(
            init=lambda barrier, count: None, MBarrierLayout=lambda: None, arrive=self.arrive, expect=self.arrive,
            wait=self.wait,
        )  # fmt: skip
        names = dict(
            gl=gl, mbarrier=barrier, tma=SimpleNamespace(store_wait=self.store_wait), load_async=self.load,
            store_async=self.store, warpgroup_mma=self.multiply, warpgroup_mma_wait=self.multiply_wait,
            fence_async_shared=lambda: None, BLOCK=128, TILE_BYTES=128 * 128 * 2, GROUP_ROWS=8,
            barriers=hopper.barriers.fn, accumulate=hopper.accumulate.fn, halves=lambda acc, layout: (acc, acc),
            gate_gradient=self.finish_gate, finish=self.finish, fill_zeros=lambda target, chunk: None,
        )  # fmt: skip
        for module in (hopper, gate, quadratic, reduce):
            for name, value in names.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
        place_of = quadratic.place_of.fn
        monkeypatch.setattr(quadratic, "place_of", lambda task, *a: map(int, place_of(torch.tensor(task), *a)))
        monkeypatch.setattr(reduce, "place_of", reduce.place_of.fn)

    def run(self, kernel, programs, *arguments, **constants):
        self.programs = programs
        for self.program in range(programs):
            self.warps, self.reads, self.stores = Warps(self.seed + self.program), {}, {}
            kernel.function.fn(*arguments, **constants)
            assert not any(self.stores.values()), "a program ends before its stores"

    def allocate(self, kind, shape, layout):
        if kind == 8:
            made = [Barrier() for _ in range(shape[0])]
        else:
            made = [Tile(shape[1] * shape[2] * kind) for _ in range(shape[0])]
        return SimpleNamespace(index=made.__getitem__)

    def specialize(self, parts, warps, registers):
        self.warps.run([lambda function=function, a=a: function.fn(*a) for function, a in parts])

    def arrive(self, barrier, bytes=0, count=1):
        self.warps.wait()
        barrier.arrive(bytes)

    def wait(self, barrier, parity):
        self.warps.wait(lambda: barrier.phase % 2 != parity)

    def load(self, source, place, barrier, tile):
        if tile.readers:
            raise Fault("a tile is overwritten while it is read")
        tile.held = None

        def arrive():
            tile.held = (source.name, *map(int, place))
            barrier.receive(tile.bytes)

        self.warps.copies.append(arrive)
        self.warps.wait()

    def multiply(self, x, y, acc, is_async):
        for tile in (x, y):
            tile.readers += 1
        self.reads.setdefault(self.warps.here.name, []).append((x, y))
        self.warps.wait()
        return Product((*acc.parts, x.load(None).parts + y.load(None).parts))

    def multiply_wait(self, count, deps):
        reads = self.reads[self.warps.here.name]
        while len(reads) > count:
            for tile in reads.pop(0):
                tile.readers -= 1
        return deps[0]

    def store(self, target, place, tile):
        place = (target.name, *map(int, place))
        assert place not in self.stored, "a tile is stored twice"
        self.stored[place] = tile.held.parts
        tile.readers += 1
        self.stores.setdefault(self.warps.here.name, []).append(tile)
        self.warps.wait()

    def store_wait(self, count):
        for tile in self.stores.pop(self.warps.here.name, ()):
            tile.readers -= 1

    def finish_gate(self, u_tile, out_tile, acc, scale, bias, sums, first, layout):
        if first == 0:
            u_tile.store(acc * u_tile.load(None))
            out_tile.store(acc * out_tile.load(None))

    def finish(self, tile, acc, scale, bias, sums, first, kind, layout):
        if first == 0:
            tile.store(acc * tile.load(None))


@pytest.fixture(params=range(2))
def emulated(monkeypatch, request):
    return Emulated(monkeypatch, request.param)


# One, two, three and five tasks per program, some programs with one less than others, and a group without a task.
PROGRAMS = pytest.mark.parametrize("programs", [1, 2, 3, 5, 12])


@PROGRAMS
@pytest.mark.parametrize(("D", "stages"), [(64, 3), (200, 6), (448, 2)])
def test_the_groups_of_the_gates_product_take_turns(D, stages, programs, emulated):
    d_y, w, u, out, d_attended, d_u = map(Described, ("d_y", "w", "u", "out", "d_attended", "d_u"))
    T, columns = 300, 4
    emulated.run(
        gate.gate_product_kernel, min(programs, 3 * columns), d_y, w, u, out, d_attended, d_u, 0, 0, 0, 0,
        T, D, columns, 3 * columns, STEP=gate.STEP, STAGES=stages,
    )  # fmt: skip
    expected = {}
    for row, column in itertools.product(range(0, T, 128), range(0, columns * 128, 128)):
        product = tuple((("d_y", row, part), ("w", part, column)) for part in range(0, D, gate.STEP))
        expected["d_u", row, column] = (*product, ("u", row, column))
        expected["d_attended", row, column] = (*product, ("out", row, column))
    assert emulated.stored == expected


@PROGRAMS
@pytest.mark.parametrize("causal", [True, False])
def test_the_groups_of_the_reduction_take_turns(causal, programs, emulated):
    names = ("d_attended", "value", "state", "d_state", "a", "d_score", "d_query", "d_key")
    B, G, E, shift = 2, 3, 384, 5
    emulated.run(
        reduce.reduce_kernel, programs, *map(Described, names), 0, 0, B, G, shift, E, reduce.task_count(B, G, causal),
        CAUSAL=causal, STEP=64, STAGES=5,
    )  # fmt: skip
    expected = {}
    for row, chunk, half in itertools.product(range(B), range(G), range(2)):
        slot, token = (row * G + chunk) * 256, chunk * 256 - shift
        state = (row * G + chunk if causal else row) * 128
        products = [("d_query", 0, "d_attended", ("state", state)), ("d_key", 0, "value", ("d_state", state))]
        products = products[causal and chunk == 0 : 1 if causal and chunk == G - 1 else 2]
        for other in range(half + 1 if causal else 2):
            products.append(("d_score", other * 128, "d_attended", ("value", row, token + other * 128)))
        for target, column, left, right in products:
            parts = tuple(((left, row, token + half * 128, part), (*right, part)) for part in range(0, E, 64))
            end = (("a", slot + half * 128, column),) if target == "d_score" else ()
            expected[target, slot + half * 128, column] = (*parts, *end)
    assert emulated.stored == expected


@PROGRAMS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["output", "values", "scores"])
def test_the_groups_of_quadratic_attention_take_turns(kind, causal, programs, emulated):
    B, N, E = 2, 384, 256
    emulated.run(
        quadratic.quadratic_kernel, programs, *map(Described, ("x", "y", "held", "result")), 0, 0, 0, 0,
        B, N, E, quadratic.task_count(kind, B, N, E, causal), KIND=kind, CAUSAL=causal, STEP=64, STAGES=5,
    )  # fmt: skip
    expected = {}
    for row, block, column in itertools.product(range(B), range(3), range(3 if kind == "scores" else 2)):
        first = row * N
        slot, end = first + block * 128, (block + 1) * 128 if causal else N
        if kind == "output":
            parts = [(("x", slot, part), ("y", first + part, column * 128)) for part in range(0, end, 64)]
        elif kind == "values":
            parts = [
                (("x", first + part, block * 128), ("y", first + part, column * 128))
                for part in range(block * 128 if causal else 0, N, 64)
            ]
        elif causal and column > block:
            continue
        else:
            parts = [(("x", slot, part), ("y", first + column * 128, part)) for part in range(0, E, 64)]
        expected["result", slot, column * 128] = (*parts, ("held", slot, column * 128))
    assert emulated.stored == expected
