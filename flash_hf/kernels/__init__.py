# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for FLASH (training, prefill and decoding steps), behind the PyTorch functions.

The model reaches them through `backend_flash.kernels_for`; README.md beside this file derives them. Importing this
package needs triton.
"""

from __future__ import annotations

from .plan import ChunkPlan, chunk_plan
from .support import DTYPES, unavailable, unsupported
from .unit import attention_step, gated_attention, layer, layer_step, rotary_bias, scale_norm


# Remote code may meet a package of another version: it uses these functions only if their signatures are its own.
INTERFACE = 13

__all__ = [
    "ChunkPlan", "DTYPES", "attention_step", "chunk_plan", "gated_attention", "layer", "layer_step", "rotary_bias",
    "scale_norm", "unavailable", "unsupported",
]  # fmt: skip
