# SPDX-License-Identifier: Apache-2.0
"""\
python -m scripts.benchmark.length --smoke --output runs/benchmark/length.json

Cost at contexts up to a million tokens: training steps with gradient checkpointing, prefill in pieces and decoding
after it, all on one GPU; and with torchrun, rows cut over several GPUs (context parallelism): their error against
whole rows, strong scaling at the longest context, and weak scaling at its part per device. The error can also be had
with more processes than GPUs: they exchange through gloo.

    python -m scripts.benchmark.length --parts train prefill --output runs/benchmark/length.json
    python -m scripts.benchmark.length --table scripts/results/length/*.json --plot scripts/results/length/length.png
    python -m scripts.benchmark.length --parts train --forms transformer++ --contexts 8192 32768 131072 --steps 1
    torchrun --nproc_per_node 2 -m scripts.benchmark.length --parts error scaling --output runs/benchmark/scaling.json
"""

import argparse
import json
import math
import os
import re
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache

from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM
from flash_hf.commands.options import OptionParser, natural, run_command
from flash_hf.parallel import context_parallel, shard_sequence
from flash_hf.parallel.exchange import all_gather, reduce_scatter
from scripts.baselines import TransformerPPConfig, TransformerPPForCausalLM
from scripts.benchmark import length_report
from scripts.benchmark.timing import clean
from scripts.provenance import provenance, write_json


PARTS = ("train", "prefill", "error", "scaling")
FORMS = {"flash": FlashConfig, "plus": partial(FlashConfig.plus, local_key_shift=False), "plus-keys": FlashConfig.plus}
# FLASH as a masked language model, which has no prefill.
BIDIRECTIONAL = "bidirectional"
# Without a decoding cache, and its rows cannot be cut: it takes part in `train` alone.
TRANSFORMER = "transformer++"


def parse() -> argparse.Namespace:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["train", "prefill"])
    parser.add_argument("--contexts", nargs="+", type=natural, default=[8192, 131_072, 524_288, 1_048_576])
    parser.add_argument(
        "--forms", nargs="+", choices=(*FORMS, BIDIRECTIONAL, TRANSFORMER), default=["flash", "plus-keys"]
    )
    parser.add_argument("--tokens", type=natural, default=131_072, help="least tokens of a step: several short rows")
    parser.add_argument("--piece", type=natural, default=65_536, help="tokens of a piece of the prefill")
    parser.add_argument("--steps", type=natural, default=3)
    parser.add_argument("--limit_s", type=float, default=1e9, help="begin no measurement after so many seconds")
    parser.add_argument("--table", nargs="+", type=Path, metavar="JSON", help="print the tables of files and exit")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --table, write the figure there")
    parser.add_argument("--smoke", action="store_true", help="tiny models and contexts, on the CPU")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/length.json"))
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and {"error", "scaling"} & set(args.parts):
        parser.error("--parts error and scaling need several processes: torchrun --nproc_per_node 2 -m ...")
    if TRANSFORMER in args.forms and args.parts != ["train"]:
        parser.error(f"--forms {TRANSFORMER} takes --parts train alone")
    if BIDIRECTIONAL in args.forms and "prefill" in args.parts:
        parser.error(f"--forms {BIDIRECTIONAL} has no prefill")
    args.device = "cpu" if args.smoke or not torch.cuda.is_available() else "cuda"
    if args.device == "cuda" and "scaling" in args.parts and int(os.environ["WORLD_SIZE"]) > torch.cuda.device_count():
        parser.error("--parts scaling needs a GPU for each process")
    if args.smoke:
        args.contexts, args.tokens, args.piece, args.steps = [64, 256], 128, 64, 1
    return args


class Bench:
    """The processes, the results so far, and the models of one run."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.begin, self.rows = args, time.perf_counter(), []
        self.made_by = provenance()
        self.rank, self.size, self.mesh = 0, int(os.environ.get("WORLD_SIZE", 1)), None
        if self.size > 1:
            gpus = torch.cuda.device_count() if args.device == "cuda" else 0
            if gpus:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
                torch.cuda.init()  # else the mesh would choose another device
            self.exchange = "nccl" if self.size <= gpus else "gloo"  # NCCL refuses two processes on one GPU
            if self.exchange == "gloo" and not dist.is_initialized():
                dist.init_process_group("gloo")
            self.mesh = dist.device_mesh.init_device_mesh(args.device, (self.size,), mesh_dim_names=("cp",))["cp"]
            self.rank = self.mesh.get_local_rank()

    def add(self, **row) -> None:
        """Keep a result of the first process, and write the file at once: the run may be cut off."""
        if self.rank == 0:
            self.rows.append(row)
            print(json.dumps(row), flush=True)
            write_json(self.args.output, {"made_by": self.made_by, "processes": self.size, "rows": self.rows})

    def late(self, what: str) -> bool:
        """Whether it is too late to begin a measurement; all processes decide as the first does."""
        late = torch.tensor(float(time.perf_counter() - self.begin > self.args.limit_s), device=self.args.device)
        if self.size > 1:
            dist.broadcast(late, 0)
        if late:
            self.add(what=what, note="not begun: out of time")
        return bool(late)

    def wait(self) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def peak_gib(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.args.device == "cuda" else None

    def model(self, form: str, *, dtype: torch.dtype | None = None, **changes) -> FlashForCausalLM:
        """The base model with a vocabulary of 32,000, in bfloat16 on a GPU; the same weights on all processes."""
        torch.manual_seed(0)
        if form == TRANSFORMER:
            small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            config = TransformerPPConfig(**(small if self.args.smoke else {}), is_decoder=True)
            model = TransformerPPForCausalLM(config)
            if self.args.device == "cuda":
                for layer in model.model.layers:
                    layer.compile(dynamic=True)
        else:
            small = {"hidden_size": 32, "num_hidden_layers": 2, "query_key_dim": 16, "chunk_size": 16}
            changes = {**({"vocab_size": 64, **small} if self.args.smoke else {}), **changes}
            if form == BIDIRECTIONAL:
                model = FlashForMaskedLM(FlashConfig(**changes))
            else:
                model = FlashForCausalLM(FORMS[form](**{"is_decoder": True, **changes}))
        if dtype is None:
            dtype = torch.bfloat16 if self.args.device == "cuda" else torch.float32
        return model.to(self.args.device, dtype)

    def ids(self, model: FlashForCausalLM, *shape: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(self.args.device)

    def training(self, form: str) -> FlashForCausalLM:
        model = self.model(form).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.skip_logits = True
        return model

    def step_ms(
        self, model: FlashForCausalLM, batch: dict[str, Tensor], group=None, warm_up: dict[str, Tensor] | None = None
    ) -> list[float]:
        """Milliseconds of training steps without the optimizer's; with a group, of the slowest process, with the
        average of gradients. The first step, not measured, is on `warm_up`, by default the batch."""

        def step(inputs: dict[str, Tensor]) -> None:
            model.zero_grad()
            model(**inputs, use_cache=False).loss.backward()
            if group is not None:
                bucket = torch.cat([p.grad.flatten() for p in model.parameters()])  # as DDP does
                dist.all_reduce(bucket, group=group)

        step(warm_up or batch)
        times = []
        for _ in range(self.args.steps):
            if group is not None:
                dist.barrier(group)
            self.wait()
            begin = time.perf_counter()
            step(batch)
            self.wait()
            spent = torch.tensor(1e3 * (time.perf_counter() - begin), device=self.args.device)
            if group is not None:
                dist.all_reduce(spent, dist.ReduceOp.MAX, group=group)
            times.append(float(spent))
        return times


def timed(times: list[float], tokens: int) -> dict[str, float]:
    middle = statistics.median(times)
    return {"ms": round(middle, 3), "ms_least": round(min(times), 3), "us_per_token": round(1e3 * middle / tokens, 4)}


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


# ------------------------------------------------------------------------------------------------------------------
# One device
# ------------------------------------------------------------------------------------------------------------------
def train(bench: Bench) -> None:
    for form in bench.args.forms:
        for context in bench.args.contexts:
            if bench.late(f"train {form} {context}"):
                return
            clean(bench.args.device)
            rows = max(1, bench.args.tokens // context)
            row = {"part": "train", "form": form, "context": context, "rows": rows}
            try:
                model = bench.training(form)
                ids = bench.ids(model, rows, context)
                # A step of the Transformer at the longest contexts takes longer than all the others together.
                short = ids[:, : 8192 if form == TRANSFORMER else None]
                warm_up = {"input_ids": short, "labels": short}
                times = bench.step_ms(model, {"input_ids": ids, "labels": ids}, warm_up=warm_up)
                bench.add(**row, **timed(times, rows * context), peak_gib=bench.peak_gib())
            except Exception as error:  # out of memory, for one
                bench.add(**row, note=failure(error))
            model = ids = None


@torch.no_grad()
def prefill(bench: Bench) -> None:
    """Pieces of one row to the longest context, and decoding after the first 1,024 tokens and at the end."""
    for form in bench.args.forms:
        if bench.late(f"prefill {form}"):
            return
        clean(bench.args.device)
        row = {"part": "prefill", "form": form}
        try:
            model = bench.model(form).eval()
            longest, piece = max(bench.args.contexts), bench.args.piece
            ids = bench.ids(model, 1, longest)
            cache = DynamicCache(config=model.config)
            model(ids[:, :1024], cache=cache, use_cache=True, logits_to_keep=1)
            decode(bench, form, model, cache, ids)
            for attempt in ("warm-up", "measured"):
                cache, spent = DynamicCache(config=model.config), []
                clean(bench.args.device)
                for begin in range(0, longest, piece):
                    bench.wait()
                    start = time.perf_counter()
                    part = ids[:, begin : begin + piece]
                    model(part, cache=cache, use_cache=True, logits_to_keep=1)
                    bench.wait()
                    spent.append(1e3 * (time.perf_counter() - start))
                    if attempt == "warm-up" and begin:
                        break
            for number, milliseconds in enumerate(spent):
                if number & (number + 1) == 0 or number == len(spent) - 1:  # pieces 1, 2, 4, 8, ... and the last
                    bench.add(**row, context=(number + 1) * piece, **timed([milliseconds], piece))
            bench.add(
                **row, context=longest, pieces=len(spent), **timed([sum(spent)], longest), peak_gib=bench.peak_gib()
            )
            decode(bench, form, model, cache, ids)
        except Exception as error:
            bench.add(**row, note=failure(error))
        model = cache = None


def decode(bench: Bench, form: str, model: FlashForCausalLM, cache, ids: Tensor) -> None:
    context, spent = int(cache.get_seq_length()), []
    for token in range(4 + 64):
        bench.wait()
        begin = time.perf_counter()
        model(ids[:, token : token + 1], cache=cache, use_cache=True)
        bench.wait()
        spent.append(1e3 * (time.perf_counter() - begin))
    size = sum(x.nbytes for layer in cache.layers for x in layer.state if x is not None)
    bench.add(part="decode", form=form, context=context, **timed(spent[4:], 1), cache_bytes=size)


# ------------------------------------------------------------------------------------------------------------------
# Several devices
# ------------------------------------------------------------------------------------------------------------------
def gradients(model: FlashForCausalLM, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter in float64."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in model.named_parameters()}


class Errors:
    """Squares of errors and of the truth, summed by kind of parameter over layers and models.

    The relative error of one number is a matter of luck: so gains and scales, which are single numbers, are one kind.
    """

    def __init__(self):
        self.squares: dict[str, Tensor] = {}

    def add(self, cut: dict[str, Tensor], whole: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
        for name, truth in exact.items():
            kind = "gains and scales" if truth.numel() == 1 else re.sub(r"layers\.\d+", "layers", name)
            parts = (cut[name] - truth, whole[name] - truth, truth)
            squares = torch.stack([part.square().sum() for part in parts])
            self.squares[kind] = self.squares.get(kind, 0) + squares

    def worst(self) -> tuple[str, float, float]:
        """The kind with the largest error of cut rows over that of whole ones, and both relative errors."""
        ratios = {}
        for kind, squares in self.squares.items():
            cut, whole, truth = squares.sqrt().tolist()
            ratios[kind] = (cut / truth, whole / truth) if truth else (cut, whole)
        worst = max(ratios, key=lambda kind: excess(*ratios[kind]))
        return worst, *ratios[worst]


def excess(cut: float, whole: float) -> float:
    """At most 1 if the error of cut rows is within twice that of whole rows; infinite if it is not finite."""
    return cut / (2 * whole + 1e-3) if math.isfinite(cut) else math.inf


@torch.no_grad()
def sample(model: FlashForCausalLM, usual: dict[str, Tensor], seed: int) -> None:
    """Add noise to the usual weights: at their size attention hardly shows."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=model.device)
        scale = 0.0 if "norm" in name else 0.5 if parameter.ndim < 2 else 0.05
        parameter.copy_(usual[name] + scale * noise)


def error(bench: Bench, models: int = 16) -> None:
    """Gradients of rows that are cut, in bfloat16, against those of whole rows in float64, beside whole rows in
    bfloat16: for pieces of whole chunks, and for an odd length, whose last piece is padded."""
    changes = {} if bench.args.smoke else {"num_hidden_layers": 4, "vocab_size": 2048}
    for form in bench.args.forms:
        model = bench.model(form, dtype=torch.bfloat16, **changes).eval()
        exact = bench.model(form, dtype=torch.float64, backend="torch", **changes).eval()
        usual = {name: parameter.detach().clone() for name, parameter in exact.named_parameters()}
        chunk = model.config.chunk_size
        length = 8 * chunk * bench.size
        for tokens in (length, length - chunk // 2 + 1):
            if bench.late(f"error {form} {tokens}"):
                return
            errors, losses = Errors(), []
            for seed in range(models):
                sample(model, usual, seed)
                exact.load_state_dict(model.state_dict())
                ids = bench.ids(model, 2, tokens, seed=seed)
                batch = {"input_ids": ids, "labels": ids}
                loss, truth = gradients(exact, batch)
                whole_loss, whole = gradients(model, batch)
                context_parallel(model, bench.mesh)
                cut_loss, cut = gradients(model, shard_sequence(batch, bench.mesh))
                for gradient in cut.values():
                    dist.all_reduce(gradient)
                    gradient /= bench.size
                context_parallel(model, None)
                errors.add(cut, whole, truth)
                losses.append((cut_loss - loss, whole_loss - loss, loss))
            worst, cut_error, whole_error = errors.worst()
            cut_loss, whole_loss, loss = torch.tensor(losses).norm(dim=0).tolist()
            bench.add(
                part="error", form=form, devices=bench.size, exchange=bench.exchange, tokens=tokens,
                backend=model.config.backend, models=models,
                loss_cut=cut_loss / loss, loss_whole=whole_loss / loss, worst=worst,
                error_cut=cut_error, error_whole=whole_error,
                passed=excess(cut_error, whole_error) <= 1 and excess(cut_loss / loss, whole_loss / loss) <= 1,
            )  # fmt: skip


def scaling(bench: Bench) -> None:
    longest = max(bench.args.contexts)
    for form in bench.args.forms:
        alone: dict[int, float] = {}
        for context in (longest // bench.size, longest):
            if bench.late(f"scaling {form} {context} alone"):
                return
            clean(bench.args.device)
            row = {"part": "scaling", "form": form, "context": context, "devices": 1}
            try:
                model = bench.training(form)
                ids = bench.ids(model, 1, context)
                times = bench.step_ms(model, {"input_ids": ids, "labels": ids})
                alone[context] = statistics.median(times)
                bench.add(**row, **timed(times, context), peak_gib=bench.peak_gib())
            except torch.OutOfMemoryError as error:
                bench.add(**row, note=failure(error))
            model = ids = None
        if bench.late(f"scaling {form} {longest} cut"):
            return
        clean(bench.args.device)
        dist.barrier(bench.mesh.get_group())
        model = context_parallel(bench.training(form), bench.mesh)
        ids = bench.ids(model, 1, longest)
        batch = shard_sequence({"input_ids": ids, "labels": ids}, bench.mesh)
        times = bench.step_ms(model, batch, bench.mesh.get_group())
        middle = statistics.median(times)
        bench.add(
            part="scaling", form=form, context=longest, devices=bench.size, **timed(times, longest),
            peak_gib=bench.peak_gib(),
            strong=round(alone[longest] / middle, 3) if longest in alone else None,
            weak=round(alone[longest // bench.size] / middle, 3) if longest // bench.size in alone else None,
        )  # fmt: skip
        if form == bench.args.forms[-1]:
            links(bench, model)
        model = ids = batch = None


def links(bench: Bench, model: FlashForCausalLM) -> None:
    """The collectives of a step, each alone: of a layer's sums, forward and backward, and of all gradients."""
    group, config = bench.mesh.get_group(), model.config
    sums = torch.zeros(config.query_key_dim * config.intermediate_size, device=bench.args.device)
    of_all = sums.repeat(bench.size)
    parameters = list(model.parameters())
    gradients = torch.zeros(sum(p.numel() for p in parameters), device=sums.device, dtype=parameters[0].dtype)
    collectives = {
        "all-gather": (lambda: all_gather(of_all, sums, group=group), sums),
        "reduce-scatter": (lambda: reduce_scatter(sums, of_all, group=group), sums),
        "all-reduce": (lambda: dist.all_reduce(gradients, group=group), gradients),
    }
    for name, (call, tensor) in collectives.items():
        for _ in range(2):  # the first one sets up the connections
            dist.barrier(group)
            bench.wait()
            begin = time.perf_counter()
            for _ in range(20):
                call()
            bench.wait()
            ms = 1e3 * (time.perf_counter() - begin) / 20
        bench.add(part="links", collective=name, devices=bench.size, bytes=tensor.nbytes, ms=round(ms, 4))


def main() -> None:
    args = parse()
    if args.table:
        rows = length_report.read(args.table)
        print(length_report.tables(rows))
        if args.plot:
            length_report.plot(rows, args.plot)
        return
    bench = Bench(args)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("highest")
    for part in args.parts:
        {"train": train, "prefill": prefill, "error": error, "scaling": scaling}[part](bench)
    if bench.mesh is not None:
        dist.barrier()  # a process of gloo that ends while another still receives aborts that one
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
