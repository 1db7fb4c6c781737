# SPDX-License-Identifier: Apache-2.0
"""Launches that begin while the kernel before ends (programmatic dependent launch)."""

import subprocess
import sys

import pytest
import torch

from flash_hf.kernels import choice, dispatch, support
from machine_code import early_accesses


@pytest.mark.parametrize(
    ("capability", "version", "chosen"),
    [((9, 0), "3.6.0", True), ((9, 0), "3.9.0", True), ((10, 0), "3.6.0", True), ((12, 0), "3.6.0", True),
     ((8, 9), "3.6.0", False), ((9, 0), "99.0", False)],
)  # fmt: skip
def test_launches_overlap_from_hopper_on(capability, version, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(support.triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    dispatch.overlaps.cache_clear()
    options = []

    class Function:
        def __getitem__(self, grid):
            return lambda *arguments, **given: options.append(given)

    try:
        dispatch.Kernel(Function())((1,), 2, BLOCK=3, num_warps=4)
    finally:
        dispatch.overlaps.cache_clear()
    always = {"BLOCK": 3, "num_warps": 4, "enable_fp_fusion": True}
    assert options == [always | ({"launch_pdl": True} if chosen else {})]


# Compiles the kernels of training steps and decoding as they are launched, without running them, on the CPU.
COMPILE = """
import pathlib, subprocess, sys, torch, triton
from triton.backends.compiler import GPUTarget
from flash_hf import FlashConfig, FlashModel, kernels
from flash_hf.kernels import backward, delta, dispatch, forward, residual, step, steps

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

found = {}

def launch(kernel, grid, *arguments, num_warps, maxnreg=None, **constants):
    key = kernel.function.__name__, num_warps, *map(dispatch._kind, arguments), *constants.values()
    if key not in found:
        arguments = map(dispatch._as_triton_takes, arguments)
        found[key] = kernel.function.run(
            *arguments, grid=grid, warmup=True, num_warps=num_warps, maxnreg=maxnreg, launch_pdl=True, **constants)

triton.runtime.driver.set_active(Driver())
dispatch.Kernel.__call__ = launch
kernels.unavailable = lambda device, dtype: None
torch.cuda.current_device = lambda: 0  # no launches are recorded
sizes = {"vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 1, "query_key_dim": 32, "chunk_size": 128}
delta_rule = {"global_state": "delta", "global_form": "previous_token", "local_key_shift": True}
quadratic = {"attention_type": "quadratic", "relative_bias": "rotary"}
# Also one row of one chunk: triton makes an argument of 1 a constant.
for rows, length, form in (
    (2, 300, {}), (1, 4500, {}), (1, 100, {}), (2, 300, delta_rule), (1, 100, delta_rule), (2, 256, quadratic),
    (1, 100, quadratic),
):
    model = FlashModel(FlashConfig(**sizes, **form, is_decoder=True, backend="triton")).to(torch.bfloat16)
    model(torch.zeros(rows, length, dtype=torch.long)).last_hidden_state.sum().backward()
with torch.no_grad():
    for form in ({"global_form": "previous_token", "local_key_shift": True}, delta_rule):
        form = {**sizes, **form, "chunk_shift": 64}
        model = FlashModel(FlashConfig(**form, is_decoder=True, backend="triton")).to(torch.bfloat16)
        for rows, length in ((2, 300), (40, 300), (1, 50)):
            cache = model(torch.zeros(rows, length, dtype=torch.long), use_cache=True).past_key_values
            model(torch.zeros(rows, 1, dtype=torch.long), past_key_values=cache)
            if rows == 2:
                for few in (3, 20, 40):
                    model(torch.zeros(rows, few, dtype=torch.long), past_key_values=cache)
                cache.activate_past_recording()
                model(torch.zeros(rows, 3, dtype=torch.long), past_key_values=cache)
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
for number, ((name, *_), compiled) in enumerate(found.items()):
    path = pathlib.Path(sys.argv[1], f"{number}.cubin")
    path.write_bytes(compiled.asm["cubin"])
    code = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
    path.with_suffix(".txt").write_text(code, encoding="utf-8")
    print("kernel", name, number, sep=";")
for module in (forward, backward, residual, delta, step, steps):
    for kernel in vars(module).values():
        if isinstance(kernel, dispatch.Kernel):
            print("all", kernel.function.__name__, sep=";")
"""


@pytest.mark.skipif(choice.scan is None, reason="triton has no Gluon")
def test_kernels_wait_before_they_access_memory(tmp_path, monkeypatch):
    """In machine code for sm_90a, on every path. Those in Gluon: test_scan.py."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE, str(tmp_path)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(";") for line in done.stdout.splitlines()]
    launched = [line[1:] for line in lines if line[0] == "kernel"]
    assert {name for name, _ in launched} == {line[1] for line in lines if line[0] == "all"}
    for name, number in launched:
        code = (tmp_path / f"{number}.txt").read_text(encoding="utf-8")
        assert early_accesses(code) == [], name
        assert early_accesses(code.replace("ACQBULK", "NOP")), name
