# SPDX-License-Identifier: Apache-2.0
"""The tasks: classification, tagging and extractive question answering, with their features and scores."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
from datasets import Dataset
from datasets import Sequence as DatasetSequence
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from flash_hf.loss_flash import IGNORE

from .arguments import TaskArguments
from .metrics import Accuracy, MacroF1, SpanF1, Squad
from .readers import as_names, load_rows, strings


logger = logging.get_logger(__name__)


class Task:
    """A task: its columns, features and scores.

    Args:
        labels: Class names in the order of the model; empty for question answering.
    """

    name: str
    auto: type
    main_metric: str
    nothing: str  # description of an empty row
    metrics: tuple[str, ...]

    def __init__(self, args: TaskArguments, tokenizer: PreTrainedTokenizerBase, labels: list[str]):
        self.args, self.own_tokenizer, self.labels = args, tokenizer, labels
        # Labels refer to columns, hence padding on the right. The tokenizer that is saved keeps its own side.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.padding_side = "right"

    @classmethod
    def columns(cls, args: TaskArguments) -> dict[str, str]:
        """The required columns: the name of the task and the name in the data."""
        raise NotImplementedError

    @classmethod
    def load(cls, args: TaskArguments, files: list[str] | None, split: str, limit: int | None) -> Dataset:
        """Rows under the task's column names, checked.

        Raises:
            ValueError: no rows, a missing column, or one of a wrong type.
        """
        theirs = cls.columns(args)
        advice = {
            name: f"Name it with --{own}_column." if hasattr(args, f"{own}_column") else ""
            for own, name in theirs.items()
        }
        rows, places = load_rows(args, files, split, advice)
        source = f"{args.dataset_name}, split {split}" if files is None else ", ".join(files)
        if not len(rows):
            raise ValueError(f"{source} must hold at least one row, it holds none.")
        rows = rows.rename_columns({name: own for own, name in theirs.items() if own != name})
        rows = rows.add_column("place", places)
        rows = rows.take(min(limit or len(rows), len(rows)))
        return cls.check(rows)

    @classmethod
    def check(cls, rows: Dataset) -> Dataset:
        """Rows with labels as names. The column `place` locates each row in messages.

        Raises:
            ValueError: a value of a wrong type.
        """
        raise NotImplementedError

    @classmethod
    def label_set(cls, rows: Dataset) -> Counter:
        """The number of occurrences of each label."""
        return Counter()

    @classmethod
    def texts(cls, rows: Dataset) -> list[dict]:
        """Text to train a tokenizer on."""
        raise NotImplementedError

    def encode(self, batch: dict, indices: list[int]) -> dict:
        """Features of a batch of rows; columns that the model does not accept are for `score`.

        For each feature, `row` is the index of its row, `cut` whether that is too long, and `empty` whether there is
        nothing to predict or to predict from.
        """
        raise NotImplementedError

    def collator(self):
        return DataCollatorWithPadding(self.tokenizer)

    @staticmethod
    def reduce(logits: Tensor | tuple[Tensor, ...], labels) -> Tensor | tuple[Tensor, ...]:
        """The part of the logits that `score` needs."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def score(self, prediction: EvalPrediction, rows: Dataset, features: Dataset) -> dict[str, float]:
        raise NotImplementedError

    def features(self, rows: Dataset, what: str) -> tuple[Dataset, Dataset]:
        """Tokenized rows and the rows themselves, both without empty ones; logs the numbers of empty and long rows.

        Raises:
            ValueError: every row is empty.
        """
        options = {"remove_columns": rows.column_names, "desc": f"Tokenize {what}"}
        out = rows.map(self.encode, with_indices=True, batched=True, batch_size=64, **options)
        cut, empty = sum(out["cut"]), np.array(out["empty"], bool)
        if cut:
            logger.warning(
                f"{cut} of {len(rows)} examples for {what} are longer than max_length = {self.args.max_length} tokens "
                f"and were {'split' if self.name == 'qa' else 'cut'}."
            )
        if empty.any():
            left_out = np.unique(np.array(out["row"])[empty])
            places = [rows[int(row)]["place"] for row in left_out[:5]]
            logger.warning(
                f"Left out {len(left_out)} of {len(rows)} examples for {what}, with {self.nothing}: "
                f"{'; '.join(places)}{' ...' if len(left_out) > 5 else ''}."
            )
            rows = rows.select(np.setdiff1d(np.arange(len(rows)), left_out))
            out = out.select(np.flatnonzero(~empty))
        if not len(rows):
            raise ValueError(f"At least one example for {what} must not be empty, but all have {self.nothing}.")
        return out.remove_columns(["cut", "empty", "row"]), rows

    def was_cut(self, encoded, count: int) -> list[bool]:
        return [bool(encoded.encodings[row].overflowing) for row in range(count)]


class Classification(Task):
    """One class for a text or a pair of texts."""

    name, auto, main_metric = "classification", AutoModelForSequenceClassification, "accuracy"
    nothing = "no text"
    metrics = ("loss", "accuracy", "macro_f1")

    @classmethod
    def columns(cls, args):
        pair = {"text_pair": args.text_pair_column} if args.text_pair_column else {}
        return {"text": args.text_column, **pair, "label": args.label_column}

    @classmethod
    def check(cls, rows):
        for column in set(rows.column_names) - {"label", "place"}:
            strings(rows, column)
        names = as_names(rows["label"], rows.features["label"], rows["place"])
        return rows.remove_columns("label").add_column("label", names)

    @classmethod
    def label_set(cls, rows):
        return Counter(rows["label"])

    @classmethod
    def texts(cls, rows):
        return [{"text": text} for text in rows["text"]]

    def encode(self, batch, indices):
        texts, pairs = batch["text"], batch.get("text_pair")
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.args.max_length)
        labels = [self.labels.index(name) for name in batch["label"]]
        # Special tokens alone carry no information about the class.
        empty = [
            not ids or not (text.strip() or pair.strip())
            for ids, text, pair in zip(encoded["input_ids"], texts, pairs or texts, strict=True)
        ]
        cut = self.was_cut(encoded, len(labels))
        return {**encoded, "labels": labels, "cut": cut, "empty": empty, "row": indices}

    def score(self, prediction, rows, features):
        both = {"predictions": prediction.predictions, "references": prediction.label_ids}
        return {**Accuracy(keep_in_memory=True).compute(**both), **MacroF1(keep_in_memory=True).compute(**both)}


class Tagging(Task):
    """A tag for every word."""

    name, auto, main_metric = "tagging", AutoModelForTokenClassification, "f1"
    nothing = "no words"
    metrics = ("loss", "f1", "precision", "recall", "accuracy")

    @classmethod
    def columns(cls, args):
        return {"tokens": args.tokens_column, "tags": args.tags_column}

    @classmethod
    def check(cls, rows):
        feature = rows.features["tags"]
        feature = feature.feature if isinstance(feature, DatasetSequence) else None
        tags = []
        for row in rows:
            if not isinstance(row["tokens"], list) or not isinstance(row["tags"], list):
                raise ValueError(f"{row['place']}: tokens and tags must be lists, got {row['tokens']!r}.")
            if len(row["tokens"]) != len(row["tags"]) or not all(isinstance(word, str) for word in row["tokens"]):
                raise ValueError(
                    f"{row['place']} must have as many tags as words, all strings; it has {len(row['tags'])} for "
                    f"{len(row['tokens'])}."
                )
            tags.append(as_names(row["tags"], feature, [row["place"]] * len(row["tags"])))
        return rows.remove_columns("tags").add_column("tags", tags)

    @classmethod
    def label_set(cls, rows):
        return Counter(tag for tags in rows["tags"] for tag in tags)

    @classmethod
    def texts(cls, rows):
        return [{"text": " ".join(words)} for words in rows["tokens"]]

    def encode(self, batch, indices):
        # As running text and not word by word: byte-level tokenizers join a word with the space before it.
        texts = [" ".join(words) for words in batch["tokens"]]
        encoded = self.tokenizer(texts, truncation=True, max_length=self.args.max_length, return_offsets_mapping=True)
        labels, owners = [], []
        for words, tags, offsets in zip(batch["tokens"], batch["tags"], encoded.pop("offset_mapping"), strict=True):
            # The word of each character, -1 for spaces.
            word_at = [owner for number, word in enumerate(words) for owner in [number] * len(word) + [-1]]
            row, owner, last = [], [], -1
            for begin, end in offsets:
                word = word_at[end - 1] if end > begin else -1
                owner.append(word if word > last else -1)  # later tokens of a word have no label
                row.append(self.labels.index(tags[word]) if word > last else IGNORE)
                last = max(last, word)
            labels.append(row)
            owners.append(owner)
        empty = [all(label == IGNORE for label in row) for row in labels]
        cut = self.was_cut(encoded, len(labels))
        return {**encoded, "labels": labels, "word": owners, "cut": cut, "empty": empty, "row": indices}

    def collator(self):
        return DataCollatorForTokenClassification(self.tokenizer)

    def score(self, prediction, rows, features):
        guesses = []
        # Words after the cut, or without a token, have no prediction and count as "O".
        outside = "O" if "O" in self.labels else self.labels[0]
        for row, tags, words in zip(prediction.predictions, rows["tags"], features["word"], strict=True):
            guess = [outside] * len(tags)
            for place, word in enumerate(words):
                if word >= 0:
                    guess[word] = self.labels[row[place]]
            guesses.append(guess)
        if all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-") for name in self.labels):
            return SpanF1(keep_in_memory=True).compute(predictions=guesses, references=rows["tags"])
        flat = {
            "predictions": [self.labels.index(tag) for tags in guesses for tag in tags],
            "references": [self.labels.index(tag) for tags in rows["tags"] for tag in tags],
        }
        f1 = MacroF1(keep_in_memory=True).compute(**flat)["macro_f1"]
        return {**Accuracy(keep_in_memory=True).compute(**flat), "f1": f1}


class QuestionAnswering(Task):
    """The span of a text that answers a question, or none, as in SQuAD 2.0."""

    name, auto, main_metric = "qa", AutoModelForQuestionAnswering, "f1"
    nothing = "no question or no context"
    metrics = ("loss", "f1", "exact_match")
    best = 20  # number of starts and ends to combine

    @classmethod
    def columns(cls, args):
        return {name: name for name in ("id", "question", "context", "answers")}

    @classmethod
    def check(cls, rows):
        for column in ("question", "context"):
            strings(rows, column)
        seen = {}
        for row in rows:
            earlier = seen.setdefault(row["id"], row["place"])
            if earlier != row["place"]:
                raise ValueError(f"{row['place']} must have a unique id, {row['id']!r} is also the id of {earlier}.")
            answers = row["answers"] if isinstance(row["answers"], dict) else {}
            texts, starts = answers.get("text"), answers.get("answer_start")
            if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
                raise ValueError(
                    f"{row['place']}: answers must be two lists of equal length, text and answer_start (empty if "
                    f"there is no answer), got {row['answers']!r}."
                )
            for text, start in zip(texts, starts, strict=True):
                if row["context"][start : start + len(text)] != text:
                    raise ValueError(
                        f"{row['place']}: answer_start = {start} must be where {text!r} begins in the context, which "
                        f"has {row['context'][start : start + len(text)]!r} there."
                    )
        return rows

    @classmethod
    def texts(cls, rows):
        return [{"text": text} for text in {*rows["context"], *rows["question"]}]

    def encode(self, batch, indices):
        room = self.args.max_length - self.args.stride - self.tokenizer.num_special_tokens_to_add(pair=True)
        for question, ids in zip(
            batch["question"], self.tokenizer(batch["question"], add_special_tokens=False)["input_ids"], strict=True
        ):
            if len(ids) >= room:
                raise ValueError(
                    f"max_length = {self.args.max_length} must be longer than stride = {self.args.stride} and the "
                    f"question of {len(ids)} tokens together: {question[:60]!r}."
                )
        encoded = self.tokenizer(
            batch["question"], batch["context"], truncation="only_second", max_length=self.args.max_length,
            stride=self.args.stride, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        owner = encoded.pop("overflow_to_sample_mapping")
        starts, ends, offset_rows, empty = [], [], [], []
        for feature, row in enumerate(owner):
            offsets = np.array(encoded["offset_mapping"][feature], int).reshape(-1, 2)
            of_context = np.array([part == 1 for part in encoded.sequence_ids(feature)], bool)
            empty.append(not (batch["question"][row].strip() and batch["context"][row].strip() and of_context.any()))
            offsets[~of_context] = -1
            offset_rows.append(offsets.tolist())
            place = (0, 0)  # the first token means "no answer here"
            for text, begin in [*zip(*(batch["answers"][row][n] for n in ("text", "answer_start")), strict=True)][:1]:
                end = begin + len(text)
                touched = np.flatnonzero(of_context & (offsets[:, 1] > begin) & (offsets[:, 0] < end))
                if len(touched) and offsets[touched[0], 0] <= begin and offsets[touched[-1], 1] >= end:
                    place = int(touched[0]), int(touched[-1])
            starts.append(place[0])
            ends.append(place[1])
        pieces = Counter(owner)
        seen = set()
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "start_positions": starts,
            "end_positions": ends,
            "offsets": offset_rows,
            "example_id": [batch["id"][row] for row in owner],
            "cut": [pieces[row] > 1 and not (row in seen or seen.add(row)) for row in owner],
            "empty": empty,
            "row": [indices[row] for row in owner],
        }

    @staticmethod
    def reduce(logits, labels):
        return logits[:2]

    def answer(self, context: str, windows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], allow_none: bool) -> str:
        """The best span over the windows of a context, each (start logits, end logits, offsets)."""
        found, best, none = "", -np.inf, -np.inf
        for start, end, offsets in windows:
            none = max(none, start[0] + end[0])
            places = np.flatnonzero(offsets[:, 0] >= 0)
            firsts = places[np.argsort(-start[places], kind="stable")[: self.best]]
            lasts = places[np.argsort(-end[places], kind="stable")[: self.best]]
            length = lasts[None] - firsts[:, None] + 1
            score = start[firsts][:, None] + end[lasts][None]
            score = np.where((length >= 1) & (length <= self.args.max_answer_length), score, -np.inf)
            if score.size and score.max() > best:
                first, last = np.unravel_index(score.argmax(), score.shape)
                best = score.max()
                found = context[offsets[firsts[first], 0] : offsets[lasts[last], 1]].strip()
        return "" if allow_none and none > best else found

    def score(self, prediction, rows, features):
        windows: dict[str, list] = {}
        for number, feature in enumerate(features):
            offsets = np.array(feature["offsets"])
            logits = [part[number, : len(offsets)].astype(np.float64) for part in prediction.predictions]
            windows.setdefault(feature["example_id"], []).append((*logits, offsets))
        allow_none = any(not answers["text"] for answers in rows["answers"])
        return Squad(keep_in_memory=True).compute(
            predictions=[
                {"id": row["id"], "prediction_text": self.answer(row["context"], windows[row["id"]], allow_none)}
                for row in rows
            ],
            references=[{"id": row["id"], "answers": row["answers"]} for row in rows],
        )


TASKS: dict[str, type[Task]] = {cls.name: cls for cls in (Classification, Tagging, QuestionAnswering)}


__all__ = ["TASKS", "Classification", "QuestionAnswering", "Tagging", "Task"]
