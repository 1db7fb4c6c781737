# SPDX-License-Identifier: Apache-2.0
"""The torch tier on a CUDA device gives the answers of naive.py on the CPU, in every arrangement users meet first."""

import itertools

import pytest
import torch
from transformers import StaticCache

from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM
from flash_hf.naive import naive_model
from helpers import assert_close, error_ratio, make_model, naive_config, random_ids, tiny_config


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32")]
HEADS = [FlashForCausalLM, FlashForMaskedLM]


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("attention_type", ["mixed_chunk", "quadratic", "local", "global"])
@pytest.mark.parametrize("activation", ["relu2", "softmax", "laplace"])
def test_padded_packed_and_plain_equal_naive(cls, attention_type, activation):
    config = tiny_config(attention_type=attention_type, attention_activation=activation)
    for dtype, ratio in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        model = make_model(cls, config, dtype=dtype)
        weights = {name: value.double() for name, value in model.model.state_dict().items()}
        ids = random_ids(config, 1, 29)
        causal = cls is FlashForCausalLM
        expected = naive_model(ids[0], weights, naive_config(config), causal=causal)[1]
        model.cuda()
        row = torch.cat([random_ids(config, 1, 11, seed=1), ids], 1).cuda()
        mask = torch.cat([torch.zeros(1, 11), torch.ones(1, 29)], 1).long().cuda()
        positions = torch.cat([torch.arange(11), torch.arange(29)])[None].cuda()
        with torch.no_grad():
            assert_close(model(ids.cuda()).logits[0], expected, ratio)
            assert_close(model(row, attention_mask=mask).logits[0, 11:], expected, ratio)
            assert_close(model(row, position_ids=positions).logits[0, 11:], expected, ratio)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_at_most_twice_naives(cls, dtype):
    config = tiny_config(chunk_size=32)
    model = make_model(cls, config, dtype=dtype, scale=0.1).cuda()
    ids, causal = random_ids(config, 1, 500), cls is FlashForCausalLM
    weights = {name: value.detach().cpu() for name, value in model.model.state_dict().items()}
    exact = naive_model(ids[0], {k: v.double() for k, v in weights.items()}, naive_config(config), causal=causal)[1]
    on_gpu = {k: v.cuda() for k, v in weights.items()}
    plain = naive_model(ids[0].cuda(), on_gpu, naive_config(config), causal=causal)[1]
    ours, theirs = error_ratio(model(ids.cuda()).logits[0], exact), error_ratio(plain, exact)
    assert 0 < ours <= 2 * theirs, (ours, theirs)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16k_tokens_forward_and_backward_are_finite(cls, dtype):
    torch.manual_seed(0)
    model = cls(FlashConfig(vocab_size=1000, num_hidden_layers=4)).to("cuda", dtype)
    ids = random_ids(model.config, 2, 16384).cuda()
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "quadratic"])
def test_decoding_equals_the_whole(attention_type):
    model = make_model(FlashForCausalLM, tiny_config(attention_type=attention_type), dtype=torch.float64).cuda()
    ids = random_ids(model.config, 2, 45).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
        for cache in (None, StaticCache(config=model.config, max_cache_len=64)):
            out = model(ids[:, :11], attention_mask=mask[:, :11], past_key_values=cache, use_cache=True)
            for t in range(11, 45):
                out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
                assert_close(out.logits[:, 0], full[:, t], 1e-9)


@pytest.mark.parametrize("kind", ["dynamic", "static", "recorded"])
@pytest.mark.parametrize("dtype, ratio", [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("form", [
    {},
    {"chunk_shift": 5, "global_form": "previous_token", "local_key_shift": True},
    {"local_window": 2, "attention_activation": "softmax"},
    {"global_state": "delta", "chunk_shift": 5, "global_form": "previous_token"},
], ids=["paper", "FLASH+", "window", "delta"])  # fmt: skip
def test_pieces_of_any_size_equal_the_whole(form, dtype, ratio, kind):
    """On a cache, with padding inside a piece; and where the tokens of each piece are read twice, and rolled back."""
    model = make_model(FlashForCausalLM, tiny_config(**form), dtype=dtype).cuda()
    ids = random_ids(model.config, 3, 45).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 17:20] = 0
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
        static = StaticCache(config=model.config, max_cache_len=64)
        cache = model(
            ids[:, :11],
            attention_mask=mask[:, :11],
            past_key_values=static if kind == "static" else None,
            use_cache=True,
        ).past_key_values
        for begin, end in itertools.pairwise((11, 13, 16, 24, 25, 34, 45)):
            given = {"attention_mask": mask[:, begin:end], "past_key_values": cache}
            if kind == "recorded":
                cache.activate_past_recording()
                model(ids[:, begin:end].flip(0), **given)
                cache.crop(begin - end)
            real = mask[:, begin:end].bool()
            assert_close(model(ids[:, begin:end], **given).logits[real], full[:, begin:end][real], ratio)


@pytest.mark.parametrize("form", [{}, {"global_state": "delta", "local_key_shift": True}], ids=["mean", "delta"])
def test_generate_compiles_the_static_cache(form):
    """generate() compiles decoding by itself on a GPU, with CUDA graphs; the tokens are those of the plain cache."""
    model = make_model(FlashForCausalLM, tiny_config(**form), dtype=torch.float32).cuda()
    ids = random_ids(model.config, 2, 29).cuda()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    options["pad_token_id"] = 0
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("chunk_size", [16, 256])
def test_a_million_tokens(chunk_size):
    """More chunks of 16 than a grid's second dimension takes, and hidden states of more than 2^31 bytes."""
    config = FlashConfig(
        vocab_size=64, hidden_size=128 if chunk_size == 16 else 768, num_hidden_layers=2, query_key_dim=128,
        chunk_size=chunk_size, backend="triton",
    )  # fmt: skip
    model = make_model(FlashForCausalLM, config, dtype=torch.bfloat16, scale=0.03).cuda().train()
    ids = random_ids(config, 1, 2**20 + 16).cuda()
    with torch.no_grad():
        first = model(ids[:, :4096], use_cache=False).logits[0]
        last = model(ids, use_cache=False).logits[0]
    assert_close(last[:4096], first, 5e-2)
    assert last[-4096:].isfinite().all()
    model(ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
