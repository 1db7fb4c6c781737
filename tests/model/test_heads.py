# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning heads: pooling, losses, padding, weights from and to other heads, pipelines, PEFT."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    pipeline,
)

from flash_hf import (
    AUTO_CLASSES,
    LORA_TARGET_MODULES,
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashForMultipleChoice,
    FlashForQuestionAnswering,
    FlashForSequenceClassification,
    FlashForTokenClassification,
    FlashModel,
    modeling_flash,
)
from flash_hf.training import train_tokenizer
from helpers import assert_close, make_model, random_ids, tiny_config


TASKS = [
    FlashForSequenceClassification,
    FlashForTokenClassification,
    FlashForQuestionAnswering,
    FlashForMultipleChoice,
]
DIRECTIONS = pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])


def labels_for(cls, rows, width):
    generator = torch.Generator().manual_seed(0)
    if cls is FlashForTokenClassification:
        return {"labels": torch.randint(0, 3, (rows, width), generator=generator)}
    if cls is FlashForQuestionAnswering:
        start = torch.randint(0, width, (rows,), generator=generator)
        return {"start_positions": start, "end_positions": start}
    return {"labels": torch.randint(0, 2 if cls is FlashForMultipleChoice else 3, (rows,), generator=generator)}


def inputs_for(cls, config, rows, width):
    shape = (rows, 2, width) if cls is FlashForMultipleChoice else (rows, width)
    ids = random_ids(config, *shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def padded(inputs, left, right):
    return {name: F.pad(value, (left, right), value=5 * (name == "input_ids")) for name, value in inputs.items()}


def answer(out):
    return torch.stack([out.start_logits, out.end_logits], -1) if hasattr(out, "start_logits") else out.logits


@DIRECTIONS
@pytest.mark.parametrize("cls", TASKS)
def test_padding_never_matters(cls, is_decoder):
    model = make_model(cls, tiny_config(num_labels=3, is_decoder=is_decoder))
    inputs = inputs_for(cls, model.config, 2, 21)
    labels = labels_for(cls, 2, 21)
    expected = model(**inputs, **labels)
    plain = model(input_ids=inputs["input_ids"])
    assert_close(answer(plain), answer(expected), 1e-12)
    per_token = cls in (FlashForTokenClassification, FlashForQuestionAnswering)
    for left, right in ((1, 0), (7, 0), (0, 5), (11, 9)):
        moved = dict(labels)
        if cls is FlashForTokenClassification:
            moved = {"labels": F.pad(labels["labels"], (left, right), value=-100)}
        elif cls is FlashForQuestionAnswering:
            moved = {name: value + left for name, value in labels.items()}
        out = model(**padded(inputs, left, right), **moved)
        got = answer(out)[:, left : left + 21] if per_token else answer(out)
        assert_close(got, answer(expected), 1e-9, f"{left}, {right}")
        assert_close(out.loss, expected.loss, 1e-6, f"loss {left}, {right}")
        assert out.loss.isfinite()


def test_pooling():
    """Causal: the last real token, which sees all others. Bidirectional: the mean of the real tokens."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    for is_decoder in (True, False):
        model = make_model(FlashForSequenceClassification, tiny_config(is_decoder=is_decoder))
        ids = random_ids(model.config, 2, 5)
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        pooled = [hidden[0, 4], hidden[1, 1]] if is_decoder else [hidden[0, 2:].mean(0), hidden[1, :2].mean(0)]
        expected = model.score(torch.stack(pooled))
        assert_close(model(ids, attention_mask=mask).logits, expected, 1e-12)


@DIRECTIONS
@pytest.mark.parametrize("cls", TASKS)
def test_padding_is_found_by_its_id(cls, is_decoder):
    """Without a mask, as transformers' own heads do; but not where the padding token may be a real one."""
    config = tiny_config(num_labels=3, is_decoder=is_decoder, pad_token_id=5, eos_token_id=7)
    model = make_model(cls, config)
    inputs = inputs_for(cls, config, 2, 13)
    ids = inputs["input_ids"]
    ids[ids == 5] = 6
    for left, right in ((3, 0), (0, 4)):
        batch = padded(inputs, left, right)
        # Rows of several lengths.
        batch["attention_mask"][0, ..., left + 11 :] = 0
        batch["input_ids"][0, ..., left + 11 :] = 5
        expected = answer(model(**batch))
        assert_close(answer(model(input_ids=batch["input_ids"])), expected, 1e-12)
        whole = torch.ones_like(batch["input_ids"])
        for end in (5, [7, 5]):
            model.config.eos_token_id = end
            assert_close(
                answer(model(input_ids=batch["input_ids"])),
                answer(model(input_ids=batch["input_ids"], attention_mask=whole)),
                1e-12,
            )
        model.config.eos_token_id = 7


@DIRECTIONS
def test_compiled_heads_find_the_same_padding_and_documents(is_decoder):
    """A graph cannot branch on whether there is padding, nor raise an error; packed rows break it."""
    config = tiny_config(num_labels=3, num_hidden_layers=1, is_decoder=is_decoder, pad_token_id=5)
    model = make_model(FlashForSequenceClassification, config)
    ids = random_ids(config, 3, 13)
    ids[ids == 5] = 6
    ids[0, 9:] = 5
    labels = torch.tensor([0, -100, 2])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for wanted in (labels, torch.full_like(labels, -100)):
        out, expected = compiled(input_ids=ids, labels=wanted), model(input_ids=ids, labels=wanted)
        assert_close(out.logits, expected.logits, 1e-12)
        assert_close(out.loss, expected.loss, 1e-12)
    packed = torch.cat([torch.arange(5), torch.arange(8)]).expand(3, -1)
    with pytest.raises(ValueError, match="one answer per row"):
        torch.compile(model, backend="eager")(input_ids=ids, position_ids=packed)


def test_padding_is_found_where_llama_finds_it():
    """Llama's head takes the state of the last token that is not padding; so does a causal FLASH without a mask."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        pad_token_id=5, num_labels=3,
    )  # fmt: skip
    llama = LlamaForSequenceClassification(config).eval()
    flash = make_model(FlashForSequenceClassification, tiny_config(is_decoder=True, pad_token_id=5, num_labels=3))
    ids = random_ids(flash.config, 2, 9)
    ids[ids == 5] = 6
    short = ids[:1, :6]
    ids[0, 6:] = 5
    for model in (llama, flash):
        assert_close(model(input_ids=ids).logits[:1], model(input_ids=short).logits, 1e-5, type(model).__name__)


@DIRECTIONS
@pytest.mark.parametrize("mark", ["position_ids", "cu_seq_lens_q", "seq_idx"])
@pytest.mark.parametrize("cls", [FlashForSequenceClassification, FlashForMultipleChoice])
def test_packed_rows_are_refused_where_a_row_gets_one_answer(cls, mark, is_decoder):
    model = make_model(cls, tiny_config(num_labels=3, is_decoder=is_decoder))
    shape = (1, 1, 12) if cls is FlashForMultipleChoice else (1, 12)
    ids = random_ids(model.config, *shape)
    position = torch.cat([torch.arange(5), torch.arange(7)]).view(shape)
    packed = {
        "position_ids": position,
        "cu_seq_lens_q": torch.tensor([0, 5, 12]),
        "seq_idx": torch.tensor([[0] * 5 + [1] * 7]),
    }
    with pytest.raises(ValueError, match="one answer per row"):
        model(input_ids=ids, **{mark: packed[mark]})
    # Marking one document per row is allowed.
    whole = {
        "position_ids": torch.arange(12).view(shape),
        "cu_seq_lens_q": torch.tensor([0, 12]),
        "seq_idx": torch.zeros(1, 12, dtype=torch.int64),
    }
    assert_close(model(input_ids=ids, **{mark: whole[mark]}).logits, model(input_ids=ids).logits, 1e-12)


@DIRECTIONS
@pytest.mark.parametrize("cls", [FlashForTokenClassification, FlashForQuestionAnswering])
def test_packed_rows_give_each_token_its_own(cls, is_decoder):
    model = make_model(cls, tiny_config(num_labels=3, is_decoder=is_decoder))
    ids = random_ids(model.config, 1, 23)
    position = torch.cat([torch.arange(10), torch.arange(13)])[None]
    out = answer(model(input_ids=ids, position_ids=position))
    alone = [answer(model(input_ids=part)) for part in (ids[:, :10], ids[:, 10:])]
    assert_close(out, torch.cat(alone, 1), 1e-9)
    if cls is FlashForQuestionAnswering:  # the loss is a softmax over the row
        with pytest.raises(ValueError, match="one answer per row"):
            model(input_ids=ids, position_ids=position, **labels_for(cls, 1, 23))


def test_answers_that_are_missing_or_misplaced():
    """-100 and columns beyond the input are skipped, each end separately; an answer at padding is refused."""
    model = make_model(FlashForQuestionAnswering, tiny_config())
    ids = random_ids(model.config, 3, 9)
    out = model(ids)

    def loss(start, end, **options):
        return model(ids, start_positions=torch.tensor(start), end_positions=torch.tensor(end), **options).loss

    start, end = -out.start_logits.log_softmax(-1), -out.end_logits.log_softmax(-1)
    both = start[[0, 1, 2], [2, 0, 1]].mean() + end[[0, 1, 2], [3, 4, 8]].mean()
    assert_close(loss([2, 0, 1], [3, 4, 8]), both / 2, 1e-9)
    assert_close(loss([2, -100, 1], [3, -100, 99]), (start[[0, 2], [2, 1]].mean() + end[0, 3]) / 2, 1e-9)
    assert_close(loss([2, -100, -100], [99, 99, -100]), start[0, 2] / 2, 1e-9)
    # As transformers: the first token, where answers that do not exist are often put.
    assert_close(loss([-1] * 3, [-1] * 3), loss([0] * 3, [0] * 3), 1e-12)
    none = loss([-100] * 3, [9] * 3)
    none.backward()
    assert none == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with pytest.raises(ValueError, match="end_positions must be columns of real tokens.*row 1 has 7"):
        loss([2, 2, 2], [3, 7, 3], attention_mask=mask)
    assert loss([2, 2, 2], [3, -100, 3], attention_mask=mask).isfinite()


@pytest.mark.parametrize(
    ("auto", "head", "other", "task"),
    [
        (AutoModelForCausalLM, FlashForCausalLM, FlashForMaskedLM, "text-generation"),
        (AutoModelForMaskedLM, FlashForMaskedLM, FlashForCausalLM, "fill-mask"),
    ],
    ids=["causal", "masked"],
)
def test_a_head_of_the_other_direction_warns(auto, head, other, task, tmp_path, monkeypatch, model_of, tokenizer):
    """Its predictions look like text. An explicit is_decoder confirms that this direction is intended."""
    said = []
    monkeypatch.setattr(modeling_flash.logger, "warning", said.append)
    model_of(other).save_pretrained(tmp_path / "other")
    model_of(head).save_pretrained(tmp_path / "same")
    FlashForSequenceClassification.from_pretrained(tmp_path / "other").save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "other")
    causal = auto is AutoModelForCausalLM

    # New models of any configuration, checkpoints of the same direction, and confirmed changes.
    for is_decoder in (True, False):
        head(tiny_config(is_decoder=is_decoder))
        auto.from_config(tiny_config(is_decoder=is_decoder))
    auto.from_pretrained(tmp_path / "same")
    meant, report = auto.from_pretrained(tmp_path / "other", is_decoder=causal, output_loading_info=True)
    assert meant.model.is_causal is causal and not report["missing_keys"]
    FlashModel.from_pretrained(tmp_path / "other", is_decoder=causal)
    FlashForSequenceClassification.from_pretrained(tmp_path / "other", is_decoder=causal)
    assert not said

    for folder in ("other", "tuned"):
        model, _ = auto.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert len(said) == 1
        trained, now = ("bidirectionally", "is causal") if causal else ("causally", "is bidirectional")
        for words in (folder, trained, now, f"is_decoder={causal}"):
            assert words in said[0]
        said.clear()
    pipeline(task, model=str(tmp_path / "other"))
    assert len(said) == 1
    # Once saved, the new direction is its own.
    said.clear()
    model.save_pretrained(tmp_path / "turned")
    auto.from_pretrained(tmp_path / "turned")
    assert not said


def test_losses():
    config = {"vocab_size": 61}
    ids = random_ids(tiny_config(), 4, 9)
    one = make_model(FlashForSequenceClassification, tiny_config(num_labels=1, **config))
    values = torch.randn(4, dtype=torch.float64)
    assert_close(one(ids, labels=values).loss, (one(ids).logits[:, 0] - values).square().mean(), 1e-9)
    several = make_model(FlashForSequenceClassification, tiny_config(num_labels=3, **config))
    classes = torch.tensor([0, 2, 1, 1])
    assert_close(several(ids, labels=classes).loss, F.cross_entropy(several(ids).logits, classes), 1e-9)
    multi = make_model(FlashForSequenceClassification, tiny_config(num_labels=3, **config))
    flags = torch.randint(0, 2, (4, 3)).double()
    expected = F.binary_cross_entropy_with_logits(multi(ids).logits, flags)
    assert_close(multi(ids, labels=flags).loss, expected, 1e-9)
    tags = make_model(FlashForTokenClassification, tiny_config(num_labels=3, **config))
    labels = torch.randint(-1, 3, (4, 9))
    labels[labels == -1] = -100
    expected = F.cross_entropy(tags(ids).logits.flatten(0, 1), labels.flatten())
    assert_close(tags(ids, labels=labels).loss, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", TASKS)
def test_losses_of_half_precision_are_exact(cls, dtype):
    """Of the logits as they are; their gradients are rounded to the type of the logits once."""
    model = make_model(cls, tiny_config(num_labels=3), dtype=dtype)
    width = 700 if cls is FlashForQuestionAnswering else 5
    out = model(**inputs_for(cls, model.config, 3, width), **(labels := labels_for(cls, 3, width)))
    sides = [("start_logits", "start_positions"), ("end_logits", "end_positions")]
    sides = sides if cls is FlashForQuestionAnswering else [("logits", "labels")]
    scores = [getattr(out, name) for name, _ in sides]
    exact = [x.detach().double().requires_grad_() for x in scores]
    pairs = zip(exact, sides, strict=True)
    losses = [F.cross_entropy(x.flatten(0, -2), labels[name].flatten()) for x, (_, name) in pairs]
    expected = sum(losses) / len(losses)
    assert_close(out.loss, expected, 1e-6)
    grads = torch.autograd.grad(out.loss, scores), torch.autograd.grad(expected, exact)
    for actual, wanted in zip(*grads, strict=True):
        assert_close(actual, wanted.to(dtype), 1e-3)


ONE, SEVERAL = "single_label_classification", "multi_label_classification"


@pytest.mark.parametrize(
    ("cls", "problem", "labels", "words"),
    [
        (FlashForSequenceClassification, None, [0, 3, 1], r"int64.*\[0, num_labels = 3\).*got 3. Load .* num_labels="),
        (FlashForSequenceClassification, None, [0, -1, 1], r"num_labels = 3.*got -1"),
        (FlashForSequenceClassification, None, [0, 1], r"shape \(3,\), got \(2,\)"),
        (FlashForSequenceClassification, ONE, [0.0, 1.0, 2.0], r"int64 .*got torch.float32"),
        (FlashForSequenceClassification, ONE, torch.zeros(3, dtype=torch.int32), "int64 .*got torch.int32"),
        (FlashForSequenceClassification, None, [0.0, 1.0, 2.0], r"got \(3,\) of torch.float32.* int64 classes"),
        (FlashForSequenceClassification, SEVERAL, [[0, 1, 1]] * 3, r"floating.*got .* of torch.int64.*labels.float"),
        (FlashForSequenceClassification, None, [[True, True, False]] * 3, "got .* of torch.bool.*labels.float"),
        (FlashForSequenceClassification, SEVERAL, [[0.0, 1.0]] * 3, r"\(3, 3\), got \(3, 2\)"),
        # Which would be broadcast.
        (FlashForSequenceClassification, "regression", [0.0, 1.0, 2.0], r"shape \(3, 3\), got \(3,\)"),
        (FlashForTokenClassification, None, [[0, 3]] * 3, r"\[0, num_labels = 3\).*got 3"),
        (FlashForTokenClassification, None, [[0.0, 1.0]] * 3, "int64 .*got torch.float32"),
        (FlashForMultipleChoice, None, [0, 2, 1], r"\[0, choices = 2\).*got 2"),
        (FlashForMultipleChoice, None, [[0], [1], [1]], r"shape \(3,\), got \(3, 1\)"),
        (FlashForQuestionAnswering, None, [0.0, 1.0, 1.0], "start_positions must be .*int64.*got torch.float32"),
    ],
)
def test_labels_that_fit_no_loss_are_refused_in_words(cls, problem, labels, words):
    model = make_model(cls, tiny_config(num_labels=3, problem_type=problem))
    ids, labels = inputs_for(cls, model.config, 3, 2)["input_ids"], torch.as_tensor(labels)
    answers = {"labels": labels}
    if cls is FlashForQuestionAnswering:
        answers = {"start_positions": labels, "end_positions": labels}
    with pytest.raises(ValueError, match=words):
        model(ids, **answers)


@pytest.mark.parametrize("cls", TASKS)
def test_lists_are_refused_in_words(cls):
    """Also where padding is looked for."""
    model = make_model(cls, tiny_config(num_labels=3, pad_token_id=5))
    inputs, labels = inputs_for(cls, model.config, 3, 2), labels_for(cls, 3, 2)
    with pytest.raises(ValueError, match="must be .*got list"):
        model(**inputs, **{name: value.tolist() for name, value in labels.items()})
    with pytest.raises(ValueError, match="input_ids .*must be .*got list"):
        model(inputs["input_ids"].tolist())


def test_a_mask_of_questions_alone_is_refused_in_words():
    model = make_model(FlashForMultipleChoice, tiny_config())
    ids = inputs_for(FlashForMultipleChoice, model.config, 3, 5)["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask .*\(batch, choices, tokens\), got \(3, 5\)"):
        model(ids, attention_mask=torch.ones(3, 5))


@pytest.mark.parametrize(
    "cls, problem",
    [
        (FlashForSequenceClassification, "regression"),
        (FlashForSequenceClassification, "single_label_classification"),
        (FlashForSequenceClassification, "multi_label_classification"),
        (FlashForTokenClassification, None),
        (FlashForMultipleChoice, None),
    ],
)
def test_accumulated_gradients_are_exact(cls, problem):
    """Micro-batches of 1, 3 and 2 rows, normalised by num_items_in_batch as in Trainer."""
    config = tiny_config(num_labels=3, problem_type=problem)
    model = make_model(cls, config)
    inputs, labels = inputs_for(cls, config, 6, 13), labels_for(cls, 6, 13)["labels"]
    if problem in ("regression", "multi_label_classification"):
        labels = torch.randint(0, 2, (6, 3)).double()
    if cls is FlashForTokenClassification:
        labels[0, 2:] = -100
    count = labels.ne(-100).sum()
    model(**inputs, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {name: value[rows] for name, value in inputs.items()}
        model(**part, labels=labels[rows], num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-6, name)


@pytest.mark.parametrize("source", [FlashForCausalLM, FlashForMaskedLM])
@pytest.mark.parametrize("cls", TASKS)
def test_only_the_head_is_new(cls, source, tmp_path):
    pretrained = make_model(source, tiny_config(), dtype=torch.float32)
    pretrained.save_pretrained(tmp_path / "base")
    model, info = cls.from_pretrained(tmp_path / "base", num_labels=3, output_loading_info=True)
    head = cls.head_name
    assert set(info["missing_keys"]) == {f"{head}.weight", f"{head}.bias"} and not info["unexpected_keys"]
    assert model.model.is_causal is (source is FlashForCausalLM)
    for name, value in pretrained.model.state_dict().items():
        assert torch.equal(value, model.model.state_dict()[name]), name
    model.save_pretrained(tmp_path / "tuned")
    again, info = cls.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not info["missing_keys"] and again.config.num_labels == 3
    back, info = source.from_pretrained(tmp_path / "tuned", output_loading_info=True)
    assert not info["missing_keys"] and set(info["unexpected_keys"]) == {f"{head}.weight", f"{head}.bias"}
    assert torch.equal(back.lm_head.weight, pretrained.lm_head.weight)


@pytest.mark.parametrize("cls", TASKS)
def test_auto_classes(cls, tmp_path):
    model = make_model(cls, tiny_config(num_labels=3), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    auto = next(auto for auto, registered in AUTO_CLASSES.items() if registered is cls)
    assert type(auto.from_pretrained(tmp_path)) is cls


@pytest.fixture(scope="module")
def tokenizer():
    text = "Dorothy lived in the midst of the great Kansas prairies, with Uncle Henry, who was a farmer."
    return train_tokenizer([{"text": text}] * 3, 300)


@pytest.fixture
def model_of(tokenizer):
    def build(cls, **changes):
        config = tiny_config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **changes)
        return make_model(cls, config, dtype=torch.float32, scale=0.1)

    return build


TEXTS = ["Dorothy lived in Kansas.", "Uncle Henry and the great midst of the prairies, with Dorothy."]


def test_text_generation_pipeline_batches(model_of, tokenizer):
    generate = pipeline("text-generation", model=model_of(FlashForCausalLM), tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    batched = [out[0]["generated_text"] for out in generate(TEXTS, batch_size=2, **options)]
    assert batched == [generate(text, **options)[0]["generated_text"] for text in TEXTS]


def test_chat_template_passes_through_generation(model_of, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    generate = pipeline("text-generation", model=model_of(FlashForCausalLM), tokenizer=tokenizer)
    out = generate([{"role": "user", "content": TEXTS[0]}], max_new_tokens=8, do_sample=False)
    assert out[0]["generated_text"][-1]["role"] == "assistant"
    prompt = f"user: {TEXTS[0]}\nassistant:"
    expected = generate(prompt, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert out[0]["generated_text"][-1]["content"] == expected


def test_a_chat_is_continued_as_running_text(model_of):
    """By the template of a tokenizer that the package trains for causal models."""
    tokenizer = train_tokenizer([{"text": text} for text in TEXTS] * 3, 300, causal=True)
    parts = [" The Lion ", "ran.\n", "  Then"]
    chat = [{"role": role, "content": part} for role, part in zip(("user", "assistant", "user"), parts, strict=True)]
    ids = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert ids["input_ids"] == tokenizer("".join(parts))["input_ids"] and ids["input_ids"][0] == tokenizer.bos_token_id
    marked = [token for token, mark in zip(ids["input_ids"], ids["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == parts[1]
    pieces = [{"role": "user", "content": [{"type": "text", "text": part} for part in parts]}]
    assert tokenizer.apply_chat_template(pieces, return_dict=True)["input_ids"] == ids["input_ids"]
    generate = pipeline("text-generation", model=model_of(FlashForCausalLM), tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False}
    for turns, prompt in ((chat, "".join(parts)), (chat[:2], "".join(parts[:2]))):
        text = generate(prompt, **options, return_full_text=False)[0]["generated_text"]
        last = generate(turns, **options)[0]["generated_text"][-1]
        # A reply that was begun is continued.
        assert last == {"role": "assistant", "content": text if len(turns) == 3 else parts[1] + text}
    both = generate([chat, chat[:1]], batch_size=2, **options)
    for turns, out in zip((chat, chat[:1]), both, strict=True):
        assert out[0]["generated_text"] == generate(turns, **options)[0]["generated_text"]


def test_fill_mask_pipeline(model_of, tokenizer):
    fill = pipeline("fill-mask", model=model_of(FlashForMaskedLM), tokenizer=tokenizer)
    texts = [
        f"Dorothy lived in {tokenizer.mask_token}.",
        f"{tokenizer.mask_token} and the great midst of the prairies",
    ]
    together = fill(texts, batch_size=2)
    for text, found in zip(texts, together, strict=True):
        alone = fill(text)
        assert [row["token"] for row in found] == [row["token"] for row in alone] and len(alone) == 5
        assert abs(found[0]["score"] - alone[0]["score"]) < 1e-5


@DIRECTIONS
def test_classification_feature_and_question_pipelines(model_of, tokenizer, is_decoder):
    classify = pipeline(
        "text-classification",
        model=model_of(FlashForSequenceClassification, is_decoder=is_decoder),
        tokenizer=tokenizer,
    )
    tag = pipeline(
        "token-classification", model=model_of(FlashForTokenClassification, is_decoder=is_decoder), tokenizer=tokenizer
    )
    together = classify(TEXTS, batch_size=2)
    for text, found in zip(TEXTS, together, strict=True):
        alone = classify(text)[0]
        assert found["label"] == alone["label"] and abs(found["score"] - alone["score"]) < 1e-5
        assert len(tag(text)) == len(tokenizer(text, add_special_tokens=False)["input_ids"])
    features = pipeline(
        "feature-extraction", model=model_of(FlashForMaskedLM, is_decoder=is_decoder).model, tokenizer=tokenizer
    )
    vectors = torch.tensor(features(TEXTS[0])[0])
    assert vectors.shape == (len(tokenizer(TEXTS[0])["input_ids"]), 24)


def test_question_answering_leaves_padding_out(model_of, tokenizer):
    """transformers 5 has no question-answering pipeline any more; its first step was this softmax over positions."""
    model = model_of(FlashForQuestionAnswering)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    padding = batch["attention_mask"] == 0
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert padding.any() and out.start_logits.softmax(-1)[padding].max() == 0
    assert out.end_logits.softmax(-1)[padding].max() == 0


def test_lora_merges_and_unloads_exactly():
    peft = pytest.importorskip("peft")
    base = make_model(FlashForCausalLM, tiny_config())
    ids = random_ids(base.config, 2, 21)
    before = base(ids).logits.detach().clone()
    config = peft.LoraConfig(r=4, target_modules=LORA_TARGET_MODULES, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    adapted = {name.split(".")[-1] for name, module in base.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(LORA_TARGET_MODULES) - {"gate_proj"}  # only with global_state="delta"
    assert_close(model(input_ids=ids).logits, before, 1e-12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    tuned = model(input_ids=ids).logits.detach().clone()
    assert (tuned - before).abs().max() > 1e-3
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    model.merge_adapter()
    assert_close(model(input_ids=ids).logits, tuned, 1e-5)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert type(merged) is FlashForCausalLM
    assert_close(merged(ids).logits, tuned, 1e-5)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_causal_head_continues_a_cache(name):
    """With a mask of all tokens, as for the base model."""
    for cls in (FlashForSequenceClassification, FlashForTokenClassification, FlashForQuestionAnswering):
        model = make_model(cls, tiny_config(is_decoder=True, num_labels=3), dtype=torch.float64)
        inputs = padded(inputs_for(cls, model.config, 2, 14), left=6, right=0)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        cache = DynamicCache(config=model.config)
        model(ids[:, :9], attention_mask=mask[:, :9], **{name: cache})
        found = model(ids[:, 9:], attention_mask=mask, **{name: cache}).to_tuple()[0]
        full = model(ids, attention_mask=mask).to_tuple()[0]
        assert_close(found, full if cls is FlashForSequenceClassification else full[:, 9:], 1e-9)
