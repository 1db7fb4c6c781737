# SPDX-License-Identifier: Apache-2.0
"""The product that a layer ends with, the gate's gradient and FLASH-Quad's products, without a GPU: as test_rowscan.py
runs the scan of held rows, with numbers."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from flash_hf.kernels import choice
from test_rowscan import EmulatedNumbers, NumberTile, Pointer
from test_scan import quadratic_in_torch
from test_turns import Barrier, Fault


gate, product, quadratic = choice.gate, choice.product, choice.quadratic


@dataclasses.dataclass(eq=False)
class SizedTile(NumberTile):
    size: tuple = ()


@dataclasses.dataclass
class Matrix:
    """A described matrix, outside of which there is 0."""

    numbers: torch.Tensor
    layout: object = None

    def part(self, place, size):
        """What a tile covers, in the matrix and in the tile."""
        ends = (min(first + width, end) for first, width, end in zip(place, size, self.numbers.shape, strict=True))
        found = self.numbers[tuple(map(slice, map(int, place), map(int, ends)))]
        return found, tuple(map(slice, found.shape))


class EmulatedProducts(EmulatedNumbers):
    """Emulated programs of the kernels of product.py, gate.py and quadratic.py, in float64."""

    def __init__(self, monkeypatch, seed):
        super().__init__(monkeypatch, seed)
        gl = choice.hopper.gl
        gl.inline_asm_elementwise = lambda code, registers, x, **k: 1 / x[0]
        gl.int32, gl.sqrt, gl.minimum, gl.maximum = torch.int32, torch.sqrt, min, max
        for module in (product, gate, quadratic):
            names = {name: made.fn for name, made in vars(module).items() if hasattr(made, "fn")}
            names |= self.stand_ins() | {"gl": gl, "barriers": choice.hopper.barriers.fn}
            names["halves"] = lambda acc, layout: acc.chunk(2, 1)
            names["upper_and_lower"] = lambda acc, layout: acc.chunk(2, 0)
            names["tanh"] = torch.tanh
            for name, value in names.items():
                monkeypatch.setattr(module, name, value, raising=False)
        for name in ("mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait", "BLOCK"):
            monkeypatch.setattr(choice.hopper, name, names[name])
        names = {"sigmoid": torch.sigmoid, "GROUP_TOKENS": quadratic.GROUP_TOKENS.value, "GROUP_ROWS": 8}
        names["place_of"] = lambda task, *a, place_of=quadratic.place_of: map(int, place_of(torch.tensor(task), *a))
        for name, value in names.items():
            monkeypatch.setattr(quadratic, name, value)
        monkeypatch.setattr(gate, "PARTS", gate.PARTS.value)

    def allocate(self, kind, shape, layout):
        if kind == torch.int64:
            made = [Barrier() for _ in range(shape[0])]
        else:
            made = [SizedTile(shape[1] * shape[2] * 2, size=tuple(shape[1:])) for _ in range(shape[0])]
        return SimpleNamespace(index=made.__getitem__)

    def load(self, source, place, barrier, tile):
        if tile.readers:
            raise Fault("a tile is overwritten while it is read")
        tile.held = None

        def arrive():
            part, inside = source.part(place, tile.size)
            tile.held = torch.zeros(tile.size, dtype=torch.float64)
            tile.held[inside] = part
            barrier.receive(tile.bytes)

        self.warps.copies.append(arrive)
        self.warps.wait()

    def store(self, target, place, tile):
        part, inside = target.part(place, tile.size)
        assert part.isnan().all(), "a tile is stored twice"
        part.copy_(tile.load(None)[inside])
        tile.readers += 1
        self.stores.setdefault(self.warps.here.name, []).append(tile)
        self.warps.wait()


# One to twelve tasks per program, and some programs with one less than others.
@pytest.mark.parametrize("programs", [1, 2, 4, 12])
@pytest.mark.parametrize(
    ("T", "D", "K", "stages"), [(300, 192, 128, 2), (257, 256, 64, 4), (520, 384, 320, 3), (700, 512, 448, 5)]
)  # fmt: skip
def test_the_product_and_its_end_are_right(T, D, K, stages, programs, monkeypatch):
    torch.manual_seed(0)
    rows, columns = product.tile_of(D)
    a, x, w, bias = (torch.randn(*size, dtype=torch.float64) for size in ((T, K), (T, D), (D, K), (D,)))
    column_blocks = D // columns
    tasks = -(-T // (2 * rows)) * column_blocks
    got = torch.full((T, D), torch.nan, dtype=torch.float64)
    emulated = EmulatedProducts(monkeypatch, programs)
    emulated.run(
        product.product_kernel, min(programs, tasks), *map(Matrix, (a, w, w, x, got)), Pointer(bias),
        K // product.STEP, column_blocks, tasks, ROWS=rows, COLUMNS=columns, STEP=product.STEP, STAGES=stages,
    )  # fmt: skip
    torch.testing.assert_close(got, x + a @ w.T + bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("programs", [1, 2, 4, 12])
@pytest.mark.parametrize(("T", "E", "D", "stages"), [(300, 256, 200, 2), (128, 384, 64, 5), (257, 512, 448, 3)])
def test_the_gates_gradient_is_right(T, E, D, stages, programs, monkeypatch):
    torch.manual_seed(0)
    u, attended = (torch.randn(T, E, dtype=torch.float64, requires_grad=True) for _ in range(2))
    d_y, w, rms, bias = (torch.randn(*size, dtype=torch.float64) for size in ((T, D), (D, E), (T,), (E,)))
    gain = torch.tensor([1.5], dtype=torch.float64)
    with torch.no_grad():
        rms[:2], u[:2], bias[:4] = 0.5, 0, 0  # the gate is not 0 there: see `gate` of scan.py
    h = u * (rms[:, None] * gain) + bias
    h = torch.where(h == 0, 1e-20, h)
    out = torch.nn.functional.silu(h) * attended
    d_u, d_h, d_attended = torch.autograd.grad(out, (u, h, attended), d_y @ w)
    got = [torch.full((T, E), torch.nan, dtype=torch.float64) for _ in range(2)]
    sums = torch.full((-(-T // 128), E), torch.nan, dtype=torch.float64)
    tasks = len(sums) * (E // 128)
    emulated = EmulatedProducts(monkeypatch, programs)
    emulated.run(
        gate.gate_product_kernel, min(programs, tasks), *map(Matrix, (d_y, w, u.detach(), out.detach(), *got)),
        *map(Pointer, (rms, gain, bias, sums)), T, D, E // 128, tasks, STEP=gate.STEP, STAGES=stages,
    )  # fmt: skip
    # What `where` gave no gradient.
    d_u = torch.where(u == 0, d_h * rms[:, None] * gain, d_u)
    for result, right in zip(got, (d_attended, d_u), strict=True):
        torch.testing.assert_close(result, right, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sums, torch.stack([part.sum(0) for part in d_h.split(128)]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("programs", [1, 2, 5, 12])
@pytest.mark.parametrize(("B", "N", "E"), [(2, 384, 256), (3, 128, 128), (1, 640, 256)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["output", "values", "scores"])
def test_products_over_whole_rows_are_right(kind, causal, B, N, E, programs, monkeypatch):
    """Where nothing is read or written, above the diagonal, there is no number."""
    torch.manual_seed(0)
    weight, T = torch.rand(B, N, N, dtype=torch.float64), B * N
    if causal:
        slot = torch.arange(N)
        weight = torch.where(slot[:, None] // 128 >= slot // 128, weight.tril(), torch.nan)
    weight = weight.view(T, N)
    right, other, rms, bias = (torch.randn(*size, dtype=torch.float64) for size in ((T, E), (T, E), (T,), (E,)))
    gain = torch.tensor([1.5], dtype=torch.float64)
    x, held = (other, weight) if kind == "scores" else (weight, other)
    tasks = quadratic.task_count(kind, B, N, E, causal)
    made = []
    for _ in range(2):
        made.append([torch.full(size, torch.nan, dtype=torch.float64) for size in (held.shape, (T, E), (T // 128, E))])
    (result, value, sums), expected = made
    arguments, options = (B, N, E, tasks), {"KIND": kind, "CAUSAL": causal}
    quadratic_in_torch(None, x, right, held, *expected[:2], rms, gain, bias, expected[2], *arguments, **options)
    emulated = EmulatedProducts(monkeypatch, programs)
    emulated.run(
        quadratic.quadratic_kernel, min(programs, tasks), *map(Matrix, (x, right, held, result, value)),
        *map(Pointer, (rms, gain, bias, sums)), *arguments, STEP=quadratic.STEP, STAGES=quadratic.STAGES, **options,
    )  # fmt: skip
    assert value.isnan().any() == (kind != "values")
    for found, right in zip((result, value, sums), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9, equal_nan=True)
