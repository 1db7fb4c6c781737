# SPDX-License-Identifier: Apache-2.0
"""\
python -m scripts.benchmark.length --smoke --output runs/benchmark/length.json

Cost at contexts up to a million tokens: training steps with gradient checkpointing, prefill in pieces and decoding
after it, all on one GPU; and with torchrun, rows cut over several GPUs (context parallelism): their error against
whole rows, strong scaling at the longest context, and weak scaling at its part per device.

    python -m scripts.benchmark.length --parts train prefill --output runs/benchmark/length.json
    torchrun --nproc_per_node 2 -m scripts.benchmark.length --parts error scaling --output runs/benchmark/scaling.json
"""

import argparse
import gc
import json
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from flash_hf import FlashConfig, FlashForCausalLM
from flash_hf.commands.options import OptionParser, natural, run_command
from flash_hf.parallel import context_parallel, shard_sequence
from scripts.benchmark.tiny import error_ratio
from scripts.provenance import provenance, write_json


PARTS = ("train", "prefill", "error", "scaling")
FORMS = {"flash": FlashConfig, "plus": FlashConfig.plus}


def parse() -> argparse.Namespace:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["train", "prefill"])
    parser.add_argument("--contexts", nargs="+", type=natural, default=[8192, 131_072, 524_288, 1_048_576])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--tokens", type=natural, default=131_072, help="least tokens of a step: several short rows")
    parser.add_argument("--piece", type=natural, default=65_536, help="tokens of a piece of the prefill")
    parser.add_argument("--steps", type=natural, default=3)
    parser.add_argument("--limit_s", type=float, default=1e9, help="begin no measurement after so many seconds")
    parser.add_argument("--smoke", action="store_true", help="tiny models and contexts, on the CPU")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/length.json"))
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and {"error", "scaling"} & set(args.parts):
        parser.error("--parts error and scaling need several processes: torchrun --nproc_per_node 2 -m ...")
    args.device = "cpu" if args.smoke or not torch.cuda.is_available() else "cuda"
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
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
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

    def clean(self) -> None:
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.args.device == "cuda" else None

    def model(self, form: str, *, dtype: torch.dtype | None = None, **changes) -> FlashForCausalLM:
        """The base model with a vocabulary of 32,000, in bfloat16 on a GPU; the same weights on all processes."""
        small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "query_key_dim": 16, "chunk_size": 16}
        config = FORMS[form](**{**(small if self.args.smoke else {}), "is_decoder": True, **changes})
        torch.manual_seed(0)
        model = FlashForCausalLM(config)
        if dtype is None:
            dtype = torch.bfloat16 if self.args.device == "cuda" else torch.float32
        return model.to(self.args.device, dtype)

    def ids(self, model: FlashForCausalLM, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(self.args.device)

    def training(self, form: str) -> FlashForCausalLM:
        model = self.model(form).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.skip_logits = True
        return model

    def step_ms(self, model: FlashForCausalLM, batch: dict[str, Tensor], group=None) -> list[float]:
        """Milliseconds of training steps without the optimizer's; with a group, of the slowest process, with the
        average of gradients."""

        def step() -> None:
            model.zero_grad()
            model(**batch, use_cache=False).loss.backward()
            if group is not None:
                works = [dist.all_reduce(p.grad, group=group, async_op=True) for p in model.parameters()]
                for work in works:
                    work.wait()

        step()
        times = []
        for _ in range(self.args.steps):
            if group is not None:
                dist.barrier(group)
            self.wait()
            begin = time.perf_counter()
            step()
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
            bench.clean()
            rows = max(1, bench.args.tokens // context)
            row = {"part": "train", "form": form, "context": context, "rows": rows}
            try:
                model = bench.training(form)
                ids = bench.ids(model, rows, context)
                times = bench.step_ms(model, {"input_ids": ids, "labels": ids})
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
        bench.clean()
        row = {"part": "prefill", "form": form}
        try:
            model = bench.model(form).eval()
            longest, piece = max(bench.args.contexts), bench.args.piece
            ids = bench.ids(model, 1, longest)
            decode(bench, form, model, model(ids[:, :1024], use_cache=True, logits_to_keep=1).cache, ids)
            for attempt in ("warm-up", "measured"):
                cache, spent = None, []
                bench.clean()
                for begin in range(0, longest, piece):
                    bench.wait()
                    start = time.perf_counter()
                    part = ids[:, begin : begin + piece]
                    cache = model(part, cache=cache, use_cache=True, logits_to_keep=1).cache
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


def decode(bench: Bench, form: str, model: FlashForCausalLM, cache, ids: Tensor, tokens: int = 64) -> None:
    context, spent = int(cache.get_seq_length()), []
    for token in range(tokens + 4):
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
def gradients(model: FlashForCausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.float() for name, p in model.named_parameters()}


def error(bench: Bench) -> None:
    """bfloat16 rows that are cut, against whole rows in float32, beside whole rows in bfloat16. Weights are enlarged:
    at their usual size attention hardly shows."""
    for form in bench.args.forms:
        if bench.late(f"error {form}"):
            return
        bench.clean()
        try:
            changes = {} if bench.args.smoke else {"num_hidden_layers": 4, "hidden_size": 512}
            exact = bench.model(form, dtype=torch.float32, backend="torch", **changes).eval()
            generator = torch.Generator().manual_seed(2)
            for name, parameter in exact.named_parameters():
                if "norm" not in name:
                    noise = torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.ndim < 2 else 0.05)
                    parameter.data.add_(noise.to(parameter.device))
            model = bench.model(form, **changes).eval()
            model.load_state_dict(exact.state_dict())
            chunk = model.config.chunk_size
            for length in (8 * chunk, 8 * chunk * bench.size - chunk // 2 + 1):
                ids = bench.ids(model, 2, length)
                batch = {"input_ids": ids, "labels": ids}
                loss, expected = gradients(exact, batch)
                whole_loss, whole = gradients(model, batch)
                context_parallel(model, bench.mesh)
                cut_loss, cut = gradients(model, shard_sequence(batch, bench.mesh))
                for gradient in cut.values():
                    dist.all_reduce(gradient)
                    gradient /= bench.size
                context_parallel(model, None)
                ratios = {
                    name: (error_ratio(cut[name], expected[name]), error_ratio(whole[name], expected[name]))
                    for name in expected
                }
                worst = max(ratios, key=lambda name: ratios[name][0] / max(ratios[name][1], 1e-9))
                bench.add(
                    part="error", form=form, tokens=length, loss=float(loss), loss_whole=float(whole_loss),
                    loss_cut=float(cut_loss), worst=worst, error_cut=ratios[worst][0], error_whole=ratios[worst][1],
                    passed=all(cut <= 2 * whole + 1e-3 for cut, whole in ratios.values()),
                )  # fmt: skip
        except Exception as error:
            bench.add(part="error", form=form, note=failure(error))
            raise  # the processes may no longer agree


def scaling(bench: Bench) -> None:
    longest = max(bench.args.contexts)
    for form in bench.args.forms:
        alone: dict[int, float] = {}
        for context in (longest // bench.size, longest):
            if bench.late(f"scaling {form} {context} alone"):
                return
            bench.clean()
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
        bench.clean()
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
        model = ids = batch = None


def main() -> None:
    args = parse()
    bench = Bench(args)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("highest")
    for part in args.parts:
        {"train": train, "prefill": prefill, "error": error, "scaling": scaling}[part](bench)
    if bench.mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
