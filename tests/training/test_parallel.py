# SPDX-License-Identifier: Apache-2.0
"""Rows cut over 2 and 4 CPU processes give what whole rows give, and errors are raised on all processes."""

import json

import pytest

from helpers import ROOT, run_python


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cases", "sizes", "least"),
    [
        ("exact,others,refused", "2,4", 400),
        ("kernels,measured", "2", 41),
        ("kernels", "4", 27),
        ("overlap,scans", "2", 11),
    ],
)
def test_pieces_give_what_whole_rows_give(cases, sizes, least):
    """Loss, logits, every gradient and the decoding state, float64 to 1e-9: see parallel_client.py."""
    if not cases.startswith("exact"):
        pytest.importorskip("triton", reason="the kernels need triton")
    program = ROOT / "tests" / "support" / "parallel_client.py"
    done = run_python(program, sizes, cases, TRITON_INTERPRET="1")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert not found["wrong"]
    assert found["cases"] > least
