# SPDX-License-Identifier: Apache-2.0
"""\
python -m scripts.study.pretrain --recipe scripts/recipes/checkpoints/flash-30m-causal.yaml --work runs/study \\
    --output runs/flash-30m-causal --seconds 500

Train a checkpoint of model_cards/ on the study's mixed corpus, in a given time or number of steps and without
`datasets`. The learning rate warms up, stays constant, and decays over the last part. OUTPUT/stable holds the weights
before the decay: a later run continues from them with --resume, so that a training can be spread over several GPU
leases. `--search RATE ...` first tries learning rates, each in a tenth of the steps, and trains with the best.

1. `--prepare DATA`, after `python -m scripts.study --prepare DATA`: tokenizes the held-out text for the evaluation.
2. Train. An interrupted run resumes from OUTPUT/state.safetensors. The weights (OUTPUT/final, bfloat16) are saved
   first, then evaluated as saved. OUTPUT/final/training.json has curves, results, versions and the machine.
"""

import argparse
import dataclasses
import itertools
import math
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, set_seed

from flash_hf import FlashConfig
from flash_hf.commands.options import OptionParser, natural, number, run_command
from flash_hf.sources import read_json

from ..baselines import matched_config  # registers the baselines
from ..provenance import program_words, provenance, write_json
from .cell import (
    Progress,
    Recipe,
    Step,
    autocast,
    batches,
    forget,
    load_state,
    mean_loss,
    rounded,
    save_state,
    validate,
    wait,
)
from .grid import Cell
from .text import CORPORA, EXCHANGED, HIDDEN, MIXED, Stream, load_stream


START = time.perf_counter()
HELD_OUT = "held_out.npz"
PASSAGES = 1000  # of held-out text, as in the cards of earlier checkpoints
BLOCK = 2048  # tokens of a block of packed passages, likewise
CHECKED_STEPS = 16  # steps between looks at the clock
RATED = 20  # looks over which the speed is measured
STATE_SECONDS = 90  # between saved states
MOST_STEPS = 200_000
CURVE_POINTS = 400
SEARCHED = 0.1  # share of the steps in which a learning rate is tried


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A recipe of scripts/recipes/checkpoints.

    Attributes:
        causal: Whether the model is causal; otherwise masked.
        model_config: Fields of `FlashConfig`; `preset="plus"` takes the others from FLASH+.
        model: `"flash"`, or a baseline of scripts/baselines, of that FLASH's number of parameters.
        context: Tokens of a row.
        batch_tokens: Tokens of a step.
        warmup_steps: Steps in which the rate rises to `learning_rate`, also in a run that continues another.
        decay: Share of the time or steps in which it falls to 0, as 1 minus a square root (arXiv 2405.18392).
        weight_decay: Of the matrices of layers; embeddings, gains and biases have none.
        mask_shares: Masked share of the tokens before and during the decay (arXiv 2305.15096).
        passage_tokens: Bounds of the lengths of masked passages, sampled log-uniformly and extended to the end of a
            paragraph. Passages are packed so that none sees another.
        evaluate_every: Steps between validations.
    """

    causal: bool
    model_config: dict
    preset: str | None = None
    model: str = "flash"
    context: int = 8192
    batch_tokens: int = 65_536
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    decay: float = 0.2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    clip: float = 1.0
    mask_shares: tuple[float, float] = (0.3, 0.15)
    passage_tokens: tuple[int, int] = (8, 8192)
    evaluate_every: int = 500
    seed: int = 0

    def config(self, vocab_size: int, end: int, pad: int) -> PreTrainedConfig:
        make = FlashConfig.plus if self.preset == "plus" else FlashConfig
        ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": pad}
        flash = make(**{"vocab_size": vocab_size, "max_position_embeddings": self.context, **ids, **self.model_config})
        return flash if self.model == "flash" else matched_config(self.model, flash)

    def shared(self) -> Recipe:
        names = ("batch_tokens", "weight_decay", "betas", "eps", "clip")
        return Recipe(**{name: getattr(self, name) for name in names})


class Passages:
    """Rows of masked passages for `cell.batches`, made on the CPU from the rows of a stream.

    Attributes:
        share: Masked share of the tokens.
    """

    def __init__(self, stream: Stream, line: int, end: int, first: int, recipe: Pretraining):
        """
        Args:
            stream: Causal rows on the CPU.
            line: The token of a line break; two end a paragraph.
            end: The token around every passage, which also stands between the stream's documents.
            first: The first token that is not special.
        """
        self.stream, self.line, self.end, self.first, self.recipe = stream, line, end, first, recipe
        self.share = recipe.mask_shares[0]

    def __len__(self) -> int:
        return len(self.stream)

    def order(self, seed: int) -> np.ndarray:
        return self.stream.order(seed)

    def cut(self, tokens: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A row `[context]` of packed passages from as many tokens of the stream, and its positions."""
        low, high = (math.log(length) for length in self.recipe.passage_tokens)
        breaks = np.flatnonzero((tokens[1:] == self.line) & (tokens[:-1] == self.line)) + 2
        ends = np.append(np.flatnonzero(tokens == self.end), len(tokens))
        parts, positions, begin, length = [], [], 0, 0
        while begin < len(tokens) and length < len(tokens):
            wanted = begin + math.exp(random.uniform(low, high))
            after = np.searchsorted(breaks, wanted)
            document_end = ends[np.searchsorted(ends, begin)]
            until = min(document_end, breaks[after] if after < len(breaks) else len(tokens))
            passage = tokens[begin:until]
            begin = until + (until == document_end)
            while len(passage) and passage[-1] == self.line:
                passage = passage[:-1]
            if len(passage):
                parts += [[self.end], passage, [self.end]]
                positions.append(np.arange(len(passage) + 2))
                length += len(passage) + 2
        cut = slice(len(tokens))
        row, position = np.concatenate(parts)[cut], np.concatenate(positions)[cut]
        if len(row) < len(tokens):  # only where documents are so short that their ends take many tokens
            more = len(tokens) - len(row)
            row, position = np.append(row, row[:more]), np.append(position, position[:more])
        return row, position

    def batch(self, rows: np.ndarray, seed: int) -> dict[str, Tensor]:
        """`inputs` and `position_ids`, int64 `[rows, context]`; and of the masked tokens their `places` in the flat
        batch and `labels`, int64 `[masked]`."""
        random = np.random.default_rng(seed)
        spans = self.stream.spans(rows)[:, :-1].numpy()
        found, positions = (np.stack(parts) for parts in zip(*(self.cut(row, random) for row in spans), strict=True))
        flat = found.reshape(-1)
        keys = random.random(flat.size, np.float32)
        keys[flat < self.first] = 2.0  # special tokens last
        places = np.argpartition(keys, count := round(self.share * flat.size))[:count]
        labels, kind = flat[places], random.random(count, np.float32)
        other = random.integers(self.first, self.stream.vocab_size, count)
        changed = HIDDEN + (1 - HIDDEN) * EXCHANGED
        flat[places] = np.where(kind < HIDDEN, self.stream.mask_id, np.where(kind < changed, other, labels))
        arrays = {"inputs": found, "labels": labels, "position_ids": positions, "places": places}
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


def ahead(source: Iterator[dict[str, Tensor]], device: str) -> Iterator[dict[str, Tensor]]:
    """Batches on the device, the next one made in a thread meanwhile."""

    def make() -> dict[str, Tensor]:
        batch = next(source)
        return {name: x.pin_memory() for name, x in batch.items()} if device == "cuda" else batch

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make)
        while True:
            batch, coming = coming.result(), pool.submit(make)
            yield {name: x.to(device, non_blocking=True) for name, x in batch.items()}


class Factor:
    """The factor on the learning rate. An object, so that its attributes are part of the schedule's state."""

    def __init__(self, warmup: int):
        self.warmup, self.decay_from, self.last = warmup, None, None

    def __call__(self, step: int) -> float:
        factor = min(1.0, (step + 1) / max(1, self.warmup))
        if self.decay_from is None or step < self.decay_from:
            return factor
        share = (step - self.decay_from + 1) / max(1, self.last - self.decay_from)
        return factor * (1 - math.sqrt(min(1.0, share)))


class PretrainingStep(Step):
    """The study's step with this recipe's optimiser and schedule. Masked steps have batches of packed passages, whose
    chunks are counted on the host, so that they are not replayed as a graph."""

    def __init__(self, model: nn.Module, batch, recipe: Pretraining):
        tensors = batch if recipe.causal else (batch["inputs"], batch["labels"])
        super().__init__(model, tensors, 1, recipe.learning_rate, recipe.shared())
        self.causal = recipe.causal
        matrices = {id(m.weight) for m in model.model.layers.modules() if isinstance(m, nn.Linear)}
        groups = [
            {"params": [p for p in model.parameters() if (id(p) in matrices) == decayed],
             "weight_decay": recipe.weight_decay if decayed else 0.0}
            for decayed in (True, False)
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, recipe.learning_rate, betas=recipe.betas, eps=recipe.eps,
                                           fused=self.device == "cuda")  # fmt: skip
        self.factor = Factor(recipe.warmup_steps)
        self.schedule = LambdaLR(self.optimizer, self.factor)

    def capture(self) -> None:
        if self.causal:
            super().capture()

    def forward_backward(self, batch) -> None:
        if self.causal:
            super().forward_backward(batch)
            return
        self.optimizer.zero_grad()
        with autocast(self.device):
            hidden = masked_hidden(self.model, batch)
            loss = mean_loss(hidden[None], self.model.get_input_embeddings().weight, batch["labels"][None])
        loss.backward()
        self.loss = loss.detach()


def masked_hidden(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states of the masked tokens, `[masked, D]`."""
    hidden = model.model(batch["inputs"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch["places"])


# ------------------------------------------------------------------------------------------------------------------
# Held-out text
# ------------------------------------------------------------------------------------------------------------------
def prepare(data: Path, folder: Path) -> None:
    """Write the held-out documents of `data` into `folder`: whole, and as masked blocks of packed passages, made as
    `scripts.cut_passages` and `scripts.evaluation --measure masked` make them."""
    import random

    from datasets import Dataset

    from flash_hf.training import MaskingCollator, load_documents, pack_documents, tokenize_documents
    from flash_hf.training.tokenizer import document_end, document_start

    from ..cut_passages import passages

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    arrays, cut = {}, []
    for corpus in CORPORA:
        documents = load_documents(data / f"{corpus}_valid.jsonl.xz")
        ids, sizes = [], []
        for row in documents:
            text = row["text"].removeprefix("\ufeff")
            tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids.append(np.array([document_start(tokenizer), *tokens, document_end(tokenizer)], np.uint16))
            sizes.append([len(ids[-1]), len(text.encode()), len(text.split())])
        arrays |= {f"{corpus}_ids": np.concatenate(ids), f"{corpus}_sizes": np.array(sizes)}
        cut += passages(documents)
    random.Random(0).shuffle(cut)
    tokenized = tokenize_documents(Dataset.from_list(cut[:PASSAGES]), tokenizer)
    blocks = pack_documents(tokenized, tokenizer, block_size=BLOCK, causal=False, packing="documents")
    # Whole blocks: the last one would need a padding mask.
    whole = [row for row in blocks if all(row["attention_mask"])]
    masked = MaskingCollator(tokenizer, mlm_probability=0.15, seed=0).torch_call(whole)
    arrays |= {f"passages_{name}": masked[name].numpy().astype(np.int16)
               for name in ("input_ids", "labels", "position_ids")}  # fmt: skip
    np.savez_compressed(folder / HELD_OUT, **arrays)


@torch.no_grad()
def score_documents(model: nn.Module, ids: np.ndarray, sizes: np.ndarray, context: int) -> dict[str, float]:
    """The metrics of `scripts.evaluation --measure perplexity` of whole documents, each read as one row.

    Args:
        sizes: Tokens, bytes and words of each document.
        context: Documents are padded to multiples of it, so that kernels compiled in training fit.
    """
    model.eval()
    device, weight = next(model.parameters()).device.type, model.get_input_embeddings().weight
    nats, right, begin = 0.0, 0, 0
    for count in sizes[:, 0]:
        row = torch.from_numpy(ids[begin : begin + count].astype(np.int64)).to(device)
        begin += count
        # Causal: padding changes nothing before it.
        padded = F.pad(row, (0, -int(count) % context), value=int(row[-1]))
        with autocast(device):
            hidden = model.model(padded[None], use_cache=False).last_hidden_state[0]
            for at in range(0, int(count) - 1, 16_384):
                labels = row[at + 1 : at + 1 + 16_384]
                logits = F.linear(hidden[at : at + len(labels)], weight).float()
                nats += F.cross_entropy(logits, labels, reduction="sum").item()
                right += int((logits.argmax(-1) == labels).sum())
    tokens = int(sizes[:, 0].sum()) - len(sizes)
    loss = nats / tokens
    return {"bits_per_byte": nats / math.log(2) / int(sizes[:, 1].sum()), "perplexity": math.exp(loss), "loss": loss,
            "word_perplexity": math.exp(nats / int(sizes[:, 2].sum())), "accuracy": right / tokens,
            "tokens": tokens}  # fmt: skip


@torch.no_grad()
def score_passages(model: nn.Module, held: dict[str, np.ndarray], limit: int | None = None):
    """The metrics of `scripts.evaluation --measure masked` of blocks of packed passages."""
    model.eval()
    device, weight = next(model.parameters()).device.type, model.get_input_embeddings().weight
    blocks = {name: torch.from_numpy(held[f"passages_{name}"][:limit].astype(np.int64)).to(device)
              for name in ("input_ids", "labels", "position_ids")}  # fmt: skip
    nats, right, tokens, rows = 0.0, 0, 0, 16
    for at in range(0, len(blocks["labels"]), rows):
        ids, labels, positions = (blocks[name][at : at + rows] for name in ("input_ids", "labels", "position_ids"))
        places = (labels.flatten() >= 0).nonzero()[:, 0]
        truth = labels.flatten()[places]
        with autocast(device):
            hidden = masked_hidden(model, {"inputs": ids, "position_ids": positions, "places": places})
            logits = F.linear(hidden, weight).float()
        nats += F.cross_entropy(logits, truth, reduction="sum").item()
        right, tokens = right + int((logits.argmax(-1) == truth).sum()), tokens + len(truth)
    model.train()
    loss = nats / tokens
    return {"loss": loss, "perplexity": math.exp(loss), "masked_accuracy": right / tokens, "tokens": tokens}


def final_results(model: nn.Module, held: dict[str, np.ndarray], recipe: Pretraining) -> list[dict]:
    """Rows for results.json of a model card."""
    if recipe.causal:
        found = {
            (f"{corpus}_valid", "validation"): score_documents(
                model, held[f"{corpus}_ids"], held[f"{corpus}_sizes"], recipe.context
            )
            for corpus in CORPORA
        }
    else:
        found = {("passages_valid", f"validation, first {PASSAGES} documents"): score_passages(model, held)}
    made = provenance()
    return [
        {"task": "text-generation" if recipe.causal else "fill-mask", "dataset": dataset, "split": split,
         "metric": metric, "value": value if isinstance(value, int) else float(f"{value:.5g}"),
         "command": shlex.join([*program_words(), *sys.argv[1:]]),
         "machine": f"{made['machine']}; torch {made['versions']['torch']}", "commit": str(made["commit"])}
        for (dataset, split), scores in found.items() for metric, value in scores.items()
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------
def save_weights(model: nn.Module, folder: Path, log: dict) -> None:
    """Save a model's weights in bfloat16, and the training's log so far."""
    shared: dict[int, Tensor] = {}  # tied weights stay one tensor, which is saved once
    weights = {
        name: shared.setdefault(value.data_ptr(), value.bfloat16()) for name, value in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=weights)
    config = read_json(folder / "config.json", dict)
    write_json(folder / "config.json", {**config, "dtype": "bfloat16"}, indent=2)
    write_json(folder / "training.json", log)


def run(
    recipe: Pretraining, work: Path, output: Path, seconds: float, resume: Path | None, wait_seconds: float,
    steps: int | None = None,
) -> None:  # fmt: skip
    """Train and evaluate for `seconds` since the start of the program or, if given, for `steps`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    set_seed(recipe.seed)
    tokens, made = work / "tokens", provenance()
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    held = dict(np.load(tokens / HELD_OUT))
    stream = load_stream(tokens, MIXED, "train", recipe.context, causal=recipe.causal,
                         device=device if recipe.causal else "cpu", wait_seconds=wait_seconds)  # fmt: skip
    before = {"steps": 0, "runs": []}
    head = AutoModelForCausalLM if recipe.causal else AutoModelForMaskedLM
    if resume is None:
        model = head.from_config(recipe.config(stream.vocab_size, tokenizer.eos_token_id, tokenizer.pad_token_id))
    else:
        model, before = head.from_pretrained(resume, dtype=torch.float32), read_json(resume / "training.json", dict)
    model = model.to(device).train()
    rows = stream
    if not recipe.causal:
        rows = Passages(stream, tokenizer.convert_tokens_to_ids("\u010a"), tokenizer.eos_token_id,
                        1 + max(tokenizer.all_special_ids), recipe)  # fmt: skip
    place = Cell("train", "flash", "m", f"{MIXED}-{'causal' if recipe.causal else 'masked'}", recipe.context,
                 seed=recipe.seed)  # fmt: skip
    shared = recipe.shared()

    def source(done: int) -> Iterator:
        found = batches(place, rows, shared, device, before["steps"] + done)
        return found if recipe.causal else ahead(found, device)

    step = PretrainingStep(model, next(source(0)), recipe)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} rows", flush=True)
    step.capture()
    print(f"{time.perf_counter() - START:.1f} s: {'captured' if step.graph is not None else 'ready'}, "
          f"{step.why_not}", flush=True)  # fmt: skip
    watched = {
        name: load_stream(tokens, name, "valid", recipe.context, causal=True, device=device, limit=131_073)
        for name in CORPORA if recipe.causal
    }  # fmt: skip
    now, state = Progress(torch.zeros(MOST_STEPS, device=device)), output / "state.safetensors"
    if state.is_file():
        now = load_state(state, step)
        if step.factor.last is not None and not recipe.causal:
            rows.share = recipe.mask_shares[1]
    spent, clock = now.seconds, time.perf_counter()  # seconds of earlier processes

    def evaluate() -> None:
        if recipe.causal:
            found = [validate(model, rows, recipe.batch_tokens).nanmean().item() for rows in watched.values()]
        else:
            scores = score_passages(model, held, 32)
            found = [scores["loss"], scores["masked_accuracy"]]
        now.curve.append([now.done, *(round(value, 4) for value in found)])
        last = now.losses[max(0, now.done - 100) : now.done].mean().item()
        print(f"{time.perf_counter() - START:.0f} s: {now.done} steps, training {last:.3f}, validation "
              f"{now.curve[-1][1:]}", flush=True)  # fmt: skip

    def log() -> dict:
        width = max(1, now.done // CURVE_POINTS)
        this = {
            "recipe": dataclasses.asdict(recipe), "seconds": round(now.seconds, 1), "steps": now.done,
            "tokens": now.done * recipe.batch_tokens, "resumed": now.resumed, "graphed": step.graph is not None,
            "decay": [step.factor.decay_from, step.factor.last],
            "train_curve": {"every": width, "loss": rounded(
                now.losses[: now.done // width * width].view(-1, width).mean(1))},
            "valid_curve": now.curve, **made,
        }  # fmt: skip
        return {"steps": before["steps"] + now.done, "runs": [*before["runs"], this],
                "text": read_json(tokens / "text.json", dict)}  # fmt: skip

    feed, saved, marks = source(now.done), time.perf_counter(), deque(maxlen=RATED)
    border = None if steps is None else max(1, round(steps * (1 - recipe.decay)))
    while step.factor.last is None or now.done < step.factor.last:
        for batch in itertools.islice(feed, CHECKED_STEPS):
            step(batch)
            now.losses[now.done] = step.loss
            now.done += 1
            if now.done in (border, step.factor.last) or now.done % recipe.evaluate_every == 0:
                break
        wait(device)
        at = time.perf_counter()
        now.seconds = spent + at - clock
        marks.append((at, now.done))
        if now.done % recipe.evaluate_every == 0:
            evaluate()
        each = max(1e-9, (at - marks[0][0]) / max(1, now.done - marks[0][1]))
        begin_decay = now.done == border
        if steps is None:
            begin_decay = at - START >= seconds * (1 - recipe.decay) and len(marks) > 1
        if step.factor.last is None and begin_decay:
            evaluate()
            save_weights(model, output / "stable", log())
            step.factor.decay_from = now.done
            left = seconds - (time.perf_counter() - START)
            step.factor.last = now.done + max(1, int(left / each)) if steps is None else steps
            if not recipe.causal:
                rows.share = recipe.mask_shares[1]
            print(f"{at - START:.1f} s: {1e3 * each:.1f} ms a step, {recipe.batch_tokens / each:,.0f} tokens/s; the "
                  f"rate falls until step {step.factor.last}", flush=True)  # fmt: skip
        if at - saved > STATE_SECONDS:
            save_state(state, step, now)
            saved = time.perf_counter()
    step.graph = None
    model.zero_grad()
    evaluate()
    final = output / "final"
    save_weights(model, final, log())
    tokenizer.save_pretrained(final)
    print(f"{time.perf_counter() - START:.1f} s: saved", flush=True)
    with torch.no_grad():
        for parameter in model.parameters():  # evaluated as saved
            parameter.copy_(parameter.bfloat16())
    results = final_results(model, held, recipe)
    for row in results:
        print(row["dataset"], row["metric"], row["value"], flush=True)
    write_json(final / "training.json", {**log(), "results": results})
    state.unlink(missing_ok=True)
    (output / "done").touch()


def search(
    recipe: Pretraining, rates: list[float], steps: int, work: Path, output: Path, wait_seconds: float
) -> float:
    """The learning rate with the lowest loss on held-out text, the first one of equals; all are in search.json."""
    losses = {}
    for rate in rates:
        folder = output / f"rate-{rate:g}"
        if not (folder / "done").is_file():
            warmup = max(1, round(SEARCHED * recipe.warmup_steps))
            tried = dataclasses.replace(recipe, learning_rate=rate, warmup_steps=warmup)
            run(tried, work, folder, math.inf, None, wait_seconds, max(2, round(SEARCHED * steps)))
            forget()
        results = read_json(folder / "final" / "training.json", dict)["results"]
        losses[rate] = next(row["value"] for row in results if row["metric"] == "loss")
    write_json(output / "search.json", {f"{rate:g}": loss for rate, loss in losses.items()})
    print(f"rates: {losses}", flush=True)
    return min(losses, key=losses.get)


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DATA", help="tokenize the held-out text of DATA and exit")
    parser.add_argument("--recipe", type=Path, help="YAML file of settings")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of the study's tokens")
    parser.add_argument("--output", type=Path, help="folder for weights and log")
    parser.add_argument("--seconds", type=number(float, above=0), default=500, help="from the start to the last step")
    parser.add_argument("--steps", type=natural, help="steps of the training, instead of --seconds")
    parser.add_argument(
        "--search", nargs="+", type=number(float, above=0), metavar="RATE", help="learning rates to try; with --steps"
    )
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="the folder `stable` of an earlier run")
    parser.add_argument(
        "--wait_minutes", type=float, default=0.0, help="how long to wait for each missing piece of tokens"
    )
    args = parser.parse_args()
    if args.prepare:
        prepare(args.prepare, args.work / "tokens")
        return
    if args.recipe is None or args.output is None:
        parser.error("give --recipe and --output, or --prepare")
    if args.search and (args.steps is None or args.resume is not None):
        parser.error("--search needs --steps, and a training from the start")
    recipe = Pretraining(**yaml.safe_load(args.recipe.read_text(encoding="utf-8")))
    wait_seconds = 60 * args.wait_minutes
    if args.search:
        rate = search(recipe, args.search, args.steps, args.work, args.output, wait_seconds)
        recipe = dataclasses.replace(recipe, learning_rate=rate)
    run(recipe, args.work, args.output, args.seconds, args.resume, wait_seconds, args.steps)


if __name__ == "__main__":
    run_command(main)
