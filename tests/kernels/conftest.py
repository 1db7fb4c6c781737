# SPDX-License-Identifier: Apache-2.0
"""Kernels in Triton's interpreter, in less time."""

import os

from support.interpreter import spare_repetitions


if os.environ.get("TRITON_INTERPRET") == "1":
    spare_repetitions()
