# SPDX-License-Identifier: Apache-2.0
"""The correctness gate: nothing is timed before the fast paths agree with the references."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import StaticCache

from flash_hf.configuration_flash import FlashConfig
from flash_hf.modeling_flash import FlashModel
from flash_hf.naive import naive_model

from .sizes import BASE, Size, flash_config
from .tiny import error_ratio, make_model, naive_config, random_ids, tiny_config


class Check(NamedTuple):
    """One comparison: `error` may be at most `limit`."""

    what: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """Sample all parameters, biases and gains included, so large that every part of a layer shows in the result."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("norm.weight", "positions.scale")):
            noise = 1 + 0.3 * noise
        elif name.endswith("offset_scale.weight"):
            noise = noise + 0.5
        else:
            # Unit variance in, unit variance out; vectors (biases b and of projections) keep 0.3.
            noise = noise * (parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3)
        parameter.copy_(noise)


def results(model: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of a model on embeddings, converted to float64 on the CPU."""
    x = x.to(next(model.parameters()).dtype, copy=True).requires_grad_()
    model.zero_grad(set_to_none=True)
    out = model(inputs_embeds=x, use_cache=False).last_hidden_state
    out.backward(gradient.to(out.dtype))
    found = {"output": out, "gradient of the input": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad
    return {name: value.detach().double().cpu() for name, value in found.items()}


def check_kernels(size: Size, device: str, length: int) -> list[Check]:
    """The `"triton"` backend against the torch tier in float64: output, every gradient, and decoding.

    Limits: in float32 an error ratio of 1e-3, in bfloat16 twice that of the torch tier in bfloat16 plus 1e-3.
    """
    checks = []
    for causal in (True, False):
        direction = "causal" if causal else "bidirectional"
        # A smaller divisor than the paper's makes scores as large as the bias, so that a wrong query or key shows.
        config = {
            backend: flash_config(size, causal, backend, attention_divisor=16) for backend in ("triton", "torch")
        }
        exact = FlashModel(config["torch"]).double().to(device).train()
        enlarge(exact)
        generator = torch.Generator().manual_seed(2)
        x, gradient = (torch.randn(2, length, size.width, generator=generator).to(device) for _ in range(2))

        def run(backend, dtype, config=config, exact=exact, x=x, gradient=gradient):
            model = FlashModel(config[backend]).to(device, dtype).train()
            model.load_state_dict(exact.state_dict())
            return results(model, x, gradient)

        for dtype in (torch.float32, torch.bfloat16):
            # Both get weights and inputs rounded to this dtype.
            rounded = {name: value.to(dtype).double() for name, value in exact.state_dict().items()}
            exact.load_state_dict(rounded)
            expected = results(exact, x.to(dtype).double(), gradient.to(dtype).double())
            ours = run("triton", dtype)
            plain = run("torch", dtype) if dtype == torch.bfloat16 else None
            for name, value in expected.items():
                limit = 1e-3 if plain is None else 2 * error_ratio(plain[name], value) + 1e-3
                checks.append(Check(f"{direction} {dtype} {name}", error_ratio(ours[name], value), limit))
        if causal:
            checks.append(check_decoding(config["triton"], exact, x))
    return checks


@torch.no_grad()
def check_decoding(config: FlashConfig, exact: nn.Module, x: Tensor) -> Check:
    """Prefill, then steps across a chunk border with a static cache, against the full forward in float64."""
    model = FlashModel(config).to(x.device, torch.float32).eval()
    model.load_state_dict(exact.state_dict())
    expected = exact.eval()(inputs_embeds=x.double(), use_cache=False).last_hidden_state
    chunk, length = config.chunk_size, x.shape[1]
    first = length // chunk * chunk - 3
    cache = StaticCache(config=config, max_cache_len=length)
    found = [model(inputs_embeds=x[:, :first], cache=cache, use_cache=True).last_hidden_state]
    for t in range(first, min(first + 8, length)):
        found.append(model(inputs_embeds=x[:, t : t + 1], cache=cache, use_cache=True).last_hidden_state)
    found = torch.cat(found, 1)
    return Check("decoding, static cache", error_ratio(found[:, first:], expected[:, first : found.shape[1]]), 1e-3)


def check_torch_tier() -> list[Check]:
    """The torch tier against naive.py in float64 and float32: output and every gradient."""
    checks = []
    for causal in (True, False):
        config = tiny_config(is_decoder=causal)
        ids = random_ids(config, 1, 3 * config.chunk_size + 3)
        for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
            model = make_model(FlashModel, config, dtype=dtype)
            weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
            expected, _ = naive_model(ids[0], weights, naive_config(config), causal=causal)
            gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            expected.backward(gradient)
            out = model(ids, use_cache=False).last_hidden_state[0]
            out.backward(gradient.to(dtype))
            direction = "causal" if causal else "bidirectional"
            checks.append(Check(f"{direction} {dtype} output", error_ratio(out, expected), limit))
            for name, parameter in model.named_parameters():
                error = error_ratio(parameter.grad, weights[name].grad)
                checks.append(Check(f"{direction} {dtype} gradient of {name}", error, limit))
    return checks


def gate(device: str, size: Size = BASE) -> list[Check]:
    """All comparisons: the torch tier against naive.py and, on a GPU, the kernels against the torch tier."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        checks = check_torch_tier()
        if device == "cuda":
            two_layers = dataclasses.replace(size, layers=2)
            # A length that is neither a multiple of the chunk nor a power of two.
            checks += check_kernels(two_layers, device, 3 * size.chunk_size + 37)
        return checks
    finally:
        torch.set_float32_matmul_precision(before)
