# SPDX-License-Identifier: Apache-2.0
"""flash_hf.inspection: its weights give what the model computes, each branch by itself."""

import pytest
import torch

from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM, FlashModel
from flash_hf.inspection import look_inside
from helpers import make_model, random_ids, tiny_config


FORMS = {
    "paper": {},
    "plus": {"chunk_shift": 4, "global_form": "previous_token", "use_scaled_sinusoid": False},
    "softmax": {"attention_activation": "softmax"},
    "local_key_shift": {"local_key_shift": True},
    "window": {"local_window": 2, "attention_activation": "softmax"},
    "delta": {"global_state": "delta", "global_form": "previous_token"},
    "local": {"attention_type": "local"},
    "global": {"attention_type": "global"},
    "quadratic": {"attention_type": "quadratic"},
}


@pytest.mark.parametrize("head", [FlashForCausalLM, FlashForMaskedLM], ids=["causal", "masked"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_give_the_layers_outputs(form, head):
    if form in ("delta", "window") and head is FlashForMaskedLM:
        pytest.skip("causal only")
    model = make_model(head, tiny_config(**FORMS[form]))
    ids = random_ids(model.config, 1, 29)
    views = look_inside(model, ids)
    with torch.no_grad():
        hidden = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for index, view in enumerate(views[:-1]):  # the last hidden state has passed the final norm
        bias = view.unit.o_proj.bias.detach()
        expected = hidden[index + 1][0] - hidden[index][0] - bias
        found = view.added(view.local_NN) + view.added(view.global_NN)
        torch.testing.assert_close(found.double(), expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-4)
        assert not bool(view.global_NN.any()) == (form in ("local", "quadratic"))
        assert not bool(view.local_NN.any()) == (form == "global")
        share = view.global_share()
        assert share.shape == (29,) and bool((share >= 0).all() and (share <= 1).all())
        assert (form != "global") or bool((share[8:] == 1).all())
        if head is FlashForCausalLM:
            assert not view.weights_NN.triu(1).any()
            # In causal chunks the branches divide the past: own chunk local, earlier chunks global.
            if form == "paper":
                own = torch.arange(29)[:, None] // 8 == torch.arange(29) // 8
                assert not view.local_NN[~own].any() and not view.global_NN[own].any()


def test_drawn_names_the_token_that_matters():
    """Without the token that a layer draws on most, the layer's output changes by as much."""
    model = make_model(FlashForCausalLM, tiny_config(num_hidden_layers=1))
    view = look_inside(model, random_ids(model.config, 1, 29))[0]
    drawn = view.drawn(20)
    token = int(drawn.argmax())
    without = view.weights_NN.clone()
    without[20, token] = 0
    change = (view.added(view.weights_NN) - view.added(without))[20].norm()
    torch.testing.assert_close(change, drawn[token], rtol=1e-4, atol=1e-6)
    assert drawn.shape == (29,) and not drawn[21:].any()


def test_it_leaves_the_model_as_it_was():
    model = make_model(FlashModel, tiny_config(), dtype=torch.bfloat16)
    ids = random_ids(model.config, 1, 20)
    before = model(ids).last_hidden_state
    assert look_inside(model, ids)[0].local_NN.dtype == torch.float32
    assert torch.equal(model(ids).last_hidden_state, before)
    assert not any(layer.gau._forward_pre_hooks or "query_keys" in vars(layer.gau) for layer in model.layers)
    with pytest.raises(ValueError, match=r"one text of shape \(1, tokens\), got \(2, 20\)"):
        look_inside(model, ids.expand(2, -1))


@pytest.mark.gpu
def test_on_a_gpu_it_shows_what_kernels_compute():
    config = FlashConfig.plus(vocab_size=64, hidden_size=128, num_hidden_layers=3, initializer_range=0.1)
    torch.manual_seed(0)
    model = FlashForCausalLM(config).eval()
    ids = random_ids(config, 1, 700)
    # Before the model moves: a view projects with the model's own weights.
    expected = [(view.local_NN, view.global_share()) for view in look_inside(model, ids)]
    for view, (local_NN, share_N) in zip(look_inside(model.cuda(), ids.cuda()), expected, strict=True):
        tolerance = 0.02 * local_NN.abs().max().item()
        torch.testing.assert_close(view.local_NN.cpu(), local_NN, atol=tolerance, rtol=0)
        torch.testing.assert_close(view.global_share().cpu(), share_N, atol=0.02, rtol=0)
