# SPDX-License-Identifier: Apache-2.0
"""Kernels in Triton's interpreter, in less time; and no launches recorded by other tests."""

import os
import sys

import pytest
from support.interpreter import patch_interpreter


if os.environ.get("TRITON_INTERPRET") == "1":
    patch_interpreter()


@pytest.fixture(autouse=True)
def no_tapes():
    """Recorded launches keep to the rules that were there then, which tests change."""
    yield
    if "flash_hf.kernels.tiles" in sys.modules:
        sys.modules["flash_hf.kernels.tiles"].shape_of.cache_clear()
