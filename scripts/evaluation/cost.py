# SPDX-License-Identifier: Apache-2.0
"""Cost of language models: speed, memory, and the size of the decoding state."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from flash_hf.cache_flash import CACHE_NAME


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the tensors in a cache: states, or keys and values."""
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        tensors = (layer.keys, layer.values) if state is None else tuple(state)
        total += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return total


def memory_bytes() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss


@dataclass
class Progress:
    """Progress in reading a long text: seconds since the start, bytes of the process and of the cache."""

    tokens: int
    seconds: float
    memory: int
    cache: int


def read_long(
    model: PreTrainedModel, ids_N: Tensor, cache: DynamicCache, *, segment: int = 2048, marks: Iterable[int] = ()
) -> Iterator[Progress]:
    """Read a text of any length into a cache, `segment` tokens at a time, and report at each mark.

    Args:
        ids_N: int64 `[N]`, on the model's device.
        cache: The cache to fill. For FLASH its size does not change after the first token.
        marks: Numbers of tokens to report at; the end is always reported.
    """
    begin, done = time.perf_counter(), 0
    for mark in sorted({*(mark for mark in marks if 0 < mark < len(ids_N)), len(ids_N)}):
        while done < mark:
            # Up to the next multiple of a segment, so that a mark in between leaves later segments whole.
            end = min(mark, (done // segment + 1) * segment)
            # Not inference_mode, whose tensors could not be changed by decoding outside of it.
            with torch.no_grad():
                model(ids_N[None, done:end], use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
            done = end
        yield Progress(done, time.perf_counter() - begin, memory_bytes(), cache_bytes(cache))


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def tokens_per_second(
    model: PreTrainedModel, *, batch_size: int, length: int, new_tokens: int = 0, repeats: int = 5
) -> float:
    """Speed on random tokens, the median of several runs after a warm-up.

    Args:
        new_tokens: With 0, tokens per second of a forward pass. Otherwise tokens per second in generation, after a
            prompt of `length` tokens whose time does not count.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, length)
    ids_BN = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            cache = DynamicCache(config=model.config) if new_tokens else None
            options = {CACHE_NAME: cache, "use_cache": True} if new_tokens else {}
            if new_tokens:
                model(ids_BN, logits_to_keep=1, **options)
            synchronize(model.device)
            begin = time.perf_counter()
            if not new_tokens:
                model(ids_BN)
            for _ in range(new_tokens):
                model(ids_BN[:, :1], **options)
            synchronize(model.device)
            seconds.append(time.perf_counter() - begin)
    return batch_size * (new_tokens or length) / statistics.median(seconds[1:])


__all__ = ["Progress", "cache_bytes", "memory_bytes", "read_long", "synchronize", "tokens_per_second"]
