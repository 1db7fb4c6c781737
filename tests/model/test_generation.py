# SPDX-License-Identifier: Apache-2.0
"""The cache: full == prefill in any splits == token by token == static, for ragged batches; and all of generate()."""

import copy
import itertools
import re

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    TextStreamer,
    WatermarkingConfig,
)

from flash_hf import FlashForCausalLM, FlashForMaskedLM, FlashModel
from flash_hf.cache_flash import CACHE_NAME
from helpers import assert_close, make_model, random_ids, tiny_config


C = 8
# Forms of mixed chunk attention, beside the types.
FORMS = {
    "previous_token": {"global_form": "previous_token"},
    "shifted": {"chunk_shift": 3},
    "shifted previous_token": {"chunk_shift": 5, "global_form": "previous_token"},
    "local keys": {"local_key_shift": True, "chunk_shift": 5, "global_form": "previous_token"},
    "window": {"local_window": 2},
    "window, local keys": {"local_window": 2, "local_key_shift": True, "chunk_shift": 3},
    "delta": {"global_state": "delta"},
    "delta previous_token": {"global_state": "delta", "chunk_shift": 5, "global_form": "previous_token"},
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


def assert_as_alone(logits, model, ids, mask, borders):
    """Each row's logits are those of its real tokens alone, without padding and cache."""
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row : row + 1, real]).logits[0]
        assert_close(logits[row, real], alone, 1e-9, f"row {row}, {borders[:4]}")


def static(model):
    return StaticCache(config=model.config, max_cache_len=100)


# Half of all combinations: each type with each activation in both dtypes, in one kind of cache each; and each type in
# both dtypes with both kinds. A cache keeps the same state for all activations, which are of scores alone.
SPLITS = [
    pytest.param(name, activation, dtype, ratio, cache_of, id=f"{name}-{activation}-{str(dtype)[6:]}-{kind}")
    for row, name in enumerate(TYPES) for column, activation in enumerate(("relu2", "softmax", "laplace"))
    for number, (dtype, ratio) in enumerate(((torch.float64, 1e-9), (torch.float32, 2e-4)))
    for kind, cache_of in [(("dynamic", lambda model: None), ("static", static))[(row + column + number) % 2]]
]  # fmt: skip


@pytest.mark.parametrize("attention_type, activation, dtype, ratio, cache_of", SPLITS)
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
    {"local_key_shift": True, "chunk_size": 1}, {"local_key_shift": True, "attention_type": "local"},
    {"local_key_shift": True, "rope_interleaved": True, "relative_bias": None},
    {"local_window": 2, "chunk_size": 1}, {"local_window": 2, "attention_type": "local", "relative_bias": "rotary"},
    {"local_window": 2, "chunk_size": 2, "local_key_shift": True, "chunk_shift": 1, "relative_bias": "t5"},
    {"local_window": 2, "chunk_shift": 5, "global_form": "previous_token", "global_state": "delta"},
    {"global_state": "delta", "chunk_size": 1}, {"global_state": "delta", "attention_type": "global"},
    {"global_state": "delta", "chunk_shift": 1, "chunk_size": 2, "global_form": "previous_token"},
    {"global_state": "delta", "chunk_shift": 3, "global_form": "previous_token", "local_key_shift": True},
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
        assert_as_alone(logits, model, ids, mask, borders)


@pytest.mark.parametrize("attention_type", TYPES)
def test_a_row_of_nothing_but_padding_keeps_its_state(attention_type):
    """At the border of a chunk, within one, in the first and in a later one, beside rows that continue."""
    model = build(attention_type)
    ids, mask = random_ids(model.config, 4, 36), torch.ones(4, 36, dtype=torch.long)
    mask[0, 16:20] = 0
    mask[1, :3] = mask[1, 16:20] = 0
    mask[2, :11] = mask[2, 16:20] = 0
    for borders in ([0, 16, 20, 36], [0, 16, 18, 20, *range(21, 37)]):
        logits, _ = run_in_parts(model, ids, mask, borders)
        assert_as_alone(logits, model, ids, mask, borders)


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
        "prefill by tokens": {"prefill_chunk_size": 1},
        "prefill by tokens, static": {"prefill_chunk_size": 1, "cache_implementation": "static"},
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
        # An assistant that is often right, so that candidates are both accepted and rolled back.
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


def test_a_cache_rolled_back_to_its_beginning():
    """It is then as good as new, and takes another batch, too."""
    model = build("quadratic")
    ids, mask = ragged(model.config)
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    for rows in (4, 2):
        _, cache = run_in_parts(model, ids[:rows], mask[:rows], [0, 21, 29])
        cache.crop(-29)
        assert cache.get_seq_length() == 0
        logits, _ = run_in_parts(model, ids, mask, [0, 5, 29], cache)
        assert_close(logits[mask.bool()], expected, 1e-9, f"after {rows} rows")


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


@pytest.mark.parametrize("more", [{}, {"token_type_ids": torch.zeros(2, 9, dtype=torch.long)}], ids=["ids", "types"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_step_is_prepared_as_by_transformers(kind, more):
    model = build("mixed_chunk", dtype=torch.float32)
    ids = random_ids(model.config, 2, 9)
    cache = kind(config=model.config, **({"max_cache_len": 16} if kind is StaticCache else {}))
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
    options = {"next_sequence_length": 1, CACHE_NAME: cache, "use_cache": True, "labels": None, **more}
    own = model.prepare_inputs_for_generation(ids, attention_mask=torch.ones_like(ids), **options)
    theirs = GenerationMixin.prepare_inputs_for_generation(model, ids, **options)
    assert {name: value for name, value in own.items() if value is not None}.keys() == theirs.keys()
    for name, value in theirs.items():
        same = torch.equal(own[name], value) if isinstance(value, torch.Tensor) else own[name] is value
        assert same, name
    assert own["input_ids"].stride() == (1, 1)


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
    delta, window = config.global_state == "delta", config.local_window
    keys = width * (quad * window + lin - delta) + (config.global_form == "previous_token") + config.local_key_shift
    expected = 3 * 2 * (4 * (window * width * E + keys * S + (lin + delta) * S * E + delta) + 8)
    assert set(sizes.values()) == {expected} and cache_bytes(out.past_key_values) == expected


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "delta"])
def test_sums_are_float32_in_a_bfloat16_model(attention_type):
    model = build(attention_type, dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(random_ids(model.config, 1, 20), use_cache=True).past_key_values
    state = cache.layers[0].state
    assert state.total.dtype == torch.float32 and state.value.dtype == torch.bfloat16
    if attention_type == "delta":
        assert state.opened.dtype == state.since.dtype == torch.float32
    assert all(tensor.grad_fn is None for tensor in state if tensor is not None)


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


@pytest.mark.parametrize("attention_type", TYPES)
def test_a_cache_filled_in_inference_mode(attention_type):
    """generate() is not in inference mode: its steps may not overwrite what was made there."""
    model = build(attention_type)
    ids = random_ids(model.config, 2, 20)
    expected = model.generate(ids, **GREEDY)
    with torch.inference_mode():
        cache = model(ids[:, :19], use_cache=True).past_key_values
        model(ids[:, 19:], past_key_values=copy.deepcopy(cache))
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)
    with torch.inference_mode():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    cache.activate_past_recording()
    with torch.no_grad():
        for part in (ids[:, 5:6], ids[:, 9:12]):
            model(part, past_key_values=cache)
        cache.crop(-3)
        assert_close(model(ids[:, 6:], past_key_values=cache).logits, model(ids).logits[:, 6:], 1e-9)


def test_training_mode_makes_no_cache():
    """It would go unused, and for short sequences it would outweigh the activations."""
    model = build().train()
    assert model(random_ids(model.config, 1, 9)).past_key_values is None
    assert model.eval()(random_ids(model.config, 1, 9)).past_key_values is not None


@pytest.mark.parametrize("form", ["mixed_chunk", "quadratic", "shifted previous_token"])
def test_training_mode_makes_a_cache_on_request(form):
    model = build(form).train()
    ids = random_ids(model.config, 2, 21)
    first = model(ids[:, :19], use_cache=True)
    second = model(ids[:, 19:], past_key_values=first.past_key_values)
    whole = model(ids)
    assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, 1e-9)
    assert whole.past_key_values is None


def test_caches_that_cannot_fit_are_refused():
    model = build()
    ids = random_ids(model.config, 2, 9)
    _, cache = run_in_parts(model, ids, torch.ones_like(ids), [0, 9])
    with pytest.raises(ValueError, match="holds 2 rows but the input has 3"):
        model(random_ids(model.config, 3, 1), past_key_values=cache)
    for changes in (
        {"chunk_size": 4},
        {"chunk_shift": 2},
        {"global_form": "previous_token"},
        {"global_state": "delta"},
        {"local_window": 2},
        {"hidden_size": 48},  # a multiple, of which a cache could be a shard under tensor parallelism
    ):
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
    """Until 5.23 transformers refuses; 5.24 leaves it to the layers, and would roll back only its own token count."""
    model = build(attention_type)
    ids = random_ids(model.config, 1, 9)
    with pytest.raises(ValueError, match="[Ss]tatic"):
        model.generate(ids, prompt_lookup_num_tokens=2, cache_implementation="static", **GREEDY)
    _, cache = run_in_parts(model, ids, torch.ones_like(ids), [0, 9], static(model))
    assert not cache.is_croppable
    for change in (cache.activate_past_recording, lambda: cache.crop(-1)):
        with pytest.raises(ValueError, match="cannot be rolled back.*DynamicCache"):
            change()


def test_a_static_cache_that_is_too_small():
    """The state of the chunked forms has one size; FLASH-Quad needs a slot for each token."""
    for attention_type in ("mixed_chunk", "quadratic"):
        model = build(attention_type)
        ids = words(model, 1, 19)
        for slots, found in ((16, "0 tokens in it and 19 more"), (24, "24 tokens in it and 1 more")):
            given = {CACHE_NAME: StaticCache(config=model.config, max_cache_len=slots), **WORDS}
            if attention_type == "mixed_chunk":
                assert torch.equal(model.generate(ids, **given), model.generate(ids, **WORDS))
                continue
            with pytest.raises(ValueError, match=f"max_cache_len = {slots} slots .* got {found}"):
                model.generate(ids, **given)


# -- what generate() makes by itself: masks from pad_token_id, positions from masks, pads for rows that have ended
PAD, EOS = 0, 7  # ids that `words` leaves out
WORDS = {**GREEDY, "max_new_tokens": 12, "suppress_tokens": [PAD]}


def words(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, model.config.vocab_size, shape, generator=generator)


def llama():
    """A native model that continues a cache exactly: the control."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    model, generator = LlamaForCausalLM(config).double().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            parameter.copy_(noise + 1 if "norm" in name else noise)
    return model


def alone(model, ids, mask, steps):
    """Greedy continuations of the rows, each by itself, without padding and without a cache: `[B, steps]`."""
    rows = []
    for row, real in zip(ids, mask.bool(), strict=True):
        row = row[real][None]
        for _ in range(steps):
            with torch.no_grad():
                logits = model(row, use_cache=False).logits[:, -1]
            logits[:, PAD] = -torch.inf
            row = torch.cat([row, logits.argmax(-1, keepdim=True)], 1)
        rows.append(row[:, -steps:])
    return torch.cat(rows)


def first_turn(model, **options):
    """A turn in which row 0 ends early: sequences that end in pads there, their mask, and the cache, which has read
    some of these pads as tokens."""
    for seed in range(50):
        ids = words(model, 2, 19, seed=seed)
        replies = model.generate(ids, **WORDS)[:, 19:].tolist()
        ends = [token for token in replies[0][2:6] if token not in {*replies[1], *replies[0][:2], *ids[0].tolist()}]
        if ends:
            break
    out = model.generate(ids, return_dict_in_generate=True, **{**WORDS, "eos_token_id": ends[0]}, **options)
    mask = torch.ones_like(out.sequences)
    mask[0, out.sequences[0].tolist().index(ends[0]) + 1 :] = 0
    assert (
        mask[0].sum() < 19 + 8 and (out.sequences[mask == 0] == PAD).all() and (out.sequences[mask == 1] != PAD).all()
    )
    return out.sequences, mask, options.get(CACHE_NAME, getattr(out, CACHE_NAME))


@pytest.mark.parametrize("attention_type", [*TYPES, "llama", "static"])
def test_the_turn_after_one_in_which_a_row_ended_early(attention_type):
    """The pads in its state would change all that follows; a native model can mask them."""
    model = llama() if attention_type == "llama" else build(attention_type.replace("static", "shifted"))
    options = {CACHE_NAME: static(model)} if attention_type == "static" else {}
    sequences, mask, cache = first_turn(model, **options)
    # The turn of row 1 is shorter and padded on the left.
    turn = torch.cat([sequences, words(model, 2, 5, seed=1)], 1)
    mask = torch.cat([mask, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])], 1)
    turn[mask == 0] = PAD
    expected = alone(model, turn, mask, 12)
    assert not torch.equal(expected, alone(model, turn, torch.ones_like(mask), 12))  # pads as tokens show
    got = model.generate(turn, attention_mask=mask, **WORDS, **{CACHE_NAME: copy.deepcopy(cache)})
    assert torch.equal(got[:, turn.shape[1] :], expected)
    got = model.generate(turn, **WORDS, **{CACHE_NAME: copy.deepcopy(cache)})
    assert torch.equal(got[:, turn.shape[1] :], expected), "mask by pad_token_id"
    if attention_type == "llama":
        return
    past = int(cache.get_seq_length())
    for ids, more in ((turn[:, past:], {}), (turn, {"prefill_chunk_size": 3})):
        with pytest.raises(ValueError, match="the cache has seen 30.*whole sequences"):
            model.generate(ids, attention_mask=mask, **WORDS, **more, **{CACHE_NAME: copy.deepcopy(cache)})
    if attention_type != "static":
        with pytest.raises(ValueError, match="Row 0 has .* the cache has seen 30"), torch.no_grad():
            model(turn[:, past:], attention_mask=mask, **{CACHE_NAME: cache})


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("cache_of", [lambda model: None, static], ids=["dynamic", "static"])
def test_a_turn_in_pieces_is_read_once(cache_of, padded, size):
    """Whether all tokens are passed or only new ones. Transformers before 5.21 begins at the first one again."""
    model = build()
    ids, mask = words(model, 2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[0, : 6 * padded] = 0
    out = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, **WORDS, **{CACHE_NAME: cache_of(model)}
    )
    cache = getattr(out, CACHE_NAME)
    turn = torch.cat([out.sequences, words(model, 2, 7, seed=1)], 1)
    mask = torch.cat([mask, mask.new_ones(2, 19)], 1)
    expected = alone(model, turn, mask, 12)
    for new in (turn, turn[:, int(cache.get_seq_length()) :]):
        given = {CACHE_NAME: copy.deepcopy(cache), "attention_mask": mask, "prefill_chunk_size": size}
        assert torch.equal(model.generate(new, **given, **WORDS)[:, -12:], expected)


@pytest.mark.parametrize("attention_type", TYPES)
def test_a_turn_after_a_reply_with_the_pad_id(attention_type):
    """Without a mask, generate() takes the pad id for padding, with a cache and without one."""
    model = build(attention_type)
    for seed in range(50):
        ids = words(model, 1, 19, seed=seed)
        new = [token for token in model.generate(ids, **WORDS)[0, 22:27].tolist() if token not in ids[0].tolist()]
        if new:
            break
    pad = new[0]
    options = {**GREEDY, "max_new_tokens": 12, "pad_token_id": pad}
    out = model.generate(ids, return_dict_in_generate=True, **options)
    turn = torch.cat([out.sequences, words(model, 1, 5, seed=1)], 1)
    cache = getattr(out, CACHE_NAME)
    told = model.generate(turn, attention_mask=torch.ones_like(turn), use_cache=False, **options)
    inferred = model.generate(turn, use_cache=False, **options)
    assert not torch.equal(told, inferred)
    assert torch.equal(model.generate(turn, **options, **{CACHE_NAME: cache}), inferred)


def test_a_cache_that_knows_of_padding_which_the_mask_has_forgotten():
    """As where pad and end are one id, and the second turn has no mask: the state is right without it."""
    model = build()
    ids, mask = words(model, 2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[0, :6] = 0
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **WORDS)
    turn = torch.cat([out.sequences, words(model, 2, 5, seed=1)], 1)
    expected = alone(model, turn, torch.cat([mask, mask.new_ones(2, 17)], 1), 12)
    got = model.generate(turn, attention_mask=torch.ones_like(turn), **WORDS, **{CACHE_NAME: getattr(out, CACHE_NAME)})
    assert torch.equal(got[:, turn.shape[1] :], expected)


@pytest.mark.parametrize("options", [
    {}, {"prefill_chunk_size": 4}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False},
], ids=str)  # fmt: skip
def test_a_prompt_that_ends_in_padding_is_refused(options):
    model = build()
    ids, mask = words(model, 3, 19), torch.ones(3, 19, dtype=torch.long)
    ids[1, 12:], mask[1, 12:] = PAD, 0
    for given in ({"attention_mask": mask}, {}):
        with pytest.raises(ValueError, match="row 1 ends in padding.*tokenizer.padding_side = 'left'"):
            model.generate(ids, **given, **GREEDY, **options)
    with pytest.raises(ValueError, match="row 0 .*padding_side"):
        model.generate(ids[1:2], attention_mask=mask[1:2], **GREEDY, **options)
    # Padding on the left and inside, even longer than a piece, is not padding at the end; an empty row stops no other.
    ids = words(model, 3, 19)
    mask[1] = torch.tensor([0] * 5 + [1] * 3 + [0] * 6 + [1] * 5)
    mask[2] = 0
    out = model.generate(ids, attention_mask=mask, **WORDS, **options)
    single = [model.generate(ids[row : row + 1, mask[row].bool()], **WORDS, **options) for row in (0, 1)]
    for row in (0, 1):
        assert torch.equal(out[row, 19:], single[row][0, -12:])


def test_a_row_without_a_new_token_is_refused_in_the_next_turn():
    model = build()
    out = model.generate(words(model, 2, 19), return_dict_in_generate=True, **WORDS)
    turn = torch.cat([out.sequences, words(model, 2, 4)], 1)
    mask = torch.ones_like(turn)
    mask[1, -4:] = 0
    with pytest.raises(ValueError, match="row 1 ends in padding"):
        model.generate(turn, attention_mask=mask, **WORDS, **{CACHE_NAME: getattr(out, CACHE_NAME)})


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "quadratic", "shifted previous_token"])
def test_a_draft_may_hold_the_pad_id(attention_type):
    """Each id of the answer serves as pad id once, so that a pad occurs at every position of a draft."""
    model = build(attention_type)
    ids = words(model, 1, 19)
    answer = model.generate(ids, **WORDS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.004 * torch.randn_like(parameter))
    pads = [token for token in answer[0, 19:].tolist() if token not in ids[0].tolist()]
    assert len(pads) > 3
    twin.generation_config.num_assistant_tokens = 3
    for pad in pads:
        for options in ({"assistant_model": twin}, {"prompt_lookup_num_tokens": 3}):
            got = model.generate(ids, **{**WORDS, "pad_token_id": pad}, **options)
            assert torch.equal(got, answer), f"{pad}, {options}"


@pytest.mark.parametrize("attention_type", TYPES)
def test_assisted_decoding_from_a_filled_cache(attention_type):
    """transformers passes the cached tokens again."""
    model = build(attention_type)
    ids = words(model, 1, 29)
    expected = model.generate(ids, **WORDS)
    for options in ({"assistant_model": copy.deepcopy(model)}, {"prompt_lookup_num_tokens": 3}):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :11], **{CACHE_NAME: cache})
        assert torch.equal(model.generate(ids, **WORDS, **options, **{CACHE_NAME: cache}), expected)
        out = model.generate(ids, return_dict_in_generate=True, **WORDS, **options)
        turn = torch.cat([out.sequences, words(model, 1, 4, seed=1)], 1)
        got = model.generate(turn, **WORDS, **options, **{CACHE_NAME: getattr(out, CACHE_NAME)})
        assert torch.equal(got, model.generate(turn, **WORDS))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_of_another_batch(beams):
    """Refused, as by the model, until its rows are repeated like those of the input."""
    model = build()
    ids, cache = words(model, 2, 19), DynamicCache(config=model.config)
    given, copies = (ids, 3) if beams == 3 else (ids.repeat_interleave(2, 0), 2)
    with torch.no_grad():
        model(ids[:, :11], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=f"holds 2 rows but the input has {2 * copies}"):
        model.generate(given, num_beams=beams, **WORDS, **{CACHE_NAME: cache})
    cache.batch_repeat_interleave(copies)
    got = model.generate(given, num_beams=beams, **WORDS, **{CACHE_NAME: cache})
    assert torch.equal(got, model.generate(given, num_beams=beams, **WORDS))


def test_an_empty_prompt_is_refused():
    """Tokenizers return float32 for texts without tokens."""
    model = build()
    for empty in (words(model, 1, 0), words(model, 2, 0), words(model, 2, 0).float(), words(model, 2, 3)[:0]):
        for given in ({"input_ids": empty}, {"input_ids": empty, "attention_mask": empty}):
            with pytest.raises(ValueError, match="at least one row and one token, got shape"):
                model.generate(**given, **WORDS)
    for wrong in ([[3, 4]], "three"):
        with pytest.raises(ValueError, match="input_ids must be .* return_tensors='pt'"):
            model.generate(wrong, **WORDS)


@pytest.mark.parametrize("shape", [(2, 9), (2, 11), (1, 10)])
def test_a_mask_of_another_shape_is_refused_by_its_name(shape):
    """generate() makes positions of it, which the user did not give, and drops a mask of ones."""
    model, cache = build(), DynamicCache(config=tiny_config(is_decoder=True))
    ids, mask = words(model, 2, 10), torch.ones(shape, dtype=torch.long)
    for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(
            ValueError, match=r"attention_mask must have shape \(2, 10\), got " + re.escape(str(shape))
        ):
            model.generate(**given, attention_mask=mask, **WORDS)
    with torch.no_grad():
        model(ids[:, :6], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 10\), or \(2, 6 \+ 10\)"):
        model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **WORDS)


def test_embeddings_are_not_cut_into_pieces():
    """transformers would cut input_ids, and pass all embeddings with each piece. The message's other way works."""
    model = build()
    ids = words(model, 2, 19)
    embeds, cache = model.get_input_embeddings()(ids), DynamicCache(config=model.config)
    for given in ({}, {"input_ids": ids}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match="prefill_chunk_size=5 splits input_ids, got inputs_embeds of 19 tokens"):
            model.generate(inputs_embeds=embeds, prefill_chunk_size=5, **given, **WORDS)
    with torch.no_grad():
        for part in embeds[:, :15].split(5, 1):
            model(inputs_embeds=part, **{CACHE_NAME: cache})
    got = model.generate(inputs_embeds=embeds, **WORDS, **{CACHE_NAME: cache})
    assert torch.equal(got[:, -12:], model.generate(ids, **WORDS)[:, 19:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention_type", ["mixed_chunk", "quadratic"])
def test_embeddings_behind_a_cache(attention_type, kind):
    """Of the new tokens alone, with a mask of all, as token ids may be given."""
    model = build(attention_type)
    ids, mask = ragged(model.config)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)[:, 29:]
    embeds = model.get_input_embeddings()(ids)
    for past in (1, 13, 28):
        cache = static(model) if kind == "static" else DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :past], attention_mask=mask[:, :past], **{CACHE_NAME: cache})
        inputs = {"attention_mask": mask, CACHE_NAME: cache, **GREEDY}
        assert torch.equal(model.generate(inputs_embeds=embeds[:, past:], **inputs), expected), past


def test_a_cache_of_the_whole_input_or_of_more():
    """transformers would read the input again, or cut it at the wrong position."""
    model = build()
    ids = words(model, 1, 19)
    with torch.no_grad():
        cache = getattr(model(ids), CACHE_NAME)
    for given in (ids, ids[:, :11]):
        with pytest.raises(ValueError, match=f"holds 19 tokens and the input has {given.shape[1]}: none are new"):
            model.generate(given, **WORDS, **{CACHE_NAME: copy.deepcopy(cache)})


@pytest.mark.parametrize("options", [
    {}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prefill_chunk_size": 5}, {"guidance_scale": 1.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [True, False])
def test_generate_in_training_mode(checkpointing, options):
    """As GRPO and callbacks do it: nothing is recomputed without gradients, so the cache stays."""
    model = build()
    ids, mask = ragged(model.config)
    inputs = {"attention_mask": mask, **GREEDY, **options}
    expected = model.generate(ids, **inputs)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if checkpointing and "guidance_scale" in options and CACHE_NAME != "cache":
        pytest.skip("this transformers turns use_cache off for the unconditional branch, which natives do not notice")
    model.train()
    calls = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    assert torch.equal(model.generate(ids, **inputs), expected)
    hook.remove()
    assert calls[-1] == 1  # by the cache


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "quadratic", "shifted previous_token"])
def test_early_exit(attention_type):
    model = build(attention_type)
    ids = words(model, 1, 29)
    expected = model.generate(ids, **WORDS)
    for depth in (1, 2, 3):
        assert torch.equal(model.generate(ids, assistant_early_exit=depth, **WORDS), expected)
    shallow = build(attention_type, num_hidden_layers=2)
    shallow.load_state_dict(model.state_dict(), strict=False)
    model.config.num_hidden_layers = 2
    assert_close(model(ids).logits, shallow(ids).logits, 1e-12, "the draft of two layers")
    model.config.num_hidden_layers = 3
    for depth in (0, 4):
        with pytest.raises(ValueError, match=f"assistant_early_exit .* num_hidden_layers = 3, got {depth}"):
            model.generate(ids, assistant_early_exit=depth, **WORDS)
    assert torch.equal(model.generate(ids, **WORDS), expected)


@pytest.mark.parametrize("options", [
    {"guidance_scale": 1.5}, {"guidance_scale": 1.5, "negative_prompt_ids": "seven"}, {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9, "eos_token_id": 20},
    {"watermarking_config": WatermarkingConfig(bias=2.5)}, {"num_beams": 3, "eos_token_id": 20, "length_penalty": 0.5},
    {"custom_generate": "sample"},
], ids=str)  # fmt: skip
def test_every_mode_equals_itself_without_a_cache(options):
    model = build("shifted previous_token")
    ids, mask = ragged(model.config)
    if "negative_prompt_ids" in options:
        negative = words(model, 4, 7)
        padding = torch.ones_like(negative)
        padding[1, :3] = 0
        options = {**options, "negative_prompt_ids": negative, "negative_prompt_attention_mask": padding}
    if "custom_generate" in options:
        options = {"custom_generate": type(model)._sample}
    inputs = {**GREEDY, "attention_mask": mask, **options}
    expected = model.generate(ids, use_cache=False, **inputs)
    for more in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(ids, **inputs, **more), expected), more


def test_guidance_by_its_formula():
    model = build()
    ids = words(model, 1, 19)
    row, other, new = ids, ids[:, -1:], []
    with torch.no_grad():
        for _ in range(12):
            given, free = (model(x).logits[:, -1].float().log_softmax(-1) for x in (row, other))
            scores = 1.5 * (given - free) + free
            scores[:, PAD] = -torch.inf
            token = scores.argmax(-1, keepdim=True)
            row, other, new = torch.cat([row, token], 1), torch.cat([other, token], 1), [*new, int(token)]
    assert model.generate(ids, guidance_scale=1.5, **WORDS)[0, 19:].tolist() == new


def test_a_users_positions_are_checked_in_generate():
    model = build()
    ids, mask = ragged(model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, **GREEDY}
    assert torch.equal(model.generate(ids, position_ids=positions, **inputs), model.generate(ids, **inputs))
    with pytest.raises(ValueError, match="position_ids must count the real tokens"):
        model.generate(ids, position_ids=positions + 7, **inputs)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], attention_mask=mask[:, :20], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="position_ids must count the real tokens"):
        model.generate(ids, position_ids=positions + 7, **inputs, **{CACHE_NAME: cache})


def test_a_larger_embedding_takes_its_ids():
    """set_input_embeddings leaves config.vocab_size as it is."""
    model = build()
    table = torch.nn.Embedding(70, 24, dtype=torch.float64)
    table.weight.data[:61] = model.get_input_embeddings().weight.data
    ids = words(model, 1, 19)
    expected = model.generate(ids, **WORDS)
    model.set_input_embeddings(table)
    assert torch.equal(model.generate(ids, **WORDS), expected)
    ids[0, 5] = 69
    assert_close(model(ids).logits, model(inputs_embeds=table(ids)).logits, 1e-12)
    with pytest.raises(ValueError, match=r"\[0, vocab_size = 70\), got 70"):
        model(ids + 1)


def test_a_step_on_a_cpu_reads_no_slot_behind_the_newest_token():
    config = tiny_config(local_key_shift=True, global_form="previous_token", chunk_shift=3)
    model = make_model(FlashForCausalLM, config)
    ids = random_ids(config, 2, 2 * config.chunk_size + 2)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        for layer in cache.layers:
            phase = (int(layer.state.seen[0]) + layer.form.shift) % config.chunk_size
            for held in (layer.state.quad_k, layer.state.lin_k, layer.state.value):
                held[:, phase + 1 :] = torch.nan
        found = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    assert_close(found, expected, 1e-9)
