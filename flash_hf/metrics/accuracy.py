# SPDX-License-Identifier: Apache-2.0
"""Share of classes that are right."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """`{"accuracy": right / all}`."""

    def _info(self):
        classes = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: lists of classes (int).",
            features=datasets.Features({"predictions": classes, "references": classes}),
        )

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        return {"accuracy": sum(guess == truth for guess, truth in pairs) / len(pairs)}
