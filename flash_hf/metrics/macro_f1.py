# SPDX-License-Identifier: Apache-2.0
"""F1 of each class, averaged with equal weight (as scikit-learn's f1_score with average="macro")."""

from collections import Counter

import datasets
import evaluate


class MacroF1(evaluate.Metric):
    """`{"macro_f1": mean of 2 tp / (2 tp + fp + fn)}` over the classes that occur as prediction or reference."""

    def _info(self):
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: lists of classes (int).",
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions, references):
        guessed, true = Counter(predictions), Counter(references)
        right = Counter(guess for guess, truth in zip(predictions, references, strict=True) if guess == truth)
        classes = guessed.keys() | true.keys()
        # 2 tp + fp + fn is how often the class was guessed plus how often it was true.
        return {"macro_f1": sum(2 * right[c] / (guessed[c] + true[c]) for c in classes) / len(classes)}
