# SPDX-License-Identifier: Apache-2.0
"""Other packages: torchao, and the linter that transformers' own models pass."""

import math
import subprocess
import sys

import pytest
import torch
from transformers import TorchAoConfig

from flash_hf import FlashConfig, FlashForCausalLM
from flash_hf.training import train_tokenizer
from helpers import ROOT, TEXT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained causal model, saved; its tokenizer; and held-out tokens."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([{"text": TEXT}], 600)
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    config = FlashConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, query_key_dim=32, chunk_size=32,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = FlashForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        starts = torch.randint(0, int(0.9 * len(ids)) - 130, (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[start : start + 129] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer, ids[int(0.9 * len(ids)) :][: 16 * 128].view(16, 128)


def perplexity(model, ids):
    with torch.no_grad():
        return math.exp(model(ids, labels=ids).loss)


@pytest.mark.slow
def test_int8_weights_lose_less_than_one_percent_of_perplexity(trained):
    from torchao.quantization import Int8WeightOnlyConfig

    folder, tokenizer, held_out = trained
    model = FlashForCausalLM.from_pretrained(folder)
    quantised = FlashForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert "Int8" in type(quantised.model.layers[0].gau.u_proj.weight).__name__
    before, after = perplexity(model, held_out), perplexity(quantised, held_out)
    print(f"perplexity {before:.3f}, with int8 weights {after:.3f}")
    assert before < 0.4 * len(tokenizer)  # it has learnt
    assert after < 1.01 * before
    prompt = held_out[:2, :40]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False}
    cached = quantised.generate(prompt, **options)
    assert torch.equal(cached, quantised.generate(prompt, use_cache=False, **options))


def test_linter_of_transformers_models():
    files = ["flash_hf/configuration_flash.py", "flash_hf/modeling_flash.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", *files],
        cwd=ROOT, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
