# SPDX-License-Identifier: Apache-2.0
"""Rows cut over 2 and 4 CPU processes give what whole rows give, and errors are raised on all processes."""

import json

import pytest

from helpers import ROOT, run_python


@pytest.mark.slow
def test_pieces_give_what_whole_rows_give():
    """Loss, logits, every gradient and the decoding state, float64 to 1e-9: see parallel_client.py."""
    done = run_python(ROOT / "tests" / "support" / "parallel_client.py", "2,4", "exact,others,refused")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert not found["wrong"]
    assert found["cases"] > 400
