# SPDX-License-Identifier: Apache-2.0
"""How transformers' Trainer uses our losses: label smoothing, missing labels, accumulation; checked against plain
sums, and against Llama through the same Trainer."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary
from transformers.modeling_outputs import CausalLMOutputWithPast

from flash_hf import (
    LORA_TARGET_MODULES,
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashForMultipleChoice,
    FlashForQuestionAnswering,
    FlashForSequenceClassification,
    FlashForTokenClassification,
)
from flash_hf.loss_flash import IGNORE
from flash_hf.training import FlashTrainer
from helpers import assert_close, make_model, random_ids, tiny_config


EPSILON = 0.3
TRAINERS = pytest.mark.parametrize("trainer_class", [Trainer, FlashTrainer])


@pytest.fixture
def make_trainer(tmp_path):
    def make(trainer_class, model, data=None, **options):
        options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, **options}
        args = TrainingArguments(str(tmp_path), optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, **options)
        return trainer_class(model, args, train_dataset=data)

    return make


def smoothed(logits, labels, *, shift):
    """The mean of label smoothing over the labels."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    log_probs = logits.log_softmax(-1)
    known = labels != IGNORE
    losses = (1 - EPSILON) * -log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] - EPSILON * log_probs.mean(
        -1
    )
    return losses[known].mean()


def text_batch(config):
    ids = random_ids(config, 2, 13)
    labels = ids.clone()
    labels[0, 5:] = IGNORE
    labels[1, :4] = IGNORE
    return {"input_ids": ids, "labels": labels}


class Renamed(FlashForCausalLM):
    """As users define, and as FSDP2 makes from every class."""


class RenamedMasked(FlashForMaskedLM):
    """The same."""


def plain(model):
    return model


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=LORA_TARGET_MODULES))


def data_parallel(model):
    return torch.nn.DataParallel(model)  # unwrapped as DDP is, without its processes


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("cls", "wrap", "trainer_class"),
    [
        *itertools.product(
            [FlashForCausalLM, Renamed, FlashForMaskedLM, RenamedMasked],
            [plain, with_lora, data_parallel],
            [Trainer, FlashTrainer],
        ),
        # Trainer itself shifts the labels of no compiled model, Llama included.
        (FlashForCausalLM, compiled, FlashTrainer),
    ],
)
def test_label_smoothing(cls, wrap, trainer_class, make_trainer):
    model = make_model(cls, tiny_config())
    batch, causal = text_batch(model.config), issubclass(cls, FlashForCausalLM)
    expected = smoothed(model(batch["input_ids"]).logits, batch["labels"], shift=causal)
    # As the scripts do, and in training mode: without labels a model has to give logits.
    model.train().skip_logits = True
    if wrap is with_lora:
        model = wrap(model)
    trainer = make_trainer(trainer_class, model, label_smoothing_factor=EPSILON)
    model = wrap(model) if wrap in (data_parallel, compiled) else model
    assert_close(trainer.compute_loss(model, dict(batch)), expected, 1e-6)
    # A micro-batch's share: its sum divided by Trainer's count over the whole accumulated batch.
    count = trainer._get_num_items_in_batch([batch, batch], torch.device("cpu"))
    known = (batch["labels"][:, 1:] if causal else batch["labels"]).ne(IGNORE).sum()
    assert count == 2 * known
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    assert_close(loss, expected / 2, 1e-6)


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
@pytest.mark.parametrize("place", ["left", "right", "packed"])
def test_a_document_has_the_loss_that_it_has_alone(place, epsilon, make_trainer):
    """Wherever padding or other documents stand: smoothed or not, and as a share of accumulated batches."""
    model = make_model(FlashForCausalLM, tiny_config())
    texts = [random_ids(model.config, 1, length) for length in (13, 5, 2)]
    batches = [{"input_ids": ids, "labels": ids} for ids in texts]
    trainer = make_trainer(FlashTrainer, model, label_smoothing_factor=epsilon)
    count = sum(ids.shape[1] - 1 for ids in texts)
    with torch.no_grad():
        alone = [trainer.compute_loss(model, dict(batch)) * (batch["labels"].shape[1] - 1) for batch in batches]
        expected = sum(alone) / count
        if place == "packed":
            ids = torch.cat(texts, 1)
            batch = {"position_ids": torch.cat([torch.arange(text.shape[1]) for text in texts])[None]}
            labels = ids
        else:
            pads = [13 - text.shape[1] for text in texts]
            sides = [(pad, 0) if place == "left" else (0, pad) for pad in pads]
            ids = torch.cat([F.pad(text, side) for text, side in zip(texts, sides, strict=True)])
            mask = torch.cat([F.pad(torch.ones_like(text), side) for text, side in zip(texts, sides, strict=True)])
            labels, batch = ids.masked_fill(mask == 0, IGNORE), {"attention_mask": mask}
        batch |= {"input_ids": ids, "labels": labels}
        assert_close(trainer.compute_loss(model, dict(batch)), expected, 1e-6)
        (first, second), items = trainer.get_batch_samples(iter([batch, batch]), 2, torch.device("cpu"))
        assert items == 2 * count
        shares = [trainer.compute_loss(model, dict(each), num_items_in_batch=items) for each in (first, second)]
        assert_close(sum(shares), expected, 1e-6)
    for loss_only in (True, False):
        loss, *_ = trainer.prediction_step(model, dict(batch), prediction_loss_only=loss_only)
        assert_close(loss, expected, 1e-6)
    assert torch.equal(batch["labels"], labels)


def test_labels_of_another_form_are_the_users(make_trainer):
    """Those of a user's own loss, of shifted labels, and of other models."""
    config = tiny_config()
    ids = random_ids(config, 5, 5)
    batch = {"input_ids": ids, "attention_mask": F.pad(torch.ones(5, 3, dtype=torch.long), (2, 0)), "labels": ids}
    trainer = make_trainer(FlashTrainer, make_model(FlashForCausalLM, config))
    assert not torch.equal(trainer._with_predicted_labels(batch)["labels"], ids)
    for labels in (ids[:, 0], ids[:, 1:], ids[..., None].expand(-1, -1, 2), ids.tolist(), ids.numpy(), None):
        assert trainer._with_predicted_labels({**batch, "labels": labels})["labels"] is labels
    for given in ({**batch, "shift_labels": ids}, (ids, ids), {"input_ids": ids}):
        assert trainer._with_predicted_labels(given) is given
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=24, **sizes))
    for model in (make_model(FlashForMaskedLM, config), llama):
        assert make_trainer(FlashTrainer, model)._with_predicted_labels(batch) is batch


@TRAINERS
def test_label_smoothing_is_llamas(trainer_class, make_trainer):
    """The same logits from either model give the same loss."""
    config = tiny_config()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        )
    )  # fmt: skip
    batch = text_batch(config)
    logits = torch.randn(2, 13, 61, generator=torch.Generator().manual_seed(0)) * 3
    losses = []
    for model in (llama, FlashForCausalLM(config)):
        trainer = make_trainer(trainer_class, model, label_smoothing_factor=EPSILON)
        model.forward = lambda **inputs: CausalLMOutputWithPast(logits=logits)
        losses.append(
            [trainer.compute_loss(model, dict(batch), num_items_in_batch=items) for items in (None, torch.tensor(40))]
        )
    assert losses[0] == losses[1]
    assert_close(losses[1][0], smoothed(logits, batch["labels"], shift=True), 1e-5)


def test_losses_of_subclasses_are_those_of_their_head():
    """transformers picks the loss by the name of the class, and shifts the labels where it knows no such class."""
    config = tiny_config()
    ids = random_ids(config, 2, 9)
    for cls, renamed in ((FlashForCausalLM, Renamed), (FlashForMaskedLM, RenamedMasked)):
        assert_close(
            make_model(renamed, config)(ids, labels=ids).loss, make_model(cls, config)(ids, labels=ids).loss, 1e-9
        )


@pytest.mark.parametrize(
    ("cls", "task"),
    [
        (FlashForCausalLM, "text-generation"),
        (FlashForMaskedLM, "fill-mask"),
        (FlashForQuestionAnswering, "question-answering"),
        (FlashForSequenceClassification, "text-classification"),
        (FlashForTokenClassification, "token-classification"),
    ],
)
def test_model_cards_name_the_task(cls, task, make_trainer):
    """The Hub files a model under it; Trainer finds it by the name of the class."""
    summary = TrainingSummary.from_trainer(make_trainer(Trainer, cls(tiny_config(num_hidden_layers=1))))
    assert summary.tasks == task


def test_compute_loss_func_gets_logits(make_trainer):
    model = make_model(FlashForCausalLM, tiny_config()).train()
    model.skip_logits = True
    trainer, batch = make_trainer(Trainer, model), text_batch(model.config)
    seen = {}
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: seen.update(logits=outputs.logits) or 0.0
    trainer.compute_loss(model, dict(batch))
    assert_close(seen["logits"], model(batch["input_ids"]).logits, 1e-9)


# --- labels that are missing ---------------------------------------------------------------------------------------


TASKS = {
    "classification": (FlashForSequenceClassification, {"num_labels": 3}),
    "multi-label": (FlashForSequenceClassification, {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "regression": (FlashForSequenceClassification, {"num_labels": 2, "problem_type": "regression"}),
    "choice": (FlashForMultipleChoice, {}),
    "tokens": (FlashForTokenClassification, {"num_labels": 3}),
    "masked": (FlashForMaskedLM, {}),
    "causal": (FlashForCausalLM, {}),
}
ROWS, WIDTH = 6, 11


def task_data(task, config):
    """Rows 0, 1 and 5 lack labels, wholly or (where a row has several) partly."""
    generator = torch.Generator().manual_seed(3)
    shape = (ROWS, 2, WIDTH) if task == "choice" else (ROWS, WIDTH)
    ids = random_ids(config, *shape)
    if task == "classification":
        labels = torch.randint(0, 3, (ROWS,), generator=generator)
    elif task == "choice":
        labels = torch.randint(0, 2, (ROWS,), generator=generator)
    elif task == "multi-label":
        labels = torch.randint(0, 2, (ROWS, 3), generator=generator).float()
        labels[2, 1] = IGNORE
    elif task == "regression":
        return ids, torch.randn(ROWS, 2, generator=generator)
    else:
        labels = torch.randint(0, 3, (ROWS, WIDTH), generator=generator)
        labels[2, 3:] = IGNORE
    labels[[0, 1, 5]] = IGNORE
    return ids, labels


def mean_loss(task, model, ids, labels):
    """The mean over all labels, written out; None without labels."""
    logits = model(ids).logits
    if task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    if task == "multi-label":
        known = labels != IGNORE
        losses = F.softplus(logits) - labels * logits
    elif task == "regression":
        known, losses = torch.ones_like(labels, dtype=torch.bool), (logits - labels).square()
    else:
        known = labels != IGNORE
        losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return losses[known].mean() if known.any() else None


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_is_on_the_mean_over_what_has_a_label(task, accumulation, make_trainer):
    """One step of plain gradient descent over all rows, at once and in micro-batches (one of them without labels)."""
    cls, changes = TASKS[task]
    model = make_model(cls, tiny_config(num_hidden_layers=1, **changes))
    ids, labels = task_data(task, model.config)
    expected = mean_loss(task, model, ids, labels)
    expected.backward()
    wanted = {name: p.detach() - 0.5 * p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    trainer = make_trainer(
        Trainer, model, Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}),
        per_device_train_batch_size=ROWS // accumulation, gradient_accumulation_steps=accumulation, max_steps=1,
        learning_rate=0.5, train_sampling_strategy="sequential", logging_steps=1, logging_nan_inf_filter=False,
    )  # fmt: skip
    trainer.train()
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), wanted[name], 1e-5, name)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-3)


@TRAINERS
@pytest.mark.parametrize(
    ("task", "skip_logits"),
    [*((task, False) for task in TASKS if task != "regression"), ("masked", True), ("causal", True)],
)
def test_a_batch_without_labels_leaves_no_trace(task, skip_logits, trainer_class, make_trainer):
    """Logged losses stay numbers, and the weights are those of the batches that have labels."""
    cls, changes = TASKS[task]
    model = make_model(cls, tiny_config(num_hidden_layers=1, **changes))
    model.skip_logits = skip_logits
    ids, labels = task_data(task, model.config)
    wanted = make_model(cls, model.config)
    losses = []
    for row in range(ROWS):
        loss = mean_loss(task, wanted, ids[row : row + 1], labels[row : row + 1])
        losses.append(0.0 if loss is None else loss.item())
        if loss is not None:
            wanted.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in wanted.parameters():
                    parameter -= 0.1 * parameter.grad
    trainer = make_trainer(
        trainer_class, model, Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}),
        per_device_train_batch_size=1, max_steps=ROWS, learning_rate=0.1, train_sampling_strategy="sequential",
        logging_steps=1, logging_nan_inf_filter=False,
    )  # fmt: skip
    result = trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-3, abs=1e-4) and losses[0] == losses[5] == 0
    assert result.training_loss == pytest.approx(sum(losses) / ROWS, rel=1e-3) and not math.isnan(result.training_loss)
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), dict(wanted.named_parameters())[name].detach(), 1e-4, name)


def test_label_smoothing_of_a_batch_without_labels(make_trainer):
    model = make_model(FlashForCausalLM, tiny_config())
    batch = text_batch(model.config)
    batch["labels"][:] = IGNORE
    trainer = make_trainer(FlashTrainer, model, label_smoothing_factor=EPSILON)
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in model.parameters())


def test_evaluation_counts_what_has_a_label(make_trainer):
    """Two rows a batch: the mean of each batch's labels, and rows without any in no batch's mean."""
    model = make_model(FlashForSequenceClassification, tiny_config(num_labels=3), dtype=torch.float32)
    ids, labels = task_data("classification", model.config)
    labels[0] = 2
    data = Dataset.from_dict({"input_ids": ids[:4].tolist(), "labels": labels[:4].tolist()})
    trainer = make_trainer(Trainer, model, per_device_eval_batch_size=2)
    with torch.no_grad():
        means = [mean_loss("classification", model, ids[i : i + 2], labels[i : i + 2]).item() for i in (0, 2)]
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(sum(means) / 2, rel=1e-5)


def test_regression_counts_every_value():
    """-100 is a temperature like any other; Trainer, which does not count it, is corrected by shares."""
    model = make_model(FlashForSequenceClassification, tiny_config(num_labels=1))
    ids, values = random_ids(model.config, 3, 9), torch.tensor([1.0, -100.0, 2.0], dtype=torch.float64)
    expected = (model(ids).logits[:, 0] - values).square().mean()
    assert_close(model(ids, labels=values).loss, expected, 1e-9)
    assert_close(model(ids, labels=values, num_items_in_batch=torch.tensor(2)).loss, expected, 1e-9)
