# SPDX-License-Identifier: Apache-2.0
"""The torch tier against naive.py, in float64 to 1e-9 and float32 to 2e-4, and its gradients."""

import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from flash_hf import FlashForCausalLM, FlashForMaskedLM, FlashModel
from flash_hf.attention_flash import QueryKeys, mixed_chunk_attention, quadratic_attention
from flash_hf.chunking_flash import chunk_layout, quadratic_layout, resolve_documents
from flash_hf.naive import naive_model
from helpers import assert_close, make_model, naive_config, random_ids, tiny_config


C = 8
LENGTHS = [1, C - 1, C, C + 1, 3 * C + 5]
TYPES = ["mixed_chunk", "quadratic", "local", "global"]
ACTIVATIONS = ["relu2", "softmax", "laplace"]
BIASES = ["toeplitz", "rotary", "t5", None]
DELTA = [
    {"global_state": "delta"},
    {"global_state": "delta", "chunk_shift": 5, "global_form": "previous_token", "local_key_shift": True},
    {"global_state": "delta", "attention_type": "global", "chunk_shift": 3},
]
WINDOW = [
    {"local_window": 2},
    {"local_window": 2, "chunk_shift": 5, "attention_activation": "softmax", "relative_bias": "rotary"},
    {"local_window": 2, "attention_type": "local", "attention_activation": "laplace", "relative_bias": "t5"},
    {"local_window": 2, "local_key_shift": True, "relative_bias": None, **DELTA[0]},
]
CAUSAL = [*DELTA, *WINDOW]
HEADS = {True: FlashForCausalLM, False: FlashForMaskedLM}


def naive_logits(model, ids_N, causal):
    weights = {name: value.double() for name, value in model.model.state_dict().items()}
    weights["lm_head.weight"] = model.lm_head.weight.detach().double()
    return naive_model(ids_N, weights, naive_config(model.config), causal=causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("attention_type", TYPES)
def test_model_equals_naive(attention_type, causal):
    """Every activation and bias at every length; logits and last hidden state; two rows, to catch a mixed-up batch."""
    for activation, bias in itertools.product(ACTIVATIONS, BIASES):
        config = tiny_config(attention_type=attention_type, attention_activation=activation, relative_bias=bias)
        model = make_model(HEADS[causal], config)
        for length in LENGTHS:
            ids = random_ids(config, 2, length, seed=length)
            out = model(ids, output_hidden_states=True)
            for row in range(2):
                hidden, logits = naive_logits(model, ids[row], causal)
                what = f"{activation} {bias} length {length}"
                assert_close(out.logits[row], logits, 1e-9, what)
                assert_close(out.hidden_states[-1][row], hidden, 1e-9, what)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    "changes",
    [
        {"norm_type": "layer_norm"},
        {"norm_type": "rms_norm", "norm_eps": 0.1},
        {"hidden_act": "gelu"},
        {"global_normalization": "chunk"},
        {"global_form": "previous_token"},
        {"global_form": "previous_token", "attention_type": "global", "relative_bias": None},
        {"chunk_shift": 4},
        {"chunk_shift": 7, "attention_activation": "softmax", "relative_bias": "rotary"},
        {"chunk_shift": 1, "attention_type": "local", "attention_activation": "laplace", "relative_bias": "t5"},
        {"chunk_shift": 3, "attention_type": "global", "global_normalization": "chunk"},
        {"chunk_shift": 5, "global_form": "previous_token"},
        {"local_key_shift": True},
        {"local_key_shift": True, "chunk_shift": 5, "global_form": "previous_token"},
        {"local_key_shift": True, "attention_type": "local", "rope_interleaved": True},
        *CAUSAL,
        {"use_rope": False},
        {"use_rope": False, "relative_bias": "rotary"},
        {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}},
        {"rope_interleaved": True},
        {"rope_interleaved": True, "relative_bias": "rotary"},
        {"use_scaled_sinusoid": False},
        {"attention_divisor": 3.5},
        {"expansion_factor": 1.5},
        {"tie_word_embeddings": False},
        {"chunk_size": 1},
        {"chunk_size": 64},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items())[:60],
)
def test_every_option_equals_naive(changes, causal):
    config = tiny_config(**changes)
    if not causal and changes in CAUSAL:
        with pytest.raises(ValueError, match="(global_state|local_window).*bidirectional.*for causal models"):
            make_model(HEADS[causal], config)
        return
    model = make_model(HEADS[causal], config)
    for length in (1, 4, 5, 29):
        ids = random_ids(config, 1, length, seed=length)
        assert_close(model(ids).logits[0], naive_logits(model, ids[0], causal)[1], 1e-9, str(changes))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("attention_type", TYPES)
def test_float32_equals_naive_in_float64(attention_type, causal):
    config = tiny_config(attention_type=attention_type)
    model = make_model(HEADS[causal], config, dtype=torch.float32)
    for length in LENGTHS:
        ids = random_ids(config, 1, length, seed=length)
        assert_close(model(ids).logits[0], naive_logits(model, ids[0], causal)[1], 2e-4, f"length {length}")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    "changes",
    [
        *({"attention_type": attention_type} for attention_type in TYPES),
        {"global_form": "previous_token"},
        {"chunk_shift": 3},
        {"chunk_shift": 6, "attention_type": "local"},
        {"chunk_shift": 5, "global_form": "previous_token"},
        {"local_key_shift": True, "chunk_shift": 5, "global_form": "previous_token"},
        *CAUSAL,
        {"chunk_shift": 1, "global_form": "previous_token", "attention_type": "global"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_all_gradients_equal_naive(changes, causal):
    config = tiny_config(num_hidden_layers=2, **changes)
    if not causal and changes in CAUSAL:
        pytest.skip("causal only")
    model = make_model(HEADS[causal], config)
    ids = random_ids(config, 1, 3 * C + 5)
    weight = torch.randn(1, ids.shape[1], config.vocab_size, dtype=torch.float64)
    (model(ids).logits * weight).sum().backward()
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.model.state_dict().items()}
    (naive_model(ids[0], weights, naive_config(config), causal=causal)[1] * weight[0]).sum().backward()
    checked = 0
    for name, parameter in model.model.named_parameters():
        assert_close(parameter.grad, weights[name].grad, 1e-9, name)
        checked += 1
    assert checked == len(weights) and checked > 20


@pytest.mark.parametrize("length", [1, 3 * C + 5])
@pytest.mark.parametrize(
    "changes",
    [*({"attention_type": attention_type} for attention_type in TYPES), *CAUSAL],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_cache_does_not_change_gradients(changes, length):
    config = tiny_config(**changes)
    model = make_model(FlashForCausalLM, config)
    ids = random_ids(config, 2, length)
    gradients = []
    for cache in (None, DynamicCache(config=config), StaticCache(config=config, max_cache_len=64)):
        model(ids, past_key_values=cache, use_cache=cache is not None).logits.square().sum().backward()
        # With "global", the first chunk attends to nothing, so some parameters get no gradient.
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    for name, expected in gradients[0].items():
        assert_close(gradients[1][name], expected, 1e-9, f"dynamic {name}")
        assert_close(gradients[2][name], expected, 1e-9, f"static {name}")


@pytest.mark.parametrize("normalization, shift, previous", [("mean", 0, False), ("chunk", 0, True), ("mean", 2, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_gradcheck_with_padding_and_packing(causal, activation, normalization, shift, previous):
    """float64 gradcheck of the pure function over a ragged, packed layout, through split and merge."""
    chunk = 3
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    positions = torch.tensor([[0, 0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0]])
    documents = resolve_documents(2, 8, mask.device, attention_mask=mask, position_ids=positions)
    layout = chunk_layout(documents, 2, chunk, causal=causal, shift=shift)

    def run(quad_q, quad_k, lin_q, lin_k, value, bias):
        heads = QueryKeys(*(layout.split(x) for x in (quad_q, quad_k, lin_q, lin_k)))
        out = mixed_chunk_attention(
            heads, layout.split(value), layout, causal=causal, chunk_size=chunk, activation=activation, divisor=1.3,
            bias_R=bias, normalization=normalization, previous_key=previous,
        )[0]  # fmt: skip
        return layout.merge(out)

    inputs = [torch.randn(2, 8, width, dtype=torch.float64, requires_grad=True) for width in (2, 2, 2, 2, 3)]
    bias = torch.randn(2 * chunk - 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (*inputs, bias))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_gradcheck_of_quadratic_attention(causal):
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    documents = resolve_documents(1, 5, mask.device, attention_mask=mask)
    layout = quadratic_layout(documents, 1, causal=causal)
    inputs = [torch.randn(1, 5, width, dtype=torch.float64, requires_grad=True) for width in (2, 2, 3)]
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: quadratic_attention(q, k, v, layout, causal=causal, divisor=1.3, bias_R=b), (*inputs, bias)
    )


@pytest.mark.parametrize("attention_type", TYPES)
def test_no_future_leak(attention_type):
    """Gradients of each position's output with respect to later embeddings are exactly zero, at chunk borders
    too."""
    config = tiny_config(attention_type=attention_type, is_decoder=True)
    model = make_model(FlashModel, config)
    embeds = torch.randn(1, 3 * C + 5, config.hidden_size, dtype=torch.float64, requires_grad=True)
    for position in (0, C - 1, C, 2 * C - 1, 2 * C, 3 * C + 3):
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).last_hidden_state[0, position].sum(), embeds)
        assert gradient[0, position + 1 :].abs().max() == 0
        if attention_type == "mixed_chunk":  # relu2 alone may give a pair no weight
            assert gradient[0, : position + 1].abs().amax(-1).min() > 0


@pytest.mark.parametrize("attention_type", TYPES)
def test_a_prefix_does_not_depend_on_what_follows(attention_type):
    config = tiny_config(attention_type=attention_type)
    model = make_model(FlashForCausalLM, config)
    ids = random_ids(config, 1, 4 * C + 3)
    full = model(ids).logits
    for length in range(1, ids.shape[1], 3):
        assert_close(model(ids[:, :length]).logits, full[:, :length], 1e-12, f"prefix of {length}")


def test_bidirectional_sees_everything():
    config = tiny_config()
    model = make_model(FlashForMaskedLM, config)
    embeds = torch.randn(1, 3 * C + 5, config.hidden_size, dtype=torch.float64, requires_grad=True)
    for position in (0, 2 * C, 3 * C + 4):
        (gradient,) = torch.autograd.grad(
            model(inputs_embeds=embeds).logits[0, position].sum(), embeds, retain_graph=True
        )
        assert gradient[0].abs().amax(-1).min() > 0


def test_first_chunk_has_no_global_part():
    """With the local branch off, tokens attend to nothing of an open chunk and to all of a closed one."""
    config = tiny_config(attention_type="global", num_hidden_layers=1, is_decoder=True)
    model = make_model(FlashModel, config)
    embeds = torch.randn(1, 2 * C, config.hidden_size, dtype=torch.float64)
    changed = embeds.clone()
    changed[0, 0] += 1
    difference = (model(inputs_embeds=embeds).last_hidden_state - model(inputs_embeds=changed).last_hidden_state).abs()
    assert difference[0, 1:C].max() == 0
    assert difference[0, C:].amax(-1).min() > 0
