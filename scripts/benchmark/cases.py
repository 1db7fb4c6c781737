# SPDX-License-Identifier: Apache-2.0
"""The cases of each group of scripts.benchmark, and the CSV that each row is appended to once it is measured."""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers

from ..provenance import commit, processor, triton_version
from .models import MODELS, Candidate, Unsupported, build, build_head, first_layers, parameter_count
from .sizes import BASE, LITTLE, SMALL, SMOKE, Size, model_flops, utilisation
from .timing import (
    Timing,
    capture,
    clean,
    copy_rate,
    matmul_rate,
    measure,
    measure_assisted_call,
    measure_generation,
    measure_issue,
    once,
    peak_gib,
    quartiles,
    training_step,
)


GROUPS = ("matmul", "train", "little", "generate", "decode", "prefill", "layer", "forward", "cpu")
COLUMNS = (
    "date", "machine", "gpu", "commit", "torch", "triton", "transformers", "model", "direction", "measurement",
    "context", "batch", "tokens", "ms", "ms_q25", "ms_q75", "samples", "tokens_per_s", "peak_gib", "mfu", "parameters",
    "note",
)  # fmt: skip
TOKENS = 65_536
# The contexts of the tables come first, in case a run is cut off.
CONTEXTS = (8192, 512, 2048, 65_536, 32_768)
LADDERS = {
    "flash-quad": (512, 2048, 8192),  # the longest rows that its kernels take
    # Models of flash-linear-attention are tuned for minutes at each shape.
    "gla": (8192, 2048, 32_768),
    "gated-deltanet": (8192, 2048, 32_768),
}
STEPS = 32  # decoding steps per sample


def default_groups(args: argparse.Namespace) -> tuple[str, ...]:
    """The groups for the device; all of them in a smoke run."""
    if args.smoke:
        return GROUPS
    return ("cpu",) if args.device == "cpu" else tuple(group for group in GROUPS if group != "cpu")


def default_models(args: argparse.Namespace) -> tuple[str, ...]:
    """In a smoke run the models that need no other packages; otherwise all except variants kept for comparison."""
    if args.smoke:
        return ("flash", "transformer++", "llama", "flash-quad")
    if args.device == "cpu":
        return ("flash", "flash-pytorch", "flash-pytorch-full")
    variants = ("flash-compiled", "transformer++-baseline", "flash-pytorch-full")
    return tuple(name for name in MODELS if name not in variants)


# ------------------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------------------
class Recorder:
    """Appends rows to a CSV, each written before the next is measured."""

    def __init__(self, path: Path, device: str):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8") as file:
                header = tuple(next(csv.reader(file)))
            if header != COLUMNS:
                raise ValueError(
                    f"--output {path} is not a table of this benchmark (columns {header}): name another file."
                )
        gpu = torch.cuda.get_device_name() if device == "cuda" else processor()
        self.common = {
            "machine": platform.node(), "gpu": gpu, "commit": commit(), "torch": torch.__version__,
            "triton": triton_version(), "transformers": transformers.__version__,
        }  # fmt: skip

    def add(self, timing: Timing | None = None, **values) -> None:
        row = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), **self.common, **values}
        if timing is not None:
            row |= {"ms": timing.median, "ms_q25": timing.q25, "ms_q75": timing.q75, "samples": timing.samples}
            if row.get("tokens"):
                row["tokens_per_s"] = row["tokens"] / timing.median * 1e3
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = f"{value:.6g}"
        empty = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if empty:
                writer.writeheader()
            writer.writerow(row)
        what = [str(row.get(name, "")) for name in ("model", "direction", "measurement", "context", "batch")]
        took = f"{row['ms']} ms [{row['ms_q25']}, {row['ms_q75']}]" if timing is not None else "-"
        more = [f"{name} {row[name]}" for name in ("peak_gib", "mfu") if row.get(name) is not None]
        print("  ".join([*what, took, *more, row.get("note", "")]), flush=True)


# ------------------------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One measurement, in one direction, on `batch` sequences of `context` tokens."""

    measurement: str
    context: int
    batch: int
    causal: bool = True
    recompute: bool = False
    graph: bool = False  # the step captured as one CUDA graph
    issue: bool = False  # the time until the step is issued, not done

    @property
    def direction(self) -> str:
        return "causal" if self.causal else "bidirectional"


def cases(group: str, model: str, smoke: bool, contexts: tuple[int, ...] | None = None) -> list[Case]:
    """The cases of a group, the most important first; only those of `contexts` if given."""
    tokens, middle, longest = (128, 64, 128) if smoke else (TOKENS, 8192, 65_536)
    ladder = (64, 32) if smoke else LADDERS.get(model, CONTEXTS)
    if group == "forward":
        found = [Case(group, context, tokens // context) for context in ladder]
        found.insert(1, Case(group, middle, tokens // middle, causal=False))
    elif group == "train":
        found = [Case(group, context, tokens // context) for context in ladder]
        plus = model.startswith("flash-plus")  # forms for causal models
        if not plus:
            found += [replace(case, causal=False) for case in found if case.context <= middle]
        # Peers are compiled or tuned; that the host keeps up with the device is to be shown for FLASH.
        if model == "flash" or plus:
            found += [
                replace(case, measurement="train, CUDA graph", graph=True) for case in found
                if not smoke and (model == "flash" or case.context == 512)
            ]  # fmt: skip
            found += [Case("train, issued", context, tokens // context, issue=True) for context in ladder[:2]]
        if not plus and model != "flash-quad":
            found.append(Case("train, checkpointing", middle, tokens // middle, recompute=True))
    elif group == "little":
        context = 32 if smoke else 2048
        case = Case("little, train", context, tokens // 2 // context)
        found = [case, replace(case, measurement="little, train, issued", issue=True)]
        if not smoke:
            found.insert(1, replace(case, measurement="little, train, CUDA graph", graph=True))
    elif group == "prefill":
        found = [Case("prefill", longest, 1)]
    elif group == "decode":
        small, large = (32, 2) if smoke else (1024, 64)
        found = [Case("decode", longest, 1), Case("decode", small, 1), Case("decode", longest // 2, large)]
    elif group == "layer":
        found = [
            Case(f"layer, {what}", context, max(1, tokens // context))
            for context in ladder[:4]
            for what in ("forward", "train")
        ]
    else:
        raise ValueError(f"group must be one of {GROUPS}, got {group!r}.")
    return [case for case in found if contexts is None or case.context in contexts]


def prepare(candidate: Candidate, case: Case, size: Size, device: str, dtype: torch.dtype):
    """The call to time for a case, and options of `measure`."""
    shape = (case.batch, case.context, size.width)

    def normal(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    if case.measurement == "decode":
        x = normal(case.batch, 1, size.width)
        candidate.module.eval()
        step, rewind = candidate.decoder(case.batch, case.context, STEPS * 3, x)
        call = capture(step, rewind) if device == "cuda" else step
        return call, {"calls": STEPS, "before": rewind}
    x = normal(*shape)
    if case.measurement == "prefill":
        candidate.module.eval()
        return lambda: candidate.prefill(x), {}
    if case.measurement == "forward":
        return lambda: candidate.hidden(x), {}
    module, hidden = candidate.module, candidate.hidden
    if case.measurement.startswith("layer"):
        # Two gated attention units replace one block of attention and feed-forward.
        module, hidden = first_layers(candidate, len(candidate.module.layers) // size.blocks, x)
        if candidate.compile_layers:
            for layer in module:
                layer.compile(dynamic=False)
        if case.measurement == "layer, forward":
            return lambda: hidden(x), {}
    elif case.recompute:
        candidate.recompute(True)
    step = training_step(module, hidden, x.requires_grad_(), normal(*shape))
    return capture(step) if case.graph else step, {}


def note_of(error: BaseException) -> str:
    """The reason why a case has no numbers, in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, Unsupported):
        return str(error)
    traceback.print_exc()
    return f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def is_training(case: Case) -> bool:
    return "train" in case.measurement


def run_case(case: Case, name: str, candidate: Candidate, size: Size, args, dtype, peak, recorder: Recorder) -> None:
    """Measure a case and record it; failures are recorded too."""
    row = {
        "model": name, "direction": case.direction, "measurement": case.measurement, "context": case.context,
        "batch": case.batch, "tokens": case.batch * (1 if case.measurement == "decode" else case.context),
        "parameters": parameter_count(candidate.module), "note": candidate.note,
    }  # fmt: skip
    clean(args.device)
    # Only the model is kept for the next case; gradients, cache and inputs are freed.
    try:
        with torch.set_grad_enabled(is_training(case)):
            call, options = prepare(candidate, case, size, args.device, dtype)
            timer = measure_issue if case.issue else measure
            timing = timer(call, args.device, reps=args.reps, **options)
        flops = model_flops(name, size, case.context, case.causal)
        if flops is not None and case.measurement.startswith("layer"):
            flops /= size.blocks
        # Decoding is bound by memory, and an issued step is not done: neither has a share of the arithmetic rate.
        if flops is not None and case.measurement != "decode" and not case.issue:
            row["mfu"] = utilisation(flops * (3 if is_training(case) else 1), row["tokens"], timing.median, peak)
        recorder.add(timing, **row, peak_gib=peak_gib(args.device))
    except Exception as error:
        recorder.add(**{**row, "note": note_of(error)})
    finally:
        candidate.module.train()
        candidate.module.zero_grad(set_to_none=True)
        if case.recompute:
            try:
                candidate.recompute(False)
            except Unsupported:
                pass


def run(args: argparse.Namespace, model: str, group: str) -> None:
    """All cases of one group for one model, in `args.rounds` rounds."""
    recorder = Recorder(args.output, args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    size = SMOKE if args.smoke else LITTLE if group == "little" else BASE
    if args.smoke:
        torch.set_num_threads(1)  # with more, threads of models this small only wait for each other
    # As in training; the gate ran in full float32.
    torch.set_float32_matmul_precision("high")
    # Compiled layers see every shape of their cases, and each shape has its own graph.
    torch._dynamo.config.recompile_limit = 64
    if group == "cpu":
        run_cpu(args, recorder)
        return
    if group == "generate":
        run_generate(args, model, dtype, recorder)
        return
    # Measured in this process, since clocks differ between cards and minutes.
    timing, peak = matmul_rate(args.device, dtype, 8192 if args.device == "cuda" else 256)
    if group == "matmul":
        recorder.add(timing, model="device", measurement="matmul", note=f"{peak / 1e12:.4g} TFLOP/s {dtype}")
        timing, rate = copy_rate(args.device, 2**30 if args.device == "cuda" else 2**24)
        recorder.add(timing, model="device", measurement="copy", note=f"{rate / 1e9:.4g} GB/s read and written")
        return
    chosen = cases(group, model, args.smoke, args.contexts)
    for causal in (True, False):
        mine = [case for case in chosen if case.causal == causal]
        if not mine:
            continue
        try:
            # Single layers are compiled once their arguments are recorded (first_layers); decoding is one CUDA graph.
            whole = group not in ("layer", "decode")
            candidate = build(model, size, causal, args.device, dtype, compile=whole)
            candidate.compile_layers = MODELS[model].compiled and group == "layer" and args.device == "cuda"
        except Exception as error:
            for case in mine:
                recorder.add(model=model, direction=case.direction, measurement=case.measurement, context=case.context,
                             batch=case.batch, note=note_of(error))  # fmt: skip
            continue
        for _ in range(args.rounds):
            for case in mine:
                run_case(case, model, candidate, size, args, dtype, peak, recorder)
        del candidate
        clean(args.device)


def run_generate(args: argparse.Namespace, name: str, dtype: torch.dtype, recorder: Recorder) -> None:
    """Milliseconds per token of `generate()` as it is called by default, and on a GPU with a static cache as well; and
    of a call of assisted decoding, of 6 tokens of which 3 are kept."""
    prompt, new, vocabulary, size, batches = 512, 32, 32_000, BASE, (1, 32)
    if args.device == "cpu":
        vocabulary, size, batches = 8192, replace(SMALL, layers=12), (1, 8)
        torch.set_num_threads(1)
    if args.smoke:
        prompt, new, vocabulary, size, batches = 24, 2, 128, SMOKE, (2,)
    on_cpu = "cpu " if args.device == "cpu" else ""
    timers = [(f"{on_cpu}generate", batch, batch, partial(measure_generation, new=new)) for batch in batches]
    if args.device == "cuda":
        static = partial(measure_generation, new=new, cache_implementation="static")
        timers.append(("generate, static cache", 1, 1, static))
    timers.append((f"{on_cpu}assisted call", 1, 6, partial(measure_assisted_call, new=6, kept=3)))
    row = {"model": name, "direction": "causal", "context": prompt}
    try:
        model = build_head(name, size, vocabulary, args.device, dtype)
    except Unsupported as error:
        for what, batch, *_ in timers:
            recorder.add(**row, measurement=what, batch=batch, note=str(error))
        return
    row |= {"parameters": model.num_parameters(), "note": f"{torch.get_num_threads()} threads, {dtype}"}
    if args.device == "cpu":
        row["note"] += f"; load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    for what, batch, tokens, timer in timers:
        clean(args.device)
        try:
            timing = timer(model, batch, prompt, reps=args.rounds * args.reps // 2 or 1)
            recorder.add(timing, **row, measurement=what, batch=batch, tokens=tokens, peak_gib=peak_gib(args.device))
        except Exception as error:
            recorder.add(**{**row, "note": note_of(error)}, measurement=what, batch=batch)


def run_cpu(args: argparse.Namespace, recorder: Recorder) -> None:
    """Training steps on two threads; models alternate within a context, so that other programs disturb all alike."""
    size, tokens, contexts = (SMOKE, 128, (64,)) if args.smoke else (SMALL, 8192, (2048, 8192))
    torch.set_num_threads(1 if args.smoke else 2)
    candidates = {}
    for name in args.models or default_models(args):
        try:
            candidates[name] = build(name, size, True, "cpu", torch.float32)
        except Unsupported as error:
            recorder.add(model=name, measurement="cpu train", note=str(error))
    for context in contexts:
        x = torch.randn(tokens // context, context, size.width, requires_grad=True)
        gradient = torch.randn_like(x)
        steps = {name: training_step(c.module, c.hidden, x, gradient) for name, c in candidates.items()}
        samples, busy = {name: [] for name in steps}, {name: [] for name in steps}
        for turn in range(args.rounds * args.reps + 1):
            for name, step in steps.items():
                begin = time.process_time()
                duration = once(step, "cpu")
                if turn:  # the first warms up
                    samples[name].append(duration)
                    busy[name].append((time.process_time() - begin) * 1e3)
        for name, found in samples.items():
            # Beside other programs the fastest step and the processor time tell more than the median.
            note = (
                f"{torch.get_num_threads()} threads, float32, D={size.width}, {size.layers} layers; fastest "
                f"{min(found):.0f} ms; processor time {quartiles(busy[name]).median:.0f} ms"
            )
            note += f"; load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
            recorder.add(
                quartiles(found), model=name, direction="causal", measurement="cpu train", context=context,
                batch=tokens // context, tokens=tokens, parameters=parameter_count(candidates[name].module), note=note,
            )  # fmt: skip


__all__ = ["COLUMNS", "GROUPS", "Case", "Recorder", "cases", "default_groups", "default_models", "run", "run_case"]
