# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of scripts.benchmark from its CSV files; losses and cases without numbers are shown too."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .cases import COLUMNS


PAPER = ("flash", "transformer++")
TITLES = {
    "flash": "FLASH", "flash-plus": "plain-key FLASH+", "flash-plus-keys": "FLASH+",
    "flash-plus-delta": "FLASH+, delta rule", "flash-torch": "FLASH, PyTorch", "flash-quad": "FLASH-Quad",
    "transformer++": "Transformer++", "llama": "Llama (transformers)", "flash-pytorch": "FLASH-pytorch", "gla": "GLA",
    "gated-deltanet": "Gated DeltaNet",
}  # fmt: skip


@dataclass
class Result:
    """All rows of one (model, direction, measurement, context, batch); its value is their median."""

    rows: list[dict] = field(default_factory=list)

    def _median(self, column: str) -> float | None:
        values = [float(row[column]) for row in self.rows if row[column]]
        return statistics.median(values) if values else None

    @property
    def ms(self) -> float | None:
        return self._median("ms")

    @property
    def spread(self) -> str:
        """Lowest first and highest third quartile of the rows."""
        lows, highs = ([float(row[name]) for row in self.rows if row[name]] for name in ("ms_q25", "ms_q75"))
        return f"{number(min(lows))} - {number(max(highs))}" if lows else ""

    @property
    def tokens(self) -> float | None:
        return self._median("tokens")

    @property
    def memory(self) -> float | None:
        return self._median("peak_gib")

    @property
    def mfu(self) -> float | None:
        return self._median("mfu")

    @property
    def note(self) -> str:
        return self.rows[-1]["note"]


Results = dict[tuple[str, str, str, int, int], Result]


def read(paths: Iterable[Path]) -> Results:
    """The results in CSV files.

    Raises:
        ValueError: a file does not have the columns of this benchmark.
    """
    found: Results = {}
    for path in paths:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{path} is not a table of scripts.benchmark: its columns are {reader.fieldnames}.")
            for row in reader:
                key = (row["model"], row["direction"], row["measurement"], int(row["context"] or 0),
                       int(row["batch"] or 0))  # fmt: skip
                found.setdefault(key, Result()).rows.append(row)
    return found


def number(value: float | None) -> str:
    """Three digits without an exponent; a dash for None."""
    if value is None:
        return "-"
    magnitude = len(str(int(abs(value))))
    return f"{value:.{max(0, 3 - magnitude)}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pick(results: Results, model: str, measurement: str, context: int, direction="causal", batch=None):
    """The result with these keys, or None; only decoding needs `batch`."""
    for (name, way, what, length, rows), result in results.items():
        if (name, way, what, length) == (model, direction, measurement, context) and batch in (None, rows):
            return result
    return None


def ratio(slow: Result | None, fast: Result | None, column: str = "ms") -> float | None:
    """The first over the second; None where either is missing."""
    if slow is None or fast is None or not getattr(slow, column) or not getattr(fast, column):
        return None
    return getattr(slow, column) / getattr(fast, column)


# ------------------------------------------------------------------------------------------------------------------
# Targets
# ------------------------------------------------------------------------------------------------------------------
def targets(results: Results) -> list[tuple[str, float | None, str, float, str]]:
    """The targets as `(what, value, relation, bound, remark)`; the value is None where a measurement is missing."""

    def at(model, measurement, context, direction="causal", batch=None):
        return pick(results, model, measurement, context, direction, batch)

    rows = []
    causal = {512: 1.0, 2048: 1.15, 8192: 1.75, 32_768: 4.4, 65_536: 7.5}
    for direction, bounds in (("causal", causal), ("bidirectional", {512: 1.0, 8192: 2.6})):
        for context, bound in bounds.items():
            steps = (at(model, "train", context, direction) for model in ("transformer++", "flash"))
            what = f"training step, {direction}, {context} tokens: Transformer++ / FLASH"
            rows.append((what, ratio(*steps), ">=", bound, ""))

    for model in ("flash-plus", "flash-plus-keys"):
        value, remark = worst(results, model, "flash")
        rows.append((f"training step: {TITLES[model]} / FLASH", value, "<=", 1.04, remark))
    for model in ("flash", "flash-plus-keys"):
        issued = at(model, "train, issued", 512)
        rows.append((f"time to issue that step, {TITLES[model]}, 512, ms", issued and issued.ms, "<=", 45, ""))
    value = ratio(at("flash", "little, train", 2048), at("flash", "little, train, CUDA graph", 2048))
    rows.append(("12 layers of 512: step / its CUDA graph", value, "<=", 1.15, ""))
    for direction in ("causal", "bidirectional"):
        for context in (512, 2048):
            steps = (at(model, "train", context, direction) for model in ("flash-quad", "transformer++"))
            what = f"training step, {direction}, {context} tokens: FLASH-Quad / Transformer++"
            rows.append((what, ratio(*steps), "<=", 1.15, ""))

    per_token = {
        key[3]: result.ms / result.tokens
        for key, result in results.items()
        if key[:3] == ("flash", "causal", "train") and result.ms
    }
    spread = max(per_token.values()) / min(per_token.values()) - 1 if len(per_token) > 1 else None
    remark = f"{min(per_token)} to {max(per_token)} tokens" if per_token else ""
    rows.append(("flatness: slowest over fastest time per token, minus 1", spread, "<=", 0.06, remark))

    train = at("flash", "train", 8192)
    rows.append(("share of the measured matmul rate, causal, 8192", train and train.mfu, ">=", 0.6, ""))
    other = at("transformer++", "train", 8192)
    bound = other.memory if other and other.memory else 22.4
    rows.append(("peak memory of that step, GiB, against Transformer++'s", train and train.memory, "<=", bound, ""))
    saved = at("flash", "train, checkpointing", 8192)
    rows.append(("the same with gradient checkpointing, GiB", saved and saved.memory, "<=", 14, ""))
    peer = at("flash-pytorch", "train", 8192)
    rows.append(("training step, 8192: FLASH-pytorch / FLASH", ratio(peer, train), ">=", 2.5, ""))
    rows.append(("memory, 8192: FLASH / FLASH-pytorch", ratio(train, peer, "memory"), "<=", 0.6, ""))
    for model in ("gla", "gated-deltanet"):
        value, remark = worst(results, model, "flash", min)
        rows.append((f"training step: {TITLES[model]} / FLASH", value, ">=", 1.0, remark))
    for context in (1024, 65_536):
        step = at("flash", "decode", context, batch=1)
        rows.append((f"decoding, batch 1, {context} tokens of context, ms per token", step and step.ms, "<=", 1.2, ""))
    mine, other = at("flash", "decode", 32_768, batch=64), at("transformer++", "decode", 32_768, batch=64)
    remark = f"Transformer++: {other.note}" if other and other.ms is None else ""
    rows.append(("decoding, batch 64, 32768: tokens/s over Transformer++", ratio(other, mine), ">=", 10, remark))
    value = ratio(at("transformer++", "prefill", 65_536), at("flash", "prefill", 65_536))
    rows.append(("prefill of 65536 tokens: Transformer++ / FLASH", value, ">=", 5, ""))
    for batch in (1, 32):
        value = ratio(*(at(model, "generate", 512, batch=batch) for model in ("flash", "llama")))
        rows.append((f"generate(), batch {batch}, after 512 tokens: FLASH / Llama", value, "<=", 1.0, ""))
    static = at("flash", "generate, static cache", 512)
    rows.append(("generate() with a static cache, batch 1, ms per token", static and static.ms, "<=", 1.5, ""))
    value = ratio(*(at(model, "cpu generate", 512, batch=8) for model in ("flash", "llama")))
    rows.append(("CPU, generate(), batch 8, after 512 tokens: FLASH / Llama", value, "<=", 1.3, ""))
    for context in (2048, 8192):
        value = ratio(at("flash-pytorch", "cpu train", context), at("flash", "cpu train", context))
        rows.append((f"CPU, training step, {context}: FLASH-pytorch / FLASH", value, ">=", 1.5, ""))
    return rows


def worst(results: Results, model: str, other: str, of: Callable = max) -> tuple[float | None, str]:
    """The largest ratio of two models' causal training steps over the contexts that both have, and these contexts."""
    found = {
        key[3]: ratio(result, pick(results, other, "train", key[3]))
        for key, result in results.items()
        if key[:3] == (model, "causal", "train")
    }
    found = {context: value for context, value in found.items() if value}
    return of(found.values()) if found else None, f"worst of {', '.join(map(str, sorted(found)))}" if found else ""


def target_table(results: Results, every: bool = True) -> str:
    """The targets as Markdown, `every` one or those with a value."""
    lines = []
    for what, value, relation, bound, remark in targets(results):
        if value is None and not every:
            continue
        met = "" if value is None else "yes" if (value >= bound if relation == ">=" else value <= bound) else "**no**"
        met = met or "not measured"
        lines.append([what, number(value), f"{relation} {number(bound)}", f"{met}; {remark}" if remark else met])
    return markdown(["what", "measured", "target", "met"], lines)


# ------------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------------
def grid(results: Results, measurement: str, direction: str, cell, by_batch: bool = False) -> str | None:
    """Models by contexts; a case without numbers shows its note."""
    chosen = {key: result for key, result in results.items() if key[1:3] == (direction, measurement)}
    if not chosen:
        return None
    places = sorted({(key[4] if by_batch else 0, key[3]) for key in chosen})
    models = list(dict.fromkeys(key[0] for key in chosen))
    rows = []
    for model in models:
        row = [model]
        for batch, context in places:
            result = pick(results, model, measurement, context, direction, batch if by_batch else None)
            row.append("-" if result is None else cell(result) if result.ms is not None else result.note)
        rows.append(row)
    header = [f"batch {batch}, {context}" if by_batch else str(context) for batch, context in places]
    return markdown(["model \\ context", *header], rows)


def tables(results: Results) -> str:
    """Everything as Markdown: machines and versions, the targets, and every measurement."""
    rows = [row for result in results.values() for row in result.rows]
    if not rows:
        return "No rows."

    def values(name: str) -> str:
        return ", ".join(sorted({row[name] for row in rows if row[name]}))

    parts = [
        f"Measured on {values('gpu')} (machine {values('machine')}), commit {values('commit')}, torch "
        f"{values('torch')}, triton {values('triton')}, transformers {values('transformers')}, "
        f"{min(row['date'] for row in rows)} to {max(row['date'] for row in rows)}. Medians."
    ]
    for key, result in results.items():
        if key[0] == "device":
            parts.append(f"{key[2]}: {number(result.ms)} ms, {result.note}")
    parts += ["### Targets", target_table(results)]
    measurements = dict.fromkeys((key[2], key[1]) for key in results if key[1])
    for measurement, direction in measurements:
        decode = "decode" in measurement or "generate" in measurement
        unit = "ms per token (quartiles)" if decode else "ms (quartiles)"
        cells = {unit: lambda result: f"{number(result.ms)} ({result.spread})"}
        if not decode:
            cells["thousand tokens/s"] = lambda result: number(result.tokens / result.ms if result.tokens else None)
        if any(result.memory for key, result in results.items() if key[2] == measurement):
            cells["peak memory, GiB"] = lambda result: number(result.memory)
        if any(result.mfu for key, result in results.items() if key[2] == measurement):
            cells["share of the matmul rate"] = lambda result: (
                "-" if result.mfu is None else f"{100 * result.mfu:.1f} %"
            )
        for title, cell in cells.items():
            parts += [f"### {measurement}, {direction}: {title}", grid(results, measurement, direction, cell, decode)]
    # Processes that failed or timed out left rows without a direction.
    stopped = [f"- {key[0]}, {key[2]}: {result.note}" for key, result in results.items() if not (key[1] or result.ms)]
    if stopped:
        parts += ["### Not finished", "\n".join(stopped)]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------------------------
# Plots
# ------------------------------------------------------------------------------------------------------------------
def curves(results: Results, measurement: str, value, direction="causal", batch=None) -> dict[str, list[tuple]]:
    """`{model: [(context, value)]}` in ascending contexts, without the cases that have no numbers."""
    found: dict[str, list[tuple]] = {}
    for (model, way, what, context, rows), result in results.items():
        if (way, what) == (direction, measurement) and batch in (None, rows) and result.ms is not None:
            if (y := value(result)) is not None:
                found.setdefault(model, []).append((context, y))
    return {model: sorted(points) for model, points in found.items()}


def plots(results: Results, folder: Path) -> list[Path]:
    """Write PNGs of time per token (the paper's figures 5a and 6a), memory and decoding; return their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def per_thousand(result: Result) -> float | None:
        return result.ms / result.tokens * 1e3 if result.tokens else None

    sheets = {
        "train_causal": ("Training step, causal", "ms per 1,000 tokens", curves(results, "train", per_thousand)),
        "train_bidirectional": (
            "Training step, bidirectional", "ms per 1,000 tokens",
            curves(results, "train", per_thousand, "bidirectional"),
        ),
        "forward_causal": ("Forward, causal", "ms per 1,000 tokens", curves(results, "forward", per_thousand)),
        "memory": ("Peak memory of a training step, causal", "GiB", curves(results, "train", lambda r: r.memory)),
        "decode": ("Decoding, batch 1", "ms per token", curves(results, "decode", lambda r: r.ms, batch=1)),
    }  # fmt: skip
    where = ", ".join(sorted({row["gpu"] for result in results.values() for row in result.rows if row["gpu"]}))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (title, unit, lines) in sheets.items():
        if not lines:
            continue
        figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        for model, points in lines.items():
            contexts, heights = zip(*points, strict=True)
            width = 2.4 if model in PAPER else 1.2
            axes.plot(contexts, heights, marker="o", linewidth=width, label=TITLES.get(model, model))
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        ticks = sorted({context for points in lines.values() for context, _ in points})
        axes.set_xticks(ticks, [f"{tick // 1024}K" if tick >= 1024 else str(tick) for tick in ticks])
        axes.set(title=f"{title}\n{where}", xlabel="context, tokens", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        written.append(path)
    return written


__all__ = ["Result", "curves", "plots", "read", "tables", "targets"]
