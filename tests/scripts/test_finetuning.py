# SPDX-License-Identifier: Apache-2.0
"""scripts/finetune: hand-worked scores, reading, aligning, learning, resuming, refusals."""

import gzip
import json
import re
import shlex
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from flash_hf import FlashForCausalLM, FlashForMaskedLM
from flash_hf.training.tokenizer import load_tokenizer, train_tokenizer
from helpers import DATA, ROOT, TEXT, first_line, run_python, tiny_config
from scripts.cards.card import check_results
from scripts.finetune import readers, run, tasks
from scripts.finetune.arguments import TaskArguments, parse_arguments
from scripts.finetune.metrics import Accuracy, MacroF1, SpanF1, Squad, spans
from scripts.study import finetune as finetune_study


pytestmark = pytest.mark.usefixtures("own_cache")
FILES = {
    "classification": ("characters_train.jsonl", "characters_validation.jsonl"),
    "tagging": ("names_train.conll", "names_validation.conll"),
    "qa": ("questions_train.json", "questions_validation.json"),
}
QUESTION = {"id": "1", "question": "q", "context": "c", "answers": {"text": ["x"], "answer_start": [0]}}
ANSWERED = {**QUESTION, "answers": {"text": ["c"], "answer_start": [0]}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([{"text": TEXT}], 600).save_pretrained(folder)
    return folder


def arguments(task: str, output_dir: Path, tokenizer: Path | None = None, /, **changes):
    options = {
        "task": task,
        "train_file": DATA / FILES[task][0],
        "validation_file": DATA / FILES[task][1],
        "config_overrides": "hidden_size=48,num_hidden_layers=2,query_key_dim=24,chunk_size=32",
        "tokenizer": tokenizer,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "num_train_epochs": 6,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": "true",
        "output_dir": output_dir,
        **changes,
    }
    command = []
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}", *([str(part) for part in value] if isinstance(value, list) else [str(value)])]
    return parse_arguments(command)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- metrics, by hand ------------------------------------------------------------------------------------------------


def computed(name, predictions, references):
    metric = {"accuracy": Accuracy, "macro_f1": MacroF1, "span_f1": SpanF1, "squad": Squad}[name](keep_in_memory=True)
    assert metric.description == metric.__doc__  # evaluate shows it
    return metric.compute(predictions=predictions, references=references)


def test_accuracy_and_macro_f1():
    predictions, references = [0, 1, 1, 2, 0, 0], [0, 1, 2, 2, 0, 3]
    assert computed("accuracy", predictions, references) == {"accuracy": pytest.approx(4 / 6)}
    # class 0: 2 right, guessed 3, true 2; class 1: 1, 2, 1; class 2: 1, 1, 2; class 3: 0, 0, 1
    expected = (4 / 5 + 2 / 3 + 2 / 3 + 0) / 4
    assert computed("macro_f1", predictions, references) == {"macro_f1": pytest.approx(expected)}


@pytest.mark.parametrize(
    "tags, expected",
    [
        ("O B-x I-x O", {("x", 1, 3)}),
        ("B-x B-x I-x", {("x", 0, 1), ("x", 1, 3)}),
        ("I-x I-x O I-y", {("x", 0, 2), ("y", 3, 4)}),  # no B: a span all the same
        ("B-x I-y I-y", {("x", 0, 1), ("y", 1, 3)}),  # another type begins another span
        ("S-x I-x E-x I-x", {("x", 0, 1), ("x", 1, 3), ("x", 3, 4)}),
        ("B-creative-work I-creative-work", {("creative-work", 0, 2)}),
        ("O O", set()),
    ],
)
def test_spans(tags, expected):
    assert spans(tags.split()) == expected


def test_span_f1():
    references = ["B-x I-x O B-y".split(), "O B-x O".split()]
    predictions = ["B-x I-x O B-x".split(), "O B-x I-x".split()]  # right; wrong type; wrong border
    result = computed("span_f1", predictions, references)
    assert result == {
        "precision": pytest.approx(1 / 3), "recall": pytest.approx(1 / 3), "f1": pytest.approx(1 / 3),
        "accuracy": pytest.approx(5 / 7),
    }  # fmt: skip
    nothing = computed("span_f1", [["O"], ["O"]], [["B-x"], ["O"]])
    assert nothing == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 0.5}
    with pytest.raises(ValueError, match="2 tags in references, but 1"):
        SpanF1(keep_in_memory=True).compute(predictions=[["O"]], references=[["O", "O"]])


def test_squad():
    def answers(*texts):
        return {"text": [*texts], "answer_start": [0] * len(texts)}

    predictions = {"a": "The Tin Woodman!", "b": "a green city", "c": "", "d": "Kansas", "e": "Toto"}
    references = {
        "a": answers("tin woodman"),  # articles, case and signs do not count
        "b": answers("the Emerald City", "green Emerald City"),  # 2 of 2 and of 3 words: 2 * 2 / 5
        "c": answers(),  # rightly silent
        "d": answers(),  # should have been silent
        "e": answers("Dorothy"),
    }
    result = computed(
        "squad",
        [{"id": key, "prediction_text": text} for key, text in predictions.items()],
        [{"id": key, "answers": value} for key, value in references.items()],
    )
    assert result == {"exact_match": pytest.approx(40.0), "f1": pytest.approx((100 + 80 + 100) / 5)}


# --- learning, saving, resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, metric, at_least, epochs, order",
    [
        ("classification", "accuracy", 0.7, 6, "random"),
        ("tagging", "f1", 0.6, 5, "random"),
        ("tagging", "f1", 0.6, 5, "group_by_length"),
        ("qa", "f1", 60, 3, "random"),
    ],
)
def test_learns_far_above_chance(task, metric, at_least, epochs, order, tokenizer, tmp_path):
    """Chance: 0.46 for the most frequent class, 0 for all O, about 10 for a random name of a sentence."""
    parsed = arguments(task, tmp_path / "run", tokenizer, num_train_epochs=epochs, train_sampling_strategy=order)
    result = run.run_finetuning(*parsed)
    assert result["metrics"]["validation"][metric] > at_least, result["metrics"]
    assert result["metrics"]["validation"].keys() - {"examples"} <= set(tasks.TASKS[task].metrics)
    saved = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(result)) and saved["versions"]["torch"] and saved["seed"] == 42
    card = json.loads((tmp_path / "run" / "card_results.json").read_text(encoding="utf-8"))
    check_results(card)
    assert {entry["metric"]: entry["value"] for entry in card}[metric] == result["metrics"]["validation"][metric]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000
    assert f"{metric} {result['metrics']['validation'][metric]:.4f}" in run.describe(result, "run")
    if task == "classification":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
        assert [*model.config.id2label.values()] == ["Dorothy", "Lion", "Scarecrow", "Tin Woodman"]
        rows = [json.loads(line) for line in (DATA / FILES[task][1]).read_text(encoding="utf-8").splitlines()]
        classify = pipeline("text-classification", str(tmp_path / "run"))
        right = [classify(row["text"])[0]["label"] == row["label"] for row in rows]
        assert np.mean(right) == pytest.approx(result["metrics"]["validation"]["accuracy"])


@pytest.mark.parametrize("task", ["qa", "tagging"])
def test_the_tokenizer_of_a_causal_checkpoint_keeps_its_side(task, tokenizer, tmp_path):
    """It pads on the left for generate(). Answers and tags are marked by column: training pads on the right."""
    scores = {}
    for side in ("left", "right"):
        torch.manual_seed(0)
        config = tiny_config(vocab_size=600, is_decoder=True, pad_token_id=1, max_position_embeddings=512)
        FlashForCausalLM(config).save_pretrained(tmp_path / side)
        own = AutoTokenizer.from_pretrained(tokenizer, padding_side=side)
        own.save_pretrained(tmp_path / side)
        options = {"model": tmp_path / side, "config_overrides": None, "max_steps": 4, "max_train_examples": 64}
        result = run.run_finetuning(*arguments(task, tmp_path / f"run {side}", **options))
        scores[side] = result["metrics"]
        assert AutoTokenizer.from_pretrained(tmp_path / f"run {side}").padding_side == side
    assert scores["left"] == scores["right"]


def test_resumed_run_equals_uninterrupted(tokenizer, tmp_path):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 25, "max_train_examples": 240}
    whole = run.run_finetuning(*arguments("classification", tmp_path / "a", tokenizer, **options))
    for file in (tmp_path / "a" / "model.safetensors", tmp_path / "a" / "results.json"):
        file.unlink()
    options["resume_from_checkpoint"] = tmp_path / "a" / "checkpoint-25"
    again = run.run_finetuning(*arguments("classification", tmp_path / "b", tokenizer, **options))
    assert again["steps"] == whole["steps"] == 30
    assert again["metrics"]["validation"] == pytest.approx(whole["metrics"]["validation"], rel=1e-5)

    wrong = write(tmp_path / "wrong.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 4)
    options["train_file"], options["validation_file"] = wrong, None
    with pytest.raises(ValueError, match="knows the labels Dorothy.*the data have x, y"):
        run.run_finetuning(*arguments("classification", tmp_path / "c", tokenizer, **options))


def test_continues_from_a_model_and_tests(tokenizer, tmp_path):
    """The labels keep the order of a model that knows them; a test set is measured on its own."""
    options = {"num_train_epochs": 1, "max_train_examples": 32, "validation_file": None}
    run.run_finetuning(*arguments("classification", tmp_path / "a", tokenizer, **options))
    config = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    config["id2label"] = dict(enumerate(reversed(config["id2label"].values())))
    config["label2id"] = {name: number for number, name in config["id2label"].items()}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options |= {"model": tmp_path / "a", "config_overrides": None, "test_file": DATA / FILES["classification"][1]}
    result = run.run_finetuning(*arguments("classification", tmp_path / "b", None, **options))
    assert result["labels"] == ["Tin Woodman", "Scarecrow", "Lion", "Dorothy"]
    assert result["metrics"]["test"]["examples"] == 50 and result["metrics"]["validation"]["examples"] == 4
    assert result["train_examples"] == 28


def test_every_example_is_scored_and_nothing_rounded(tokenizer, tmp_path):
    """With options that leave out rows of the training, or round the model for its evaluation."""
    options = {"num_train_epochs": 1, "max_train_examples": 40, "max_length": 64, "per_device_eval_batch_size": 64}
    results = []
    for name, more in (("a", {}), ("b", {"dataloader_drop_last": "true"})):
        results.append(run.run_finetuning(*arguments("classification", tmp_path / name, tokenizer, **options, **more)))
    for result in results:
        assert {*tasks.TASKS["classification"].metrics, "examples"} == set(result["metrics"]["validation"])
    options |= {"bf16_full_eval": "true", "use_cpu": "true"}
    run.run_finetuning(*arguments("classification", tmp_path / "c", tokenizer, **options))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("a", "c")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- reading and aligning --------------------------------------------------------------------------------------------


def task_arguments(task: str, **changes) -> TaskArguments:
    return TaskArguments(task=task, **{"train_file": ["none"], "stride": 0, **changes})


def test_tables_keep_what_stands_there(tmp_path):
    (tmp_path / "a.tsv").write_text('say "no\t1\nNA\t0\nnull\t1\n', encoding="utf-8")
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""",bad\nnull,good\n', encoding="utf-8")
    load = tasks.Classification.load
    rows = load(task_arguments("classification", column_names=["text", "label"]), [str(tmp_path / "a.tsv")], "", None)
    assert rows["text"][:] == ['say "no', "NA", "null"] and rows["label"][:] == ["1", "0", "1"]
    rows = load(task_arguments("classification"), [str(tmp_path / "a.csv")], "", None)
    assert rows["text"][:] == ['one, "two"', "null"] and rows["label"][:] == ["bad", "good"]


def test_other_columns_may_hold_anything(tmp_path):
    """As in read_rows, whose places the rows keep. A class column in Parquet keeps its names."""
    load, names = tasks.Classification.load, ClassLabel(names=["bad", "good"])
    rows = [{"text": "a", "label": 1, "x": 1}, {"label": 0, "x": "s", "late": [1], "text": "b"}]
    files = [str(write(tmp_path / f"{n}.jsonl", rows[n:])) for n in range(2)]
    read = load(task_arguments("classification"), files, "", None)
    assert read["text"][:] == ["a", "b", "b"] and read["label"][:] == ["1", "0", "0"]
    assert read["place"][:] == [f"{files[0]}, line 1", f"{files[0]}, line 2", f"{files[1]}, line 1"]
    with gzip.open(tmp_path / "a.csv.gz", "wt", encoding="utf-8") as file:
        file.write('\ufefflabel,text\r\n1.0,"a\r\nb"\r\n0,NA\r\n')
    read = load(task_arguments("classification"), [str(tmp_path / "a.csv.gz")], "", None)
    assert read["text"][:] == ["a\r\nb", "NA"] and read["label"][:] == ["1", "0"]
    assert read["place"][1].endswith("line 4")
    for number, other in enumerate(([1], ["s"])):
        features = Features(
            {"text": Value("string"), "label": names, "x": Value("int64" if number == 0 else "string")}
        )
        rows = Dataset.from_dict({"text": ["a"], "label": [number], "x": other}, features)
        rows.to_parquet(tmp_path / f"{number}.parquet")
    files = [str(tmp_path / f"{n}.parquet") for n in range(2)]
    assert load(task_arguments("classification"), files, "", None)["label"][:] == ["bad", "good"]


def answered(number: int, question: str, context: str, answer: str = "") -> dict:
    answers = (
        {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    )
    return {"id": str(number), "question": question, "context": context, "answers": answers}


# Rows, and those of them that are empty.
EMPTY = {
    "classification": (
        [{"text": text, "label": label} for text, label in zip(("good", "", " \n", "bad"), "abab", strict=True)],
        {2, 3},
    ),
    "pairs": (
        [
            {"text": text, "text_pair": pair, "label": label}
            for text, pair, label in (("one", "two", "a"), ("", "two", "b"), ("", " ", "a"), ("one", "", "b"))
        ],
        {3},
    ),
    "tagging": (
        [
            {"tokens": ["Oz", "is"], "tags": ["B-x", "O"]},
            {"tokens": [], "tags": []},
            {"tokens": ["", ""], "tags": ["O", "O"]},
            {"tokens": ["a", "", "b"], "tags": ["O", "O", "B-x"]},
        ],
        {2, 3},
    ),
    "qa": (
        [
            answered(1, "Who?", "Toto ran", "Toto"),
            answered(2, "", "Toto ran", "Toto"),
            answered(3, "Who?", ""),
            answered(4, "", " "),
            answered(5, "Who?", "Toto"),
        ],
        {2, 3, 4},
    ),
}


@pytest.mark.parametrize("start", [True, False], ids=["start token", "no start token"])
@pytest.mark.parametrize("case", [*EMPTY])
def test_empty_rows_are_left_out_and_counted(case, start, tokenizer, tmp_path, monkeypatch):
    """Each is a batch of its own: an empty one would have no token, or a loss of nothing, which is NaN."""
    rows, empty = EMPTY[case]
    task = "classification" if case == "pairs" else case
    if not start:
        bare = load_tokenizer(str(tokenizer), masked=False)
        bare.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer = tmp_path / "tokenizer"
        bare.save_pretrained(tokenizer)
        assert load_tokenizer(str(tokenizer), masked=False)("")["input_ids"] == []
    said = []
    monkeypatch.setattr(tasks.logger, "warning", said.append)
    files = {f"{name}_file": write(tmp_path / f"{name}.jsonl", rows) for name in ("train", "validation", "test")}
    parsed = arguments(
        task, tmp_path / "run", tokenizer, **files, per_device_train_batch_size=1, per_device_eval_batch_size=1,
        num_train_epochs=2, max_length=64, stride=8, text_pair_column="text_pair" if case == "pairs" else None,
    )  # fmt: skip
    result = run.run_finetuning(*parsed, plot=False)
    left = len(rows) - len(empty)
    assert result["empty_examples"] == dict.fromkeys(("train", "validation", "test"), len(empty))
    assert result["steps"] == 2 * left and result["train_examples"] == left
    for name in ("validation", "test"):
        assert result["metrics"][name]["examples"] == left and np.isfinite(result["metrics"][name]["loss"])
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2 * left and np.isfinite(losses).all()
    message = next(text for text in said if text.startswith("Left out") and "examples for train" in text)
    assert f"Left out {len(empty)} of {len(rows)} examples for train, with no " in message
    assert {int(number) for number in re.findall(r"train\.jsonl, line (\d+)", message)} == empty


def test_rows_that_are_all_empty_are_refused(tokenizer):
    tokenizer = load_tokenizer(str(tokenizer), masked=False)
    task = tasks.Classification(task_arguments("classification"), tokenizer, ["a"])
    rows = Dataset.from_list([{"text": " ", "label": "a", "place": "it, row 1"}])
    with pytest.raises(ValueError, match="example for train must not be empty, but all have no text"):
        task.features(rows, "train")


def test_class_names_and_their_order():
    feature = ClassLabel(names=["neg", "pos"])
    rows = Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, 0], "place": ["1", "2"]},
        Features({"text": Value("string"), "label": feature, "place": Value("string")}),
    )
    assert tasks.Classification.check(rows)["label"][:] == ["pos", "neg"]
    assert readers.label_names({"10", "9", "1"}) == ["1", "9", "10"]
    assert readers.label_names({"b", "a"}) == ["a", "b"]
    assert readers.label_names({"b", "a"}, {0: "b", 1: "a"}) == ["b", "a"]
    assert readers.label_names({"b", "a"}, {0: "LABEL_0", 1: "LABEL_1"}) == ["a", "b"]


def test_column_files(tmp_path):
    (tmp_path / "a.conll").write_text(
        "-DOCSTART- -X- O\n\nThe DT O\nLion NN B-PER\n\n\nhe\tB-PER\n\t\nran\tO", encoding="utf-8"
    )
    assert readers.read_column_file(tmp_path / "a.conll") == [
        {"tokens": ["The", "Lion"], "tags": ["O", "B-PER"]},
        {"tokens": ["he"], "tags": ["B-PER"]},
        {"tokens": ["ran"], "tags": ["O"]},
    ]
    (tmp_path / "b.conll").write_text("The O\nLion\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 must hold a word and its tag, got 'Lion'"):
        readers.read_column_file(tmp_path / "b.conll")


def test_tags_go_to_the_first_piece_of_each_word(tokenizer):
    tokenizer = load_tokenizer(str(tokenizer), masked=False)
    words, tags = ["Dorothy", "unquestionably", "loves", "Zürich", "."], ["B-PER", "O", "O", "B-LOC", "O"]
    labels = sorted(set(tags))
    task = tasks.Tagging(task_arguments("tagging"), tokenizer, labels)
    rows = Dataset.from_list([{"tokens": words, "tags": tags}])
    features, _ = task.features(rows, "test")
    row = features[0]
    first = [place for place, label in enumerate(row["labels"]) if label != -100]
    assert [labels[row["labels"][place]] for place in first] == tags
    assert [row["word"][place] for place in first] == list(range(5))
    ends = [*first[1:], len(row["input_ids"])]
    pieces = [tokenizer.decode(row["input_ids"][a:b]).strip() for a, b in zip(first, ends, strict=True)]
    assert pieces == words and len(row["input_ids"]) > 8

    # Perfect predictions give 1; words behind a cut have none and count as missed.
    guesses = np.where(np.array([row["labels"]]) < 0, 0, row["labels"])
    prediction = SimpleNamespace(predictions=guesses, label_ids=np.array([row["labels"]]))
    assert task.score(prediction, rows, features)["f1"] == 1
    task.args.max_length = first[3]
    features, _ = task.features(rows, "test")
    prediction.predictions = guesses[:, : first[3]]
    assert len(features[0]["input_ids"]) == first[3]
    assert task.score(prediction, rows, features)["recall"] == 0.5


def test_long_contexts_are_split_and_answers_found(tokenizer):
    """With windows that overlap, the answer's tokens are marked where it is whole, and decoding finds it again."""
    tokenizer = load_tokenizer(str(tokenizer), masked=False)
    context = TEXT[5000:6500]
    begin = context.index("Toto")
    found, none = {"text": ["Toto"], "answer_start": [begin]}, {"text": [], "answer_start": []}
    rows = [
        {"id": "1", "question": "Who is black?", "context": context, "answers": found},
        {"id": "2", "question": "Who?", "context": "Nobody.", "answers": none},
    ]
    rows = Dataset.from_list(rows)
    task = tasks.QuestionAnswering(task_arguments("qa", max_length=64, stride=16), tokenizer, [])
    features, _ = task.features(rows, "test")
    assert len(features) > 8 and all(len(row["input_ids"]) <= 64 for row in features)
    whole = [row for row in features if row["end_positions"] > 0]
    assert len(whole) in (1, 2)
    for row in whole:
        marked = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
        assert tokenizer.decode(marked).strip() == "Toto"
    width = max(len(row["input_ids"]) for row in features)
    logits = np.full((2, len(features), width), -5.0)
    for number, row in enumerate(features):
        for part, name in enumerate(("start_positions", "end_positions")):
            # Sure where the answer is, less sure that it is elsewhere in the other windows.
            logits[part, number, row[name]] = 9.0 if row["end_positions"] else 2.0
    score = task.score(SimpleNamespace(predictions=tuple(logits)), rows, features)
    assert score == {"exact_match": 100.0, "f1": 100.0}
    # An end before its start is no answer, nor is one that is too long.
    offsets = np.array([[-1, -1], [0, 1], [1, 2], [2, 3]])
    start, end = np.array([0.0, 1, 2, 9]), np.array([0.0, 9, 2, 1])
    assert task.answer("abc", [(start, end, offsets)], False) == "c"
    task.args.max_answer_length = 2
    assert task.answer("abc", [(np.array([0.0, 9, 0, 0]), np.array([0.0, 0, 5, 9]), offsets)], False) == "ab"
    task.args.max_length = 20
    with pytest.raises(ValueError, match="max_length = 20 must be longer than stride = 16"):
        task.features(rows, "test")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_arguments_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        arguments("classification", tmp_path, task="translation")
    assert "invalid choice: 'translation'" in capsys.readouterr().err
    for changes, message in [
        ({"task": "translation"}, "task must be one of classification, tagging, qa, got 'translation'"),
        ({"train_file": None}, "exactly one"),
        ({"train_file": None, "dataset_name": "a", "test_file": ["b"]}, "--test_split"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": 100, "stride": 100}, r"stride must lie in \[0, max_length = 100\), got 100"),
    ]:
        with pytest.raises(ValueError, match=message):
            TaskArguments(**{"task": "qa", "train_file": ["a"], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_do_concat_batches": "false"}, "eval_do_concat_batches must be True, got False"),
        ({"label_names": "foo"}, "label_names must be left out"),
        ({"metric_for_best_model": "exact_match"}, "must be one of loss, accuracy, macro_f1, got 'exact_match'"),
        ({"batch_tokens": 1000}, "batch_tokens must be left out, got 1000: it needs examples of one length"),
        ({"sequence_warmup_steps": 2}, "sequence_warmup_steps must be left out, got 2"),
        ({"tokenizer": "/no/where"}, "there is no folder /no/where"),
    ],
)
def test_options_that_would_end_a_run_in_its_middle_are_refused(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_splits", lambda *args: pytest.fail("the data were loaded first"))
    with pytest.raises((ValueError, OSError), match=message):
        run.run_finetuning(*arguments("classification", tmp_path, **changes))


@pytest.mark.parametrize(
    "task, files, changes, message",
    [
        ("classification", {"train": []}, {}, r"must hold at least one row"),
        ("classification", {"train": None}, {}, "does not exist"),
        ("classification", {}, {"label_column": "class"}, "must have a column 'class'; it has .*--label_column"),
        ("classification", {}, {"text_column": "review"}, "must have a column 'review'.*--text_column"),
        ("classification", {"validation": [{"text": "x", "label": "Toto"}]}, {}, r"validation set .*Toto \(1 times"),
        ("classification", {"train": [{"text": "x", "label": "a"}] * 3}, {}, "two labels or more, it has only 'a'"),
        ("classification", {"train": [{"text": 5, "label": "a"}]}, {}, "'text' must hold a string, got 5"),
        ("classification", {"train": [{"text": "x", "label": None}]}, {}, "line 1 must hold a label, got None"),
        ("classification", {"train": [{"text": "x", "label": 0.5}]}, {}, "line 1 must hold a class .*got 0.5"),
        ("tagging", {"train": [{"tokens": ["a", "b"], "tags": ["O"]}]}, {}, "as many tags as words.* 1 for 2"),
        ("tagging", {"validation": [{"tokens": ["a"], "tags": ["B-Q"]}]}, {}, "B-Q .1 times. does not"),
        ("tagging", {"train": [{"tokens": ["a"], "tags": [None]}]}, {}, "line 1 must hold a label, got None"),
        ("qa", {"train": [QUESTION]}, {}, "line 1: answer_start = 0 must be where 'x' begins"),
        ("qa", {"train": [{**QUESTION, "answers": {"text": ["c"]}}]}, {}, "answers must be two lists of equal length"),
        ("qa", {"train": [{**QUESTION, "answers": None}]}, {}, "answers must be two lists of equal length.*got None"),
        ("qa", {"train": [ANSWERED, ANSWERED]}, {}, "line 2 must have a unique id, '1' is also the id of .*, line 1"),
        ("classification", {"train": [{"text": "x", "label": "a"}, {"text": "x", "label": 1}]}, {},
         r"line 2, column 'label' must hold values of the same type"),
        ("classification", {"train": [{"text": "x", "label": "a"}, {"text": "\ud800", "label": "b"}]}, {},
         r"line 2, column 'text' must hold .*surrogates"),
        ("tagging", {"train": [{"tokens": ["a", 1], "tags": ["O", "O"]}]}, {}, r"line 1, column 'tokens' must hold"),
    ],
)  # fmt: skip
def test_bad_data_is_refused(task, files, changes, message, tmp_path):
    """Before a tokenizer is trained or a model built."""
    given = {}
    for name, rows in files.items():
        given[f"{name}_file"] = [str(tmp_path / f"{name}.jsonl")]
        if rows is not None:
            write(tmp_path / f"{name}.jsonl", rows)
    known = {"train_file": [str(DATA / FILES[task][0])], "validation_file": [str(DATA / FILES[task][1])]}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run.load_splits(TaskArguments(task=task, **{**known, **given, **changes}))


def test_bad_files_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"data": [{"paragraphs": [{"qas": []}, 3]}]}', encoding="utf-8")
    with pytest.raises(ValueError, match="must be in SQuAD's format"):
        readers.read_squad_file(tmp_path / "a.json")
    (tmp_path / "a.xml").write_text("<a/>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must end in one of .*\.jsonl.*got '.xml'"):
        readers.load_rows(task_arguments("classification"), [str(tmp_path / "a.xml")], "", {})
    (tmp_path / "a.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="of one type, got .jsonl, .xml"):
        readers.load_rows(task_arguments("qa"), [str(tmp_path / "a.xml"), str(tmp_path / "a.jsonl")], "", {})
    (tmp_path / "b.jsonl").write_text('{"text": "x"', encoding="utf-8")
    with pytest.raises(ValueError, match="b.jsonl must hold JSON"):
        readers.load_rows(task_arguments("classification"), [str(tmp_path / "b.jsonl")], "", {})
    (tmp_path / "b.csv").write_text("text,label\nx,1\ny, z,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"b.csv, line 3 must have 2 fields \(text, label\)\."):
        tasks.Classification.load(task_arguments("classification"), [str(tmp_path / "b.csv")], "", None)
    Dataset.from_dict({"text": ["x"], "class": [1]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(
        ValueError, match=r"b.parquet must have a column 'label'; it has text, class. .*--label_column"
    ):
        tasks.Classification.load(task_arguments("classification"), [str(tmp_path / "b.parquet")], "", None)


def test_bfloat16_checkpoints_are_tuned_in_float32(tokenizer, tmp_path):
    FlashForMaskedLM(tiny_config(vocab_size=600)).bfloat16().save_pretrained(tmp_path)
    given = run.ModelArguments(model=str(tmp_path)), load_tokenizer(str(tokenizer), masked=False)
    model = run.load_model(tasks.Classification, *given, ["a", "b"], None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_earlier_results_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileExistsError, match="must be empty"):
        run.run_finetuning(*arguments("classification", tmp_path))


# --- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_first_line_command_learns(tmp_path):
    command = first_line("scripts.finetune")
    command[command.index("--output_dir") + 1] = str(tmp_path / "run")
    done = run_python(*command)
    result = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert result["metrics"]["validation"]["accuracy"] > 0.4
    cards = json.loads((tmp_path / "run" / "card_results.json").read_text(encoding="utf-8"))
    assert {card["command"] for card in cards} == {shlex.join(["python", *command])}
    assert f"accuracy {result['metrics']['validation']['accuracy']:.4f}" in done.stdout


@pytest.fixture
def study(monkeypatch):
    """The study's script as a module, with cells that run in this process."""
    monkeypatch.setattr(module := finetune_study, "begun", [], raising=False)

    def one(self, cell, workers):
        if not self.path(cell).is_file():
            module.begun.append(cell)
            module.run_cell(self.options, cell)

    monkeypatch.setattr(module.Study, "one", one)
    return module


@pytest.mark.slow
def test_study_compares_resumes_and_chooses_by_validation(study, tmp_path, monkeypatch, capsys):
    name = "scripts.study.finetune"
    command = [name, *first_line(name)[2:], "--out", str(tmp_path / "out"), "--tasks", "names"]
    command[command.index("--work") + 1] = str(tmp_path / "work")
    monkeypatch.setattr(sys, "argv", command)
    assert study.main() == 0
    assert len({*study.begun}) == len(study.begun) >= 2 * (3 + 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    flash, other = summary["pretraining"]
    assert abs(flash["parameters"] / other["parameters"] - 1) < 0.01
    for row in summary["table"]:
        cells = [cell for cell in summary["cells"].values() if cell["model"] == row["model"]]
        types = {"flash": "flash_gau", "transformer_pp": "flash_hf_transformer_pp"}
        assert {cell["model_type"] for cell in cells} == {types[row["model"]]}
        by_rate = {cell["learning_rate"]: cell["metrics"]["validation"]["f1"] for cell in cells if cell["seed"] == 0}
        assert by_rate[row["learning_rate"]] == max(by_rate.values())
        # One on either side, or the end of all rates.
        assert row["learning_rate"] in (*sorted(by_rate)[1:-1], study.RATES[0], study.RATES[-1])
        tests = [cell["metrics"]["test"]["f1"] for cell in cells if cell["learning_rate"] == row["learning_rate"]]
        assert row["test"] == pytest.approx(np.mean(tests)) and row["seeds"] == len(tests) == 2
    check_results(json.loads((tmp_path / "out" / "card_results.json").read_text(encoding="utf-8")))

    lost = tmp_path / "work" / "cells" / f"{study.begun[-1]}.json"
    before = json.loads(lost.read_text(encoding="utf-8"))
    lost.unlink()
    study.begun.clear()
    assert study.main() == 0
    assert study.begun == [lost.stem]
    assert json.loads(lost.read_text(encoding="utf-8"))["metrics"] == before["metrics"]

    # Another machine, with the summary alone.
    command[command.index("--work") + 1] = str(tmp_path / "elsewhere")
    study.begun.clear()
    assert study.main() == 0
    assert not study.begun

    # The README's table.
    monkeypatch.setattr(sys, "argv", ["finetune_study.py", "--render", str(tmp_path / "out" / "summary.json")])
    capsys.readouterr()
    assert study.main() == 0
    table = capsys.readouterr().out
    assert "| FLASH | Transformer++ |" in table and "over 2 seeds" in table and "partial" not in table
    for row in summary["table"]:
        assert f"**{100 * row['test']:.2f} +- {100 * row['test_std']:.2f}**" in table


@pytest.fixture
def runs(study, tmp_path):
    """A study of one set whose validation score is given by learning rate."""
    options = study.make_parser().parse_args(["--work", str(tmp_path), "--tasks", "names", "--seeds", "2"])
    runs = study.Study(options, 0.0)

    def finish(cell, score):
        rate, _, seed = cell.split("-", 3)[3].rpartition("-")
        metrics = {"validation": {"f1": score(float(rate))}, "test": {"f1": 0.5, "examples": 9}}
        result = {"main_metric": "f1", "metrics": metrics, "learning_rate": float(rate), "seed": int(seed)}
        study.write_json(runs.path(cell), result)

    runs.finish = finish
    return runs


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [
        (3e-4, [1e-4, 3e-4, 1e-3], 3e-4),
        (3e-5, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], 3e-5),
        (1.5e-3, [1e-4, 3e-4, 1e-3, 3e-3], 1e-3),
        (1.0, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], 1e-2),
    ],
)
def test_the_grid_grows_until_the_best_rate_is_inside(runs, best, tried, chosen):
    rounds = 0
    while wanted := runs.wanted():
        rounds += 1
        for cell in wanted:
            runs.finish(cell, lambda rate: -abs(np.log(rate / best)))
    for name in ("flash", "transformer_pp"):
        assert runs.grid(name, "names") == (tried, chosen)
        assert runs.path(f"tune-{name}-names-{chosen:g}-1").is_file()
    assert rounds == 1 + len(tried) - 3 + 1


def test_the_next_cells_wait_for_those_that_they_depend_on(runs):
    """Two workers: the last rate of a grid is not followed by the end, but by what it leads to."""
    done, source = [], runs.upcoming()
    first = [next(source) for _ in range(6)]

    def later():
        time.sleep(0.3)
        for cell in first:
            runs.finish(cell, lambda rate: -abs(np.log(rate / 3e-4)))

    worker = threading.Thread(target=later)
    worker.start()
    for cell in source:
        done.append(cell)
        runs.finish(cell, lambda rate: -abs(np.log(rate / 3e-4)))
    worker.join()
    assert sorted(done) == [f"tune-{name}-names-0.0003-1" for name in ("flash", "transformer_pp")]


def test_a_failed_rate_leaves_its_model_without_a_choice(runs):
    runs.failed["tune-flash-names-0.001-0"] = "ValueError: x"
    while wanted := runs.wanted():
        for cell in wanted:
            runs.finish(cell, lambda rate: rate if rate < 1e-3 else 0.0)
    assert runs.grid("flash", "names")[1] is None and runs.grid("transformer_pp", "names")[1] == 3e-4


def test_study_reads_what_checkpoints_were_trained_on(study, tmp_path):
    """The published checkpoint: sizes, tokens of both its runs, and its scores."""
    card = ROOT / "model_cards" / "flash-30m-masked"
    found = study.pretraining(SimpleNamespace(flash=str(card), transformer=None, work=tmp_path), "flash")
    assert 30e6 < found["parameters"] < 31e6 and found["tokens"] == 2083 * 131_072
    assert found["learning_rate"] == 0.002 and found["metrics"]["validation"]["perplexity"] == 7.2269


def test_study_splits_the_answers_by_article(study, tmp_path):
    data = tmp_path / "data"
    for name, text in (
        ("sentence_cls/stsa.binary.test", "1 a fine film\n0 not so\n"),
        ("glue/MRPC/msr_paraphrase_test.txt", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\ta\tb\n"),
        ("xquad/xquad.en.json", json.dumps({"version": "1", "data": [{"title": str(i)} for i in range(48)]})),
    ):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(text, encoding="utf-8")
    options = study.make_parser().parse_args(["--work", str(tmp_path / "work"), "--data", str(data)])
    study.prepare(options)
    made = tmp_path / "work" / "data"
    parts = [
        json.loads((made / f"xquad_{part}.json").read_text(encoding="utf-8"))
        for part in ("train", "validation", "test")
    ]
    titles = [[article["title"] for article in part["data"]] for part in parts]
    assert [*map(len, titles)] == [32, 8, 8] and len({*sum(titles, [])}) == 48
    assert (made / "sst2_test.tsv").read_text(encoding="utf-8") == "sentence\tlabel\na fine film\t1\nnot so\t0\n"
    chosen = study.task_options(options)
    assert (made / "mrpc_test.tsv").is_file() and chosen["mrpc"]["test_file"] == [str(made / "mrpc_test.tsv")]
    for task in chosen.values():
        for key in ("epochs", "batch", "accumulate"):
            task.pop(key)
        TaskArguments(**task)


def test_study_that_was_cut_off_says_what_it_lacks(study):
    """Rates and seeds that are gone are named, and a model without all rates has no choice."""
    summary = json.loads((ROOT / "scripts" / "results" / "finetune_study.json").read_text(encoding="utf-8"))
    gone = {"tune-flash-sst2-0.001-0": "cut off: 7.2 minutes are over", "tune-flash-sst2-0.0003-0": "x\nValueError: y"}
    dropped = ("tune-flash-sst2-0.001", "tune-flash-sst2-0.0003", "tune-flash-xquad-0.001",
               "tune-flash-wnut17-0.0003-1", "tune-flash-wnut17-0.0003-2", "tune-transformer_pp-wnut17")  # fmt: skip
    summary["cells"] = {
        name: cell
        for name, cell in summary["cells"].items()
        if not name.startswith(dropped) and "movie_reviews" not in name
    }
    done = len(summary["cells"])
    summary["failed"] = {**gone, "tune-flash-wnut17-0.0003-1": "not begun: 7.2 minutes are over"}
    chosen = {("sst2", "transformer_pp"), ("wnut17", "flash")}
    summary["table"] = [row for row in summary["table"] if (row["data"], row["model"]) in chosen]
    summary["table"][0]["learning_rate"] = 1e-4
    text = study.as_readme(summary)
    flat = " ".join(text.split())
    assert "| | 0.001 | cut off | 79.52 |" in text and "| | 0.0003 | failed | 85.43 +- 0.54 |" in text
    assert "86.84" not in text and "movie reviews" not in text
    assert (
        f"{done} cells are done, 3 are not (cut off: 7.2 minutes are over; ValueError: y; "
        "not begun: 7.2 minutes are over): FLASH SST-2 0.001, 0.0003; FLASH WNUT-17 0.0003 (seed 2)." in flat
    )
    assert "Transformer++ SST-2 0.0001 (lowest)" in flat and "(highest)" not in flat
    assert "| | 0.0003 | **31.25** | - |" in text
    assert "| | 0.001 | - | 12.76 |" in text  # SQuAD's metric is in percent


def test_study_runs_again_alone_what_had_too_little_memory(study, tmp_path, monkeypatch):
    runs = study.Study(study.make_parser().parse_args(["--work", str(tmp_path), "--smoke"]), 0.0)
    tries = []

    def one(self, cell, workers):
        tries.append((cell, workers))
        if cell != "fine" and workers > 1:
            self.failed[cell] = {"large": "torch.OutOfMemoryError: CUDA out of memory.", "wrong": "ValueError"}[cell]

    monkeypatch.setattr(study.Study, "one", one)
    runs.run(["fine", "large", "wrong"], 2)
    assert sorted(tries[:3]) == [("fine", 2), ("large", 2), ("wrong", 2)]
    assert tries[3:] == [("large", 1)] and [*runs.failed] == ["wrong"]
