# SPDX-License-Identifier: Apache-2.0
"""Tokens per second and model FLOP utilization (MFU), and the progress bar that shows them."""

import sys
import time
from functools import partial

import torch
from transformers import ProgressCallback

from ..configuration_flash import FlashConfig


# Dense TFLOP/s in bfloat16 and float16, from NVIDIA's data sheets; the first name that matches counts.
PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.4, "H100 PCIe": 756.4, "H100 NVL": 835.5, "H100": 989.4, "A100": 312.0,
    "L40S": 362.1, "L40": 181.1, "L4": 121.0,
}  # fmt: skip


def training_flops(config: FlashConfig, context: int, *, causal: bool, head: bool = True) -> float:
    """Floating-point operations of matrix products per training token.

    Forward, with the widths `D` of the model, `E` of values and `S` of keys, and chunks of `C` tokens: the projections
    of a layer take `2 D (2E + S) + 2 E D`; its local attention `2 keys (S + E)`, where causal queries see
    `(C + 1) / 2` keys on average; its global attention `4 S E`, for all chunks but one if causal, since the last state
    is not read; the head `2 D V`. The backward takes twice as much. Recomputation is not part of MFU and not counted.

    Args:
        context: tokens per row.
        head: whether the model predicts tokens.
    """
    D, E, S = config.hidden_size, config.intermediate_size, config.query_key_dim
    chunk = context if config.attention_type == "quadratic" else min(config.chunk_size, context)
    keys, chunks = (chunk + 1) / 2 if causal else chunk, -(-context // chunk)
    local = 0.0 if config.attention_type == "global" else 2 * keys * (S + E)
    across = 4 * S * E * ((chunks - 1) / chunks if causal else 1.0)
    if config.attention_type in ("quadratic", "local"):
        across = 0.0
    layer = 2 * D * (2 * E + S) + 2 * E * D + local + across
    return 3 * (config.num_hidden_layers * layer + (2 * D * config.vocab_size if head else 0))


def device_peak(*, half: bool, peak_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of a device: the user's `peak_tflops`, else that of the current GPU from `PEAK_TFLOPS`, which is for
    bfloat16 and float16 (`half`), else None."""
    if peak_tflops is None and half and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        peak_tflops = next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)
    return peak_tflops and peak_tflops * 1e12


class SpeedMeter:
    """Tokens per second and MFU between two readings, excluding the time for validation and saving. Without the peak
    FLOP/s of all devices together, there is no MFU."""

    def __init__(self, peak: float | None = None):
        self.peak = peak
        self.began: float | None = None
        self.tokens = self.flops = 0.0

    def count(self, tokens: int, flops_per_token: float | None) -> None:
        """Add the tokens of a step on all devices; the first call starts the clock."""
        self.began = time.perf_counter() if self.began is None else self.began
        self.tokens += tokens
        self.flops += tokens * (flops_per_token or 0.0)

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` that were not spent on training."""
        if self.began is not None:
            self.began += seconds

    def read(self) -> dict[str, float]:
        """`tokens_per_second` and `mfu` (between 0 and 1) since the last reading."""
        now = time.perf_counter()
        if self.began is None or now <= self.began:
            return {}
        seconds, self.began = now - self.began, now
        speeds = {"tokens_per_second": self.tokens / seconds}
        if self.peak and self.flops:
            speeds["mfu"] = self.flops / seconds / self.peak
        self.tokens = self.flops = 0.0
        return speeds


class SpeedBar(ProgressCallback):
    """Trainer's progress bar with loss, gradient norm, tokens per second and MFU."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            # tqdm would write log lines to stdout, which is for results.
            self.training_bar.write = partial(self.training_bar.write, file=sys.stderr)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif self.training_bar is not None:
            shown = {"loss": "{:.4f}", "grad_norm": "{:.3f}", "tokens_per_second": "{:,.0f}", "mfu": "{:.1%}"}
            short = {"grad_norm": "grad", "tokens_per_second": "tok/s"}
            self.training_bar.set_postfix(
                {short.get(name, name): form.format(logs[name]) for name, form in shown.items() if name in logs}
            )
