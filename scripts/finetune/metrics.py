# SPDX-License-Identifier: Apache-2.0
"""Metrics of fine-tuning for the `evaluate` library; `evaluate.load("accuracy")` would need the network."""

import re
import string
from collections import Counter

import datasets
import evaluate


class ClassMetric(evaluate.Metric):
    """A metric of one class per example."""

    def _info(self):
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions, references: lists of classes (int).",
            features=datasets.Features({"predictions": classes, "references": classes}),
        )


class Accuracy(ClassMetric):
    """Share of correct classes.

    `{"accuracy": right / all}`.
    """

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        return {"accuracy": sum(guess == truth for guess, truth in pairs) / len(pairs)}


class MacroF1(ClassMetric):
    """F1 of each class, averaged with equal weights (like scikit-learn's f1_score with average="macro").

    `{"macro_f1": mean of 2 tp / (2 tp + fp + fn)}` over the classes that occur as prediction or reference.
    """

    def _compute(self, predictions, references):
        guessed, true = Counter(predictions), Counter(references)
        right = Counter(guess for guess, truth in zip(predictions, references, strict=True) if guess == truth)
        classes = guessed.keys() | true.keys()
        # 2 tp + fp + fn is the number of predictions of the class plus that of its references.
        return {"macro_f1": sum(2 * right[c] / (guessed[c] + true[c]) for c in classes) / len(classes)}


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first word, one past the last word) of every span; an I- without a B- before it also starts a span."""
    found, begin, kind, last = set(), None, "", "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        begins = prefix in ("B", "S") or prefix != "O" and (begin is None or name != kind or last in ("E", "S"))
        if begin is not None and (prefix == "O" or begins):
            found.add((kind, begin, place))
            begin = None
        if begins:
            begin, kind = place, name
        last = prefix
    return found


class SpanF1(evaluate.Metric):
    """Precision, recall and F1 of whole spans in B-, I- tags, counted like conlleval and the package seqeval.

    `precision`, `recall` and `f1` over all spans of all types (a span is right if borders and type are), and
    `accuracy` of the tags.
    """

    def _info(self):
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions, references: for each sentence its list of tags: O, B-x, I-x (E-x, S-x).",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references):
        right = guessed = true = right_tags = n_tags = 0
        for guess, truth in zip(predictions, references, strict=True):
            if len(guess) != len(truth):
                raise ValueError(f"A sentence has {len(truth)} tags in references, but {len(guess)} in predictions.")
            guess_spans, true_spans = spans(guess), spans(truth)
            right += len(guess_spans & true_spans)
            guessed += len(guess_spans)
            true += len(true_spans)
            right_tags += sum(a == b for a, b in zip(guess, truth, strict=True))
            n_tags += len(truth)
        return {
            "precision": right / guessed if guessed else 0.0,
            "recall": right / true if true else 0.0,
            "f1": 2 * right / (guessed + true) if guessed + true else 0.0,
            "accuracy": right_tags / n_tags if n_tags else 0.0,
        }


def words(text: str) -> list[str]:
    """The words of an answer that count: in lower case, without punctuation and articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def overlap(guess: list[str], truth: list[str]) -> float:
    """F1 of the bags of words; two empty answers agree."""
    if not guess or not truth:
        return float(guess == truth)
    return 2 * (Counter(guess) & Counter(truth)).total() / (len(guess) + len(truth))


class Squad(evaluate.Metric):
    """Exact match and word F1 of extractive answers, counted like SQuAD's official script (also for version 2.0).

    `exact_match` and `f1` in percent, each against the closest reference; without a reference, no answer is correct.
    """

    def _info(self):
        answers = {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: {id, prediction_text}. references: {id, answers: {text, answer_start}}.",
            features=datasets.Features(
                {
                    "predictions": {"id": datasets.Value("string"), "prediction_text": datasets.Value("string")},
                    "references": {"id": datasets.Value("string"), "answers": datasets.Sequence(answers)},
                }
            ),
        )

    def _compute(self, predictions, references):
        guesses = {row["id"]: words(row["prediction_text"]) for row in predictions}
        exact = f1 = 0.0
        for row in references:
            guess, truths = guesses[row["id"]], [words(text) for text in row["answers"]["text"]] or [[]]
            exact += max(float(guess == truth) for truth in truths)
            f1 += max(overlap(guess, truth) for truth in truths)
        return {"exact_match": 100 * exact / len(references), "f1": 100 * f1 / len(references)}


__all__ = ["Accuracy", "MacroF1", "SpanF1", "Squad"]
