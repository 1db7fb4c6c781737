# SPDX-License-Identifier: Apache-2.0
"""The kernels for Hopper: when they are chosen, that they compile without a GPU, and on one that they are right."""

import collections
import dataclasses
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from flash_hf import FlashModel
from flash_hf.kernels import choice, launches, ops, plan, replay, tiles
from helpers import assert_close, error_ratio, make_model
from machine_code import early_accesses, uncertain_descriptors
from test_kernels import DEVICE, compare, config_of, through


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.usefixtures("exact_float32")
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")

SHAPE = tiles.Shape(
    B=2, N=700, G=3, C=256, shift=0, D=768, E=1536, S=128, H=4, causal=True, quad=True, lin=True, previous=False,
    local_shift=False, delta=False, silu=True, interleaved=False, rotary_dim=128, scale=1 / 256, dtype=torch.bfloat16,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"quad": False}, {"lin": False}, {"D": 0}, {"silu": False}, {"C": 128},
        {"S": 64}, {"E": 1600}, {"dtype": torch.float16}, {"dtype": torch.float32},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)  # fmt: skip
def test_what_the_scan_is_not_for_keeps_the_other_kernels(changes, monkeypatch):
    monkeypatch.setattr(choice, "scan_for", lambda device: True)
    device = torch.device("cuda")
    assert choice.scans(SHAPE, None, device)
    assert not choice.scans(SHAPE, torch.zeros(1), device)  # padded or packed rows
    assert not choice.scans(dataclasses.replace(SHAPE, **changes), None, device)


@pytest.mark.parametrize(
    ("changes", "halves", "skips", "even"),
    [
        ({"N": 512, "G": 2}, (0, 4), False, True),
        ({"N": 500, "G": 2}, (0, 4), False, False),
        ({"N": 384, "G": 2}, (0, 3), True, True),
        ({"N": 300, "G": 2}, (0, 3), True, False),
        ({"N": 512, "G": 3, "shift": 128}, (1, 5), True, True),
        ({"N": 513, "G": 3, "shift": 128}, (1, 6), True, False),
        ({"N": 512, "G": 3, "shift": 127}, (0, 5), True, False),
        ({"N": 600, "G": 3, "shift": 64}, (0, 6), False, False),
        ({"N": 512, "G": 3, "shift": 128, "delta": True}, (0, 6), False, False),
        ({"N": 100, "G": 2}, (0, 4), False, False),  # an exported program: its second chunk is empty
        ({"N": 512, "G": 4, "C": 128}, (0, 8), False, False),
    ],
    ids=str,
)  # fmt: skip
def test_halves_of_chunks_that_are_computed(changes, halves, skips, even):
    shape = dataclasses.replace(SHAPE, **changes)
    assert (shape.halves, shape.skips, shape.even) == (range(*halves), skips, even)


ROWS = dataclasses.replace(SHAPE, N=1024, C=1024, G=1, H=2, lin=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"lin": True}, {"quad": False}, {"G": 2}, {"N": 1100, "C": 1100}, {"D": 0}, {"silu": False},
        {"E": 1600}, {"dtype": torch.float16},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_kernels_over_whole_rows_are_not_for(changes, monkeypatch):
    monkeypatch.setattr(choice, "scan_for", lambda device: True)
    device = torch.device("cuda")
    assert choice.spans_rows(ROWS, None, device)
    assert not choice.spans_rows(ROWS, torch.zeros(1), device)
    assert not choice.spans_rows(dataclasses.replace(ROWS, **changes), None, device)
    monkeypatch.setattr(choice, "scan_for", lambda device: False)
    assert not choice.spans_rows(ROWS, None, device)


@pytest.mark.skipif(choice.scan is None, reason="triton has no Gluon")
@pytest.mark.parametrize(
    "changes", [{"D": 0}, {"D": 772}, {"silu": False}, {"E": 1600}, {"dtype": torch.float32}], ids=str
)
def test_what_the_gates_product_is_not_for(changes, monkeypatch):
    monkeypatch.setattr(choice, "scan_for", lambda device: True)
    device = torch.device("cuda")
    assert choice.multiplies(SHAPE, None, True, device) and choice.multiplies(ROWS, None, False, device)
    # Padded or packed rows, and layers whose gate is part of a pass over states.
    assert not choice.multiplies(ROWS, torch.zeros(1), False, device)
    assert not choice.multiplies(SHAPE, None, False, device)
    assert not choice.multiplies(dataclasses.replace(SHAPE, **changes), None, True, device)
    monkeypatch.setattr(choice, "scan_for", lambda device: False)
    assert not choice.multiplies(SHAPE, None, True, device)


@pytest.mark.skipif(choice.scan is None, reason="triton has no Gluon")
def test_which_layers_end_with_the_product_for_hopper(monkeypatch):
    monkeypatch.setattr(choice, "scan_for", lambda device: True)

    def ends(T=65_536, D=768, E=1536, x=torch.bfloat16, out=torch.bfloat16):
        sizes = ((T // 2, 2, D), x), ((T, E), out)
        return choice.ends_layer(*(torch.empty(size, dtype=dtype, device="meta") for size, dtype in sizes))

    for D, tile in ((768, (128, 192)), (384, (128, 192)), (1024, (64, 256)), (256, (64, 256))):
        assert ends(D=D) and choice.product.tile_of(D) == tile and D % tile[1] == 0
    for changes in ({"D": 640}, {"E": 1568}, {"x": torch.float32}, {"x": torch.float32, "out": torch.float32}):
        assert not ends(**changes), changes
    assert not ends(T=512) and not ends(T=0) and ends(T=32_768)
    monkeypatch.setattr(choice, "scan_for", lambda device: False)
    assert not ends()


def test_which_rows_a_scan_holds():
    rows = dataclasses.replace(SHAPE, causal=False, N=512, G=2)
    assert choice.holds_rows(rows, None) and choice.holds_rows(dataclasses.replace(rows, N=256, G=1), None)
    assert not choice.holds_rows(rows, object())  # parts of rows on other processes
    for changes in ({"causal": True}, {"delta": True}, {"N": 513, "G": 3}, {"N": 384}):
        assert not choice.holds_rows(dataclasses.replace(rows, **changes), None), changes
    if choice.rowscan is not None:
        assert min(choice.rowscan.VALUE_SLOTS, choice.rowscan.BACK_VALUE_SLOTS) >= 2 * rows.G


@pytest.mark.parametrize(
    ("capability", "version", "chosen"),
    [((9, 0), "3.6.0", True), ((9, 0), "3.7.1", True), ((9, 0), "3.9.0", True), ((9, 0), "3.5.1", False),
     ((9, 0), "99.0", False), ((8, 0), "3.6.0", False), ((8, 9), "3.6.0", False), ((10, 0), "3.6.0", False),
     ((12, 0), "3.6.0", False)],
)  # fmt: skip
def test_the_scan_is_chosen_by_capability_and_triton(capability, version, chosen, monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(choice.triton, "__version__", version)
    monkeypatch.setattr(choice.logger, "warning_once", said.append, raising=False)
    if choice.scan is None:
        monkeypatch.setattr(choice, "scan", object())
    choice.scan_for.cache_clear()
    try:
        assert not choice.scan_for(torch.device("cpu"))
        for _ in range(2):
            assert choice.scan_for(torch.device("cuda", 0)) == chosen
    finally:
        choice.scan_for.cache_clear()
    # A reason is given once, and only where another triton would do.
    assert len(said) == (capability == (9, 0) and not chosen)
    assert all(version in message and "3.6" in message for message in said)


# Compiles each kernel as launches.py launches it, and prints its shared memory and the stack of its threads (spills).
COMPILE = """
import pathlib, re, subprocess, sys, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from flash_hf.kernels import (
    gate, hopper, product, quadratic, reduce, rowscan, scan, scores, totals, walk, wholescan)

def layout(block):
    return hopper.tile_layout(block)

def compiled(kernel, descriptors, warps=4, **constants):
    names = kernel.function.arg_names
    kinds = {"rms_ptr": "*fp32", "sums_ptr": "*fp32", "factor_ptr": "*fp32", "begin_ptr": "*i32", "end_ptr": "*i32",
             "total_ptr": "*fp32"}
    signature = {
        name: "constexpr" if name in constants else
        f"tensordesc<bf16{descriptors[name]},{layout(descriptors[name])!r}>"
        if name in descriptors else kinds.get(name, "*bf16") if name.endswith("_ptr") else
        "fp32" if name in ("inverse", "scale") else "i32"
        for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name.endswith("_ptr")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel.function, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32),
                          options={"num_warps": warps, "launch_pdl": True})

tokens, square = [1, 128, 128], [128, 128]
scanned = {"x": tokens, "h": tokens, "out": tokens, "value_out": tokens} | dict.fromkeys(
    ("a", "reader", "writer", "state", "states"), square)
end = [1, 128, walk.END.value]
depth = walk.DEPTH.value
halved = scanned | dict.fromkeys(("a", "reader", "writer"), [128, depth]) | dict.fromkeys(
    ("h", "out", "value_out"), end)
halved_back = halved | {"x": [1, depth, 128], "a": [depth, 128]}
reduced = {"d_attended": [1, 128, reduce.STEP], "value": [1, 128, reduce.STEP], "state": [128, reduce.STEP],
           "d_state": [128, reduce.STEP]} | dict.fromkeys(("a", "d_score", "d_query", "d_key"), square)
added = {"x": tokens, "keys": square}
multiplied = {"d_y": [128, gate.STEP], "w": [gate.STEP, 128]} | dict.fromkeys(
    ("u", "out", "d_attended", "d_u"), [128, gate.END.value])

def ends(width):
    rows, columns = product.tile_of(width)
    step = product.STEP
    descriptors = {"w": [128 if columns == 192 else columns, step], "w_rest": [step, step]}
    return compiled(product.product_kernel, descriptors | dict.fromkeys(("a", "x", "y"), [rows, step]), ROWS=rows,
                    COLUMNS=columns, STEP=step, STAGES=product.STAGES)

wide, high = [128, quadratic.STEP], [quadratic.STEP, 128]
factors = {"output": (wide, high), "values": (high, high), "scores": (wide, wide)}
slots = {"warps": 8, "SLOTS": scan.SLOTS, "VALUE_SLOTS": scan.VALUE_SLOTS}
held = {"SLOTS": rowscan.SLOTS, "VALUE_SLOTS": rowscan.VALUE_SLOTS}
held_back = {"SLOTS": rowscan.BACK_SLOTS, "VALUE_SLOTS": rowscan.BACK_VALUE_SLOTS}
part, rows = [1, 128, rowscan.WIDTH.value], [128, rowscan.WIDTH.value]
halved_rows = halved | {"x": part, "value_out": end, "states": rows}
rows_back = halved_rows | {"a": [walk.DEPTH.value, 128]}
scanned_back = halved | {"x": part, "states": rows} | dict.fromkeys(("a", "writer"), [depth, 128])
slots_back = {"SLOTS": scan.BACK_SLOTS, "VALUE_SLOTS": scan.BACK_VALUE_SLOTS}
found = {
    f"scan {split} {back}" + ", skipping" * skip: compiled(
        scan.scan_kernel, scanned_back if back else scanned, BACK=back, SPLIT=split, SKIP=skip, EVEN=split == "rows",
        SHIFTED=split != "rows" and not (skip and split == "ends"), **(slots_back if back else slots))
    for skip in (False, True) for split in ("rows", "pieces", "ends") for back in (False, True)
} | {
    f"whole {skip}": compiled(
        wholescan.whole_kernel, halved, BACK=False, SKIP=skip, EVEN=skip, SHIFTED=not skip, SLOTS=wholescan.SLOTS,
        VALUE_SLOTS=wholescan.VALUE_SLOTS)
    for skip in (False, True)
} | {
    f"whole {skip}, backward": compiled(
        wholescan.whole_kernel, halved_back, BACK=True, SKIP=skip, EVEN=not skip, SHIFTED=skip,
        SLOTS=wholescan.BACK_SLOTS, VALUE_SLOTS=wholescan.BACK_VALUE_SLOTS)
    for skip in (False, True)
} | {
    "totals": compiled(
        totals.totals_kernel, added, 8, BACK=False, SPLIT="cut", SKIP=True, EVEN=False, SLOTS=totals.SLOTS),
    "totals, backward": compiled(
        totals.totals_kernel, added, 8, BACK=True, SPLIT="pieces", SKIP=False, EVEN=True, SLOTS=totals.SLOTS),
    "rows": compiled(rowscan.row_kernel, halved_rows, BACK=False, EVEN=True, SHIFTED=False, **held),
    "rows, odd": compiled(rowscan.row_kernel, halved_rows, BACK=False, EVEN=False, SHIFTED=True, **held),
    "rows, backward": compiled(rowscan.row_kernel, rows_back, BACK=True, EVEN=False, SHIFTED=True, **held_back),
    "rows, backward, even": compiled(rowscan.row_kernel, rows_back, BACK=True, EVEN=True, SHIFTED=False, **held_back),
    "gate product": compiled(gate.gate_product_kernel, multiplied, STEP=gate.STEP, STAGES=gate.STAGES),
    "product": ends(768),
    "product, 256 columns": ends(1024),
} | {
    f"reduce {skip}": compiled(
        reduce.reduce_kernel, reduced, CAUSAL=True, SKIP=skip, STEP=reduce.STEP, STAGES=reduce.STAGES)
    for skip in (False, True)
} | {
    kind: compiled(
        quadratic.quadratic_kernel,
        {"x": x, "y": y} | dict.fromkeys(("held", "result", "value"), [128, quadratic.HALF.value]), KIND=kind,
        CAUSAL=True, STEP=quadratic.STEP, STAGES=quadratic.STAGES)
    for kind, (x, y) in factors.items()
} | {
    f"scores {bias} {causal} {skip}": compiled(
        scores.scores_kernel, {"q": [64, 128], "k": square, "a": [64, 128]}, BIAS=bias, CAUSAL=causal, SKIP=skip,
        STAGES=scores.STAGES)
    for bias, causal, skip in ((True, True, False), (True, False, True), (False, False, False))
} | {
    f"score heads {causal} {skip}": compiled(
        scores.score_heads_kernel,
        dict.fromkeys(("d_score_rows", "q", "k"), [scores.STEP, 128])
        | dict.fromkeys(("d_score", "d_q", "d_k"), [128, scores.STEP]),
        CAUSAL=causal, SKIP=skip, STEP=scores.STEP, STAGES=scores.GRADIENT_STAGES)
    for causal, skip in ((True, True), (False, False))
}
tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
for name, kernel in found.items():
    path = pathlib.Path(sys.argv[1], f"{name}.cubin")
    path.write_bytes(kernel.asm["cubin"])
    use, code = (
        subprocess.run([tools / tool, option, path], capture_output=True, text=True, check=True).stdout
        for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    path.with_suffix(".txt").write_text(code, encoding="utf-8")
    stack = re.search(r"STACK:([0-9]+)", use)[1]
    print("kernel", name, kernel.metadata.shared, stack, kernel.asm["ptx"].count("wgmma.mma_async"), sep=";")
"""


@pytest.mark.skipif(choice.scan is None, reason="triton has no Gluon")
def test_the_kernels_for_hopper_compile_without_one(tmp_path, monkeypatch):
    """For sm_90a, within a multiprocessor's shared memory, with at most a few registers spilled, with whole
    descriptors of what products read, and with no access to memory before the kernels before have ended."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE, str(tmp_path)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(";")[1:] for line in done.stdout.splitlines() if line.startswith("kernel;")]
    assert len(rows) == 35
    found = tuple(int(part) for part in choice.triton.__version__.split(".")[:2])
    # Bytes per thread. Versions that are not chosen yet may spill more.
    most = {(3, 6): 64, (3, 7): 64, (3, 8): 64, (3, 9): 104}.get(found, 256)
    for name, shared, stack, products in rows:
        assert int(shared) <= 227 * 1024, name
        assert int(stack) <= most, name
        assert int(products) > 0, name
        code = (tmp_path / f"{name}.txt").read_text(encoding="utf-8")
        assert early_accesses(code) == [], name
        # Each group of warps that has any waits.
        for place in re.finditer("ACQBULK", code):
            assert early_accesses(code[: place.start()] + "NOP" + code[place.end() :]), name
        if found <= (3, 7):  # as later versions of ptxas load them
            assert uncertain_descriptors(code) == (int(products), []), name
    if found <= (3, 7):
        # Without the constant of an upper half, as ptxas has left one out.
        less = re.sub(r"UMOV UR\d+, 0x40000040", "NOP", code, count=1)
        assert less != code and uncertain_descriptors(less)[1]


FORMS = {
    "paper": {}, "half shift": {"chunk_shift": 128, "global_form": "previous_token"}, "odd shift": {"chunk_shift": 77},
    "shifted keys": {"chunk_shift": 128, "global_form": "previous_token", "local_key_shift": True},
    "delta": {"chunk_shift": 128, "global_form": "previous_token", "global_state": "delta"},
}  # fmt: skip
forms = pytest.mark.parametrize("form", FORMS)
both_ways = pytest.mark.parametrize("form", [form for form in FORMS if form != "delta"])


def hopper_config(**changes):
    return config_of(**{"chunk_size": 256, "query_key_dim": 128, "hidden_size": 256, **changes})


# ------------------------------------------------------------------------------------------------------------------
# What is around the two kernels: with these in torch, as their docstrings say, in triton's interpreter
# ------------------------------------------------------------------------------------------------------------------
def halves_of(N, G, shift, SKIP):
    return range(shift // 128, -(-(N + shift) // 128)) if SKIP else range(2 * G)


def slots_of(chunk, N, G, shift, SKIP, EVEN=False):
    """Of a chunk's 256 slots: the tokens in them, which have one, and which are computed."""
    token = torch.arange(256) + chunk % G * 256 - shift
    real = (token >= 0) & (token < N)
    computed = real.view(2, 128).any(1).repeat_interleave(128) if SKIP else torch.ones_like(real)
    assert real[computed].all() or not EVEN
    return chunk // G * N + token[real], real, computed


def scan_in_torch(
    grid, x, h, a, reader, writer, out, states, value_out, rms, gain, bias_x, bias_h, carry, sums, begin, end, _, __,
    ___, N, G, shift, cut, e_blocks, tasks, *, BACK, SPLIT, SKIP, EVEN, **constants,
):  # fmt: skip
    if SPLIT == "pieces":
        walks = list(zip(range(len(begin)), begin.tolist(), end.tolist(), strict=True))
    else:
        walks = [(row, row * G, (row + 1) * G) for row in range(len(a) // 256 // G)]
    if SPLIT == "ends":
        assert grid == (132,) and tasks // 2 < 132 and 1 < cut < G
        borders = [last - cut if BACK else first + cut for _, first, last in walks]
        walks = [
            (row, *part) for (row, first, last), border in zip(walks, borders, strict=True)
            for part in ((first, border), (border, last))
        ]  # fmt: skip
    assert len(walks) == tasks // e_blocks
    for number, first, last in walks:
        chunks = range(first, last)[::-1] if BACK else range(first, last)
        begins_row = (last if BACK else first) % G == 0
        state = x.new_zeros(128, 128 * e_blocks) if begins_row else carry[number] * 256
        for chunk in chunks:
            token, real, computed = slots_of(chunk, N, G, shift, SKIP, EVEN)

            def tile(matrix, real=real, token=token):
                whole = matrix.new_zeros(256, matrix.shape[1])
                whole[real] = matrix[token]
                return whole

            slots = slice(chunk * 256, (chunk + 1) * 256)
            scale = tile(rms[:, None]) * gain
            seen = (computed[:, None] & computed).tril()
            weight = torch.where(seen, a[slots], 0)
            read, write = (torch.where(computed[:, None], x[slots], 0) for x in (reader, writer))
            if chunk != chunks[0] or not begins_row:
                states[chunk * 128 : (chunk + 1) * 128] = state / 256
            gate = tile(h) * scale + bias_h
            if BACK:
                values = tile(x)
                result = weight.T @ values + read @ (state / 256)
                s = gate.sigmoid()
                result = result * s * (1 + gate * (1 - s)) * real[:, None]
                sums[2 * chunk : 2 * chunk + 2] = result.view(2, 128, -1).sum(1)
                out[token] = (result * scale)[real]
                value_out[token] = (gate * s)[real]
            else:
                values = torch.nn.functional.silu(tile(x) * scale + bias_x) * real[:, None]
                result = weight @ values + read @ (state / 256)
                out[token] = (result * torch.nn.functional.silu(gate))[real]
            state = state + write.T @ values


def whole_in_torch(
    grid, x, h, a, reader, states, out, value_out, rms, gain, bias_x, bias_h, sums, begin, end, _, __, ___, N, G,
    shift, e_blocks, tasks, *, BACK, SKIP, EVEN, **constants,
):  # fmt: skip
    state = states.view(-1, 128, states.shape[-1])
    assert len(begin) == tasks // e_blocks
    for chunk in range(len(a) // 256):
        assert ((begin <= chunk) & (chunk < end)).sum() == 1
        token, real, computed = slots_of(chunk, N, G, shift, SKIP, EVEN)
        slots = slice(chunk * 256, (chunk + 1) * 256)
        weight = torch.where(computed[:, None] & computed, a[slots], 0)
        read = torch.where(computed[:, None], reader[slots], 0)
        values, gate = (matrix.new_zeros(256, 128 * e_blocks) for matrix in (x, h))
        scale = rms.new_zeros(256, 1)
        values[real], gate[real], scale[real] = x[token], h[token], rms[token, None] * gain
        gate = gate * scale + bias_h
        if BACK:
            result = weight.T @ values + read @ state[chunk // G]
            s = gate.sigmoid()
            result = result * s * (1 + gate * (1 - s)) * real[:, None]
            sums[2 * chunk : 2 * chunk + 2] = result.view(2, 128, -1).sum(1)
            out[token], value_out[token] = (result * scale)[real], (gate * s)[real]
        else:
            values = torch.nn.functional.silu(values * scale + bias_x) * real[:, None]
            result = weight @ values + read @ state[chunk // G]
            out[token] = (result * torch.nn.functional.silu(gate))[real]


def rows_in_torch(
    grid, x, h, a, reader, writer, out, states, value_out, rms, gain, bias_x, bias_h, sums, _, __, ___, N, G, shift,
    e_blocks, tasks, *, BACK, EVEN, **constants,
):  # fmt: skip
    assert G <= 2
    B, width = len(a) // 256 // G, choice.rowscan.WIDTH.value * e_blocks
    e_blocks, tasks = width // 128, B * width // 128
    begin, end = (torch.arange(B) * G + first for first in (0, G))
    state = states.view(B, 128, width)
    totals_in_torch(
        grid, x, writer, state, rms, gain, bias_x, begin, end, N, G, shift, 0, 1 / 256, e_blocks, tasks, BACK=BACK,
        SPLIT="pieces", SKIP=False, EVEN=EVEN,
    )  # fmt: skip
    whole_in_torch(
        grid, x, h, a, reader, states, out, value_out, rms, gain, bias_x, bias_h, sums, begin, end, _, __, ___, N, G,
        shift, e_blocks, tasks, BACK=BACK, SKIP=False, EVEN=EVEN,
    )  # fmt: skip


def reduce_in_torch(
    grid, d_attended, value, state, d_state, a, d_score, d_query, d_key, zero, factor, rows, N, G, shift, E, tasks, *,
    CAUSAL, SKIP, **constants,
):  # fmt: skip
    assert tasks == choice.reduce.task_count(rows, G, halves_of(N, G, shift, SKIP), CAUSAL)
    assert zero.data_ptr() == d_query.data_ptr() and zero[1].data_ptr() == d_key.data_ptr()
    assert N == d_attended.shape[0] // rows
    for chunk in range(rows * G):
        token, real, computed = slots_of(chunk, N, G, shift, SKIP)
        d, v = (x.new_zeros(256, E) for x in (d_attended, value))
        d[real], v[real] = d_attended[token], value[token]
        slots = slice(chunk * 256, (chunk + 1) * 256)
        states = chunk if CAUSAL else chunk // G
        states = slice(states * 128, (states + 1) * 128)
        seen = computed[:, None] & computed
        d_score[slots] = torch.where(seen, 2 * a[slots].sqrt() * (d @ v.T), torch.nan)
        d_query[slots] = d_key[slots] = torch.nan
        if CAUSAL and chunk % G == 0:
            d_query[slots] = 0
        else:
            d_query[slots][computed] = (factor[chunk] * d @ state[states].T)[computed]
        if CAUSAL and (chunk + 1) % G == 0:
            d_key[slots] = 0
        else:
            d_key[slots][computed] = (v @ d_state[states].T)[computed]


def totals_in_torch(
    grid, x, keys, total, rms, gain, bias, begin, end, N, G, shift, cut, inverse, e_blocks, tasks, *, BACK, SPLIT,
    SKIP, EVEN, **constants,
):  # fmt: skip
    pieces = list(zip(begin.tolist(), end.tolist(), strict=True))
    if SPLIT == "cut":
        rows = range(len(keys) // 256 // G)
        pieces = [((row + 1) * G - cut, (row + 1) * G) if BACK else (row * G, row * G + cut) for row in rows]
    assert len(pieces) == tasks // e_blocks
    for piece, (first, last) in enumerate(pieces):
        state = x.new_zeros(128, 128 * e_blocks)
        for chunk in range(first, last):
            token, real, _ = slots_of(chunk, N, G, shift, SKIP, EVEN)
            values = x[token]
            if not BACK:
                values = torch.nn.functional.silu(values * rms[token, None] * gain + bias)
            state += keys[chunk * 256 : (chunk + 1) * 256][real].T @ values
        total[piece] = state * inverse


def gate_product_in_torch(
    grid, d_y, w, u, out, d_attended, d_u, rms, gain, bias, sums, T, D, e_blocks, tasks, **constants,
):  # fmt: skip
    assert tasks == -(-T // 128) * e_blocks
    d_out, scale = d_y @ w, rms[:, None] * gain
    h = u * scale + bias
    s = h.sigmoid()
    d_attended.copy_(d_out * h * s)
    d_gate = d_out * out * (1 / h + 1 - s)
    d_u.copy_(d_gate * scale)
    for block, rows in enumerate(d_gate.split(128)):
        sums[block] = rows.sum(0)


def product_in_torch(
    grid, a, w, w_rest, x, y, bias, steps, column_blocks, tasks, *, ROWS, COLUMNS, STEP, **constants,
):  # fmt: skip
    assert tasks == -(-len(a) // (2 * ROWS)) * column_blocks and column_blocks * COLUMNS == len(w)
    assert steps * STEP == a.shape[1]
    y.copy_(x + a @ w.T + bias)


def quadratic_in_torch(
    grid, x, y, held, result, value, rms, gain, bias, sums, rows, N, E, tasks, *, KIND, CAUSAL, **constants,
):  # fmt: skip
    assert tasks == choice.quadratic.task_count(KIND, rows, N, E, CAUSAL)
    scale = rms[:, None] * gain
    # Squares of 128 above the diagonal are not read. Those on it are whole in bfloat16, which this is not.
    slot, whole = torch.arange(N), torch.ones(N, N, dtype=torch.bool)
    seen = slot[:, None] // 128 >= slot // 128 if CAUSAL else whole
    hidden = (slot[:, None] // 128 == slot // 128) & (slot[:, None] < slot) if CAUSAL else ~whole
    if KIND == "values":
        sums.zero_()  # in float32 these are blocks of 64, of which only some are filled
    for row in range(rows):
        own = slice(row * N, (row + 1) * N)
        if KIND == "scores":
            weight = torch.where(seen & ~hidden, held[own], 0)
            result[own] = torch.where(seen, 2 * weight.sqrt() * (x[own] @ y[own].T), torch.nan)
            continue
        weight = torch.where(seen & ~hidden, x[own], 0)
        h = held[own] * scale[own] + bias
        if KIND == "output":
            result[own] = weight @ y[own] * torch.nn.functional.silu(h)
        else:
            s = h.sigmoid()
            d_h = weight.T @ y[own] * s * (1 + h * (1 - s))
            result[own], value[own] = d_h * scale[own], h * s
            sums[row * N // 128 : (row + 1) * N // 128] = d_h.view(N // 128, 128, -1).sum(1)


def scores_in_torch(
    grid, q, k, a, bias, N, G, shift, scale, chunks, blocks, run, tasks, *, BIAS, CAUSAL, SKIP, **constants,
):  # fmt: skip
    C = 128 * blocks
    assert (run, tasks) == choice.scores.tasks_of(chunks, blocks, CAUSAL, 132)
    slot = torch.arange(C)
    block = slot // 128
    seen = block[:, None] >= block if CAUSAL else torch.ones(C, C, dtype=torch.bool)
    for chunk in range(chunks):
        own = slice(chunk * C, (chunk + 1) * C)
        score = scale * q[own] @ k[own].T
        if BIAS:
            score += bias[slot - slot[:, None] + C - 1]
        weight = score.relu().square()
        if SKIP:
            computed = slots_of(chunk, N, G, shift, SKIP)[2]
            seen = computed[:, None] & computed & (block[:, None] >= block if CAUSAL else True)
        a[own] = torch.where(seen, weight.tril() if CAUSAL else weight, torch.nan)


def score_heads_in_torch(
    grid, d_score, d_score_rows, q, k, d_q, d_k, N, G, shift, scale, blocks, tasks, *, CAUSAL, SKIP, **constants,
):  # fmt: skip
    C = 128 * blocks
    block = torch.arange(C) // 128
    for chunk in range(tasks // blocks):
        own = slice(chunk * C, (chunk + 1) * C)
        computed = slots_of(chunk, N, G, shift, SKIP)[2] if SKIP else torch.ones(C, dtype=torch.bool)
        seen = computed[:, None] & computed & (block[:, None] >= block if CAUSAL else True)
        d = torch.where(seen, d_score[own], 0) * scale
        for target, gradient in ((d_q, d @ torch.where(computed[:, None], k[own], 0)),
                                 (d_k, d.T @ torch.where(computed[:, None], q[own], 0))):  # fmt: skip
            target[own] = torch.where(computed[:, None], gradient, torch.nan)


@pytest.fixture
def in_torch(monkeypatch):
    """See `replace_by_torch`."""
    return replace_by_torch(monkeypatch)


def replace_by_torch(monkeypatch):
    """The kernels for Hopper in torch, chosen as for bfloat16 on Hopper; how often each one has run."""
    ran = collections.Counter()

    def counted(name, function):
        return lambda *a, **k: ran.update([name]) or function(*a, **k)

    def as_in_bfloat16(rule):

        def changed(shape, *arguments):
            return rule(dataclasses.replace(shape, dtype=torch.bfloat16), *arguments)

        return changed

    monkeypatch.setattr(choice, "scan_for", lambda device: True)
    for name in ("scans", "multiplies", "spans_rows", "weighs"):
        monkeypatch.setattr(choice, name, as_in_bfloat16(getattr(choice, name)))
    ends_layer = choice.ends_layer
    monkeypatch.setattr(choice, "ends_layer", lambda x, out: ends_layer(x.bfloat16(), out.bfloat16()))
    monkeypatch.setattr(choice, "FEW_TILES", 0)
    monkeypatch.setattr(launches, "multiprocessors", lambda device: 132)
    # Two steps of a program of 128 slots in place of 32: each takes the interpreter as long.
    monkeypatch.setattr(launches, "HEADS_STEP", 64 * 64)
    for module, name, function in (
        (choice.scan, "scan_kernel", scan_in_torch), (choice.wholescan, "whole_kernel", whole_in_torch),
        (choice.totals, "totals_kernel", totals_in_torch), (choice.rowscan, "row_kernel", rows_in_torch),
        (choice.reduce, "reduce_kernel", reduce_in_torch),
        (choice.gate, "gate_product_kernel", gate_product_in_torch),
        (choice.quadratic, "quadratic_kernel", quadratic_in_torch),
        (choice.scores, "scores_kernel", scores_in_torch),
        (choice.scores, "score_heads_kernel", score_heads_in_torch),
        (choice.product, "product_kernel", product_in_torch),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, counted(name, function))
    monkeypatch.setattr(choice.hopper, "matrix", lambda x, *block: x.view(-1, x.shape[-1]))
    monkeypatch.setattr(choice.hopper, "tokens", lambda x, B, N, *block: x)
    launch_forward = ops.launch_forward

    def as_fake_tensors_say(shape, inputs, cached, want_final, exchange):
        results = launch_forward(shape, inputs, cached, want_final, exchange)
        tensors = SimpleNamespace(**vars(inputs), **cached._asdict())
        assert [x.shape for x in results] == [x.shape for x in ops.fake_attention(tensors, shape, want_final)]
        filled = [id(x) for x in results if x.numel()]
        assert len(set(filled)) == len(filled)  # an operator must not return a tensor twice
        return results

    monkeypatch.setattr(ops, "launch_forward", as_fake_tensors_say)
    return ran


no_gpu = pytest.mark.skipif(HOPPER or choice.scan is None, reason="a GPU runs the kernels themselves")


@no_gpu
@pytest.mark.parametrize(
    ("length", "form", "pieces", "causal", "width"),
    [
        (512, "paper", False, True, 192),
        (600, "odd shift", True, True, 64),
        (1100, "odd shift", False, True, 128),  # two of five chunks cut off
        (300, "half shift", False, True, 64),
        (400, "shifted keys", False, True, 64),  # neither a row's first half chunk nor its last has tokens
        (400, "shifted keys", False, False, 256),
        (600, "odd shift", True, False, 64),
        (300, "paper", False, False, 192),
        (500, "paper", True, False, 192),
        (600, "delta", True, True, 64),
    ],
)
def test_the_launches_around_the_scan_are_right(length, form, pieces, causal, width, in_torch, monkeypatch):
    monkeypatch.setattr(choice, "FEW_SCANS", 10**6 if pieces else 0)
    if not causal:
        monkeypatch.setattr(plan, "LONGEST_PIECE", 1 if pieces else 16)
    config = hopper_config(hidden_size=width, num_hidden_layers=2, is_decoder=causal, **FORMS[form])
    compare(config, "odd", length=length)
    layers = 2
    # Of layers with 400 tokens, one is shifted.
    held = 0 if causal else {500: 2, 400: 1}.get(length, 0)
    assert in_torch["row_kernel"] == 2 * held
    assert in_torch["scan_kernel" if causal else "whole_kernel"] == 2 * (layers - held)
    assert in_torch["reduce_kernel"] == layers
    assert in_torch["scores_kernel"] == 2 * in_torch["score_heads_kernel"] == 2 * layers
    summed = 0 if causal and not pieces and length < 1000 else layers - held
    assert in_torch["totals_kernel"] == 2 * summed
    assert in_torch["gate_product_kernel"] == layers
    assert in_torch["product_kernel"] == (layers if width in (192, 256) else 0)


def filled(model, x, then):
    """Outputs of a call that fills a cache, and of `then` tokens one by one; and the states after the call."""
    with torch.no_grad():
        first = model(inputs_embeds=x[:, : x.shape[1] - then], use_cache=True)
        cache, outputs = first.past_key_values, [first.last_hidden_state]
        states = [[None if part is None else part.clone() for part in layer.state] for layer in cache.layers]
        for token in x.split(1, 1)[x.shape[1] - then :]:
            outputs.append(model(inputs_embeds=token, past_key_values=cache).last_hidden_state)
    return torch.cat(outputs, 1), states


def read_parts(states, config):
    """Of each layer's state, what is read: of the open chunk the slots with tokens, and of the next key what the
    newest token gives it."""
    parts = []
    for index, (quad_k, lin_k, value, total, seen, *_) in enumerate(states):
        shift, count = config.shift_of(index), int(seen[0])
        phase = (count + shift) % 256
        slots, newest = slice(max(0, phase - count), phase), phase or 256
        parts += [quad_k[:, slots], lin_k[:, slots], value[:, slots], total, seen]
        parts += [quad_k[:, newest, 1::2]] if config.local_key_shift else []
        parts += [lin_k[:, newest]] if config.previous_key else []
    return [part for part in parts if part.numel()]


@no_gpu
@pytest.mark.parametrize(
    ("length", "rows", "form"),
    [
        (512, 1, "paper"), (257, 2, "paper"), (1100, 2, "odd shift"), (384, 1, "half shift"), (300, 2, "half shift"),
        (512, 2, "shifted keys"), (383, 1, "shifted keys"), (256, 1, "shifted keys"),
    ],
)  # fmt: skip
def test_a_call_that_fills_a_cache_is_scanned(length, rows, form, in_torch, monkeypatch):
    """Its outputs, and those after it, are the torch tier's; its states those of the general kernels."""
    config = hopper_config(hidden_size=64, num_hidden_layers=2, is_decoder=True, **FORMS[form])
    model = make_model(FlashModel, config, dtype=torch.float32, scale=0.3).to(DEVICE)
    x = torch.randn(rows, length + 2, 64, device=DEVICE)
    out, states = filled(model, x, 2)
    assert in_torch["scan_kernel"] == in_torch["totals_kernel"] == 2
    monkeypatch.setattr(choice, "scans", lambda *a: False)
    _, general = filled(model, x[:, :length], 0)
    assert in_torch["scan_kernel"] == 2
    model.config.backend = "torch"
    expected, theirs = filled(model, x, 2)
    assert_close(out, expected, 1e-5)
    for parts in zip(*(read_parts(each, config) for each in (states, general, theirs)), strict=True):
        for other in parts[1:]:
            assert other.dtype == parts[0].dtype and (other.is_floating_point() or torch.equal(parts[0], other))
            assert_close(parts[0].float(), other.float(), 1e-5)


@no_gpu
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_the_launches_around_quadratic_attention_are_right(causal, parts, product, in_torch, monkeypatch):
    """A backward makes no values but those beside the gradient of their input."""
    monkeypatch.setattr(launches, "MOST_WEIGHTS", 1 if parts else 10**9)
    if not product:
        monkeypatch.setattr(choice, "multiplies", lambda *a: False)
    forward, backward = launches.forward, launches.backward
    for module, name, option in ((forward, "values_kernel", "SILU"), (backward, "gate_kernel", "VALUES")):
        launch = getattr(module, name)

        def counted(*a, launch=launch, option=option, **k):
            in_torch["values"] += k[option]
            return launch(*a, **k)

        monkeypatch.setattr(module, name, counted)
    config = hopper_config(
        hidden_size=64, num_hidden_layers=1, is_decoder=causal, attention_type="quadratic",
        max_position_embeddings=600,
    )  # fmt: skip
    compare(config, "odd", length=384)
    assert in_torch["quadratic_kernel"] == 3 * (2 if parts else 1) and in_torch["values"] == 1
    assert in_torch["scores_kernel"] == 2 * in_torch["score_heads_kernel"] == 2 * (2 if parts else 1)
    assert in_torch["gate_product_kernel"] == product


@pytest.fixture
def in_numbers(monkeypatch):
    """Functions of a task's number, for all tasks at once."""
    if choice.scan is None:
        pytest.skip("triton has no Gluon")
    numbers = SimpleNamespace(sqrt=torch.sqrt, float32=torch.float32)
    numbers.where = lambda condition, x, y: torch.where(torch.as_tensor(condition), x, y)
    numbers.int32 = torch.int32
    numbers.minimum, numbers.maximum = (
        lambda x, y, chosen=chosen: chosen(torch.as_tensor(x), torch.as_tensor(y))
        for chosen in (torch.minimum, torch.maximum)
    )
    for module in (choice.reduce, choice.quadratic, choice.hopper):
        monkeypatch.setattr(module, "gl", numbers)
    monkeypatch.setattr(choice.quadratic, "lower_tile", choice.hopper.lower_tile.fn)
    monkeypatch.setattr(choice.quadratic, "BLOCK", 128)
    monkeypatch.setattr(choice.reduce, "BLOCK", 128)
    monkeypatch.setattr(choice.quadratic, "GROUP_TOKENS", 2048)
    monkeypatch.setattr(choice.quadratic, "GROUP_ROWS", 8)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("split", ["rows", "ends"])
@pytest.mark.parametrize(("rows", "blocks", "chunks", "cut"), [(8, 12, 32, 8), (2, 4, 5, 2), (7, 18, 129, 5)])
def test_every_chunk_is_in_one_walk(rows, blocks, chunks, cut, split, back, monkeypatch):
    if choice.scan is None:
        pytest.skip("triton has no Gluon")
    grid = SimpleNamespace(num_programs=lambda axis: 132, where=lambda condition, x, y: x if condition else y)
    monkeypatch.setattr(choice.walk, "gl", grid)
    tasks, walked, longest = rows * blocks * (2 if split == "ends" else 1), [], 0
    for program in range(132):
        grid.program_id = lambda axis, program=program: program
        steps = 0
        for task in range(*choice.walk.tasks_of.fn(tasks, split)):
            row, begin, end = choice.walk.walk_of.fn(task, None, None, chunks, cut, blocks, tasks, back, split)
            steps += end - begin
            # The longer walks begin with a sum of the others.
            if split == "ends":
                assert ((end if back else begin) % chunks != 0) == (task < tasks // 2)
            assert begin // chunks == (end - 1) // chunks == row
            walked += [(chunk, task % blocks) for chunk in range(begin, end)]
        longest = max(longest, steps)
    assert sorted(walked) == [(chunk, block) for chunk in range(rows * chunks) for block in range(blocks)]
    shape = dataclasses.replace(SHAPE, B=rows, E=128 * blocks, G=chunks)
    if split == "ends" and rows * blocks > 90:
        assert longest == chunks - cut and cut == choice.cut_chunks(shape, 132)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("rows", "chunks", "empty"),
    [
        (rows, chunks, empty) for rows, chunks in ((3, 1), (2, 2), (2, 5)) for empty in ((), (0,), (-1,), (0, -1))
        if len(empty) < 2 * chunks
    ],
)  # fmt: skip
def test_every_tile_of_the_reduction_is_one_task(rows, chunks, empty, causal, in_numbers):
    """With tokens in every half of every chunk, or not in a row's first or last."""
    halves = range(0 in empty, 2 * chunks - (-1 in empty))
    shift = torch.tensor(129 if 0 in empty else 127)
    N = torch.tensor(128 * halves.stop) - shift
    count = choice.reduce.task_count(rows, chunks, halves, causal)
    places = choice.reduce.place_of.fn(torch.arange(count), N, chunks, shift, causal, bool(empty))
    found = set(zip(*(torch.as_tensor(x).expand(count).tolist() for x in places), strict=True))
    expected = {
        (row, chunk, product, left, right)
        for row in range(rows) for chunk in range(chunks) for product in range(3) for left in range(2)
        for right in range(2 if product == 1 else 1)
        if not causal or [chunk > 0, left >= right, chunk < chunks - 1][product]
        if 2 * chunk + left in halves and (product != 1 or 2 * chunk + right in halves)
    }  # fmt: skip
    assert found == expected and count == len(expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["output", "values", "scores"])
@pytest.mark.parametrize(("rows", "N"), [(11, 128), (3, 640), (5, 1024), (1, 8192)])
def test_every_tile_of_quadratic_attention_is_one_task(rows, N, kind, causal, in_numbers):
    E = 384
    count, blocks = choice.quadratic.task_count(kind, rows, N, E, causal), N // 128
    places = choice.quadratic.place_of.fn(torch.arange(count), rows, N, E, kind, causal)
    found = set(zip(*(torch.as_tensor(x).expand(count).tolist() for x in places), strict=True))
    expected = {
        (
            row, block, column, block * 128 if causal and kind == "values" else 0,
            E if kind == "scores" else (block + 1) * 128 if causal and kind == "output" else N,
        )
        for row in range(rows) for block in range(blocks)
        for column in range(block + 1 if causal and kind == "scores" else blocks if kind == "scores" else E // 128)
    }  # fmt: skip
    assert found == expected and count == len(expected)


# ------------------------------------------------------------------------------------------------------------------
# On the GPU alone
# ------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def scans(monkeypatch):
    """Counts the scans: forward and backward of each layer, none of them replayed."""
    counted = []
    monkeypatch.setattr(replay, "EARLIER", 10**9)
    for name in ("launch_scan", "launch_row_scan"):
        launch = getattr(launches, name)

        def count(*a, launch=launch, **k):
            counted.append(launch.__name__)
            return launch(*a, **k)

        monkeypatch.setattr(launches, name, count)
    return counted


@needs_hopper
@pytest.mark.gpu
@forms
@pytest.mark.parametrize("split", ["rows", "pieces", "ends"])
@pytest.mark.parametrize("length", [512, 300, 777, 2560])
def test_error_is_at_most_twice_the_torch_tiers(length, split, form, scans, monkeypatch):
    monkeypatch.setattr(choice, "FEW_SCANS", 10**6 if split == "pieces" else 0)
    # Two rows of 512 value dimensions are 8 walks. 12 programs: four take two ends each.
    programs = {"rows": 8, "pieces": 132, "ends": 12}[split]
    monkeypatch.setattr(launches, "multiprocessors", lambda device: programs)
    compare(hopper_config(**FORMS[form]), "odd", torch.bfloat16, length=length, scale=0.06, draws=2)
    assert len(scans) == 2 * 2 * 2


@needs_hopper
@pytest.mark.gpu
@both_ways
@pytest.mark.parametrize("length", [512, 411, 300, 256, 777, 2560])
def test_bidirectional_error_is_at_most_twice_the_torch_tiers(length, form, scans):
    config = hopper_config(is_decoder=False, **FORMS[form])
    compare(config, "odd", torch.bfloat16, length=length, scale=0.06, draws=2)
    assert len(scans) == 2 * 2 * 2


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("width", [384, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "form"), [(512, "paper"), (300, "odd shift"), (777, "shifted keys")])
def test_error_with_the_last_product_is_at_most_twice_the_torch_tiers(length, form, causal, width, monkeypatch):
    monkeypatch.setattr(choice, "FEW_TILES", 0)
    ran, launch = [], launches.launch_product
    monkeypatch.setattr(launches, "launch_product", lambda *a: ran.append(a) or launch(*a))
    config = hopper_config(hidden_size=width, is_decoder=causal, **FORMS[form])
    compare(config, "odd", torch.bfloat16, length=length, scale=0.06, draws=2)
    assert len(ran) == 2 * 2


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("T", "D", "K"), [(700, 192, 128), (40_000, 768, 1536), (9_000, 1024, 1536), (129, 256, 64)])
def test_the_last_product_is_right_and_bit_equal(T, D, K):
    """Programs have one task, or several; the last tile's rows may have no tokens."""
    torch.manual_seed(0)
    a, x, w, bias = (
        torch.randn(*size, device=DEVICE, dtype=torch.bfloat16) for size in ((T, K), (T, D), (D, K), (D,))
    )
    w *= K**-0.5
    exact = x.double() + a.double() @ w.double().T + bias.double()
    # Memory on both sides: whole rows alone are written.
    around = torch.full((T + 512, D), 7.0, device=DEVICE, dtype=torch.bfloat16)
    y = around[256 : 256 + T]
    found = []
    for _ in range(4):
        y.fill_(torch.nan)
        found.append(launches.launch_product(x, a, w, bias, y).clone())
    assert (around[:256] == 7).all() and (around[256 + T :] == 7).all()
    assert error_ratio(y, exact) < 3e-3
    assert all(torch.equal(found[0], other) for other in found[1:])


some_chunks = pytest.mark.parametrize(
    ("B", "N", "G", "C", "shift"),
    [(128, 512, 2, 256, 0), (90, 512, 3, 256, 128), (1, 200, 1, 256, 0), (9, 2048, 1, 2048, 0), (3, 128, 1, 128, 0)],
)


def chunked(B, N, G, C, shift, causal):
    """A shape, heads, and which blocks of 128 slots are computed, `[chunks, blocks]`."""
    torch.manual_seed(0)
    shape = dataclasses.replace(SHAPE, B=B, N=N, G=G, C=C, shift=shift, causal=causal, scale=1 / C)
    heads = torch.randn(4, B * G, C, 128, device=DEVICE, dtype=torch.bfloat16)
    computed = [half in shape.halves or not shape.skips for half in range(G * C // 128)] * B
    return shape, heads, torch.tensor(computed, device=DEVICE).view(B * G, C // 128)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@some_chunks
def test_attention_weights_are_those_of_the_general_kernel(B, N, G, C, shift, causal, biased, monkeypatch):
    """Bit for bit, but where neither writes: above the diagonal in tiles, and in halves of chunks without tokens."""
    shape, heads, computed = chunked(B, N, G, C, shift, causal)
    bias = torch.randn(2 * C - 1, device=DEVICE, dtype=torch.bfloat16) if biased else None
    inputs = SimpleNamespace(bias_R=bias, index=SimpleNamespace(factor_G=torch.ones(B * G, device=DEVICE)))
    ours = launches.launch_scores(shape, inputs, heads, True)
    monkeypatch.setattr(choice, "weighs", lambda *a: False)
    general = launches.launch_scores(shape, inputs, heads, True)
    same = (ours == general).view(B * G, C // 128, 128, C // 128, 128).all(4).all(2)
    needed = computed[:, :, None] & computed[:, None]
    assert same[needed.tril() if causal else needed].all()


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@some_chunks
def test_gradients_of_quadratic_heads_are_those_of_the_general_kernel(B, N, G, C, shift, causal, monkeypatch):
    """Bit for bit, and of halves of chunks without tokens neither writes any."""
    shape, heads, computed = chunked(B, N, G, C, shift, causal)
    d_scores = torch.randn(B * G, C, C, device=DEVICE, dtype=torch.bfloat16)
    found = []
    for ours in (True, True, False):
        if not ours:
            monkeypatch.setattr(choice, "weighs", lambda *a: False)
        found.append(torch.full_like(heads, torch.nan))
        launches.launch_quadratic_heads_gradient(
            shape, SimpleNamespace(bias_R=None), heads, d_scores, found[-1], True
        )  # fmt: skip
    written = computed.repeat_interleave(128, 1)
    for d_heads in found:
        assert d_heads[2:].isnan().all() and torch.equal(~d_heads[:2].isnan().any(3), written.expand(2, -1, -1))
        assert torch.equal(d_heads[:2, written], found[0][:2, written])


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [256, 640, 1024, 333])
def test_quadratic_error_is_at_most_twice_the_torch_tiers(length, causal, monkeypatch):
    ran, launch = [], launches.launch_quadratic
    monkeypatch.setattr(launches, "launch_quadratic", lambda *a: ran.append(a) or launch(*a))
    config = hopper_config(attention_type="quadratic", is_decoder=causal, max_position_embeddings=1024)
    compare(config, "odd", torch.bfloat16, length=length, scale=0.06, draws=2)
    assert len(ran) == (0 if length % 128 else 3 * 2 * 2)


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_two_runs_of_quadratic_attention_are_bit_equal(causal):
    config = hopper_config(attention_type="quadratic", is_decoder=causal, max_position_embeddings=1024)
    model = make_model(FlashModel, config, dtype=torch.bfloat16, scale=0.06).to(DEVICE)
    x = torch.randn(10, 1024, 256, device=DEVICE, dtype=torch.bfloat16)
    first = through(model, x, {}, 1.0)
    for _ in range(4):
        again = through(model, x, {}, 1.0)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


@needs_hopper
@pytest.mark.gpu
@forms
def test_two_runs_are_bit_equal(form, scans):
    model = make_model(FlashModel, hopper_config(**FORMS[form]), dtype=torch.bfloat16, scale=0.06).to(DEVICE)
    x = torch.randn(12, 1100, 256, device=DEVICE, dtype=torch.bfloat16)
    first = through(model, x, {}, 1.0)
    for _ in range(4):
        again = through(model, x, {}, 1.0)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert len(scans) == 5 * 2 * 2


@needs_hopper
@pytest.mark.gpu
@both_ways
@pytest.mark.parametrize("length", [512, 411, 256])
def test_the_scan_of_held_rows_is_bit_equal_to_two_launches(length, form, scans, monkeypatch):
    """With so many rows that a program has several tasks, and that no row is cut into pieces."""
    config = hopper_config(is_decoder=False, **FORMS[form])
    model = make_model(FlashModel, config, dtype=torch.bfloat16, scale=0.06).to(DEVICE)
    x = torch.randn(280, length, 256, device=DEVICE, dtype=torch.bfloat16)
    first = through(model, x, {}, 1.0)
    for held in (True, True, False):
        if not held:
            monkeypatch.setattr(choice, "holds_rows", lambda shape, exchange: False)
        again = through(model, x, {}, 1.0)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert len(scans) == 4 * 2 * 2 and "launch_row_scan" in scans and "launch_row_scan" not in scans[12:]


@needs_hopper
@pytest.mark.gpu
@both_ways
@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("length", [512, 300, 257, 2560])
def test_error_of_a_filled_cache_is_at_most_twice_the_general_kernels(length, rows, form, scans, monkeypatch):
    """Of the outputs, of those of two tokens after them, and of the states."""
    config = hopper_config(is_decoder=True, **FORMS[form])
    model = make_model(FlashModel, config, dtype=torch.bfloat16, scale=0.06).to(DEVICE)
    x = torch.randn(rows, length + 2, 256, device=DEVICE, dtype=torch.bfloat16)

    def results():
        out, states = filled(model, x, 2)
        return [out, *read_parts(states, config)]

    ours = results()
    assert len(scans) == 2
    monkeypatch.setattr(choice, "scans", lambda *a: False)
    general = results()
    assert len(scans) == 2
    model.config.backend, x = "torch", x.double()
    model.double()
    for mine, other, exact in zip(ours, general, results(), strict=True):
        assert_close(mine, exact, max(2 * error_ratio(other, exact), 1e-6))


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("marks", ["padded", "packed", "attention"])
def test_what_the_scan_is_not_for_is_still_right(marks, scans):
    """Ragged rows, and projections that are called one by one, keep the other kernels."""
    layout = "odd" if marks == "attention" else marks
    compare(hopper_config(), layout, torch.bfloat16, whole=marks != "attention", length=700, scale=0.06)
    assert not scans


@needs_hopper
@pytest.mark.gpu
def test_fake_tensors_have_the_scans_shapes():
    """A document of many pieces: the scan leaves no carry."""
    model = make_model(FlashModel, hopper_config(), dtype=torch.bfloat16, scale=0.06).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 4096, 256, device=DEVICE, dtype=torch.bfloat16)
    expected, got = through(model, x, {}, 1.0), through(compiled, x, {}, 1.0)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1]["input"], expected[1]["input"])
