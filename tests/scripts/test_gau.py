# SPDX-License-Identifier: Apache-2.0
"""Variants of the gated attention unit: each is its dense statement, and FLASH's own where nothing is changed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash_hf import FlashForCausalLM, FlashForMaskedLM
from flash_hf.naive import naive_linear, naive_norm, naive_relative_bias, naive_rotary
from helpers import assert_close, make_model, naive_config, random_ids, tiny_config
from scripts.baselines.gau import GAUConfig, GAUForCausalLM, GAUForMaskedLM, GAUModel
from scripts.study.models import build


VARIANTS = {
    "no global RoPE": {"global_rope": False},
    "decay": {"chunk_weighting": "decay"},
    "normalised": {"global_norm": True},
    "output normalised": {"attended_norm": True, "chunk_shift": 2},
    "key shift": {"key_shift": True},
    "shifted grid": {"chunk_shift": 3},
    "wide": {"wide_every": 2, "wide_chunk": 24},
    "all": {
        "chunk_weighting": "decay",
        "global_norm": True,
        "key_shift": True,
        "global_rope": False,
        "chunk_shift": 4,
    },
    "local, shifted": {"attention_type": "local", "chunk_shift": 4},
    "wide, shifted": {"wide_every": 2, "wide_chunk": 24, "chunk_shift": 5},
    "heads": {"attention_type": "quadratic", "num_heads": 3},
    "heads, mixed": {"num_heads": 2, "chunk_shift": 3, "key_shift": True, "global_rope": False},
    "shifted tokens": {"token_shift": True},
    "ungated": {"gated": False, "expansion_factor": 3},
    "convolved": {"conv_size": 3, "chunk_shift": 3},
    "convolved, quadratic": {"conv_size": 4, "attention_type": "quadratic"},
    "softmax": {"attention_activation": "softmax", "chunk_shift": 4, "key_shift": True, "global_rope": False},
    "window": {"local_window": 2},
    "window, softmax, local": {"local_window": 2, "attention_activation": "softmax", "attention_type": "local"},
    "window, shifted": {"local_window": 2, "chunk_shift": 3, "attention_activation": "softmax"},
    "local heads": {"local_heads": 3, "chunk_shift": 3, "local_window": 2},
    "local heads, softmax": {"local_heads": 2, "attention_activation": "softmax"},
    "local keys": {"local_key_shift": True, "chunk_shift": 3},
    "local keys, window": {"local_key_shift": True, "local_window": 2, "local_heads": 2},
    "gated": {"gated_mean": True, "global_gates": 3, "chunk_shift": 3},
    "gated, normalised": {"gated_mean": True, "global_gates": 2, "global_norm": True, "key_shift": True},
    "gated, features": {"gated_mean": True, "global_gates": 2, "global_features": True},
    "gated, global": {"gated_mean": True, "global_gates": 1, "attention_type": "global", "global_rope": False},
    "delta": {"global_state": "delta", "chunk_shift": 3},
    "window, local keys, delta": {
        "local_window": 2,
        "local_key_shift": True,
        "global_state": "delta",
        "chunk_shift": 4,
        "key_shift": True,
        "global_rope": False,
    },
    "hybrid": {"quadratic_every": 2, "chunk_shift": 4},
    "window, gated, hybrid": {
        "local_window": 2,
        "attention_activation": "softmax",
        "gated_mean": True,
        "global_gates": 2,
        "quadratic_every": 3,
        "key_shift": True,
        "global_rope": False,
        "local_heads": 2,
    },
}
CAUSAL_ONLY = [
    name
    for name, changes in VARIANTS.items()
    if {"conv_size", "local_window", "global_state", "gated_mean"} & set(changes)
]
LENGTH = 29  # chunks of 8: three whole ones and a part


def variant(**changes) -> GAUConfig:
    settings = tiny_config().to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "query_key_dim", "chunk_size",
             "max_position_embeddings")  # fmt: skip
    return GAUConfig(**{name: settings[name] for name in names} | changes)


def stated(model, ids, *, causal):
    """The model on one document by N x N weights, with all chunks as the tokens of each layer's own grid."""
    config, N = model.config, ids.shape[1]
    naive = naive_config(config)
    state = dict(model.named_parameters())
    position = torch.arange(N)
    x = model.embed_tokens(ids)[0] + model.embed_positions(model.embed_tokens(ids), position[None])[0]
    for index in range(config.num_hidden_layers):
        own = f"layers.{index}."
        w = {name.removeprefix(own): p for name, p in state.items() if name.startswith(own)}
        n = naive_norm(x, w, naive)
        if config.conv_size:
            n = n + sum(weight * n.roll(j, 0).index_fill(0, position[:j], 0) for j, weight in enumerate(w["gau.conv"]))
        if config.token_shift:
            half = n.shape[1] // 2
            n = torch.cat([n.roll(1, 0).index_fill(0, position[:1], 0)[:, :half], n[:, half:]], 1)
        v, z = naive_linear(n, w, "gau.v_proj", "silu"), naive_linear(n, w, "gau.z_proj", "silu")
        u = naive_linear(n, w, "gau.u_proj", "silu") if config.gated else torch.ones_like(v)
        gamma, beta = w["gau.offset_scale.weight"], w["gau.offset_scale.bias"]
        if config.quadratic_every and index % config.quadratic_every == config.quadratic_every - 1:
            q, k = (naive_rotary(z * g + b, position, naive) for g, b in zip(gamma, beta, strict=True))
            scores = q @ k.T / config.query_key_dim**0.5
            if causal:
                scores = scores.masked_fill(position[None] > position[:, None], -torch.inf)
            x = x + naive_linear(u * (scores.softmax(-1) @ v), w, "gau.o_proj")
            continue
        if config.attention_type == "quadratic":
            attended = heads_stated(gamma, beta, z, v, w, naive, config, causal)
            x = x + naive_linear(u * attended, w, "gau.o_proj")
            continue
        wide = config.wide_every and index % config.wide_every == config.wide_every - 1
        C = config.wide_chunk if wide else config.chunk_size
        chunk = (position + config.shift_of(index)) // C
        if new_local(config) or config.gated_mean or config.global_state != "mean":
            attended = local_stated(gamma, beta, z, v, chunk, w, naive, config, causal)
            if config.attention_type != "local":
                attended = attended + state_stated(gamma[-2:], beta[-2:], n, z, v, chunk, w, naive, config, causal)
            x = x + naive_linear(u * attended, w, "gau.o_proj")
            continue
        offset = position[None] - position[:, None]
        same = chunk[:, None] == chunk[None]
        if causal:
            same = same & (offset <= 0)
        q, k = (naive_rotary(z * g + b, position, naive) for g, b in zip(gamma[:2], beta[:2], strict=True))
        bias = w["gau.relative_bias.weight"][torch.where(same, offset, 0) + C - 1]
        attended, H = torch.empty_like(v), config.num_heads
        for h, (v_h, out_h) in enumerate(zip(v.chunk(H, -1), attended.chunk(H, -1), strict=True)):
            scores = q[:, h::H] @ k[:, h::H].T / config.attention_divisor
            out_h[:] = (torch.relu(scores + bias).square() * same) @ v_h
            if config.attention_type != "local":
                dims = slice(h, None, H)
                out_h += global_stated(gamma[-2:], beta[-2:], z, v_h, chunk, w, naive, config, causal, dims)
        if config.attended_norm:
            rms = attended.square().mean(-1, keepdim=True).add(1e-12).sqrt()
            attended = attended / rms * w["gau.attended_norm.weight"]
        x = x + naive_linear(u * attended, w, "gau.o_proj")
    return naive_norm(x, state, naive)


def new_local(config) -> bool:
    return (
        config.attention_type != "global" and max(config.local_window, config.local_heads) > 1
        or config.local_key_shift or config.attention_activation == "softmax"
    )  # fmt: skip


def local_stated(gamma, beta, z, v, chunk, w, naive, config, causal):
    if config.attention_type == "global":
        return torch.zeros_like(v)
    N, H = len(z), config.local_heads
    position = torch.arange(N)
    offset = position[None] - position[:, None]
    age = chunk[:, None] - chunk[None]
    seen = (age >= 0) & (age < config.local_window) if causal else age == 0
    if causal:
        seen = seen & (offset <= 0)
    span, parts = config.local_window * config.chunk_size, []
    for h, v_h in enumerate(v.chunk(H, -1)):
        q, k = (naive_rotary(z * gamma[row] + beta[row], position, naive) for row in (h, H + h))
        if config.local_key_shift:
            odd = torch.arange(k.shape[1]) % (k.shape[1] // 2) % 2 == 1
            k = torch.where(odd, torch.cat([torch.zeros_like(k[:1]), k[:-1]]), k)
        bias = w["gau.relative_bias.weight"].view(H, -1)[h][torch.where(seen, offset, 0) + span - 1]
        if config.attention_activation == "softmax":
            scores = q @ k.T / config.query_key_dim**0.5 + bias
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        else:
            weights = torch.relu(q @ k.T / config.attention_divisor + bias).square() * seen
        parts.append(weights @ v_h)
    return torch.cat(parts, -1)


def state_stated(gamma, beta, n, z, v, chunk, w, naive, config, causal):
    """Token by token: each updates the state, and the tokens of a chunk read the state from before the chunk."""
    if config.global_state == "mean" and not config.gated_mean:
        return global_stated(gamma, beta, z, v, chunk, w, naive, config, causal)
    N, S = z.shape
    before = torch.cat([torch.zeros(1, S, dtype=z.dtype), z[:-1]]) if config.key_shift else z
    query, key = z * gamma[0] + beta[0], before * gamma[1] + beta[1]
    if config.global_rope:
        query, key = (naive_rotary(x, torch.arange(N), naive) for x in (query, key))
    gate = (n @ w["gau.gate_proj.weight"].T).view(N, 2, -1) + w["gau.gate_bias"]
    keep, write = torch.sigmoid(gate[:, 0]), torch.sigmoid(gate[:, 1])
    outs = []
    for h, v_h in enumerate(v.chunk(keep.shape[1], -1)):
        state, mass, out = torch.zeros(S, v_h.shape[1], dtype=v.dtype), torch.zeros(S, 1, dtype=v.dtype), []
        for i in range(N):
            if i == 0 or chunk[i] != chunk[i - 1]:
                read, held = 1.0, state if config.global_state == "delta" else state / mass.clamp(min=1e-300)
            read = read * keep[i, h]
            k, q = key[i], query[i]
            if config.global_state == "delta":
                k, q = k / k.norm(), q / q.norm()
                state = keep[i, h] * (state - write[i, h] * torch.outer(k, k @ state))
            else:
                if config.global_features:
                    k, q = k.exp(), q.softmax(-1)
                state, mass = keep[i, h] * state, keep[i, h] * mass
                mass = mass + write[i, h] * (k[:, None] if config.global_features else 1)
            state = state + write[i, h] * torch.outer(k, v_h[i])
            out.append(read * q @ held)
        outs.append(torch.stack(out))
    out = torch.cat(outs, -1)
    if config.global_norm:
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + config.norm_eps) * w["gau.out_norm.weight"]
    return out


def global_stated(gamma, beta, z, v, chunk, w, naive, config, causal, dims=slice(None)):
    """Token i's query times every token j's key, times what chunk(j) counts in chunk(i)."""
    N, S = z.shape
    before = torch.cat([torch.zeros(1, S, dtype=z.dtype), z[:-1]]) if config.key_shift else z
    query, key = z * gamma[0] + beta[0], before * gamma[1] + beta[1]
    if config.global_rope:
        query, key = (naive_rotary(x, torch.arange(N), naive) for x in (query, key))
    decay = torch.ones(S // 2, dtype=z.dtype)
    if config.chunk_weighting == "decay":
        decay = torch.sigmoid(w["gau.decay_logit"])
    decay = torch.cat([decay, decay])[dims]
    query, key, S = query[:, dims], key[:, dims], len(decay)
    out = torch.zeros_like(v)
    for i in range(N):
        total, norm = torch.zeros(S, v.shape[1], dtype=v.dtype), torch.zeros(S, dtype=v.dtype)
        for j in range(N):
            age = int(chunk[i] - chunk[j])
            if causal and age <= 0:
                continue
            weight = decay ** (age - 1 if causal else abs(age))
            total = total + (weight * key[j])[:, None] * v[j]
            norm = norm + weight
        out[i] = query[i] @ (total / norm[:, None]) if bool(norm.any()) else 0
    if config.global_norm:
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + config.norm_eps) * w["gau.out_norm.weight"]
    return out


def heads_stated(gamma, beta, z, v, w, naive, config, causal):
    N, H = len(z), config.num_heads
    position = torch.arange(N)
    q, k = (naive_rotary(z * g + b, position, naive) for g, b in zip(gamma, beta, strict=True))
    offset = position[None] - position[:, None]
    bias = naive_relative_bias(offset, w, naive, causal=causal)
    parts = []
    for h, v_h in enumerate(v.chunk(H, -1)):
        weights = torch.relu(q[:, h::H] @ k[:, h::H].T / config.attention_divisor + bias).square()
        parts.append((weights.tril() if causal else weights) @ v_h)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_its_dense_statement(name, causal):
    if name in CAUSAL_ONLY and not causal:
        with pytest.raises(Exception, match="is_decoder"):
            variant(**VARIANTS[name])
        return
    model = make_model(GAUModel, variant(**VARIANTS[name], is_decoder=causal))
    ids = random_ids(model.config, 1, LENGTH)
    with torch.no_grad():
        got = model(ids).last_hidden_state[0]
        assert_close(got, stated(model, ids, causal=causal), 1e-9)
        # And the variant matters: the same weights without it give something else.
        plain = make_model(GAUModel, variant(is_decoder=causal))
        common = {name: p for name, p in model.state_dict().items() if name in plain.state_dict()}
        if name not in (
            "ungated",
            "heads",
            "local, shifted",
            "wide",
            "wide, shifted",
            "convolved, quadratic",
            "heads, mixed",
            "hybrid",
            "gated, global",
        ) and not new_local(model.config):
            plain.load_state_dict(common)
            assert not torch.allclose(plain(ids).last_hidden_state[0], got, rtol=1e-3)


@pytest.mark.parametrize(("ours", "flash"), [(GAUForCausalLM, FlashForCausalLM), (GAUForMaskedLM, FlashForMaskedLM)])
def test_without_a_change_it_is_flash(ours, flash):
    for changes in ({}, {"attention_type": "local"}, {"attention_type": "quadratic"}, {"attention_type": "global"}):
        model, plain = make_model(ours, variant(**changes)), make_model(flash, tiny_config(**changes))
        model.load_state_dict(plain.state_dict())
        ids = random_ids(plain.config, 2, LENGTH)
        mask = torch.ones_like(ids)
        mask[0, :5] = mask[1, 20:] = 0
        with torch.no_grad():
            got, expected = (m(ids, attention_mask=mask).logits[mask == 1] for m in (model, plain))
        assert_close(got, expected, 1e-12)


@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if name not in ("key shift", "wide", "output normalised", "local, shifted")]
)
def test_padding_and_packing_do_not_matter(name):
    model = make_model(GAUModel, variant(**VARIANTS[name], is_decoder=True))
    ids = random_ids(model.config, 1, 21)
    first, second = ids[:, :13], ids[:, 13:]
    with torch.no_grad():
        alone = [model(part).last_hidden_state[0] for part in (first, second)]
        positions = torch.cat([torch.arange(13), torch.arange(8)])[None]
        assert_close(model(ids, position_ids=positions).last_hidden_state[0], torch.cat(alone), 1e-9)
        mask = torch.tensor([[0] * 3 + [1] * 13 + [0] * 2])
        padded = torch.nn.functional.pad(first, (3, 2), value=5)
        assert_close(model(padded, attention_mask=mask).last_hidden_state[0, 3:16], alone[0], 1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_later_tokens_do_not_matter(name):
    model = make_model(GAUModel, variant(**VARIANTS[name], is_decoder=True))
    ids = random_ids(model.config, 1, LENGTH)
    changed = ids.clone()
    changed[:, 18:] = (ids[:, 18:] + 1) % model.config.vocab_size
    with torch.no_grad():
        one, other = (model(x).last_hidden_state[0] for x in (ids, changed))
    assert_close(one[:18], other[:18], 1e-12)
    assert not torch.allclose(one[18], other[18])


@pytest.mark.parametrize(
    "name", ["plus-keys", "plus-window-keys", "plus-keys-delta", "plus-window-keys-delta", "plus-gated"]
)
def test_the_studys_forms_do_not_look_ahead_at_any_border(name):
    """As they are trained, with chunks of 64: before, at and after the borders of both grids."""
    model = build(name, "xs", 97, 300, causal=True).double().eval()
    ids = torch.randint(97, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())))
        whole = model.model(ids).last_hidden_state[0]
        for at in (1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 159, 160, 200, 299):
            changed = ids.clone()
            changed[:, at:] = (ids[:, at:] + 1) % 97
            other = model.model(changed).last_hidden_state[0]
            assert_close(other[:at], whole[:at], 1e-9)
            assert not torch.allclose(other[at], whole[at])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local_window": 2},
        {"global_state": "delta"},
        {"local_window": 2, "local_key_shift": True, "global_state": "delta"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_flash_plus_as_a_variant_is_flash_plus(changes):
    """So differences to FLASH+'s cells are those of the change, and the library's forms are the study's."""
    shared = {"chunk_shift": 4, "use_scaled_sinusoid": False, **changes}
    plain = tiny_config(global_form="previous_token", **shared)
    model = make_model(GAUForCausalLM, variant(key_shift=True, global_rope=False, is_decoder=True, **shared))
    flash = make_model(FlashForCausalLM, plain)
    with torch.no_grad():
        for layer in flash.model.layers:
            # A document's first key is an offset here and 0 there.
            layer.gau.offset_scale.bias[-1].zero_()
        own = model.state_dict()
        # Biases of a window have heads, those of gates their number.
        model.load_state_dict({name: x.view(own[name].shape) for name, x in flash.state_dict().items()})
        ids = random_ids(plain, 2, LENGTH)
        assert_close(model(ids).logits, flash(ids).logits, 1e-12)


def test_a_softmax_begins_with_half_of_its_weight_on_the_nearest_tokens():
    bias = GAUModel(variant(local_window=2, attention_activation="softmax", attention_init="recent", is_decoder=True,
                            initializer_range=0.0)).layers[0].gau.relative_bias  # fmt: skip
    weights = bias(bias.span)[0, : bias.span].softmax(-1)
    assert 0.5 < weights[-4:].sum() < 0.7 and bool((weights[-4:].diff() > 0).all())


def test_it_is_saved_and_loaded_by_the_auto_classes(tmp_path):
    model = make_model(GAUForCausalLM, variant(**VARIANTS["all"]), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(model.config, 1, LENGTH)
    assert type(loaded) is GAUForCausalLM and torch.equal(loaded(ids).logits, model(ids).logits)


def test_every_parameter_is_reached():
    for name, changes in VARIANTS.items():
        model = make_model(GAUForCausalLM, variant(**changes, is_decoder=True))
        ids = random_ids(model.config, 1, LENGTH)
        model(ids, labels=ids).loss.backward()
        missed = [key for key, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
        assert not missed, f"{name}: {missed}"


def test_a_new_model_begins_without_the_normalised_branch_and_with_spread_decays():
    model = GAUModel(variant(global_norm=True, chunk_weighting="decay"))
    unit = model.layers[0].gau
    assert not unit.out_norm.weight.any()
    decay = torch.sigmoid(unit.decay_logit)
    assert decay[0] < 0.1 and decay[-1] > 0.99 and bool((decay.diff() > 0).all())


def test_wrong_settings_are_refused():
    for changes, match in (
        ({"chunk_weighting": "sum"}, "chunk_weighting"),
        ({"global_form": "previous_token"}, "global_form"),
        ({"num_heads": 2, "rope_interleaved": True}, "rope_interleaved"),
        ({"num_heads": 2, "chunk_weighting": "decay"}, "chunk_weighting"),
        ({"num_heads": 4}, "num_heads"),
        ({"num_heads": 5, "attention_type": "quadratic"}, "num_heads"),
        ({"chunk_shift": 8}, "chunk_shift"),
        ({"wide_every": 2}, "wide_every"),
        ({"backend": "auto"}, "backend"),
        ({"global_state": "sum"}, "global_state"),
        ({"gated_mean": True}, "gated_mean"),
        ({"gated_mean": True, "attention_type": "local", "is_decoder": True}, "gated_mean"),
        ({"global_state": "delta", "num_heads": 2, "is_decoder": True}, "global_state"),
        ({"global_gates": 7}, "global_gates"),
        ({"global_features": True}, "global_features"),
        ({"local_window": 2}, "local_window"),
        ({"local_heads": 7}, "local_heads"),
        ({"local_heads": 2, "relative_bias": "t5"}, "local_heads"),
        ({"local_key_shift": True, "attention_type": "global"}, "local_key_shift"),
        ({"quadratic_every": 2, "attention_type": "quadratic"}, "quadratic_every"),
    ):
        with pytest.raises(Exception, match=match):
            variant(**changes)
    model = make_model(GAUModel, variant(is_decoder=True))
    ids = random_ids(model.config, 1, 12)
    with pytest.raises(ValueError, match="no decoding cache"):
        model(ids, use_cache=True)
