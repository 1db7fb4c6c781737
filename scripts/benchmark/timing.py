# SPDX-License-Identifier: Apache-2.0
"""Timers, the device's peak rates, and the calls that are timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache


class Timing(NamedTuple):
    """Milliseconds of one call: median, first and third quartile."""

    median: float
    q25: float
    q75: float
    samples: int


def quartiles(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, q25, q75, len(samples))


def once(call: Callable, device: str, calls: int = 1) -> float:
    """Milliseconds per call, the mean of `calls` in a row, by CUDA events on a GPU."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) * 1e3 / calls


def measure(
    call: Callable, device: str, *, reps: int, warmup: int = 2, calls: int = 1, before: Callable = lambda: None,
    limit_s: float = 20.0,
) -> Timing:  # fmt: skip
    """Time `call` after a warm-up: `reps` samples, or fewer (at least 2) once `limit_s` seconds have passed.

    Args:
        calls: Calls per sample, for calls too short to time one by one.
        before: Called before every sample, not timed.
    """
    for _ in range(warmup):
        before()
        for _ in range(calls):
            call()
    if device == "cuda":
        torch.cuda.synchronize()
    samples, begin = [], time.perf_counter()
    while len(samples) < reps and (len(samples) < 2 or time.perf_counter() - begin < limit_s):
        before()
        samples.append(once(call, device, calls))
    return quartiles(samples)


def measure_issue(call: Callable, device: str, *, reps: int, warmup: int = 2) -> Timing:
    """Time until `call` returns, without waiting for the device: what Python and the launches take."""
    samples = []
    for _ in range(warmup + reps):
        begin = time.perf_counter()
        call()
        samples.append((time.perf_counter() - begin) * 1e3)
        if device == "cuda":
            torch.cuda.synchronize()
    return quartiles(samples[warmup:])


@torch.inference_mode()
def measure_generation(model, batch: int, prompt: int, new: int, *, reps: int, **words) -> Timing:
    """Milliseconds per new token of a greedy `generate()`: the difference of two calls, of 4 and of `4 + new` tokens,
    so that the prompt counts for nothing."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)
    seen = torch.ones_like(ids)

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        model.generate(
            ids, attention_mask=seen, min_new_tokens=count, max_new_tokens=count, do_sample=False, pad_token_id=0,
            **words,
        )  # fmt: skip
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for count in (4, 4 + new):  # both lengths of a static cache are compiled
        seconds(count)
    differences = [seconds(4 + new) - seconds(4) for _ in range(reps)]
    return quartiles([1e3 * difference / new for difference in differences])


@torch.inference_mode()
def measure_assisted_call(model, batch: int, prompt: int, new: int, kept: int, *, reps: int) -> Timing:
    """Milliseconds of what assisted decoding repeats: a call of `new` tokens on a cache, then a rollback that keeps
    `kept` of them."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt + new), device=model.device)
    cache = DynamicCache(config=model.config)
    model(ids[:, :prompt], past_key_values=cache)
    cache.activate_past_recording()

    def call():
        model(ids[:, prompt:], past_key_values=cache)
        cache.crop(kept - new)

    return measure(call, model.device.type, reps=reps, warmup=8)


def clean(device: str) -> None:
    """Free the memory of earlier measurements and reset the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def matmul_rate(device: str, dtype: torch.dtype, side: int) -> tuple[Timing, float]:
    """Time of a `side`^3 matrix product of random numbers, and its operations per second, the denominator of MFU."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = measure(lambda: a @ b, device, reps=20, warmup=3)
    return timing, 2 * side**3 / (timing.median * 1e-3)


def copy_rate(device: str, size: int) -> tuple[Timing, float]:
    """Time of copying `size` bytes on the device, and bytes read and written per second."""
    source = torch.randint(0, 256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device, reps=20, warmup=3)
    return timing, 2 * size / (timing.median * 1e-3)


def training_step(module: nn.Module, hidden: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable:
    """Forward and backward of the backbone, including the gradient of the input embeddings."""
    filled = x, *module.parameters()  # once, as optimizers do

    def step():
        for tensor in filled:
            tensor.grad = None
        hidden(x).backward(gradient)

    return step


def capture(step: Callable, rewind: Callable = lambda: None) -> Callable:
    """`step` captured as one CUDA graph: replays have no launch costs and reuse the same buffers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    rewind()
    return graph.replay
