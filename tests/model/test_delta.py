# SPDX-License-Identifier: Apache-2.0
"""The delta rule's parts: the inverse, its gradients, and states with and without a loop over chunks."""

import pytest
import torch

from flash_hf import FlashConfig, FlashModel
from flash_hf.delta_flash import DeltaStates, TransposedSolve, doubled_states, lower_inverse
from helpers import assert_close


def test_the_inverse_of_a_triangle_is_exact_at_any_width():
    for width in (1, 2, 13, 32, 40, 100):
        lower = torch.randn(3, width, width, dtype=torch.float64).tril(-1)
        inverse = lower_inverse(lower / width**0.5)
        product = inverse @ (lower / width**0.5 + torch.eye(width, dtype=lower.dtype))
        assert_close(product, torch.eye(width).expand(3, -1, -1), 1e-9)


@pytest.mark.parametrize("chunks", [1, 4])
def test_derivatives_of_the_delta_rule_by_chunks(chunks):
    def random(*shape):
        return torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)

    solve = random(5, 5), random(5, 3), True
    states = (random(chunks, 5, 3), random(chunks, 5, 4), random(chunks, 3, 3), random(chunks))
    for function, given in ((TransposedSolve, solve), (DeltaStates, states)):
        torch.autograd.gradcheck(function.apply, given)
        torch.autograd.gradgradcheck(function.apply, given)


@pytest.mark.parametrize("start", [False, True], ids=["from zero", "continued"])
@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_states_for_any_length_are_those_of_the_loop(chunks, start):
    S, C, E = 3, 5, 4
    generator = torch.Generator().manual_seed(chunks)

    def random(*shape):
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    given = random(chunks, C, S), random(chunks, C, E), random(chunks, S, S), torch.sigmoid(random(chunks))
    initial = random(S, E) if start else None
    looped = DeltaStates.apply(*given, initial)
    assert_close(doubled_states(*given, initial), looped, 1e-12)
    expected = torch.zeros(2, S, E, dtype=torch.float64) if initial is None else initial
    for g in range(chunks):
        assert_close(looped[:, g] + 1, expected + 1, 1e-12)
        entering, value, erased, decay = (x[:, g] for x in given)
        expected = decay[:, None, None] * expected - erased @ expected + entering.transpose(1, 2) @ value


def test_gates_of_rows_of_one_chunk_have_gradients():
    """Zeros: DistributedDataParallel waits for the gradient of every parameter."""
    config = FlashConfig(
        vocab_size=11, hidden_size=16, query_key_dim=8, chunk_size=16, num_hidden_layers=1, is_decoder=True,
        global_state="delta",
    )  # fmt: skip
    model = FlashModel(config)
    model(torch.arange(10)[None], use_cache=False).last_hidden_state.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert not grads["layers.0.gau.gate_proj.weight"].any() and not grads["layers.0.gau.gate_bias"].any()
