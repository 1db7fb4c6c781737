# SPDX-License-Identifier: Apache-2.0
"""Scores against sums made by hand, state and memory against what a long text may cost, the script's JSON."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from flash_hf import FlashForCausalLM, FlashForMaskedLM
from flash_hf.training.packing import MaskingCollator, pack_documents
from flash_hf.training.tokenizer import tokenize_documents, train_tokenizer
from helpers import BOOK, ROOT, TEXT, make_model, random_ids, run_here, tiny_config
from scripts.cards.card import check_results
from scripts.evaluation import cost, harness, language, recall


pytestmark = pytest.mark.usefixtures("own_cache")
TASKS = ROOT / "scripts" / "evaluation" / "lm_eval_tasks"
DOCUMENTS = [{"text": TEXT[3000:3900]}, {"text": "  "}, {"text": TEXT[9000:9300]}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([{"text": TEXT[:50_000]}], 300)


def model_of(cls, **changes):
    return make_model(cls, tiny_config(vocab_size=300, **changes), dtype=torch.float32, scale=0.1)


@pytest.fixture(scope="module")
def causal():
    return model_of(FlashForCausalLM)


@pytest.fixture(scope="module")
def masked():
    return model_of(FlashForMaskedLM)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, causal, masked, tokenizer):
    """Both models, saved with the tokenizer."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("causal", "masked")}
    for name, model in (("causal", causal), ("masked", masked)):
        model.save_pretrained(places[name])
        tokenizer.save_pretrained(places[name])
    return places


def nats_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each token but the first, from one pass over all."""
    with torch.no_grad():
        return cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")


# --- causal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, segment", [(61, 16), (61, 13), (64, 64), (65, 64), (33, 16), (2, 16), (61, 4096)])
def test_a_document_in_segments_scores_as_in_one_pass(causal, length, segment):
    ids = random_ids(causal.config, length)
    nats, right = language.score_document(causal, ids, segment=segment)
    expected = nats_of(causal, ids)
    assert nats.shape == right.shape == (length - 1,)
    torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(right, causal(ids[None]).logits[0, :-1].argmax(-1) == ids[1:])


@pytest.mark.parametrize("context", [None, 40])
def test_document_metrics_are_the_sums_of_their_tokens(causal, tokenizer, context):
    scores = language.score_documents(causal, tokenizer, DOCUMENTS, context=context, segment=24)
    nats, tokens, places = 0.0, 0, []
    for row in (DOCUMENTS[0], DOCUMENTS[2]):
        ids = tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id]  # it puts the start token in front
        step = context or len(ids)
        for begin in range(0, len(ids) - 1, step):
            part = nats_of(causal, torch.tensor(ids[begin : begin + step + 1]))
            nats, tokens = nats + part.double().sum().item(), tokens + len(part)
            places += range(1, len(part) + 1)
    texts = [row["text"] for row in (DOCUMENTS[0], DOCUMENTS[2])]
    metrics = scores.metrics()
    assert metrics["tokens"] == tokens == len(places)
    assert metrics["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(map(len, texts)), rel=1e-5)
    words = sum(len(text.split()) for text in texts)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-3)
    # Every token is in one row of the table, and the rows add up.
    rows = scores.by_position
    assert [row["above"] for row in rows] == [0, 256, 512][: len(rows)] and rows[0]["up_to"] == 256
    assert [row["tokens"] for row in rows] == [sum(row["above"] < p <= row["up_to"] for p in places) for row in rows]
    assert sum(row["tokens"] * row["loss"] for row in rows) == pytest.approx(nats, rel=1e-5)
    assert len(rows) == (1 if context else 3)


def test_position_edges_double():
    assert language.position_edges(1) == [0, 256]
    assert language.position_edges(512) == [0, 256, 512]
    assert language.position_edges(513) == [0, 256, 512, 1024]


def test_no_text_is_refused(causal, masked, tokenizer):
    with pytest.raises(ValueError, match="The documents hold no text"):
        language.score_documents(causal, tokenizer, [{"text": " "}])
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        language.score_documents(causal, tokenizer, DOCUMENTS, context=0)
    with pytest.raises(ValueError, match="The texts hold no token"):
        language.pseudo_perplexity(masked, tokenizer, [""])


def test_answers_are_counted_where_they_are_asked(causal):
    inputs = random_ids(causal.config, 5, 30)
    labels = torch.full_like(inputs, -100)
    with pytest.raises(ValueError, match="labels_BN must hold a label"):
        recall.answer_accuracy(causal, inputs, labels)
    with torch.no_grad():
        likeliest = causal(inputs).logits.argmax(-1)
    labels[:, 7] = likeliest[:, 7]
    labels[:2, 20] = (likeliest[:2, 20] + 1) % 300
    assert recall.answer_accuracy(causal, inputs, labels, batch_size=2) == 5 / 7


# --- masked ----------------------------------------------------------------------------------------------------------


def test_masked_scores_count_the_masked_tokens_alone(masked, tokenizer):
    documents = Dataset.from_list(DOCUMENTS)
    scores = language.masked_scores(masked, tokenizer, documents, block_size=50, batch_size=3, seed=4)
    nats, right, tokens, total = 0.0, 0, 0, 0
    blocks = pack_documents(
        tokenize_documents(documents, tokenizer), tokenizer, block_size=50, causal=False, packing="documents"
    )
    collator = MaskingCollator(tokenizer, seed=4)
    for begin in range(0, len(blocks), 3):
        batch = collator.torch_call(list(blocks.select(range(begin, min(begin + 3, len(blocks))))))
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = masked(**batch).logits
        counted = labels != -100
        nats += cross_entropy(logits[counted], labels[counted], reduction="sum").item()
        right += int((logits.argmax(-1) == labels)[counted].sum())
        tokens, total = tokens + int(counted.sum()), total + labels.numel()
    assert scores["tokens"] == tokens and 0.05 < tokens / total < 0.3
    assert scores["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert scores["masked_accuracy"] == right / tokens


def test_pseudo_perplexity_masks_one_token_at_a_time(masked, tokenizer):
    texts = [TEXT[5000:5080], TEXT[8000:8400]]
    found = language.pseudo_perplexity(masked, tokenizer, texts, max_tokens=60, batch_size=7)
    nats, right, tokens = 0.0, 0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"][:61] + [tokenizer.eos_token_id]
        for place in range(1, len(ids) - 1):
            hidden = torch.tensor(ids)
            hidden[place] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = masked(hidden[None]).logits[0, place]
            nats += cross_entropy(logits, torch.tensor(ids[place])).item()
            right, tokens = right + int(logits.argmax() == ids[place]), tokens + 1
    assert found["pseudo_tokens"] == tokens and found["pseudo_accuracy"] == right / tokens
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-3)
    assert found["word_pseudo_perplexity"] > found["pseudo_perplexity"]


# --- cost ------------------------------------------------------------------------------------------------------------


def test_a_long_text_is_read_in_constant_memory_and_to_the_same_effect(causal):
    ids = random_ids(causal.config, 203)
    cache = DynamicCache(config=causal.config)
    marks = list(cost.read_long(causal, ids[:-1], cache, segment=16, marks=[1, 5, 50, 100, 5000]))
    assert [at.tokens for at in marks] == [1, 5, 50, 100, 202]
    C, S, E, L = 8, 12, 48, 3
    # Keys and values of the open chunk, the sum, and a count of tokens in 8 bytes, for each layer.
    assert {at.cache for at in marks} == {L * (4 * (C * (2 * S + E) + S * E) + 8)}
    assert all(at.memory > 1e7 for at in marks) and [at.seconds for at in marks] == sorted(at.seconds for at in marks)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones(1, 203, dtype=torch.long)
    whole = causal.generate(ids[None], attention_mask=mask, **options)
    assert torch.equal(causal.generate(ids[None], attention_mask=mask, past_key_values=cache, **options), whole)
    assert cost.cache_bytes(cache) == marks[0].cache


def test_the_cache_of_another_model_is_counted_too():
    quad = model_of(FlashForCausalLM, attention_type="quadratic")
    cache = DynamicCache(config=quad.config)
    list(cost.read_long(quad, random_ids(quad.config, 30), cache, segment=10))
    assert cost.cache_bytes(cache) == 3 * 30 * (12 + 48) * 4


def test_speed_is_tokens_over_time(causal, masked, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("scripts.evaluation.cost.time.perf_counter", lambda: next(clock))  # each run takes a second
    assert cost.tokens_per_second(masked, batch_size=2, length=20, repeats=3) == 40
    assert cost.tokens_per_second(causal, batch_size=2, length=20, new_tokens=5, repeats=3) == 10


# --- lm-evaluation-harness -------------------------------------------------------------------------------------------


def test_the_questions_are_sound():
    """And stand in no text that is trained on here: their books are held out."""
    cloze, following = (
        [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("book_cloze", "book_next")
    )
    assert len(cloze) == len(following) == 200
    for row in cloze:
        assert re.search(rf"\b{row['word']}\b", row["context"]) and len(row["context"].split()) >= 60
    for row in following:
        assert len(set(row["choices"])) == 4 and len(row["context"].split()) >= 60
        lengths = [len(choice.split()) for choice in row["choices"]]
        assert max(abs(length - lengths[row["answer"]]) for length in lengths) <= 2
    answers = [row["answer"] for row in following]
    assert all(30 <= answers.count(answer) <= 70 for answer in range(4))


def test_the_questions_are_made_by_rule(tmp_path, capsys):
    for folder in ("first", "second"):
        arguments = ["--books", BOOK, "--questions", 9, "--output", tmp_path / folder]
        run_here("-m", "scripts.evaluation.lm_eval_tasks.make_tasks", *arguments)
    assert "9 of" in capsys.readouterr().out
    flat = " ".join(TEXT.split())
    for name in ("book_cloze.jsonl", "book_next.jsonl"):
        made = (tmp_path / "first" / name).read_text(encoding="utf-8")
        assert made == (tmp_path / "second" / name).read_text(encoding="utf-8")
        for row in map(json.loads, made.splitlines()):
            after = f" {row['word']}" if "word" in row else f" {row['choices'][row['answer']]}"
            # The right answer is what the book says; further back there may be a heading that was left out.
            assert " ".join(row["context"].split()[-9:]) + after in flat


def test_tasks_find_their_questions_from_anywhere(tmp_path, monkeypatch):
    """As the harness loads them: by the function that the task names, whatever folder it runs in."""
    monkeypatch.chdir(tmp_path)
    for path in TASKS.glob("*.yaml"):
        task = path.read_text(encoding="utf-8")
        module, function = re.search(r"^custom_dataset: !function (\w+)\.(\w+)$", task, re.M).groups()
        name = re.search(r"^dataset_kwargs:\n  name: (\w+)$", task, re.M)[1]
        rows = runpy.run_path(str(TASKS / f"{module}.py"))[function](version=1.0, name=name)["test"]
        assert name == path.stem and len(rows) == 200
        first = json.loads((TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert rows[0] == first


def test_the_harness_runs_on_local_data(folders, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason='needs pip install "flash-hf[eval]"')
    monkeypatch.chdir(tmp_path)  # the data are found from anywhere
    # The harness takes the training length for the longest context.
    model = AutoModelForCausalLM.from_pretrained(folders["causal"], max_position_embeddings=4096)
    tokenizer = AutoTokenizer.from_pretrained(folders["causal"])
    scores = harness.run_lm_eval(model, tokenizer, TASKS, limit=4)
    assert set(scores) == {"book_cloze", "book_next"}
    assert scores["book_cloze"]["perplexity"] > 1 and 0 <= scores["book_next"]["acc_norm"] <= 1
    with pytest.raises(ValueError, match="folder must hold tasks"):
        harness.run_lm_eval(model, tokenizer, tmp_path)


def test_a_missing_harness_is_named(causal, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "flash-hf\[eval\]"'):
        harness.run_lm_eval(causal, tokenizer, TASKS)


# --- the script ------------------------------------------------------------------------------------------------------


def evaluate(model: Path, *options: str) -> None:
    run_here("-m", "scripts.evaluation", "--model", model, "--device", "cpu", *options)


def test_the_script_writes_results_for_cards(folders, tmp_path, capsys):
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS), encoding="utf-8")
    files = ["--files", str(tmp_path / "held_out.jsonl")]
    output = tmp_path / "new" / "results.json"
    evaluate(folders["causal"], *files, "--measure", "perplexity", "--output", str(output))
    first = json.loads(output.read_text(encoding="utf-8"))
    check_results(first)
    assert {row["command"].partition(" --")[0] for row in first} == {"python -m scripts.evaluation"}
    assert {row["dataset"] for row in first} == {"held_out"} and {row["task"] for row in first} == {"text-generation"}
    metrics = {row["metric"]: row["value"] for row in first}
    model = AutoModelForCausalLM.from_pretrained(folders["causal"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folders["causal"])
    expected = language.score_documents(model, tokenizer, DOCUMENTS)
    assert metrics["bits_per_byte"] == pytest.approx(expected.metrics()["bits_per_byte"], rel=1e-4)
    assert metrics["loss, tokens 257 to 512"] == pytest.approx(expected.by_position[1]["loss"], rel=1e-4)

    # Measured again, with more: old values are replaced, others stay.
    more = ["--context", "40", "--dataset", "other", "--measure", "perplexity", "speed", "--lengths", "32"]
    evaluate(folders["causal"], *files, *more, "--output", str(output))
    evaluate(folders["causal"], *files, "--measure", "perplexity", "--output", str(output))
    rows = json.loads(output.read_text(encoding="utf-8"))
    keys = [(row["dataset"], row["metric"]) for row in rows]
    assert len(keys) == len(set(keys)) and {("held_out", "loss"), ("other", "loss, context 40")} <= set(keys)
    assert {metric for name, metric in keys if name == "random-tokens"} == {
        "forward tokens/s, length 32",
        "decoded tokens/s, batch 1",
    }

    evaluate(folders["masked"], *files, "--measure", "masked", "pseudo", "--block_size", "64")
    assert "masked_accuracy" in capsys.readouterr().out


def test_the_script_asks_for_recall(folders, capsys):
    evaluate(folders["causal"], "--measure", "recall", "--lengths", "64")
    out = capsys.readouterr().out
    for task in ("mqar, 8 pairs", "needle"):
        assert 0 <= float(re.search(rf"{task}, accuracy, length 64 +([\d.]+)$", out, re.M)[1]) < 0.5


def test_the_script_refuses_what_cannot_be_measured(folders, capsys):
    for kind, options, words in (
        ("causal", ["--measure", "perplexity"], "--files must name held-out text"),
        ("causal", ["--measure", "masked", "--files", "a"], "masked cannot be measured with FlashForCausalLM"),
        ("masked", ["--measure", "lm_eval"], "lm_eval cannot be measured with FlashForMaskedLM"),
    ):
        with pytest.raises(SystemExit):
            evaluate(folders[kind], *options)
        assert words in capsys.readouterr().err
