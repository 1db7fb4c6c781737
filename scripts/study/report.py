# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of the study from its cells: no number of the study is written there by hand."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..benchmark.report import markdown as table
from . import grid
from .cell import RECIPE, recipe_of
from .grid import FLASH, FORMS, HEADLINE, RECALL_TASKS, RIVAL, SHORT, Cell, Results, best_rates, final_loss
from .models import MODELS
from .text import CORPORA, MIXED


Row = list[str]
UNFINISHED = Path(__file__).resolve().parents[1] / "results" / "study" / "unfinished"
SIZES_SHOWN = ("s", "m", "l")
SIZES_PASSED = ("m", "base")  # of the long trainings
# Seconds are compared between steps that were timed on this GPU alone.
TIMED_ON = "NVIDIA H100 80GB HBM3"
# Forms are compared in a table of their own; the others have only these.
HIDDEN = set(FORMS) - {"flash-local", grid.SHIFTED, grid.PLUS}


def chosen(results: Results, size: str = "m", tokens: int | float = grid.TOKENS) -> dict[tuple[str, str, int], Cell]:
    """The cell at the best rate of each (model, task, context) of one size and amount of training."""
    best = best_rates(results)
    return {(model, task, context): cell for (model, sized, task, context, amount), cell in best.items()
            if (sized, amount) == (size, tokens)}  # fmt: skip


def seeds_of(results: Results, cell: Cell) -> list[dict]:
    """Results of all seeds of a cell."""
    return [result for other, result in sorted(results.items())
            if Cell(**{**other.__dict__, "seed": cell.seed}) == cell]  # fmt: skip


def same_but_rate(results: Results, cell: Cell) -> list[Cell]:
    return [other for other in results if Cell(**{**other.__dict__, "rate": cell.rate}) == cell]


def mean_loss(results: Results, cell: Cell) -> float:
    """Of all seeds of a cell."""
    return statistics.mean(final_loss(result) for result in seeds_of(results, cell))


def loss_text(results: Results, cell: Cell) -> str:
    losses = [final_loss(result) for result in seeds_of(results, cell)]
    text = f"{mean_loss(results, cell):.3f}"
    return f"{text} +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else text


def rates_tried(results: Results, cell: Cell) -> str:
    """The rates of the grid that were run, the chosen one in bold."""
    found = sorted((c.rate, final_loss(results[c])) for c in same_but_rate(results, cell))
    return ", ".join(f"**{rate:g}: {loss:.3f}**" if rate == cell.rate else f"{rate:g}: {loss:.3f}"
                     for rate, loss in found)  # fmt: skip


def step_ms(results: Results, cell: Cell, machine: str = TIMED_ON) -> float | None:
    """Milliseconds of a training step alone on a machine, in the cell's direction; its corpus makes no difference."""
    result = timed(results).get((*timed_as(cell), machine))
    return None if result is None else result["step"]["median"]


def timed_as(cell: Cell) -> tuple[str, str, int, str]:
    """What the time of a step depends on: size, direction, context, model."""
    return cell.size, cell.task.split("-")[-1], cell.context, cell.model


def timed(results: Results) -> dict[tuple[str, str, int, str, str], dict]:
    """Of the cells that measured one kind of step on one machine, the quietest: others may have been compiling beside
    it."""
    found: dict[tuple[str, str, int, str, str], dict] = {}
    for cell, result in results.items():
        key = *timed_as(cell), result["machine"]
        if "step" in result and (key not in found or result["step"]["median"] < found[key]["step"]["median"]):
            found[key] = result
    return found


def steps_to(curve: list[list[float]], target: float) -> float | None:
    """Steps until the validation loss is at the target, between two validations by a straight line; None if never."""
    before = None
    for step, loss in curve:
        if loss <= target:
            if before is None or before[1] <= target:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def bits_per_byte(result: dict, corpus: str | None = None) -> float:
    """Nats per token, by the tokens and bytes of the whole validation text; of one of several corpora if named."""
    size = result["text"][f"{corpus or result['task'].split('-')[0]}_valid"]
    final = result["corpora"][corpus]["final"] if corpus else result["final"]
    return final["loss"] / math.log(2) * size["tokens"] / size["bytes"]


# ------------------------------------------------------------------------------------------------------------------
# Sections
# ------------------------------------------------------------------------------------------------------------------
def goals(results: Results) -> str:
    """What the project set out to show of FLASH against Transformer++, and what was measured."""
    best, rows = chosen(results), []
    for task in ("books-causal", "wiki-causal", "books-masked", "wiki-masked"):
        for context in grid.CONTEXTS:
            cells = [best.get((model, task, context)) for model in HEADLINE]
            asked = grid.GOALS.get((task, context))
            if not any(cells) and asked is None:
                continue
            row = [task.replace("-", ", "), f"{context:,}", "not run yet", "-", "-", "-", "-"]
            if all(cells):
                row[2] = f"{mean_loss(results, cells[0]) - mean_loss(results, cells[1]):+.3f}"
                row[3] = " and ".join(str(len(same_but_rate(results, cell))) for cell in cells)
                row[4] = " and ".join(str(len(seeds_of(results, cell))) for cell in cells)
                row[6] = faster(results, *cells)
            row[5] = "-" if asked is None else f"at least {asked} x"
            rows.append(row)
    head = ["task", "context", "loss, FLASH less Transformer++ (goal: at most 0)", "rates tried", "seeds",
            "speed-up to its loss, goal", "speed-up, measured"]  # fmt: skip
    return table(head, rows)


def faster(results: Results, ours: Cell, rival: Cell) -> str:
    """Seconds of the rival's whole training over ours to the rival's final loss; the mean over the seeds of both."""
    times = step_ms(results, ours), step_ms(results, rival)
    ratios = []
    for mine, other in zip(seeds_of(results, ours), seeds_of(results, rival), strict=False):
        steps = steps_to(mine["valid_curve"], other["valid_curve"][-1][1])
        if steps is not None and None not in times:
            ratios.append(other["steps"] * times[1] / (steps * times[0]))
    return f"{statistics.mean(ratios):.2f} x" if ratios else "-"


def headline(results: Results) -> str:
    """Loss at the best rate, and how long it takes to reach what Transformer++ ends with."""
    best, rows = chosen(results), []
    for task, context in sorted({(task, context) for _, task, context in best}, key=lambda key: (key[0], key[1])):
        rival = best.get((RIVAL, task, context))
        if task in RECALL_TASKS or rival is None:
            continue
        target = results[rival]["valid_curve"][-1][1]
        for model in MODELS:
            cell = best.get((model, task, context))
            if cell is None or model in HIDDEN:
                continue
            result, ms = results[cell], step_ms(results, cell)
            steps = steps_to(result["valid_curve"], target)
            seconds = None if ms is None or steps is None else steps * ms / 1e3
            rows.append([
                task.replace("-", ", "), f"{context:,}", MODELS[model].title, f"{result['parameters'] / 1e6:.2f} M",
                loss_text(results, cell), f"{bits_per_byte(result):.3f}" if cell.causal else "-",
                rates_tried(results, cell), "-" if ms is None else f"{ms:.1f}",
                "-" if steps is None else f"{steps:,.0f} of {result['steps']:,}",
                "-" if seconds is None else f"{seconds:.1f}", faster(results, cell, rival),
            ])  # fmt: skip
    head = ["task", "context", "model", "parameters", "loss", "bits per byte", "loss by learning rate", "ms per step",
            f"steps to {MODELS[RIVAL].title}'s end", "seconds", "faster by"]  # fmt: skip
    return table(head, rows) if rows else "No cells yet."


def budgets(results: Results) -> str:
    """Trainings of several lengths, each with a schedule of its own that ends there."""
    rows = []
    for task, context in grid.GOALS:
        for model in (FLASH, RIVAL, grid.MODERN):
            for tokens in (*grid.BUDGETS, grid.TOKENS):
                cell = chosen(results, tokens=tokens).get((model, task, context))
                if cell is not None:
                    ms = step_ms(results, cell)
                    rows.append([
                        task.replace("-", ", "), MODELS[model].title, f"{tokens:g} M", f"{results[cell]['steps']:,}",
                        "-" if ms is None else f"{results[cell]['steps'] * ms / 1e3:.1f}",
                        loss_text(results, cell), rates_tried(results, cell),
                    ])  # fmt: skip
    head = ["task", "model", "tokens", "steps", "seconds", "loss", "loss by learning rate"]
    return table(head, rows) if rows else "No cells yet."


def times(results: Results) -> str:
    """Time of a training step, and of the same one issued kernel by kernel."""
    rows, issued = [], {}
    for cell, result in results.items():
        if "issued" in result:
            issued[*timed_as(cell), result["machine"]] = f"{result['issued']['median']:.1f}"
    for key, result in sorted(timed(results).items()):
        size, direction, context, model, machine = key
        step = result["step"]
        rows.append([
            MODELS[model].title, size, direction, f"{context:,}", machine,
            f"{step['median']:.1f} ({step['q25']:.1f} to {step['q75']:.1f})", issued.get(key, "-"),
            "yes" if result["graphed"] else "no",
        ])  # fmt: skip
    head = ["model", "size", "direction", "context", "machine", "ms per step (quartiles)", "issued by Python, ms",
            "CUDA graph"]  # fmt: skip
    return table(head, rows) if rows else "No cells yet."


def forms(results: Results) -> str:
    """Forms of FLASH, best first, at the study's size, at that of the search, and at one for a CPU."""
    parts = []
    searched = [(size, grid.TOKENS, 8192) for size in ("m", "m-eps")]
    searched += [(*search.values(), grid.SEARCH_CONTEXT) for search in (grid.LONG, grid.SEARCH)]
    searched.append((*grid.HINT.values(), grid.HINT_CONTEXT))
    for size, tokens, context in searched:
        best = chosen(results, size, tokens)
        cells = [best[key] for key in best if key[1:] == ("books-causal", context) and key[0] in ("flash", *FORMS)]
        if len(cells) < 2:
            continue
        base = best.get((FLASH, "books-causal", context))
        rows = []
        for cell in sorted(cells, key=lambda cell: mean_loss(results, cell)):
            result = results[cell]
            slots = result["final"].get("by_slot", [])
            delta = "-" if base is None else f"{mean_loss(results, cell) - mean_loss(results, base):+.3f}"
            rows.append([
                MODELS[cell.model].title, f"{cell.rate:g}", f"{len(seeds_of(results, cell))}",
                loss_text(results, cell), delta,
                f"{slots[0]:.3f}" if slots else "-", f"{slots[-1]:.3f}" if slots else "-",
                *(f"{found['loss']:.3f}" for found in result["lengths"].values()),
            ])  # fmt: skip
        shown = next(iter(cells))
        lengths = [f"loss at {int(length):,}" for length in results[shown]["lengths"]]
        head = ["form", "learning rate", "seeds", "loss", "against FLASH", "first 1/32 of a chunk", "last 1/32",
                *lengths]  # fmt: skip
        parts.append(f"Size {size}, {tokens} M tokens, context {context:,}:\n\n{table(head, rows)}")
    return "\n\n".join(parts) or "No cells yet."


def recall(results: Results) -> str:
    """Share of right answers at 1, 2 and 4 times the context of the training."""
    rows = []
    for cell, result in sorted(results.items()):
        if cell.kind == "train" and cell.recalls:
            rows.append([
                cell.task, f"{cell.context:,}", cell.size, MODELS[cell.model].title, f"{cell.tokens:g} M",
                f"{cell.rate:g}", f"{cell.seed}", f"{100 * result['final']['accuracy']:.1f}",
                *(f"{100 * found['accuracy']:.1f}" for found in result["lengths"].values()),
            ])  # fmt: skip
    head = ["task", "context", "size", "model", "tokens", "learning rate", "seed", "correct, %", "at 2 x", "at 4 x"]
    return table(head, [row + ["-"] * (len(head) - len(row)) for row in rows]) if rows else "No cells yet."


def positions(results: Results) -> str:
    """Loss by eighth of the context, and at lengths beyond it."""
    rows = []
    for (model, task, context), cell in sorted(chosen(results).items(), key=lambda item: (item[0][1:], item[0][0])):
        if cell.recalls or model in HIDDEN:
            continue
        result = results[cell]
        further = [f"{int(length) // context} x: {found['loss']:.3f} (last quarter {found['quarters'][-1]:.3f})"
                   for length, found in result["lengths"].items()]  # fmt: skip
        rows.append([task.replace("-", ", "), f"{context:,}", MODELS[model].title,
                     *(f"{value:.3f}" for value in eighths(result["final"])), "; ".join(further) or "-"])  # fmt: skip
    head = ["task", "context", "model", *(f"{i + 1}/8" for i in range(8)), "beyond the context"]
    return table(head, rows) if rows else "No cells yet."


def branch(results: Results) -> str:
    """What the global branch is worth, by position: the loss of local attention alone minus that of plain-key FLASH+,
    which starts as it does."""
    rows, best = [], chosen(results, tokens=grid.ONE_PASS)
    for (model, task, context), cell in best.items():
        local = best.get((grid.PLUS_LOCAL, task, context))
        if model != grid.PLUS or local is None:
            continue
        for corpus, found in results[cell]["corpora"].items():
            other = results[local]["corpora"][corpus]
            within = zip(eighths(found["final"]), eighths(other["final"]), strict=True)
            further = [zip(found["lengths"][f"{factor * context}"]["quarters"],
                           other["lengths"][f"{factor * context}"]["quarters"], strict=True)
                       for factor in (2, 4)]  # fmt: skip
            rows.append([f"{context:,}", corpus, *(
                ", ".join(f"{alone - both:.3f}" for both, alone in part) for part in (within, *further)
            )])  # fmt: skip
    head = ["context", "corpus", "by eighth of the context", "by quarter at 2 times the context", "at 4 times"]
    return table(head, rows) if rows else "No cells yet."


def eighths(final: dict) -> list[float]:
    """Loss by eighth of the context."""
    bins = final["by_position"]
    return [statistics.mean(bins[i * len(bins) // 8 : (i + 1) * len(bins) // 8]) for i in range(8)]


def context_worth(final: dict, causal: bool) -> tuple[float, float]:
    """Loss where a token has the least context, and where it has the most: in the first and in the last eighth; of
    masked models, which read both sides, at both ends and in the middle two eighths."""
    parts = eighths(final)
    ends = parts[0], parts[-1]
    return ends if causal else (statistics.mean(ends), statistics.mean(parts[3:5]))


def passed(results: Results, causal: bool = True) -> list[Cell]:
    """The long trainings on all text at their best rates: by size, context and tokens, the lowest loss first."""
    cells = [cell for cell in best_rates(results).values()
             if cell.task == mixed(causal) and cell.tokens >= grid.ONE_PASS]  # fmt: skip
    return sorted(cells, key=lambda cell: (
        -SIZES_PASSED.index(cell.size), cell.context, -cell.tokens, mean_loss(results, cell)
    ))  # fmt: skip


def mixed(causal: bool) -> str:
    return f"{MIXED}-{'causal' if causal else 'masked'}"


def long_head(results: Results, cell: Cell) -> Row:
    """Which long training it is: size, context, tokens and model."""
    parameters = f"{results[cell]['parameters'] / 1e6:.0f} M"
    return [f"{cell.size}, {parameters}", f"{cell.context:,}", f"{cell.tokens:g} M", MODELS[cell.model].title]


LONG_HEAD = ["size, parameters", "context", "tokens", "model"]


def lasting(results: Results, causal: bool = True) -> str:
    """Long trainings on all text: each corpus apart, the training's own loss, and what the context is worth."""
    rows = []
    for cell in passed(results, causal):
        result = results[cell]
        curve = result["train_curve"]["loss"]
        row = [*long_head(results, cell), f"{cell.rate:g}", f"{statistics.mean(curve[-len(curve) // 10 :]):.3f}",
               ", ".join(f"{final_loss(seed):.3f}" for seed in seeds_of(results, cell))]  # fmt: skip
        for corpus, found in result["corpora"].items():
            least, most = context_worth(found["final"], causal)
            size = f" ({bits_per_byte(result, corpus):.3f})" if causal else ""
            row += [f"{found['final']['loss']:.3f}{size}", f"{least:.3f}, {most:.3f}",
                    f"{round(least - most, 3) + 0.0:.3f}"]  # fmt: skip
        rows.append(row)
    size, ends = (" (bits per byte)", "first, last eighth") if causal else ("", "ends, middle")
    head = [*LONG_HEAD, "learning rate", "training, last tenth", "both corpora, each seed"]
    for corpus in CORPORA:
        head += [f"{corpus}{size}", f"{corpus}: {ends}", "difference"]
    tenths = [("m", grid.ONE_PASS / 10), ("base", grid.BASE_TOKENS / 10)]
    searched = [f"{MODELS[cell.model].title} ({cell.size}, {cell.context:,}) {rates_tried(results, cell)}"
                for cell in best_rates(results).values()
                if cell.task == mixed(causal) and (cell.size, cell.tokens) in tenths]  # fmt: skip
    rates = f"\n\nLearning rates with a tenth of the tokens: {'; '.join(sorted(searched))}." if searched else ""
    return (table(head, rows) if rows else "No cells yet.") + rates


def beyond(results: Results, causal: bool = True) -> str:
    """Loss beyond the training context, mean of both corpora, seed by seed, of the long trainings, and of the longest
    shorter one of each model without all lengths that has them."""

    def whole(cell: Cell) -> bool:
        return any(len(seed["lengths"]) == len(grid.BEYOND) for seed in seeds_of(results, cell))

    def each(found: list[dict | None]) -> str:
        if not any(found):
            return "-"
        return ", ".join("-" if length is None else f"{length['loss']:.3f}" for length in found)

    cells, best = passed(results, causal), best_rates(results)
    shown = dict.fromkeys(cells)
    for cell in cells:
        like = [other for other in best.values() if replace(other, tokens=cell.tokens, rate=cell.rate) == cell]
        longest = max((other for other in like if whole(other)), key=lambda other: other.tokens, default=None)
        shown |= {} if longest is None or any(whole(other) for other in like if other in cells) else {longest: None}
    head, rows = [*LONG_HEAD, "loss", *(f"at {factor} times the context" for factor in grid.BEYOND)], []
    for cell in shown:
        seeds = [seed for seed in seeds_of(results, cell) if seed["lengths"]]
        if seeds:
            own = ", ".join(f"{final_loss(seed):.3f}" for seed in seeds)
            longer = [
                each([seed["lengths"].get(f"{factor * cell.context}") for seed in seeds]) for factor in grid.BEYOND
            ]
            rows.append([*long_head(results, cell), own, *longer])
    return table(head, rows) if rows else "No cells yet."


SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def crossings(results: Results, causal: bool = True) -> str:
    """Validation loss during the long trainings, against tokens, and when they reach what Transformer++ ends with."""
    rows, best = [], best_rates(results)
    for cell in passed(results, causal):
        curve = results[cell]["valid_curve"]
        points = [curve[max(0, round(share * len(curve)) - 1)] for share in SHARES]
        per_step = results[cell]["tokens_per_step"] / 1e6
        ms, reached, seconds = step_ms(results, cell, results[cell]["machine"]), "-", "-"
        rival = best.get((RIVAL, cell.size, cell.task, cell.context, cell.tokens))
        if rival is not None:
            other = results[rival]
            steps = steps_to(curve, other["valid_curve"][-1][1])
            reached = "never" if steps is None else f"{steps * per_step:.0f} M"
            other_ms = step_ms(results, rival, other["machine"])
            if None not in (steps, ms, other_ms):
                seconds = f"{steps * ms / 1e3:,.0f} of {other['steps'] * other_ms / 1e3:,.0f}"
        rows.append([*long_head(results, cell), *(f"{loss:.3f} ({step * per_step:.0f} M)" for step, loss in points),
                     "-" if ms is None else f"{ms:.1f}", reached, seconds])  # fmt: skip
    head = [*LONG_HEAD, *(f"{share:.0%}" for share in SHARES), "ms per step", f"{MODELS[RIVAL].title}'s end after",
            "in seconds, of its"]  # fmt: skip
    return table(head, rows) if rows else "No cells yet."


def searched(results: Results) -> str:
    """Changed forms of FLASH+ after a quarter of a pass, and what each gains from the context."""
    cells = [cell for cell in results if cell.task == mixed(causal=True) and cell.tokens == grid.SEARCHED]
    base, rows = mean_or_none(results, cells, grid.PLUS), []
    for cell in sorted(cells, key=lambda cell: final_loss(results[cell])):
        result = results[cell]
        decay = recipe_of(cell).weight_decay
        title = MODELS[cell.model].title + (f", weight decay {decay}" if decay != RECIPE.weight_decay else "")
        row = [title, f"{cell.rate:g}", f"{final_loss(result):.3f}",
               "-" if base is None else f"{final_loss(result) - base:+.3f}"]  # fmt: skip
        for found in result["corpora"].values():
            parts = eighths(found["final"])
            row += [f"{found['final']['loss']:.3f}", f"{round(parts[0] - parts[-1], 3) + 0.0:.3f}"]
        rows.append([*row, f"{result['step']['median']:.1f}" if "step" in result else "-", result["machine"]])
    head = ["form", "learning rate", "loss", f"against {MODELS[grid.PLUS].title}"]
    for corpus in CORPORA:
        head += [corpus, f"{corpus}: first less last eighth"]
    return table([*head, "ms per step", "machine"], rows) if rows else "No cells yet."


def mean_or_none(results: Results, cells: list[Cell], model: str) -> float | None:
    """The loss of the cell of this model, or None without one."""
    return next((final_loss(results[cell]) for cell in cells if cell.model == model), None)


# Those that interrupted trainings are compared with.
COMPARED = ("flash", grid.PLUS, RIVAL, "gau-softmax", "plus-keys-delta")


def unfinished(results: Results) -> str:
    """Trainings that were interrupted and left no cell: the last validation seen of each, beside that of finished
    trainings with the same schedule after the same steps."""
    rows, best = [], best_rates(results)
    for path in sorted(UNFINISHED.glob("*.json")):
        cell, result = Cell.parse(path.stem), json.loads(path.read_text(encoding="utf-8"))
        if cell in results:
            continue
        step, loss = result["valid_curve"][-1]
        row = [cell.task.replace("-", ", "), f"{cell.context:,}", f"{cell.tokens:g} M",
               f"{step:,} of {result['steps']:,}", MODELS[cell.model].title, f"{loss:.3f}"]  # fmt: skip
        for model in COMPARED:
            other = best.get((model, cell.size, cell.task, cell.context, cell.tokens))
            seen = {} if other is None else dict(results[other]["valid_curve"])
            row.append(f"{loss - seen[step]:+.3f}" if step in seen and cell.model != model else "-")
        rows.append((cell.task, -cell.tokens, loss, [*row, result["why"]]))
    head = ["task", "context", "tokens of the schedule", "steps", "model", "validation loss"]
    head += [f"less {MODELS[model].title}'s" for model in COMPARED]
    return table([*head, "ended because"], [row for *_, row in sorted(rows)]) if rows else "None."


def ablations(results: Results) -> str:
    """Tables 1 and 2, and figure 3, of the paper."""
    rows = []
    for size in SIZES_SHOWN:
        best = chosen(results, size, SHORT["tokens"])
        for name in grid.ABLATIONS:
            cell = best.get((name, SHORT["task"], SHORT["context"]))
            if cell is not None:
                ms = step_ms(results, cell)
                rows.append([MODELS[name].title, size, f"{results[cell]['parameters'] / 1e6:.2f} M",
                             loss_text(results, cell), rates_tried(results, cell),
                             "-" if ms is None else f"{ms:.1f}"])  # fmt: skip
    head = ["model", "size", "parameters", "loss", "loss by learning rate", "ms per step"]
    return table(head, rows) if rows else "No cells yet."


def where(results: Results) -> str:
    """Machines, versions and commits of the cells."""
    groups: dict[str, int] = {}
    for result in results.values():
        versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("python", "torch", "transformers"))
        key = f"{result['machine']}, {versions}, commit {(result['commit'] or 'unknown')[:10]}"
        groups[key] = groups.get(key, 0) + 1
    return "\n".join(f"- {count} cells: {key}" for key, count in sorted(groups.items())) or "No cells yet."


SECTIONS = {
    "goals": goals, "headline": headline, "budgets": budgets, "times": times, "forms": forms, "recall": recall,
    "positions": positions, "branch": branch, "lasting": lasting, "beyond": beyond, "crossings": crossings,
    "lasting-masked": partial(lasting, causal=False), "beyond-masked": partial(beyond, causal=False),
    "crossings-masked": partial(crossings, causal=False),
    "searched": searched, "unfinished": unfinished, "ablations": ablations, "where": where,
}  # fmt: skip


def render(results: Results) -> str:
    """All sections, each between the marks that the document has it between."""
    return "\n\n".join(between(name, section(results)) for name, section in SECTIONS.items()) + "\n"


def between(name: str, text: str) -> str:
    return f"<!-- study: {name} -->\n{text}\n<!-- end -->"


def fill(document: str, results: Results) -> str:
    """`document` with every section between its marks rendered again.

    Raises:
        ValueError: a mark names no section.
    """

    def one(match: re.Match) -> str:
        if match[1] not in SECTIONS:
            raise ValueError(f"study: there is no section {match[1]!r}; there are {', '.join(SECTIONS)}.")
        return between(match[1], SECTIONS[match[1]](results))

    return re.sub(r"<!-- study: (\S+) -->\n(?:.*?\n)??<!-- end -->", one, document, flags=re.DOTALL)


def draw(results: Results, folder: Path) -> list[Path]:
    """Figures 5 and 6 of the paper (quality against seconds, one picture for each task with more than one model), and
    figure 3 (quality against the time of a step, at several sizes)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best, written = chosen(results), []
    folder.mkdir(parents=True, exist_ok=True)

    def save(figure, name: str) -> None:
        figure.tight_layout()
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=80, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)

    for task in sorted({task for _, task, _ in best if task not in RECALL_TASKS}):
        contexts = sorted({context for _, other, context in best if other == task})
        shown = {model for context in contexts for model in shown_models(best, task, context)}
        colours = {model: f"C{index}" for index, model in enumerate(model for model in MODELS if model in shown)}
        figure, axes = plt.subplots(1, len(contexts), figsize=(3.6 * len(contexts), 3), squeeze=False, sharey=True)
        for axis, context in zip(axes[0], contexts, strict=True):
            for model in shown_models(best, task, context):
                cell = best[model, task, context]
                ms = step_ms(results, cell)
                if ms is not None:
                    curve = results[cell]["valid_curve"][1:]  # without the fall from chance
                    axis.plot([step * ms / 1e3 for step, _ in curve], [loss for _, loss in curve],
                              color=colours[model], label=MODELS[model].title)  # fmt: skip
            axis.set(title=f"{task.replace('-', ', ')}, context {context:,}", xlabel="seconds, alone on the GPU")
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("validation loss, nats per token")
        save(figure, task)

    for causal, name in ((True, "one-pass"), (False, "one-pass-masked")):
        cells = [cell for cell in passed(results, causal) if cell.tokens in (grid.ONE_PASS, grid.BASE_TOKENS)]
        groups = list(dict.fromkeys((cell.size, cell.context, cell.tokens) for cell in cells))
        if not cells:
            continue
        colours = {model: f"C{i}" for i, model in enumerate(dict.fromkeys(cell.model for cell in cells))}
        figure, axes = plt.subplots(2, len(groups), figsize=(4.8 * len(groups), 7.5), squeeze=False, sharey=True)
        for (tokens, seconds), group in zip(axes.T, groups, strict=True):
            for cell in (cell for cell in cells if (cell.size, cell.context, cell.tokens) == group):
                steps, losses = zip(*results[cell]["valid_curve"][1:], strict=True)
                look = {"color": colours[cell.model], "label": MODELS[cell.model].title}
                tokens.plot([step * results[cell]["tokens_per_step"] / 1e6 for step in steps], losses, **look)
                if (ms := step_ms(results, cell, results[cell]["machine"])) is not None:
                    seconds.plot([step * ms / 1e3 for step in steps], losses, **look)
            tokens.set(title="size {}, context {:,}, {:g} M tokens".format(*group), xlabel="million tokens")
            seconds.set(xlabel="seconds, alone on the " + results[cells[0]]["machine"].removeprefix("NVIDIA "))
        for axis in axes.flat:
            axis.grid(alpha=0.3)
        for axis in axes[:, 0]:
            axis.set_ylabel("validation loss, nats per token")
        named = {line.get_label(): line for axis in axes[0] for line in axis.lines}
        figure.legend(named.values(), named.keys(), fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0))
        save(figure, name)

    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    for model in grid.SCALED:
        cells = [chosen(results, size, SHORT["tokens"]).get((model, SHORT["task"], SHORT["context"]))
                 for size in SIZES_SHOWN]  # fmt: skip
        points = [(step_ms(results, cell), mean_loss(results, cell)) for cell in cells if cell is not None]
        points = [point for point in points if point[0] is not None]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", label=MODELS[model].title)
    if axis.lines:
        axis.set(title="Wikipedia, masked, context 512, three sizes", xlabel="ms per training step",
                 ylabel="validation loss, nats per token")  # fmt: skip
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
        save(figure, "sizes")
    plt.close(figure)
    return written


def shown_models(best: Iterable[tuple[str, str, int]], task: str, context: int) -> list[str]:
    return [model for model in MODELS if (model, task, context) in best and model not in HIDDEN]


__all__ = ["SECTIONS", "draw", "fill", "render", "steps_to"]
