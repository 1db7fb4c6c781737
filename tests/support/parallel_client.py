# SPDX-License-Identifier: Apache-2.0
"""Compare pieces of rows over 2 and 4 CPU processes with whole rows, and print what differs as JSON.

Forked from one process, since importing the package takes longer than all cases together. Each process computes the
results of whole rows itself.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from interpreter import patch_interpreter
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from flash_hf import FlashForCausalLM, FlashForMaskedLM
from flash_hf.cache_flash import CACHE_NAME
from flash_hf.parallel import context_parallel, exchange, shard_sequence
from flash_hf.parallel.exchange import Neighbours
from scripts.benchmark import length
from scripts.benchmark.tiny import error_ratio, make_model, random_ids, tiny_config


PLUS = {"global_form": "previous_token", "use_scaled_sinusoid": False, "chunk_shift": 4}
FORMS = {
    "paper": {},
    "chunk mean": {"global_normalization": "chunk", "relative_bias": "t5"},
    "plus": PLUS,
    "plus, shifted local keys": {**PLUS, "local_key_shift": True, "rope_interleaved": True, "chunk_shift": 3},
    "shifted local keys": {"local_key_shift": True, "relative_bias": "rotary"},
    "shifted keys": {"global_form": "previous_token"},
    "softmax, shifted": {"attention_activation": "softmax", "chunk_shift": 5},
    "local, shifted": {"attention_type": "local", "chunk_shift": 4},
    "global": {"attention_type": "global", "use_rope": False, "chunk_shift": 2},
}


def rows(*lengths_of_documents):
    """positions of packed rows, padded on the right, and their mask."""
    rows = [torch.cat([torch.arange(length) for length in lengths]) for lengths in lengths_of_documents]
    width = max(len(row) for row in rows)
    mask = torch.stack([F.pad(torch.ones(len(row), dtype=torch.long), (0, width - len(row))) for row in rows])
    return {"position_ids": torch.stack([F.pad(row, (0, width - len(row))) for row in rows]), "attention_mask": mask}


def padded(width, *spans):
    """A mask of rows with real tokens in spans."""
    mask = torch.zeros(len(spans), width, dtype=torch.long)
    for row, own in enumerate(spans):
        for begin, end in own:
            mask[row, begin:end] = 1
    return {"attention_mask": mask}


def scattered(width, batch, seed):
    """Padding and documents anywhere."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(batch, width, generator=generator) > 0.3).long()
    mask[0, :20] = 0
    mask[1, 20:] = 0
    starts = (torch.rand(batch, width, generator=generator) < 0.1) & (mask > 0)
    positions = torch.zeros_like(mask)
    for row in range(batch):
        count = 0
        for column in range(width):
            count = 0 if starts[row, column] else count
            positions[row, column] = count
            count += int(mask[row, column])
    return {"attention_mask": mask, "position_ids": positions}


def inputs(size):
    """Marks of rows, by name; the length is that of a mark or the number."""
    return {
        "whole chunks": 64,
        "odd length": 45,
        "piece without tokens": 8 * (size + 1) if size > 2 else 9,
        "left padding": padded(64, [(0, 64)], [(13, 64)], [(40, 64)]),
        "row ends in the first piece": padded(64, [(0, 64)], [(0, 11)], [(0, 16)]),
        "padding amid": padded(64, [(0, 10), (30, 64)], [(5, 7), (20, 22), (50, 61)], [(30, 34)]),
        "documents across the cuts": rows([20, 24, 20], [64], [5, 59], [1] * 64),
        "documents at the cuts": rows([32, 32], [16, 16, 16, 16], [8, 50]),
        "few documents": rows([3, 40, 2], [12]),
        "scattered": scattered(64, 4, 0),
        "scattered more": scattered(61, 5, 1),
    }


def loss_of(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    """In float64, unlike that of transformers."""
    wanted = labels if shift_labels is None else shift_labels
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    return total / ((wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def batch_of(config, marks, causal):
    """A batch with labels; shifted for the whole row if causal, as the loss above does not."""
    length = marks if isinstance(marks, int) else marks["attention_mask"].shape[1]
    count = 2 if isinstance(marks, int) else len(marks["attention_mask"])
    batch = {"input_ids": random_ids(config, count, length), **({} if isinstance(marks, int) else marks)}
    labels = random_ids(config, count, length, seed=1)
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, 3] = -100
    batch["labels"] = labels
    if causal:
        batch["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=-100)
    return batch


def compare(
    cls, config, marks, mesh, *, dtype=torch.float64, tolerance=1e-9, checkpointing=False, again=False, states=True
):  # fmt: skip
    """What differs between pieces and whole rows in float64 and plain torch, as a list of sentences; with `again`
    also between two runs, bit by bit; with `states` also what causal models leave to decoding."""
    causal = cls is FlashForCausalLM
    rank, size = mesh.get_local_rank(), mesh.size()
    wrong = []

    def same(what, actual, expected):
        error = error_ratio(actual, expected) if expected.numel() else 0.0
        if actual.shape != expected.shape or not error <= tolerance:
            wrong.append(f"{what}: {error:.2g}, {tuple(actual.shape)} {tuple(expected.shape)}")

    model = make_model(cls, config, dtype=dtype).train(checkpointing or config.hidden_dropout > 0)
    model.loss_function = loss_of
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = batch_of(config, marks, causal)
    exact = make_model(cls, dataclasses.replace(config, backend="torch")).train(model.training)
    exact.loss_function = loss_of
    whole = exact(**batch, use_cache=False)
    whole.loss.backward()
    expected = gradients(exact)

    context_parallel(model, mesh)
    piece = shard_sequence(batch, mesh)
    out = model(**piece, use_cache=False)
    out.loss.backward()
    if again:
        first = {name: gradient.clone() for name, gradient in gradients(model).items()}
        model.zero_grad()
        model(**piece, use_cache=False).loss.backward()
        wrong += [
            f"{name}: two runs" for name, gradient in gradients(model).items() if not gradient.equal(first[name])
        ]
    same("loss", out.loss, whole.loss)
    length = piece["input_ids"].shape[1]
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    real = F.pad(real, (0, size * length - real.shape[1]))[:, rank * length : (rank + 1) * length]
    logits = F.pad(whole.logits, (0, 0, 0, size * length - whole.logits.shape[1]))
    same("logits", out.logits[real], logits[:, rank * length : (rank + 1) * length][real])
    for name, gradient in gradients(model).items():
        dist.all_reduce(gradient)
        same(name, gradient / size, expected[name])
    if causal and states:
        wrong += compare_states(model, batch, mesh, same) or []
    context_parallel(model, None)
    return wrong


def compare_states(model, batch, mesh, same):
    """The cache of the last process against that of whole rows, and five tokens after it."""
    marks = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    model.eval()
    with torch.no_grad():
        cache = getattr(model(**shard_sequence(marks, mesh), use_cache=True), CACHE_NAME)
        context_parallel(model, None)
        if mesh.get_local_rank() < mesh.size() - 1:
            return
        expected = getattr(model(**marks, use_cache=True), CACHE_NAME)
        for ours, theirs in zip(cache.layers, expected.layers, strict=True):
            if ours.state.total is not None:
                seen = theirs.state.seen > 0
                same("total", ours.state.total[seen], theirs.state.total[seen])
            if not torch.equal(ours.state.seen, theirs.state.seen):
                return [f"seen: {ours.state.seen.tolist()}, {theirs.state.seen.tolist()}"]
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        columns = int(real.any(0).nonzero().max()) + 1
        if cache.get_seq_length() != columns:
            return [f"columns: {cache.get_seq_length()}, {columns}"]
        new = random_ids(model.config, len(real), 13, seed=3)
        for part in (new[:, :1], new[:, 1:2], new[:, 2:]):
            same("next logits", model(part, cache=cache).logits, model(part, cache=expected).logits)


def exact(mesh):
    """Forms and kinds of rows in float64: every pair of the most general form, and a third of the others."""
    cases = itertools.product(FORMS.items(), (FlashForCausalLM, FlashForMaskedLM), inputs(mesh.size()).items())
    for index, ((name, changes), cls, (kind, marks)) in enumerate(cases):
        if name == "plus, shifted local keys" or index % 3 == 0:
            yield f"{cls.__name__}, {name}, {kind}", compare(cls, tiny_config(**changes), marks, mesh)


def others(mesh):
    """Gradient checkpointing, bfloat16, the losses of transformers, and without logits."""
    for changes in (FORMS["paper"], PLUS):
        for kind in ("whole chunks", "scattered"):
            marks = inputs(mesh.size())[kind]
            yield (
                f"checkpointing, {changes}, {kind}",
                compare(FlashForCausalLM, tiny_config(**changes), marks, mesh, checkpointing=True),
            )
    config = tiny_config(**PLUS, vocab_size=61)
    for cls in (FlashForCausalLM, FlashForMaskedLM):
        yield f"{cls.__name__}, losses", losses(cls, config, mesh)
    yield "bfloat16", half(mesh)


def kernels(mesh):
    """Triton's interpreter in float32: training in whole layers and between the projections, and a cache."""
    patch_interpreter()
    forms = {
        "paper": {}, "plus": PLUS, "plus, shifted local keys": {**PLUS, "local_key_shift": True},
        "local, shifted": FORMS["local, shifted"], "global": FORMS["global"],
        "layer norm": {"norm_type": "layer_norm"}, "shifted local keys": {"local_key_shift": True},
        "dropout": {**PLUS, "hidden_dropout": 0.5},
    }  # fmt: skip
    most = "plus, shifted local keys"
    if mesh.size() > 2:  # the interpreter takes minutes for all forms and kinds of rows
        forms = {most: forms[most]}
    calls, sums, documents, dropout = set(), Neighbours.start_sums, Neighbours.start_documents, F.dropout
    F.dropout = lambda x, p, training=True: x * (1 - p) if training else x  # the same for pieces and whole rows
    Neighbours.start_sums = lambda self, *given: calls.add((True, self.first_BG is None)) or sums(self, *given)
    Neighbours.start_documents = lambda self, *given: (
        calls.add((False, self.first_BG is None)) or documents(self, *given)
    )
    for (name, changes), cls in itertools.product(forms.items(), (FlashForCausalLM, FlashForMaskedLM)):
        if cls is FlashForMaskedLM and name in ("local, shifted", "global", "layer norm"):
            continue
        changes = {"hidden_size": 32, "query_key_dim": 16, "num_hidden_layers": 2, "chunk_size": 16, **changes}
        config = tiny_config(**changes, backend="triton")
        options = {"dtype": torch.float32, "tolerance": 2e-4}
        kinds = {"whole chunks": 64}
        if name == most:
            config.chunk_size = config.attention_divisor = 8
            kinds["packed"] = rows([3, 16, 8 * mesh.size() - 14], [12])  # padded, too, and a document across the cut
            if mesh.size() > 2:
                kinds["a last piece of five tokens"] = 77
            else:
                kinds["padded"] = padded(32, [(0, 32)], [(3, 14)], [(0, 16)])
        for kind, marks in kinds.items():
            given = {"again": kind == "packed", "checkpointing": name == "plus", **options}
            yield f"{cls.__name__}, kernels, {name}, {kind}", compare(cls, config, marks, mesh, **given)
    yield "kernels ran", [] if len(calls) == 4 else [f"causal or not, for plain and other rows: {calls}"]
    Neighbours.start_sums, Neighbours.start_documents, F.dropout = sums, documents, dropout


def overlap(mesh):
    """Kernels: scores are launched after a layer's exchange of sums has begun, and before it is waited for; and no
    hidden states are copied for their halo."""
    from flash_hf.kernels import launches

    patch_interpreter()
    events, exchanging = [], []

    class Watched:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("wait")
            return self.work.wait()

    def watched(collective):
        def begin(*tensors, group, async_op=False):
            work = collective(*tensors, group=group, async_op=async_op)
            if not exchanging:
                return work
            events.append("begin")
            return Watched(work)

        return begin

    def noted(start):
        def begin(*given):
            exchanging.append(start)
            finish = start(*given)
            exchanging.clear()
            return finish

        return begin

    launch_scores, extend = launches.launch_scores, Neighbours.extend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "launch_scores", lambda *given: events.append("scores") or launch_scores(*given))
        patch.setattr(Neighbours, "extend", lambda *given: events.append("copy") or extend(*given))
        for name in ("all_gather", "reduce_scatter"):
            patch.setattr(exchange, name, watched(getattr(exchange, name)))
        for name in ("start_sums", "start_documents", "start_gradients"):
            patch.setattr(Neighbours, name, noted(getattr(Neighbours, name)))
        config = tiny_config(**PLUS, hidden_size=32, query_key_dim=16, num_hidden_layers=2, backend="triton")
        for cls in (FlashForCausalLM, FlashForMaskedLM):
            events.clear()
            wrong = compare(cls, config, 32, mesh, dtype=torch.float32, tolerance=2e-4, states=False)
            expected = 4 * ["begin", "scores", "wait"]  # two layers, forward and backward
            yield f"{cls.__name__}, overlap", wrong + ([] if events == expected else [events])
    model = context_parallel(make_model(FlashForCausalLM, config, dtype=torch.float32), mesh)
    if mesh.get_local_rank():
        model.model.layers[1].gau.u_proj.register_forward_hook(lambda *_: None)
    try:
        model(**shard_sequence({"input_ids": random_ids(config, 1, 32)}, mesh))
        yield "hooks on one process", ["nothing was raised"]
    except ValueError as error:
        yield "hooks on one process", [] if "[[], [1]]" in str(error) else [str(error)]


def scans(mesh):
    """What is around the kernels for Hopper, with these in torch: all half chunks have tokens, as without cuts."""
    tests = Path(__file__).resolve().parents[1]
    sys.path += [str(tests), str(tests / "kernels")]
    from flash_hf.kernels import launches
    from test_scan import replace_by_torch

    patch_interpreter()
    shapes, launch_scan = [], launches.launch_scan

    def noted(shape, *given):
        shapes.append(shape)
        launch_scan(shape, *given)

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "query_key_dim": 128, "chunk_size": 256, "backend": "triton"}
    plus = {**PLUS, "chunk_shift": 128, "local_key_shift": True}
    cases = (FlashForCausalLM, "paper", {}), (FlashForCausalLM, "plus", plus), (FlashForMaskedLM, "plus", plus)
    with pytest.MonkeyPatch.context() as patch:
        ran = replace_by_torch(patch)
        patch.setattr(launches, "launch_scan", noted)
        for cls, name, form in cases:
            shapes.clear()
            ran.clear()
            options = {"dtype": torch.float32, "tolerance": 2e-4, "states": name == "plus"}
            wrong = compare(cls, tiny_config(**sizes, **form), 512 * mesh.size(), mesh, **options)
            even = [shape.even and shape.halves.start * 128 == shape.shift for shape in shapes[:4]]
            # Two layers, forward and backward.
            right = even == [True] * 4 and ran["reduce_kernel"] == 2
            yield f"{cls.__name__}, scans, {name}", wrong + ([] if right else [even, dict(ran)])


def losses(cls, config, mesh):
    """transformers' loss and the one without logits, with and without a given number of items."""
    wrong = []
    batch = batch_of(config, inputs(mesh.size())["few documents"], False)
    model = make_model(cls, config, dtype=torch.float32)
    for items in (None, torch.tensor(70)):
        for skip in (False, True):
            options = {"skip_logits": skip} | ({} if items is None else {"num_items_in_batch": items})
            whole = model(**batch, **options).loss
            context_parallel(model, mesh)
            loss = model(**shard_sequence(batch, mesh), **options).loss
            context_parallel(model, None)
            if abs(float(loss / whole) - 1) > 1e-5:
                wrong.append(f"items {items}, skip_logits {skip}: {float(loss)}, {float(whole)}")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    context_parallel(model, mesh)
    loss = model(**shard_sequence(batch, mesh)).loss
    loss.backward()
    context_parallel(model, None)
    return wrong + ([] if float(loss) == 0 else [f"no labels: {float(loss)}"])


def half(mesh):
    """bfloat16 is as far from float64 as whole rows are."""
    config = tiny_config(**PLUS)
    batch = batch_of(config, inputs(mesh.size())["documents across the cuts"], True)
    exact = make_model(FlashForCausalLM, config, scale=0.15)
    model = make_model(FlashForCausalLM, config, dtype=torch.bfloat16, scale=0.15)
    with torch.no_grad():
        reference = exact(**batch).logits
        own = error_ratio(model(**batch).logits, reference)
        context_parallel(model, mesh)
        piece = shard_sequence(batch, mesh)
        length, rank = piece["input_ids"].shape[1], mesh.get_local_rank()
        found = error_ratio(model(**piece).logits, reference[:, rank * length : (rank + 1) * length])
    return [] if found <= 2 * own else [f"{found:.2g}, whole rows {own:.2g}"]


def measured(mesh):
    """`scripts.benchmark.length --parts error` passes right rows, and fails those without a halo or without sums."""
    os.environ["WORLD_SIZE"] = str(mesh.size())
    gather = Neighbours.gather

    def without(dims):
        """Zeros in place of what other processes give in tensors of so many dimensions."""

        def fault(self, x):
            out, wait = gather(self, x)
            wait()
            return out * (x.ndim != dims), lambda: None

        return fault

    for name, given, right in (
        ("right", gather, True),
        ("no halo", without(3), False),
        ("no sums", without(4), False),
    ):
        Neighbours.gather = given
        with tempfile.TemporaryDirectory() as folder:
            forms = ["plus"] if name == "no halo" else ["flash", "plus", "bidirectional"]
            args = SimpleNamespace(
                smoke=True, device="cpu", forms=forms, limit_s=1e9, output=Path(folder) / "length.json"
            )
            bench = length.Bench(args)
            with contextlib.redirect_stdout(io.StringIO()):
                length.error(bench, models=4)
        rows = [row for row in bench.rows if row["passed"] is not right]
        yield f"error, {name}", rows + ([] if len(bench.rows) == 2 * len(forms) * (bench.rank == 0) else ["rows"])
    Neighbours.gather = gather


def refused(mesh):
    """Errors on one process are raised on all of them, and the next call works."""
    config = tiny_config()
    model = make_model(FlashForCausalLM, config)
    rank, size = mesh.get_local_rank(), mesh.size()
    context_parallel(model, mesh)
    whole = {"input_ids": random_ids(config, 2, 64)}
    piece = shard_sequence(whole, mesh)
    ids = piece["input_ids"]

    def expect(what, message, call):
        try:
            call()
        except (ValueError, TypeError) as error:
            return what, [] if message in str(error) else [f"{type(error).__name__}: {error}"]
        return what, ["nothing was raised"]

    last = rank == size - 1
    yield expect("ids of one process", "input_ids must lie in", lambda: model(ids + 100 * last))
    yield expect("different lengths", "`tokens` differs", lambda: model(ids[:, 8:] if last else ids))
    yield expect("different batches", "`rows` differs", lambda: model(ids[:1] if last else ids))
    yield expect("not at a border", "border of chunks (chunk_size=8)", lambda: model(ids[:, :-1]))
    yield expect("labels not shifted", "shift_labels", lambda: model(ids, labels=ids))
    labels = {"labels": ids, "shift_labels": ids}
    yield expect("labels on one", "labels` differs", lambda: model(ids, **(labels if last else {})))
    short = {"labels": ids[:, :4], "shift_labels": ids}
    yield expect("wrong labels on one", "labels must have the", lambda: model(ids, **(short if last else labels)))
    yield expect("generate", "generate() cannot run", lambda: model.generate(ids))
    yield expect("base alone", "not its base alone", lambda: model.model(ids))
    yield expect("cu_seq_lens", "shard_sequence turns it", lambda: model(ids[:1], cu_seq_lens_q=torch.tensor([0, 16])))
    for form in ({"local_window": 2}, {"global_state": "delta"}):
        other = make_model(FlashForCausalLM, tiny_config(**form))
        yield expect(str(form), next(iter(form)), lambda other=other: context_parallel(other, mesh))
    yield expect("unknown argument", "cache", lambda: model(ids, mems=1))
    positions = torch.arange(ids.shape[1]).expand(2, -1) + rank * ids.shape[1] + 3 * last
    yield expect("positions", "count on over the pieces", lambda: model(ids, position_ids=positions))
    yield expect("a short row", "fewer than the", lambda: shard_sequence({"input_ids": ids[:, :8]}, mesh))
    quad = make_model(FlashForCausalLM, tiny_config(attention_type="quadratic"))
    yield expect("FLASH-Quad", "FLASH-Quad", lambda: context_parallel(quad, mesh))
    yield expect(
        "a dictionary for a mesh", "one dimension of a DeviceMesh", lambda: context_parallel(model, {"cp": 2})
    )
    context_parallel(model, mesh)
    with torch.no_grad():
        model(**piece)
    context_parallel(model, None)
    yield "the next call", [] if model.generate(ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2 else ["generate"]


def work(rank, size, folder, groups):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group{size}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    found = {}
    try:
        for group in groups:
            for name, wrong in globals()[group](mesh):
                found[name] = wrong
    except Exception:
        found["crashed"] = [traceback.format_exc()]
        os.write(2, found["crashed"][0].encode())
    with open(f"{folder}/{size}-{rank}.json", "w", encoding="utf-8") as file:
        json.dump(found, file)
    os._exit(0 if "crashed" not in found else 1)


def main(sizes, groups):
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            context = multiprocessing.get_context("fork")
            processes = [context.Process(target=work, args=(rank, size, folder, groups)) for rank in range(size)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            for rank in range(size):
                with open(f"{folder}/{size}-{rank}.json", encoding="utf-8") as file:
                    for name, wrong in json.load(file).items():
                        found[f"{size} processes, process {rank}: {name}"] = wrong
    wrong = {name: list(map(str, what)) for name, what in found.items() if what}
    print(json.dumps({"cases": len(found), "wrong": wrong}, indent=1))


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1].split(",")], sys.argv[2].split(","))
