# SPDX-License-Identifier: Apache-2.0
"""Exact match and F1 of words of extractive answers, as SQuAD's official script counts them (2.0 included)."""

import re
import string
from collections import Counter

import datasets
import evaluate


def words(text: str) -> list[str]:
    """What counts of an answer: lower case, without punctuation and articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def overlap(guess: list[str], truth: list[str]) -> float:
    """F1 of the bags of words; two empty answers agree."""
    if not guess or not truth:
        return float(guess == truth)
    return 2 * (Counter(guess) & Counter(truth)).total() / (len(guess) + len(truth))


class Squad(evaluate.Metric):
    """`exact_match` and `f1` in percent; of several right answers the nearest counts, and without one, silence."""

    def _info(self):
        answers = {"text": datasets.Value("string"), "answer_start": datasets.Value("int32")}
        return evaluate.MetricInfo(
            description=__doc__,
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
