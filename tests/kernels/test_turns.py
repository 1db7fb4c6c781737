# SPDX-License-Identifier: Apache-2.0
"""The warps of the kernels for Hopper, without a GPU: barriers, rings and copies are emulated, and the groups of warps
run as threads, one at a time in a random order. Numbers are not: a tile is what was loaded into it, and a product the
pairs of tiles that it multiplied."""

import dataclasses
import functools
import itertools
import random
import threading
from types import SimpleNamespace

import pytest
import torch

from flash_hf.kernels import choice


if choice.scan is None:
    pytest.skip("triton has no Gluon", allow_module_level=True)
gate, hopper, quadratic, reduce, scan = choice.gate, choice.hopper, choice.quadratic, choice.reduce, choice.scan
totals, walk, wholescan = choice.totals, choice.walk, choice.wholescan
SCANS = (walk, scan, wholescan, totals)


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
    """A barrier of one arrival, or of more: a phase ends when these and the bytes it expects are there."""

    def __init__(self):
        self.phase, self.bytes = 0, 0
        self.init(1)

    def init(self, count):
        self.count = self.pending = count

    def arrive(self, bytes=0):
        if self.pending == 0:
            raise Fault("more arrivals than the phase has")
        self.pending -= 1
        self.receive(-bytes)

    def receive(self, bytes):
        self.bytes += bytes
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


@dataclasses.dataclass(eq=False)
class Tile:
    bytes: int
    held: object = None
    readers: int = 0

    def permute(self, *a, **k):
        return self

    reshape = slice = reinterpret = permute
    layout = None

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

    def __add__(self, other):
        assert self == other
        return self

    __rmul__ = __mul__


class Number(float):
    def to(self, dtype):
        return self


class Whole(int):
    def to(self, dtype):
        return self

    def __floordiv__(self, other):
        return Whole(int(self) // other)


@dataclasses.dataclass(frozen=True)
class Pointer:
    """Numbers at some places, or a tile for each place."""

    name: str
    numbers: tuple = ()
    offset: int = 0
    dtype = SimpleNamespace(element_ty=None)

    def __add__(self, places):
        return Pointer(self.name, self.numbers, self.offset + places)

    def load(self):
        return Whole(self.numbers[self.offset]) if self.numbers else Product(((self.name, self.offset),))


@dataclasses.dataclass
class Described:
    name: str
    layout: object = None


def root(x):
    return x.sqrt() if isinstance(x, torch.Tensor) else x


def functions_of(module, monkeypatch):
    """A module's kernels and what they call, by name, with defaults that are plain numbers."""
    found = {name: made.fn for name, made in vars(module).items() if hasattr(made, "fn")}
    for function in found.values():
        plain = tuple(getattr(value, "value", value) for value in function.__defaults__ or ())
        monkeypatch.setattr(function, "__defaults__", plain)
    return found


class Emulated:
    """Programs of a kernel, one after the other: `stored` has what each stored where."""

    def stand_ins(self) -> dict:
        """What the kernels' modules import from Gluon, emulated."""
        barrier = SimpleNamespace(
            init=Barrier.init, MBarrierLayout=lambda: None, arrive=self.arrive, expect=self.arrive,
            wait=self.wait,
        )  # fmt: skip
        return dict(
            mbarrier=barrier, tma=SimpleNamespace(store_wait=self.store_wait), load_async=self.load,
            store_async=self.store, warpgroup_mma=self.multiply, warpgroup_mma_wait=self.multiply_wait,
            reinterpret=lambda tile, *a: tile.reinterpret(*a),
            fence_async_shared=lambda: None, grid_wait=lambda: None, BLOCK=128, TILE_BYTES=128 * 128 * 2, PART=64,
            DEPTH=64, END=32, END_TILES=4, SIDE=64, HALF=64,
        )  # fmt: skip

    def __init__(self, monkeypatch, seed):
        self.warps, self.seed, self.stored = None, seed, {}
        gl = SimpleNamespace(
            program_id=lambda axis: self.program, num_programs=lambda axis: self.programs, static_range=range,
            bfloat16=2, int64=8, int32=torch.int32, float32=torch.float32, minimum=min, maximum=max, sqrt=root,
            where=lambda condition, x, y: x if condition else y, zeros=lambda *a: Product(), arange=lambda *a: 0,
            load=lambda place, **k: place.load() if isinstance(place, Pointer) else Number(1.0), store=self.put,
            expand_dims=lambda x, axis: x, allocate_shared_memory=self.allocate, warp_specialize=self.specialize,
            SliceLayout=lambda *a: None, NVMMADistributedLayout=lambda **k: None, BlockedLayout=lambda *a: None,
            NVMMASharedLayout=lambda **k: None, sum=lambda x, axis: x,
        )  # fmt: skip
        names = self.stand_ins() | dict(
            gl=gl, GROUP_TOKENS=2048, GROUP_ROWS=8, barriers=hopper.barriers.fn, accumulate=hopper.accumulate.fn,
            halves=lambda acc, layout: (acc, acc), upper_and_lower=lambda acc, layout: (acc, acc),
            gate_gradient=self.finish_gate, finish=self.finish, fill_zeros=lambda target, chunk: None,
        )  # fmt: skip
        for module in (hopper, gate, quadratic, reduce, *SCANS):
            for name, value in names.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(gate, "PARTS", gate.PARTS.value)
        monkeypatch.setattr(gate, "finish_columns", gate.finish_columns.fn)
        monkeypatch.setattr(quadratic, "lower_tile", hopper.lower_tile.fn)
        place_of = quadratic.place_of.fn
        monkeypatch.setattr(quadratic, "place_of", lambda task, *a: map(int, place_of(torch.tensor(task), *a)))
        monkeypatch.setattr(reduce, "place_of", reduce.place_of.fn)
        walk_of = walk.walk_of.fn
        plain = {
            "walk_of": lambda *a: map(Whole, walk_of(*a)), "gain_of": lambda *a: (Number(1.0), True),
            "activate": self.activate, "gate": self.finish_scan, "no_sums": lambda place, *a: self.put(place, None),
        }  # fmt: skip
        for module in SCANS:
            for name, value in (functions_of(module, monkeypatch) | plain).items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
            monkeypatch.setattr(module, "range", lambda *a: map(Whole, range(*a)), raising=False)

    def run(self, kernel, programs, *arguments, **constants):
        self.programs = programs
        for self.program in range(programs):
            self.warps, self.reads, self.stores = Warps(self.seed + self.program), {}, {}
            kernel.function.fn(*arguments, **constants)
            assert not any(self.stores.values()), "a program ends before its stores"

    def allocate(self, kind, shape, layout):
        if kind == 8:
            made = [Barrier() for _ in range(shape[0])]
        elif len(shape) == 2:
            return Tile(shape[0] * shape[1] * kind)
        else:
            made = [Tile(shape[1] * shape[2] * kind) for _ in range(shape[0])]
        return SimpleNamespace(index=made.__getitem__)

    def specialize(self, parts, warps, registers):
        self.warps.run([functools.partial(getattr(function, "fn", function), *a) for function, a in parts])

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
        reads = self.reads.get(self.warps.here.name, [])
        while len(reads) > count:
            for tile in reads.pop(0):
                tile.readers -= 1
        return deps[0] if len(deps) == 1 else deps

    def store(self, target, place, tile):
        if min(place) < 0:
            raise Fault("a tile is stored that begins before the tensor")
        self.keep((target.name, *map(int, place)), tile.held)
        tile.readers += 1
        self.stores.setdefault(self.warps.here.name, []).append(tile)
        self.warps.wait()

    def keep(self, place, product):
        assert place not in self.stored, "a tile is stored twice"
        self.stored[place] = product and product.parts

    def put(self, place, product):
        self.keep((place.name, place.offset), product)

    def store_wait(self, count):
        stores = self.stores.get(self.warps.here.name, [])
        while len(stores) > count:
            stores.pop(0).readers -= 1

    def activate(self, tile, *rest):
        # The first of two parts stands for both.
        tile.store(tile.held if isinstance(tile.held, Product) else Product((("silu", *tile.held),)))

    def finish_gate(self, u_tile, out_tile, acc, scale, half_bias, layout):
        # The upper half stands for both.
        for tile in (u_tile, out_tile):
            if not isinstance(tile.held, Product):
                tile.store(acc * tile.load(None))
        return acc

    def finish_scan(
        self, tile, values, acc, scale, real, bias, sums, out, stride, value, E, token, before, first, BACK, EVEN,
        SHIFTED, layout, width=64, held=None,
    ):  # fmt: skip
        if first == 0:
            h = held or tile.load(None)
            if BACK:
                self.put(sums, acc)
                self.store_wait(0 if held else 1)
                values.store(h)
            tile.store(acc * h)
            if SHIFTED and before:
                self.keep(("out", token, out), acc * h)
                if BACK:
                    self.keep(("value", token, value), h)

    def finish(self, value, place, tile, acc, scale, bias, sums, kind, layout):
        held = tile.load(None)
        if kind == "values":
            tile.store(held)
            self.store(value, place, tile)
            self.store_wait(0)
        tile.store(acc * held)


@pytest.fixture(params=range(2))
def emulated(monkeypatch, request):
    return Emulated(monkeypatch, request.param)


def halves_of(N, shift):
    """Half chunks of a row that have tokens."""
    return range(shift // 128, -(-(N + shift) // 128))


# One, two, three and five tasks per program, some programs with one less than others, and a group without a task.
PROGRAMS = pytest.mark.parametrize("programs", [1, 2, 3, 5, 12])


@PROGRAMS
@pytest.mark.parametrize(("D", "stages"), [(64, 3), (200, 6), (448, 2)])
def test_the_groups_of_the_gates_product_take_turns(D, stages, programs, emulated):
    d_y, w, u, out, d_attended, d_u = map(Described, ("d_y", "w", "u", "out", "d_attended", "d_u"))
    T, columns = 300, 4
    E = columns * 128
    emulated.run(
        gate.gate_product_kernel, min(programs, 3 * columns), d_y, w, u, out, d_attended, d_u, 0, 0, 0,
        Pointer("sums"), T, D, columns, 3 * columns, STEP=gate.STEP, STAGES=stages,
    )  # fmt: skip
    expected = {}
    for row, column in itertools.product(range(0, T, 128), range(0, E, 32)):
        first = column // 128 * 128
        product = tuple((("d_y", row, part), ("w", part, first)) for part in range(0, D, gate.STEP))
        expected["d_u", row, column] = (*product, ("u", row, column))
        expected["d_attended", row, column] = (*product, ("out", row, column))
        expected["sums", row // 128 * E + column] = product
    assert emulated.stored == expected


@PROGRAMS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shift", [5, 128])
def test_the_groups_of_the_reduction_take_turns(shift, causal, programs, emulated):
    names = ("d_attended", "value", "state", "d_state", "a", "d_score", "d_query", "d_key")
    B, N, G, E = 2, 512, 3, 384
    halves = halves_of(N, shift)
    skip = len(halves) < 2 * G
    emulated.run(
        reduce.reduce_kernel, programs, *map(Described, names), 0, 0, B, N, G, shift, E,
        reduce.task_count(B, G, halves, causal), CAUSAL=causal, SKIP=skip, STEP=64, STAGES=5,
    )  # fmt: skip
    expected = {}
    for row, chunk, half in itertools.product(range(B), range(G), range(2)):
        if 2 * chunk + half not in halves:
            continue
        slot, token = (row * G + chunk) * 256, chunk * 256 - shift
        state = (row * G + chunk if causal else row) * 128
        products = [("d_query", 0, "d_attended", ("state", state)), ("d_key", 0, "value", ("d_state", state))]
        products = products[causal and chunk == 0 : 1 if causal and chunk == G - 1 else 2]
        for other in range(half + 1 if causal else 2):
            if 2 * chunk + other not in halves:
                continue
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
        quadratic.quadratic_kernel, programs, *map(Described, ("x", "y", "held", "result", "value")), 0, 0,
        0, 0, B, N, E, quadratic.task_count(kind, B, N, E, causal), KIND=kind, CAUSAL=causal, STEP=64, STAGES=5,
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
        for place in range(column * 128, column * 128 + 128, 64):
            held = "held", slot, place
            expected["result", slot, place] = (*parts, held)
            if kind == "values":
                expected["value", slot, place] = (held,)
    assert emulated.stored == expected


def walks_of(split, B, G, cut, back):
    """Number, first chunk and end of each walk of `scan_kernel`."""
    if split == "rows":
        return [(row, row * G, row * G + G) for row in range(B)]
    if split == "pieces":
        border = G // 2
    else:
        border = G - cut if back else cut
    parts = [(row * G + first, row * G + last) for row in range(B) for first, last in ((0, border), (border, G))]
    return [(number if split == "pieces" else number // 2, *part) for number, part in enumerate(parts)]


SHIFTS = pytest.mark.parametrize(
    ("N", "shift"),
    [(300, 0), (512, 0), (700, 0), (300, 64), (300, 128), (512, 128), (600, 128), (640, 128), (1000, 100), (1100, 200),
     (2560, 128)],
)  # fmt: skip


@SHIFTS
@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("split", ["rows", "pieces", "ends"])
def test_the_warps_of_the_scan_agree(split, back, programs, N, shift, emulated):
    B, blocks, G = 2, 1, -(-(N + shift) // 256)
    E, cut, halves = 128 * blocks, G // 2, halves_of(N, shift)
    if split == "ends":
        programs += B * blocks  # one for each of the longer walks
    walks = walks_of(split, B, G, cut, back)
    begin, end = (Pointer("border", tuple(walk[part] for walk in walks)) for part in (1, 2))
    names = ("x", "h", "a", "reader", "writer", "out", "states", "value")
    emulated.run(
        scan.scan_kernel, programs, *map(Described, names), 0, 0, 0, 0, Pointer("carry"), Pointer("sums"), begin, end,
        0, 0, 0, N, G, shift, cut, blocks, len(walks) * blocks, BACK=back, SPLIT=split, SKIP=len(halves) < 2 * G,
        EVEN=len(halves) * 128 == N, SHIFTED=halves.start * 128 < shift, SLOTS=3, VALUE_SLOTS=4 if back else 3,
    )  # fmt: skip
    expected = {}
    # Columns of the state, and of the end; backward, left factors come in two tiles.
    width, end_width, depths = (64, 32, (0, 64)) if back else (128, 128, (0,))
    for (number, first, last), column in itertools.product(walks, range(0, E, width)):
        border = last if back else first
        chunks = range(first, last)[::-1] if back else range(first, last)
        state = Product() if border % G == 0 else Product((("carry", number * 128 * E + column),))
        for chunk in chunks:
            row, slot = chunk // G, chunk * 256
            tokens = [chunk % G * 256 + half * 128 - shift for half in range(2)]
            own = [half for half in range(2) if chunk % G * 2 + half in halves]
            before, value = state, {}
            if state.parts:
                expected["states", chunk * 128, column] = state.parts
            for half in own:
                x = ("x", row, tokens[half], column)
                value[half] = x if back else Product((("silu", *x),))
                state *= Product(tuple((("writer", slot + half * 128 + depth, 0), value[half]) for depth in depths))
            for half in range(2):
                sums = "sums", (chunk * 2 + half) * E + column
                if half not in own:
                    if back:
                        expected[sums] = None
                    continue
                parts = [(("reader", slot + half * 128, depth), before) for depth in depths if before.parts]
                for other, depth in itertools.product(own, depths):
                    if back and other >= half:
                        parts.append((("a", slot + other * 128 + depth, half * 128), value[other]))
                    elif not back and other <= half:
                        parts.append((("a", slot + half * 128, other * 128), value[other]))
                for end_column in range(column, column + width, end_width):
                    token, h = row * N + tokens[half], ("h", row, tokens[half], end_column)
                    expected["out", token, end_column] = (*parts, h)
                    if back:
                        expected["value", token, end_column] = (h,)
                        expected["sums", (chunk * 2 + half) * E + end_column] = tuple(parts)
    assert flat(emulated.stored, N) == expected


def flat(stored, N):
    """Tiles that the memory accelerator stores, `(name, row, token, column)`, by their token among all rows'."""
    return {(key[0], key[1] * N + key[2], key[3]) if len(key) == 4 else key: parts for key, parts in stored.items()}


@SHIFTS
@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("back", [False, True])
def test_the_warps_of_the_bidirectional_scan_agree(back, programs, N, shift, emulated):
    B, E, G = 2, 128, -(-(N + shift) // 256)
    halves, walks = halves_of(N, shift), walks_of("pieces" if N > 512 else "rows", B, G, 0, back)
    begin, end = (Pointer("border", tuple(walk[part] for walk in walks)) for part in (1, 2))
    emulated.run(
        wholescan.whole_kernel, programs, *map(Described, ("x", "h", "a", "reader", "state", "out", "value")), 0, 0, 0,
        0, Pointer("sums"), begin, end, 0, 0, 0, N, G, shift, 1, len(walks), BACK=back, SKIP=len(halves) < 2 * G,
        EVEN=len(halves) * 128 == N, SHIFTED=halves.start * 128 < shift, SLOTS=4, VALUE_SLOTS=4 if back else 3,
    )  # fmt: skip
    expected = {}
    for chunk, half in itertools.product(range(B * G), range(2)):
        row, slot, first = chunk // G, chunk * 256, chunk % G * 256 - shift
        own = [other for other in range(2) if chunk % G * 2 + other in halves]
        if half not in own:
            if back:
                expected["sums", (chunk * 2 + half) * E] = None
            continue
        parts = [(("reader", slot + half * 128, depth), ("state", row * 128, 0)) for depth in (0, 64)]
        for other, depth in itertools.product(own, (0, 64)):
            x = ("x", row, first + other * 128, 0)
            if back:
                parts.append((("a", slot + other * 128 + depth, half * 128), ("x", row, x[2] + depth, 0)))
            else:
                parts.append((("a", slot + half * 128, other * 128 + depth), Product((("silu", *x),))))
        token = row * N + first + half * 128
        for column in range(0, E, 32):
            h = ("h", row, first + half * 128, column)
            expected["out", token, column] = (*parts, h)
            if back:
                expected["value", token, column] = (h,)
                expected["sums", (chunk * 2 + half) * E + column] = tuple(parts)
    assert flat(emulated.stored, N) == expected


@SHIFTS
@pytest.mark.parametrize("programs", [1, 2, 3])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("split", ["pieces", "cut"])
def test_the_warps_of_the_totals_agree(split, back, programs, N, shift, emulated):
    B, E, G = 2, 128, -(-(N + shift) // 256)
    halves, cut = halves_of(N, shift), G // 2
    walks = walks_of("ends" if split == "cut" else split, B, G, cut, back)
    begin, end = (Pointer("border", tuple(walk[part] for walk in walks)) for part in (1, 2))
    if split == "cut":
        walks = walks[1::2] if back else walks[::2]
    emulated.run(
        totals.totals_kernel, programs, Described("x"), Described("keys"), Pointer("total"), 0, 0, 0, begin, end, N, G,
        shift, cut, 1.0, 1, len(walks), BACK=back, SPLIT=split, SKIP=len(halves) < 2 * G, EVEN=len(halves) * 128 == N,
        SLOTS=3,
    )  # fmt: skip
    expected = {}
    for number, (_, first, last) in enumerate(walks):
        parts = []
        for half in range(2 * first, 2 * last):
            if half % (2 * G) in halves:
                x = ("x", half // (2 * G), half % (2 * G) * 128 - shift, 0)
                parts.append((("keys", half * 128, 0), x if back else Product((("silu", *x),))))
        expected["total", number * 128 * E] = tuple(parts)
    assert emulated.stored == expected
