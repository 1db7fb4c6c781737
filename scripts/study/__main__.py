# SPDX-License-Identifier: Apache-2.0
"""\
python -m scripts.study --tiny --prepare tests/data/wizard_of_oz.txt --work runs/study-tiny

The study behind scripts/results/study. Three steps, on different machines if needed, from the root of the clone:

1. `--prepare DATA --work WORK --minutes 0`: tokenizes the books and the Wikipedia text in DATA, and all its training
   text together in pieces of 50 MB (needs no GPU). Training can start with the first piece and waits up to
   `--wait_minutes` for each of the others.
2. `--work WORK --results FOLDER`: runs the cells missing in FOLDER (scripts/results/study), the most important first
   (later rates and seeds depend on finished cells), several in parallel on all GPUs, for up to `--minutes`; an
   interrupted training resumes from WORK/states, at most a minute back.
   `--bundle FILE` also writes the finished cells into one file, and `--unbundle FILE` adds such a file to FOLDER.
3. `--report --fill scripts/results/study/TABLES.md` renders its tables from FOLDER; `--figures FOLDER` draws.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from flash_hf.commands.options import OptionParser, natural, run_command
from flash_hf.sources import read_json

from ..provenance import write_json
from . import grid
from .runner import CellRunner, Gate, serve


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results" / "study"


def make_parser() -> argparse.ArgumentParser:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prepare", type=Path, metavar="DATA",
        help="tokenize this folder of {books,wiki}_{train,valid}.jsonl.xz or this text file, if WORK has no tokens",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder for tokens, logs and new cells")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of finished cells")
    parser.add_argument("--vocab_size", type=natural, help="size of the tokenizer; default 8192, with --tiny 600")
    parser.add_argument("--max_tokens", type=natural, default=31_000_000, help="maximum tokens of each corpus")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="run these cells instead of the whole grid")
    parser.add_argument("--list", action="store_true", help="print the cells to run, as far as known, and exit")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit; the next run resumes")
    parser.add_argument("--workers", type=natural, default=1, help="parallel cells on each device")
    parser.add_argument("--bundle", type=Path, metavar="FILE", help="also write all new cells into one file")
    parser.add_argument(
        "--unbundle", type=Path, metavar="FILE", help="add the cells of a bundle to --results and exit"
    )
    parser.add_argument("--report", action="store_true", help="print the tables and exit")
    parser.add_argument("--fill", type=Path, metavar="FILE", help="with --report: fill the tables into this document")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="with --report: also draw the figures")
    parser.add_argument("--tiny", action="store_true", help="a small grid of tiny models, to see that the study runs")
    parser.add_argument(
        "--wait_minutes", type=float, default=0.0, help="how long to wait for each missing piece of tokens"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def run_cells(options: argparse.Namespace) -> None:
    """Run the cells named on standard input, one after the other in this process."""
    from . import cell as training

    gate = Gate(options.work / f"gate{os.environ.get('CUDA_VISIBLE_DEVICES', '')}")

    def run(name: str) -> None:
        cell = grid.Cell.parse(name)
        result = training.run_cell(cell, options.work / "tokens", gate, training.recipe_of(cell),
                                   states=options.work / "states", wait_seconds=60 * options.wait_minutes)  # fmt: skip
        write_json(options.work / "cells" / f"{cell.name}.json", result, indent=None)
        training.forget()

    serve(run, options.work / "logs")


def main() -> int:
    begin = time.perf_counter()
    options = make_parser().parse_args()
    if options.serve:
        run_cells(options)
        return 0
    if options.unbundle:
        bundle = read_json(options.unbundle, dict)
        for name, result in bundle.items():
            write_json(options.results / f"{grid.Cell.parse(name).name}.json", result, indent=None)
        print(f"{len(bundle)} cells are now in {options.results}")
        return 0
    if options.report:
        from . import report

        if not options.results.is_dir():
            raise FileNotFoundError(
                f"--results must be a folder of finished cells; there is no folder {options.results}."
            )
        results = grid.load_results(options.results)
        if options.fill:
            options.fill.write_text(report.fill(options.fill.read_text(encoding="utf-8"), results), encoding="utf-8")
        else:
            print(report.render(results), end="")
        if options.figures:
            report.draw(results, options.figures)
        return 0
    if options.prepare and not (options.work / "tokens" / "text.json").is_file():
        from . import text

        vocab = options.vocab_size or (600 if options.tiny else 8192)
        facts = text.prepare(options.prepare, options.work / "tokens", vocab_size=vocab,
                             max_tokens=options.max_tokens, max_valid_tokens=2_200_000)  # fmt: skip
        if options.prepare.is_dir():
            facts = text.prepare_mixed(options.prepare, options.work / "tokens")
        print(json.dumps(facts, indent=1))
    if options.prepare and not options.minutes:
        return 0

    kept, new = grid.load_results(options.results), options.work / "cells"

    def missing() -> list[str]:
        done = kept | grid.load_results(new)
        if options.only:
            cells = [grid.Cell.parse(name) for name in options.only]
        else:
            cells = grid.tiny_grid() if options.tiny else grid.full_grid(done)
        return [cell.name for cell in cells if cell not in done]

    def upcoming() -> Iterator[str]:
        """The most important cell that has not been started, repeatedly, since the grid depends on results."""
        begun = set()
        while cell := next((name for name in missing() if name not in begun), None):
            begun.add(cell)
            yield cell

    if options.list:
        print("\n".join(missing()))
        return 0

    def bundle(cell: str) -> None:
        if options.bundle:
            found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(new.glob("*.json"))}
            write_json(options.bundle, found, indent=None)

    words = [sys.executable, "-m", "scripts.study", "--work", str(options.work), "--wait_minutes",
             str(options.wait_minutes), "--serve"]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Batches have one shape, and CUDA graphs their own pools; compilers of several cells share the processors.
    environment = {"PYTHONPATH": paths, "PYTORCH_CUDA_ALLOC_CONF": "", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    if options.tiny:
        environment["OMP_NUM_THREADS"] = "1"  # in tests, beside other work
    runner = CellRunner(options.work, words, minutes=options.minutes, least_seconds=5 if options.tiny else 80,
                        environment=environment, done=bundle, begin=begin,
                        devices=max(1, torch.cuda.device_count()))  # fmt: skip
    runner.run(upcoming(), options.workers)
    for cell, why in runner.failed.items():
        print(f"--- {cell}\n{why}", file=sys.stderr)
    return bool(runner.failed)


if __name__ == "__main__":
    run_command(main)
