# SPDX-License-Identifier: Apache-2.0
"""Transformer++: an O(N^2) statement of itself, padding, packing, direction, losses, saving."""

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from flash_hf import FlashConfig, FlashForMaskedLM
from flash_hf.baselines import (
    AUTO_CLASSES,
    TransformerPPConfig,
    TransformerPPForCausalLM,
    TransformerPPForMaskedLM,
    TransformerPPForQuestionAnswering,
    TransformerPPForSequenceClassification,
    TransformerPPForTokenClassification,
    TransformerPPModel,
)
from flash_hf.testing import assert_close, make_model, random_ids


TASKS = [
    TransformerPPForSequenceClassification,
    TransformerPPForTokenClassification,
    TransformerPPForQuestionAnswering,
]
DIRECTIONS = pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])


def tiny(**changes) -> TransformerPPConfig:
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 3}
    return TransformerPPConfig(**{**sizes, **changes})


def stated(model: TransformerPPModel, ids: list[int]) -> torch.Tensor:
    """The model on one document, token by token and head by head; RoPE as a product of complex numbers."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    frequency = 10000.0 ** (-torch.arange(0, width, 2).double() / width)

    def norm(x, module):
        return x / (x.square().mean() + config.norm_eps).sqrt() * module.weight

    def turned(x, position):
        pairs = torch.complex(x[: width // 2], x[width // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(frequency), position * frequency)
        return torch.cat([pairs.real, pairs.imag])

    tokens = [model.embed_tokens.weight[token] for token in ids]
    for layer in model.layers:
        parts = layer.attention
        normed = [norm(x, layer.attention_norm) for x in tokens]
        new = []
        for i, x in enumerate(normed):
            outs = []
            for head in range(config.num_attention_heads):
                rows = slice(head * width, (head + 1) * width)
                query = turned(parts.q_proj.weight[rows] @ x, i)
                seen = range(i + 1) if config.is_decoder else range(len(ids))
                score = torch.stack(
                    [query @ turned(parts.k_proj.weight[rows] @ normed[j], j) / width**0.5 for j in seen]
                )
                weight = score.exp() / score.exp().sum()
                outs.append(sum(weight[j] * (parts.v_proj.weight[rows] @ normed[j]) for j in seen))
            new.append(tokens[i] + parts.o_proj.weight @ torch.cat(outs))
        tokens = []
        for x in new:
            n = norm(x, layer.mlp_norm)
            gate = layer.mlp.gate_proj.weight @ n
            tokens.append(x + layer.mlp.down_proj.weight @ (gate * gate.sigmoid() * (layer.mlp.up_proj.weight @ n)))
    return torch.stack([norm(x, model.norm) for x in tokens])


@DIRECTIONS
def test_is_what_it_says(is_decoder):
    model = make_model(TransformerPPModel, tiny(is_decoder=is_decoder))
    ids = random_ids(model.config, 1, 9)
    with torch.no_grad():
        assert_close(model(ids).last_hidden_state[0], stated(model, ids[0].tolist()), 1e-9)


@DIRECTIONS
def test_padding_and_packing_do_not_matter(is_decoder):
    model = make_model(TransformerPPModel, tiny(is_decoder=is_decoder))
    ids = random_ids(model.config, 2, 13)
    alone = [model(ids[:1]).last_hidden_state[0], model(ids[1:, :8]).last_hidden_state[0]]
    for left, right in ((4, 0), (0, 5), (3, 2)):
        row = F.pad(ids[:1], (left, right), value=7)
        mask = F.pad(torch.ones_like(ids[:1]), (left, right))
        assert_close(model(row, attention_mask=mask).last_hidden_state[0, left : left + 13], alone[0], 1e-9)
    hole = torch.cat([ids[:, :5], torch.full((2, 3), 7), ids[:, 5:]], 1)
    mask = torch.ones_like(hole)
    mask[:, 5:8] = 0
    got = model(hole, attention_mask=mask).last_hidden_state[0]
    assert_close(torch.cat([got[:5], got[8:]]), alone[0], 1e-9)
    packed = torch.cat([ids[:1], ids[1:, :8]], 1)
    positions = torch.cat([torch.arange(13), torch.arange(8)])[None]
    got = model(packed, position_ids=positions).last_hidden_state[0]
    assert_close(got, torch.cat(alone), 1e-9)


def test_nothing_leaks_from_the_future():
    model = make_model(TransformerPPForCausalLM, tiny())
    ids = random_ids(model.config, 1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 61
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.allclose(before[:, 7:], after[:, 7:])
    masked = make_model(TransformerPPForMaskedLM, tiny())
    assert not torch.allclose(masked(ids).logits[:, :7], masked(changed).logits[:, :7])


@pytest.mark.parametrize("is_decoder", [True, False])
@pytest.mark.parametrize("cls", TASKS)
def test_heads_under_padding_and_accumulation(cls, is_decoder):
    model = make_model(cls, tiny(is_decoder=is_decoder))
    ids, mask = random_ids(model.config, 4, 11), torch.ones(4, 11, dtype=torch.long)
    mask[1, 8:] = mask[2, :3] = 0
    if cls is TransformerPPForSequenceClassification:
        labels = {"labels": torch.tensor([0, 2, 1, 1])}
    elif cls is TransformerPPForTokenClassification:
        labels = {"labels": torch.randint(0, 3, (4, 11)).masked_fill(mask == 0, -100)}
    else:
        labels = {"start_positions": torch.tensor([1, 2, 4, 9]), "end_positions": torch.tensor([1, 5, 6, 10])}
    whole = model(ids, attention_mask=mask, **labels)
    whole.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(grad.isfinite().all() for grad in expected.values())
    model.zero_grad()
    count = sum(value.ne(-100).sum() for value in labels.values()) // len(labels)
    for row in range(4):  # each row alone, without its padding
        real = mask[row].bool()
        part = {name: value[row : row + 1] for name, value in labels.items()}
        if cls is TransformerPPForTokenClassification:
            part = {"labels": labels["labels"][row : row + 1, real]}
        elif cls is TransformerPPForQuestionAnswering and row == 2:
            part = {name: value - 3 for name, value in part.items()}
        out = model(ids[row : row + 1, real], **part, num_items_in_batch=count)
        out.loss.backward()
        if cls is TransformerPPForSequenceClassification:
            assert_close(out.logits[0], whole.logits[row], 1e-9)
    for name, parameter in model.named_parameters():
        if name != "qa_outputs.bias":  # exactly zero: a softmax over places does not see it
            assert_close(parameter.grad, expected[name], 1e-6, name)


@pytest.mark.parametrize("auto, cls", AUTO_CLASSES.items(), ids=lambda value: value.__name__)
def test_saves_and_loads_by_auto_class(auto, cls, tmp_path):
    model = make_model(cls, tiny(), dtype=torch.float32)
    ids = random_ids(model.config, 2, 10)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is cls
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for got, expected in zip(loaded(ids).values(), model(ids).values(), strict=True):
        assert torch.equal(got, expected)
    assert AutoConfig.from_pretrained(tmp_path).is_decoder is (cls is TransformerPPForCausalLM)


def test_base_size_matches_flash():
    with torch.device("meta"):
        flash, other = FlashForMaskedLM(FlashConfig()), TransformerPPForMaskedLM(TransformerPPConfig())
    assert abs(other.num_parameters() / flash.num_parameters() - 1) < 0.05
    assert 105e6 < other.num_parameters() < 115e6


def test_training_reaches_every_parameter_and_checkpoints():
    model = TransformerPPForMaskedLM(tiny()).train()
    ids = random_ids(model.config, 2, 10)
    plain = model(ids, labels=ids).loss
    plain.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in expected.values())
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-6, name)


def test_bad_input_is_refused():
    for changes in ({"num_attention_heads": 5}, {"num_attention_heads": 8}, {"hidden_act": "sillu"},
                    {"hidden_dropout": 1.0}, {"num_hidden_layers": 0}, {"vocab_size": "61"}):  # fmt: skip
        with pytest.raises((ValueError, StrictDataclassError), match=next(iter(changes))):
            tiny(**changes)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        tiny(num_hiden_layers=2)
    model = TransformerPPModel(tiny())
    with pytest.raises(ValueError, match="past_key_values"):
        model(random_ids(model.config, 1, 3), past_key_values=object())
    with pytest.raises(ValueError, match="vocab_size"):
        model(torch.tensor([[61]]))
