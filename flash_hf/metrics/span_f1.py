# SPDX-License-Identifier: Apache-2.0
"""Precision, recall and F1 of whole spans in B-, I- tags, as CoNLL's conlleval and the package seqeval count them."""

import datasets
import evaluate


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first word, one past the last word) of every span; an I- without a B- before it begins one, too."""
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
    """`precision`, `recall` and `f1` over all spans of all types (a span is right if borders and type are), and
    `accuracy` of the tags."""

    def _info(self):
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=__doc__,
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
