# SPDX-License-Identifier: Apache-2.0
"""What a language model costs: speed, memory, the size of its state."""

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
    """Bytes of the tensors that a cache keeps, state or keys and values."""
    total = 0
    for layer in cache.layers:
        state = getattr(layer, "state", None)
        tensors = (layer.keys, layer.values) if state is None else tuple(state)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
    return total


def memory_bytes() -> int:
    """Memory of this process that is in use now (resident set)."""
    return psutil.Process().memory_info().rss


@dataclass
class Progress:
    """Where the reading of a long text stands."""

    tokens: int
    seconds: float
    memory: int
    cache: int


def read_long(
    model: PreTrainedModel, ids_N: Tensor, cache: DynamicCache, *, segment: int = 2048, marks: Iterable[int] = ()
) -> Iterator[Progress]:
    """Read a text of any length into a cache, `segment` tokens at a time, telling what it took at each mark.

    Args:
        ids_N: int64 `[N]`, on the model's device.
        cache: what is read goes in here; for FLASH its size stays what it was after the first token.
        marks: numbers of tokens to report at; the last token is always reported.
    """
    begin, done = time.perf_counter(), 0
    for mark in sorted({*(mark for mark in marks if 0 < mark < len(ids_N)), len(ids_N)}):
        while done < mark:
            # Up to the next multiple, so that a mark inside leaves the later segments whole.
            end = min(mark, (done // segment + 1) * segment)
            # Not inference_mode: decoding writes into the state, and may do so outside of it.
            with torch.no_grad():
                model(ids_N[None, done:end], use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
            done = end
        yield Progress(done, time.perf_counter() - begin, memory_bytes(), cache_bytes(cache))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def tokens_per_second(
    model: PreTrainedModel, *, batch_size: int, length: int, new_tokens: int = 0, repeats: int = 5
) -> float:
    """Speed on random tokens, the median of several runs after one that is not counted.

    Args:
        new_tokens: 0: tokens of the forward pass a second. Otherwise tokens generated a second, one after the other,
            after `length` tokens that are read without being timed.
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
