# SPDX-License-Identifier: Apache-2.0
"""One cell of the study: train a model and measure what it learnt, or time its training step.

Everything but the model is the same for all: batches, order, optimiser, schedule, head and loss, which is taken from
the hidden states and the tied embedding, in one compiled function. On a GPU the forward and backward of a step are one
CUDA graph: the issue of kernels from Python, which costs FLASH's small layers more than the GPU's work does, is then
nobody's cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup, set_seed

from ..benchmarking import quartiles
from ..cells import Gate, provenance
from ..graphs import GraphedBackward
from ..recall import mqar, needle
from .grid import Cell
from .models import MODELS, SIZES, build
from .text import IGNORE, Stream, load_stream


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all cells share. The optimiser's settings are the paper's (appendix B): AdamW, linear decay to 0, warm-up
    over 8 % of the steps.

    Attributes:
        batch_tokens: tokens of a step.
        evaluations: validations during training.
        valid_tokens: of each of these; the first of the validation text.
        final_tokens: of the last one, and of those at other lengths.
        recall_vocab: ids of the recall tasks.
        recall_rows: rows that recall is measured on.
        samples, tries: timed training steps, and how often all of them are timed.
    """

    batch_tokens: int = 32_768
    evaluations: int = 20
    valid_tokens: int = 131_072
    final_tokens: int = 524_288
    warmup: float = 0.08
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    clip: float = 1.0
    recall_vocab: int = 512
    recall_rows: int = 256
    samples: int = 20
    tries: int = 3


RECIPE = Recipe()
TINY_RECIPE = Recipe(batch_tokens=512, evaluations=3, valid_tokens=512, final_tokens=1024, recall_vocab=32,
                     recall_rows=8, samples=3, tries=1)  # fmt: skip
# Gradients of small models on recall are too small for the paper's eps.
CPU_RECIPE = Recipe(batch_tokens=4096, eps=1e-8, recall_vocab=32, evaluations=10)
RECIPES = {
    "xs": Recipe(batch_tokens=4096, evaluations=5, valid_tokens=65_536, final_tokens=262_144),
    "m-eps": Recipe(eps=1e-8), "recall": Recipe(eps=1e-8), "recall-cpu": CPU_RECIPE, "recall-cpu-deep": CPU_RECIPE,
    "tiny": TINY_RECIPE, "tiny-recall": TINY_RECIPE,
}  # fmt: skip


def recipe_of(cell: Cell) -> Recipe:
    """What the cells of a size share."""
    return RECIPES.get(cell.size, RECIPE)


CURVE_POINTS = 100
BINS = 32  # of the loss by position
GATED_STEPS = 8  # steps between two looks whether somebody wants the device alone
TRAINED_SAMPLES = 10  # timed steps of a model that has been trained


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token, 0 where the label is -100; `[B, N]`."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def mean_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens that have a label."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def autocast(device: str):
    """bfloat16 products over float32 weights on a GPU, plain float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


class Step:
    """A training step on batches of one shape.

    Attributes:
        loss: of the last batch, on the device.
        graph: what replays forward and backward as a CUDA graph, after `capture` on a GPU.
    """

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], steps: int, rate: float, recipe: Recipe):
        self.model, self.recipe, self.example = model, recipe, batch
        self.device = batch[0].device.type
        self.head = torch.compile(mean_loss, dynamic=False) if self.device == "cuda" else mean_loss
        self.optimizer = torch.optim.AdamW(
            model.parameters(), rate, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay,
            fused=self.device == "cuda",
        )  # fmt: skip
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, round(recipe.warmup * steps), steps)
        self.loss = torch.zeros((), device=self.device)
        self.graph: GraphedBackward | None = None

    @property
    def why_not(self) -> str | None:
        """Why steps are issued one by one, or None where they are replayed."""
        if self.graph is None:
            return "no CUDA device"
        return next(iter(self.graph.refusals.values()), None)

    def _compute(self, batch: dict[str, Tensor]) -> Tensor:
        with autocast(self.device):
            hidden = self.model.model(batch["inputs"], use_cache=False).last_hidden_state
            loss = self.head(hidden, self.model.get_input_embeddings().weight, batch["labels"])
        loss.backward()
        return loss.detach()

    def forward_backward(self, batch: tuple[Tensor, Tensor]) -> None:
        self.optimizer.zero_grad()
        compute = self._compute if self.graph is None else self.graph
        self.loss = compute(dict(zip(("inputs", "labels"), batch, strict=True)))

    def capture(self) -> None:
        """Compile and tune all kernels, then make the graph; where that cannot be, steps stay as they are."""
        if self.device == "cuda":
            self.graph = GraphedBackward(self._compute, self.model.parameters())
            for _ in range(self.graph.warmup + 1):
                self.forward_backward(self.example)

    def __call__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.forward_backward(batch)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.schedule.step()


# ------------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------------
def recall_batch(task: str, context: int, rows: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if task == "needle":
        return needle(rows, context, vocab_size, generator)
    return mqar(rows, context, int(task.removeprefix("mqar")), vocab_size, generator)


def batches(cell: Cell, stream: Stream | None, recipe: Recipe, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a training, without end; the same for every model."""
    rows = max(1, recipe.batch_tokens // cell.context)
    if stream is None:
        count = 0
        while True:
            # Recall is asked for with seeds below 10^6.
            count += 1
            batch = recall_batch(cell.task, cell.context, rows, recipe.recall_vocab, 10**6 * (cell.seed + 1) + count)
            yield tuple(part.to(device, non_blocking=True) for part in batch)
    epoch = 0
    while True:
        order = stream.order(1000 * cell.seed + epoch)
        for at in range(0, len(order) - rows + 1, rows):
            yield stream.batch(order[at : at + rows], 10**6 * (cell.seed + 1) + epoch * 10**5 + at)
        epoch += 1


# ------------------------------------------------------------------------------------------------------------------
# Measurements
# ------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def validate(model: nn.Module, stream: Stream, batch_tokens: int, seed: int = 0) -> Tensor:
    """Losses of every token of a stream, `[rows, context]` in float32 on the device; NaN where nothing was asked."""
    model.eval()
    device = next(model.parameters()).device.type
    found = []
    rows = torch.arange(len(stream)).split(max(1, batch_tokens // stream.context))
    # One pass is not worth a graph of its own.
    with torch.compiler.set_stance("force_eager"), autocast(device):
        for index, part in enumerate(rows):
            inputs, labels = stream.batch(part.numpy(), seed + index)
            hidden = model.model(inputs, use_cache=False).last_hidden_state
            losses = token_losses(hidden, model.get_input_embeddings().weight, labels)
            found.append(losses.masked_fill(labels == IGNORE, math.nan))
    model.train()
    return torch.cat(found)


def recall_questions(task: str, context: int, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that recall is measured on; no training has their seeds."""
    for index in range(0, recipe.recall_rows, 32):
        yield recall_batch(task, context, min(32, recipe.recall_rows - index), recipe.recall_vocab, index)


@torch.no_grad()
def recall(model: nn.Module, cell: Cell, context: int, recipe: Recipe) -> dict[str, float]:
    """Share of the questions that are answered right, and their loss, on rows that no training saw."""
    model.eval()
    device = next(model.parameters()).device.type
    right, losses = [], []
    with torch.compiler.set_stance("force_eager"), autocast(device):
        for inputs, labels in recall_questions(cell.task, context, recipe):
            hidden = model.model(inputs.to(device), use_cache=False).last_hidden_state
            asked = (labels != IGNORE).to(device)
            logits = F.linear(hidden[asked], model.get_input_embeddings().weight).float()
            answers = labels.to(device)[asked]
            right.append((logits.argmax(-1) == answers).float())
            losses.append(F.cross_entropy(logits, answers, reduction="none"))
    model.train()
    return {"accuracy": torch.cat(right).mean().item(), "loss": torch.cat(losses).mean().item()}


def rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def binned(losses: Tensor, bins: int) -> list[float]:
    """Mean over rows and over `bins` equal stretches of the position (fewer where there are fewer positions)."""
    by_position = losses.nanmean(0)
    bins = math.gcd(bins, len(by_position))
    return rounded(by_position.view(bins, -1).nanmean(1))


# ------------------------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------------------------
def prepare(cell: Cell, folder: Path, recipe: Recipe, device: str) -> tuple[nn.Module, Stream | None, Step, Iterator]:
    """Model, text (None for recall), step and batches of a cell; `steps` is in the step's schedule."""
    torch.set_float32_matmul_precision("high")
    set_seed(cell.seed)
    stream, vocab = None, recipe.recall_vocab
    if not cell.recalls:
        corpus = cell.task.split("-")[0]
        stream = load_stream(folder, corpus, "train", cell.context, causal=cell.causal, device=device)
        vocab = stream.vocab_size
    model = build(cell.model, cell.size, vocab, cell.context, causal=cell.causal).to(device)
    model.train()
    if MODELS[cell.model].compiled and device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    source = batches(cell, stream, recipe, device)
    steps = steps_of(cell, recipe)
    return model, stream, Step(model, next(source), steps, cell.rate, recipe), source


def steps_of(cell: Cell, recipe: Recipe) -> int:
    rows = max(1, recipe.batch_tokens // cell.context)
    return max(1, round(cell.tokens * 1e6 / (rows * cell.context)))


def run_cell(cell: Cell, folder: Path, gate: Gate, recipe: Recipe) -> dict:
    """What a cell measures, with what is needed to repeat it.

    Args:
        folder: of the tokens, from [`text.prepare`].
        gate: shared with the other cells on this device.
    """
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = (time_cell if cell.kind == "time" else train_cell)(cell, folder, gate, recipe, device)
    result = {**dataclasses.asdict(cell), **found, "recipe": dataclasses.asdict(recipe), **provenance()}
    if not cell.recalls:
        result["text"] = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    if device == "cuda":
        result["peak_gigabytes"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    result["cell_seconds"] = round(time.perf_counter() - begin, 1)
    return result


def about(model: nn.Module, step: Step) -> dict:
    return {"parameters": sum(p.numel() for p in model.parameters()), "graphed": step.why_not is None,
            "why_not": step.why_not, "tokens_per_step": step.example[0].numel()}  # fmt: skip


def quietest(sample: Callable[[], float], gate: Gate, samples: int, tries: int) -> dict:
    """Quartiles of the time of a step, alone on the device, from the try with the lowest median: others may still
    compile, and then and now launch something."""
    found = []
    for _ in range(tries):
        with gate.alone():
            sample()
            found.append(quartiles([sample() for _ in range(samples)]))
    return min(found)._asdict()


def sampler(step: Step, batch: tuple[Tensor, Tensor], device: str) -> Callable[[], float]:
    """Does a step and gives its milliseconds."""

    def sample() -> float:
        wait(device)
        begin = time.perf_counter()
        step(batch)
        wait(device)
        return 1e3 * (time.perf_counter() - begin)

    return sample


def time_cell(cell: Cell, folder: Path, gate: Gate, recipe: Recipe, device: str) -> dict:
    """Milliseconds of a training step (forward, backward, clipping, optimiser), alone on the device: as the trainings
    do it, and, on a GPU, issued by Python."""
    model, _, step, source = prepare(cell, folder, recipe, device)
    sample = sampler(step, next(source), device)
    for _ in range(3):
        sample()
    found = {}
    if device == "cuda":
        found["issued"] = quietest(sample, gate, recipe.samples, recipe.tries)
        step.capture()
        sample()
    found["step"] = quietest(sample, gate, recipe.samples, recipe.tries)
    return {**about(model, step), **found}


def train_cell(cell: Cell, folder: Path, gate: Gate, recipe: Recipe, device: str) -> dict:
    """Curves of the training and the validation loss, what the trained model can do, and, on a GPU, the milliseconds
    of a step, alone on the device."""
    model, stream, step, source = prepare(cell, folder, recipe, device)
    steps = steps_of(cell, recipe)
    step.capture()  # not in the gate: compiling takes long, and little of the device
    corpus = cell.task.split("-")[0]

    def valid(context: int, tokens: int) -> Stream:
        return load_stream(folder, corpus, "valid", context, causal=cell.causal, device=device, limit=tokens + 1)

    watch = None if stream is None else valid(cell.context, recipe.valid_tokens)
    losses = torch.zeros(steps, device=device)
    every = max(1, steps // recipe.evaluations)
    curve, seconds, done = [], 0.0, 0
    while done < steps and not (curve and not math.isfinite(curve[-1][1])):
        with gate.shared():
            begin = time.perf_counter()
            until = min(steps, done + GATED_STEPS, (done // every + 1) * every)
            while done < until:
                step(next(source))
                losses[done] = step.loss
                done += 1
            wait(device)
            seconds += time.perf_counter() - begin
            if done % every == 0 or done == steps:
                if watch is not None:
                    loss = validate(model, watch, recipe.batch_tokens).nanmean().item()
                    curve.append([done, round(loss, 4)])
                else:
                    found = recall(model, cell, cell.context, recipe)
                    curve.append([done, round(found["loss"], 4), round(found["accuracy"], 4)])
    with gate.shared():
        if watch is not None:
            final, other = measure_text(model, cell, valid, recipe)
        else:
            final = recall(model, cell, cell.context, recipe)
            factors = (2, 4) if MODELS[cell.model].long else ()
            other = {f"{factor * cell.context}": recall(model, cell, factor * cell.context, recipe)
                     for factor in factors}  # fmt: skip
    timed = {}
    if device == "cuda" and not cell.recalls:  # last: these steps go on training
        timed["step"] = quietest(sampler(step, next(source), device), gate, TRAINED_SAMPLES, 1)
    width = max(1, steps // CURVE_POINTS)
    smooth = losses[: done // width * width].view(-1, width).mean(1)
    return {
        **about(model, step), "steps": done, "diverged": done < steps, "shared_seconds": round(seconds, 1),
        "train_curve": {"every": width, "loss": rounded(smooth)}, "valid_curve": curve, "final": final,
        "lengths": other, **timed,
    }  # fmt: skip


def measure_text(model: nn.Module, cell: Cell, valid: Callable[[int, int], Stream], recipe: Recipe):
    """The final loss, by position and by slot of a chunk, and at 2 and 4 times the context, by quarter."""
    losses = validate(model, valid(cell.context, recipe.final_tokens), recipe.batch_tokens)
    final = {"loss": losses.nanmean().item(), "tokens": int(losses.isfinite().sum()), "rows": len(losses),
             "row_std": losses.nanmean(1).std().item(), "by_position": binned(losses, BINS)}  # fmt: skip
    chunk = SIZES[cell.size].chunk
    if cell.context % chunk == 0 and cell.context > chunk:
        # Without the first chunk, which nothing lies before.
        final["by_slot"] = binned(losses[:, chunk:].reshape(-1, chunk), BINS)
    other = {}
    for factor in (2, 4) if MODELS[cell.model].long else ():
        losses = validate(model, valid(factor * cell.context, recipe.final_tokens), recipe.batch_tokens)
        other[str(factor * cell.context)] = {"loss": losses.nanmean().item(), "quarters": binned(losses, 4)}
    return final, other


def forget() -> None:
    """Leave the device's memory, and what was compiled, to the next cell of this process."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


__all__ = ["RECIPE", "RECIPES", "TINY_RECIPE", "Recipe", "forget", "recipe_of", "run_cell"]
