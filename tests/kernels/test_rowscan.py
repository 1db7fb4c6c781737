# SPDX-License-Identifier: Apache-2.0
"""The scan over bidirectional rows that stay in shared memory, without a GPU: test_turns.py, but with numbers."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from flash_hf.kernels import choice
from test_scan import rows_in_torch, scan_in_torch, totals_in_torch, whole_in_torch
from test_turns import SCANS, Barrier, Described, Emulated, Fault, Tile, functions_of


hopper, rowscan, scan = choice.hopper, choice.rowscan, choice.scan
totals, wholescan = choice.totals, choice.wholescan


class Integer(int):
    def __floordiv__(self, other):
        return Integer(int(self) // int(other))

    def __mod__(self, other):
        return Integer(int(self) % int(other))

    def to(self, dtype):
        return self


@dataclasses.dataclass
class Pointer:
    numbers: torch.Tensor
    place: object = 0
    dtype = SimpleNamespace(element_ty=torch.float64)

    def __add__(self, places):
        return Pointer(self.numbers, self.place + places)

    def load(self, mask=True, other=0.0):
        place = torch.as_tensor(self.place)
        found = self.numbers.flatten()[torch.where(torch.as_tensor(mask), place, 0)]
        return torch.where(torch.as_tensor(mask), found, other) if found.is_floating_point() else found

    def store(self, numbers, mask=True):
        places, numbers, mask = torch.broadcast_tensors(self.place, numbers, torch.as_tensor(mask))
        self.numbers.view(-1)[places[mask]] = numbers[mask]


@dataclasses.dataclass(eq=False)
class NumberTile(Tile):
    shape: tuple = (128, 128)
    layout = None

    def permute(self, order):
        return Part(self, lambda held: held.T)

    def slice(self, first, width, dim):
        return Part(self, lambda held: held.narrow(dim, first, getattr(width, "value", width)))

    def reshape(self, shape):
        return self

    def load(self, layout):
        return super().load(layout).parts[0].clone()

    def store(self, numbers):
        super().store(numbers.clone())


@dataclasses.dataclass
class Part:
    """A part of a tile, its transpose, or a tile of another shape in the same place."""

    tile: NumberTile
    of: object
    shape: tuple = ()

    def permute(self, order):
        return Part(self.tile, lambda held: self.of(held).T)

    def load(self, layout):
        return self.of(self.tile.load(layout))

    def store(self, numbers):
        whole = torch.full(self.tile.shape, torch.nan, dtype=numbers.dtype)
        if self.tile.held is not None:
            whole = self.tile.load(None)
        self.of(whole).copy_(numbers)
        self.tile.store(whole)


def reinterpret(tile, kind, shape, layout):
    """A tile of 128 by 64 as one of 64 by 128, which has squares of 64 one after the other, in rows of 128 bytes."""
    assert (*tile.shape, *shape) == (128, 64, 64, 128)
    return Part(tile, lambda held: torch.cat(held.split(64), 1), shape)


@dataclasses.dataclass
class Tensor3(Described):
    """A tensor `[rows, tokens, width]` or `[1, rows, width]`, outside of which there is 0."""

    numbers: torch.Tensor = None

    def part(self, place, shape):
        """What a tile of `shape` at `place` covers, in the tensor and in the tile."""
        row, first, column = (0, *place) if len(place) == 2 else place
        row, first, column = int(row), int(first), int(column)
        begin = max(0, first)
        end = max(begin, min(first + shape[0], self.numbers.shape[1]))
        return self.numbers[row, begin:end, column : column + shape[1]], slice(begin - first, end - first)


class EmulatedNumbers(Emulated):
    """Emulated programs of the scans, in float64."""

    def __init__(self, monkeypatch, seed):
        self.warps, self.seed = None, seed
        gl = SimpleNamespace(
            program_id=lambda axis: self.program, num_programs=lambda axis: self.programs, static_range=range,
            bfloat16=torch.float64, float32=torch.float64, int64=torch.int64, sum=torch.sum,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), SliceLayout=lambda *a: None,
            where=lambda condition, x, y: torch.where(torch.as_tensor(condition), x, y),
            arange=lambda first, end, layout: torch.arange(first, getattr(end, "value", end)),
            expand_dims=torch.unsqueeze,
            load=lambda x, **masks: x.load(**masks), store=lambda x, *a, **mask: x.store(*a, **mask),
            allocate_shared_memory=self.allocate, warp_specialize=self.specialize,
            NVMMADistributedLayout=lambda **k: None, BlockedLayout=lambda *a: None,
            NVMMASharedLayout=lambda **k: None,
        )  # fmt: skip
        names = self.stand_ins() | dict(
            gl=gl, WIDTH=rowscan.WIDTH.value, reinterpret=reinterpret, sigmoid=torch.sigmoid,
            halves=lambda acc, layout: acc.chunk(2, 1), range=lambda *a: map(Integer, range(*map(int, a))),
        )  # fmt: skip
        for module in (*SCANS, rowscan):
            for name, value in (functions_of(module, monkeypatch) | names).items():
                monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr(hopper, "gl", gl)
        monkeypatch.setattr(hopper, "mbarrier", names["mbarrier"])

    def allocate(self, kind, shape, layout):
        if kind == torch.int64:
            made = [Barrier() for _ in range(shape[0])]
        elif len(shape) == 2:
            return NumberTile(shape[0] * shape[1] * 2, shape=shape)
        else:
            made = [NumberTile(shape[1] * shape[2] * 2, shape=shape[1:]) for _ in range(shape[0])]
        return SimpleNamespace(index=lambda number: made[number])

    def specialize(self, parts, warps, registers):
        self.warps.run([lambda function=function, a=a: function(*a) for function, a in parts])

    def load(self, source, place, barrier, tile):
        shape = [int(size) for size in tile.shape]
        whole = tile.tile if isinstance(tile, Part) else tile
        if whole.readers:
            raise Fault("a tile is overwritten while it is read")
        whole.held = None

        def arrive():
            held, (part, rows) = torch.zeros(*shape, dtype=torch.float64), source.part(place, shape)
            held[rows] = part
            whole.held = held if whole is tile else torch.cat(held.split(64, 1))
            barrier.receive(whole.bytes)

        self.warps.copies.append(arrive)
        self.warps.wait()

    def multiply(self, x, y, acc, is_async):
        read = [tile.tile if isinstance(tile, Part) else tile for tile in (x, y)]
        for tile in read:
            tile.readers += 1
        self.reads.setdefault(self.warps.here.name, []).append(read)
        # In the depth of an instruction and 64 columns, so that sums are those of any tiles.
        for left, right in zip(x.load(None).split(16, 1), y.load(None).split(16), strict=True):
            left = left.contiguous()
            acc = acc + torch.cat([left @ part.contiguous() for part in right.split(64, 1)], 1)
        self.warps.wait()
        return acc

    def multiply_wait(self, count, deps):
        return super().multiply_wait(count, deps) if self.warps.here.name in self.reads else deps[0]

    def store(self, target, place, tile):
        if min(place) < 0:
            raise Fault("a tile is stored that begins before its tensor")
        part, rows = target.part(place, tile.shape)
        assert part.isnan().all(), "a tile is stored twice"
        part.copy_(tile.load(None)[rows])
        tile.readers += 1
        self.stores.setdefault(self.warps.here.name, []).append(tile)
        self.warps.wait()


def described(numbers, rows=1):
    return Tensor3("", None, numbers.view(rows, -1, numbers.shape[-1]))


def slots(module, back):
    names = ("BACK_SLOTS", "BACK_VALUE_SLOTS") if back else ("SLOTS", "VALUE_SLOTS")
    return dict(zip(("SLOTS", "VALUE_SLOTS"), (getattr(module, name) for name in names), strict=True))


# Two to six tasks per program, and some programs with one less than others.
@pytest.mark.parametrize("programs", [6, 3, 2, 4])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    ("N", "shift"), [(512, 0), (300, 0), (257, 0), (200, 0), (256, 0), (300, 77)]
)  # fmt: skip
def test_the_scan_of_held_rows_is_two_kernels_in_one(N, shift, back, programs, monkeypatch):
    """Bit for bit, and what they say that they compute."""
    B, E, G = 3, 256, -(-(N + shift) // 256)
    tasks, width = B * E // 128, int(rowscan.WIDTH)
    torch.manual_seed(0)
    x, h, rms = (torch.rand(B * N, size, dtype=torch.float64) - 0.3 for size in (E, E, 1))
    heads = torch.randn(2, B * G * 256, 128, dtype=torch.float64)
    weights = torch.randn(B * G * 256, 256, dtype=torch.float64)
    gain, bias_x, bias_h = (torch.randn(size, dtype=torch.float64) for size in (1, E, E))
    begin, end = (torch.arange(B) * G + first for first in (0, G))
    rms = rms.flatten()
    options = {"BACK": back, "EVEN": N + shift == 256 * G}

    def outputs():
        sizes = (B * N, E), (B * 128, E), (B * N, E), (B * G * 2, E)
        out, states, value, sums = (torch.full(size, torch.nan, dtype=torch.float64) for size in sizes)
        return out, states, value if back else out, sums

    expected, got, apart = outputs(), outputs(), outputs()
    out, states, value, sums = expected
    rows_in_torch(
        (programs,), x, h, weights, *heads, out, states, value, rms, gain, bias_x, bias_h, sums, out, E, value, N, G,
        shift, E // width, B * E // width, **options,
    )  # fmt: skip

    emulated = EmulatedNumbers(monkeypatch, programs)
    rms, gain, bias_x, bias_h, begin, end = map(Pointer, (rms, gain, bias_x, bias_h, begin, end))
    x, h = (described(numbers, B) for numbers in (x, h))
    weights, reader, writer = map(described, (weights, *heads))
    out, states, value, sums = got
    emulated.run(
        rowscan.row_kernel, programs, x, h, weights, reader, writer, described(out, B), described(states),
        described(value, B), rms, gain, bias_x, bias_h, *map(Pointer, (sums, out)), E, Pointer(value), N, G, shift,
        E // width, B * E // width, **options, SHIFTED=shift > 0, **slots(rowscan, back),
    )  # fmt: skip
    out, states, value, sums = apart
    emulated.run(
        totals.totals_kernel, programs, x, writer, Pointer(states), rms, gain, bias_x, begin, end, N, G, shift, 0,
        1 / 256, E // 128, tasks, **options, SPLIT="pieces", SKIP=False, SLOTS=totals.SLOTS,
    )  # fmt: skip
    emulated.run(
        wholescan.whole_kernel, programs, x, h, weights, reader, described(states), described(out, B),
        described(value, B), rms, gain, bias_x, bias_h, Pointer(sums), begin, end, Pointer(out), E, Pointer(value), N,
        G, shift, E // 128, tasks, **options, SKIP=False, SHIFTED=shift > 0, **slots(wholescan, back),
    )  # fmt: skip
    for one, two, right in zip(got[: 4 if back else 2], apart, expected, strict=False):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    ("N", "shift", "skip"),
    [(512, 256, False), (300, 300, False), (257, 511, False), (200, 150, True), (300, 128, True), (640, 0, True)],
)
def test_rows_with_empty_slots_at_either_end(N, shift, skip, back, monkeypatch):
    """By pieces of one chunk or two: rows cut over processes, which have an empty chunk, or with half a chunk that is
    left out."""
    B, E, G, programs = 2, 256, -(-(N + shift) // 256) + (not skip), 3
    torch.manual_seed(0)
    x, h, rms = (torch.rand(B * N, width, dtype=torch.float64) - 0.3 for width in (E, E, 1))
    heads = torch.randn(2, B * G * 256, 128, dtype=torch.float64)
    weights = torch.randn(B * G * 256, 256, dtype=torch.float64)
    states = torch.randn(B, 128, E, dtype=torch.float64)
    gain, bias_x, bias_h = (torch.randn(width, dtype=torch.float64) for width in (1, E, E))
    rms = rms.flatten()
    begin = torch.tensor([row * G + first for row in range(B) for first in (0, 1, 2, 4) if first < G])
    end = torch.cat([begin[1:], torch.tensor([B * G])])
    tasks, options = len(begin) * E // 128, {"BACK": back, "EVEN": False, "SKIP": skip}

    def outputs():
        sizes = (len(begin), 128, E), (B * N, E), (B * N, E), (B * G * 2, E)
        total, out, value, sums = (torch.full(size, torch.nan, dtype=torch.float64) for size in sizes)
        return total, out, value if back else out, sums

    place = N, G, shift
    expected, got = outputs(), outputs()
    total, out, value, sums = expected
    totals_in_torch(
        (programs,), x, heads[1], total, rms, gain, bias_x, begin, end, *place, 0, 1.0, E // 128, tasks,
        SPLIT="pieces", **options,
    )  # fmt: skip
    whole_in_torch(
        (programs,), x, h, weights, heads[0], states, out, value, rms, gain, bias_x, bias_h, sums, begin, end, out, E,
        value, *place, E // 128, tasks, **options,
    )  # fmt: skip

    emulated = EmulatedNumbers(monkeypatch, programs)
    rms, gain, bias_x, bias_h, begin, end = map(Pointer, (rms, gain, bias_x, bias_h, begin, end))
    x, h = (described(numbers, B) for numbers in (x, h))
    weights, reader, writer = map(described, (weights, *heads))
    total, out, value, sums = got
    emulated.run(
        totals.totals_kernel, programs, x, writer, Pointer(total), rms, gain, bias_x, begin, end, *place, 0, 1.0,
        E // 128, tasks, **options, SPLIT="pieces", SLOTS=totals.SLOTS,
    )  # fmt: skip
    emulated.run(
        wholescan.whole_kernel, programs, x, h, weights, reader, described(states), described(out, B),
        described(value, B), rms, gain, bias_x, bias_h, Pointer(sums), begin, end, Pointer(out), E, Pointer(value),
        *place, E // 128, tasks, **options, SHIFTED=True, **slots(wholescan, back),
    )  # fmt: skip
    for one, right in zip(got[: 4 if back else 2], expected, strict=False):
        torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("split", ["rows", "pieces", "ends"])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("N", "shift", "skip"), [(1024, 0, False), (900, 77, False), (1024, 128, True)])
def test_the_causal_scan(N, shift, skip, back, split, monkeypatch):
    """What it says that it computes; with programs that have two tasks or one."""
    B, E, G = 2, 256, -(-(N + shift) // 256)
    torch.manual_seed(0)
    x, h, rms = (torch.rand(B * N, width, dtype=torch.float64) - 0.3 for width in (E, E, 1))
    heads = torch.randn(2, B * G * 256, 128, dtype=torch.float64)
    weights = torch.randn(B * G, 256, 256, dtype=torch.float64).tril()
    weights[:, :128, 128:] = torch.nan  # not read
    weights = weights.flatten(0, 1)
    gain, bias_x, bias_h = (torch.randn(width, dtype=torch.float64) for width in (1, E, E))
    rms, cut = rms.flatten(), 2
    begin = torch.tensor([row * G + first for row in range(B) for first in (0, 1, 3)])
    end = torch.cat([begin[1:], torch.tensor([B * G])])
    walks = {"rows": B, "pieces": len(begin), "ends": 2 * B}[split]
    carry = torch.randn(walks, 128, E, dtype=torch.float64)
    tasks, programs = walks * E // 128, 6 if split == "ends" else 3
    options = {"BACK": back, "SPLIT": split, "SKIP": skip, "EVEN": N + shift == 256 * G or skip}

    def outputs():
        sizes = (B * N, E), (B * G * 128, E), (B * N, E), (B * G * 2, E)
        out, states, value, sums = (torch.full(size, torch.nan, dtype=torch.float64) for size in sizes)
        return out, states, value if back else out, sums

    place = N, G, shift, cut, E // 128, tasks
    expected, got = outputs(), outputs()
    out, states, value, sums = expected
    scan_in_torch(
        (132,), x, h, weights, *heads, out, states, value, rms, gain, bias_x, bias_h, carry, sums, begin, end, out, E,
        value, *place, **options,
    )  # fmt: skip

    emulated = EmulatedNumbers(monkeypatch, 0)
    rms, gain, bias_x, bias_h, begin, end = map(Pointer, (rms, gain, bias_x, bias_h, begin, end))
    x, h = (described(numbers, B) for numbers in (x, h))
    weights, reader, writer = map(described, (weights, *heads))
    out, states, value, sums = got
    emulated.run(
        scan.scan_kernel, programs, x, h, weights, reader, writer, described(out, B), described(states),
        described(value, B), rms, gain, bias_x, bias_h, Pointer(carry), Pointer(sums), begin, end, Pointer(out), E,
        Pointer(value), *place, **options, SHIFTED=shift % 128 > 0, SLOTS=scan.BACK_SLOTS if back else scan.SLOTS,
        VALUE_SLOTS=scan.BACK_VALUE_SLOTS if back else scan.VALUE_SLOTS,
    )  # fmt: skip
    for one, right in zip(got[: 4 if back else 2], expected, strict=False):
        torch.testing.assert_close(one, right, rtol=1e-9, atol=1e-9, equal_nan=True)
