# SPDX-License-Identifier: Apache-2.0
"""Where the work is done: in the kernels of an installed flash_hf, or in the functions of attention_flash.py."""

from __future__ import annotations

from types import ModuleType

import torch
from transformers.utils import logging

from .chunking_flash import is_tracing


logger = logging.get_logger(__name__)

# Kernels come with the package. Code loaded from the Hub uses those of an installed package that takes the same calls.
KERNEL_INTERFACE = 3

_loaded: list[tuple[ModuleType | None, str]] = []


def load_kernels() -> tuple[ModuleType | None, str]:
    """The package of Triton kernels, or None and the reason."""
    if not _loaded:  # not functools.cache, which torch.compile would warn of
        _loaded.append(_import_kernels())
    return _loaded[0]


def _import_kernels() -> tuple[ModuleType | None, str]:
    try:
        import triton  # noqa: F401
    except ImportError:
        return None, "triton is not installed"
    try:
        from flash_hf import kernels
    except ImportError as error:
        return None, f"flash_hf.kernels cannot be imported ({error})"
    if kernels.INTERFACE != KERNEL_INTERFACE:
        return None, "the installed flash_hf is another version than this model's code"
    return kernels, ""


def kernels_for(config, device: torch.device, dtype: torch.dtype, *, dropout: bool) -> ModuleType | None:
    """The kernels if `config.backend` wants them and they can run, else None: the torch tier computes.

    Args:
        dtype: what products are computed in.
        dropout: whether attention dropout is active.

    Raises:
        ValueError: `backend="triton"` was asked for where it cannot run.
    """
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if config.backend == "torch" or (config.backend == "auto" and exporting):
        return None  # an exported graph is to run where there is no flash_hf
    kernels, reason = load_kernels()
    if kernels is not None:
        reason = kernels.unavailable(device, dtype) or kernels.unsupported(config, device)
        if reason is None and dropout:
            reason = "attention_dropout has no kernels"
        if reason is None and device.type == "cpu" and config.backend == "auto":
            reason = "the device is a CPU"  # the interpreter is for tests that ask for it
    if not reason:
        return kernels
    if config.backend == "triton":
        raise ValueError(
            f"FlashConfig: `backend` = 'triton' cannot run here: {reason}. Use backend='auto', which falls back to "
            "torch, or backend='torch'; kernels need triton, an NVIDIA GPU of compute capability 8.0 or later, and "
            "bfloat16, float16 or float32."
        )
    if device.type == "cuda" and not is_tracing():  # elsewhere there is nothing that a user could change
        logger.warning_once(f"FLASH computes in plain torch, which is right but slower than its kernels: {reason}.")
    return None


__all__ = ["KERNEL_INTERFACE", "kernels_for", "load_kernels"]
