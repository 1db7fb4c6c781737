# SPDX-License-Identifier: Apache-2.0
"""Runs the cells of a study, many in each process. A cell writes one JSON file, and finished cells are not run again,
so that an interrupted study resumes where it stopped."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch


try:
    import fcntl
except ImportError:  # on Windows, where measurements are then not exclusive
    fcntl = None


class Gate:
    """A reader-writer lock between processes: many share the device, or one has it alone.

    Args:
        folder: Folder of the two lock files, shared by the processes; None without other processes.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder if fcntl is not None else None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _lock(self, name: str, kind: int) -> Iterator[None]:
        # Closing the file, or the end of the process, releases the lock.
        with open(self.folder / name, "w", encoding="utf-8") as file:
            fcntl.flock(file, kind)
            yield

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Beside others. Wait for the device before leaving."""
        if self.folder is None:
            yield
            return
        with contextlib.ExitStack() as room:
            # Take the door lock first, so that new readers cannot starve a waiting writer.
            with self._lock("door", fcntl.LOCK_EX):
                room.enter_context(self._lock("room", fcntl.LOCK_SH))
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Without others."""
        if self.folder is None:
            yield
            return
        with self._lock("door", fcntl.LOCK_EX), self._lock("room", fcntl.LOCK_EX):
            yield


def serve(run: Callable[[str], None], logs: Path) -> None:
    """The worker of `CellRunner`: run the cells named on standard input, one per line, each with its own
    log, and answer with a line each. Ends with the input, or with the first cell that fails."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    for name in map(str.strip, sys.stdin):
        with open(logs / f"{name}.log", "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            run(name)
        except Exception:  # the log has it; after a failure the process is replaced
            traceback.print_exc()
            raise SystemExit(1) from None
        finally:
            sys.stdout.flush()
        print("done", file=answers, flush=True)


class CellRunner:
    """Runs cells in parallel processes, since small models leave most of a large GPU idle.

    Args:
        folder: Folder of cells/NAME.json and logs/NAME.log.
        command: The command that runs cells (see [`serve`]), many of them, so that it imports and initialises once.
        devices: Number of GPUs; each process sees one of them.
        minutes: Time limit; the next run resumes.
        least_seconds: No cell is started with less time left.
        environment: Environment variables of the cells.
        done: Called after each finished cell.
    """

    def __init__(
        self, folder: Path, command: list[str], *, minutes: float, least_seconds: float = 30.0,
        environment: dict[str, str] | None = None, done: Callable[[str], None] = lambda cell: None,
        begin: float | None = None, devices: int = 1,
    ):  # fmt: skip
        self.folder, self.command, self.minutes, self.least_seconds = Path(folder), command, minutes, least_seconds
        self.devices, self.kept = devices, threading.local()
        self.environment, self.done = environment or {}, done
        self.begin = time.perf_counter() if begin is None else begin
        self.failed: dict[str, str] = {}

    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def path(self, cell: str) -> Path:
        return self.folder / "cells" / f"{cell}.json"

    def result(self, cell: str) -> dict | None:
        return json.loads(self.path(cell).read_text(encoding="utf-8")) if self.path(cell).is_file() else None

    def run(self, cells: Iterable[str], workers: int) -> None:
        """Run the unfinished cells, `workers` at a time on each device, and repeat alone those that ran out of memory.

        `cells` is read when a worker is free, so that its next cell may depend on those that are done.
        """
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.processes: list[subprocess.Popen] = []
        source, lock = iter(cells), threading.Lock()

        def work(device: int) -> None:
            self.kept.device = device
            while True:
                with lock:
                    cell = next(source, None)
                if cell is None:
                    return
                self.one(cell, workers)

        with concurrent.futures.ThreadPoolExecutor(workers * self.devices) as pool:
            for worker in [pool.submit(work, i % self.devices) for i in range(workers * self.devices)]:
                worker.result()
        for process in self.processes:
            process.communicate()  # closes its input, which ends it
        for cell in list(self.failed) if workers > 1 else []:
            if "OutOfMemoryError" in self.failed[cell]:
                del self.failed[cell]
                self.run([cell], 1)

    def one(self, cell: str, workers: int) -> None:
        if self.path(cell).is_file():
            return
        left = self.minutes * 60 - self.seconds()
        if left < self.least_seconds:
            self.failed[cell] = f"not begun: the {self.minutes:g} minutes are over"
            return
        # On a GPU more threads only cost time.
        threads = 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // workers)
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
            # Without fragments between batches of different lengths, more processes fit.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **self.environment,
        }  # fmt: skip
        if self.devices > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.devices)))
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[self.kept.device]
        log, begin = self.folder / "logs" / f"{cell}.log", self.seconds()
        try:
            if not self._ask(cell, environment, left):
                self.failed[cell] = (
                    log.read_text(errors="replace", encoding="utf-8")[-1500:] if log.is_file() else "it did not start"
                )
        except subprocess.TimeoutExpired:
            self.failed[cell] = f"cut off: {self.minutes:g} minutes are over"
        state = "FAILED" if cell in self.failed else "done"
        print(f"{self.seconds():6.1f} s  {cell}: {state} in {self.seconds() - begin:.1f} s", flush=True)
        if cell not in self.failed:
            self.done(cell)

    def _ask(self, cell: str, environment: dict[str, str], left: float) -> bool:
        """Run a cell in this thread's process, which is replaced if it has ended; whether the cell succeeded.

        Raises:
            subprocess.TimeoutExpired: the process was killed after `left` seconds.
        """
        process = getattr(self.kept, "process", None)
        if process is None or process not in self.processes or process.poll() is not None:
            process = self.kept.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment
            )
            self.processes.append(process)
        end = threading.Timer(left, process.kill)
        end.start()
        try:
            process.stdin.write(f"{cell}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            cut = not end.is_alive()
            end.cancel()
        if not answer:
            process.wait()
            if cut:
                raise subprocess.TimeoutExpired(self.command, left)
        return bool(answer)


__all__ = ["CellRunner", "Gate", "serve"]
