# SPDX-License-Identifier: Apache-2.0
"""Training steps replayed as CUDA graphs give the numbers of steps that are issued one by one."""

import copy

import pytest
import torch

from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM
from flash_hf.training import GraphedBackward
from helpers import error_ratio, make_model


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32")]


def two_models(cls, **changes):
    config = FlashConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, query_key_dim=32, chunk_size=64, use_cache=False, **changes
    )
    model = make_model(cls, config, dtype=torch.float32, scale=0.1).cuda().train()
    return model, copy.deepcopy(model)


def batch_of(cls, rows=2, length=150):
    ids = torch.randint(0, 97, (rows, length), device="cuda")
    labels = ids if cls is FlashForCausalLM else ids.masked_fill(torch.rand(rows, length, device="cuda") > 0.15, -100)
    return {"input_ids": ids, "labels": labels}


def compute_of(model, reads=False):
    def compute(batch):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        if reads:
            assert loss.item() > 0
        loss.backward()
        return loss.detach()

    return compute


def train(step, model, batches, accumulate=1):
    """Losses of the batches, and the change of the weights, with an update every `accumulate` batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    begin = torch.cat([p.detach().flatten() for p in model.parameters()])
    losses = []
    for index, batch in enumerate(batches):
        losses.append(step(batch))
        if (index + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()]) - begin


def assert_same(found, expected):
    assert error_ratio(found[0], expected[0]) < 0.003
    assert expected[1].abs().max() > 0 and error_ratio(found[1], expected[1]) < 0.03


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("cls", [FlashForCausalLM, FlashForMaskedLM])
def test_replays_equal_plain_steps(cls, accumulate, skip_logits):
    model, other = two_models(cls)
    model.skip_logits = other.skip_logits = skip_logits
    batches = [batch_of(cls) for _ in range(9)]
    step = GraphedBackward(compute_of(model), model.parameters())
    found = train(step, model, batches, accumulate)
    assert step.graph is not None, step.refusals
    assert_same(found, train(compute_of(other), other, batches, accumulate))


def test_another_shape_gets_a_graph_when_it_stays():
    model, other = two_models(FlashForCausalLM)
    lengths = [150] * 5 + [70] + [150] + [70] * 5
    batches = [batch_of(FlashForCausalLM, length=length) for length in lengths]
    step = GraphedBackward(compute_of(model), model.parameters(), warmup=2)
    shapes = []

    def recorded(batch):
        loss = step(batch)
        shapes.append(step.shape and step.shape[1][0][1][1])
        return loss

    found = train(recorded, model, batches)
    assert shapes == [None] * 2 + [150] * 7 + [70] * 3
    assert_same(found, train(compute_of(other), other, batches))


def test_what_a_graph_cannot_hold_is_computed_as_usual():
    model, other = two_models(FlashForCausalLM)
    batches = [batch_of(FlashForCausalLM) for _ in range(6)]
    step = GraphedBackward(compute_of(model, reads=True), model.parameters(), warmup=1)
    found = train(step, model, batches)
    assert step.graph is None and len(step.refusals) == 1
    assert_same(found, train(compute_of(other), other, batches))
    # The attempt leaves nothing behind.
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and torch.rand(3, device="cuda").isfinite().all()
    assert torch.cuda.get_sync_debug_mode() == 0


def test_a_recording_that_breaks_off_leaves_nothing_behind():
    model, other = two_models(FlashForCausalLM)

    def compute(batch):
        if torch.cuda.is_current_stream_capturing():
            batch["input_ids"].sum().item()
        return compute_of(model)(batch)

    batches = [batch_of(FlashForCausalLM) for _ in range(6)]
    step = GraphedBackward(compute, model.parameters(), warmup=1)
    found = train(step, model, batches)
    assert step.graph is None and len(step.refusals) == 1
    assert_same(found, train(compute_of(other), other, batches))
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and torch.rand(3, device="cuda").isfinite().all()


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_trainer_with_graphs_logs_the_same_losses(kind, tmp_path):
    pytest.importorskip("datasets")
    from flash_hf import training

    cls = FlashForCausalLM if kind == "causal" else FlashForMaskedLM
    batch = batch_of(cls, rows=24)
    rows = [{name: values[i].tolist() for name, values in batch.items()} for i in range(24)]
    losses = []
    for graph, model in zip((True, False), two_models(cls), strict=True):
        args = training.FlashTrainingArguments(
            output_dir=tmp_path / str(graph), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_steps=6, logging_steps=1, eval_strategy="no", eval_on_start=False, save_strategy="no",
            disable_tqdm=True, bf16=True, cuda_graph=graph,
        )  # fmt: skip
        trainer = training.FlashTrainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        assert (trainer._graphed is not None and trainer._graphed.graph is not None) == graph
        losses.append(torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log]))
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-4)
