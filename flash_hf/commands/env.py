# SPDX-License-Identifier: Apache-2.0
"""Print what a bug report needs: versions, the backend and why it is used, GPUs, and a self-test, which compares the
kernels with PyTorch, or PyTorch with the reference where kernels cannot run. Exit code 1 if it fails."""

from __future__ import annotations

import copy
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from .. import FlashConfig, FlashForCausalLM, __version__
from ..backend_flash import kernels_for, load_kernels
from ..naive import naive_model
from .options import OptionParser, find_device


PACKAGES = (
    "torch", "transformers", "triton", "tokenizers", "safetensors", "huggingface_hub", "numpy", "accelerate",
    "datasets", "peft", "trl", "deepspeed", "liger-kernel", "sentence-transformers", "gradio", "vllm",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of this package, Python and the packages beside it."""
    root = Path(__file__).parents[2]
    found = {"flash-hf": __version__}
    if (root / ".git").exists() and shutil.which("git"):  # a clone
        done = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, encoding="utf-8"
        )
        found["flash-hf"] += f", commit {done.stdout.strip() or 'unknown'}"
    found |= {"python": sys.version.split()[0], "platform": platform.platform()}
    missing = []
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            missing.append(name)
    return found | {"not installed": ", ".join(missing) or "-"}


def describe_gpus() -> str:
    if not torch.cuda.is_available():
        return "none that PyTorch can use" + ("" if torch.version.cuda else " (this build of it has no CUDA)")
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    each = [f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found]
    return f"{'; '.join(each)}; CUDA {torch.version.cuda or torch.version.hip}"


def describe_backend(config: FlashConfig, device: torch.device) -> tuple[bool, str]:
    """Whether the kernels are used on a device, and a line that gives the reason if not."""
    kernels, reason = load_kernels()
    if kernels_for(config, device, torch.bfloat16, dropout=False) is not None:
        from ..kernels.choice import scan_for

        return True, f"triton kernels, {'with' if scan_for(device) else 'without'} those for Hopper, on {device}"
    if kernels is not None:
        reason = kernels.unavailable(device, torch.bfloat16) or kernels.unsupported(config, device)
    return False, f"torch, on {device}: {reason or 'the device is a CPU'}"


def results(model: FlashForCausalLM, ids_BN: Tensor, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Logits and gradients of a copy of the model, in float64 on the CPU."""
    model = copy.deepcopy(model).to(ids_BN.device, dtype)
    model.config.backend = backend
    out = model(ids_BN, labels=ids_BN)
    out.loss.backward()
    found = [out.logits, *(parameter.grad for parameter in model.parameters())]
    return [x.detach().double().cpu() for x in found]


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest `|found - expected| / |expected|`; NaN if any is."""
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, expected, strict=True)]).max().item()


def self_test(
    config: FlashConfig, device: torch.device, kernels: bool, dtype: torch.dtype = torch.bfloat16
) -> tuple[bool, str]:
    """Whether a small model computes what it should, and a line with the errors.

    Args:
        config: causal; FLASH+ or the paper's form.
        kernels: whether to compare the kernels with PyTorch, in `dtype`; else PyTorch with the reference.
    """
    begin = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FlashForCausalLM(config)
        ids_BN = torch.randint(0, config.vocab_size, (2, 4 * config.chunk_size + 44))
    if kernels:
        expected = results(model, ids_BN, torch.float64, "torch")
        fused, plain = (
            largest_error(results(model, ids_BN.to(device), dtype, backend), expected)
            for backend in ("triton", "torch")
        )
        passed = fused <= 2 * plain  # False for NaN
        words = f"kernels {fused:.1e}, PyTorch {plain:.1e} from float64, logits and gradients in {dtype}"
    else:
        weights = {name: value.double() for name, value in model.model.state_dict().items()}
        values = {**config.to_dict(), "attention_divisor": config.attention_divisor}
        with torch.no_grad():
            expected = naive_model(ids_BN[0], weights, SimpleNamespace(**values), causal=True)[1]
            found = model.to(device).eval()(ids_BN.to(device)).logits[0].double().cpu()
        error = largest_error([found], [expected])
        passed, words = error <= 1e-4, f"PyTorch {error:.1e} from the reference, logits in float32"
    return passed, f"{'passed' if passed else 'FAILED'}: {words}, {time.perf_counter() - begin:.1f} s"


def main() -> int:
    parser = OptionParser(description=__doc__)
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: the accelerator, if any")
    device = find_device(parser.parse_args().device)
    # The paper's sizes of chunks and keys, which choose the kernels; weights so large that wrong attention shows.
    sizes = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "initializer_range": 0.1}
    config = FlashConfig.plus(**sizes)
    lines = versions()
    lines["GPU"] = describe_gpus()
    kernels, lines["backend"] = describe_backend(config, device)
    passed, lines["self-test"] = self_test(config, device, kernels)
    for name, value in lines.items():
        print(f"{name:<22} {value}")
    return 0 if passed else 1
