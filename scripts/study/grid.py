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
# Shifted chunks and keys, a part of FLASH+.
SHIFTED = "flash-shifted"
# The linear-time model that a user would compare FLASH with.
MODERN = "gated-deltanet"
# FLASH+ with plain local keys: SHIFTED without the sinusoid, and with attention that starts at recent tokens.
PLUS = "flash-shifted-bare-ones-recent"
# The same without a global branch.
PLUS_LOCAL = "flash-stagger-local-bare-ones-recent"
TOKENS = 30  # millions
# Shorter trainings, each with its own schedule.
BUDGETS = (3.75, 7.5, 15)
# The search of a rate starts with these and continues by factors of two until the best lies between two worse ones.
RATES = (2e-3, 1e-3)
# The paper's speed-ups to Transformer++'s final loss, which are the project's goals. These cells have two seeds.
GOALS = {("books-causal", 8192): 12, ("wiki-causal", 8192): 4.9, ("books-masked", 8192): 4.8}
# Where rates are searched; at the contexts between, a model gets its best rates of 512 and 8,192.
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
# Forms of the global branch are searched at a smaller size and confirmed at size m.
SEARCH = {"size": "s", "tokens": 15}
SEARCH_CONTEXT = 4096
# Does the global branch pay with more training?
LONG = {"size": "s", "tokens": 60}
# Does the lead last? One pass over all training text, at rates searched with a tenth of it at each context.
ONE_PASS = 235
LASTING = "plus-keys-delta"  # FLASH+ with the delta rule
PASSED = {LASTING: (2048, 8192), "plus-keys": (2048, 8192), PLUS: (2048, 8192), RIVAL: (2048, 8192),
          "gau-softmax": (2048,), FLASH: (2048, 8192), PLUS_LOCAL: (2048, 8192), "flash-quad": (2048,),
          MODERN: (2048, 8192)}  # fmt: skip
# What ends this close to another model gets a second seed.
CLOSE = 0.02
SEVERAL_PASSES = 600
LASTED = (LASTING, "plus-keys", RIVAL)
# The others get fewer tokens, as do masked models.
FEWER_PASSES = 300
FOLLOWED = (FLASH, PLUS_LOCAL, "flash-quad", MODERN)
# Text is also measured at these times the training context.
BEYOND = (2, 4, 8)
# Masked, too, with rates searched at each context.
PASSED_MASKED = (8192, 512)
# The paper's size once, its rates searched with a tenth of the tokens.
BASE = {"task": "mixed-causal", "context": 8192, "size": "base"}
BASE_TOKENS = 300
BASE_FORMS = (RIVAL, "plus-keys")
# Forms that may use more of the context are compared after a quarter of a pass, at PLUS's rate, beside PLUS and
# Transformer++.
SEARCHED = 60
SEARCHED_FORMS = (
    "window-keys-delta", "keys", "delta", "window", "gated", "window-keys", "keys-delta", "keys-gated",
    "window-keys-gated", "heads", "hybrid", "softmax", "window-keys-heads-delta", "512", "gated-features",
    "keys-dropout",
)  # fmt: skip
# Trained with several seeds, for the spread of the loss.
SEEDED = ("flash", "flash-previous", "flash-local", "flash-stagger-local", SHIFTED, "flash-shifted-conv",
          "flash-shifted-tokens", "flash-shifted-heads", "flash-shifted-heads-tokens")  # fmt: skip
# Of these, the ones confirmed at size m.
CONFIRMED = ("flash-shifted-conv", "flash-shifted-tokens", "flash-shifted-heads")
STARTS = ("flash-bare", "flash-bare-ones-recent", "flash-shifted-bare", "flash-shifted-bare-rms-ones-recent",
          "flash-shifted-bare-std-ones-recent")  # fmt: skip
# mqarP: P pairs; needle: one.
RECALL_TASKS = ("mqar32", "needle")
RECALL_MODELS = ("flash", "transformer++", "flash-keyshift-norope", SHIFTED, PLUS, "flash-local", "flash-norope")
# Trials on a CPU before spending GPU time.
HINT = {"size": "xs", "tokens": 2}
HINT_CONTEXT = 512
HINTS = ("flash", SHIFTED, PLUS, "flash-conv")
FORMS = tuple(name for name in MODELS if name.startswith("flash-") and name not in ("flash-quad", "flash-global"))


@dataclass(frozen=True, order=True)
class Cell:
    """One measurement.

    Attributes:
        kind: `"train"`, or `"time"` for the time of a training step, alone on the device.
        model: Key of [`models.MODELS`].
        size: Key of [`models.SIZES`].
        task: Corpus and direction, `mqarP` or `needle`.
        context: Tokens per sequence.
        tokens: Millions of training tokens (0 for `"time"`).
        rate: Peak learning rate.
        seed: Seed of weights and order.
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
        """The cell of this name.

        Raises:
            ValueError: there is none.
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


def tuning(results: Results, model: str, task: str, context: int, *, rates=RATES, **more) -> list[Cell]:
    """The cells of the search for a model's best rate, as far as `results` determine them: those of `rates`, and then
    beyond the best one while it is the highest or the lowest; the same procedure for every model."""
    rates = set(rates)
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
    places = [(model, {"task": task, "context": context}, ONE_PASS)
              for model, contexts in PASSED.items() for context in contexts]  # fmt: skip
    cells, long = searched(results, places)
    # The best rate of a whole pass may be another than that of its tenth.
    for cell in long:
        if cell.model == RIVAL:
            rates = cell.rate, 2 * cell.rate
            cells += tuning(results, RIVAL, task, cell.context, rates=rates, tokens=ONE_PASS)
    lowest = best_rates(results)
    missing = {place_of(cell) for cell in cells + long if cell not in results}
    longer = [lowest[place_of(cell)] for cell in long if cell.model in LASTED and place_of(cell) not in missing]
    for trained in (long, [replace(cell, tokens=SEVERAL_PASSES) for cell in longer]):
        ended = [cell for cell in trained if cell in results]
        ended = [lowest[place_of(cell)] for cell in ended]
        cells += trained + close(ended, results)
    for model in (RIVAL, PLUS, *(f"plus-{form}" for form in SEARCHED_FORMS)):
        cells += train(model, task, 2048, RATES[1:] if model == RIVAL else RATES[:1], tokens=SEARCHED)
    for model, rate in ((RIVAL, RATES[1]), ("plus-keys", RATES[0])):
        cells += train(model, task, 2048, [rate], size="m-decay", tokens=SEARCHED)
    places = [(model, BASE, BASE_TOKENS) for model in BASE_FORMS]
    for context in PASSED_MASKED:
        places += [(model, {"task": "mixed-masked", "context": context}, ONE_PASS) for model in HEADLINE]
    more = [cell for cell in long if cell.model in FOLLOWED]
    searches, long = searched(results, places)
    more = [cell for cell in more + long if cell in results and cell.tokens == ONE_PASS]
    # At the rate that was best in the whole pass.
    best = [lowest[place_of(cell)] for cell in more]
    return cells + searches + long + [replace(cell, tokens=FEWER_PASSES) for cell in best]


def searched(results: Results, places: Iterable[tuple[str, dict, int]]) -> tuple[list[Cell], list[Cell]]:
    """For each model, place and amount of training: the search of its rate with a tenth of the tokens, and the
    training at the best one, as far as it is known."""
    searches, long = [], []
    for model, place, tokens in places:
        searches += tuning(results, model, **place, tokens=tokens / 10)
        best = tuned(results, model, **place, tokens=tokens / 10)
        long += [] if best is None else [replace(best, tokens=tokens)]
    return searches, long


def close(cells: list[Cell], results: Results) -> list[Cell]:
    """The second seeds of the cells that ended within `CLOSE` of another model's at the same context."""

    def near(one: Cell, other: Cell) -> bool:
        return one.context == other.context and abs(final_loss(results[one]) - final_loss(results[other])) < CLOSE

    return [replace(cell, seed=1) for cell in cells if any(near(cell, other) for other in cells if other != cell)]


def full_grid(results: Results) -> list[Cell]:
    """Every cell known so far, finished or not; rates, seeds and contexts depend on the results of other cells."""
    books, masked = "books-causal", "books-masked"
    first, lower = RATES
    best = {(model, *place): tuned(results, model, *place) for place in TUNED for model in HEADLINE}

    cells = passes(results)
    # Trainings also time their steps; these cells add the time Python needs to issue one (the second was disturbed).
    cells += timing(HEADLINE, books, [8192]) + timing(HEADLINE, masked, [4096])
    for task, context in TUNED:
        for model in HEADLINE:
            cells += tuning(results, model, task, context)
        ours = best[FLASH, task, context]
        cells += [] if ours is None else [replace(ours, model=SHIFTED)]
    for task, context in GOALS:
        cells += [replace(cell, seed=1) for model in HEADLINE if (cell := best[model, task, context]) is not None]
        ours = best[FLASH, task, context]
        cells += [] if ours is None else [replace(ours, model=SHIFTED, seed=1)]
    for task in (books, masked):
        for context in BETWEEN:
            for model in HEADLINE:
                ends = [best[model, task, end] for end in (512, 8192)]
                if None not in ends:
                    cells += train(model, task, context, sorted({cell.rate for cell in ends}))
    # Does one of Gated DeltaNet's features explain its lead?
    for model in CONFIRMED:
        cells += train(model, books, 8192, [first, 2 * first])
    # Does the start of training?
    for place in TUNED:
        cells += tuning(results, PLUS, *place)
    for seed, goals in ((1, GOALS), (2, [(books, 8192)])):
        started = [tuned(results, PLUS, *place) for place in goals]
        cells += [replace(cell, seed=seed) for cell in started if cell is not None]
    # Is the global branch still needed then?
    cells += tuning(results, PLUS_LOCAL, books, 8192)
    local = tuned(results, PLUS_LOCAL, books, 8192)
    cells += [] if local is None else [replace(local, seed=seed) for seed in (1, 2)]
    for model in (PLUS, PLUS_LOCAL):
        cells += train(model, books, SEARCH_CONTEXT, [first], **LONG)
    for model in STARTS:
        cells += train(model, books, 8192, [first])
    # Or AdamW's eps, which is above the gradients of queries and keys with the paper's start?
    for model, rate in ((FLASH, first), (SHIFTED, first), (RIVAL, lower)):
        cells += train(model, books, 8192, [rate], size="m-eps")
    # How soon does FLASH reach Transformer++'s final loss with a shorter schedule?
    for task, context in GOALS:
        for tokens in BUDGETS:
            cells += tuning(results, FLASH, task, context, tokens=tokens)
    for model in OTHERS:
        cells += tuning(results, model, books, 8192)
    for size, models in (("m", ABLATIONS), ("s", SCALED), ("l", SCALED)):
        for model in models:
            cells += tuning(results, model, **SHORT, size=size)
    for model in ("flash", "flash-local", SHIFTED, "flash-stagger-local"):
        cells += train(model, books, SEARCH_CONTEXT, [first], **LONG)
    for seed in (0, 1, 2):
        for model in SEEDED:
            cells += train(model, books, SEARCH_CONTEXT, [first], **SEARCH, seed=seed)
    for task in RECALL_TASKS:
        for model in RECALL_MODELS:
            cells += train(model, task, 512, [first], size="recall", tokens=RECALL_TOKENS)
    cells += [cell for model in FORMS for cell in train(model, books, SEARCH_CONTEXT, [first], **SEARCH)]
    cells += timing(OTHERS, books, [512, 2048])
    # Needs triton 3.7.1 on Hopper. With half of the tokens it takes about as many seconds as FLASH with all of them.
    cells += tuning(results, MODERN, books, 8192)
    modern = tuned(results, MODERN, books, 8192)
    cells += [] if modern is None else [replace(modern, seed=1), replace(modern, tokens=TOKENS // 2)]
    cells += timing([MODERN], books, [512, 2048])
    for task in (books, masked):
        for context in BETWEEN:
            started = [tuned(results, PLUS, task, end) for end in (512, 8192)]
            if None not in started:
                cells += train(PLUS, task, context, sorted({cell.rate for cell in started}))
        # Its trainings ran on other GPUs than the others.
        cells += timing([PLUS], task, CONTEXTS)
    # Small enough for a CPU.
    for model in HINTS:
        cells += train(model, books, HINT_CONTEXT, [2 * first], **HINT)
    for model in (FLASH, PLUS):
        cells += train(model, masked, HINT_CONTEXT, [2 * first], **HINT)
    small = {"size": "recall-cpu", "tokens": 3.7}
    for seed in (0, 1):
        for model in (*HEADLINE, "flash-keyshift-norope", "flash-norope"):
            cells += train(model, "mqar4", 128, [2 * first], **small, seed=seed)
    deep = {"size": "recall-cpu-deep", "tokens": 3.7}
    for model in (*HEADLINE, "flash-previous"):
        cells += train(model, "mqar4", 128, [2 * first], **deep)
    for model in (*HEADLINE, SHIFTED, "flash-shifted-tokens"):
        cells += train(model, "needle", 128, [2 * first], **deep)
    for task in ("mqar4", "needle"):
        for model in (PLUS, PLUS_LOCAL):
            cells += train(model, task, 128, [2 * first], **deep)
    cells += train("plus-window-keys-delta", "needle", 128, [2 * first], **deep)
    return list(dict.fromkeys(cells))


def tiny_grid() -> list[Cell]:
    """A cell of every kind, small enough for seconds on a CPU."""
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
    """For each (model, size, task, context, tokens), the cell of seed 0 with the lowest validation loss."""
    best: dict[tuple, Cell] = {}
    for cell, result in results.items():
        if cell.kind == "train" and cell.seed == 0:
            key = place_of(cell)
            if key not in best or final_loss(result) < final_loss(results[best[key]]):
                best[key] = cell
    return best


def place_of(cell: Cell) -> tuple:
    """What the trainings have in common among which a rate is chosen."""
    return cell.model, cell.size, cell.task, cell.context, cell.tokens


def load_results(*folders: Path) -> Results:
    """The results of the finished cells."""
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).glob("*.json")):
            found[Cell.parse(path.stem)] = json.loads(path.read_text(encoding="utf-8"))
    return found


__all__ = [
    "ABLATIONS", "SHIFTED", "BETWEEN", "BUDGETS", "CONTEXTS", "FLASH", "FORMS", "GOALS", "HEADLINE", "HINT",
    "HINT_CONTEXT", "LONG", "MODERN", "ONE_PASS", "RATES", "RECALL_MODELS", "RECALL_TASKS", "RIVAL", "SCALED",
    "SEARCH", "SEARCH_CONTEXT", "SHORT", "PLUS", "TOKENS", "TUNED", "Cell", "Results", "best_rates", "final_loss",
    "full_grid", "load_results", "passes", "tiny_grid", "tuned", "tuning",
]  # fmt: skip
