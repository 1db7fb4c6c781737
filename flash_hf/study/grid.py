# SPDX-License-Identifier: Apache-2.0
"""The cells of the study, the most important first, so that a run that is cut off leaves the most useful part."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from .models import MODELS


HEADLINE = ("flash", "transformer++")
CONTEXTS = (512, 1024, 2048, 4096, 8192)
# FLASH's best at a context of 8,192 is the first, Transformer++'s is lower.
RATES = (2e-3, 1e-3, 5e-4, 4e-3)
TOKENS = 30  # millions
RECALL_TOKENS = 60
# Forms of the global branch are searched in a smaller model, and confirmed in the study's.
SEARCH = {"size": "s", "tokens": 15}
SEARCH_CONTEXT = 4096
# What the draw of the weights does to a loss is learnt from these.
SEEDED = ("flash", "flash-previous", "flash-local", "flash-stagger-local", "flash-stagger-keyshift")
# mqarP: P pairs; needle: one.
RECALL_TASKS = ("mqar32", "needle")
RECALL_MODELS = ("flash", "transformer++", "flash-keyshift-norope", "flash-keyshift", "flash-local",
                 "flash-keyshift-norope-norm", "flash-norope", "flash-decay-norm")  # fmt: skip
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


def full_grid() -> list[Cell]:
    """Every cell of the study except further seeds (see [`further_seeds`])."""
    first, lower, lowest, higher = RATES
    books, wiki, masked = "books-causal", "wiki-causal", "books-masked"

    def pairs(task: str, contexts: Iterable[int], rate: float, models: Iterable[str] = HEADLINE, **more):
        return [c for context in contexts for model in models for c in train(model, task, context, [rate], **more)]

    # Trainings time their steps, too; these also tell what Python needs to issue one.
    cells = timing(HEADLINE, books, [8192])
    cells += pairs(books, [8192, 512, 2048], first)
    shifted = ("flash-stagger-local", "flash-stagger-keyshift", "flash-local")
    cells += pairs(books, [8192], first, shifted)
    cells += pairs(masked, [8192], first) + pairs(wiki, [8192], first)
    cells += pairs("mqar32", [512], first, RECALL_MODELS[:3], size="recall", tokens=RECALL_TOKENS)
    cells += pairs(masked, [512], first) + pairs(books, [8192], higher) + pairs(books, [8192], lower)
    cells += pairs(wiki, [8192], lower) + pairs(masked, [8192], lower) + pairs(books, [8192], lowest)
    for seed in (0, 1, 2):
        cells += pairs(books, [SEARCH_CONTEXT], first, SEEDED, **SEARCH, seed=seed)
    cells += pairs(books, [512, 2048], lower) + pairs(masked, [512], lower)
    cells += pairs(books, [SEARCH_CONTEXT], first, FORMS, **SEARCH)
    cells += pairs(books, [8192], first, ("flash-previous", "flash-keyshift-norope"))
    cells += pairs("mqar32", [512], first, RECALL_MODELS, size="recall", tokens=RECALL_TOKENS)
    for task, contexts in (
        (books, (512, 2048)), (masked, (8192, 512, 2048)), (wiki, (8192, 512, 2048)), ("wiki-masked", (512, 8192)),
        (books, (4096, 1024)),
    ):  # fmt: skip
        cells += [cell for rate in RATES for cell in pairs(task, contexts, rate)]
    cells += pairs("needle", [512], first, RECALL_MODELS, size="recall", tokens=RECALL_TOKENS)
    # Tables 1 and 2, figure 3, and the other models of figures 5 and 6.
    ablations = ("flash-quad", "gau-softmax", "gau-heads", "gau-ungated", "transformer++", "mhsa-relu2",
                 "mhsa-single-head", "mhsa-gated")  # fmt: skip
    cells += [cell for rate in RATES[:2] for cell in pairs("wiki-masked", [512], rate, ablations)]
    for size in ("s", "l"):
        models = ("flash-quad", "transformer++", "flash")
        cells += timing(models, "wiki-masked", [512], size)
        cells += [cell for rate in RATES[:2] for cell in pairs("wiki-masked", [512], rate, models, size=size)]
    others = ("transformer", "mc-transformer++", "performer-relu", "combiner")
    for context in (512, 2048, 8192):
        cells += timing(others, books, [context])
        cells += [cell for rate in RATES[:2] for cell in pairs(books, [context], rate, others)]
    # Needs triton 3.7.1 on Hopper.
    cells += timing(["gated-deltanet"], books, [2048, 8192])
    cells += [cell for rate in RATES for cell in pairs(books, [2048, 8192], rate, ["gated-deltanet"])]
    # Small enough for a CPU: the search that came before the others.
    small = {"size": "recall-cpu", "tokens": 3.7}
    cells += [cell for seed in (0, 1) for cell in pairs("mqar4", [128], higher, RECALL_MODELS, **small, seed=seed)]
    deep = ("transformer++", "flash-previous", "flash", "flash-local")
    small["size"] = "recall-cpu-deep"
    cells += [cell for rate in (higher, lower) for cell in pairs("mqar4", [128], rate, deep, **small)]
    # Does the global branch pay with more training?
    cells += pairs(books, [8192], first, ("flash", "flash-local", "transformer++"), tokens=120)
    return list(dict.fromkeys(cells))


def tiny_grid() -> list[Cell]:
    """A cell of every kind, of a size that a CPU can do in seconds."""
    first = RATES[:1]
    cells = timing(["flash"], "books-causal", [64], "tiny")
    for model in HEADLINE:
        cells += train(model, "books-causal", 64, first, size="tiny", tokens=0.004)
    return cells + train("flash", "mqar4", 64, first, size="tiny-recall", tokens=0.004)


def final_loss(result: dict) -> float:
    return result["final"]["loss"]


def best_rates(results: dict[Cell, dict]) -> dict[tuple, Cell]:
    """Of each (model, size, task, context, tokens) the cell of seed 0 with the lowest validation loss."""
    best: dict[tuple, Cell] = {}
    for cell, result in results.items():
        if cell.kind == "train" and cell.seed == 0:
            key = (cell.model, cell.size, cell.task, cell.context, cell.tokens)
            if key not in best or final_loss(result) < final_loss(results[best[key]]):
                best[key] = cell
    return best


def further_seeds(results: dict[Cell, dict], grid: list[Cell]) -> list[Cell]:
    """The second seed of every headline cell, at its best rate, once the grid has no more of its rates to run."""
    cells = []
    for key, cell in best_rates(results).items():
        asked = [c for c in grid if (c.model, c.size, c.task, c.context, c.tokens) == key and c.kind == "train"]
        if cell.model in HEADLINE and not cell.recalls and all(c in results for c in asked):
            cells.append(Cell(**{**cell.__dict__, "seed": 1}))
    return cells


def load_results(*folders: Path) -> dict[Cell, dict]:
    """What the finished cells wrote."""
    found = {}
    for folder in folders:
        for path in sorted(Path(folder).glob("*.json")):
            found[Cell.parse(path.stem)] = json.loads(path.read_text())
    return found


__all__ = [
    "CONTEXTS", "FORMS", "HEADLINE", "RATES", "RECALL_MODELS", "RECALL_TASKS", "SEARCH", "SEARCH_CONTEXT", "SEEDED",
    "Cell", "best_rates", "final_loss", "full_grid", "further_seeds", "load_results", "tiny_grid",
]  # fmt: skip
