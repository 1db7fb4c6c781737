# SPDX-License-Identifier: Apache-2.0
"""The kernels of the gated delta rule: against a statement token by token in float64, and in layers against the torch
tier."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flash_hf import FlashConfig, FlashModel
from flash_hf.backend_flash import fuses_layer, kernels_for
from helpers import error_ratio, make_model
from test_kernels import DEVICE, LAYOUTS, compare, config_of, through, together


pytest.importorskip("triton", reason="the kernels need triton: pip install flash-hf[kernels]")
from flash_hf import kernels  # noqa: E402
from flash_hf.kernels import delta, tiles  # noqa: E402


pytestmark = pytest.mark.usefixtures("exact_float32")


# ------------------------------------------------------------------------------------------------------------------
# The parts
# ------------------------------------------------------------------------------------------------------------------
def shape_of(B, N, C, S, E, shift, dtype):
    return tiles.Shape(
        B=B, N=N, G=-(-(N + shift) // C), C=C, shift=shift, D=0, E=E, S=S, H=4, causal=True, quad=True, lin=True,
        previous=False, local_shift=False, delta=True, silu=False, interleaved=False, rotary_dim=0, scale=1.0,
        dtype=dtype,
    )  # fmt: skip


def naive_states(k_NS, v_NE, log_a_N, w_N, C):
    """The state before each chunk, token by token."""
    state, states = v_NE.new_zeros(k_NS.shape[1], v_NE.shape[1]), []
    for t, (k, v) in enumerate(zip(k_NS, v_NE, strict=True)):
        if t % C == 0:
            states.append(state)
        decay = log_a_N[t].exp()
        state = decay * state - w_N[t] * torch.outer(k, decay * (k @ state) - v)
    return torch.stack(states)


def errors(B, N, C, S, E, shift=0, dtype=torch.float32, likeness=2.0, forget=1.0):
    """Errors of what the kernels make of random keys, weights and decays, and of every gradient.

    Args:
        likeness: of the keys, by a vector that they share: the larger, the farther from the identity is what a chunk
            does to the state.
        forget: added to the input of the forget gate.
    """
    shape = shape_of(B, N, C, S, E, shift, dtype)
    G, CP, SP, GT = shape.G, shape.tiles.CP, shape.tiles.SP, shape.GT
    slot = torch.arange(G * C) - shift
    real = ((slot >= 0) & (slot < N)).view(G, C).repeat(B, 1).double()
    heads = torch.full((shape.rows, GT, CP, SP), torch.nan)
    heads[2:4] = 0.0
    raw = torch.randn(2, GT, C, S) + torch.tensor([0.0, likeness])[:, None, None, None] * torch.randn(S)
    heads[2:4, :, :C, :S] = raw * real[..., None]
    heads = heads.to(DEVICE, dtype)
    gates, bias = torch.randn(B * N, 2).to(DEVICE, dtype), torch.tensor([forget, 0.3]).to(DEVICE)
    value = (torch.randn(GT, C, E) * real[..., None]).to(DEVICE, dtype)
    d_out = (torch.randn(GT, C, E) * real[..., None]).to(DEVICE, dtype)
    inputs = tiles.Inputs(*[None] * 10, gates=gates, gate_bias=bias)
    edge = torch.arange(B + 1, dtype=torch.int32, device=DEVICE) * G
    inputs.u = gates
    inputs.index = SimpleNamespace(group_G=gates, documents=B, document_begin=edge[:-1], document_end=edge[1:])

    made = delta.launch_prepare(shape, inputs, heads)
    own = (slice(None), slice(C), slice(S))
    enter, read = heads[shape.lin_row + 1][own], heads[shape.lin_row][own]
    added = F.pad(enter.float().transpose(1, 2) @ value.float(), (0, 0, 0, SP - S)).contiguous()
    states, _ = delta.launch_states(shape, inputs, added, made)
    low = states[:, :S].float()
    out = read.float() @ low
    total = F.pad(read.float().transpose(1, 2) @ d_out.float(), (0, 0, 0, SP - S)).contiguous()
    after, _ = delta.launch_states(shape, inputs, total, made, reverse=True)
    d_heads = torch.full_like(heads, torch.nan)
    d_heads[shape.lin_row :] = 0
    d_heads[shape.lin_row][own] = (C * d_out.float() @ low.transpose(1, 2)).to(dtype)
    d_heads[shape.lin_row + 1][own] = (value.float() @ after[:, :S].float().transpose(1, 2)).to(dtype)
    d_value = enter.float() @ after[:, :S].float()
    d_gates = torch.full_like(gates, torch.nan)
    d_bias = delta.launch_prepare_gradient(shape, inputs, heads, made, d_heads, states, after, d_gates).sum(0)

    q, k, v, g, b = (
        x.double().cpu().requires_grad_() for x in (heads[2][own], heads[3][own], value, gates, bias)
    )  # fmt: skip
    inputs_BK2 = F.pad((g + b).view(B, N, 2), (0, 0, shift, G * C - N - shift))
    log_a, w = F.logsigmoid(inputs_BK2[..., 0]) * real.view(B, -1), inputs_BK2[..., 1].sigmoid() * real.view(B, -1)
    found = [
        naive_states(F.normalize(k_, dim=-1), v_, a_, w_, C)
        for k_, v_, a_, w_ in zip(k.view(B, G * C, S), v.view(B, G * C, E), log_a, w, strict=True)
    ]
    before = torch.stack(found).view(GT, S, E)
    since = log_a.view(GT, C, 1).cumsum(1)
    expected = since.exp() * F.normalize(q, dim=-1) @ before
    (expected * d_out.double().cpu()).sum().backward()
    pairs = {
        "out": (out, expected),
        "d_q": (d_heads[2][own], q.grad), "d_k": (d_heads[3][own], k.grad), "d_v": (d_value, v.grad),
        "d_gates": (d_gates, g.grad), "d_bias": (d_bias, b.grad),
    }  # fmt: skip
    return {name: error_ratio(ours.cpu(), exact) for name, (ours, exact) in pairs.items()}


SIZES = {
    "whole": (2, 48, 16, 16, 24), "odd": (1, 45, 11, 10, 16, 5), "blocks": (1, 300, 128, 16, 16),
    "padded blocks": (1, 210, 100, 20, 16, 50),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_parts_equal_a_statement_token_by_token(size):
    for likeness in (0.0, 2.0, 20.0):
        found = errors(*SIZES[size], likeness=likeness)
        assert all(error < (2e-4 if name == "d_bias" else 2e-5) for name, error in found.items()), (likeness, found)


def test_parts_in_16_bits():
    found = errors(*SIZES["odd"], dtype=torch.float16)
    assert all(error < 5e-3 for error in found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.02), (torch.float16, 4e-3), (torch.float32, 5e-5)])
@pytest.mark.parametrize("forget", [1.0, 9.0])
def test_parts_on_a_gpu(dtype, limit, forget):
    large = (2, 1000, 256, 128, 256, 128) if dtype != torch.float32 else (1, 300, 128, 32, 64)
    for size in (large, (1, 90, 32, 32, 48)):
        found = errors(*size, dtype=dtype, forget=forget)
        assert all(error < limit * (5 if name == "d_bias" else 1) for name, error in found.items()), found


# ------------------------------------------------------------------------------------------------------------------
# Layers
# ------------------------------------------------------------------------------------------------------------------
FORMS = {"rotated": {}, "plus": {"chunk_shift": 6, "global_form": "previous_token", "local_key_shift": True}}


def delta_config(**changes):
    return config_of(**{"global_state": "delta", "num_hidden_layers": 1, **changes})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_equal_the_torch_tier(layout, form):
    compare(delta_config(**FORMS[form]), layout, whole=(layout != "padded") == (form == "plus"))


@pytest.mark.parametrize("changes", [{"attention_type": "global"}, {"chunk_size": 11, "hidden_act": "relu"}], ids=str)
def test_variants_equal_the_torch_tier(changes):
    compare(delta_config(**changes), "odd")


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_kernels_are_chosen_as_for_the_mean(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "unavailable", lambda *arguments: None)
    for backend, changes, chosen in (
        ("auto", {}, True), ("triton", {}, True), ("torch", {}, False), ("auto", {"local_window": 2}, False)
    ):  # fmt: skip
        config = delta_config(backend=backend, **changes)
        assert (kernels_for(config, torch.device("cuda"), dtype, dropout=False) is kernels) == chosen


def test_a_layer_is_one_call():
    model = make_model(FlashModel, delta_config(), dtype=torch.float32).to(DEVICE)
    fused, layer = [], model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: fused.append(fuses_layer(layer, *inputs[:2])))
    with torch.no_grad():
        model(inputs_embeds=torch.randn(2, 45, 32, device=DEVICE), use_cache=False)
    assert fused == [True]


@pytest.mark.parametrize("whole", [True, False], ids=["layer", "attention"])
def test_operators_know_their_shapes(whole):
    """Under fake tensors, with gradients: the graph of a compiled model gives what the eager one does."""
    model = make_model(FlashModel, delta_config(num_hidden_layers=2), dtype=torch.float32).to(DEVICE)
    if not whole:
        for layer in model.layers:
            layer.gau.u_proj = torch.nn.Sequential(layer.gau.u_proj)
    x = torch.randn(2, 45, 32, device=DEVICE)
    expected = through(model, x, {}, 1.0)
    got = through(torch.compile(model, fullgraph=True, backend="aot_eager"), x, {}, 1.0)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close({name.removeprefix("_orig_mod."): grad for name, grad in got[1].items()}, expected[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_error_of_steps_is_at_most_twice_the_torch_tiers(dtype, form):
    """Over borders of chunks, one token and three by turns, with padding."""
    exact = make_model(FlashModel, delta_config(**FORMS[form], is_decoder=True), dtype=torch.float64).to(DEVICE)
    model = copy.deepcopy(exact).to(dtype)
    x, mask = torch.randn(2, 47, 32, device=DEVICE, dtype=torch.float64), torch.rand(2, 47, device=DEVICE) < 0.8
    mask[:, 18:20] = True
    found, totals = [], []
    for own, backend in ((exact, "torch"), (model, "torch"), (model, "triton")):
        own.config.backend, begin, out = "torch", 19, []
        with torch.no_grad():
            cache = own(inputs_embeds=x[:, :19].to(own.dtype), attention_mask=mask[:, :19].long()).past_key_values
            own.config.backend = backend
            while begin < 47:
                end = begin + 1 + 2 * (begin % 2)
                marks, given = mask[:, begin:end], x[:, begin:end].to(own.dtype)
                step = own(inputs_embeds=given, attention_mask=marks.long(), past_key_values=cache)
                out.append(step.last_hidden_state[marks])
                begin = end
        found.append(torch.cat(out))
        totals.append(cache.layers[0].state.total)
    for expected, plain, ours in (found, totals):
        assert 0 < error_ratio(ours, expected) <= 2 * error_ratio(plain, expected)


PROMPTS = {
    "plus": FORMS["plus"], "rotated": {"local_key_shift": True}, "odd sizes": {"chunk_size": 11, "query_key_dim": 10},
    "global": {"attention_type": "global", "global_form": "previous_token", "chunk_shift": 5},
}  # fmt: skip


def read_prompt(model, x, mask, lengths, backend):
    """Real tokens' hidden states and the state in every layer, of a prompt read in pieces."""
    model.config.backend, out, cache = backend, [], None
    pieces = zip(x.to(model.dtype).split(lengths, 1), mask.split(lengths, 1), strict=True)
    for given, marks in pieces:
        cache = cache if cache is None else cache.past_key_values
        cache = model(inputs_embeds=given, attention_mask=marks.long(), past_key_values=cache, use_cache=True)
        out.append(cache.last_hidden_state[marks])
    return torch.cat(out), [layer.state for layer in cache.past_key_values.layers]


@pytest.mark.parametrize("lengths, form", [
    *(((23, 40, 1, 17), form) for form in PROMPTS), ((61,), "plus"), ((32, 17, 32), "plus"), ((32, 17, 32), "global"),
], ids=str)  # fmt: skip
def test_prompts_equal_the_torch_tier(form, lengths, monkeypatch):
    """Whole, or in pieces that end at borders of chunks or inside of chunks, with padding; only their first tokens are
    alone a step."""
    model = make_model(FlashModel, delta_config(**PROMPTS[form], is_decoder=True, num_hidden_layers=2)).to(DEVICE)
    fast = copy.deepcopy(model).float()
    x, mask = torch.randn(3, sum(lengths), 32, device=DEVICE), torch.rand(3, sum(lengths), device=DEVICE) < 0.8
    mask[0], mask[1, : lengths[0] + 2] = True, False
    calls = []
    for name in ("layer", "gated_attention", "layer_step"):
        call = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, call=call, **k: calls.append(1) or call(*a, **k))
    with torch.no_grad():
        expected, exact = read_prompt(model, x, mask, lengths, "torch")
        assert not calls
        out, states = read_prompt(fast, x, mask, lengths, "triton")
    assert len(calls) == 2 * len(lengths)
    assert error_ratio(out, expected) < 1e-5
    for state, truth in zip(states, exact, strict=True):
        assert torch.equal(state.seen, truth.seen)
        for name in ("total", "opened", "since", *["value"] * (truth.quad_k is not None)):  # else read by none
            assert error_ratio(getattr(state, name), getattr(truth, name)) < 1e-5, name
        assert (state.lin_k is None) == (truth.lin_k is None)
        if truth.lin_k is not None:  # of a row without a token it is read by none
            has = truth.seen > 0
            assert error_ratio(state.lin_k[has], truth.lin_k[has]) < 1e-5


@pytest.mark.parametrize("form", ["plus", "rotated"])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_error_of_prompts_is_at_most_twice_the_torch_tiers(dtype, form):
    exact = make_model(FlashModel, delta_config(**PROMPTS[form], is_decoder=True), dtype=torch.float64).to(DEVICE)
    x, mask = torch.randn(2, 66, 32, device=DEVICE), torch.ones(2, 66, dtype=torch.bool, device=DEVICE)
    found = []
    for dtype_, backend in ((torch.float64, "torch"), (dtype, "torch"), (dtype, "triton")):
        model = copy.deepcopy(exact).to(dtype_)
        with torch.no_grad():
            out, [state] = read_prompt(model, x, mask, (35, 30, 1), backend)
        found.append((out, state.total, state.opened))
    for expected, plain, ours in zip(*found, strict=True):
        assert 0 < error_ratio(ours, expected) <= 2 * error_ratio(plain, expected)


@pytest.mark.parametrize("length", [9, 40])
def test_a_cache_is_filled_in_training_by_kernels(length):
    """With the gradients of a call without a cache: also of the gates, if one chunk reads no state."""
    config = delta_config(**FORMS["plus"], is_decoder=True, num_hidden_layers=2)
    model = make_model(FlashModel, config, dtype=torch.float32).to(DEVICE).train()
    x, weight = torch.randn(2, 2, length, 32, device=DEVICE)
    found = []
    for dtype, backend, cached in ((torch.float64, "torch", False), (torch.float32, "triton", True)):
        own = copy.deepcopy(model).to(dtype)
        own.config.backend = backend
        out = own(inputs_embeds=x.to(dtype), use_cache=cached).last_hidden_state
        (out * weight).sum().backward()
        grads = {name: p.grad for name, p in own.layers.named_parameters()}
        found.append({"out": out.detach(), **together(grads)})
    for name, expected in found[0].items():
        got = found[1][name]
        assert error_ratio(got, expected) < 1e-4 or not (expected.any() or got.any()), name


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("whole", [True, False], ids=["layer", "attention"])
def test_error_on_a_gpu_is_at_most_twice_the_torch_tiers(layout, form, whole):
    changes = {**FORMS[form], "hidden_size": 64, "chunk_size": 64, "query_key_dim": 32}
    compare(delta_config(**changes), layout, torch.bfloat16, whole=whole, length=333, scale=0.1, draws=3)


@pytest.mark.gpu
def test_two_runs_are_bit_equal():
    changes = {"hidden_size": 256, "chunk_size": 256, "query_key_dim": 128, "num_hidden_layers": 2}
    model = make_model(FlashModel, delta_config(**changes), dtype=torch.bfloat16, scale=0.06).to(DEVICE)
    x = torch.randn(6, 1100, 256, device=DEVICE, dtype=torch.bfloat16)
    first = through(model, x, {}, 1.0)
    for _ in range(4):
        again = through(model, x, {}, 1.0)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_steps_at_full_size(rows):
    """Of single tokens over a border, and of a few: two runs are bit-equal, the error is at most twice the torch
    tier's."""
    sizes = {"vocab_size": 2, "hidden_size": 768, "num_hidden_layers": 2}
    config = FlashConfig.plus(**sizes, global_state="delta", is_decoder=True)
    exact = make_model(FlashModel, config, dtype=torch.float64, scale=0.06).to(DEVICE)
    x = torch.randn(rows, 290, 768, device=DEVICE, dtype=torch.bfloat16)
    found = []
    for dtype, backend in (
        (torch.float64, "torch"), (torch.bfloat16, "torch"), (torch.bfloat16, "triton"), (torch.bfloat16, "triton")
    ):  # fmt: skip
        model = copy.deepcopy(exact).to(dtype)
        model.config.backend, given, out = "torch", x.to(dtype), []
        with torch.no_grad():
            cache = model(inputs_embeds=given[:, :240], use_cache=True).past_key_values
            model.config.backend = backend
            for piece in given[:, 240:].split([*[1] * 35, 15] if rows < 5 else [1] * 50, 1):
                out.append(model(inputs_embeds=piece, past_key_values=cache).last_hidden_state)
        found.append((torch.cat(out, 1), *(x for layer in cache.layers for x in layer.state if x is not None)))
    exact, plain, ours, again = found
    assert all(map(torch.equal, ours, again))
    assert 0 < error_ratio(ours[0], exact[0]) <= 2 * error_ratio(plain[0], exact[0])


@pytest.mark.gpu
@pytest.mark.parametrize("rows, lengths", [(1, (1300,)), (5, (700,)), (2, (512, 256, 300)), (3, (90, 700))], ids=str)
def test_prompts_at_full_size(rows, lengths):
    """Two runs are bit-equal, the error is at most twice the torch tier's."""
    sizes = {"vocab_size": 2, "hidden_size": 768, "num_hidden_layers": 2}
    config = FlashConfig.plus(**sizes, global_state="delta", is_decoder=True)
    exact = make_model(FlashModel, config, dtype=torch.float64, scale=0.06).to(DEVICE)
    x = torch.randn(rows, sum(lengths), 768, device=DEVICE, dtype=torch.bfloat16)
    for padded in (False, True):
        mask = torch.ones(rows, sum(lengths), dtype=torch.bool, device=DEVICE)
        mask[0, : 40 * padded] = False
        found = []
        for dtype, backend in (
            (torch.float64, "torch"), (torch.bfloat16, "torch"), (torch.bfloat16, "triton"), (torch.bfloat16, "triton")
        ):  # fmt: skip
            with torch.no_grad():
                out, states = read_prompt(copy.deepcopy(exact).to(dtype), x, mask, lengths, backend)
            found.append((out, *(x for state in states for x in (state.total, state.opened, state.since))))
        assert all(map(torch.equal, found[2], found[3]))
        for expected, plain, ours, _ in zip(*found, strict=True):
            assert 0 < error_ratio(ours, expected) <= 2 * error_ratio(plain, expected)
