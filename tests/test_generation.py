# SPDX-License-Identifier: Apache-2.0
"""The cache: full == prefill in any splits == token by token == static, for ragged batches; and all of generate()."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextStreamer

from flash_hf import FlashForCausalLM, FlashForMaskedLM, FlashModel
from flash_hf.testing import assert_close, make_model, random_ids, tiny_config


C = 8
# Forms of mixed chunk attention, beside the types.
FORMS = {
    "previous_token": {"global_form": "previous_token"},
    "shifted": {"chunk_shift": 3},
    "shifted previous_token": {"chunk_shift": 5, "global_form": "previous_token"},
}
TYPES = ["mixed_chunk", "quadratic", "local", "global", *FORMS]
GREEDY = {"do_sample": False, "max_new_tokens": 3 * C + 2, "eos_token_id": None, "pad_token_id": 0}


def build(attention_type="mixed_chunk", dtype=torch.float64, seed=0, **changes):
    if attention_type in FORMS:
        attention_type, changes = "mixed_chunk", {**FORMS[attention_type], **changes}
    config = tiny_config(attention_type=attention_type, **changes)
    return make_model(FlashForCausalLM, config, dtype=dtype, seed=seed)


def ragged(config, lengths=(29, 18, 6, 1), width=29):
    """Left-padded ids and mask."""
    ids = random_ids(config, len(lengths), width)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    return ids, mask


def run_in_parts(model, ids, mask, borders, cache=None):
    """Logits of the parts between borders, joined, with a mask of all columns so far."""
    parts = []
    with torch.no_grad():
        for begin, end in itertools.pairwise(borders):
            past = None if cache is None and begin == 0 else cache
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, 1), cache


def static(model, rows=None):
    return StaticCache(config=model.config, max_cache_len=100)


@pytest.mark.parametrize("cache_of", [lambda model: None, static], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype, ratio", [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize("activation", ["relu2", "softmax", "laplace"])
@pytest.mark.parametrize("attention_type", TYPES)
def test_any_split_equals_the_whole(attention_type, activation, dtype, ratio, cache_of):
    model = build(attention_type, dtype, attention_activation=activation)
    ids, mask = ragged(model.config)
    real = mask.bool()
    with torch.no_grad():
        full = model(ids, attention_mask=mask, use_cache=False).logits
    splits = {
        "token by token": range(30),
        "prefill, then token by token": [0, *range(11, 30)],
        "uneven": [0, 3, 4, 13, 21, 22, 29],
        "one": [0, 29],
        "chunks": [0, 8, 16, 24, 29],
    }
    for name, borders in splits.items():
        logits, cache = run_in_parts(model, ids, mask, list(borders), cache_of(model))
        assert logits.isfinite().all()
        assert_close(logits[real], full[real], ratio, name)
        assert int(cache.get_seq_length()) == 29


@pytest.mark.parametrize("changes", [
    {"global_normalization": "chunk"}, {"relative_bias": "rotary"}, {"relative_bias": "t5"}, {"relative_bias": None},
    {"rope_interleaved": True}, {"chunk_size": 1}, {"use_rope": False}, {"global_form": "previous_token"},
    {"global_form": "previous_token", "chunk_size": 1}, {"global_form": "previous_token", "attention_type": "global"},
    {"chunk_shift": 7, "attention_type": "local"}, {"chunk_shift": 1, "global_normalization": "chunk"},
    {"chunk_shift": 1, "chunk_size": 2, "global_form": "previous_token"},
], ids=str)  # fmt: skip
def test_options_decode_alike(changes):
    model = build(**changes)
    ids, mask = ragged(model.config)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, use_cache=False).logits
    logits, _ = run_in_parts(model, ids, mask, [0, 5, *range(6, 30)])
    assert_close(logits[mask.bool()], full[mask.bool()], 1e-9)


@pytest.mark.parametrize("cache_of", [lambda model: None, static], ids=["dynamic", "static"])
@pytest.mark.parametrize("attention_type", TYPES)
def test_padding_inside_a_continuation_leaves_no_trace(attention_type, cache_of):
    """Second turns of different lengths, left-padded in the middle of the conversation, also a padded single step."""
    model = build(attention_type)
    ids, mask = random_ids(model.config, 2, 36), torch.ones(2, 36, dtype=torch.long)
    mask[0, :4] = mask[1, 12:21] = mask[0, 30] = mask[1, 33] = 0
    for borders in ([0, 12, 36], [0, 12, 30, *range(31, 37)], list(range(37))):
        logits, _ = run_in_parts(model, ids, mask, borders, cache_of(model))
        for row in range(2):
            alone = model(ids[row : row + 1, mask[row].bool()]).logits[0]
            assert_close(logits[row, mask[row].bool()], alone, 1e-9, f"row {row}, {borders[:4]}")


@pytest.mark.parametrize("attention_type", TYPES)
def test_a_row_of_nothing_but_padding_keeps_its_state(attention_type):
    """At the border of a chunk, within one, in the first and in a later one, beside rows that go on."""
    model = build(attention_type)
    ids, mask = random_ids(model.config, 4, 36), torch.ones(4, 36, dtype=torch.long)
    mask[0, 16:20] = 0
    mask[1, :3] = mask[1, 16:20] = 0
    mask[2, :11] = mask[2, 16:20] = 0
    for borders in ([0, 16, 20, 36], [0, 16, 18, 20, *range(21, 37)]):
        logits, _ = run_in_parts(model, ids, mask, borders)
        for row in range(4):
            alone = model(ids[row : row + 1, mask[row].bool()]).logits[0]
            assert_close(logits[row, mask[row].bool()], alone, 1e-9, f"row {row}, {borders[:4]}")


@pytest.mark.parametrize("attention_type", TYPES)
def test_a_packed_prefill_leaves_the_state_of_its_last_document(attention_type):
    model = build(attention_type)
    first, second = random_ids(model.config, 1, 19), random_ids(model.config, 1, 21, seed=1)
    row = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(19), torch.arange(13)])[None]
    with torch.no_grad():
        out = model(row[:, :32], position_ids=positions, use_cache=True)
        rest = model(row[:, 32:], past_key_values=out.past_key_values, use_cache=True).logits
    assert_close(rest, model(second).logits[:, 13:], 1e-9)


@pytest.mark.parametrize("attention_type", TYPES)
def test_generate_equals_generate_without_cache(attention_type):
    model = build(attention_type)
    ids, mask = ragged(model.config)
    inputs = {"attention_mask": mask, **GREEDY}
    expected = model.generate(ids, use_cache=False, **inputs)
    assert expected.shape == (4, 29 + 3 * C + 2)
    assert len(expected[:, 29:].unique()) > 4  # not one token for ever
    for name, changes in {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "chunked prefill": {"prefill_chunk_size": 5},
        "chunked prefill, static": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    }.items():
        assert torch.equal(model.generate(ids, **inputs, **changes), expected), name
    for row in range(4):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert torch.equal(alone[0, -GREEDY["max_new_tokens"] :], expected[row, 29:]), f"row {row} alone"
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs), expected[:, 29:])


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "quadratic", "shifted previous_token"])
@pytest.mark.parametrize("implementation", [None, "static"])
def test_beam_search_with_cache_equals_without(attention_type, implementation):
    model = build(attention_type)
    ids, mask = ragged(model.config)
    inputs = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2, **GREEDY}
    expected = model.generate(ids, use_cache=False, **inputs)
    assert expected.shape[0] == 8
    assert torch.equal(model.generate(ids, cache_implementation=implementation, **inputs), expected)


def test_sampling_with_cache_equals_without():
    model = build()
    ids, mask = ragged(model.config)
    inputs = {**GREEDY, "attention_mask": mask, "do_sample": True, "num_return_sequences": 3, "top_k": 20}
    torch.manual_seed(5)
    expected = model.generate(ids, use_cache=False, **inputs)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, **inputs), expected)
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("attention_type", TYPES)
def test_continuing_a_returned_cache(attention_type):
    model = build(attention_type)
    ids, mask = ragged(model.config)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    half = {**GREEDY, "max_new_tokens": 11}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **half)
    longer = torch.cat([mask, mask.new_ones(4, 11)], 1)
    rest = {**GREEDY, "max_new_tokens": GREEDY["max_new_tokens"] - 11}
    got = model.generate(out.sequences, attention_mask=longer, past_key_values=out.past_key_values, **rest)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("attention_type", TYPES)
def test_assisted_and_prompt_lookup_decoding(attention_type):
    """Candidates are verified in one call and rolled back over chunk borders; the answer is greedy decoding's."""
    model = build(attention_type)
    ids = random_ids(model.config, 1, 29)
    expected = model.generate(ids, **GREEDY)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        # An assistant that is often right, so that both acceptance and rollback happen.
        for parameter in twin.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    for assistant in (build(attention_type, seed=1), copy.deepcopy(model), twin):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)
    repeated = ids[:, :7].repeat(1, 5)
    lookup = model.generate(repeated, prompt_lookup_num_tokens=4, **GREEDY)
    assert torch.equal(lookup, model.generate(repeated, **GREEDY))


@pytest.mark.parametrize("attention_type", ["mixed_chunk", *FORMS])
def test_rollback_restores_the_state(attention_type):
    model = build(attention_type)
    ids, mask = ragged(model.config, lengths=(40, 33), width=40)
    for steps, remove in (([0, 10, 30], 13), ([0, 10, 11, 12, 30, 31], 20), ([0, 21, 22], 1), ([0, 10, 40], 30)):
        _, cache = run_in_parts(model, ids, mask, steps[:2])
        cache.activate_past_recording()
        _, cache = run_in_parts(model, ids, mask, steps[1:], cache)
        cache.crop(-remove)
        kept = steps[-1] - remove
        assert cache.get_seq_length() == kept
        logits, cache = run_in_parts(model, ids, mask, [kept, kept + 3, 40] if kept < 37 else [kept, 40], cache)
        full = model(ids, attention_mask=mask).logits
        real = mask[:, kept:].bool()
        assert_close(logits[real], full[:, kept:][real], 1e-9, str(steps))
        cache.crop(0)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)


def test_streaming():
    model = build()

    class Tokens:
        def __init__(self):
            self.parts = []

        def put(self, value):
            self.parts.append(value.flatten())

        def end(self):
            self.parts.append(None)

    streamer = Tokens()
    ids = random_ids(model.config, 1, 9)
    out = model.generate(ids, streamer=streamer, **GREEDY)
    assert streamer.parts[-1] is None and len(streamer.parts) == GREEDY["max_new_tokens"] + 2
    assert torch.equal(torch.cat(streamer.parts[:-1]), out[0])
    assert issubclass(TextStreamer, object)


def cache_bytes(cache):
    seen, total = set(), 0
    for layer in cache.layers:
        values = [layer.cumulative_length, *(layer.state or ())]
        assert not layer._recorded and layer._snapshot is None
        for tensor in values:
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.untyped_storage().nbytes()
    return total


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "local", "global", *FORMS])
def test_cache_bytes_do_not_grow(attention_type):
    model = build(attention_type, dtype=torch.float32, chunk_size=16)
    with torch.no_grad():
        sizes = {
            length: cache_bytes(model(random_ids(model.config, 2, length), use_cache=True).past_key_values)
            for length in (1, 64, 4096)
        }
        out = model(random_ids(model.config, 2, 64), use_cache=True)
        for _ in range(40):
            out = model(random_ids(model.config, 2, 1), past_key_values=out.past_key_values, use_cache=True)
    config = model.config
    S, E, width = config.query_key_dim, config.intermediate_size, config.chunk_size
    quad, lin = attention_type != "global", attention_type != "local"
    keys = width * (quad + lin) + (config.global_form == "previous_token")
    expected = 3 * 2 * (4 * (width * E + keys * S + lin * S * E) + 8)
    assert set(sizes.values()) == {expected} and cache_bytes(out.past_key_values) == expected


def test_sums_are_float32_in_a_bfloat16_model():
    model = build(dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(random_ids(model.config, 1, 20), use_cache=True).past_key_values
    state = cache.layers[0].state
    assert state.total.dtype == torch.float32 and state.value.dtype == torch.bfloat16
    assert all(tensor.grad_fn is None for tensor in state)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention_type", TYPES)
def test_cache_operations_on_the_batch(attention_type, kind):
    model = build(attention_type)
    ids, mask = ragged(model.config, lengths=(29, 18, 6))
    full = model(ids, attention_mask=mask).logits

    def fresh():
        cache = static(model) if kind == "static" else DynamicCache(config=model.config)
        return run_in_parts(model, ids, mask, [0, 13], cache)[1]

    order = torch.tensor([2, 0, 0])
    cache = fresh()
    cache.reorder_cache(order)
    logits, cache = run_in_parts(model, ids[order], mask[order], [13, 20, 29], cache)
    real = mask[order, 13:].bool()
    assert_close(logits[real], full[order, 13:][real], 1e-9, "reorder")
    if kind == "dynamic" or attention_type != "quadratic":
        for name, change, index in (
            ("select", lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
            ("repeat", lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ):
            cache = fresh()
            change(cache)
            logits, _ = run_in_parts(model, ids[index], mask[index], [13, 20, 29], cache)
            real = mask[index, 13:].bool()
            assert_close(logits[real], full[index, 13:][real], 1e-9, name)
    cache = fresh()
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    logits, _ = run_in_parts(model, ids, mask, [0, 7, 29], cache)
    assert_close(logits[mask.bool()], full[mask.bool()], 1e-9, "reset")


def test_an_empty_dynamic_cache_of_no_model_is_adopted():
    model = build()
    cache = DynamicCache()
    ids = random_ids(model.config, 1, 20)
    with torch.no_grad():
        out = model(ids[:, :12], past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        assert_close(model(ids[:, 12:], past_key_values=cache).logits, model(ids).logits[:, 12:], 1e-9)


def test_branching_a_copied_cache():
    model = build()
    ids = random_ids(model.config, 1, 30)
    _, cache = run_in_parts(model, ids, torch.ones_like(ids), [0, 20])
    branch = copy.deepcopy(cache)
    other = random_ids(model.config, 1, 10, seed=3)
    with torch.no_grad():
        first = model(ids[:, 20:], past_key_values=cache).logits
        second = model(other, past_key_values=branch).logits
    assert_close(first, model(ids).logits[:, 20:], 1e-9)
    assert_close(second, model(torch.cat([ids[:, :20], other], 1)).logits[:, 20:], 1e-9)


def test_training_mode_makes_no_cache():
    """Nobody reads it there, and for short sequences it would outweigh the activations."""
    model = build().train()
    assert model(random_ids(model.config, 1, 9)).past_key_values is None
    assert model.eval()(random_ids(model.config, 1, 9)).past_key_values is not None


def test_caches_that_cannot_fit_are_refused():
    model = build()
    ids = random_ids(model.config, 2, 9)
    _, cache = run_in_parts(model, ids, torch.ones_like(ids), [0, 9])
    with pytest.raises(ValueError, match="holds 2 rows but the input has 3"):
        model(random_ids(model.config, 3, 1), past_key_values=cache)
    for changes in ({"chunk_size": 4}, {"chunk_shift": 2}, {"global_form": "previous_token"}):
        with pytest.raises(ValueError, match="another shape"):
            build(**changes)(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="3 layers.*got 2 layers"):
        model(ids, past_key_values=DynamicCache(config=tiny_config(num_hidden_layers=2)))
    with pytest.raises(ValueError, match="cache of this model"):
        model(ids, past_key_values=DynamicCache(config=tiny_config(attention_type="quadratic")))
    with pytest.raises(ValueError, match="transformers Cache"):
        model(ids, past_key_values=[1, 2])
    with pytest.raises(ValueError, match="bidirectional"):
        make_model(FlashModel, tiny_config())(ids, past_key_values=DynamicCache())
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match="cache of this model"):
        model(ids, past_key_values=DynamicCache(config=LlamaConfig(num_hidden_layers=3)))


def test_masked_head_cannot_generate():
    assert not FlashForMaskedLM.can_generate() and FlashForCausalLM.can_generate()


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "quadratic"])
def test_static_rollback_is_refused(attention_type):
    """By the host until 5.23; since 5.24 it asks the layers, and would take back its own count of tokens alone."""
    model = build(attention_type)
    ids = random_ids(model.config, 1, 9)
    with pytest.raises(ValueError, match="[Ss]tatic"):
        model.generate(ids, prompt_lookup_num_tokens=2, cache_implementation="static", **GREEDY)
    _, cache = run_in_parts(model, ids, torch.ones_like(ids), [0, 9], static(model))
    assert not cache.is_croppable
    for change in (cache.activate_past_recording, lambda: cache.crop(-1)):
        with pytest.raises(ValueError, match="cannot be rolled back.*DynamicCache"):
            change()
