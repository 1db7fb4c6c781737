# SPDX-License-Identifier: Apache-2.0
"""`flash-hf env`: what it prints, and a self-test that fails where something is wrong."""

import re
import sys

import pytest
import torch

from flash_hf import FlashConfig, attention_flash, commands
from flash_hf.commands import env


def run_env(capsys, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["flash-hf", "env", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    return ended.value.code, capsys.readouterr().out


def test_env_prints_versions_backend_and_a_self_test(capsys, monkeypatch):
    code, out = run_env(capsys, monkeypatch)
    lines = dict(re.split(" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert code == 0 and lines["torch"] == torch.__version__ and lines["flash-hf"].startswith("0.")
    assert lines["backend"] == "torch, on cpu: the device is a CPU"
    assert re.fullmatch(r"passed: PyTorch \S+e-0[67] from the reference, .*", lines["self-test"])


def test_env_finds_wrong_attention(capsys, monkeypatch):
    monkeypatch.setattr(attention_flash, "score_scale", lambda *_: 1 / 200)  # of 1 / 256
    code, out = run_env(capsys, monkeypatch)
    assert code == 1 and "FAILED: PyTorch" in out


@pytest.mark.slow
def test_the_self_test_compares_kernels_with_torch():
    """In triton's interpreter, whose bfloat16 is wrong: the self-test notices."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "query_key_dim": 16, "chunk_size": 16}
    config = FlashConfig.plus(**sizes, initializer_range=0.2)
    passed, line = env.self_test(config, torch.device("cpu"), True, torch.float16)
    assert passed and re.match(r"passed: kernels \S+, PyTorch \S+ from float64", line)
    passed, line = env.self_test(config, torch.device("cpu"), True)
    assert not passed and line.startswith("FAILED: kernels")
