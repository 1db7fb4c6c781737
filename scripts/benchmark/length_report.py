# SPDX-License-Identifier: Apache-2.0
"""Tables and the figure of scripts.benchmark.length from its JSON files; the cost on more devices, by arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .report import TITLES, markdown, number


STYLES = {
    "flash": ("FLASH", "#e08214", "o-"), "plus": ("plain-key FLASH+", "#b35806", "^--"),
    "plus-keys": ("FLASH+", "#7f3b08", "v-."),
    "bidirectional": ("FLASH, bidirectional", "#80b1a0", "s:"),
    "transformer++": (TITLES["transformer++"], "#4393c3", "D-"),
}  # fmt: skip
# Bytes per second between hosts that the model of cost assumes: a link of 400 Gb/s for each GPU.
HOST_LINK = 50e9


def read(paths: Iterable[Path]) -> list[dict]:
    """The rows of all files, each with the machine and the commit that its file names."""
    rows = []
    for path in paths:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
        made_by = {name: run["made_by"][name] for name in ("machine", "commit")}
        rows += [{**made_by, **row} for row in run["rows"] if "note" not in row]
    return rows


def pick(rows: list[dict], **keys) -> list[dict]:
    """The rows in which these keys have these values; None for a key that is missing."""
    return [row for row in rows if all(row.get(name) == value for name, value in keys.items())]


def latest(rows: list[dict], name: str) -> float | None:
    """A column of the last row that has it: files are read in the order of their names, and later ones count."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return values[-1] if values else None


def steps(rows: list[dict], form: str, name: str) -> dict[int, float]:
    """A column of the training steps on one device, by context."""
    alone = [row for row in pick(rows, form=form) if row["part"] == "train" or row.get("devices") == 1]
    values = {context: latest(pick(alone, context=context), name) for context in {row["context"] for row in alone}}
    return {context: values[context] for context in sorted(values) if values[context] is not None}


def short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 2**20 else f"{tokens >> 10}K"


def train_table(rows: list[dict]) -> str:
    times, sizes = ({form: steps(rows, form, name) for form in STYLES} for name in ("us_per_token", "peak_gib"))
    contexts = sorted({context for values in times.values() for context in values})
    lines = []
    for form, (title, *_) in STYLES.items():
        cells = [(times[form].get(context), sizes[form].get(context)) for context in contexts]
        if times[form]:
            lines.append(
                [title, *("-" if time is None else f"{number(time)} / {number(size)}" for time, size in cells)]
            )
    return markdown(["training step, us per token / peak GiB", *map(short, contexts)], lines)


def prefill_table(rows: list[dict]) -> str:
    lines = []
    for form, (title, *_) in STYLES.items():
        whole = [row for row in pick(rows, part="prefill", form=form) if "pieces" in row]
        if not whole:
            continue
        context = whole[0]["context"]
        pieces = [row for row in pick(rows, part="prefill", form=form, pieces=None) if row["us_per_token"]]
        second, last = (pick(pieces, context=place) for place in (2 * context // whole[0]["pieces"], context))
        decode = pick(rows, part="decode", form=form)
        after = [latest(pick(decode, context=place), "ms_least") for place in (1024, context)]
        lines.append([
            title, number(latest(second, "us_per_token")), number(latest(last, "us_per_token")),
            number(latest(whole, "ms") / 1e3), number(latest(whole, "peak_gib")), *map(number, after),
            number(latest(decode, "cache_bytes") / 2**20),
        ])  # fmt: skip
    header = [
        "prefill of 1M tokens in pieces of 64K", "second piece, us per token", "last piece", "all, s", "peak GiB",
        "then a token after 1K, ms", "after 1M", "state, MiB",
    ]  # fmt: skip
    return markdown(header, lines)


def scaling_table(rows: list[dict]) -> str:
    lines = []
    for row in pick(rows, part="scaling"):
        if row["devices"] > 1:
            cells = [row["ms"] / 1e3, row["us_per_token"], row["peak_gib"], row["strong"], row["weak"]]
            lines.append([STYLES[row["form"]][0], str(row["devices"]), short(row["context"]), *map(number, cells)])
    header = ["context parallelism", "devices", "tokens per row", "step, s", "us per token", "peak GiB each",
              "speedup over one", "weak-scaling efficiency"]  # fmt: skip
    return markdown(header, lines)


def error_table(rows: list[dict]) -> str:
    def cut_over(row: dict) -> str:
        if row.get("exchange") == "gloo":
            return f"{row['devices']} processes on one GPU, gloo"
        return f"{row.get('devices', 2)} GPUs"  # rows of older files name none

    lines = [
        [STYLES[row["form"]][0], f"{row['tokens']:,}", cut_over(row),
         "PyTorch" if row["backend"] == "torch" else "kernels",
         row["worst"].removeprefix("model."), f"{100 * row['error_cut']:.2f} %", f"{100 * row['error_whole']:.2f} %"]
        for row in pick(rows, part="error")
    ]  # fmt: skip
    header = ["bfloat16 gradients against float64", "tokens", "cut over", "by", "worst parameter", "error of cut rows",
              "of whole rows"]  # fmt: skip
    return markdown(header, lines)


def links_table(rows: list[dict]) -> str:
    lines = [
        [row["collective"], str(row["devices"]), number(row["bytes"] / 1e6), f"{1e3 * row['ms']:,.0f}"]
        for row in pick(rows, part="links")
    ]
    return markdown(["collective alone", "devices", "MB of each device", "us"], lines)


def projection(rows: list[dict], devices: int = 64, form: str = "flash") -> dict[str, float]:
    """Milliseconds of a step of `devices` x 1,048,576 tokens, by arithmetic from one and two devices.

    What the second device adds at 524,288 tokens per device is taken as it is. More devices add what they send: per
    pass and layer each receives the sums of all others, and once the gradients of all parameters in bfloat16, both at
    `HOST_LINK`. Nothing overlaps.
    """
    part, longest = 2**19, 2**20
    alone = steps(rows, form, "ms")
    cut = latest(pick(rows, part="scaling", form=form, devices=2, context=longest), "ms")
    sums, layers, passes, parameters = 128 * 1536 * 4, 24, 3, 112.0e6
    exchange = 1e3 * passes * layers * sums * (devices - 2) / HOST_LINK
    gradients = 1e3 * 2 * 2 * parameters / HOST_LINK
    return {
        "alone": alone[longest], "second device": cut - alone[part], "exchange": exchange, "gradients": gradients,
        "total": alone[longest] + cut - alone[part] + exchange + gradients,
    }  # fmt: skip


def projection_text(rows: list[dict]) -> str:
    ms = projection(rows)
    share = 1 - ms["alone"] / ms["total"]
    return (
        f"Projection for 64 GPUs and rows of 64M tokens: {ms['alone'] / 1e3:.2f} s for a step of one GPU at 1M "
        f"(measured), {ms['second device']:.0f} ms that a second GPU adds (measured), {ms['exchange']:.0f} ms for the "
        f"sums of 62 more and {ms['gradients']:.0f} ms for the gradients at 50 GB/s (assumed, a link of 400 Gb/s per "
        f"GPU). Total: {ms['total'] / 1e3:.2f} s, of which context parallelism takes {100 * share:.1f} %."
    )


def tables(rows: list[dict]) -> str:
    """Everything as Markdown."""
    parts = [train_table(rows), prefill_table(rows), scaling_table(rows), error_table(rows)]
    if pick(rows, part="links"):
        parts.append(links_table(rows))
    return "\n\n".join([*parts, projection_text(rows)])


def points(rows: list[dict]) -> dict[str, dict[str, list]]:
    """What the figure shows: time and memory by form."""
    found = {name: {form: steps(rows, form, name) for form in STYLES} for name in ("us_per_token", "peak_gib")}
    return {name: {form: list(line.items()) for form, line in lines.items() if line} for name, lines in found.items()}


def plot(rows: list[dict], path: Path) -> None:
    """Write the figure; its PNG description holds the plotted numbers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = points(rows)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    titles = {"us_per_token": ("Time", "microseconds per token"), "peak_gib": ("Peak memory", "GiB")}
    for axis, (name, (title, unit)) in zip(axes, titles.items(), strict=True):
        for form, line in shown[name].items():
            if line:
                label, colour, style = STYLES[form]
                filled = "white" if form == "plus" else colour  # one curve would cover the other
                axis.plot(*zip(*line, strict=True), style, color=colour, markerfacecolor=filled, label=label)
        ticks = sorted({context for line in shown[name].values() for context, _ in line})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(1, 2 * max(value for line in shown[name].values() for _, value in line))
        axis.set_xticks(ticks, map(short, ticks))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set(title=title, xlabel="context, tokens", ylabel=unit)
        axis.grid(alpha=0.3)
    figure.suptitle(
        "Training step with gradient checkpointing, at least 131,072 tokens, one "
        + ", ".join(sorted({row["machine"] for row in pick(rows, part="train")}))
    )
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Description": json.dumps(shown)})
    plt.close(figure)


__all__ = ["plot", "points", "projection", "read", "tables"]
