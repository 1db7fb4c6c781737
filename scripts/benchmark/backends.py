# SPDX-License-Identifier: Apache-2.0
"""\
python -m scripts.benchmark.backends --text tests/data/wizard_of_oz.txt --steps 5 --runs torch torch-float32 --tiny

Train one model from the same weights on the same batches with the kernels and with PyTorch, and compare the loss
curves. Rounding alone makes two runs diverge a little; PyTorch in float32 beside PyTorch in bfloat16 shows how much.

Tokens are the bytes of the text. Writes FOLDER/backends.csv (loss of each step and run) and FOLDER/backends.png, and
prints the mean loss of the last tenth of the steps.
"""

import argparse
import csv
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from flash_hf import FlashConfig, FlashForCausalLM
from flash_hf.commands.options import OptionParser, natural, run_command, seed


# Name: backend, dtype of the matrix products.
RUNS = {
    "triton": ("triton", torch.bfloat16),
    # Without those for Hopper, which `triton` has on such a GPU.
    "triton-general": ("triton", torch.bfloat16),
    "torch": ("torch", torch.bfloat16),
    "torch-float32": ("torch", torch.float32),
}


def train(options: argparse.Namespace, run: str) -> tuple[list[float], float]:
    """Losses of `options.steps` steps of AdamW with warm-up, in nats per byte, and the seconds they took."""
    # A copy, since torch needs writable memory and bytes are read-only.
    text = torch.frombuffer(bytearray(Path(options.text).read_bytes()), dtype=torch.uint8)
    begin = time.perf_counter()
    backend, dtype = RUNS[run]
    if run == "triton-general":
        from flash_hf.kernels import choice

        choice.scan_for = lambda device: False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = {"hidden_size": 64, "num_hidden_layers": 2, "query_key_dim": 32, "chunk_size": 64}
    if not options.tiny:
        size = {"hidden_size": 512, "num_hidden_layers": 8}
    torch.manual_seed(options.seed)
    model = FlashForCausalLM(FlashConfig(vocab_size=256, backend=backend, **size)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / 100))
    generator = torch.Generator().manual_seed(options.seed)
    losses = []
    for step in range(options.steps):
        first = torch.randint(0, len(text) - options.length, (options.batch,), generator=generator)
        ids = torch.stack([text[i : i + options.length] for i in first]).long().to(device)
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % 100 == 0:
            print(f"{run}: step {step + 1}, {torch.stack(losses[-100:]).mean():.4f} over 100 steps", flush=True)
    return torch.stack(losses).tolist(), time.perf_counter() - begin


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="text file to train on")
    parser.add_argument("--folder", default="runs/backends", help="output folder")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["triton", "torch", "torch-float32"])
    parser.add_argument("--workers", type=natural, default=1, help="parallel runs, each in its own process")
    parser.add_argument("--steps", type=natural, default=1000)
    parser.add_argument("--batch", type=natural, default=16, help="sequences per step")
    parser.add_argument(
        "--length", type=natural, default=1000, help="bytes per sequence; by default not a multiple of a chunk"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--tiny", action="store_true", help="a model for a laptop")
    options = parser.parse_args()
    if not Path(options.text).is_file():
        parser.error(f"--text must be a text file, got {options.text}")
    if Path(options.text).stat().st_size <= options.length:
        parser.error(f"--text must hold more than --length={options.length} bytes, and {options.text} does not")

    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    curves, last = {}, max(1, options.steps // 10)
    # A process per run: one run changes which kernels are chosen.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context, max_tasks_per_child=1) as workers:
        results = workers.map(partial(train, options), options.runs)
        for run, (losses, seconds) in zip(options.runs, results, strict=True):
            curves[run] = losses
            mean = sum(losses[-last:]) / last
            print(f"{run}: {mean:.4f} nats per byte over the last {last} steps, {seconds:.0f} s", flush=True)
    with (folder / "backends.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *curves])
        writer.writerows([step + 1, *(f"{value:.6f}" for value in row)] for step, row in
                         enumerate(zip(*curves.values(), strict=True)))  # fmt: skip
    plot(curves, folder / "backends.png")


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, and below them their differences from torch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1))
    for name, losses in curves.items():
        above.plot(losses, label=name, linewidth=0.8)
        if "torch" in curves and name != "torch":
            difference = [a - b for a, b in zip(losses, curves["torch"], strict=True)]
            below.plot(difference, label=f"{name} - torch", linewidth=0.8)
    above.set(ylabel="loss, nats per byte")
    below.set(xlabel="step", ylabel="difference")
    for axes in (above, below):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main)
