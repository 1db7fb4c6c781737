# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels equal the torch tier, forward and every gradient: on a GPU, or in triton's interpreter."""

import contextlib
import copy
import itertools
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

from flash_hf import (
    FlashConfig,
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashModel,
    backend_flash,
    cache_flash,
    modeling_flash,
)
from flash_hf.backend_flash import kernels_for
from flash_hf.chunking_flash import chunk_layout, is_transformed, resolve_documents
from flash_hf.modeling_flash import FlashGatedAttentionUnit
from helpers import assert_close, error_ratio, make_model, random_ids


pytest.importorskip("triton", reason="the kernels need triton: pip install flash-hf[kernels]")
from flash_hf import kernels  # noqa: E402
from flash_hf.kernels import launches, ops, tiles  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if kernels.unavailable(torch.device(DEVICE), torch.float32):
    pytest.skip("triton was imported without TRITON_INTERPRET=1, and there is no GPU", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("exact_float32")
LAYOUTS = ("odd", "whole chunks", "short", "padded", "packed")


def config_of(**changes) -> FlashConfig:
    defaults = {
        "vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "query_key_dim": 16, "chunk_size": 16,
        "max_position_embeddings": 128, "is_decoder": True, "backend": "triton",
    }  # fmt: skip
    return FlashConfig(**{**defaults, **changes})


def narrow(**changes) -> FlashConfig:
    """For decoding: a step has two programs per row instead of four, which halves the interpreter's time."""
    return config_of(**{"hidden_size": 16, **changes})


PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}


def marks_of(layout: str, length: int = 45) -> tuple[int, dict]:
    """The length of two rows, and the arguments that mark what is padding and where documents begin."""
    if layout == "padded":
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :6] = mask[1, 19:23] = mask[1, 41:] = 0
        return length, {"attention_mask": mask.to(DEVICE)}
    if layout == "packed":
        first, second = length // 3, length // 5
        position = torch.cat([torch.arange(n) for n in (first, second, length - first - second)])
        return length, {"position_ids": position[None].repeat(2, 1).to(DEVICE)}
    return {"odd": length, "whole chunks": 64, "short": 5}[layout], {}


def through(model, x, marks, weight):
    """The output at real tokens, and the gradients of the input and of every parameter."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(inputs_embeds=x, use_cache=False, **marks).last_hidden_state
    real = marks.get("attention_mask", torch.ones(out.shape[:2], device=out.device))[..., None]
    (out.double() * weight * real).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return (out * real).detach(), {"input": x.grad, **grads}


def compare(config, layout, dtype=torch.float32, *, whole=True, length=45, scale=0.3, draws=1):
    """Kernels and torch tier against the torch tier in float64: errors of the output and of every gradient.

    Args:
        draws: of weights and inputs, whose errors are taken together. The error of a gradient that is summed over
            tokens may be next to one number times a fixed vector (that of the global queries' offsets: the mean key),
            and one number may come out small by chance.
    """
    errors: dict[str, torch.Tensor] = {}
    for seed in range(draws):
        for name, squares in squared_errors(config, layout, dtype, whole, length, scale, seed).items():
            errors[name] = errors.get(name, 0) + squares
    for name, (fast, plain, truth, numbers) in errors.items():
        if truth == 0:
            assert fast == 0, name
            continue
        # The rounding errors of a few numbers may cancel by chance in one of the two: the fewer, the more.
        wide, narrow = (400, 16) if name == "scalars" else (32, 0.25 if numbers < 100 * draws else 0)
        chance = wide if dtype == torch.float32 else narrow
        limit = 2 * (plain / truth) ** 0.5 + chance * torch.finfo(dtype).eps
        assert (fast / truth) ** 0.5 <= limit, (name, layout)


def squared_errors(config, layout, dtype, whole, length, scale, seed) -> dict[str, torch.Tensor]:
    """Of the output and of every gradient: the squared errors of kernels and torch tier, the square of the truth, and
    how many numbers that is."""
    config.backend = "triton"
    model = make_model(FlashModel, config, dtype=dtype, scale=scale, seed=seed).to(DEVICE)
    model.train(config.hidden_dropout > 0)
    if not whole:
        for layer in model.layers:
            layer.gau.u_proj.register_forward_hook(lambda *_: None)  # then the projections are called one by one
    tokens, marks = marks_of(layout, length)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, config.hidden_size, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(2, tokens, config.hidden_size, generator=generator).double().to(DEVICE)
    fast = through(model, x, marks, weight)
    config.backend = "torch"
    model.config.backend = "torch"
    plain = through(model, x, marks, weight)
    exact = through(model.double(), x.double(), marks, weight)
    assert fast[1].keys() == exact[1].keys()
    fast, plain, exact = ({"output": out.double(), **together(grads)} for out, grads in (fast, plain, exact))
    return {
        name: torch.stack([
            (fast[name] - truth).square().sum(), (plain[name] - truth).square().sum(), truth.square().sum(),
            torch.tensor(truth.numel()).to(truth),
        ])
        for name, truth in exact.items()
    }  # fmt: skip


def together(grads: dict) -> dict:
    """Gradients by name, those of single numbers (gains, scales) as one vector."""
    scalars = torch.stack([grad.double() for grad in grads.values() if grad.numel() == 1])
    return {**{name: grad.double() for name, grad in grads.items() if grad.numel() > 1}, "scalars": scalars}


FORMS = {"paper": {}, "ours": {"chunk_shift": 6, "global_form": "previous_token"}}
LOCAL_KEYS = {**FORMS["ours"], "local_key_shift": True}
DELTA = {**LOCAL_KEYS, "global_state": "delta"}
GLOBAL_DELTA = {**FORMS["ours"], "attention_type": "global", "global_state": "delta"}
forms = pytest.mark.parametrize("form", FORMS)


# A quarter of all combinations: each layout with a setting of the other three and its opposite, and all eight in all.
# A GPU runs all, in bfloat16.
QUARTER = [
    pytest.param(layout, causal, whole, form, id=f"{layout}-{causal}-{'layer' if whole else 'attention'}-{form}")
    for at, layout in enumerate(LAYOUTS) for causal in (True, False) for whole in (True, False) for form in FORMS
    if min(code := 4 * causal + 2 * whole + (form == "ours"), 7 - code) == at % 4
]  # fmt: skip


@pytest.mark.parametrize("layout, causal, whole, form", QUARTER)
def test_kernels_equal_the_torch_tier(layout, causal, whole, form):
    compare(config_of(is_decoder=causal, **FORMS[form]), layout, whole=whole)


def test_a_plan_moves_to_another_device_with_its_index():
    documents = resolve_documents(2, 45, torch.device("cpu"))
    layout = chunk_layout(documents, 2, 16, causal=True)
    plan = kernels.chunk_plan(layout, 2, causal=True, width=32, normalization="mean", chunk_size=16).to("meta")
    assert plan.index.pieces == 6 and {tensor.device.type for tensor in plan.index} == {"meta"}


VARIANTS = {
    "local": {"attention_type": "local"},
    "global": {"attention_type": "global"},
    "quadratic": {"attention_type": "quadratic"},
    "quadratic, rotary bias, layer norm": {
        "attention_type": "quadratic", "relative_bias": "rotary", "norm_type": "layer_norm",
    },
    "no bias": {"relative_bias": None},
    "rotary bias": {"relative_bias": "rotary"},
    "quadratic, rotary bias, interleaved, partial rope": {
        "attention_type": "quadratic", "relative_bias": "rotary", "rope_interleaved": True, **PARTIAL,
    },
    "t5 bias, no rope": {"relative_bias": "t5", "use_rope": False},
    "interleaved": {"rope_interleaved": True},
    "partial rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "over chunk": {"global_normalization": "chunk"},
    "layer norm": {"norm_type": "layer_norm"},
    "relu": {"hidden_act": "relu"},
    "odd sizes": {"chunk_size": 11, "query_key_dim": 10, "hidden_size": 24},
    "shifted": {"chunk_shift": 9, "num_hidden_layers": 2},
    "shifted, local, odd sizes": {
        "chunk_size": 11, "query_key_dim": 10, "hidden_size": 24, "attention_type": "local", "chunk_shift": 10,
        "num_hidden_layers": 2,
    },
    "previous": {"global_form": "previous_token"},
    "previous, global, odd sizes": {
        "chunk_size": 11, "query_key_dim": 10, "hidden_size": 24, "attention_type": "global", "relative_bias": None,
        "global_form": "previous_token",
    },
    "previous, interleaved, partial rope": {
        "global_form": "previous_token", "rope_interleaved": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "previous, no rope": {"global_form": "previous_token", "use_rope": False, "hidden_act": "relu"},
    "local keys": {"local_key_shift": True},
    "local keys, previous, shifted": {
        "local_key_shift": True, "global_form": "previous_token", "chunk_shift": 6, "num_hidden_layers": 2,
    },
    "local keys, local, interleaved, partial rope, odd chunks": {
        "local_key_shift": True, "attention_type": "local", "rope_interleaved": True, "chunk_size": 11,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "local keys, no rope": {"local_key_shift": True, "use_rope": False, "query_key_dim": 10},
}  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_torch_tier(variant, causal):
    compare(config_of(**{"is_decoder": causal, "num_hidden_layers": 1, **VARIANTS[variant]}), "odd")


@pytest.mark.parametrize(
    "layout, causal, whole", [("padded", True, True), ("packed", False, False), ("packed", True, True)]
)
def test_local_keys_of_padded_and_packed_rows(layout, causal, whole):
    compare(config_of(is_decoder=causal, **LOCAL_KEYS), layout, whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("layout, causal, form", [("odd", True, "paper"), ("padded", False, "ours")])
def test_several_tiles_of_a_chunk(layout, causal, form):
    form = {"num_hidden_layers": 1} if form == "paper" else {**FORMS[form], "chunk_shift": 130}
    compare(config_of(is_decoder=causal, chunk_size=150, **form), layout, length=333)


def rotary_bias_and_gradient(bias, rotary, d_bias, kernel):
    """The bias, and the gradient of its weight."""
    bias.weight.grad = None
    out = kernels.rotary_bias(bias, rotary) if kernel else bias(len(rotary[0]), rotary)
    out.backward(d_bias.to(out.dtype))
    return out.detach(), bias.weight.grad


ROTARY_BIASES = {  # query_key_dim, rotated dimensions, length
    "one pair": (2, 2, 1), "odd sizes": (22, 10, 37), "all turned": (128, 128, 600), "rest": (96, 64, 513),
}  # fmt: skip


# Triton's interpreter cuts bfloat16 off instead of rounding.
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sizes", ROTARY_BIASES)
def test_rotary_bias_equals_the_torch_tiers(sizes, interleaved, dtype):
    S, turned, length = ROTARY_BIASES[sizes]
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": turned / S}
    config = config_of(query_key_dim=S, rope_interleaved=interleaved, relative_bias="rotary", rope_parameters=rope)
    model = FlashModel(config).to(DEVICE)
    generator = torch.Generator().manual_seed(length)
    bias = model.layers[0].gau.relative_bias.to(dtype)
    with torch.no_grad():
        bias.weight.copy_(torch.randn(2, S, generator=generator))
    offsets = torch.arange(1 - length, length, device=DEVICE)
    rotary = model.rotary_emb(bias.weight, offsets)
    assert rotary[0].shape == (2 * length - 1, turned // 2)
    d_bias = torch.randn(2 * length - 1, generator=generator).to(DEVICE, dtype)
    fast = rotary_bias_and_gradient(bias, rotary, d_bias, True)
    again = rotary_bias_and_gradient(bias, rotary, d_bias, True)
    plain = rotary_bias_and_gradient(bias, rotary, d_bias, False)
    exact = rotary_bias_and_gradient(bias.double(), model.rotary_emb(bias.weight, offsets), d_bias.double(), False)
    for ours, rerun, theirs, true in zip(fast, again, plain, exact, strict=True):
        assert ours.dtype == dtype and torch.equal(ours, rerun)
        # In bfloat16 the rounding of the result alone, which may be next to nothing for torch by chance.
        chance = 4 if dtype == torch.float32 else 0.5
        assert error_ratio(ours, true) <= 2 * error_ratio(theirs, true) + chance * torch.finfo(dtype).eps


def test_the_rotary_bias_is_one_launch_each_way(monkeypatch):
    """In a model's forward and backward, whole layers or not, also with bfloat16 products and a frozen bias."""
    counts = dict.fromkeys(("launch_rotary_bias", "launch_rotary_bias_gradient"), 0)

    def counted(name):
        launch = getattr(ops, name)

        def call(*arguments):
            counts[name] += 1
            return launch(*arguments)

        return call

    for name in counts:
        monkeypatch.setattr(ops, name, counted(name))
    config = config_of(attention_type="quadratic", relative_bias="rotary", num_hidden_layers=2)
    model = make_model(FlashModel, config, dtype=torch.float32).to(DEVICE)
    x = torch.randn(2, 21, config.hidden_size, device=DEVICE)
    biases = [layer.gau.relative_bias for layer in model.layers]
    with torch.autocast(DEVICE, torch.bfloat16):
        model(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    assert list(counts.values()) == [2, 2]
    assert all(bias.weight.grad.dtype == torch.float32 and bias.weight.grad.any() for bias in biases)
    biases[0].weight.requires_grad_(False)
    biases[1].register_forward_hook(lambda *_: None)  # called as a module
    model.layers[0].gau.u_proj.register_forward_hook(lambda *_: None)
    model(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
    assert list(counts.values()) == [3, 2]


def test_rotary_bias_compiles_in_one_graph():
    config = config_of(relative_bias="rotary", query_key_dim=20, rope_interleaved=True, **PARTIAL)
    model = FlashModel(config).to(DEVICE)
    bias = model.layers[0].gau.relative_bias
    rotary = model.rotary_emb(bias.weight, torch.arange(-8, 9, device=DEVICE))
    d_bias = torch.randn(17, device=DEVICE)
    expected = rotary_bias_and_gradient(bias, rotary, d_bias, True)
    bias.weight.grad = None
    compiled = torch.compile(lambda: kernels.rotary_bias(bias, rotary), backend="aot_eager", fullgraph=True)()
    compiled.backward(d_bias)
    assert torch.equal(compiled, expected[0]) and torch.equal(bias.weight.grad, expected[1])
    torch.library.opcheck(ops.rotary_bias_op, (bias.weight, *rotary, True))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_quadratic_attention_in_parts_of_some_rows(causal, whole, monkeypatch):
    parts, launch = [], launches.launch_scores
    monkeypatch.setattr(launches, "MOST_WEIGHTS", 1)
    monkeypatch.setattr(launches, "launch_scores", lambda *a: parts.append(a) or launch(*a))
    compare(config_of(is_decoder=causal, attention_type="quadratic", num_hidden_layers=1), "odd", whole=whole)
    assert len(parts) == 2 * 2  # rows, forward and backward


def test_quadratic_attention_beside_a_hook_is_the_torch_tiers(monkeypatch):
    config = config_of(attention_type="quadratic", num_hidden_layers=1)
    model = make_model(FlashModel, config, dtype=torch.float32).to(DEVICE)
    x = torch.randn(2, 45, config.hidden_size, device=DEVICE)
    expected = model(inputs_embeds=x, use_cache=False).last_hidden_state
    model.layers[0].gau.offset_scale.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(launches, "launch_scores", None)
    assert_close(model(inputs_embeds=x, use_cache=False).last_hidden_state, expected, 1e-5)


def test_quadratic_attention_with_a_cache_is_the_torch_tiers(monkeypatch):
    model = make_model(FlashModel, config_of(attention_type="quadratic", num_hidden_layers=2), dtype=torch.float32)
    x = torch.randn(2, 45, 32, device=DEVICE)
    expected = model.to(DEVICE)(inputs_embeds=x, use_cache=False).last_hidden_state
    monkeypatch.setattr(launches, "launch_scores", None)
    first = model(inputs_embeds=x[:, :30], use_cache=True)
    then = model(inputs_embeds=x[:, 30:], past_key_values=first.past_key_values).last_hidden_state
    assert_close(torch.cat([first.last_hidden_state, then], 1), expected, 1e-4)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_quadratic_attention_over_marked_rows_is_the_torch_tiers(layout, monkeypatch):
    monkeypatch.setattr(launches, "launch_scores", None)
    compare(config_of(attention_type="quadratic", num_hidden_layers=1), layout)


@forms
@pytest.mark.parametrize("causal", [True, False])
def test_float16_error_is_at_most_twice_the_torch_tiers(causal, form):
    compare(config_of(is_decoder=causal, **FORMS[form]), "odd", torch.float16, scale=0.2)


@pytest.mark.parametrize("form", ["ours"])
def test_many_pieces_of_a_document(monkeypatch, form):
    """Long documents are summed in pieces; here each chunk is one."""
    monkeypatch.setattr(kernels.plan, "LONGEST_PIECE", 1)
    for causal in (True, False):
        for layout in ("odd", "packed"):
            compare(config_of(is_decoder=causal, **FORMS[form]), layout, length=55)


@forms
@pytest.mark.parametrize("causal", [True, False])
def test_gpus_without_descriptors(monkeypatch, causal, form):
    """Before Hopper tiles are loaded by pointers, and the output projection is torch's."""
    for module in (tiles, launches):
        monkeypatch.setattr(module, "has_tma", lambda device: False)
    compare(config_of(is_decoder=causal, **FORMS[form]), "whole chunks")


@forms
def test_two_runs_are_bit_equal(form):
    model = make_model(FlashModel, config_of(**FORMS[form]), dtype=torch.float32).to(DEVICE)
    x = torch.randn(2, 45, 32, device=DEVICE)
    first, second = (through(model, x, {}, 1.0) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout, form", [("odd", FORMS["paper"]), ("padded", LOCAL_KEYS), ("packed", DELTA)], ids=str)
def test_dropout_follows_the_kernels_of_a_layer(layout, form, dtype, monkeypatch):
    """With the same numbers dropped in all tiers."""
    fused, wide = [], dtype == torch.bfloat16

    def drop(x, p=0.5, training=True):
        assert p == 0.25 and training
        kept = torch.bernoulli(torch.full(x.shape, 0.75), generator=torch.Generator().manual_seed(0))
        return x * kept.to(x) / 0.75

    def layer(*arguments):
        fused.append(arguments)
        return backend_flash.fused_layer(*arguments)

    monkeypatch.setattr(nn.functional, "dropout", drop)
    monkeypatch.setattr(modeling_flash, "fused_layer", layer)
    sizes = {"chunk_size": 64, "query_key_dim": 64, "hidden_size": 256} if wide else {}
    how = {"length": 777, "scale": 0.06, "draws": 4} if wide else {}
    compare(config_of(hidden_dropout=0.25, **sizes, **form), layout, dtype, **how)
    assert len(fused) == 2 * how.get("draws", 1)


@forms
def test_checkpointing_changes_nothing(form):
    model = make_model(FlashModel, config_of(**FORMS[form]), dtype=torch.float32).to(DEVICE).train()
    x = torch.randn(2, 45, 32, device=DEVICE)
    plain = through(model, x, {}, 1.0)
    model.gradient_checkpointing_enable()
    again = through(model, x, {}, 1.0)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(plain[1][name], again[1][name]) for name in plain[1])


@pytest.mark.parametrize("wide, dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float32,) * 2])
@pytest.mark.parametrize("gates", [False, True])
def test_weights_are_joined_beside_the_norm(gates, wide, dtype):
    """The same bits as those of `torch.cat` and of its cast, for which triton's interpreter cuts bits off."""
    D, rows = 48, (80, 80, 16, *[2] * gates)
    x, gain, *weights = (torch.randn(size, device=DEVICE).to(wide) for size in ((90, D), (), *((n, D) for n in rows)))
    weights[0][0, :3] = torch.tensor([-0.0, float("inf"), -float("inf")])
    padding = [torch.zeros(launches.GATE_COLUMNS - 2, D, device=DEVICE, dtype=wide)] * gates

    def as_cast(x):
        cuts = DEVICE == "cpu" and wide != dtype
        return (x.view(torch.int32) & -(2**16)).view(wide).to(dtype) if cuts else x.to(dtype)

    expected = as_cast(torch.cat([*weights, *padding]))
    rms, joined = torch.full((90,), float("nan"), device=DEVICE), torch.full_like(expected, float("nan"))
    cast = torch.full_like(x, float("nan"), dtype=dtype)
    launches.launch_norm(x, gain, 1e-5, rms, cast, cast=x.dtype != dtype, weights=weights, joined=joined)
    kind = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(joined.view(kind), expected.view(kind))
    assert_close(rms, (x.float().square().mean(1) + 1e-5).rsqrt(), 1e-6)
    assert x.dtype == dtype or torch.equal(cast, as_cast(x))


def test_norms_of_many_tokens(monkeypatch):
    """A program takes several blocks of tokens, of which the last have none."""
    monkeypatch.setattr(launches, "NORM_BLOCKS", 1)
    x, gain = torch.randn(1100, 48, device=DEVICE), torch.tensor(1.5, device=DEVICE)
    expected = (x.square().mean(1) + 1e-6).rsqrt()
    rms, out = torch.full_like(expected, torch.nan), torch.full_like(x, torch.nan)
    launches.launch_norm(x, gain, 1e-6, rms, out, cast=False, scale=True)
    torch.testing.assert_close(rms, expected)
    torch.testing.assert_close(out, 1.5 * x * expected[:, None])


def test_a_gain_of_zero_has_a_gradient():
    model = make_model(FlashModel, config_of(), dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        for layer in model.layers:
            layer.norm.weight.zero_()
    x = torch.randn(2, 45, 32, device=DEVICE)
    fast = through(model, x, {}, 1.0)[1]
    model.config.backend = "torch"
    exact = through(model, x, {}, 1.0)[1]
    for i in range(2):
        assert exact[f"layers.{i}.norm.weight"].abs() > 1e-3
        assert_close(fast[f"layers.{i}.norm.weight"], exact[f"layers.{i}.norm.weight"], 1e-4)


@pytest.mark.parametrize("causal, form", [(True, "ours"), (False, "paper")])
def test_compiles_to_one_graph(causal, form):
    config = config_of(is_decoder=causal, **FORMS[form])
    model = make_model(FlashModel, config, dtype=torch.float32).to(DEVICE)
    x = torch.randn(2, 45, 32, device=DEVICE)
    expected = through(model, x, {}, 1.0)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got = through(compiled, x, {}, 1.0)
    assert_close(got[0], expected[0], 1e-5)
    for name, value in expected[1].items():
        assert_close(got[1]["_orig_mod." + name if name != "input" else name], value, 1e-4, name)


@pytest.mark.parametrize("causal, lin", [(True, True), (False, True), (True, False)])
def test_operators_pass_opcheck(causal, lin):
    torch.manual_seed(0)
    D, E, S, C, N = 32, 64, 16, 16, 35
    layout = chunk_layout(resolve_documents(2, N, torch.device(DEVICE)), 2, C, causal=causal)
    plan = kernels.chunk_plan(layout, 2, causal=causal, width=E, normalization="mean", chunk_size=C)

    def new(*shape):
        return torch.randn(shape, device=DEVICE).requires_grad_()

    x, gain = new(2 * N, D), new()
    u, v, z = new(2 * N, E), new(2 * N, E), new(2 * N, S)
    H = 4 if lin else 2
    heads, bias, no_gates = (new(H, S), new(H, S)), new(2 * C - 1), (None, None)
    angle = torch.rand(3 * C, S // 2, device=DEVICE)
    tables = *heads, *no_gates, bias, angle.cos(), angle.sin(), None, *tiles.Cached(), list(plan.index)
    options = dict(
        B=2, N=N, G=plan.chunks, C=C, shift=plan.shift, E=E, S=S, H=H, causal=causal, quad=True, lin=lin,
        previous=False, local_shift=False, delta=False, silu=True, interleaved=False, rotary_dim=S, scale=1 / C,
        dtype=torch.float32, residual=True, want_final=False,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    checks += ("test_aot_dispatch_dynamic",) * causal
    torch.library.opcheck(ops.gated_attention.operator, (u, v, z, *tables), {**options, "D": 0}, test_utils=checks)
    weights = new(E, D), new(E), new(E, D), new(E), new(S, D), new(S), new(D, E), new(D)
    torch.library.opcheck(
        ops.layer.operator, (x, gain, *weights, *tables), {**options, "D": D, "eps": 1e-5, "residual": lin},
        test_utils=checks,
    )  # fmt: skip
    torch.library.opcheck(ops.scale_norm_op, (x, gain, 1e-5), test_utils=checks)


@pytest.mark.parametrize("form", [{}, LOCAL_KEYS, {"attention_type": "local"}], ids=str)
def test_the_open_chunks_operator_passes_opcheck(form, monkeypatch):
    calls, open_chunk = [], ops.open_chunk
    monkeypatch.setattr(ops, "open_chunk", lambda *a, **k: calls.append((a, k)) or open_chunk(*a, **k))
    config = config_of(is_decoder=True, num_hidden_layers=1, **form)
    model = make_model(FlashModel, config, dtype=torch.float32).to(DEVICE)
    with torch.no_grad():
        model(inputs_embeds=torch.randn(2, 35, 32, device=DEVICE), use_cache=True)
    (((tensors, shape), options),) = calls
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    options = {**ops.by_name(shape), **options}
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in ops.plain(tensors)]
    torch.library.opcheck(ops.open_chunk_op, tuple(arguments), options, test_utils=checks)


def test_equal_prefills_make_their_places_once(monkeypatch):
    """And no others: of a cache that is continued or records, of another length, or of a step."""
    made, make = [], FlashModel.make_places
    monkeypatch.setattr(FlashModel, "make_places", lambda *a: made.append(1) or make(*a))
    model = make_model(FlashModel, config_of(is_decoder=True), dtype=torch.float32).to(DEVICE)
    x = torch.randn(2, 20, 32, device=DEVICE)

    def fill(x, cache=None, **marks):
        out = model(inputs_embeds=x, use_cache=True, past_key_values=cache, **marks)
        return out.last_hidden_state, out.past_key_values, len(made)

    with torch.no_grad():
        first, cache, count = fill(x)
        assert count == 1
        static = StaticCache(config=model.config, max_cache_len=40)
        for other in (None, static):
            again, _, count = fill(x, other)
            assert count == 1 and torch.equal(again, first)
        assert fill(x, cache)[2] == 2
        assert fill(x[:, :1], cache)[2] == 3 and fill(x[:, :1])[2] == 4
        mask = torch.ones(2, 20, device=DEVICE)
        assert fill(x, attention_mask=mask)[2] == 4
        mask[0, :3] = 0
        assert fill(x, attention_mask=mask)[2] == 5
        recording = DynamicCache(config=model.config)
        recording.activate_past_recording()
        assert fill(x, recording)[2] == 6
        assert fill(x[:, :19])[2] == 7
        model(inputs_embeds=x[:, :19], use_cache=False)
        assert len(made) == 8


def test_dispatch_modes_see_operators():
    """Eager calls go round the dispatcher; a dispatch mode sees the operators, and gets the same results."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func))
            return func(*args, **kwargs or {})

    model = make_model(FlashModel, config_of(num_hidden_layers=1), dtype=torch.float32).to(DEVICE)
    x = torch.randn(2, 20, 32, device=DEVICE)
    plain, seen = through(model, x, {}, 1.0), set()
    with Watch():
        assert is_transformed()
        watched = through(model, x, {}, 1.0)
    assert {"flash_hf.layer.default", "flash_hf.layer_backward.default"} <= seen
    assert torch.equal(plain[0], watched[0])
    assert all(torch.equal(plain[1][name], watched[1][name]) for name in plain[1])


@pytest.mark.parametrize("watched", [False, True])
def test_second_derivatives_are_refused(watched):
    """Also where there is a way around the kernels, by which alone they would be wrong."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    model = make_model(FlashModel, config_of(num_hidden_layers=1, relative_bias="rotary"), dtype=torch.float32)
    x = torch.randn(2, 20, 32, device=DEVICE, requires_grad=True)
    layer = model.to(DEVICE).layers[0]
    message = "autograd formula" if watched else "second derivatives"  # of an operator's gradient, torch's own words
    for compute in (
        lambda: model(inputs_embeds=x, use_cache=False).last_hidden_state,
        lambda: x + ops.scale_norm(x, layer.norm.weight, 1e-5),
    ):
        with Watch() if watched else contextlib.nullcontext(), pytest.raises(RuntimeError, match=message):
            first = torch.autograd.grad(compute().square().sum(), x, create_graph=True)[0]
            torch.autograd.grad(first.square().sum(), x)


# ------------------------------------------------------------------------------------------------------------------
# Prefill and decoding
# ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, static",
    [
        ({}, False), ({}, True), ({"attention_type": "local"}, False), ({"attention_type": "global"}, True),
        ({"chunk_size": 11, "query_key_dim": 10}, False), ({"chunk_shift": 5}, True),
        ({"global_form": "previous_token"}, False),
        ({"chunk_shift": 3, "global_form": "previous_token", "chunk_size": 11, "query_key_dim": 10}, True),
        ({**LOCAL_KEYS, "chunk_size": 11, "query_key_dim": 12}, True),
        ({"local_key_shift": True, "rope_interleaved": True, "attention_type": "local"}, False),
        ({"local_key_shift": True, "use_rope": False, "chunk_size": 2, "query_key_dim": 10}, False),
        ({"local_key_shift": True, **PARTIAL}, False),
        (DELTA, False), ({**DELTA, "global_form": "paper"}, True),
        ({**GLOBAL_DELTA, "chunk_size": 11, "query_key_dim": 10}, True),
    ],
    ids=[
        "mixed", "mixed, static", "local", "global", "odd sizes", "shifted", "previous", "shifted previous",
        "local keys", "local keys, interleaved", "local keys, no rope", "local keys, partial rope",
        "delta", "delta, static", "delta, global",
    ],
)  # fmt: skip
def test_prefill_and_steps_equal_the_torch_tier(changes, static, monkeypatch):
    # With a static cache between projections by cuBLAS, as with many rows.
    monkeypatch.setattr(backend_flash, "MOST_STEP_ROWS", 0 if static else 64)
    name = "attention_step" if static else "layer_step"
    steps, step = [], getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *a, **k: steps.append(1) or step(*a, **k))
    config = narrow(**changes)
    model = make_model(FlashForCausalLM, config, dtype=torch.float32).to(DEVICE)
    ids = random_ids(config, 2, 55).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    model.config.backend = "torch"
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.config.backend = "triton"
        cache = StaticCache(config=config, max_cache_len=64) if static else None
        # Over a border, on the border of a chunk in no row, token by token over the next one of a row at least.
        out, logits = None, []
        for begin, end in ((0, 23), (23, 45), *((t, t + 1) for t in range(45, 55))):
            out = model(
                ids[:, begin:end], attention_mask=mask[:, :end], use_cache=True,
                past_key_values=cache if out is None else out.past_key_values,
            )  # fmt: skip
            logits.append(out.logits)
    real = mask[..., None]
    assert_close(torch.cat(logits, 1) * real, expected * real, 1e-5)
    assert len(steps) == 10 * config.num_hidden_layers


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize(
    "padded, changes, whole",
    [
        (True, {}, True), (False, LOCAL_KEYS, True), (True, DELTA, True),
        (False, {**GLOBAL_DELTA, "global_form": "paper"}, False),
    ],
    ids=["mean, padded", "local keys", "delta, padded", "delta, global, between projections"],
)  # fmt: skip
def test_compiled_steps(padded, changes, whole, monkeypatch):
    """Layers by operators, with the positions before the step in each: inductor computes a position where it is
    used, from the count of tokens as it is then."""
    monkeypatch.setattr(backend_flash, "MOST_STEP_ROWS", 64 if whole else 0)
    model = make_model(FlashForCausalLM, narrow(num_hidden_layers=3, **changes), dtype=torch.float32).to(DEVICE)
    ids = random_ids(model.config, 2, 40).to(DEVICE)
    graphs, results = [], []
    compiled = torch.compile(
        model.__call__, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or compile_fx(graph, inputs)
    )
    for call in (model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=64)
        mask = torch.ones_like(ids)
        mask[0, :9] = not padded
        out = []
        with torch.no_grad():
            model(ids[:, :29], attention_mask=mask[:, :29], past_key_values=cache)
            for t in range(29, 34):
                marks = {"attention_mask": mask[:, : t + 1]} if padded else {}
                out.append(call(ids[:, t : t + 1], past_key_values=cache, **marks).logits)
        counts = [(layer.state.seen, layer.cumulative_length) for layer in cache.layers]
        results.append((torch.cat(out), *itertools.chain(*counts)))
    for one, other in zip(*results, strict=True):
        assert_close(one.double(), other.double(), 1e-5)
    own = torch.ops.flash_hf
    step = (own.gated_delta_step if model.config.global_state == "delta" else own.gated_step).default
    for graph in graphs:
        found = [node.target for node in graph.graph.nodes if str(node.target).startswith("flash_hf.")]
        assert found == ([own.project.default, step, own.add_output.default] if whole else [step]) * 3


STEP_FORMS = (
    {}, {"hidden_size": 24, "query_key_dim": 10}, DELTA, {**LOCAL_KEYS, "rope_interleaved": True},
    {"attention_type": "global", "use_rope": False}, {"attention_type": "local", "relative_bias": "rotary"},
)  # fmt: skip


@pytest.mark.parametrize("rows, changes", [
    *((1, form) for form in STEP_FORMS), *((20, form) for form in STEP_FORMS[:2])  # two tiles of rows
], ids=str)  # fmt: skip
def test_a_step_of_a_layer_is_that_of_its_modules(rows, changes, monkeypatch):
    """Of some rows and inputs with gaps between their rows, and where one token is padding."""
    config = narrow(is_decoder=True, use_scaled_sinusoid=False, **changes)  # which would make dense inputs
    model = make_model(FlashModel, config, dtype=torch.float32).to(DEVICE)
    x = torch.randn(rows, 22, model.config.hidden_size, device=DEVICE)
    mask = torch.ones(rows, 22, device=DEVICE)
    mask[0, 20] = 0
    calls, layer_step = [], kernels.layer_step
    monkeypatch.setattr(kernels, "layer_step", lambda *a, **k: calls.append(1) or layer_step(*a, **k))
    results = []
    for most in (64, rows - 1):
        monkeypatch.setattr(backend_flash, "MOST_STEP_ROWS", most)
        with torch.no_grad():
            cache = model(inputs_embeds=x[:, :19], use_cache=True).past_key_values
            for t in range(19, 22):
                marks = {"attention_mask": mask[:, t : t + 1]} if t == 20 else {}
                out = model(inputs_embeds=x[:, t : t + 1], past_key_values=cache, **marks).last_hidden_state
        results.append((out, *(x for layer in cache.layers for x in layer.state if x is not None)))
    assert len(calls) == 3 * model.config.num_hidden_layers
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-5) if one.is_floating_point() else torch.testing.assert_close(one, other)


@pytest.mark.parametrize("changes, cache", [
    ({}, "static"), ({}, "recorded"), (LOCAL_KEYS, "dynamic"), (LOCAL_KEYS, "recorded"),
    ({"attention_type": "local", "relative_bias": "rotary", "chunk_shift": 5, "local_key_shift": True}, "recorded"),
    ({"attention_type": "global", "use_rope": False}, "dynamic"),
    ({**LOCAL_KEYS, **PARTIAL, "rope_interleaved": True}, "recorded"),
    ({"chunk_size": 11, "hidden_size": 24, "query_key_dim": 10, "global_form": "previous_token"}, "static"),
    (DELTA, "recorded"), (GLOBAL_DELTA, "dynamic"),
    ({"chunk_size": 11, "query_key_dim": 10, "global_state": "delta", "chunk_shift": 3}, "static"),
], ids=str)  # fmt: skip
def test_a_few_tokens_are_steps_of_kernels(changes, cache, monkeypatch):
    """Over borders of chunks and with padding anywhere; a recorded cache is then rolled back amid the call."""
    monkeypatch.setattr(kernels, "gated_attention", None)  # of the grid, as is chunk_plan
    config = narrow(**changes)
    model = make_model(FlashForCausalLM, config, dtype=torch.float32).to(DEVICE)
    ids = random_ids(config, 2, 45).to(DEVICE)
    mask = torch.rand(2, 45, device=DEVICE) < 0.7
    mask[:, [18, 19, 30]] = True
    mask[1, 19:31] = False
    calls, layer_step = [], kernels.layer_step
    monkeypatch.setattr(kernels, "layer_step", lambda *a, **k: calls.append(1) or layer_step(*a, **k))
    found = []
    for backend in ("triton", "torch"):
        model.config.backend = "torch"
        options = {"past_key_values": StaticCache(config=config, max_cache_len=64)} if cache == "static" else {}
        with torch.no_grad():
            given = model(ids[:, :19], attention_mask=mask[:, :19].long(), use_cache=True, **options).past_key_values
            if cache == "recorded":
                given.activate_past_recording()
            model.config.backend, logits, states = backend, [], []
            for begin, end in ((19, 21), (21, 32), (32, 33), (33, 44)):
                marks = mask[:, begin:end]
                out = model(ids[:, begin:end], attention_mask=marks.long(), past_key_values=given).logits
                logits.append(out[marks])
                states += [layer.state.map(torch.clone) for layer in given.layers]
            if cache == "recorded":
                given.crop(-15)  # to the middle of the second call
                logits.append(model(ids[:, :3], past_key_values=given).logits.flatten(0, 1))
            assert int(given.get_seq_length()) == (32 if cache == "recorded" else 44)
            model.config.backend = "torch"
            logits.append(model(ids, past_key_values=given).logits.flatten(0, 1))
        found.append((torch.cat(logits), *(x for state in states for x in (state.total, state.seen) if x is not None)))
    assert len(calls) == (5 if cache == "recorded" else 4) * config.num_hidden_layers
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-5) if ours.is_floating_point() else torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("hooked", [None, "v_proj"])
@pytest.mark.parametrize("changes", [LOCAL_KEYS, DELTA], ids=str)
def test_a_rollback_takes_the_kept_steps_again(changes, hooked, monkeypatch):
    """By the same kernel; no keys are made."""
    config = narrow(**changes)
    model = make_model(FlashForCausalLM, config, dtype=torch.float32).to(DEVICE)
    if hooked is not None:
        getattr(model.model.layers[1].gau, hooked).register_forward_hook(lambda *_: None)
    ids = random_ids(config, 2, 40).to(DEVICE)
    mask = torch.rand(2, 40, device=DEVICE) < 0.7
    mask[:, 18:20] = True
    with torch.no_grad():
        model.config.backend = "torch"
        caches = [model(ids[:, :19], attention_mask=mask[:, :19].long(), use_cache=True).past_key_values
                  for _ in range(2)]  # fmt: skip
        model.config.backend = "triton"
        for begin, end in ((19, 20), (20, 25), (25, 27)):
            model(ids[:, begin:end], attention_mask=mask[:, begin:end].long(), past_key_values=caches[1])
        caches[0].activate_past_recording()
        monkeypatch.setattr(FlashGatedAttentionUnit, "query_keys", None)
        for begin, end, removed in ((19, 20, 0), (20, 26, 1), (25, 27, 1), (26, 30, 3), (27, 28, 1)):
            model(ids[:, begin:end], attention_mask=mask[:, begin:end].long(), past_key_values=caches[0])
            caches[0].crop(-removed)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == 27
        for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
            assert torch.equal(layer.state.seen, other.state.seen)
            assert_close(layer.state.total, other.state.total, 1e-6)
        assert_close(*(model(ids[:, 27:30], past_key_values=cache).logits for cache in caches), 1e-6)


@pytest.mark.parametrize("change", ["select", "copy", "file", "shards"])
@pytest.mark.parametrize("changes", [LOCAL_KEYS, DELTA], ids=["mean", "delta"])
def test_recorded_steps_move_with_their_cache(changes, change, tmp_path, monkeypatch):
    """Rows are selected, and caches copied and stored, amid recorded calls. Copies do not hold the model, nor do
    caches where weights may be sharded after a call."""
    config = narrow(**changes)
    model = make_model(FlashForCausalLM, config, dtype=torch.float32).to(DEVICE)
    ids, rows = random_ids(config, 3, 26).to(DEVICE), [2, 0] if change == "select" else [0, 1, 2]
    with torch.no_grad():
        model.config.backend = "torch"
        expected = model(ids[rows]).logits[:, 21:]
        cache = model(ids[:, :19], use_cache=True).past_key_values
        model.config.backend = "triton"
        cache.activate_past_recording()
        if change == "shards":
            monkeypatch.setattr(backend_flash, "is_distributed", lambda: True)
            monkeypatch.setattr(cache_flash, "is_distributed", lambda: True)
        model(ids[:, 19:23], past_key_values=cache)
        if change == "select":
            cache.batch_select_indices(torch.tensor(rows, device=DEVICE))
        elif change == "copy":
            monkeypatch.setattr(nn.Module, "__deepcopy__", None, raising=False)
            cache = copy.deepcopy(cache)
        elif change == "file":
            monkeypatch.setattr(nn.Module, "__getstate__", None, raising=False)
            torch.save(cache, tmp_path / "cache.pt")
            cache = torch.load(tmp_path / "cache.pt", weights_only=False)
        assert change == "select" or all(isinstance(x, tuple) for layer in cache.layers for x in layer._recorded)
        model(ids[rows, 23:25], past_key_values=cache)
        cache.crop(-4)
        assert_close(model(ids[rows, 21:], past_key_values=cache).logits, expected, 1e-5)


@pytest.mark.parametrize("changes, replaced", [
    (LOCAL_KEYS, "v_proj"), (LOCAL_KEYS, "offset_scale"), (LOCAL_KEYS, "gau"), (DELTA, "gate_proj"),
    (DELTA, "offset_scale"),
], ids=str)  # fmt: skip
def test_a_few_tokens_through_hooked_modules(changes, replaced):
    """By the kernel of the attention, or one by one in PyTorch."""
    config = narrow(**changes, num_hidden_layers=2)
    model = make_model(FlashForCausalLM, config, dtype=torch.float32).to(DEVICE)
    ids, seen, found = random_ids(config, 2, 30).to(DEVICE), [], []
    for name, module in model.model.layers[1].named_modules():
        if name.endswith(replaced):
            module.register_forward_hook(lambda module, inputs, output: seen.append(1))
    for backend in ("triton", "torch"):
        model.config.backend = "torch"
        with torch.no_grad():
            cache = model(ids[:, :19], use_cache=True).past_key_values
            model.config.backend = backend
            found.append(torch.cat([model(ids[:, t : t + 5], past_key_values=cache).logits for t in (19, 24)], 1))
    assert_close(*found, 1e-5)
    assert len(seen) == 6


def test_which_calls_are_steps(monkeypatch):
    """A few tokens, of a few rows, in all; not with gradients, and never into another type of state."""
    model = make_model(FlashForCausalLM, config_of(num_hidden_layers=1, chunk_size=64), dtype=torch.float32).to(DEVICE)
    ids, calls, layer_step = random_ids(model.config, 8, 60).to(DEVICE), [], kernels.layer_step
    monkeypatch.setattr(kernels, "layer_step", lambda block, x, *a, **k: calls.append(x.shape[:2]) or
                        layer_step(block, x, *a, **k))  # fmt: skip
    for rows, tokens, grad in ((1, 32, False), (4, 16, False), (5, 16, False), (1, 33, False), (1, 2, True)):
        with torch.no_grad():
            cache = model(ids[:rows, :19], use_cache=True).past_key_values
        with torch.set_grad_enabled(grad):
            model(ids[:rows, 19 : 19 + tokens], past_key_values=cache)
    assert calls == [(1, 32), (4, 16)]
    layer = cache.layers[0]
    layer.state = layer.state.map(lambda x: x if x.dtype == torch.long else x.double())
    with torch.no_grad():
        model(ids[:1, :2], past_key_values=cache)
    assert len(calls) == 2


@pytest.mark.parametrize("form", [*FORMS.values(), LOCAL_KEYS, {"local_key_shift": True}], ids=str)
def test_chunked_prefill_continues_on_the_border(form):
    config = narrow(**form)
    model = make_model(FlashForCausalLM, config, dtype=torch.float32).to(DEVICE)
    ids = random_ids(config, 2, 80).to(DEVICE)
    # The border of a chunk of the first layer, and of the second.
    for border in (32, 16 - config.chunk_shift):
        with torch.no_grad():
            whole = model(ids, use_cache=True)
            out = model(ids[:, :border], use_cache=True)
            rest = model(ids[:, border:], past_key_values=out.past_key_values)
        assert_close(rest.logits, whole.logits[:, border:], 1e-5)
        for ours, theirs in zip(rest.past_key_values.layers, whole.past_key_values.layers, strict=True):
            assert_close(ours.state.total, theirs.state.total, 1e-5)
            assert torch.equal(ours.state.seen, theirs.state.seen)


@pytest.mark.parametrize(
    "form",
    [
        FORMS["ours"], {"attention_type": "local"}, {"attention_type": "global"}, LOCAL_KEYS,
        {"local_key_shift": True, "rope_interleaved": True, "query_key_dim": 10},
        {"local_key_shift": True, "attention_type": "local", "chunk_shift": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_call_continues_inside_a_chunk(form, monkeypatch):
    """With kernels: rows at different places of their chunks, one that only pads meanwhile, one that only begins."""
    config = narrow(**form)
    model = make_model(FlashForCausalLM, config, dtype=torch.float32).to(DEVICE)
    ids = random_ids(config, 4, 50).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, 21:44] = mask[3, :21] = 0
    plans, chunk_plan = [], kernels.chunk_plan
    monkeypatch.setattr(kernels, "chunk_plan", lambda *a, **k: plans.append(chunk_plan(*a, **k)) or plans[-1])
    logits, states = [], []
    for backend in ("triton", "torch"):
        model.config.backend = backend
        out, found = None, []
        with torch.no_grad():
            # Within the open chunk, over a border, one token, and once more.
            for begin, end in ((0, 21), (21, 24), (24, 44), (44, 45), (45, 50)):
                out = model(
                    ids[:, begin:end], attention_mask=mask[:, :end], use_cache=True,
                    past_key_values=None if out is None else out.past_key_values,
                )  # fmt: skip
                found.append(out.logits)
        logits.append(torch.cat(found, 1) * mask[..., None])
        states.append([layer.state for layer in out.past_key_values.layers])
    assert any(plan.cached for plan in plans)
    assert_close(*logits, 1e-5)
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(ours.seen, theirs.seen)
        if theirs.total is not None:
            assert_close(ours.total, theirs.total, 1e-5)


def test_a_state_that_kernels_cannot_take_is_left_to_torch():
    """A layer does not check what check_cache and the plan have checked once: neither strides nor types."""
    model = make_model(FlashForCausalLM, config_of(), dtype=torch.float32).to(DEVICE)
    ids = random_ids(model.config, 2, 20).to(DEVICE)

    def double(x):
        return x.double() if x.is_floating_point() else x

    def strided(x):
        return x.unsqueeze(-1).repeat_interleave(2, -1)[..., 0]

    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        for change in (double, strided):
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            for layer in cache.layers:
                layer._map(change)
            assert_close(model(ids[:, -1:], past_key_values=cache).logits, expected, 1e-5, change.__name__)


def test_gradients_through_a_call_inside_of_a_chunk_are_the_torch_tiers():
    model = make_model(FlashModel, config_of(is_decoder=True), dtype=torch.float32).to(DEVICE)
    x = torch.randn(2, 45, 32, device=DEVICE)
    grads = []
    for backend in ("triton", "torch"):
        model.config.backend = backend
        model.zero_grad()
        with torch.no_grad():
            cache = model(inputs_embeds=x[:, :21], use_cache=True).past_key_values
        model(inputs_embeds=x[:, 21:], past_key_values=cache).last_hidden_state.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_close(*grads, 1e-5)


@pytest.mark.parametrize(
    "options, form",
    [
        ({"num_beams": 2}, LOCAL_KEYS), ({"prompt_lookup_num_tokens": 2}, LOCAL_KEYS),
        ({"prompt_lookup_num_tokens": 2}, FORMS["ours"]), ({"prefill_chunk_size": 16}, {}),
    ],
)  # fmt: skip
def test_generation_gives_the_torch_tiers_tokens(options, form):
    config = narrow(**form)
    model = make_model(FlashForCausalLM, config, dtype=torch.float32).to(DEVICE)
    ids = random_ids(config, 1, 45).to(DEVICE)  # three tokens before the end of a chunk
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    fast = model.generate(ids, **settings)
    model.config.backend = "torch"
    assert torch.equal(fast, model.generate(ids, **settings))


# ------------------------------------------------------------------------------------------------------------------
# Which modules and types the kernels stand for
# ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["layers.0.gau.v_proj", "layers.0.norm", "norm", "layers.0.gau"])
def test_replaced_modules_are_called(name):
    """A module that is not the stock one any more (LoRA, quantised, hooked) is not bypassed."""
    model = make_model(FlashModel, config_of(), dtype=torch.float32).to(DEVICE)
    x = torch.randn(1, 20, 32, device=DEVICE)
    with torch.no_grad():
        plain = model(inputs_embeds=x).last_hidden_state
        model.get_submodule(name).register_forward_hook(lambda module, args, out: out * 2)
        hooked = model(inputs_embeds=x).last_hidden_state
        model.config.backend = "torch"
        assert_close(hooked, model(inputs_embeds=x).last_hidden_state, 1e-5)
    assert error_ratio(hooked, plain) > 1e-2


def test_parameters_may_begin_anywhere_in_a_buffer():
    """DeepSpeed and memory-mapped files give addresses that a descriptor does not take."""
    model = make_model(FlashModel, config_of(), dtype=torch.float32).to(DEVICE)
    x = torch.randn(1, 20, 32, device=DEVICE)
    with torch.no_grad():
        expected = model(inputs_embeds=x).last_hidden_state
        for parameter in model.parameters():
            buffer = parameter.new_empty(parameter.numel() + 1)
            parameter.data = buffer[1:].view_as(parameter).copy_(parameter.data)
            assert parameter.data_ptr() % 16
        assert torch.equal(model(inputs_embeds=x).last_hidden_state, expected)


def test_autocast_computes_in_its_type():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter's bfloat16 products are wrong
    model = make_model(FlashForMaskedLM, config_of(is_decoder=False), dtype=torch.float32, scale=0.2).to(DEVICE)
    ids = random_ids(model.config, 2, 45).to(DEVICE)
    exact = model(ids).logits
    errors = []
    for backend in ("triton", "torch"):
        model.config.backend = backend
        model.zero_grad()
        with torch.autocast(DEVICE, dtype=dtype):
            out = model(ids, labels=ids)
        out.loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        errors.append(error_ratio(out.logits, exact))
    assert 0 < errors[0] <= 2 * errors[1]


def test_falls_back_once_and_says_why(caplog, capsys):
    """Only where a GPU could do better, and not on stdout."""
    config = config_of(backend="auto", attention_activation="softmax")
    model = make_model(FlashModel, config, dtype=torch.float32)
    logging.get_logger("flash_hf.backend_flash").warning_once.cache_clear()
    for _ in range(2):
        model(inputs_embeds=torch.randn(1, 9, 32))
        assert kernels_for(config, torch.device("cpu"), torch.float32, dropout=False) is None
    assert not caplog.records
    for _ in range(2):  # the type is looked at before the device, which need not be there
        assert kernels_for(config, torch.device("cuda"), torch.float64, dropout=False) is None
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "FLASH computes in plain torch" in said[0] and "no kernels for torch.float64" in said[0]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"global_state": "delta", "query_key_dim": 256}, "global_state"),
        ({"local_window": 2}, "local_window=2"),
        ({"attention_activation": "laplace"}, "laplace"),
        ({"global_form": "previous_token", "chunk_size": 1}, "shifted keys"),
        ({"local_key_shift": True, "chunk_size": 1}, "shifted keys"),
        ({"chunk_size": 1024}, "chunk_size"),
        ({"hidden_size": 30, "expansion_factor": 1}, "multiple of 16"),
    ],
)
def test_asking_for_what_cannot_be_is_refused(changes, reason):
    model = FlashModel(config_of(**changes)).to(DEVICE)
    with pytest.raises(ValueError, match=f"`backend` = 'triton'.*{reason}.*backend='auto'"):
        model(inputs_embeds=torch.randn(1, 9, model.config.hidden_size, device=DEVICE))


def test_float64_and_dropout_are_the_torch_tiers():
    config = config_of(backend="auto")
    device = torch.device(DEVICE)
    assert kernels_for(config, device, torch.float64, dropout=False) is None
    assert kernels_for(config, device, torch.float32, dropout=True) is None
    config.backend = "triton"
    assert kernels_for(config, device, torch.float32, dropout=False) is kernels


def test_without_a_gpu_or_triton_the_model_runs():
    """In a process of its own: no interpreter, and triton that cannot be imported. On a CPU that is no news."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from flash_hf import FlashConfig, FlashModel
config = FlashConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, query_key_dim=8, chunk_size=4)
print(FlashModel(config)(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all().item())
config.backend = "triton"
try:
    FlashModel(config)(torch.tensor([[1, 2, 3]]))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.startswith("True\n") and "triton is not installed" in done.stdout
    assert "triton is not installed" not in done.stderr and "plain torch" not in done.stderr


# ------------------------------------------------------------------------------------------------------------------
# On the GPU alone
# ------------------------------------------------------------------------------------------------------------------
@forms
@pytest.mark.gpu
@pytest.mark.parametrize("whole", [True, False], ids=["layer", "attention"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_error_is_at_most_twice_the_torch_tiers(layout, causal, whole, form):
    config = config_of(is_decoder=causal, chunk_size=64, query_key_dim=64, hidden_size=256, **FORMS[form])
    compare(config, layout, torch.bfloat16, whole=whole, length=777, scale=0.06, draws=4)


@forms
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("chunk_size", "key_dim"), [(256, 128), (512, 256), (128, 32), (100, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunk_and_key_sizes(chunk_size, key_dim, causal, dtype, form):
    config = config_of(is_decoder=causal, chunk_size=chunk_size, query_key_dim=key_dim, hidden_size=256, **FORMS[form])
    compare(config, "odd", dtype, length=1300, scale=0.06, draws=4)


@pytest.mark.parametrize(
    "rows, chunks, blocks, length",
    # 264 programs are two on each of 132 multiprocessors; 384 of 8 chunks would be three rounds.
    [(2, 128, 12, 12), (1, 256, 12, 12), (8, 32, 12, 8), (8, 33, 12, 9), (128, 2, 12, 2), (1, 8, 12, 1), (1, 1, 1, 1)],
)
def test_pieces_are_as_long_as_keeps_multiprocessors_busy(rows, chunks, blocks, length):
    assert kernels.plan.piece_length(rows, chunks, blocks) == length
    assert 1 <= kernels.plan.piece_length(rows, 100 * chunks, blocks) <= kernels.plan.LONGEST_PIECE
