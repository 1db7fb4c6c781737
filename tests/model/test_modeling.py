# SPDX-License-Identifier: Apache-2.0
"""The contracts of a transformers model: heads, losses, saving, loading, checkpointing, compilation; and bad input."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, StaticCache
from transformers.utils import logging

from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM, FlashModel
from flash_hf.attention_flash import angle_dtype
from flash_hf.chunking_flash import is_exporting
from helpers import assert_close, error_ratio, make_model, random_ids, tiny_config


HEADS = [FlashForCausalLM, FlashForMaskedLM]
ALL = [*HEADS, FlashModel]


# -- direction
@pytest.mark.parametrize("is_decoder", [True, False])
def test_each_head_has_its_direction_whatever_the_config_says(is_decoder):
    config = tiny_config(is_decoder=is_decoder)
    ids = random_ids(config, 1, 30)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % config.vocab_size
    for cls, causal in ((FlashForCausalLM, True), (FlashForMaskedLM, False), (FlashModel, is_decoder)):
        model = make_model(cls, config)
        difference = (model(ids)[0][0, :-1] - model(changed)[0][0, :-1]).abs().amax(-1)
        assert bool((difference == 0).all()) is causal
        assert model.config.is_decoder is causal
    assert config.is_decoder is is_decoder


def test_the_base_of_a_saved_head_keeps_its_direction(tmp_path):
    for cls, causal in ((FlashForCausalLM, True), (FlashForMaskedLM, False)):
        model = make_model(cls, tiny_config())
        model.save_pretrained(tmp_path / cls.__name__)
        base = AutoModel.from_pretrained(tmp_path / cls.__name__, dtype=torch.float64)
        assert base.is_causal is causal
        ids = random_ids(model.config, 1, 20)
        expected = model(ids, output_hidden_states=True).hidden_states[-1]
        assert_close(base(ids).last_hidden_state, expected, 1e-6)  # frequencies of the reloaded one are float32


def test_a_contradicting_direction_is_refused():
    with pytest.raises(ValueError, match="is_causal=False contradicts"):
        make_model(FlashForCausalLM, tiny_config())(random_ids(tiny_config(), 1, 5), is_causal=False)


@pytest.mark.parametrize("by_config", [True, False])
def test_output_attentions_warns_that_there_is_no_map(by_config, caplog):
    logging.warning_once.cache_clear()
    model = make_model(FlashForCausalLM, tiny_config(output_attentions=by_config))
    output = model(random_ids(model.config, 1, 5), **({} if by_config else {"output_attentions": True}))
    assert output.attentions is None and caplog.text.count("output_attentions has no effect") == 1


# -- outputs and losses
@pytest.mark.parametrize("cls", ALL)
def test_outputs(cls):
    model = make_model(cls, tiny_config())
    ids = random_ids(model.config, 2, 11)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert all(hidden.shape == (2, 11, 24) for hidden in out.hidden_states)
    # transformers' contract: the last entry has gone through the final norm.
    base = getattr(model, "model", model)
    assert torch.equal(base(ids).last_hidden_state, out.hidden_states[-1])
    as_tuple = model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out[0])
    model.config.return_dict = False
    as_tuple = model(ids)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out[0])
    model.config.return_dict = True
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds)[0], out[0])


def test_logits_to_keep():
    model = make_model(FlashForCausalLM, tiny_config())
    ids = random_ids(model.config, 2, 11)
    full = model(ids).logits
    assert_close(model(ids, logits_to_keep=1).logits, full[:, -1:], 1e-12)
    assert_close(model(ids, logits_to_keep=4).logits, full[:, -4:], 1e-12)
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 7])).logits, full[:, [0, 7]], 1e-12)


def test_losses():
    ids = random_ids(tiny_config(), 2, 11)
    labels = ids.clone()
    labels[0, :4] = -100
    causal, masked = (make_model(cls, tiny_config()) for cls in HEADS)
    logits = causal(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(causal(ids, labels=labels).loss, expected, 1e-6)  # transformers upcasts logits to float32
    expected = torch.nn.functional.cross_entropy(masked(ids).logits.flatten(0, 1), labels.flatten())
    assert_close(masked(ids, labels=labels).loss, expected, 1e-6)
    for model, count in ((causal, 17), (masked, 18)):
        total = model(ids, labels=labels).loss * count
        assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss, total / 50, 1e-6)


@pytest.mark.parametrize("cls", HEADS)
def test_gradient_accumulation_equals_one_large_batch(cls):
    """Micro-batches with different numbers of labels, normalised by num_items_in_batch as Trainer does."""
    model = make_model(cls, tiny_config(), dtype=torch.float64)
    ids = random_ids(model.config, 8, 21)
    labels = ids.clone()
    for row in range(8):
        labels[row, : 2 * row] = -100
    count = (labels[:, 1:] if cls is FlashForCausalLM else labels).ne(-100).sum()
    model(ids, labels=labels, num_items_in_batch=count).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for part in range(4):
        rows = slice(2 * part, 2 * part + 2)
        model(ids[rows], labels=labels[rows], num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-6, name)


@pytest.mark.parametrize("form", [
    {}, {"attention_type": "local"}, {"attention_type": "global"}, {"attention_type": "quadratic"},
    {"attention_type": "global", "global_form": "previous_token"}, {"global_state": "delta"},
    {"attention_type": "global", "global_state": "delta", "global_form": "previous_token"},
], ids=str)  # fmt: skip
def test_every_parameter_has_a_gradient(form):
    """Which DistributedDataParallel waits for: in rows of one chunk, too, where the causal global part is 0."""
    config = tiny_config(**form)
    for cls in [FlashForCausalLM, FlashForMaskedLM][: 1 if "global_state" in form else 2]:
        for length in (1, 3, config.chunk_size, 2 * config.chunk_size + 1):
            model, ids = make_model(cls, config, dtype=torch.float32), random_ids(config, 2, length)
            model(ids, labels=ids).loss.backward()
            assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cls", HEADS)
def test_gradient_checkpointing_gives_the_same_gradients(cls, reentrant):
    model = make_model(cls, tiny_config()).train()
    ids = random_ids(model.config, 2, 29)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    calls = []
    hook = model.model.layers[0].gau.u_proj.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for name, gradient in gradients().items():
        assert_close(gradient, expected[name], 1e-12, name)
    hook.remove()
    assert len(calls) == 2  # it was computed again


PLUS = {"global_form": "previous_token", "local_key_shift": True, "chunk_shift": 4, "use_scaled_sinusoid": False}
DERIVED = {
    "paper": {}, "plus": PLUS, "delta": {"global_state": "delta"}, "quadratic": {"attention_type": "quadratic"},
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("form", DERIVED)
def test_gradients_of_each_row_by_vmap(form, padded):
    """Under torch.func nothing is read on the host, and padding may differ from row to row."""
    model = make_model(FlashForCausalLM, tiny_config(**DERIVED[form]))
    ids = random_ids(model.config, 3, 21)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, 17:] = 0, 0
    inputs = {"labels": ids, **({"attention_mask": mask} if padded else {})}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights, row, inputs):
        given = {name: x[None] for name, x in inputs.items()}
        return torch.func.functional_call(model, weights, (row[None],), {"use_cache": False, **given}).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, ids, inputs)
    for row in range(len(ids)):
        model.zero_grad()
        model(ids[row, None], **{name: x[row, None] for name, x in inputs.items()}).loss.backward()
        for name, parameter in model.named_parameters():
            assert_close(found[name][row] + 1, parameter.grad + 1, 1e-9, name)  # some are 0


@pytest.mark.parametrize("form", DERIVED)
def test_second_derivatives(form):
    """A product with the Hessian, against the difference of gradients, and the product by forward-mode gradients."""
    model = make_model(FlashForCausalLM, tiny_config(**DERIVED[form]))
    generator = torch.Generator().manual_seed(0)
    x, step = (torch.randn(2, 21, 24, generator=generator, dtype=torch.float64) for _ in range(2))

    def loss(x):
        return model(inputs_embeds=x, use_cache=False).logits.square().sum()

    def gradient(x, **options):
        return torch.autograd.grad(loss(x), x, **options)[0]

    expected = (gradient((x + 1e-6 * step).requires_grad_()) - gradient((x - 1e-6 * step).requires_grad_())) / 2e-6
    x.requires_grad_()
    product = torch.autograd.grad((gradient(x, create_graph=True) * step).sum(), x)[0]
    assert_close(product, expected, 1e-7)
    assert_close(torch.func.jvp(torch.func.grad(loss), (x.detach(),), (step,))[1], expected, 1e-7)


def test_dropout_is_active_only_in_training():
    model = make_model(FlashForCausalLM, tiny_config(hidden_dropout=0.2, attention_dropout=0.2))
    ids = random_ids(model.config, 1, 20)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    for name in ("hidden_dropout", "attention_dropout"):
        only = make_model(FlashForCausalLM, tiny_config(**{name: 0.5})).train()
        assert not torch.equal(only(ids).logits, only(ids).logits), name


# -- embeddings
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cls", HEADS)
def test_tying_resizing_and_saving(cls, tied, tmp_path):
    model = make_model(cls, tiny_config(tie_word_embeddings=tied), dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    ids = random_ids(model.config, 1, 20)
    before = model(ids).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model(torch.full((1, 3), 69)).logits.shape[-1] == 70
    assert_close(model(ids).logits[..., :61], before, 1e-6)
    model.save_pretrained(tmp_path)
    files = [path.name for path in tmp_path.iterdir()]
    assert "model.safetensors" in files and not any(name.endswith((".bin", ".pt")) for name in files)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name]), name
    # make_model computes RoPE frequencies in float64, from_pretrained in float32.
    assert_close(loaded(ids).logits, model(ids).logits, 1e-5)


# -- saving and loading
@pytest.mark.parametrize("changes", [
    {}, {"relative_bias": "rotary", "norm_type": "layer_norm"}, {"relative_bias": "t5", "norm_type": "rms_norm"},
    {"attention_type": "quadratic"}, {"attention_type": "local", "relative_bias": None}, {"attention_type": "global"},
    {"use_scaled_sinusoid": False, "use_rope": False},
], ids=str)  # fmt: skip
def test_weights_are_exact_through_every_way_of_loading(changes, tmp_path):
    torch.manual_seed(1)
    for cls, auto in ((FlashForCausalLM, AutoModelForCausalLM), (FlashForMaskedLM, AutoModelForMaskedLM)):
        model = make_model(cls, tiny_config(**changes), dtype=torch.float32)
        model.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is FlashConfig
        for loaded in (
            auto.from_pretrained(tmp_path),
            auto.from_pretrained(tmp_path, device_map="cpu"),
            auto.from_pretrained(tmp_path, dtype="auto"),
        ):
            assert type(loaded) is cls and loaded.dtype == torch.float32
            for name, parameter in model.state_dict().items():
                assert torch.equal(parameter, loaded.state_dict()[name]), name
            fresh = cls(model.config)
            assert torch.equal(loaded.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
        for dtype in (torch.bfloat16, torch.float16):
            low = auto.from_pretrained(tmp_path, dtype=dtype)
            assert low.dtype == dtype
            for name, parameter in model.state_dict().items():
                assert torch.equal(parameter.to(dtype), low.state_dict()[name]), name
            # Frequencies must not be rounded to 8 bits.
            assert_close(low.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq, 1e-6)


def test_sharded_checkpoint(tmp_path):
    model = make_model(FlashForCausalLM, tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = FlashForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name]), name


def test_base_weights_go_from_head_to_head(tmp_path):
    causal = make_model(FlashForCausalLM, tiny_config(), dtype=torch.float32)
    causal.save_pretrained(tmp_path)
    masked, info = FlashForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not masked.config.is_decoder and not masked.model.is_causal


def test_initialisation():
    torch.manual_seed(0)
    model = FlashForCausalLM(FlashConfig(hidden_size=256, num_hidden_layers=2, vocab_size=500))
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.bias", "scale.bias")):
            assert parameter.abs().max() == 0, name
        elif name.endswith("norm.weight"):
            assert parameter == 1, name
        elif name.endswith("positions.scale"):
            assert parameter == 256**-0.5
        else:
            assert abs(parameter.std() / 0.02 - 1) < 0.15 and abs(parameter.mean()) < 0.004, name


@pytest.mark.parametrize("chunk_size", [8, 2])
def test_attention_that_begins_at_recent_tokens(tmp_path, chunk_size):
    """Scales of 1, and before any training a token attends to itself and the three around it; what a checkpoint holds
    is loaded over it."""
    config = tiny_config(attention_init="recent", chunk_size=chunk_size, initializer_range=0.0, is_decoder=False)
    gau = FlashModel(config).layers[0].gau
    assert (gau.offset_scale.weight == 1).all() and (gau.offset_scale.bias == 0).all()
    bias = gau.relative_bias(chunk_size).tolist()
    nearest = [1.0, 0.7, 0.5, 0.35, *[0.0] * chunk_size]
    assert bias == pytest.approx([nearest[abs(offset)] for offset in range(1 - chunk_size, chunk_size)])
    config.initializer_range = 0.02
    drawn = FlashModel(config).layers[0].gau.relative_bias.weight
    assert 0 < (drawn - torch.tensor(bias)).abs().max() < 0.1

    trained = make_model(FlashForCausalLM, tiny_config(attention_init="recent"), dtype=torch.float32)
    trained.save_pretrained(tmp_path)
    loaded = FlashForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.attention_init == "recent"
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name)), name


def test_the_papers_start_leaves_the_heads_without_gradient():
    """Why attention_init="recent": AdamW divides gradients far below its eps (the paper's is 1e-6) by eps."""
    median = {}
    for start in ("normal", "recent"):
        torch.manual_seed(0)
        model = FlashForCausalLM(FlashConfig(
            hidden_size=256, num_hidden_layers=4, vocab_size=500, use_scaled_sinusoid=start == "normal",
            attention_init=start,
        ))  # fmt: skip
        ids = torch.randint(500, (2, 512), generator=torch.Generator().manual_seed(1))
        model(ids, labels=ids).loss.backward()
        for name in ("z_proj", "offset_scale", "v_proj"):
            grads = [getattr(layer.gau, name).weight.grad.abs().flatten() for layer in model.model.layers]
            median[start, name] = torch.cat(grads).median().item()
    assert max(median["normal", "z_proj"], median["normal", "offset_scale"]) < 1e-6
    assert min(median["recent", "z_proj"], median["recent", "offset_scale"]) > 1e-6
    assert median["normal", "v_proj"] > 50 * median["normal", "z_proj"]
    assert median["recent", "v_proj"] < 50 * median["recent", "z_proj"]


def test_missing_weights_are_initialised_as_in_a_fresh_model(tmp_path):
    """from_pretrained builds on the meta device: what the file lacks must not be left as uninitialised memory."""
    model = make_model(FlashForCausalLM, tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    kept = {
        k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "layers.1." not in k and "scale" not in k
    }
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = FlashForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    layer = loaded.model.layers[1]
    assert layer.norm.weight == 1 and layer.gau.offset_scale.bias.abs().max() == 0
    assert 0.01 < layer.gau.offset_scale.weight.std() < 0.03 and 0.01 < layer.gau.relative_bias.weight.std() < 0.03
    assert_close(loaded.model.embed_positions.scale, torch.tensor(24**-0.5), 1e-6)


# -- low precision
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_stay_exact(dtype):
    """Rounded to 8 bits, they would turn the keys of a long context by radians too much."""
    model = FlashForCausalLM(tiny_config())
    exact = model.model.rotary_emb.inv_freq.clone()
    moved = model.to(dtype).to("meta").to_empty(device="cpu").to(dtype)
    assert moved.model.rotary_emb.inv_freq.dtype == moved.model.rotary_emb.original_inv_freq.dtype == torch.float32
    model = FlashForCausalLM(tiny_config()).to(dtype)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", HEADS)
def test_long_inputs_are_finite_in_low_precision(cls, dtype):
    torch.manual_seed(0)
    model = cls(FlashConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, query_key_dim=32)).to(dtype)
    ids = random_ids(model.config, 1, 16384)
    loss = model(ids, labels=ids).loss
    assert loss.isfinite()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", HEADS)
def test_low_precision_error_is_at_most_twice_that_of_the_naive_version(cls, dtype):
    """Both against naive in float64, on the same rounded weights, over a chunk border and a long stretch."""
    from flash_hf.naive import naive_model
    from helpers import naive_config

    config = tiny_config(chunk_size=32, is_decoder=cls is FlashForCausalLM)
    model = make_model(cls, config, dtype=dtype, scale=0.1)
    ids = random_ids(config, 1, 500)
    weights = {name: value.detach() for name, value in model.model.state_dict().items()}
    causal = cls is FlashForCausalLM
    exact = naive_model(ids[0], {k: v.double() for k, v in weights.items()}, naive_config(config), causal=causal)[1]
    plain = naive_model(ids[0], weights, naive_config(config), causal=causal)[1]
    assert plain.dtype == dtype
    ours, theirs = error_ratio(model(ids).logits[0], exact), error_ratio(plain, exact)
    assert 0 < ours <= 2 * theirs, (ours, theirs)


@pytest.mark.parametrize("cls", HEADS)
def test_autocast(cls):
    model = make_model(cls, tiny_config(), dtype=torch.float32, scale=0.1)
    ids = random_ids(model.config, 2, 40)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    assert_close(out.logits, expected, 0.05)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    if cls is FlashForCausalLM:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out = model(ids[:, :20], use_cache=True)
            parts = [out.logits]
            for t in range(20, 40):
                out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
                parts.append(out.logits)
        assert_close(torch.cat(parts, 1), expected, 0.05)


# -- compilation
OURS = {"chunk_shift": 5, "global_form": "previous_token", "local_key_shift": True}
DELTA = {"chunk_shift": 5, "global_form": "previous_token", "global_state": "delta", "local_window": 2}
forms = pytest.mark.parametrize("form", [{}, OURS, DELTA], ids=str)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cls, form, backend",
    [
        (FlashForCausalLM, OURS | {"num_hidden_layers": 2}, "aot_eager"),
        # AOTAutograd takes 20 s for this form; test_export.py exports it with a dynamic length.
        (FlashForCausalLM, DELTA | {"num_hidden_layers": 1}, "eager"),
        (FlashForMaskedLM, {"num_hidden_layers": 1}, "aot_eager"),
    ],
    ids=["causal", "delta", "masked"],
)
def test_compiled_forward_does_not_recompile_for_a_length(cls, form, backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = make_model(cls, tiny_config(**form), dtype=torch.float32)
    counter, graphs = CompileCounterWithBackend(backend), 0
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for length in (9, 10, 16, 17, 31, 64, 65, 100):
        ids = random_ids(model.config, 2, length)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        with torch.no_grad():
            for extra in ({}, {"attention_mask": mask}):
                assert_close(compiled(input_ids=ids, **extra)[0], model(ids, **extra)[0], 1e-5, f"length {length}")
        graphs = counter.frame_count if length == 9 else graphs  # with and without a mask, seen with the first length
    assert counter.frame_count == graphs


def test_a_compiled_forward_is_no_export():
    """Compiled code has the angles of eager code: see `is_exporting`."""
    torch._dynamo.reset()
    exporting, dtype = torch.compile(lambda x: (is_exporting(), angle_dtype(x)), backend="eager", fullgraph=True)(
        torch.zeros(1)
    )
    assert not exporting and dtype == torch.float64
    model = make_model(FlashModel, tiny_config(use_scaled_sinusoid=True), dtype=torch.float32)
    x = torch.randn(1, 900, model.config.hidden_size)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(inputs_embeds=x)[0], model(inputs_embeds=x)[0])


@pytest.mark.slow
@forms
def test_compiled_training_step(form):
    torch._dynamo.reset()
    model = make_model(FlashForCausalLM, tiny_config(**form), dtype=torch.float32).train()
    ids = random_ids(model.config, 2, 29)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-4, name)


@pytest.mark.slow
@forms
def test_packed_positions_under_compile_break_the_graph_and_stay_right(form):
    torch._dynamo.reset()
    model = make_model(FlashForCausalLM, tiny_config(**form), dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    ids = random_ids(model.config, 1, 40)
    for border in (11, 20):
        positions = torch.cat([torch.arange(border), torch.arange(40 - border)])[None]
        expected = model(ids, position_ids=positions).logits
        assert_close(compiled(input_ids=ids, position_ids=positions).logits, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_type": "quadratic"}, {"chunk_shift": 5, "global_form": "previous_token"}, DELTA],
    ids=str,
)
def test_compiled_static_decoding_is_one_graph(changes):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = make_model(FlashForCausalLM, tiny_config(**changes), dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    ids = random_ids(model.config, 2, 45)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        full = model(ids, attention_mask=mask).logits
        model(ids[:, :11], attention_mask=mask[:, :11], past_key_values=cache)
        for t in range(11, 45):  # over four chunk borders, at two phases
            logits = compiled(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
            assert_close(logits[:, 0], full[:, t], 2e-4, f"token {t}")
    assert counter.frame_count == 1


# -- bad input
def bad_inputs():
    ids = random_ids(tiny_config(), 2, 10)
    embeds = torch.randn(2, 10, 24, dtype=torch.float64)
    restart = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 5]])
    mask = torch.ones(2, 10)
    left = mask.clone()
    left[:, :3] = 0
    return {
        "no input": ({}, "Exactly one of input_ids and inputs_embeds must be given, got neither"),
        "both inputs": ({"input_ids": ids, "inputs_embeds": embeds}, "got both"),
        "no tokens": ({"input_ids": ids[:, :0]}, r"at least one row and one token, got shape \(2, 0\)"),
        "no rows": ({"input_ids": ids[:0]}, "at least one row"),
        "no tokens embedded": ({"inputs_embeds": embeds[:, :0]}, "at least one row and one token"),
        "id too large": ({"input_ids": ids + 61}, r"\[0, vocab_size = 61\).*resize_token_embeddings"),
        "negative id": ({"input_ids": ids - 61}, r"input_ids must lie in"),
        "float ids": ({"input_ids": ids.float()}, "int64 or int32.*float32"),
        "a list": ({"input_ids": ids.tolist()}, r"got list\. Tokenize with return_tensors='pt'"),
        "a tokenizer's output": ({"input_ids": {"input_ids": ids}}, r"got dict\..* model\(\*\*inputs\)"),
        "ids of one dimension": ({"input_ids": ids[0]}, r"\(batch, tokens\), got \(10,\)"),
        "embeddings too wide": ({"inputs_embeds": torch.randn(2, 10, 25)}, r"tokens, 24\), got \(2, 10, 25\)"),
        "integer embeddings": ({"inputs_embeds": torch.zeros(2, 10, 24, dtype=torch.long)}, "floating-point"),
        "short mask": ({"input_ids": ids, "attention_mask": mask[:, :9]}, r"shape \(2, 10\).*got \(2, 9\)"),
        "mask of other rows": ({"input_ids": ids, "attention_mask": mask[:1]}, r"got \(1, 10\)"),
        "4-D mask": ({"input_ids": ids, "attention_mask": mask[:, None, None]}, "2-D padding mask.*4 dimensions"),
        "additive mask": ({"input_ids": ids, "attention_mask": (1 - mask) * -1e9 - (1 - left) * 1e9}, "only 0 .* and "
        "1"),
        "positions of another length": ({"input_ids": ids, "position_ids": restart[:, :9]}, r"position_ids.*\(1, 9\)"),
        "positions that skip": ({"input_ids": ids, "position_ids": restart}, "row 0, token 9 has 5, expected 4"),
        "positions off by one": ({"input_ids": ids, "position_ids": torch.arange(1, 11)[None]}, "has 1, expected 0"),
        "positions that ignore the mask": (
            {"input_ids": ids, "attention_mask": left, "position_ids": torch.arange(10)[None]},
            "agree with attention_mask.*token 3 has 3, expected 0",
        ),
        "lengths that do not add up": (
            {"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0, 4, 9])}, "rise from 0 to the number of tokens"
        ),
        "lengths for several rows": ({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 4, 10])}, "one packed row"),
        "seq_idx of another length": ({"input_ids": ids, "seq_idx": restart[:, :3]}, "seq_idx must have shape"),
    }  # fmt: skip


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_refused(case, cls):
    inputs, message = bad_inputs()[case]
    with pytest.raises(ValueError, match=message):
        make_model(cls, tiny_config())(**inputs)


@pytest.mark.parametrize("cls", HEADS)
def test_bad_labels_are_refused(cls):
    model = make_model(cls, tiny_config())
    ids = random_ids(model.config, 2, 10)
    with pytest.raises(ValueError, match=r"labels must have the shape of the input, \(2, 10\), got \(2, 9\)"):
        model(ids, labels=ids[:, :9])
    for value in (-1, model.config.vocab_size):
        labels = ids.masked_fill(torch.arange(10) == 3, value)
        for options in ({}, {"skip_logits": True}):
            with pytest.raises(ValueError, match=rf"labels must be int64 and lie in .*, got {value}\."):
                model(ids, labels=labels, **options)
    with pytest.raises(ValueError, match=r"labels must be int64 .* got torch.float32"):
        model(ids, labels=ids.float())
    with pytest.raises(ValueError, match=r"labels must be a tensor .*\(2, 10\), got list"):
        model(ids, labels=ids.tolist())
    with pytest.raises(ValueError, match="Exactly one of input_ids and inputs_embeds must be given, got neither"):
        model(labels=ids)
    model.loss_function = lambda logits, labels, *_, **__: labels.sum()
    assert model(ids, labels=ids.float()).loss == ids.sum()
    if cls is FlashForCausalLM:
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(ids, labels=ids, logits_to_keep=1)


def test_quadratic_toeplitz_names_its_limit():
    model = make_model(FlashForCausalLM, tiny_config(attention_type="quadratic", max_position_embeddings=16))
    with pytest.raises(ValueError, match="max_position_embeddings = 16 tokens, got 17.*rotary"):
        model(random_ids(model.config, 1, 17))
    cache = StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(ValueError, match="= 16 tokens, got a static cache for max_cache_len = 40"):
        model(random_ids(model.config, 1, 9), past_key_values=cache)


def test_positions_that_contradict_a_cache():
    model = make_model(FlashForCausalLM, tiny_config())
    ids = random_ids(model.config, 1, 20)
    cache = model(ids[:, :12], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="and the cache: row 0, token 0 has 3, expected 12"):
        model(ids[:, 12:], past_key_values=cache, position_ids=torch.arange(3, 11)[None])


# -- broken files
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, caplog):
    make_model(FlashForCausalLM, tiny_config(), dtype=torch.float32).save_pretrained(tmp_path)
    # transformers raises a short error and logs a table of the parameters that differ.
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FlashForCausalLM.from_pretrained(tmp_path, config=tiny_config(hidden_size=32))
    assert "embed_tokens.weight" in caplog.text and "[61, 24]" in caplog.text and "[61, 32]" in caplog.text
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**stored, "chunk_size": 16}), encoding="utf-8")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FlashForCausalLM.from_pretrained(tmp_path)
    assert "relative_bias.weight" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "missing"])
def test_a_broken_weights_file_is_refused_and_left_alone(damage, tmp_path):
    model = make_model(FlashForCausalLM, tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    broken = {"truncated": good[:-1000], "header": b"\xff" * 8 + good[8:], "empty": b"", "missing": None}[damage]
    path.unlink()
    if broken is not None:
        path.write_bytes(broken)
    with pytest.raises(Exception, match="(?i)safetensors|header|incomplete|no file named|deserializ|metadata"):
        FlashForCausalLM.from_pretrained(tmp_path)
    assert broken is None or path.read_bytes() == broken
    path.write_bytes(good)
    assert torch.equal(FlashForCausalLM.from_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_saving_where_nothing_can_be_written(tmp_path):
    model = make_model(FlashForCausalLM, tiny_config(), dtype=torch.float32)
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises((OSError, AssertionError), match="file"):
        model.save_pretrained(tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "in the way"
