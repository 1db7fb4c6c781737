# SPDX-License-Identifier: Apache-2.0
"""Attention weights and their heads' gradients for Hopper, without a GPU: as test_product.py runs the product, with
numbers."""

import pytest
import torch

from flash_hf.kernels import choice
from test_product import EmulatedProducts, Matrix
from test_rowscan import Pointer
from test_scan import score_heads_in_torch, scores_in_torch


scores, hopper = choice.scores, choice.hopper


class EmulatedScores(EmulatedProducts):
    """Emulated programs of scores.py's kernels, in float64."""

    def __init__(self, monkeypatch, seed):
        super().__init__(monkeypatch, seed)
        gl = hopper.gl
        gl.sqrt, gl.int32, gl.minimum = torch.sqrt, torch.int32, min
        gl.maximum = lambda x, y: x.clamp(min=y) if isinstance(x, torch.Tensor) else max(x, y)
        lower_tile = hopper.lower_tile.fn
        names = {name: made.fn for name, made in vars(scores).items() if hasattr(made, "fn")}
        names |= self.stand_ins() | {"gl": gl, "barriers": hopper.barriers.fn, "HALF": 64}
        names |= {"halves": lambda acc, layout: acc.chunk(2, 1), "range": lambda *a: range(*map(int, a))}
        names["lower_tile"] = lambda tile: map(int, lower_tile(torch.tensor(tile)))
        for name, value in names.items():
            monkeypatch.setattr(scores, name, value, raising=False)


# Rows of one to five blocks, with and without tokens in the first and the last half of a chunk.
layouts = pytest.mark.parametrize(
    ("rows", "N", "G", "blocks", "shift", "skip"),
    [(2, 200, 1, 2, 0, False), (2, 512, 3, 2, 128, True), (2, 300, 2, 2, 0, True), (3, 640, 1, 5, 0, False),
     (5, 128, 1, 1, 0, False)],
)  # fmt: skip


# Programs with one and more tasks, the last of which has fewer chunks.
@pytest.mark.parametrize(("programs", "run"), [(1, 3), (4, 2), (5, 1)])
@pytest.mark.parametrize("causal", [True, False])
@layouts
def test_attention_weights_are_right(rows, N, G, blocks, shift, skip, causal, programs, run, monkeypatch):
    torch.manual_seed(0)
    chunks, C = rows * G, 128 * blocks
    q, k = torch.randn(2, chunks * C, 128, dtype=torch.float64)
    bias = torch.randn(2 * C - 1, dtype=torch.float64) if blocks < 5 else None
    got, expected = torch.full((2, chunks * C, C), torch.nan, dtype=torch.float64)
    tiles = blocks * (blocks + 1) // 2 if causal else blocks**2
    tasks = -(-chunks // run) * tiles
    constants = {"BIAS": bias is not None, "CAUSAL": causal, "SKIP": skip}
    emulated = EmulatedScores(monkeypatch, programs)
    emulated.run(
        scores.scores_kernel, min(programs, tasks), Matrix(q), Matrix(k), Matrix(got), Pointer(bias), N, G, shift,
        1 / 16, chunks, blocks, run, tasks, STAGES=scores.STAGES, **constants,
    )  # fmt: skip
    shared = scores.tasks_of(chunks, blocks, causal, 132)
    scores_in_torch(
        None, q, k, expected, bias, N, G, shift, 1 / 16, chunks, blocks, *shared, **constants,
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("programs", [1, 4, 5])
@pytest.mark.parametrize("causal", [True, False])
@layouts
def test_gradients_of_the_heads_are_right(rows, N, G, blocks, shift, skip, causal, programs, monkeypatch):
    torch.manual_seed(0)
    chunks, C = rows * G, 128 * blocks
    q, k = torch.randn(2, chunks * C, 128, dtype=torch.float64)
    d_score = torch.randn(chunks * C, C, dtype=torch.float64)
    if causal:
        # Above the diagonal in blocks there is memory that nobody wrote.
        slot = torch.arange(C) // 128
        d_score.view(chunks, C, C)[:, slot[:, None] < slot] = torch.nan
    got, expected = torch.full((2, 2, chunks * C, 128), torch.nan, dtype=torch.float64)
    tasks, sizes = chunks * blocks, (N, G, shift, 1 / 16, blocks)
    emulated = EmulatedScores(monkeypatch, programs)
    emulated.run(
        scores.score_heads_kernel, min(programs, tasks), *map(Matrix, (d_score, d_score, q, k, *got)), *sizes, tasks,
        CAUSAL=causal, SKIP=skip, STEP=scores.STEP, STAGES=scores.GRADIENT_STAGES,
    )  # fmt: skip
    score_heads_in_torch(None, d_score, None, q, k, *expected, *sizes, tasks, CAUSAL=causal, SKIP=skip)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("chunks", "blocks"), [(256, 2), (384, 2), (32, 16), (2, 64), (1, 1), (128, 4)])
def test_programs_have_few_more_tiles_than_others(chunks, blocks, causal):
    tiles = blocks * (blocks + 1) // 2 if causal else blocks**2
    run, tasks = scores.tasks_of(chunks, blocks, causal, 132)
    most = -(-tasks // 132) * run
    assert run <= max(8, chunks) and tasks * run >= chunks * tiles
    assert most <= max(1.1 * chunks * tiles / 132, -(-chunks * tiles // 132) + 1)
