# SPDX-License-Identifier: Apache-2.0
"""The cells of the study, the most important first, so that a run that is cut off leaves the most useful part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from .models import MODELS


HEADLINE = FLASH, RIVAL = ("flash", "transformer++")
# The forms that the study found better, in one model.
BETTER = "flash-shifted"
# The linear-time model that a user would weigh FLASH against.
MODERN = "gated-deltanet"
# And with a better start of training: no sinusoid, an attention that begins at recent tokens.
STARTED = "flash-shifted-bare-ones-recent"
# The same without a global branch: is it that which pays?
STARTED_LOCAL = "flash-stagger-local-bare-ones-recent"
TOKENS = 30  # millions
# Shorter trainings, each with a schedule that ends there.
BUDGETS = (3.75, 7.5, 15)
# A model's rates begin with these, and go on by factors of two until the best one lies between two worse ones.
RATES = (2e-3, 1e-3)
# How many times faster FLASH is to reach Transformer++'s final loss: the paper's figures, which the project aims at.
# These cells have two seeds.
GOALS = {("books-causal", 8192): 12, ("wiki-causal", 8192): 4.9, ("books-masked", 8192): 4.8}
# Where rates are searched; between the contexts of one task, a model gets its best rates at 512 and at 8,192.
TUNED = (*GOALS, ("books-masked", 512), ("books-causal", 512))
BETWEEN = (2048, 4096, 1024)
CONTEXTS = (512, 1024, 2048, 4096, 8192)
# Tables 1 and 2 and figure 3 of the paper.
SHORT = {"task": "wiki-masked", "context": 512, "tokens": 15}
ABLATIONS = ("flash-quad", "gau-softmax", "gau-heads", "gau-ungated", "transformer++", "mhsa-relu2",
             "mhsa-single-head", "mhsa-gated", "flash")  # fmt: skip
SCALED = ("flash-quad", "transformer++", "flash")
OTHERS = ("mc-transformer++", "performer-relu", "combiner", "transformer")
RECALL_TOKENS = 60
# Forms of the global branch are searched in a smaller model, and confirmed in the study's.
SEARCH = {"size": "s", "tokens": 15}
SEARCH_CONTEXT = 4096
# Does the global branch pay with more training?
LONG = {"size": "s", "tokens": 60}
# Does the lead last? One pass over all training text, at the best rates of the short trainings; rates are searched
# with a tenth of it.
ONE_PASS = 235
PASSED = {2048: {RIVAL: 1e-3, STARTED: 2e-3, STARTED_LOCAL: 2e-3, "flash-quad": 1e-3, "gau-softmax": 1e-3,
                 FLASH: 2e-3},
          8192: {RIVAL: 1e-3, STARTED: 2e-3, FLASH: 2e-3}}  # fmt: skip
SEVERAL_PASSES = 600
# Forms that may draw more from the context are compared after a quarter of a pass, at FLASH+'s rate, beside FLASH+ and
# Transformer++.
SEARCHED = 60
SEARCHED_FORMS = (
    "window-keys-delta", "keys", "delta", "window", "gated", "window-keys", "keys-delta", "keys-gated",
    "window-keys-gated", "heads", "hybrid", "softmax", "window-keys-heads-delta", "512", "gated-features",
)  # fmt: skip
# The best of them after a whole pass.
LASTING_FORMS = ("window-keys-delta", "keys", "window-keys", "keys-delta")
# What the draw of the weights does to a loss is learnt from these.
SEEDED = ("flash", "flash-previous", "flash-local", "flash-stagger-local", BETTER, "flash-shifted-conv",
          "flash-shifted-tokens", "flash-shifted-heads", "flash-shifted-heads-tokens")  # fmt: skip
# Of these, what is worth the study's size.
CONFIRMED = ("flash-shifted-conv", "flash-shifted-tokens", "flash-shifted-heads")
STARTS = ("flash-bare", "flash-bare-ones-recent", "flash-shifted-bare", "flash-shifted-bare-rms-ones-recent",
          "flash-shifted-bare-std-ones-recent")  # fmt: skip
# mqarP: P pairs; needle: one.
RECALL_TASKS = ("mqar32", "needle")
RECALL_MODELS = ("flash", "transformer++", "flash-keyshift-norope", BETTER, STARTED, "flash-local", "flash-norope")
# What may be worth a GPU's time, on a CPU.
HINT = {"size": "xs", "tokens": 2}
HINT_CONTEXT = 512
HINTS = ("flash", BETTER, STARTED, "flash-conv")
FORMS = tuple(name for name in MODELS if name.startswith("flash-") and name not in ("flash-quad", "flash-global"))


@dataclass(frozen=True, order=True)
class Cell:
    """One measurement.

    Attributes:
        kind: `"train"`, or `"time"` for the time of a training step, alone on the device.
        model: key of [`models.MODELS`].
        size: key of [`models.SIZES`].
        task: corpus and direction, `mqarP` or `needle`.
        context: tokens of a row.
        tokens: millions of tokens to train on (0 for `"time"`).
        rate: peak learning rate.
        seed: of weights and order.
    """

    kind: str
    model: str
    size: str
    task: str
    context: int
    tokens: int | float = 0
    rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        values = astuple(self)
        return "_".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)

    @classmethod
    def parse(cls, name: str) -> Cell:
        """The cell that has this name.

        Raises:
            ValueError: none has.
        """
        parts = name.split("_")
        if len(parts) != 8 or parts[1] not in MODELS:
            raise ValueError(f"study: no cell is called {name!r}; names are kind_model_size_task_context_tokens_rate_"
                             "seed.")  # fmt: skip
        kind, model, size, task, context, tokens, rate, seed = parts
        return cls(kind, model, size, task, int(context), float(tokens) if "." in tokens else int(tokens),
                   float(rate), int(seed))  # fmt: skip

    @property
    def causal(self) -> bool:
        return not self.task.endswith("masked")

    @property
    def recalls(self) -> bool:
        return self.task.startswith(("mqar", "needle"))


def train(model: str, task: str, context: int, rates: Iterable[float], *, size="m", tokens=TOKENS, seed=0):
    return [Cell("train", model, size, task, context, tokens, rate, seed) for rate in rates]


def timing(models: Iterable[str], task: str, contexts: Iterable[int], size: str = "m") -> list[Cell]:
    return [Cell("time", model, size, task, context) for context in contexts for model in models]


Results = dict[Cell, dict]


def tuning(results: Results, model: str, task: str, context: int, **more) -> list[Cell]:
    """The cells of a search for a model's best rate, as far as `results` tell them: those of `RATES`, and beyond the
    best one as long as it is the highest or the lowest; on equal terms for all."""
    rates = set(RATES)
    while True:
        cells = train(model, task, context, sorted(rates, reverse=True), **more)
        if not all(cell in results for cell in cells):
            return cells
        best = best_of(cells, results).rate
        beyond = best * 2 if best == max(rates) else best / 2 if best == min(rates) else None
        if beyond is None:
            return cells
        rates.add(beyond)


def best_of(cells: list[Cell], results: Results) -> Cell:
    return min(cells, key=lambda cell: final_loss(results[cell]))


def tuned(results: Results, model: str, task: str, context: int, **more) -> Cell | None:
    """The cell at a model's best rate, or None before the search has ended."""
    cells = tuning(results, model, task, context, **more)
    return best_of(cells, results) if all(cell in results for cell in cells) else None


def passes(results: Results) -> list[Cell]:
    """The long trainings, on all text."""
    task = "mixed-causal"
    cells = [cell for context, rates in PASSED.items() for model, rate in rates.items()
             for cell in train(model, task, context, [rate], tokens=ONE_PASS)]  # fmt: skip
    for form in LASTING_FORMS:
        for context, rates in PASSED.items():
            cells += train(f"plus-{form}", task, context, [rates[STARTED]], tokens=ONE_PASS)
    searched = {"context": 2048, "tokens": ONE_PASS / 10}
    for model in (RIVAL, STARTED):
        cells += tuning(results, model, task, **searched)
    best = [cell for model in (RIVAL, STARTED) if (cell := tuned(results, model, task, **searched)) is not None]
    long = [replace(cell, context=context, tokens=ONE_PASS) for context in PASSED for cell in best]
    cells += long + [replace(cell, seed=1) for cell in long]
    for model in (RIVAL, STARTED, *(f"plus-{form}" for form in SEARCHED_FORMS)):
        rate = PASSED[2048].get(model, PASSED[2048][STARTED])
        cells += train(model, task, 2048, [rate], tokens=SEARCHED)
    return cells + [replace(cell, tokens=SEVERAL_PASSES) for cell in long]


def full_grid(results: Results) -> list[Cell]:
    """Every cell of the study that can be named yet, finished or not: rates, seeds and contexts depend on what other
    cells have found."""
    books, masked = "books-causal", "books-masked"
    first, lower = RATES
    best = {(model, *place): tuned(results, model, *place) for place in TUNED for model in HEADLINE}

    cells = passes(results)
    # Trainings time their steps, too. These also tell what Python needs to issue one; the second was disturbed there.
    cells += timing(HEADLINE, books, [8192]) + timing(HEADLINE, masked, [4096])
    for task, context in TUNED:
        for model in HEADLINE:
            cells += tuning(results, model, task, context)
        ours = best[FLASH, task, context]
        cells += [] if ours is None else [replace(ours, model=BETTER)]
    for task, context in GOALS:
        cells += [replace(cell, seed=1) for model in HEADLINE if (cell := best[model, task, context]) is not None]
        ours = best[FLASH, task, context]
        cells += [] if ours is None else [replace(ours, model=BETTER, seed=1)]
    for task in (books, masked):
        for context in BETWEEN:
            for model in HEADLINE:
                ends = [best[model, task, end] for end in (512, 8192)]
                if None not in ends:
                    cells += train(model, task, context, sorted({cell.rate for cell in ends}))
    # What of Gated DeltaNet is it that the better form lacks?
    for model in CONFIRMED:
        cells += train(model, books, 8192, [first, 2 * first])
    # Does a better start of training?
    for place in TUNED:
        cells += tuning(results, STARTED, *place)
    for seed, goals in ((1, GOALS), (2, [(books, 8192)])):
        started = [tuned(results, STARTED, *place) for place in goals]
        cells += [replace(cell, seed=seed) for cell in started if cell is not None]
    # And does the global branch, then?
    cells += tuning(results, STARTED_LOCAL, books, 8192)
    local = tuned(results, STARTED_LOCAL, books, 8192)
    cells += [] if local is None else [replace(local, seed=seed) for seed in (1, 2)]
    for model in (STARTED, STARTED_LOCAL):
        cells += train(model, books, SEARCH_CONTEXT, [first], **LONG)
    for model in STARTS:
        cells += train(model, books, 8192, [first])
    # Or is it AdamW's eps, which is above the gradients that heads of the paper's start get?
    for model, rate in ((FLASH, first), (BETTER, first), (RIVAL, lower)):
        cells += train(model, books, 8192, [rate], size="m-eps")
    # How soon is FLASH at Transformer++'s end with a schedule of its own?
    for task, context in GOALS:
        for tokens in BUDGETS:
            cells += tuning(results, FLASH, task, context, tokens=tokens)
    for model in OTHERS:
        cells += tuning(results, model, books, 8192)
    for size, models in (("m", ABLATIONS), ("s", SCALED), ("l", SCALED)):
        for model in models:
            cells += tuning(results, model, **SHORT, size=size)
    for model in ("flash", "flash-local", BETTER, "flash-stagger-local"):
        cells += train(model, books, SEARCH_CONTEXT, [first], **LONG)
    for seed in (0, 1, 2):
        for model in SEEDED:
            cells += train(model, books, SEARCH_CONTEXT, [first], **SEARCH, seed=seed)
    for task in RECALL_TASKS:
        for model in RECALL_MODELS:
            cells += train(model, task, 512, [first], size="recall", tokens=RECALL_TOKENS)
    cells += [cell for model in FORMS for cell in train(model, books, SEARCH_CONTEXT, [first], **SEARCH)]
    cells += timing(OTHERS, books, [512, 2048])
    # On Hopper it needs triton 3.7.1. With half of the tokens it takes about the seconds that FLASH does with all.
    cells += tuning(results, MODERN, books, 8192)
    modern = tuned(results, MODERN, books, 8192)
    cells += [] if modern is None else [replace(modern, seed=1), replace(modern, tokens=TOKENS // 2)]
    cells += timing([MODERN], books, [512, 2048])
    for task in (books, masked):
        for context in BETWEEN:
            started = [tuned(results, STARTED, task, end) for end in (512, 8192)]
            if None not in started:
                cells += train(STARTED, task, context, sorted({cell.rate for cell in started}))
        # Its trainings were on other GPUs than the others'.
        cells += timing([STARTED], task, CONTEXTS)
    # Small enough for a CPU.
    for model in HINTS:
        cells += train(model, books, HINT_CONTEXT, [2 * first], **HINT)
    for model in (FLASH, STARTED):
        cells += train(model, masked, HINT_CONTEXT, [2 * first], **HINT)
    small = {"size": "recall-cpu", "tokens": 3.7}
    for seed in (0, 1):
        for model in (*HEADLINE, "flash-keyshift-norope", "flash-norope"):
            cells += train(model, "mqar4", 128, [2 * first], **small, seed=seed)
    deep = {"size": "recall-cpu-deep", "tokens": 3.7}
    for model in (*HEADLINE, "flash-previous"):
        cells += train(model, "mqar4", 128, [2 * first], **deep)
    for model in (*HEADLINE, BETTER, "flash-shifted-tokens"):
        cells += train(model, "needle", 128, [2 * first], **deep)
    for task in ("mqar4", "needle"):
        for model in (STARTED, STARTED_LOCAL):
            cells += train(model, task, 128, [2 * first], **deep)
    return list(dict.fromkeys(cells))


def tiny_grid() -> list[Cell]:
    """A cell of every kind, of a size that a CPU can do in seconds."""
    first = [RATES[0]]
    cells = timing(["flash"], "books-causal", [64], "tiny")
    for model in HEADLINE:
        cells += train(model, "books-causal", 64, first, size="tiny", tokens=0.004)
    return cells + train("flash", "mqar4", 64, first, size="tiny-recall", tokens=0.004)


def final_loss(result: dict) -> float:
    """Validation loss; infinite where the training diverged."""
    loss = result["final"]["loss"]
    return loss if math.isfinite(loss) else math.inf


def best_rates(results: Results) -> dict[tuple, Cell]:
    """Of each (model, size, task, context, tokens) the cell of seed 0 with the lowest validation loss."""
    best: dict[tuple, Cell] = {}
    for cell, result in results.items():
        if cell.kind == "train" and cell.seed == 0:
            key = (cell.model, cell.size, cell.task, cell.context, cell.tokens)
            if key not in best or final_loss(result) < final_loss(results[best[key]]):
                best[key] = cell
    return best


def load_results(*folders: Path) -> Results:
    """What the finished cells wrote."""
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).glob("*.json")):
            found[Cell.parse(path.stem)] = json.loads(path.read_text(encoding="utf-8"))
    return found


__all__ = [
    "ABLATIONS", "BETTER", "BETWEEN", "BUDGETS", "CONTEXTS", "FLASH", "FORMS", "GOALS", "HEADLINE", "HINT",
    "HINT_CONTEXT", "LONG", "MODERN", "ONE_PASS", "RATES", "RECALL_MODELS", "RECALL_TASKS", "RIVAL", "SCALED",
    "SEARCH", "SEARCH_CONTEXT", "SHORT", "STARTED", "TOKENS", "TUNED", "Cell", "Results", "best_rates", "final_loss",
    "full_grid", "load_results", "passes", "tiny_grid", "tuned", "tuning",
]  # fmt: skip
