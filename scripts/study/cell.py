# SPDX-License-Identifier: Apache-2.0
"""One cell of the study: train and evaluate a model, or time its training step.

Everything except the model is the same for all: batches, order, optimiser, schedule, head, and the loss, which one
compiled function computes from the hidden states and the tied embedding. On a GPU forward and backward of a step are
one CUDA graph, so that no model pays for issuing kernels from Python, which would dominate FLASH's small layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup, set_seed

from flash_hf.training import GraphedBackward

from ..benchmark.timing import quartiles
from ..evaluation.recall import mqar, needle
from ..provenance import provenance
from .grid import BEYOND, Cell
from .models import MODELS, SIZES, build
from .runner import Gate
from .text import IGNORE, VALIDATED, Stream, load_stream


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings shared by all cells. The optimiser is the paper's (appendix B): AdamW, linear decay to 0 after a
    warm-up over 8 % of the steps.

    Attributes:
        batch_tokens: Tokens per step.
        evaluations: Number of validations during training.
        valid_tokens: Tokens of each of them, from the start of the validation text.
        final_tokens: Tokens of the last one, and of those at other lengths.
        recall_vocab: Vocabulary size of the recall tasks.
        recall_rows: Sequences for measuring recall.
        samples, tries: Timed training steps, and repetitions of the timing.
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
# On recall, gradients of small models are too small for the paper's eps.
CPU_RECIPE = Recipe(batch_tokens=4096, eps=1e-8, recall_vocab=32, evaluations=10)
RECIPES = {
    "xs": Recipe(batch_tokens=4096, evaluations=5, valid_tokens=65_536, final_tokens=262_144),
    "base": Recipe(batch_tokens=65_536),
    "m-eps": Recipe(eps=1e-8), "m-decay": Recipe(weight_decay=0.1),
    "recall": Recipe(eps=1e-8), "recall-cpu": CPU_RECIPE, "recall-cpu-deep": CPU_RECIPE,
    "tiny": TINY_RECIPE, "tiny-recall": TINY_RECIPE,
}  # fmt: skip


def recipe_of(cell: Cell) -> Recipe:
    """The settings for the size of a cell."""
    return RECIPES.get(cell.size, RECIPE)


CURVE_POINTS = 100
BINS = 32  # of the loss by position
GATED_STEPS = 8  # steps between releases of the gate, for timings that need the device alone
TRAINED_SAMPLES = 10  # timed steps after training
STATE_SECONDS = 60  # training time between saved states


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token, 0 where the label is -100; `[B, N]`."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def mean_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean over the tokens with a label."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def autocast(device: str):
    """bfloat16 products over float32 weights on a GPU, plain float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


class Step:
    """A training step on batches of one shape.

    Attributes:
        loss: Loss of the last batch, on the device.
        graph: Replays forward and backward as a CUDA graph; set by `capture` on a GPU.
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
        """The reason why steps are not replayed as a graph, None if they are."""
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
        """Compile and tune all kernels, then capture the graph; if that is impossible, steps stay as they are."""
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


def batches(
    cell: Cell, stream: Stream | None, recipe: Recipe, device: str, begin: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The infinite batches of a training from number `begin` on, the same for every model."""
    rows = max(1, recipe.batch_tokens // cell.context)
    if stream is None:
        for count in itertools.count(begin + 1):
            # Recall is measured with seeds below 10^6.
            batch = recall_batch(cell.task, cell.context, rows, recipe.recall_vocab, 10**6 * (cell.seed + 1) + count)
            yield tuple(part.to(device, non_blocking=True) for part in batch)
    each = len(stream) // rows
    if not each:
        raise ValueError(f"study: {cell.task} has {len(stream)} rows of {cell.context} tokens, fewer than a batch: "
                         f"{rows}.")  # fmt: skip
    for epoch in itertools.count(begin // each):
        order = stream.order(1000 * cell.seed + epoch)
        for at in range(max(0, begin - epoch * each) * rows, each * rows, rows):
            yield stream.batch(order[at : at + rows], 10**6 * (cell.seed + 1) + epoch * 10**5 + at)


# ------------------------------------------------------------------------------------------------------------------
# Measurements
# ------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def validate(model: nn.Module, stream: Stream, batch_tokens: int) -> Tensor:
    """Losses of every token of a stream, `[rows, context]` in float32 on the device; NaN where there is no label."""
    model.eval()
    device = next(model.parameters()).device.type
    found = []
    rows = torch.arange(len(stream)).split(max(1, batch_tokens // stream.context))
    # One pass does not justify a graph.
    with torch.compiler.set_stance("force_eager"), autocast(device):
        for index, part in enumerate(rows):
            inputs, labels = stream.batch(part.numpy(), index)
            hidden = model.model(inputs, use_cache=False).last_hidden_state
            losses = token_losses(hidden, model.get_input_embeddings().weight, labels)
            found.append(losses.masked_fill(labels == IGNORE, math.nan))
    model.train()
    return torch.cat(found)


def recall_questions(task: str, context: int, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches for measuring recall, with seeds that no training uses."""
    for index in range(0, recipe.recall_rows, 32):
        yield recall_batch(task, context, min(32, recipe.recall_rows - index), recipe.recall_vocab, index)


@torch.no_grad()
def recall(model: nn.Module, cell: Cell, context: int, recipe: Recipe) -> dict[str, float]:
    """Share of correct answers and their loss, on sequences that no training used."""
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
    """Mean over rows and over `bins` equal ranges of positions (fewer bins for few positions)."""
    by_position = losses.nanmean(0)
    bins = math.gcd(bins, len(by_position))
    return rounded(by_position.view(bins, -1).nanmean(1))


# ------------------------------------------------------------------------------------------------------------------
# Cells
# ------------------------------------------------------------------------------------------------------------------
def prepare(
    cell: Cell, folder: Path, recipe: Recipe, device: str, wait_seconds: float = 0.0
) -> tuple[nn.Module, Stream | None, Step]:
    """Model, text (None for recall) and step of a cell. The example of the step is the first batch, which training
    skips."""
    torch.set_float32_matmul_precision("high")
    set_seed(cell.seed)
    stream, vocab = None, recipe.recall_vocab
    if not cell.recalls:
        corpus = cell.task.split("-")[0]
        stream = load_stream(folder, corpus, "train", cell.context, causal=cell.causal, device=device,
                             wait_seconds=wait_seconds)  # fmt: skip
        vocab = stream.vocab_size
    model = build(cell.model, cell.size, vocab, cell.context, causal=cell.causal).to(device)
    model.train()
    if MODELS[cell.model].compiled and device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    example = next(batches(cell, stream, recipe, device))
    return model, stream, Step(model, example, steps_of(cell, recipe), cell.rate, recipe)


def steps_of(cell: Cell, recipe: Recipe) -> int:
    rows = max(1, recipe.batch_tokens // cell.context)
    return max(1, round(cell.tokens * 1e6 / (rows * cell.context)))


def run_cell(
    cell: Cell, folder: Path, gate: Gate, recipe: Recipe, *, states: Path | None = None, wait_seconds: float = 0.0
) -> dict:
    """The measurements of a cell, with everything needed to repeat them.

    Args:
        folder: Folder of the tokens, from [`text.prepare`].
        gate: Shared with the other cells on this device.
        states: Folder for the states of unfinished trainings, from which they resume; None saves none.
        wait_seconds: How long to wait for a missing piece of the text.
    """
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if cell.kind == "time":
        found = time_cell(cell, folder, gate, recipe, device)
    else:
        state = None if states is None else states / f"{cell.name}.safetensors"
        found = train_cell(cell, folder, gate, recipe, device, state, wait_seconds)
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
    """Quartiles of the time of a step, alone on the device, from the try with the lowest median, since other processes
    may still be compiling and launch kernels now and then."""
    found = []
    for _ in range(tries):
        with gate.alone():
            sample()
            found.append(quartiles([sample() for _ in range(samples)]))
    return min(found)._asdict()


def sampler(step: Step, batch: tuple[Tensor, Tensor], device: str) -> Callable[[], float]:
    """A function that runs a step and returns its milliseconds."""

    def sample() -> float:
        wait(device)
        begin = time.perf_counter()
        step(batch)
        wait(device)
        return 1e3 * (time.perf_counter() - begin)

    return sample


def time_cell(cell: Cell, folder: Path, gate: Gate, recipe: Recipe, device: str) -> dict:
    """Milliseconds of a training step (forward, backward, clipping, optimiser), alone on the device: as in training,
    and on a GPU also issued kernel by kernel from Python."""
    model, stream, step = prepare(cell, folder, recipe, device)
    sample = sampler(step, next(batches(cell, stream, recipe, device, 1)), device)
    for _ in range(3):
        sample()
    found = {}
    if device == "cuda":
        found["issued"] = quietest(sample, gate, recipe.samples, recipe.tries)
        step.capture()
        sample()
    found["step"] = quietest(sample, gate, recipe.samples, recipe.tries)
    return {**about(model, step), **found}


@dataclasses.dataclass
class Progress:
    """Progress of a training.

    Attributes:
        losses: Loss of every step, 0 for steps to come.
        curve: Validations: steps, loss (mean over the corpora), and accuracy for recall.
        curves: For text, the same for each corpus.
        resumed: The steps after which it was resumed.
    """

    losses: Tensor
    curve: list[list[float]] = dataclasses.field(default_factory=list)
    curves: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    done: int = 0
    seconds: float = 0.0
    resumed: list[int] = dataclasses.field(default_factory=list)


def save_state(path: Path, step: Step, progress: Progress) -> None:
    """Save everything a training needs to resume exactly, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = [torch.get_rng_state(), torch.cuda.get_rng_state() if step.device == "cuda" else None]
    state = {"model": step.model.state_dict(), "optimizer": step.optimizer.state_dict(), "random": random,
             "schedule": step.schedule.state_dict(), "progress": dataclasses.asdict(progress)}  # fmt: skip
    tensors = {}
    text = json.dumps(without_tensors(state, tensors))
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"state": text})
    os.replace(part, path)


def without_tensors(value: object, tensors: dict[str, Tensor]) -> object:
    """`value` in a form for JSON, its tensors moved into `tensors` and replaced by their names there."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)  # tied weights share memory
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, without_tensors(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [without_tensors(item, tensors) for item in value]
    return value


def with_tensors(value: object, tensors: dict[str, Tensor]) -> object:
    """The inverse of `without_tensors`, except that tuples become lists."""
    if isinstance(value, list):
        return [with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: with_tensors(item, tensors) for key, item in value["dict"]}


def load_state(path: Path, step: Step) -> Progress:
    """Load a saved state into a new (and captured) step."""
    with safe_open(path, "pt") as file:
        text = file.metadata()["state"]
    state = with_tensors(json.loads(text), load_file(path, device=step.device))
    step.model.load_state_dict(state["model"])
    step.optimizer.load_state_dict(state["optimizer"])
    step.schedule.load_state_dict(state["schedule"])
    cpu, cuda = state["random"]
    torch.set_rng_state(cpu.cpu())
    if cuda is not None:
        torch.cuda.set_rng_state(cuda.cpu())
    progress = Progress(**state["progress"])
    progress.resumed.append(progress.done)
    return progress


def train_cell(
    cell: Cell, folder: Path, gate: Gate, recipe: Recipe, device: str, state: Path | None, wait_seconds: float
) -> dict:
    """Curves of training and validation loss, the final evaluation, and, on a GPU, the milliseconds of a step alone on
    the device. Resumes from `state` if the file exists, and saves there regularly."""
    model, stream, step = prepare(cell, folder, recipe, device, wait_seconds)
    steps = steps_of(cell, recipe)
    step.capture()  # outside the gate: compiling takes long and hardly uses the device
    corpus = cell.task.split("-")[0]
    corpora = () if stream is None else VALIDATED.get(corpus, (corpus,))

    def valid(corpus: str, context: int, tokens: int) -> Stream:
        return load_stream(folder, corpus, "valid", context, causal=cell.causal, device=device, limit=tokens + 1)

    watched = {name: valid(name, cell.context, recipe.valid_tokens) for name in corpora}
    now = Progress(torch.zeros(steps, device=device), curves={name: [] for name in corpora})
    if state is not None and state.is_file():
        now = load_state(state, step)
    source = batches(cell, stream, recipe, device, 1 + now.done)
    every = max(1, steps // recipe.evaluations)
    saved = time.perf_counter()
    while now.done < steps and not (now.curve and not math.isfinite(now.curve[-1][1])):
        with gate.shared():
            begin = time.perf_counter()
            until = min(steps, now.done + GATED_STEPS, (now.done // every + 1) * every)
            while now.done < until:
                step(next(source))
                now.losses[now.done] = step.loss
                now.done += 1
            wait(device)
            now.seconds += time.perf_counter() - begin
            if now.done % every == 0 or now.done == steps:
                for name, rows in watched.items():
                    loss = validate(model, rows, recipe.batch_tokens).nanmean().item()
                    now.curves[name].append([now.done, round(loss, 4)])
                if watched:
                    mean = statistics.mean(curve[-1][1] for curve in now.curves.values())
                    now.curve.append([now.done, round(mean, 4)])
                else:
                    found = recall(model, cell, cell.context, recipe)
                    now.curve.append([now.done, round(found["loss"], 4), round(found["accuracy"], 4)])
                print(
                    f"{now.done} of {steps} steps, {now.seconds:.0f} s, validation {now.curve[-1][1]:.3f}", flush=True
                )
        if state is not None and time.perf_counter() - saved > STATE_SECONDS:
            save_state(state, step, now)
            saved = time.perf_counter()
    several = {}
    with gate.shared():
        if watched:
            measured = {name: measure_text(model, cell, functools.partial(valid, name), recipe) for name in watched}
            final, other = measured[corpora[0]]
            if len(corpora) > 1:
                several = {"corpora": {
                    name: {"final": final, "lengths": other, "valid_curve": now.curves[name]}
                    for name, (final, other) in measured.items()
                }}  # fmt: skip
                final, other = means(measured.values())
        else:
            final = recall(model, cell, cell.context, recipe)
            factors = (2, 4) if MODELS[cell.model].long else ()
            other = {f"{factor * cell.context}": recall(model, cell, factor * cell.context, recipe)
                     for factor in factors}  # fmt: skip
    timed = {}
    if device == "cuda" and not cell.recalls:  # last, since these steps change the model
        timed["step"] = quietest(sampler(step, next(source), device), gate, TRAINED_SAMPLES, 1)
    if state is not None:
        state.unlink(missing_ok=True)
    width = max(1, steps // CURVE_POINTS)
    smooth = now.losses[: now.done // width * width].view(-1, width).mean(1)
    return {
        **about(model, step), "steps": now.done, "diverged": now.done < steps,
        "shared_seconds": round(now.seconds, 1), **({"resumed": now.resumed} if now.resumed else {}),
        "train_curve": {"every": width, "loss": rounded(smooth)}, "valid_curve": now.curve, "final": final,
        "lengths": other, **several, **timed,
    }  # fmt: skip


def means(measured: Iterable[tuple[dict, dict]]) -> tuple[dict, dict]:
    """Mean losses over corpora with equal weights: final, and by length."""
    finals, others = zip(*measured, strict=True)
    longer = {length: {"loss": statistics.mean(other[length]["loss"] for other in others)} for length in others[0]}
    return {"loss": statistics.mean(final["loss"] for final in finals)}, longer


def measure_text(model: nn.Module, cell: Cell, valid: Callable[[int, int], Stream], recipe: Recipe):
    """The final loss, by position and by slot in the chunk, and by quarter at 2, 4 and 8 times the context."""
    losses = validate(model, valid(cell.context, recipe.final_tokens), recipe.batch_tokens)
    final = {"loss": losses.nanmean().item(), "tokens": int(losses.isfinite().sum()), "rows": len(losses),
             "row_std": losses.nanmean(1).std().item(), "by_position": binned(losses, BINS)}  # fmt: skip
    chunk = SIZES[cell.size].chunk
    if cell.context % chunk == 0 and cell.context > chunk:
        # Without the first chunk, which has no context before it.
        final["by_slot"] = binned(losses[:, chunk:].reshape(-1, chunk), BINS)
    other = {}
    for factor in BEYOND if MODELS[cell.model].long else ():
        losses = validate(model, valid(factor * cell.context, recipe.final_tokens), recipe.batch_tokens)
        other[str(factor * cell.context)] = {"loss": losses.nanmean().item(), "quarters": binned(losses, 4)}
    return final, other


def forget() -> None:
    """Free memory and compiled code for the next cell of this process."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


__all__ = ["RECIPE", "RECIPES", "TINY_RECIPE", "Recipe", "forget", "recipe_of", "run_cell"]
