# SPDX-License-Identifier: Apache-2.0
"""Where the kernels can run, and what they compute."""

from __future__ import annotations

import torch
import triton

from .common import DTYPES, INTERPRET


MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)
# Versions of triton with which the kernels for Hopper, and launches that overlap, have run.
TRIED_TRITON = ((3, 6), (3, 9))
MAX_CHUNK, MAX_KEY_DIM = 512, 256
LARGE_SHARED = 160 * 1024


def triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def tried_triton() -> bool:
    return TRIED_TRITON[0] <= triton_version() <= TRIED_TRITON[1]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels cannot run on this device in this type, or None."""
    if triton_version() < MIN_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, MIN_TRITON))}"
    if dtype not in DTYPES:
        return f"there are no kernels for {dtype}"
    if device.type == "cpu":
        return None if INTERPRET else "the device is a CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the device is not an NVIDIA GPU ({device.type})"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        name, needed = torch.cuda.get_device_name(device), ".".join(map(str, MIN_CAPABILITY))
        return f"{name} has a compute capability below {needed}"
    return None


def unsupported(config, device: torch.device) -> str | None:
    """Why kernels cannot compute this configuration on this device, or None."""
    if config.attention_activation != "relu2" and config.attention_type != "global":
        return f"attention_activation={config.attention_activation!r} has no kernels"
    if config.local_window > 1:
        return f"local_window={config.local_window} has no kernels"
    if config.global_state == "delta" and config.query_key_dim > 128:
        return "global_state='delta' has kernels for query_key_dim up to 128"
    if (config.global_form == "previous_token" or config.local_key_shift) and config.chunk_size == 1:
        return "shifted keys have kernels for chunks of at least 2 tokens"
    chunked = config.attention_type != "quadratic"
    if (chunked and config.chunk_size > MAX_CHUNK) or config.query_key_dim > MAX_KEY_DIM:
        return f"kernels take chunk_size up to {MAX_CHUNK} and query_key_dim up to {MAX_KEY_DIM}"
    fits = 64 if config.global_state == "delta" else 128
    if config.query_key_dim > fits and device.type == "cuda":
        shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        if shared < LARGE_SHARED:
            return f"query_key_dim above {fits} needs {LARGE_SHARED} bytes of shared memory, the GPU has {shared}"
    if config.intermediate_size % 16:
        return f"the width of the values ({config.intermediate_size}) is not a multiple of 16"
    return None
