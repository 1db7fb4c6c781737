# SPDX-License-Identifier: Apache-2.0
"""Converted checkpoints compute what the originals do: restatements of JunnYu's ports from their formulas, stored
results of FLASH-pytorch, and that package itself where it is installed. Unsupported options are refused."""

import functools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from flash_hf.convert import convert, detect_kind, read_state_dict, save_tokenizer
from flash_hf.convert.junnyu import convert_junnyu_flash
from flash_hf.convert.parts import fold_decoder
from helpers import DATA, ROOT, Trap, assert_close, first_line, run_here


SCRIPT = ROOT / "scripts" / "convert_checkpoint.py"
STORED = {"causal": {"causal": True}, "bidirectional": {"causal": False}, "laplace": {"causal": True, "laplace": True}}
V, D, E, S = 31, 16, 32, 40
LUCIDRAINS = {"causal": True, "shift": False, "chunk_size": 24}


def exact(model):
    """`model` with rotary frequencies in float64, so that it can be compared to 1e-9."""
    base = getattr(model, model.base_model_prefix, model)
    r, theta = model.config.rotary_dim, model.config.rope_parameters["rope_theta"]
    base.rotary_emb.inv_freq = theta ** (-torch.arange(0, r, 2).double() / r)
    return model


def ids_of(*shape):
    return torch.randint(1, V, shape)


def draw(*shape, mean=0.0):
    return mean + 0.3 * torch.randn(*shape, dtype=torch.float64)


# -- restatements, from the formulas in the project's notes on public checkpoints
def sinusoid(length):
    angle = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(D // 2).double() / (D // 2))
    return torch.cat([angle.sin(), angle.cos()], 1)


def layer_norm(x, gain, shift, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain + shift


def turn_pairs(x, r):
    """RoPE of `[..., N, S]` on neighbouring pairs of the first r dims, as a complex product."""
    position = torch.arange(x.shape[-2]).double()
    angle = position[:, None] * 10000.0 ** (-torch.arange(0, r, 2).double() / r)
    pairs = torch.view_as_complex(x[..., :r].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    return torch.cat([turned, x[..., r:]], -1)


def turn_halves(x):
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2]).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], -1)


@functools.cache
def t5_bucket(offset):
    """Bidirectional, 32 buckets, distances to 128; T5's float32 at the borders."""
    distance = abs(offset)
    bucket = distance
    if distance >= 8:
        bucket = min(15, 8 + int(torch.log(torch.tensor(distance / 8)) / math.log(16) * 8))
    return bucket + (16 if offset > 0 else 0)


def junnyu_flash(state, ids, chunk, mask=None):
    """What the last layer gives, and the logits; columns outside of `mask` are padding."""
    B, N = ids.shape
    keep = torch.ones(B, N, dtype=torch.float64) if mask is None else mask.double()
    x = state["flash.embeddings.word_embeddings.weight"][ids] + sinusoid(N) * state["flash.embeddings.scale"]
    bucket = torch.tensor([[t5_bucket(j - i) for j in range(chunk)] for i in range(chunk)])
    count = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("flash.encoder.layers."))
    for i in range(count):
        own = {name.split(f"layers.{i}.")[1]: w for name, w in state.items() if f"encoder.layers.{i}." in name}
        if "norm.g" in own:
            n = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-5) * own["norm.g"]
        else:
            n = layer_norm(x, own["norm.weight"], own["norm.bias"])
        silu = torch.nn.functional.silu
        hidden = silu(n @ own["to_hidden.0.weight"].T + own["to_hidden.0.bias"])
        v, gate = hidden[..., :E], hidden[..., E:]
        z = silu(n @ own["to_qk.0.weight"].T + own["to_qk.0.bias"])
        heads = [z * own["qk_offset_scale.weight"][h] + own["qk_offset_scale.bias"][h] for h in range(4)]
        heads[3] = heads[3] * keep[..., None]
        quad_q, lin_q, quad_k, lin_k = (turn_pairs(head, 2 * len(own["rotary_pos_emb.freqs"])) for head in heads)
        bias = own["rel_pos_bias.relative_attention_bias.weight"][bucket, 0] * math.sqrt(S)
        mixed = lin_q @ (lin_k.transpose(1, 2) @ v / N)
        for start in range(0, N, chunk):
            part = slice(start, min(start + chunk, N))
            m = part.stop - part.start
            scores = quad_q[:, part] @ quad_k[:, part].transpose(1, 2) / chunk + bias[:m, :m]
            mixed[:, part] += scores.clamp(min=0) ** 2 * keep[:, None, part] @ v[:, part]
        x = x + (gate * mixed) @ own["to_out.weight"].T + own["to_out.bias"]
    if "cls.predictions.decoder.weight" not in state:
        return x, None
    normed = layer_norm(x, state["cls.predictions.LayerNorm.weight"], state["cls.predictions.LayerNorm.bias"])
    return x, normed @ state["cls.predictions.decoder.weight"].T + state["cls.predictions.decoder.bias"]


def junnyu_flash_state(norm, layers=2):
    words = draw(V, D)
    state = {
        "flash.embeddings.word_embeddings.weight": words, "flash.embeddings.scale": draw(1, mean=0.5),
        "flash.embeddings.scaledsin_embeddings": sinusoid(64), "flash.embeddings.position_ids": torch.arange(64)[None],
        "cls.predictions.LayerNorm.weight": draw(D, mean=1.0), "cls.predictions.LayerNorm.bias": draw(D),
        "cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": draw(V),
    }  # fmt: skip
    for i in range(layers):
        own = {
            "rotary_pos_emb.freqs": 10000.0 ** (-torch.arange(0, 32, 2).double() / 32),
            "rel_pos_bias.relative_attention_bias.weight": draw(32, 1),
            "to_hidden.0.weight": draw(2 * E, D), "to_hidden.0.bias": draw(2 * E),
            "to_qk.0.weight": draw(S, D), "to_qk.0.bias": draw(S),
            "qk_offset_scale.weight": draw(4, S), "qk_offset_scale.bias": draw(4, S),
            "to_out.weight": draw(D, E), "to_out.bias": draw(D),
        }  # fmt: skip
        if norm == "scalenorm":
            own["norm.g"] = draw(1, mean=1.0)
        else:
            own |= {"norm.weight": draw(D, mean=1.0), "norm.bias": draw(D)}
        state |= {f"flash.encoder.layers.{i}.{name}": tensor for name, tensor in own.items()}
    return state


def junnyu_flash_quad(state, ids, span):
    """Logits for token type 0; beyond 512 tokens the bias is that of two rotated vectors."""

    def scale_norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    N = ids.shape[1]
    embeddings, head = "flash_quad.embeddings.", "cls.predictions."
    silu = torch.nn.functional.silu
    x = state[f"{embeddings}word_embeddings.weight"][ids] + state[f"{embeddings}token_type_embeddings.weight"][0]
    x = scale_norm(x + sinusoid(N) * state[f"{embeddings}scaledsin_scalar"], state[f"{embeddings}LayerNorm.scala"])
    offset = torch.arange(N)[None] - torch.arange(N)[:, None]
    for i in range(2):
        own = {name.split(f"layer.{i}.")[1]: w for name, w in state.items() if f"encoder.layer.{i}." in name}
        y = silu(scale_norm(x, own["LayerNorm.scala"]) @ own["uv.weight"].T + own["uv.bias"])
        u, v, z = y[..., :E], y[..., E : 2 * E], y[..., 2 * E :]
        q, k = (turn_halves(z * own["weight"][h] + own["bias"][h]) for h in range(2))
        bias = own["w"][offset + span - 1]
        if span > 512:
            bias = turn_halves(own["a"].expand(N, -1)) @ turn_halves(own["b"].expand(N, -1)).T
        weights = (q @ k.transpose(1, 2) / span + bias).clamp(min=0) ** 2
        x = x + (u * (weights @ v)) @ own["o.weight"].T + own["o.bias"]
    x = silu(x @ state[f"{head}transform.dense.weight"].T + state[f"{head}transform.dense.bias"])
    x = scale_norm(x, state[f"{head}transform.LayerNorm.scala"])
    return x @ state[f"{head}decoder.weight"].T + state[f"{head}decoder.bias"]


def junnyu_flash_quad_state(span=64):
    words, bias = draw(V, D), draw(V)
    state = {
        "flash_quad.embeddings.word_embeddings.weight": words,
        "flash_quad.embeddings.token_type_embeddings.weight": draw(2, D),
        "flash_quad.embeddings.LayerNorm.scala": draw(1, mean=1.0),
        "flash_quad.embeddings.scaledsin_scalar": draw(1, mean=0.5),
        "flash_quad.embeddings.scaledsin_embeddings": sinusoid(span),
        "flash_quad.embeddings.position_ids": torch.arange(span)[None],
        "cls.predictions.bias": bias, "cls.predictions.decoder.bias": bias, "cls.predictions.decoder.weight": words,
        "cls.predictions.transform.dense.weight": draw(D, D), "cls.predictions.transform.dense.bias": draw(D),
        "cls.predictions.transform.LayerNorm.scala": draw(1, mean=1.0),
    }  # fmt: skip
    for i in range(2):
        own = {
            "weight": draw(2, S), "bias": draw(2, S), "w": draw(2 * span - 1), "a": draw(1, S), "b": draw(1, S),
            "uv.weight": draw(2 * E + S, D), "uv.bias": draw(2 * E + S), "o.weight": draw(D, E), "o.bias": draw(D),
            "LayerNorm.scala": draw(1, mean=1.0),
        }  # fmt: skip
        state |= {f"flash_quad.encoder.layer.{i}.{name}": tensor for name, tensor in own.items()}
    return state


# -- JunnYu's FLASH
SETTINGS = {"group_size": 24, "layer_norm_eps": 1e-5, "pad_token_id": 0}


@pytest.mark.parametrize("length", [1, 9, 24, 50, 72])
@pytest.mark.parametrize("norm", ["scalenorm", "layernorm"])
def test_junnyu_encoder_without_padding(norm, length):
    state = junnyu_flash_state(norm)
    converted = convert(state, settings=SETTINGS, padded_length=0, encoder_only=True)
    assert converted.architecture == "FlashModel" and converted.config.global_normalization == "mean"
    ids = ids_of(2, length)
    model = exact(converted.build())
    assert_close(model(ids).last_hidden_state, junnyu_flash(state, ids, 24)[0], 1e-9)


@pytest.mark.parametrize("real", [3, 24, 40, 96])
def test_junnyu_encoder_as_padded_to_its_training_length(real):
    """The original pads to a fixed length and divides by it; ours gives its result for the text alone, or padded."""
    state = junnyu_flash_state("scalenorm")
    model = exact(convert(state, settings=SETTINGS, padded_length=96, encoder_only=True).build())
    ids = ids_of(1, 96)
    mask = (torch.arange(96) < real).long()[None]
    expected = junnyu_flash(state, ids * mask, 24, mask)[0][:, :real]
    assert_close(model(ids[:, :real]).last_hidden_state, expected, 1e-9)
    padded = model(ids * mask, attention_mask=mask).last_hidden_state
    assert_close(padded[:, :real], expected, 1e-9)


@pytest.mark.parametrize("length", [1, 24, 50])
def test_junnyu_logits_with_layer_norm_throughout(length):
    state = junnyu_flash_state("layernorm")
    converted = convert(state, settings=SETTINGS, padded_length=0)
    ids = ids_of(2, length)
    assert_close(exact(converted.build())(ids).logits, junnyu_flash(state, ids, 24)[1], 1e-9)


def test_junnyu_as_its_authors_use_it():
    """Chunks of 256, a text of 300 tokens padded to 512: all defaults."""
    state = junnyu_flash_state("layernorm")
    model = exact(convert(state).build())
    ids = ids_of(1, 512)
    mask = (torch.arange(512) < 300).long()[None]
    expected = junnyu_flash(state, ids * mask, 256, mask)[1][:, :300]
    assert_close(model(ids[:, :300]).logits, expected, 1e-9)
    assert_close(model(ids * mask, attention_mask=mask).logits[:, :300], expected, 1e-9)


def test_junnyu_defaults_are_those_of_the_public_checkpoints():
    config = convert_junnyu_flash(junnyu_flash_state("scalenorm", layers=3), encoder_only=True).config
    assert (config.chunk_size, config.attention_divisor, config.rotary_dim) == (256, 256, 32)
    assert config.num_hidden_layers == 3 and config.expansion_factor == 2
    assert config.rope_interleaved and config.relative_bias == "t5" and config.pad_token_id == 0
    assert not config.is_decoder and config.global_normalization == "chunk"


@pytest.mark.parametrize("length", [1, 24, 50])
def test_junnyu_logits(length):
    state = junnyu_flash_state("scalenorm")
    ids = ids_of(2, length)
    converted = convert(state, settings=SETTINGS, padded_length=0)
    assert_close(exact(converted.build())(ids).logits, junnyu_flash(state, ids, 24)[1], 1e-9)
    single = convert({name: x.float() for name, x in state.items()}, settings=SETTINGS, padded_length=0).build()
    assert (single(ids).logits - junnyu_flash(state, ids, 24)[1]).abs().max() < 1e-4


@pytest.mark.parametrize("length", [1, 17, 64])
@pytest.mark.parametrize("span", [64, 520])
def test_junnyu_quad_logits(span, length):
    state = junnyu_flash_quad_state(span)
    ids = ids_of(2, length)
    converted = convert(state)
    assert converted.config.attention_divisor == span and converted.config.attention_type == "quadratic"
    assert_close(exact(converted.build())(ids).logits, junnyu_flash_quad(state, ids, span), 1e-9)


def test_junnyu_quad_biases_must_agree():
    state = junnyu_flash_quad_state()
    state["cls.predictions.bias"] = state["cls.predictions.bias"] + 1
    with pytest.raises(ValueError, match="must be the same"):
        convert(state)


# -- FLASH-pytorch: its stored results, then itself
@pytest.mark.parametrize("length", [5, 24, 61])
@pytest.mark.parametrize("name", [*STORED])
def test_stored_logits_of_flash_pytorch(name, length):
    stored = load_file(DATA / "flash_expected.safetensors")
    state = load_file(DATA / f"flash_{name}.safetensors")
    converted = convert(state, shift=False, chunk_size=24, **STORED[name])
    assert converted.architecture == ("FlashForCausalLM" if STORED[name]["causal"] else "FlashForMaskedLM")
    logits = converted.build()(stored[f"{name}.{length}.ids"]).logits
    assert (logits - stored[f"{name}.{length}.logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("length", [5, 24, 61])
def test_stored_stream_of_flash_pytorch_with_scale_norm(length):
    stored = load_file(DATA / "flash_expected.safetensors")
    state = load_file(DATA / "flash_scalenorm.safetensors")
    options = {"causal": False, "shift": False, "chunk_size": 24}
    model = convert(state, encoder_only=True, **options).build()
    ids = stored[f"scalenorm.{length}.ids"]
    stream = model(ids).last_hidden_state
    assert_close(stream, stored[f"scalenorm.{length}.stream"], 1e-5)
    logits = convert(state, **options).build()(ids).logits
    assert (logits - stored[f"scalenorm.{length}.logits"]).abs().max() < 1e-4


def randomised(module):
    """The original in float64 with weights that show a bug, and frequencies that are not rounded to float32."""
    module = module.double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "freqs" in name:
                r = 2 * len(parameter)
                parameter.copy_(10000.0 ** (-torch.arange(0, r, 2).double() / r))
            else:
                parameter.copy_(draw(*parameter.shape, mean=float(name.endswith(("norm.g", "norm.weight")))))
    if hasattr(module, "abs_pos_emb"):
        half = len(module.abs_pos_emb.inv_freq)
        module.abs_pos_emb.inv_freq = 10000.0 ** (-torch.arange(half).double() / half)
    return module


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("laplace", [True, False])
@pytest.mark.parametrize("key_dim", [40, 12])
def test_flash_pytorch_itself(causal, laplace, key_dim):
    flash_pytorch = pytest.importorskip("flash_pytorch")
    original = randomised(flash_pytorch.FLASHTransformer(
        num_tokens=V, dim=D, depth=3, group_size=40, query_key_dim=key_dim, expansion_factor=1.5, shift_tokens=False,
        norm_type="layernorm", causal=causal, laplace_attn_fn=laplace,
    ))  # fmt: skip
    plain = original.state_dict()
    wrapped = {f"net.{name}": tensor for name, tensor in plain.items()}
    for state in (plain, wrapped):
        model = exact(convert(state, shift=False, chunk_size=40, causal=causal, laplace=laplace).build())
        for length in (1, 39, 40, 97, 160):
            ids = ids_of(2, length)
            with torch.no_grad():
                assert_close(model(ids).logits, original(ids), 1e-9, f"length {length}")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm", ["LayerNorm", "ScaleNorm"])
@pytest.mark.parametrize("rotary", [True, False])
def test_one_layer_of_flash_pytorch(causal, norm, rotary):
    flash_pytorch = pytest.importorskip("flash_pytorch")
    from rotary_embedding_torch import RotaryEmbedding

    original = randomised(flash_pytorch.FLASH(
        dim=D, group_size=16, query_key_dim=S, causal=causal, rotary_pos_emb=RotaryEmbedding(32) if rotary else None,
        norm_klass=torch.nn.LayerNorm if norm == "LayerNorm" else flash_pytorch.flash_pytorch.ScaleNorm,
    ))  # fmt: skip
    assert detect_kind(original.state_dict()) == "lucidrains"
    converted = convert(original.state_dict(), causal=causal, shift=False, chunk_size=16)
    model = exact(converted.build())
    for length in (3, 16, 41):
        x = draw(2, length, D)
        with torch.no_grad():
            actual = model(inputs_embeds=x).last_hidden_state
            assert_close(actual, original(x), 1e-9, f"length {length}")


def test_converted_causal_model_decodes_with_its_cache():
    model = convert(load_file(DATA / "flash_causal.safetensors"), **LUCIDRAINS).build()
    ids = torch.randint(1, 29, (1, 30))
    out = model.generate(ids, max_new_tokens=25, do_sample=False, pad_token_id=0)
    assert torch.equal(out[:, 30:], model(out).logits[:, 29:-1].argmax(-1))


# -- algebra
def test_decoder_with_a_bias_is_folded():
    x, gain, shift, weight, bias = draw(5, D), draw(D, mean=1.0), draw(D), draw(V, D), draw(V)
    folded = fold_decoder(weight, bias, gain, shift)
    ours = layer_norm(x, folded["model.norm.weight"], folded["model.norm.bias"]) @ folded["lm_head.weight"].T
    assert_close(ours, layer_norm(x, gain, shift) @ weight.T + bias, 1e-12)


# -- refusals
@pytest.mark.parametrize("changes, message", [
    ({"causal": None}, "give --causal or --no-causal"),
    ({"shift": None}, "--shift or --no-shift"),
    ({"shift": True}, "no token shift"),
    ({"causal": False, "separate_groups": True}, "own group only"),
    ({"kind": "lucidrain"}, "Did you mean 'lucidrains'"),
    ({"kind": "junnyu_flash", "causal": None}, "'junnyu_flash' takes no option --causal"),
    ({"padded_length": 512}, "takes no option --padded_length"),
])  # fmt: skip
def test_options_of_flash_pytorch_that_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        convert(load_file(DATA / "flash_causal.safetensors"), **{**LUCIDRAINS, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize("name, tensor, message", [
    ("layers.0.to_out.weight", None, "must have `layers.0.to_out.weight`, which is missing"),
    ("layers.1.to_out.weight", torch.zeros(3, 3), "size mismatch for model.layers.1.gau.o_proj.weight"),
    ("layers.0.to_qk.0.bias", torch.full((40,), math.nan), "must be finite"),
    ("layers.0.rotary_pos_emb.freqs", torch.linspace(1, 5, 16), "custom or learned frequencies"),
    ("layers.0.extra.weight", torch.ones(3), "layers.0.extra.weight"),
    ("layers.3.norm.weight", torch.ones(16), "which is missing"),
    ("layers.1.norm.g", torch.ones(1), "must not have .layers.1.norm.bias"),
])  # fmt: skip
def test_tensors_that_are_refused(name, tensor, message):
    state = load_file(DATA / "flash_causal.safetensors")
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    with pytest.raises((ValueError, RuntimeError), match=message):
        convert(state, **LUCIDRAINS).build()


@pytest.mark.parametrize("state, message", [
    ({"gau_alpha.encoder.layer.0.gau.i_dense.weight": torch.ones(1)}, "post-norm.*softmax_plus"),
    ({"offsetscale.gamma": torch.ones(2, 4), "to_out.0.weight": torch.ones(1)}, "another function at every length"),
    ({"bert.embeddings.word_embeddings.weight": torch.ones(1)}, "must be those of one of"),
    ({}, "must be those of one of"),
])  # fmt: skip
def test_originals_that_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        convert(state)


def test_padded_length_is_checked():
    with pytest.raises(ValueError, match="padded_length must be at least 1"):
        convert_junnyu_flash(junnyu_flash_state("scalenorm"), padded_length=-1)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        read_state_dict(tmp_path / "absent.bin")
    with pytest.raises(ValueError, match="it holds none"):
        read_state_dict(tmp_path)
    torch.save({"model": Trap(tmp_path / "mark")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="weights_only=True.*not the module"):
        read_state_dict(tmp_path)
    assert not (tmp_path / "mark").exists()
    torch.save([torch.ones(1)], tmp_path / "b.pt")
    with pytest.raises(ValueError, match="one file of weights"):
        read_state_dict(tmp_path)
    with pytest.raises(ValueError, match="something else"):
        read_state_dict(tmp_path / "b.pt")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../x.safetensors"}}), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="files beside it"):
        read_state_dict(tmp_path)


def test_files_that_are_read(tmp_path):
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.ckpt")
    assert read_state_dict(tmp_path)[0].keys() == state.keys()
    for name in state:
        save_file({name: state[name]}, tmp_path / f"{name}.safetensors")
    weight_map = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weight_map), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"group_size": 8}', encoding="utf-8")
    read, settings = read_state_dict(tmp_path)
    assert read.keys() == state.keys() and settings == {"group_size": 8}


# -- the script
def script(capsys, *arguments):
    run_here("scripts/convert_checkpoint.py", *arguments)
    return json.loads(capsys.readouterr().out)


def test_script_makes_a_folder_that_loads(tmp_path, capsys):
    state = {name: tensor.float() for name, tensor in junnyu_flash_state("layernorm").items()}
    source, output = tmp_path / "original", tmp_path / "converted"
    source.mkdir()
    torch.save(state, source / "pytorch_model.bin")
    (source / "config.json").write_text(json.dumps({"model_type": "flash", **SETTINGS}), encoding="utf-8")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (source / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    report = script(capsys, source, output, "--padded_length", "0")
    assert report["kind"] == "junnyu_flash" and report["tokenizer"] and report["class"] == "FlashForMaskedLM"
    model = AutoModelForMaskedLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer("b a c [MASK] f", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [[2, 6, 5, 7, 4, 10, 3]]
    exact_state = {name: tensor.double() for name, tensor in state.items()}
    expected = junnyu_flash(exact_state, inputs["input_ids"], 24)[1]
    assert (model(**inputs).logits - expected).abs().max() < 1e-4
    assert tokenizer.padding_side == "right"
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    (output / "config.json").write_text(json.dumps({**config, "is_decoder": True}), encoding="utf-8")
    assert save_tokenizer(source, output) and AutoTokenizer.from_pretrained(output).padding_side == "left"
    assert (output / "model.safetensors").exists() and not list(output.glob("*.bin"))
    with open(source / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("".join(f"word{number}\n" for number in range(100)))
    with pytest.raises(SystemExit):
        script(capsys, source, tmp_path / "again", "--padded_length", "0")
    assert "must belong to the model: it has ids up to 130, the model's vocab_size" in capsys.readouterr().err


def test_script_converts_an_encoder_to_bfloat16(tmp_path, capsys):
    state = {name: tensor.float().clone() for name, tensor in junnyu_flash_state("scalenorm").items()}
    save_file(state, tmp_path / "model.safetensors")
    report = script(capsys, tmp_path, tmp_path / "out", "--encoder_only", "--dtype", "bfloat16")
    assert report["class"] == "FlashModel" and not report["tokenizer"] and len(report["notes"]) == 2
    model = AutoModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.norm_eps == 1e-20
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out")(ids_of(1, 30)).logits.isfinite().all()


def test_script_says_why_it_refuses(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script(capsys, DATA / "flash_causal.safetensors", tmp_path / "out", "--causal", "--shift")
    assert stop.value.code == 1
    assert "no token shift" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_first_line_command_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    command = first_line("convert_checkpoint.py")
    command[command.index("runs/hf")] = str(tmp_path / "out")
    run_here(*command)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.chunk_size == 24
