# SPDX-License-Identifier: Apache-2.0
"""The document rule: a document's result is the same alone, padded on any side, packed, or in a ragged batch."""

import dataclasses
import pickle

import pytest
import torch

from flash_hf import FlashForCausalLM, FlashForMaskedLM, FlashModel
from flash_hf.chunking_flash import chunk_layout, resolve_documents
from helpers import assert_close, make_model, random_ids, tiny_config


C = 8
LENGTHS = [1, C - 1, C, C + 1, 3 * C + 5]
PADS = [1, 7, C, C + 3]
CASES = [
    pytest.param(cls, attention_type, activation, id=f"{cls.__name__[8:]}-{attention_type}-{activation}")
    for cls in (FlashForCausalLM, FlashForMaskedLM)
    for attention_type, activation in (
        ("mixed_chunk", "relu2"), ("mixed_chunk", "softmax"), ("mixed_chunk", "laplace"), ("quadratic", "relu2"),
        ("quadratic", "softmax"), ("local", "softmax"), ("global", "relu2"), ("shifted", "relu2"),
        ("shifted", "softmax"), ("delta", "relu2"), ("window", "relu2"), ("window", "softmax"),
    )
    if attention_type not in ("delta", "window") or cls is FlashForCausalLM
]  # fmt: skip


@pytest.fixture(params=[(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["float64", "float32"])
def precision(request):
    return request.param


def build(cls, attention_type, activation, dtype=torch.float64):
    changes = {"attention_type": attention_type}
    if attention_type == "shifted":
        changes = {"chunk_shift": 3, "global_form": "previous_token", "local_key_shift": True}
    if attention_type == "window":
        changes = {"chunk_shift": 3, "local_window": 2, "local_key_shift": True}
    if attention_type == "delta":
        changes = {"chunk_shift": 3, "global_form": "previous_token", "global_state": "delta"}
    config = tiny_config(attention_activation=activation, **changes)
    return make_model(cls, config, dtype=dtype)


def padded(ids, left, right, fill=3):
    """ids [1, n] with padding around, and the mask."""
    row = torch.cat([torch.full((1, left), fill), ids, torch.full((1, right), fill)], 1)
    mask = torch.zeros_like(row)
    mask[:, left : left + ids.shape[1]] = 1
    return row, mask


@pytest.mark.parametrize("cls, attention_type, activation", CASES)
def test_padding_changes_nothing(cls, attention_type, activation, precision):
    dtype, ratio = precision
    model = build(cls, attention_type, activation, dtype)
    for length in LENGTHS:
        ids = random_ids(model.config, 1, length, seed=length)
        alone = model(ids).logits
        for left, right in [*((pad, 0) for pad in PADS), *((0, pad) for pad in PADS), (5, 6)]:
            row, mask = padded(ids, left, right)
            logits = model(row, attention_mask=mask).logits
            assert logits.isfinite().all()
            assert_close(logits[:, left : left + length], alone, ratio, f"length {length}, pads {left}, {right}")


@pytest.mark.parametrize("cls, attention_type, activation", CASES)
def test_padding_in_the_middle_is_transparent(cls, attention_type, activation):
    model = build(cls, attention_type, activation)
    ids = random_ids(model.config, 1, 3 * C + 5)
    row = torch.cat([ids[:, :5], ids.new_full((1, 4), 2), ids[:, 5:20], ids.new_full((1, 9), 2), ids[:, 20:]], 1)
    mask = torch.ones_like(row)
    mask[:, 5:9] = mask[:, 24:33] = 0
    logits = model(row, attention_mask=mask).logits[mask.bool()]
    assert_close(logits, model(ids).logits[0], 1e-9)


@pytest.mark.parametrize("cls, attention_type, activation", CASES)
def test_packing_changes_nothing(cls, attention_type, activation, precision):
    """Between others, at every offset to the chunk grid; marked by position_ids, cu_seq_lens_q or seq_idx."""
    dtype, ratio = precision
    model = build(cls, attention_type, activation, dtype)
    lengths = [5, 3 * C + 5, 1, C, 1, 2 * C + 1, C - 1]
    documents = [random_ids(model.config, 1, length, seed=length) for length in lengths]
    row = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    numbers = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    expected = torch.cat([model(ids).logits for ids in documents], 1)
    for marks in (
        {"position_ids": positions},
        {"cu_seq_lens_q": borders},
        {"seq_idx": numbers},
        {"position_ids": positions, "cu_seq_lens_q": borders, "seq_idx": numbers},
    ):
        assert_close(model(row, **marks).logits, expected, ratio, str(sorted(marks)))


@pytest.mark.parametrize("cls, attention_type, activation", CASES)
def test_ragged_batch_of_packed_rows_with_padding(cls, attention_type, activation):
    """Different documents, paddings and fully masked rows in one batch; the masked row changes nothing and is
    finite."""
    model = build(cls, attention_type, activation)
    a, b, c, d = (random_ids(model.config, 1, n, seed=n) for n in (3 * C + 5, 9, 17, 2))
    fill = random_ids(model.config, 1, 60, seed=9)
    rows = [(0, [a]), (3, [b, c]), (11, [d, c, b]), (0, [])]
    width = 40
    ids, mask, positions = fill[:, :width].repeat(4, 1), torch.zeros(4, width, dtype=torch.long), []
    for row, (left, parts) in enumerate(rows):
        joined = torch.cat([torch.zeros(1, 0, dtype=torch.long), *parts], 1)
        ids[row, left : left + joined.shape[1]] = joined[0]
        mask[row, left : left + joined.shape[1]] = 1
        numbers = torch.cat([torch.zeros(left), *(torch.arange(p.shape[1]) for p in parts)])
        positions.append(torch.cat([numbers, torch.zeros(width - len(numbers))]))
    logits = model(ids, attention_mask=mask, position_ids=torch.stack(positions).long()).logits
    assert logits.isfinite().all()
    for row, (left, parts) in enumerate(rows):
        begin = left
        for part in parts:
            got = logits[row : row + 1, begin : begin + part.shape[1]]
            assert_close(got, model(part).logits, 1e-9, f"row {row} at {begin}")
            begin += part.shape[1]


@pytest.mark.parametrize("cls, attention_type, activation", CASES)
def test_what_stands_at_padding_changes_nothing(cls, attention_type, activation):
    model = build(cls, attention_type, activation)
    embeds = torch.randn(2, 30, model.config.hidden_size, dtype=torch.float64)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = mask[1, 17:] = 0
    reference = model(inputs_embeds=embeds, attention_mask=mask).logits[mask.bool()]
    for noise in (torch.randn_like(embeds) * 100, torch.full_like(embeds, torch.nan)):
        noisy = torch.where(mask[..., None].bool(), embeds, noise)
        assert_close(model(inputs_embeds=noisy, attention_mask=mask).logits[mask.bool()], reference, 1e-12)


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "shifted"])
def test_gradients_do_not_reach_padding_or_other_documents(attention_type):
    model = build(FlashForMaskedLM, attention_type, "relu2")
    embeds = torch.randn(1, 40, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, :3] = 0
    positions = torch.cat([torch.zeros(3), torch.arange(20), torch.arange(17)])[None].long()
    logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
    (gradient,) = torch.autograd.grad(logits[:, 3:23].square().sum(), embeds)
    assert gradient[0, :3].abs().max() == 0 and gradient[0, 23:].abs().max() == 0
    assert gradient[0, 3:23].abs().amax(-1).min() > 0


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "shifted"])
@pytest.mark.parametrize("cls", [FlashForCausalLM, FlashForMaskedLM])
def test_gradients_of_parameters_under_padding_and_packing(cls, attention_type):
    model = build(cls, attention_type, "relu2")
    documents = [random_ids(model.config, 1, n, seed=n) for n in (13, 3 * C + 5, 6)]

    def gradients(run):
        model.zero_grad()
        run()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    def alone():
        for ids in documents:
            model(ids).logits.square().sum().backward()

    def packed():
        positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents])[None]
        model(torch.cat(documents, 1), position_ids=positions).logits.square().sum().backward()

    def ragged():
        rows, masks = zip(*(padded(ids, 31 - ids.shape[1], 0) for ids in documents), strict=True)
        mask = torch.cat(masks)
        logits = model(torch.cat(rows), attention_mask=mask).logits
        logits[mask.bool()].square().sum().backward()

    expected = gradients(alone)
    for run in (packed, ragged):
        for name, gradient in gradients(run).items():
            assert_close(gradient, expected[name], 1e-9, f"{run.__name__} {name}")


def test_layout_of_a_packed_padded_row_by_hand():
    """Mask and positions of one row of 9, chunks of 2: padding, a document of 3, one of 2, padding, one of 1."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 0]])
    positions = torch.tensor([[0, 0, 1, 2, 0, 1, 0, 0, 0]])
    documents = resolve_documents(1, 9, mask.device, attention_mask=mask, position_ids=positions)
    layout = chunk_layout(documents, 1, 2, causal=False)
    assert layout.source_BK.tolist() == [[1, 2, 3, -1, 4, 5, 7, -1]]
    assert layout.slot_BN.tolist() == [[-1, 0, 1, 2, 4, 5, -1, 6, -1]]
    assert layout.position_BGC.tolist() == [[[0, 1], [2, 3], [0, 1], [0, 1]]]
    assert layout.first_BG.tolist() == [[0, 0, 2, 3]]
    assert layout.last_BG.tolist() == [[1, 1, 2, 3]]
    assert layout.count_BG.tolist() == [[3, 3, 2, 1]]
    assert layout.seen_after_B.tolist() == [1]


def test_shifted_layout_of_a_packed_padded_row_by_hand():
    """The same row with one slot before each document: its chunks hold one token, then two."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 0]])
    positions = torch.tensor([[0, 0, 1, 2, 0, 1, 0, 0, 0]])
    documents = resolve_documents(1, 9, mask.device, attention_mask=mask, position_ids=positions)
    layout = chunk_layout(documents, 1, 2, causal=False, shift=1)
    assert layout.source_BK.tolist() == [[-1, 1, 2, 3, -1, 4, 5, -1, -1, 7]]
    assert layout.position_BGC.tolist() == [[[0, 0], [1, 2], [0, 0], [1, 2], [0, 0]]]
    assert layout.first_BG.tolist() == [[0, 0, 2, 2, 4]]
    assert layout.last_BG.tolist() == [[1, 1, 3, 3, 4]]
    assert layout.count_BG.tolist() == [[3, 3, 2, 2, 1]]
    assert layout.before_BG.tolist() == [[0, 1, 0, 1, 0]]


def tensors_of(value):
    """Every tensor within dataclasses, tuples and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [x for part in value for x in tensors_of(part)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("changes", [{"relative_bias": "rotary"}, {"attention_type": "quadratic"}, {"chunk_shift": 3}])
def test_places_move_to_another_device_as_one(changes):
    """accelerate moves a layer's arguments by `.to`; a tensor left behind would be on the wrong device."""
    model = make_model(FlashModel, tiny_config(**changes))
    documents = resolve_documents(2, 9, torch.device("cpu"), attention_mask=torch.tensor([[0] * 3 + [1] * 6, [1] * 9]))
    places = model.places(torch.zeros(2, 9, model.config.hidden_size), documents, None)
    for before in places:
        after = before.to("meta", non_blocking=True)
        assert type(after) is type(before) and after.bias_length == before.bias_length
        moved = tensors_of(after)
        assert len(moved) == len(tensors_of(before)) > 5 and {x.device.type for x in moved} == {"meta"}


FORMS = [
    {},
    {"chunk_shift": 3, "relative_bias": "rotary"},
    {"attention_type": "quadratic", "max_position_embeddings": 64},
]


@pytest.mark.parametrize("changes", FORMS, ids=str)
def test_what_follows_from_shapes_is_made_once(changes, monkeypatch):
    """Padding and cached tokens are in no shape: such calls make theirs anew, as do those that fill FLASH-Quad's
    cache, which grows."""
    model = make_model(FlashForCausalLM, tiny_config(**changes))
    ids, made, make = random_ids(model.config, 2, 20), [], FlashModel.make_places
    monkeypatch.setattr(FlashModel, "make_places", lambda self, *args: made.append(args) or make(self, *args))
    first = model(ids, use_cache=False).logits
    for mask in (None, torch.ones_like(ids)):
        assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, first)
    assert len(made) == 1
    assert_close(model(ids[:1], use_cache=False).logits, first[:1], 1e-12)
    assert len(made) == 2
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for _ in range(2):
        assert_close(model(ids, attention_mask=mask, use_cache=False).logits[1], first[1], 1e-12)
        assert_close(model(ids, use_cache=True).logits, first, 1e-12)
    count = 6 if model.config.attention_type == "quadratic" else 5
    assert len(made) == count
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy(ids, use_cache=False).logits, first)
    assert len(made) == count + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.config.update({"chunk_size": 3}),
        lambda model: model.config.update({"use_rope": False}),
        lambda model: model.model.rotary_emb.inv_freq.mul_(2),
        lambda model: setattr(model.model.rotary_emb, "inv_freq", 2 * model.model.rotary_emb.inv_freq),
        lambda model: model.float(),
    ],
)
def test_a_changed_model_does_not_use_what_it_made_before(change):
    config = tiny_config(relative_bias="rotary")
    ids = random_ids(config, 2, 20)
    used, fresh = (make_model(FlashForCausalLM, config) for _ in range(2))
    with torch.inference_mode():
        before = used(ids, use_cache=False).logits
    for model in (used, fresh):
        change(model)
    after = used(ids, use_cache=False).logits
    after.sum().backward()  # what inference mode made cannot be in a graph
    assert torch.equal(after, fresh(ids, use_cache=False).logits)
    assert after.dtype != before.dtype or not torch.allclose(after, before)


def test_positions_alone_do_not_make_a_packed_layout():
    """generate and most callers pass plain positions: they must not cause a gather or a packed sum."""
    ids = torch.arange(20)[None]
    assert resolve_documents(1, 20, ids.device, position_ids=ids, attention_mask=torch.ones(1, 20)).is_plain


@pytest.mark.parametrize("cls", [FlashForCausalLM, FlashForMaskedLM])
def test_default_initialisation_under_padding(cls):
    """With the default initialisation, in float32."""
    torch.manual_seed(0)
    model = cls(tiny_config(chunk_size=16)).eval()
    ids = random_ids(model.config, 1, 37)
    row, mask = padded(ids, 5, 3)
    assert_close(model(row, attention_mask=mask).logits[:, 5:42], model(ids).logits, 2e-4)
