# SPDX-License-Identifier: Apache-2.0
"""FLASH-Quad's products in tiles of 256 slots, without a GPU: as test_product.py runs the last product, with
numbers."""

import dataclasses

import pytest
import torch

from flash_hf.kernels import choice
from test_product import EmulatedProducts, Matrix
from test_rowscan import Pointer
from test_scan import quadratic_in_torch


quadratic, hopper = choice.quadratic, choice.hopper


@dataclasses.dataclass
class Tiled(Matrix):
    block: tuple = ()


class EmulatedRows(EmulatedProducts):
    """Emulated programs of `wide_kernel`, in float64."""

    def __init__(self, monkeypatch, seed):
        super().__init__(monkeypatch, seed)
        gl = hopper.gl
        gl.sqrt, gl.int32, gl.minimum, gl.float32 = torch.sqrt, torch.int32, min, torch.float64
        names = {name: made.fn for name, made in vars(quadratic).items() if hasattr(made, "fn")}
        names |= self.stand_ins() | {"gl": gl, "barriers": hopper.barriers.fn, "sigmoid": torch.sigmoid}
        names["halves"] = lambda acc, layout: acc.chunk(2, 1)
        names["joined"] = lambda left, right, layout: torch.cat([left, right], 1)
        lower_tile, place_of = hopper.lower_tile.fn, names["place_of"]
        names["lower_tile"] = lambda tile: map(int, lower_tile(torch.tensor(tile)))
        for name, value in names.items():
            monkeypatch.setattr(quadratic, name, value, raising=False)
        monkeypatch.setattr(quadratic, "place_of", lambda *a: tuple(map(int, place_of(*a))))
        monkeypatch.setattr(hopper, "gl", gl)

    def allocate(self, kind, shape, layout):
        made = super().allocate(kind, shape, layout)
        made.reinterpret = made._reinterpret = lambda kind, shape, layout: made
        return made

    def load(self, source, place, barrier, tile):
        assert tile.bytes == source.block[0] * source.block[1] * 2
        tile.size = source.block
        super().load(source, place, barrier, tile)

    def store(self, target, place, tile):
        assert tile.size == target.block
        super().store(target, place, tile)


# One to many tasks per program, and some programs with one less than others.
@pytest.mark.parametrize("programs", [1, 3, 7, 50])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["output", "values", "scores"])
@pytest.mark.parametrize(("rows", "N", "E", "stages"), [(2, 512, 192, 4), (5, 256, 256, 2), (1, 768, 384, 3)])
def test_products_in_tiles_of_256_slots_are_right(rows, N, E, stages, kind, causal, programs, monkeypatch):
    torch.manual_seed(0)
    T, step = rows * N, quadratic.STEP
    a = torch.rand(T, N, dtype=torch.float64)
    if causal:
        # Above the diagonal zeros, in whole squares memory that nobody wrote.
        slot = torch.arange(N)
        a.view(rows, N, N)[:, slot[:, None] < slot] = 0
        a.view(rows, N, N)[:, slot[:, None] // 128 < slot // 128] = torch.nan
    y, other, h = torch.randn(3, T, E, dtype=torch.float64)
    rms, gain, bias = (torch.randn(width, dtype=torch.float64) for width in (T, 1, E))
    x, held, size = (other, a, (T, N)) if kind == "scores" else (a, h, (T, E))
    got, expected = torch.full((2, *size), torch.nan, dtype=torch.float64)
    sums, expected_sums = torch.full((2, T // 128, E), torch.nan, dtype=torch.float64)
    tall, columns = quadratic.tile_of(kind, E, True)
    tasks = quadratic.task_count(kind, rows, N, E, causal, tall, columns)
    constants = {"KIND": kind, "CAUSAL": causal}
    blocks = [(step, 128) if kind == "values" else (128, step), (128, step) if kind == "scores" else (step, 128)]
    blocks += [(step, step), (128, step), (128, step)]
    emulated = EmulatedRows(monkeypatch, programs)
    emulated.run(
        quadratic.wide_kernel, min(programs, tasks),
        *(Tiled(numbers, None, block) for numbers, block in zip((x, y, y, held, got), blocks, strict=True)),
        *map(Pointer, (rms, gain, bias, sums)), rows, N, E, 2, tasks, COLUMNS=columns, STEP=step, STAGES=stages,
        **constants,
    )  # fmt: skip
    quadratic_in_torch(
        None, x, y, held, expected, rms, gain, bias, expected_sums, rows, N, E, 2, tasks, tile=(tall, columns),
        **constants,
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    if kind == "values":
        torch.testing.assert_close(sums, expected_sums, rtol=1e-9, atol=1e-9)
