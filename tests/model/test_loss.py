# SPDX-License-Identifier: Apache-2.0
"""The loss without logits equals the loss from logits: value, gradients, every kind of label."""

import pytest
import torch
from torch import nn

from flash_hf import FlashForCausalLM, FlashForMaskedLM, loss_flash
from helpers import assert_close, make_model, random_ids, tiny_config


HEADS = [FlashForCausalLM, FlashForMaskedLM]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def labelled(config, share):
    ids = random_ids(config, 3, 29)
    labels = ids.clone()
    labels[torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) > share] = -100
    return ids, labels


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(40)])
def test_equals_the_loss_from_logits(cls, share, items, monkeypatch):
    monkeypatch.setattr(loss_flash, "SLICE", 16)  # several slices, the last one not full
    model = make_model(cls, tiny_config(**({"lm_head_bias": True} if cls is FlashForMaskedLM else {}))).train()
    ids, labels = labelled(model.config, share)
    extra = {} if items is None else {"num_items_in_batch": items}
    expected = model(ids, labels=labels, **extra)
    wanted = gradients(model, expected.loss)
    out = model(ids, labels=labels, skip_logits=True, **extra)
    assert out.logits is None and expected.logits is not None
    assert_close(out.loss, expected.loss, 1e-6)
    got = gradients(model, out.loss)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_close(got[name], wanted[name], 1e-6, name)


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), 7])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_no_label_at_all_gives_zero(cls, items, skip_logits):
    """Not NaN, torch's mean over nothing: a single one would make a log's averages NaN."""
    model = make_model(cls, tiny_config())
    ids = random_ids(model.config, 1, 5)
    options = {} if items is None else {"num_items_in_batch": items}
    loss = model(ids, labels=torch.full_like(ids, -100), skip_logits=skip_logits, **options).loss
    assert loss == 0
    found = gradients(model, loss)
    assert found and all(not gradient.any() for gradient in found.values())


def batches(ids, lengths):
    """Rows of these lengths as transformers' collators make batches, whose labels have each first token."""
    for side in ("left", "right"):
        rolls = [ids.shape[1] - n if side == "left" else 0 for n in lengths]
        mask = torch.stack([(torch.arange(ids.shape[1]) < n).roll(k) for n, k in zip(lengths, rolls, strict=True)])
        moved = torch.stack([row.roll(k) for row, k in zip(ids, rolls, strict=True)])
        yield side, moved, moved.masked_fill(~mask, -100), {"attention_mask": mask.long()}
    packed = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])[None]
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    yield "positions", packed, packed, {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    yield "borders", packed, packed, {"cu_seq_lens_q": borders}
    yield "numbers", packed, packed, {"seq_idx": number.int()}


@pytest.mark.parametrize("skip_logits", [False, True])
def test_documents_have_the_loss_that_they_have_alone(skip_logits):
    """Padded on either side, or packed: no first token is predicted by padding or by another document."""
    model = make_model(FlashForCausalLM, tiny_config()).train()
    ids = random_ids(model.config, 3, 11)
    lengths = (4, 11, 7)
    alone = [model(row[None, :n], labels=row[None, :n]).loss * (n - 1) for row, n in zip(ids, lengths, strict=True)]
    expected = sum(alone) / sum(n - 1 for n in lengths)
    wanted = gradients(model, expected)
    for name, tokens, labels, marks in batches(ids, lengths):
        loss = model(tokens, labels=labels, skip_logits=skip_logits, **marks).loss
        assert_close(loss, expected, 1e-6, name)
        got = gradients(model, loss)
        for parameter in wanted:
            assert_close(got[parameter], wanted[parameter], 1e-6, f"{name} {parameter}")


def test_the_attribute_acts_in_training_alone():
    model = make_model(FlashForCausalLM, tiny_config())
    ids = random_ids(model.config, 1, 9)
    model.skip_logits = True
    assert model.train()(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    assert model(ids).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None
    assert "skip_logits" not in model.config.to_dict()


def test_logits_are_computed_where_the_loss_cannot_do_without():
    """A head that was replaced or hooked, and a loss of the user's own; not for labels that the caller has shifted."""
    config = tiny_config()
    ids = random_ids(config, 1, 9)

    def out(change, **options):
        model = make_model(FlashForCausalLM, config)
        change(model)
        return model(ids, labels=ids, skip_logits=True, **options)

    assert out(lambda model: None).logits is None
    assert out(lambda model: model.lm_head.register_forward_hook(lambda *_: None)).logits is not None
    assert out(lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head))).logits is not None
    assert out(lambda model: setattr(model, "loss_function", lambda logits, *_, **__: logits.sum())).logits is not None
    shifted = out(lambda model: None, shift_labels=torch.roll(ids, -1, 1))
    whole = make_model(FlashForCausalLM, config)(ids, labels=ids, shift_labels=torch.roll(ids, -1, 1))
    assert shifted.logits is None
    assert_close(shifted.loss, whole.loss, 1e-6)


def test_logits_of_labelled_tokens_alone(monkeypatch):
    """Skipped tokens take no memory: the head sees only tokens with a label, one slice at a time."""
    rows = []
    monkeypatch.setattr(loss_flash, "SLICE", 8)
    original = loss_flash.sum_of_slice
    monkeypatch.setattr(
        loss_flash, "sum_of_slice", lambda hidden, *rest: rows.append(len(hidden)) or original(hidden, *rest)
    )
    model = make_model(FlashForMaskedLM, tiny_config())
    ids, labels = labelled(model.config, 0.3)
    model(ids, labels=labels, skip_logits=True)
    assert sum(rows) == int((labels != -100).sum()) < ids.numel() and max(rows) <= 8


@pytest.mark.gpu
@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_equals_the_loss_from_logits(cls, dtype, exact_float32):
    pytest.importorskip("liger_kernel")
    model = make_model(cls, tiny_config(vocab_size=1000), dtype=torch.float32).cuda().train()
    ids, labels = (x.cuda() for x in labelled(model.config, 0.5))
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected = model(ids, labels=labels).loss
        loss = model(ids, labels=labels, skip_logits=True).loss
    ratio = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(loss, expected, ratio)
    wanted, got = gradients(model, expected), gradients(model, loss)
    for name in wanted:
        assert_close(got[name], wanted[name], 10 * ratio, name)
