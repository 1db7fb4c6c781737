# SPDX-License-Identifier: Apache-2.0
"""Models under another default device: built on it, independent of it in their forward pass, and without
float64, which some devices (mps) do not have."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from flash_hf import FlashForCausalLM, FlashForMaskedLM, attention_flash
from helpers import make_model, random_ids, tiny_config


class NoFloat64(TorchDispatchMode):
    """Raises as a device without float64 does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"{function} makes float64")
        return out


def test_the_check_finds_float64():
    with NoFloat64(), pytest.raises(TypeError, match="makes float64"):
        torch.arange(3, dtype=torch.float64)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"relative_bias": "rotary"},
        {"relative_bias": "rotary", "rope_parameters": YARN},
        {"relative_bias": "t5"},
        {"relative_bias": "toeplitz", "attention_init": "recent"},
        {"relative_bias": "rotary", "attention_type": "quadratic"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values() if isinstance(value, str)),
)
def test_under_another_default_device(causal, changes, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_flash, "FLOAT64_DEVICES", ())
    config = tiny_config(is_decoder=causal, **changes)
    cls, auto = (FlashForCausalLM, AutoModelForCausalLM) if causal else (FlashForMaskedLM, AutoModelForMaskedLM)
    with torch.device("meta"):
        built = auto.from_config(config)
    assert {tensor.device.type for tensor in (*built.parameters(), *built.buffers())} == {"meta"}
    model, ids = make_model(cls, config, dtype=torch.float32), random_ids(config, 2, 21)
    model.save_pretrained(tmp_path)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with NoFloat64():
        assert auto.from_config(config).dtype == torch.float32
        loaded = auto.from_pretrained(tmp_path).eval()
        result = loaded(ids, attention_mask=mask, labels=ids)
        result.loss.backward()
    # A device that holds no data: each tensor that is made on it by mistake is an error.
    with torch.device("meta"):
        again = loaded(ids, attention_mask=mask, labels=ids)
        again.loss.backward()
    assert torch.equal(again.logits, result.logits) and torch.equal(again.loss, result.loss)
    if causal:
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        want = loaded.generate(ids, **options)
        # transformers makes the counter of a static cache with keys and values on the default device.
        static = [] if config.attention_type == "quadratic" else [{"cache_implementation": "static"}]
        for more in ({}, *static):
            with NoFloat64():
                assert torch.equal(loaded.generate(ids, **options, **more), want)
            with torch.device("meta"):
                assert torch.equal(loaded.generate(ids, **options, **more), want)


@pytest.mark.parametrize("theta", [10000.0, 500_000.0, 7.5])
def test_frequencies_are_those_of_float64(theta):
    config = tiny_config(query_key_dim=64, rope_parameters={"rope_type": "default", "rope_theta": theta})
    found = FlashForCausalLM(config).model.rotary_emb.inv_freq
    exact = theta ** -(torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim)
    assert torch.equal(found, exact.float())
