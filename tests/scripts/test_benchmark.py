# SPDX-License-Identifier: Apache-2.0
"""The benchmark: its arithmetic, its rival, its gate, what it records, and how it renders a CSV."""

import argparse
import csv
import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from flash_hf import attention_flash
from helpers import ROOT, assert_close
from scripts.baselines import TransformerPPConfig, TransformerPPModel
from scripts.benchmark import cases, length_report, models, report, serving, sizes
from scripts.benchmark import gate as gates
from scripts.benchmark import timing as timer
from scripts.benchmark.lean import LeanTransformer
from scripts.benchmark.models import Unsupported
from scripts.benchmark.sizes import BASE, SMOKE, Size, model_flops
from scripts.benchmark.timing import Timing


SCRIPT = "scripts.benchmark"


def run_script(monkeypatch, *options) -> int:
    """The script in this process, where it can be patched; its exit code."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, options)])
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    recompile_limit = torch._dynamo.config.recompile_limit
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(SCRIPT, run_name="__main__", alter_sys=True)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch._dynamo.config.recompile_limit = recompile_limit
    return ended.value.code


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- arithmetic
def test_flash_operations_by_hand():
    """D = 4, E = 8, S = 2, one layer: projections 2*4*18 + 2*8*4 = 208."""
    size = Size(width=4, layers=1, query_key_dim=2, chunk_size=4)
    # Bidirectional, chunks of 4: local 2*4*(2+8) = 80, global 4*2*8 = 64.
    assert model_flops("flash", size, 16, causal=False) == 208 + 80 + 64
    # Causal: slots of a chunk see 1, 2, 3, 4 keys, 2.5 on average: 2*2.5*10 = 50; 3 of 4 chunks have a past: 48.
    assert model_flops("flash", size, 16, causal=True) == 208 + 50 + 48
    # Shorter than a chunk: three tokens see 1, 2, 3 keys; there is no other chunk.
    assert model_flops("flash-pytorch", size, 3, causal=True) == 208 + 40
    # FLASH-Quad: all 16 tokens are one chunk: 2*8.5*10.
    assert model_flops("flash-quad", size, 16, causal=True) == 208 + 170


def test_transformer_operations_by_hand():
    """D = 4, F = 3, one block: q, k, v, o 2*4*4*4 = 128, three matrices of the feed-forward 3*2*4*3 = 72."""
    size = Size(width=4, layers=2, heads=1, feed_forward=3)
    # Each of two products takes 2 * D operations a key: 16 keys, or 8.5 on average.
    assert model_flops("transformer++", size, 16, causal=False) == 200 + 4 * 4 * 16
    assert model_flops("llama", size, 16, causal=True) == 200 + 4 * 4 * 8.5


def test_operations_of_the_base_size():
    """The cost section of the specification: 7.3 MFLOP in projections, 22 % on top for attention."""
    D, E, S = 768, 1536, 128
    projections = 24 * (2 * D * (2 * E + S) + 2 * E * D)
    assert projections / 24 == pytest.approx(7.3e6, rel=0.01)
    assert model_flops("flash", BASE, 65_536, causal=False) / projections == pytest.approx(1.22, abs=0.01)
    for name in ("transformer++", "flash"):
        module = models.build(name, BASE, True, "cpu", torch.float32).module
        assert models.parameter_count(module) == pytest.approx(85e6, rel=0.04), name


def test_utilisation_and_quartiles_by_hand():
    # 1,000 operations a token, 2,000 tokens, in 1 ms: 2 GFLOP/s.
    assert sizes.utilisation(1000, 2000, 1.0, 4e9) == pytest.approx(0.5)
    assert sizes.utilisation(None, 2000, 1.0, 4e9) is None
    assert timer.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0, 5)
    assert timer.quartiles([7.0]) == (7.0, 7.0, 7.0, 1)


def test_measure_warms_up_repeats_and_stops_at_its_limit():
    calls, befores = [], []
    timing = timer.measure(lambda: calls.append(1), "cpu", reps=3, warmup=2, calls=4, before=lambda: befores.append(1))
    assert timing.samples == 3 and len(calls) == (2 + 3) * 4 and len(befores) == 5
    # The limit leaves two samples: no quartiles come of one.
    assert timer.measure(lambda: None, "cpu", reps=100, limit_s=0.0).samples == 2


# -- the opponent
@pytest.mark.parametrize("causal", [True, False])
def test_the_lean_transformer_is_the_baseline(causal):
    """Same function as scripts.baselines' Transformer++, so that its speed is that of Transformer++."""
    size = Size(width=24, layers=4, heads=3, feed_forward=40)
    config = TransformerPPConfig(
        vocab_size=11, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        is_decoder=causal, initializer_range=0.3,
    )  # fmt: skip
    baseline, lean = TransformerPPModel(config).double().eval(), LeanTransformer(size, causal).double()
    with torch.no_grad():
        for ours, theirs in zip(lean.layers, baseline.layers, strict=True):
            attention, mlp = theirs.attention, theirs.mlp
            projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            ours.qkv_proj.weight.copy_(torch.cat(projections))
            ours.o_proj.weight.copy_(attention.o_proj.weight)
            ours.gate_up_proj.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            ours.down_proj.weight.copy_(mlp.down_proj.weight)
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    # Angles are float32 in one and float64 in the other.
    assert_close(lean(x), baseline(inputs_embeds=x).last_hidden_state, 1e-5)


def test_the_lean_transformer_decodes_what_it_computes_whole():
    lean = LeanTransformer(SMOKE, causal=True).double()
    x = torch.randn(2, 9, SMOKE.width, dtype=torch.float64)
    with torch.no_grad():
        whole, kept = lean.prefill(x[:, :8])
        # A cache as the benchmark has it: exactly as many columns as there are tokens.
        caches = [tuple(torch.cat([part, torch.full_like(part[:, :, :1], torch.nan)], 2) for part in p) for p in kept]
        last = lean.step(x[:, 8:], caches, torch.tensor([8]))
        expected = lean(x)
    assert_close(whole, expected[:, :8], 1e-12)
    assert_close(last, expected[:, 8:], 1e-12)


def test_recomputation_gives_the_same_gradients():
    for name in ("flash", "transformer++"):
        candidate = models.build(name, SMOKE, True, "cpu", torch.float64)
        x = torch.randn(2, 20, SMOKE.width, dtype=torch.float64, requires_grad=True)
        step = timer.training_step(candidate.module, candidate.hidden, x, torch.randn_like(x))
        found = []
        for on in (False, True):
            candidate.recompute(on)
            step()
            found.append([x.grad, *(p.grad for p in candidate.module.parameters() if p.grad is not None)])
        for plain, recomputed in zip(*found, strict=True):
            assert_close(recomputed, plain, 1e-12)


def test_first_layers_are_the_model_less_its_ends():
    candidate = models.build("flash", dataclasses.replace(SMOKE, layers=4), True, "cpu", torch.float64)
    x = torch.randn(2, 40, SMOKE.width, dtype=torch.float64)
    states = candidate.module(inputs_embeds=x, use_cache=False, output_hidden_states=True).hidden_states
    layers, forward = models.first_layers(candidate, 2, x)
    assert len(layers) == 2
    assert_close(forward(states[0]), states[2], 1e-12)


@pytest.mark.parametrize("name", ["flash", "llama"])
def test_a_decoder_step_is_that_of_a_filled_cache(name):
    """`rewind` brings the cache back: the same token gives the same result however often it is decoded."""
    candidate = models.build(name, SMOKE, True, "cpu", torch.float64)
    candidate.module.eval()
    with torch.no_grad():
        step, rewind = candidate.decoder(2, 20, 4, torch.randn(2, 1, SMOKE.width, dtype=torch.float64))
        first = step()
        assert first.shape == (2, 1, SMOKE.width) and first.isfinite().all()
        for _ in range(3):
            step()
        rewind()
        if name == "llama":
            assert_close(step(), first, 1e-12)


def test_quadratic_decoding_is_refused_with_the_reason():
    candidate = models.build("flash-quad", SMOKE, True, "cpu", torch.float32)
    with pytest.raises(Unsupported, match="grows"):
        candidate.decoder(1, 20, 4, torch.randn(1, 1, SMOKE.width))


def test_a_missing_package_becomes_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_pytorch", None)
    with pytest.raises(Unsupported, match="not installed"):
        models.build("flash-pytorch", SMOKE, True, "cpu", torch.float32)


# -- the gate
def test_the_gate_is_green_and_looks_at_every_gradient():
    checks = gates.gate("cpu")
    assert all(check.passed for check in checks)
    names = {check.what for check in checks}
    for parameter in ("layers.2.gau.relative_bias.weight", "layers.0.gau.offset_scale.bias", "embed_tokens.weight"):
        assert f"causal torch.float64 gradient of {parameter}" in names


def test_the_gate_fails_on_what_is_not_finite():
    assert not gates.Check("", float("nan"), 1.0).passed
    assert not gates.Check("", float("inf"), 1.0).passed


@pytest.mark.parametrize("wrong", ["forward", "gradient"])
def test_a_red_gate_refuses_to_report(monkeypatch, tmp_path, capfd, wrong):
    activate = attention_flash.activate

    def broken(scores, activation):
        weights = activate(scores, activation)
        # The same values, but a part of the gradient is missing.
        return weights * 1.01 if wrong == "forward" else weights.detach() * 0.01 + weights * 0.99

    monkeypatch.setattr(attention_flash, "activate", broken)
    output = tmp_path / "results.csv"
    assert run_script(monkeypatch, "--smoke", "--output", output) == 1
    assert not output.exists()
    printed = capfd.readouterr()
    assert "nothing was timed" in printed.err
    # The part of the comparison that is wrong is named.
    assert f"float64 {'output' if wrong == 'forward' else 'gradient of'}" in printed.out


def test_the_gate_on_kernels_compares_both_backends(monkeypatch):
    """Without a GPU: the kernels' place is taken by the torch tier, right and wrong."""
    monkeypatch.setattr(
        gates, "flash_config", lambda size, causal, backend, **changes: FLASH_CONFIG(size, causal, None, **changes)
    )
    size = dataclasses.replace(SMOKE, layers=2)
    checks = gates.check_kernels(size, "cpu", 3 * size.chunk_size + 7)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    what = {check.what for check in checks}
    assert {"causal torch.float32 output", "bidirectional torch.bfloat16 gradient of the input"} <= what
    assert "decoding, static cache" in what

    activate = attention_flash.activate

    def broken(scores, activation):
        # Only in the types of the fast path. In bfloat16 the torch tier is measured with the same fault.
        return activate(scores if scores.dtype == torch.float64 else 1.1 * scores, activation)

    monkeypatch.setattr(attention_flash, "activate", broken)
    failed = {check.what for check in gates.check_kernels(size, "cpu", 3 * size.chunk_size + 7) if not check.passed}
    assert {"bidirectional torch.float32 output", "decoding, static cache"} <= failed


FLASH_CONFIG = sizes.flash_config


# -- cases and rows
def test_cases_hold_the_tokens_of_a_step():
    found = cases.cases("train", "flash", smoke=False)
    assert {case.context for case in found if case.causal} == {512, 2048, 8192, 32_768, 65_536}
    assert all(case.batch * case.context == 65_536 for case in found)
    assert {case.context for case in found if not case.causal} == {512, 2048, 8192}
    assert [case.measurement for case in found if case.recompute] == ["train, checkpointing"]
    eager = [(case.context, case.causal) for case in found if case.measurement == "train"]
    assert [(case.context, case.causal) for case in found if case.graph] == eager
    assert {case.context for case in found if case.issue} == {512, 8192}
    assert all(case.causal for case in cases.cases("train", "flash-plus-keys", smoke=False))
    assert {case.measurement for case in cases.cases("train", "transformer++", False)} == {
        "train",
        "train, checkpointing",
    }
    assert {case.context for case in cases.cases("train", "flash-quad", smoke=False)} == {512, 2048, 8192}
    (little, *others) = cases.cases("little", "flash", smoke=False)
    assert little.batch * little.context == 32_768 and {case.measurement for case in others} == {
        "little, train, CUDA graph", "little, train, issued"
    }  # fmt: skip
    decode = {(case.context, case.batch) for case in cases.cases("decode", "flash", smoke=False)}
    assert decode == {(1024, 1), (65_536, 1), (32_768, 64)}
    assert {case.context for case in cases.cases("train", "flash", False, (512,))} == {512}


def test_rows_are_appended_with_their_origin(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_COMMIT", "abc123")
    path = tmp_path / "new" / "rows.csv"
    for _ in range(2):
        recorder = cases.Recorder(path, "cpu")
        recorder.add(Timing(2.0, 1.0, 3.0, 5), model="flash", measurement="train", context=8, batch=4, tokens=32)
    recorder.add(model="flash", measurement="decode", note="out of memory")
    rows = rows_of(path)
    assert len(rows) == 3 and tuple(rows[0]) == cases.COLUMNS
    assert rows[0]["commit"] == "abc123" and rows[0]["torch"] == torch.__version__
    assert float(rows[1]["ms"]) == 2 and float(rows[1]["tokens_per_s"]) == 16_000
    assert rows[2]["ms"] == "" and rows[2]["note"] == "out of memory"
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="name another"):
        cases.Recorder(tmp_path / "other.csv", "cpu")


def test_what_fails_becomes_a_row_and_the_next_case_runs(tmp_path, monkeypatch):
    arguments = argparse.Namespace(
        output=tmp_path / "rows.csv", device="cpu", smoke=True, rounds=1, reps=2, contexts=None, models=None
    )
    prepare = cases.prepare

    def out_of_memory(candidate, case, *rest):
        if case.context == 64:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return prepare(candidate, case, *rest)

    monkeypatch.setattr(cases, "prepare", out_of_memory)
    cases.run(arguments, "flash", "forward")
    rows = rows_of(arguments.output)
    assert {row["note"] for row in rows if row["context"] == "64"} == {"out of memory"}
    assert all(float(row["ms"]) > 0 for row in rows if row["context"] == "32")


@pytest.mark.slow
def test_smoke_writes_a_whole_table(monkeypatch, tmp_path):
    output = tmp_path / "smoke.csv"
    assert run_script(monkeypatch, "--smoke", "--output", output, "--models", "flash,transformer++,llama") == 0
    rows = rows_of(output)
    groups = {"train", "train, checkpointing", "forward", "prefill", "decode", "layer, forward", "layer, train"}
    groups |= {"little, train", "little, train, issued", "cpu generate", "cpu assisted call"}
    for model in ("flash", "transformer++", "llama"):
        mine = [row for row in rows if row["model"] == model]
        issued = {"train, issued"} if model == "flash" else set()
        assert {row["measurement"] for row in mine} == groups | issued | {"cpu train"}
        for row in mine:
            if (model, row["direction"]) == ("llama", "bidirectional"):
                assert row["note"] == "causal only"
                continue
            if model == "transformer++" and row["measurement"] in ("cpu generate", "cpu assisted call"):
                assert row["note"] == "not measured with a head"
                continue
            assert float(row["ms_q25"]) <= float(row["ms"]) <= float(row["ms_q75"]), row
            assert float(row["tokens_per_s"]) == pytest.approx(int(row["tokens"]) / float(row["ms"]) * 1e3, rel=1e-3)
            # Decoding reads, it does not compute; an issued step is not done.
            uncounted = ("decode", "cpu train", "cpu generate", "cpu assisted call", "train, issued",
                         "little, train, issued")  # fmt: skip
            assert (row["mfu"] == "") == (row["measurement"] in uncounted)
    assert {row["measurement"] for row in rows if row["model"] == "device"} == {"matmul", "copy"}
    results = report.read([output])
    assert "### decode, causal" in report.tables(results)


def test_an_unknown_name_is_refused(monkeypatch, capfd):
    assert run_script(monkeypatch, "--models", "flash,bert") == 2
    assert "unknown ['bert']" in capfd.readouterr().err


# -- tables and plots
def made_up(path: Path, rows: list[tuple]) -> Path:
    """A CSV of `(model, direction, measurement, context, batch, ms, peak_gib, note)`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, cases.COLUMNS)
        writer.writeheader()
        for model, direction, measurement, context, batch, ms, memory, note in rows:
            writer.writerow({
                "date": "2026-01-01T00:00:00Z", "gpu": "a GPU", "commit": "abc", "model": model, "note": note,
                "direction": direction, "measurement": measurement, "context": context, "batch": batch,
                "tokens": context * batch, "ms": ms, "ms_q25": ms, "ms_q75": ms, "peak_gib": memory,
            })  # fmt: skip
    return path


def test_forms_of_flash_are_built_as_they_are_named():
    config = models.build("flash-plus-keys", SMOKE, True, "cpu", torch.float32).module.config
    assert config.local_key_shift and config.global_form == "previous_token"
    assert config.chunk_shift == SMOKE.chunk_size // 2 and config.backend == "torch"
    assert models.build("flash-plus-delta", SMOKE, True, "cpu", torch.float32).module.config.global_state == "delta"
    head = models.build_head("flash-plus", SMOKE, 50, "cpu", torch.float32)
    assert head.config.vocab_size == 50 and not head.config.local_key_shift and head.config.chunk_shift


def test_generation_is_timed_per_new_token(monkeypatch):
    """The time of the prompt, and of four tokens after it, is taken off."""
    clock = [0.0]
    monkeypatch.setattr(timer.time, "perf_counter", lambda: clock[0])

    class Model:
        config, device = argparse.Namespace(vocab_size=5), torch.device("cpu")

        def generate(self, ids, *, max_new_tokens, min_new_tokens, **words):
            assert (
                ids.shape == (2, 7) and max_new_tokens == min_new_tokens and words["cache_implementation"] == "static"
            )
            clock[0] += 9 + 0.25 * max_new_tokens

    timing = timer.measure_generation(Model(), 2, 7, 8, reps=3, cache_implementation="static")
    assert timing.median == pytest.approx(250) and timing.samples == 3


@pytest.mark.parametrize("name", ["flash", "llama"])
def test_an_assisted_call_is_timed_with_its_rollback(monkeypatch, name):
    """The cache grows by what is kept."""
    model, lengths = models.build_head(name, SMOKE, 50, "cpu", torch.float32), []

    def measure(call, device, **options):
        for _ in range(3):
            call()
        return device

    crop = DynamicCache.crop
    monkeypatch.setattr(timer, "measure", measure)
    monkeypatch.setattr(
        DynamicCache, "crop", lambda self, count: crop(self, count) or lengths.append(self.get_seq_length())
    )
    assert timer.measure_assisted_call(model, 2, 7, new=6, kept=2, reps=3) == "cpu" and lengths == [9, 11, 13]


@pytest.fixture
def results(tmp_path):
    train = ("causal", "train")
    rows = [
        ("flash", *train, 512, 128, 100, 20, ""),
        ("transformer++", *train, 512, 128, 120, 22, ""),
        # Two rounds: the median of 90 and 110 counts.
        ("flash", *train, 8192, 8, 90, 20, ""),
        ("flash", *train, 8192, 8, 110, 20, ""),
        ("transformer++", *train, 8192, 8, 250, 22, ""),
        ("flash-pytorch", *train, 8192, 8, 80, 40, ""),
        ("flash-plus", *train, 512, 128, 110, 20, ""),
        ("flash-plus", *train, 8192, 8, 105, 20, ""),
        ("flash", "causal", "generate", 512, 1, 8, "", ""),
        ("llama", "causal", "generate", 512, 1, 10, "", ""),
        ("flash", "causal", "decode", 65_536, 1, 1.5, "", ""),
        ("flash", "causal", "decode", 32_768, 64, 3, "", ""),
        ("transformer++", "causal", "decode", 32_768, 64, "", "", "out of memory"),
        ("gla", "", "train", "", "", "", "", "stopped after 300 s"),
    ]
    path = made_up(tmp_path / "rows.csv", [tuple(0 if value == "" and i in (3, 4) else value
                                                 for i, value in enumerate(row)) for row in rows])  # fmt: skip
    return report.read([path])


def test_targets_are_computed_from_the_rows(results):
    found = {what: (value, remark) for what, value, _, _, remark in report.targets(results)}
    assert found["training step, causal, 512 tokens: Transformer++ / FLASH"][0] == pytest.approx(1.2)
    assert found["training step, causal, 8192 tokens: Transformer++ / FLASH"][0] == pytest.approx(2.5)
    assert found["training step, causal, 2048 tokens: Transformer++ / FLASH"][0] is None
    assert found["training step, 8192: FLASH-pytorch / FLASH"][0] == pytest.approx(0.8)
    assert found["memory, 8192: FLASH / FLASH-pytorch"][0] == pytest.approx(0.5)
    assert found["training step: plain-key FLASH+ / FLASH"] == (pytest.approx(1.1), "worst of 512, 8192")
    assert found["generate(), batch 1, after 512 tokens: FLASH / Llama"][0] == pytest.approx(0.8)
    assert found["CPU, generate(), batch 8, after 512 tokens: FLASH / Llama"][0] is None
    assert found["flatness: slowest over fastest time per token, minus 1"][0] == pytest.approx(0)
    value, remark = found["decoding, batch 64, 32768: tokens/s over Transformer++"]
    assert value is None and "out of memory" in remark


def test_tables_show_losing_and_missing_rows(results):
    text = report.tables(results)
    lines = text.splitlines()
    assert "| training step, 8192: FLASH-pytorch / FLASH | 0.80 | >= 2.50 | **no** |" in lines
    assert "| training step, causal, 8192 tokens: Transformer++ / FLASH | 2.50 | >= 1.75 | yes |" in lines
    assert any("not measured" in line for line in lines)
    assert "| transformer++ | - | out of memory |" in lines  # batch 1 at 65536 was not run, batch 64 at 32768 was
    assert "- gla, train: stopped after 300 s" in lines
    assert "| flash | 100 (100 - 100) | 100 (90.0 - 110) |" in lines


def test_plots_are_written_from_the_rows_alone(results, tmp_path):
    written = report.plots(results, tmp_path / "plots")
    assert [path.name for path in written] == ["train_causal.png", "memory.png", "decode.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    lines = report.curves(results, "train", lambda result: result.ms)
    assert lines["flash"] == [(512, 100.0), (8192, 100.0)]


def test_the_script_prints_tables_and_plots(monkeypatch, tmp_path, capfd):
    path = made_up(tmp_path / "rows.csv", [("flash", "causal", "train", 512, 128, 100, 20, "")])
    assert run_script(monkeypatch, "--table", path, "--plot", path, "--folder", tmp_path / "plots") == 0
    assert "| flash | 100 (100 - 100) |" in capfd.readouterr().out
    assert (tmp_path / "plots" / "train_causal.png").exists()


def test_another_csv_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="not a table of scripts.benchmark"):
        report.read([tmp_path / "other.csv"])


# -- processes
def script_arguments(path: Path, **changes) -> argparse.Namespace:
    values = {"device": "cpu", "smoke": False, "models": None, "groups": None, "contexts": None, "output": path}
    values |= {"rounds": 1, "reps": 1, "limit_s": 300.0}
    return argparse.Namespace(**{**values, **changes})


def test_the_most_important_pairs_come_first(tmp_path):
    script = runpy.run_module(SCRIPT)
    pairs = script["order"](script_arguments(tmp_path, device="cuda"))
    assert pairs[:5] == [
        ("device", "matmul"), ("flash", "train"), ("transformer++", "train"), ("flash", "little"),
        ("transformer++", "little"),
    ]  # fmt: skip
    assert ("gla", "train") in pairs[-16:] and not any(group == "cpu" for _, group in pairs)
    chosen = script["order"](script_arguments(tmp_path, models=("llama", "flash"), groups=("decode",)))
    assert chosen == [("flash", "decode"), ("llama", "decode")]


def test_a_process_that_takes_too_long_leaves_a_row(tmp_path):
    path = tmp_path / "rows.csv"
    runpy.run_module(SCRIPT)["in_process"](script_arguments(path, limit_s=0.05), "flash", "train")
    (row,) = rows_of(path)
    assert (row["model"], row["measurement"], row["ms"]) == ("flash", "train", "")
    assert row["note"].startswith("stopped after")
    assert "- flash, train: stopped after" in report.tables(report.read([path]))


CONTEXTS = (512, 2048, 8192, 32_768, 65_536)


def test_the_document_shows_what_the_kept_results_give():
    kept = "scripts/results/benchmark"
    readme = (ROOT / "scripts" / "results" / "README.md").read_text(encoding="utf-8")
    assert serving.table(json.loads((ROOT / "scripts/results/serving.json").read_text(encoding="utf-8"))) in readme
    for folder, contexts in (("", CONTEXTS), ("h200", CONTEXTS)):
        results = report.read(sorted((ROOT / kept / folder).glob("*.csv")))
        assert report.target_table(results, every=not folder) in readme and kept in readme
        for model, title in (("flash", "FLASH"), ("transformer++", "Transformer++")):
            times = [report.pick(results, model, "train", context).ms for context in contexts]
            row = " | ".join(f"{time:.1f}" if time < 100 else f"{time:,.0f}" for time in times)
            assert f"| {title} | {row} |" in readme.replace("**", "")


def test_long_contexts_are_shown_as_they_were_measured():
    """Document and figure have the numbers of the kept files, and of every form."""
    folder = ROOT / "scripts/results/length"
    rows = length_report.read(sorted(folder.glob("*.json")))
    pages = [ROOT / "scripts/results/README.md", ROOT / "notebooks/05_long_context.ipynb"]
    readme, notebook = (page.read_text(encoding="utf-8") for page in pages)
    assert length_report.tables(rows) in readme and "](length/length.png)" in readme
    assert "](../scripts/results/length/length.png)" in notebook
    expected = length_report.points(rows)
    with Image.open(folder / "length.png") as figure:
        assert json.loads(figure.info["Description"]) == json.loads(json.dumps(expected))
    assert all(line for values in expected.values() for line in values.values())
    assert expected["us_per_token"]["flash"][-1][0] == 2**20
    assert not any(row["part"] == "error" and not row["passed"] for row in rows)
    cost = length_report.projection(rows)
    assert cost.pop("total") == pytest.approx(sum(cost.values()))


def test_errors_of_cut_rows_name_what_they_were_cut_over():
    row = {"part": "error", "form": "plus", "tokens": 4096, "backend": "auto", "worst": "model.a"}
    row |= {"error_cut": 0.01, "error_whole": 0.02}
    several = [row, {**row, "devices": 4, "exchange": "nccl"}, {**row, "devices": 2, "exchange": "gloo"}]
    lines = length_report.error_table(several).splitlines()[2:]
    over = ["2 GPUs", "4 GPUs", "2 processes on one GPU, gloo"]
    assert lines == [f"| plain-key FLASH+ | 4,096 | {each} | kernels | a | 1.00 % | 2.00 % |" for each in over]


def test_later_files_of_long_contexts_count(tmp_path):
    made_by = {"machine": "a GPU", "commit": "abc"}
    row = {"part": "train", "form": "plus", "context": 8192, "us_per_token": 3.0, "peak_gib": None}
    again = [{**row, "part": "scaling", "devices": count, "us_per_token": 3.0 - count} for count in (1, 2)]
    failed = {"part": "train", "form": "plus", "context": 16384, "note": "OutOfMemoryError"}
    for name, rows in (("a", [row]), ("b", [*again, failed])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"made_by": made_by, "rows": rows}), encoding="utf-8")
    rows = length_report.read(sorted(tmp_path.glob("*.json")))
    assert length_report.steps(rows, "plus", "us_per_token") == {8192: 2.0}
    assert length_report.steps(rows, "plus", "peak_gib") == {}
    assert "| plain-key FLASH+ | 2.00 / - |" in length_report.train_table(rows)
