"""\
python -m scripts.benchmark --smoke --output runs/benchmark/smoke.csv

Speed and memory of FLASH and its peers at equal size (85 M parameters, bfloat16): training step, also of 12 layers of
width 512, forward, prefill, decoding, `generate()`, one layer, and training on the CPU. A correctness gate runs first:
if it fails, nothing is timed and the exit code is 1. Each (model, group) is measured in its own process, and each row
is appended to the CSV at once. Start it from the root of the clone.

    python -m scripts.benchmark --models flash,transformer++ --groups train --output runs/benchmark/h100.csv
    python -m scripts.benchmark --table runs/benchmark/h100.csv
    python -m scripts.benchmark --plot runs/benchmark/h100.csv --folder runs/benchmark
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from flash_hf.commands.options import OptionParser, natural, run_command

from . import cases as runs
from . import report
from .gate import gate
from .models import MODELS


FIRST = ("flash", "transformer++")


def parse() -> argparse.Namespace:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", help=f"comma-separated, of {', '.join(MODELS)}; default: those that run on the device"
    )
    parser.add_argument("--groups", help=f"comma-separated, of {', '.join(runs.GROUPS)}; default: all for the device")
    parser.add_argument("--contexts", help="comma-separated; only these contexts")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/results.csv"), help="CSV to append to")
    parser.add_argument("--rounds", type=natural, help="passes over the cases of a process; default 2, with --smoke 1")
    parser.add_argument("--reps", type=natural, help="samples per case and round; default 8, with --smoke 2")
    parser.add_argument("--limit_s", type=float, default=300, help="seconds after which a (model, group) is stopped")
    parser.add_argument("--total_s", type=float, default=0, help="start no process after so many seconds; 0: no limit")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU, in one process")
    parser.add_argument("--gate_only", action="store_true", help="run the correctness gate alone")
    # For workers, whose parent ran the gate.
    parser.add_argument("--gate_passed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--table", nargs="+", type=Path, metavar="CSV", help="print Markdown tables and exit")
    parser.add_argument("--plot", nargs="+", type=Path, metavar="CSV", help="write PNGs and exit")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"), help="output folder of --plot")
    args = parser.parse_args()
    args.device = "cpu" if args.smoke or not torch.cuda.is_available() else "cuda"
    args.rounds = args.rounds or (1 if args.smoke else 2)
    args.reps = args.reps or (2 if args.smoke else 8)
    for name, known in (("models", MODELS), ("groups", runs.GROUPS)):
        given = getattr(args, name)
        if given is not None:
            setattr(args, name, tuple(given.split(",")))
            if unknown := set(getattr(args, name)) - set(known):
                parser.error(f"--{name}: unknown {sorted(unknown)}; choose from {', '.join(known)}")
    if args.contexts is not None:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.contexts):
            parser.error(f"--contexts must be whole numbers separated by commas, got {args.contexts!r}")
        args.contexts = tuple(map(int, args.contexts.split(",")))
    return args


def print_gate(args: argparse.Namespace) -> bool:
    """Run the gate; print the failed comparisons, or else the one closest to its limit."""
    checks = gate(args.device)
    failed = [check for check in checks if not check.passed]
    worst = max(checks, key=lambda check: check.error / check.limit)
    for check in failed or [worst]:
        print(f"gate: {check.what}: error ratio {check.error:.3g}, limit {check.limit:.3g}", flush=True)
    print(f"gate: {len(checks) - len(failed)} of {len(checks)} comparisons passed", flush=True)
    return not failed


def order(args: argparse.Namespace) -> list[tuple[str, str]]:
    """`(model, group)` in order of importance: all groups of FLASH and Transformer++, then the peers."""
    groups = args.groups or runs.default_groups(args)
    models = args.models or runs.default_models(args)
    pairs = [("device", "matmul")] if "matmul" in groups else []
    pairs += [("all", "cpu")] if "cpu" in groups else []
    groups = [group for group in groups if group not in ("matmul", "cpu")]
    first = [model for model in FIRST if model in models]
    pairs += [(model, group) for group in groups for model in first]
    return pairs + [(model, group) for model in models if model not in FIRST for group in groups]


def in_process(args: argparse.Namespace, model: str, group: str) -> None:
    """Run one (model, group) in its own process; if it fails or times out, add a row with a note."""
    command = [
        sys.executable, "-m", "scripts.benchmark", "--gate_passed", "--groups", group, "--output", str(args.output),
        "--rounds", str(args.rounds), "--reps", str(args.reps),
    ]  # fmt: skip
    chosen = args.models if model in ("all", "device") else (model,)
    command += ["--models", ",".join(chosen)] if chosen else []
    command += ["--contexts", ",".join(map(str, args.contexts))] if args.contexts else []
    try:
        code = subprocess.run(command, timeout=args.limit_s).returncode
        note = f"process ended with code {code}"
    except subprocess.TimeoutExpired:
        code, note = 1, f"stopped after {args.limit_s:.0f} s"
    if code:
        runs.Recorder(args.output, args.device).add(model=model, measurement=group, note=note)


def main() -> int:
    args = parse()
    if args.table or args.plot:
        if args.table:
            print(report.tables(report.read(args.table)))
        if args.plot:
            for path in report.plots(report.read(args.plot), args.folder):
                print(path)
        return 0
    begin = time.perf_counter()
    if args.gate_only or (not args.gate_passed and args.device == "cpu"):
        passed = print_gate(args)
    else:
        # In its own process, so that the gate does not hold memory while the models are measured.
        gate_only = [sys.executable, "-m", "scripts.benchmark", "--gate_only"]
        passed = args.gate_passed or subprocess.run(gate_only).returncode == 0
    if not passed:
        print("The correctness gate failed: nothing was timed.", file=sys.stderr)
        return 1
    if args.gate_only:
        return 0
    for model, group in order(args):
        if args.total_s and time.perf_counter() - begin > args.total_s:
            print(f"out of time before {model}, {group}", flush=True)
            break
        if args.gate_passed or args.device == "cpu":
            runs.run(args, model, group)
        else:
            in_process(args, model, group)
    return 0


if __name__ == "__main__":
    run_command(main)
