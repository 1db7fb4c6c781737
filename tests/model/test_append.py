# SPDX-License-Identifier: Apache-2.0
"""A few tokens on a cache: only they are queries; results, gradients and states are those of the grid of chunks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from flash_hf import FlashForCausalLM, backend_flash, cache_flash, chunking_flash
from flash_hf.chunking_flash import AppendLayout, ChunkLayout
from helpers import assert_close, make_model, random_ids, tiny_config


C = 8
FORMS = {
    "paper": {},
    "local": {"attention_type": "local"},
    "global": {"attention_type": "global", "global_normalization": "chunk"},
    "FLASH+": {"chunk_shift": 5, "global_form": "previous_token", "local_key_shift": True},
    "softmax, window, T5's bias": {
        "attention_activation": "softmax", "local_window": 2, "chunk_shift": 3, "local_key_shift": True,
        "relative_bias": "t5",
    },
    "laplace, rotary bias": {"attention_activation": "laplace", "relative_bias": "rotary", "chunk_shift": 1},
    "window, interleaved": {"local_window": 2, "rope_interleaved": True, "global_form": "previous_token"},
    "delta": {"global_state": "delta"},
    "delta, FLASH+": {
        "global_state": "delta", "chunk_shift": 5, "global_form": "previous_token", "local_key_shift": True,
        "local_window": 2,
    },
    "delta, global": {"global_state": "delta", "attention_type": "global"},
}  # fmt: skip


def build(form, dtype=torch.float64):
    return make_model(FlashForCausalLM, tiny_config(**FORMS[form]), dtype=dtype)


def on_the_grid(patch):
    """The path of any number of tokens, for few ones, too."""
    for module in (backend_flash, cache_flash):
        patch.setattr(module, "can_append", lambda *args: False)


def rows(model, length):
    """Prompts whose rows are at four phases, one of them empty; then `length` columns with padding in all places."""
    prompt, ids = random_ids(model.config, 5, 2 * C + 3), random_ids(model.config, 5, length)
    mask, more = torch.ones_like(prompt), torch.rand(5, length) < 0.7
    for row, real in enumerate((2 * C + 3, 2 * C, C - 1, 1, 0)):
        mask[row, : 2 * C + 3 - real] = 0
    more[0], more[2] = True, False
    return prompt, mask, ids, more.long()


def gradients(model):
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("length", [1, 2, C - 1, C])
@pytest.mark.parametrize("form", FORMS)
def test_a_few_tokens_are_those_of_the_grid(form, length, padded, monkeypatch):
    """Twice in a row, so that states cross borders; then the states, by what steps and long pieces make of them."""
    torch.manual_seed(hash((length, padded)) % 1000)
    model = build(form)
    prompt, mask, ids, more = rows(model, 2 * length)
    options = {"attention_mask": more} if padded else {}
    tail = random_ids(model.config, 5, 3 * C + 2)
    found = []
    for grid in (False, True):
        with monkeypatch.context() as patch, torch.no_grad():
            if grid:
                on_the_grid(patch)
            cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
            with torch.enable_grad():
                parts = []
                for part in (slice(0, length), slice(length, None)):
                    given = {name: value[:, part] for name, value in options.items()}
                    parts.append(model(ids[:, part], past_key_values=cache, **given).logits)
                real = more.bool() if padded else torch.ones_like(more, dtype=torch.bool)
                logits = torch.cat(parts, 1)[real]
                logits.square().sum().backward()
            ends = [model(tail[:, piece], past_key_values=cache).logits for piece in (slice(0, 1), slice(1, None))]
        found.append((logits.detach(), gradients(model), *ends))
    (logits, grads, *ends), (expected, expected_grads, *expected_ends) = found
    assert logits.isfinite().all()
    assert_close(logits, expected, 1e-9)
    for name, gradient in expected_grads.items():
        assert_close(grads[name], gradient, 1e-8, name)
    for end, expected in zip(ends, expected_ends, strict=True):
        assert_close(end, expected, 1e-9, "what follows")


@pytest.mark.parametrize("form", FORMS)
def test_a_few_tokens_in_bfloat16(form, monkeypatch):
    model = build(form, torch.bfloat16)
    prompt, mask, ids, more = rows(model, C)
    for autocast in (False, True):
        model = build(form, torch.float32 if autocast else torch.bfloat16)
        found = []
        for grid in (False, True):
            with monkeypatch.context() as patch, torch.no_grad(), torch.autocast("cpu", enabled=autocast):
                if grid:
                    on_the_grid(patch)
                cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
                first = model(ids, attention_mask=more, past_key_values=cache).logits[more.bool()]
                found.append(torch.cat([first, model(ids[:, :1], past_key_values=cache).logits[:, 0]]).float())
        exact = build(form)
        exact.load_state_dict(model.state_dict())
        with torch.no_grad():
            cache = exact(prompt, attention_mask=mask, use_cache=True).past_key_values
            first = exact(ids, attention_mask=more, past_key_values=cache).logits[more.bool()]
            exact = torch.cat([first, exact(ids[:, :1], past_key_values=cache).logits[:, 0]]).float()
        few, grid = ((each - exact).norm() / exact.norm() for each in found)
        assert few <= 2 * grid, f"autocast {autocast}: error {few:.3g}, on the grid {grid:.3g}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 3, C + 1])
def test_padding_may_hold_anything(length, form):
    """Also in the embeddings of one new token, of a few, or of many."""
    model = build(form)
    prompt, mask, ids, _ = rows(model, length)
    more = torch.ones_like(ids)
    more[1:4, length // 2] = 0
    embedded, found = model.get_input_embeddings()(ids).detach(), []
    for padding in (0.0, torch.nan, torch.inf):
        given = torch.where(more[..., None] == 0, padding, embedded)
        with torch.no_grad():
            cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
            first = model(inputs_embeds=given, attention_mask=more, past_key_values=cache).logits[more.bool()]
            found.append(torch.cat([first, model(prompt[:, :2], past_key_values=cache).logits.flatten(0, 1)]))
    assert found[0].isfinite().all() and torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


@pytest.mark.parametrize("kind", ["static", "inference mode", "learnt state"])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_through_a_continuation(form, length, kind, monkeypatch):
    """Of a cache that is overwritten, of one that torch saves nothing of, and of one that has a gradient itself."""
    model = build(form)
    prompt, ids = random_ids(model.config, 2, C + 3), random_ids(model.config, 2, 2 * length)
    found = []
    for grid in (False, True):
        static = StaticCache(config=model.config, max_cache_len=64)
        with torch.inference_mode(kind == "inference mode"), torch.no_grad():
            cache = model(prompt, past_key_values=static if kind == "static" else None, use_cache=True).past_key_values
        learnt = []
        if kind == "learnt state":
            for layer in cache.layers:
                layer.state = layer.state.map(lambda x: x.requires_grad_() if x.is_floating_point() else x)
                learnt += [x for x in layer.state if x is not None and x.requires_grad]
        with monkeypatch.context() as patch:
            if grid:
                on_the_grid(patch)
            for part in ids.split(length, 1):
                model(part, past_key_values=cache).logits.square().sum().backward()
                assert not any(x.requires_grad for layer in cache.layers for x in layer.state if x is not None)
        own = [torch.zeros_like(x) if x.grad is None else x.grad for x in learnt]
        found.append({**gradients(model), **dict(enumerate(own))})
    for name, gradient in found[1].items():
        assert_close(found[0][name], gradient, 1e-8, str(name))


def test_gradient_checkpointing_cannot_continue_a_cache():
    model = build("paper")
    model.gradient_checkpointing_enable()
    ids = random_ids(model.config, 2, 3 * C)
    for length in (1, 3, C + 1):
        with torch.no_grad():
            cache = model.eval()(ids, use_cache=True).past_key_values
            model.train()(ids[:, :length], past_key_values=cache)
        with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
            model(ids[:, :length], past_key_values=cache)
        assert cache.get_seq_length() == 3 * C + length


@pytest.mark.parametrize("form", FORMS)
def test_a_rollback_to_any_token(form):
    """Of a few recorded tokens or of many, packed or padded: what follows is as if they had never been read."""
    model = build(form)
    prompt, mask, ids, more = rows(model, 3 * C)
    tail = random_ids(model.config, 5, C + 2)
    packed = torch.cat([torch.arange(20, 20 + C), torch.arange(2 * C)])[None]
    for length, options in ((3, {}), (C, {"attention_mask": more}), (3 * C, {"attention_mask": more}), (3 * C, {})):
        for keep in {0, 1, length // 2, length - 1}:
            found = []
            for recorded in (length, keep):
                with torch.no_grad():
                    cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
                    cache.activate_past_recording()
                    if recorded:
                        given = {name: value[:, :recorded] for name, value in options.items()}
                        model(ids[:, :recorded], past_key_values=cache, **given)
                    cache.crop(keep - recorded)
                    assert cache.get_seq_length() == prompt.shape[1] + keep
                    found.append(model(tail, past_key_values=cache).logits)
            assert_close(found[0], found[1], 1e-9, f"{keep} of {length}")
    with torch.no_grad():  # a document begins amid the recorded tokens
        cache = model(ids[:1, :20], use_cache=True).past_key_values
        cache.activate_past_recording()
        model(ids[1:2, : 3 * C], position_ids=packed, past_key_values=cache)
        cache.crop(-5)
        found = model(tail[:1], past_key_values=cache).logits
        document = torch.cat([ids[1:2, C : 3 * C - 5], tail[:1]], 1)
        assert_close(found, model(document).logits[:, 2 * C - 5 :], 1e-9, "packed")


@pytest.mark.parametrize("form", FORMS)
def test_states_are_dense_for_the_kernels(form):
    """In every layer: whether kernels can advance a state is asked of the first."""
    model = build(form)
    ids, begin = random_ids(model.config, 3, 5 * C), 0
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[0, C + 6 : C + 9] = 0
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        for length in (C + 3, 2, C, 1, C + 1, 2):
            end = begin + length
            cache = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).past_key_values
            cache.activate_past_recording()
            if length == C:
                cache.crop(-3)
                mask, ids = (torch.cat([x[:, : end - 3], x[:, end:]], 1) for x in (mask, ids))
                end -= 3
            begin = end
            assert all(x is None or x.is_contiguous() for layer in cache.layers for x in layer.state)


@pytest.mark.parametrize("form", [form for form in FORMS if "window" not in form and form != "delta, FLASH+"])
def test_a_few_tokens_on_a_cpu_read_no_slot_behind_the_newest(form):
    model = build(form)
    ids = random_ids(model.config, 2, 2 * C + 5)
    with torch.no_grad():
        expected = model(ids).logits[:, -3:]
        cache = model(ids[:, :-3], use_cache=True).past_key_values
        for layer in cache.layers:
            phase = (int(layer.state.seen[0]) + layer.form.shift) % C
            for held in (layer.state.quad_k, layer.state.lin_k, layer.state.value):
                if held is not None and held.shape[1] >= C:
                    held[:, phase + 1 :] = torch.nan
        found = model(ids[:, -3:], past_key_values=cache).logits
    assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_few_tokens_cost_what_as_many_steps_do(form):
    """In operations, those that a rollback computes again, too; chunks as wide as usual, so that they would show."""
    config = tiny_config(**{**FORMS[form], "chunk_size": 128})
    model = make_model(FlashForCausalLM, config, dtype=torch.float32)
    counts = {}
    with torch.no_grad():
        cache = model(random_ids(config, 1, 70), use_cache=True).past_key_values
        cache.activate_past_recording()
        for length in (1, 4):
            with FlopCounterMode(display=False) as counter:
                model(random_ids(config, 1, length), past_key_values=cache)
            counts[length] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            cache.crop(-2)
    assert 0 < counts[4] < 5 * counts[1]
    assert counter.get_total_flops() < 5 * counts[1]


class Operations(TorchDispatchMode):
    """Counts those of torch, views too."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("form", "padded", "in_call", "in_crop"),
    [
        ("paper", False, 70, 15), ("paper", True, 78, 22), ("FLASH+", False, 90, 32), ("FLASH+", True, 102, 43),
        ("delta", False, 147, 66), ("delta", True, 154, 71),
    ],
)  # fmt: skip
def test_a_few_tokens_take_few_operations(form, padded, in_call, in_crop, monkeypatch):
    """Per layer, of 3 recorded tokens and of a rollback of 2: on a GPU each is a launch. What is the same for all
    layers is made once."""
    monkeypatch.setattr(chunking_flash, "is_transformed", lambda: False)  # it would see the counter
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    found = []
    for layers in (2, 4):
        config = tiny_config(**{**FORMS[form], "num_hidden_layers": layers})
        model = make_model(FlashForCausalLM, config, dtype=torch.float32)
        ids = random_ids(config, 2, 2 * C + 2)
        with torch.no_grad():
            cache = model(ids[:, :-3], use_cache=True).past_key_values
            cache.activate_past_recording()
            with Operations() as call:
                model(ids[:, -3:], past_key_values=cache, attention_mask=mask if padded else None)
            with Operations() as crop:
                cache.crop(-2)
        found.append((call.count, crop.count))
    (call, crop), (more_calls, more_crops) = found
    assert (more_calls - call) / 2 <= in_call
    assert (more_crops - crop) / 2 <= in_crop


def test_which_calls_append(monkeypatch):
    model, made = build("FLASH+"), []
    layouts = model.model.layouts
    monkeypatch.setattr(model.model, "layouts", lambda *args: made.extend(layouts(*args)) or made[-2:])
    ids = random_ids(model.config, 1, 2 * C)

    def kinds(n, **options):
        made.clear()
        model(ids[:, :n], **options)
        return [type(layout) for layout in made]

    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert kinds(C, past_key_values=cache) == kinds(2, past_key_values=cache) == [AppendLayout] * 2
        assert kinds(C + 1, past_key_values=cache) == [ChunkLayout] * 2
        start = torch.tensor([[0, 1, 0]])
        assert kinds(3, past_key_values=cache, position_ids=start) == [ChunkLayout] * 2
        assert kinds(4, past_key_values=DynamicCache(config=model.config)) == [ChunkLayout] * 2
        assert kinds(4, use_cache=False) == [ChunkLayout] * 2
    assert kinds(1, past_key_values=cache) == [AppendLayout] * 2  # gradients flow, which a step has none of
