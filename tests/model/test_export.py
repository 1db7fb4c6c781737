# SPDX-License-Identifier: Apache-2.0
"""Programs of torch.export and ONNX: every length from 1 up, whatever length they were traced at."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from transformers import DynamicCache, GenerationConfig, StaticCache

from flash_hf import (
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashForMultipleChoice,
    FlashForQuestionAnswering,
    FlashForSequenceClassification,
    FlashForTokenClassification,
)
from helpers import assert_close, make_model, random_ids, tiny_config


C = 8
# Chunks, and rows: those of the example (2 rows), fewer, and more.
LENGTHS = [(1, 2), (C - 1, 1), (C, 3), (C + 1, 2), (3 * C + 5, 1)]
QUADRATIC = {"attention_type": "quadratic", "num_hidden_layers": 1}
CASES = {
    "causal": (FlashForCausalLM, {"num_hidden_layers": 1}, ""),
    "causal, shifted": (
        FlashForCausalLM,
        {"chunk_shift": 3, "global_form": "previous_token", "local_key_shift": True},
        "mask positions",
    ),
    "causal, delta": (
        FlashForCausalLM,
        {"num_hidden_layers": 1, "global_form": "previous_token", "global_state": "delta", "local_window": 2},
        "mask positions",
    ),
    "masked": (FlashForMaskedLM, {"num_hidden_layers": 1, "relative_bias": "rotary"}, "mask"),
    "masked, softmax": (
        FlashForMaskedLM,
        {"num_hidden_layers": 1, "attention_activation": "softmax", "relative_bias": "t5"},
        "positions",
    ),
    "quadratic causal": (FlashForCausalLM, QUADRATIC, ""),
    "quadratic masked": (FlashForMaskedLM, QUADRATIC, "mask positions"),
    "sequences": (FlashForSequenceClassification, {"num_hidden_layers": 1}, "mask"),
    "causal sequences": (FlashForSequenceClassification, {"num_hidden_layers": 1, "is_decoder": True}, ""),
    "tokens": (FlashForTokenClassification, {"num_hidden_layers": 1}, "embeds"),
    "answers": (FlashForQuestionAnswering, {"num_hidden_layers": 1}, "mask"),
    "choices": (FlashForMultipleChoice, {"num_hidden_layers": 1}, "mask"),
}


def build(case):
    cls, changes, given = CASES[case]
    return make_model(cls, tiny_config(**{"num_hidden_layers": 2, **changes}), dtype=torch.float32), given


def batch_of(model, given, rows, length):
    """Inputs by name; with a mask, the first row is padded on the left, and one in the middle on the right."""
    ids = random_ids(model.config, rows, length, seed=length)
    batch = {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, : min(3, length - 1)] = 0
    mask[1:2, length // 2 + 1 :] = 0
    if "mask" in given:
        batch["attention_mask"] = mask
    if "positions" in given:
        counted = mask if "mask" in given else torch.ones_like(ids)
        batch["position_ids"] = (counted.cumsum(1) - 1).clamp(min=0)
    if "embeds" in given:
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    if isinstance(model, FlashForMultipleChoice):
        batch = {name: torch.stack([value, value.flip(0)], 1) for name, value in batch.items()}
    return batch


def results(model, outputs):
    names = ("start_logits", "end_logits") if isinstance(model, FlashForQuestionAnswering) else ("logits",)
    return torch.stack([outputs[name] for name in names])


def export(model, batch, **options):
    token = 2 if isinstance(model, FlashForMultipleChoice) else 1
    shapes = {name: {0: Dim.DYNAMIC, token: Dim.DYNAMIC} for name in batch}
    flag = {"use_cache": False} if isinstance(model, FlashForCausalLM) else {}
    shapes.update(dict.fromkeys(flag))
    return torch.export.export(model, (), {**batch, **flag}, dynamic_shapes=shapes, **options)


@pytest.mark.parametrize("example", [C - 3, 2 * C + 4])
@pytest.mark.parametrize("case", CASES)
def test_exported_at_any_length(case, example):
    model, given = build(case)
    program = export(model, batch_of(model, given, 2, example)).module()
    flag = {"use_cache": False} if isinstance(model, FlashForCausalLM) else {}
    for length, rows in LENGTHS:
        batch = batch_of(model, given, rows, length)
        got = results(model, program(**batch, **flag))
        assert_close(got, results(model, model(**batch)), 1e-5, f"length {length}")


def test_exported_in_strict_mode():
    model, given = build("causal")
    program = export(model, batch_of(model, given, 2, C - 3), strict=True).module()
    for length, rows in LENGTHS:
        batch = batch_of(model, given, rows, length)
        assert_close(program(**batch, use_cache=False).logits, model(**batch).logits, 1e-5, f"length {length}")


def test_exported_program_marks_positions_that_it_cannot_follow():
    """A program raises no error of ours, and its number of chunks cannot depend on position_ids."""
    model, _ = build("causal")
    batch = batch_of(model, "positions", 2, C + 4)
    program = export(model, batch).module()
    packed = {**batch, "position_ids": batch["position_ids"] % 5}
    assert program(**packed, use_cache=False).logits.isnan().any()
    assert program(**batch, use_cache=False).logits.isfinite().all()
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    masked["attention_mask"][:, :3] = 0
    program = export(model, masked).module()
    # Values at padding do not matter, as in eager calls.
    masked["position_ids"] = torch.where(masked["attention_mask"] == 0, 77, masked["position_ids"] - 3)
    assert program(**masked, use_cache=False).logits[:, 3:].isfinite().all()


def test_packed_rows_are_not_exported():
    model, _ = build("causal")
    ids = random_ids(model.config, 1, 12)
    for marks in ({"cu_seq_lens_q": torch.tensor([0, 5, 12])}, {"seq_idx": torch.arange(12)[None] // 6}):
        with pytest.raises(ValueError, match="Packed rows cannot be exported"):
            torch.export.export(model, (), {"input_ids": ids, "use_cache": False, **marks})


def test_quadratic_program_refuses_more_than_its_biases_cover():
    """Its toeplitz bias covers max_position_embeddings tokens."""
    model, given = build("quadratic causal")
    program = export(model, batch_of(model, given, 2, C - 3)).module()
    with pytest.raises((AssertionError, RuntimeError), match="<= 128"):
        program(**batch_of(model, given, 1, 129), use_cache=False)


# transformers' exporter, for the two kinds of layout, and torch's own.
@pytest.mark.slow
@pytest.mark.parametrize(
    "case, example, exporter",
    [
        ("causal, shifted", C - 3, "transformers"),
        ("causal, delta", C - 3, "transformers"),
        ("masked", 2 * C + 4, "transformers"),
        ("causal", C - 3, "torch"),
        ("quadratic masked", 2 * C + 4, "torch"),
    ],
)
def test_onnx_at_any_length(case, example, exporter, tmp_path):
    """Read by ONNX Runtime alone. What transformers' exporters return changed after 5.17."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, given = build(case)
    model.config.use_cache = False
    batch = batch_of(model, given, 2, example)
    path = tmp_path / "model.onnx"
    if exporter == "transformers":
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        exported = OnnxExporter().export(model, batch, config=OnnxConfig(dynamic=True))
        if hasattr(exported, "save_pretrained"):
            exported.save_pretrained(tmp_path)
        else:
            exported.save(path)
    else:
        shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in batch}
        torch.onnx.export(
            model, (), path, kwargs=batch, dynamic_shapes=shapes, output_names=["logits"], dynamo=True, verbose=False
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {node.name for node in session.get_inputs()} == set(batch)
    for length, rows in LENGTHS:
        batch = batch_of(model, given, rows, length)
        got = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})[0]
        assert_close(torch.from_numpy(got), model(**batch).logits, 1e-5, f"length {length}")


# One chunk, or several with a global part; one for FLASH-Quad.
@pytest.mark.parametrize("case, graphs", [("causal", 2), ("masked", 2), ("quadratic causal", 1)])
def test_compiled_graphs_over_the_border_of_a_chunk(case, graphs):
    torch._dynamo.reset()
    model, given = build(case)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    flag = {"use_cache": False} if isinstance(model, FlashForCausalLM) else {}
    with torch.no_grad():
        for length in (C - 3, 2 * C + 4, C + 1, C, 3, 8 * C):
            batch = batch_of(model, given, 2, length)
            assert_close(compiled(**batch, **flag).logits, model(**batch).logits, 1e-5, f"length {length}")
    assert counter.frame_count == graphs


@pytest.mark.parametrize("case", ["causal", "causal, delta", "masked"])
def test_torchscript_trace_at_any_length(case):
    model, given = build(case)
    given = given.removesuffix(" positions")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask=None):
            flag = {"use_cache": False} if isinstance(model, FlashForCausalLM) else {}
            return self.model(input_ids, attention_mask, **flag).logits

    traced = torch.jit.trace(Logits(), tuple(batch_of(model, given, 2, C - 3).values()), check_trace=False)
    for length, rows in LENGTHS:
        batch = batch_of(model, given, rows, length)
        assert_close(traced(*batch.values()), model(**batch).logits, 1e-5, f"length {length}")


def generation_exporter(name):
    """The exporter and its options; skips where transformers' exporters have no runners yet (5.17)."""
    pytest.importorskip("transformers.exporters.runners")
    if name == "onnx":
        pytest.importorskip("onnxruntime")
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        return OnnxExporter(), OnnxConfig(dynamic=True)
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    return DynamoExporter(), DynamoConfig(dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "exporter, example, cache, several, changes",
    [
        (
            "dynamo",
            C - 3,
            "dynamic",
            False,
            {"chunk_shift": 3, "global_form": "previous_token", "local_key_shift": True},
        ),
        (
            "dynamo",
            C - 3,
            "dynamic",
            True,
            {"num_hidden_layers": 1, "global_form": "previous_token", "global_state": "delta", "local_window": 2},
        ),
        ("dynamo", 2 * C + 4, "dynamic", True, {"num_hidden_layers": 1}),
        ("dynamo", 2 * C + 4, "static", False, {"num_hidden_layers": 1}),
        ("dynamo", C - 3, "dynamic", False, QUADRATIC),
        ("onnx", C - 3, "dynamic", False, {"num_hidden_layers": 1}),
    ],
)
def test_export_for_generation(exporter, example, cache, several, changes):
    """Prefill at any length, then steps across a chunk border, each compared to a call without cache."""
    exporter, options = generation_exporter(exporter)
    model = make_model(
        FlashForCausalLM, tiny_config(**{"num_hidden_layers": 2, "pad_token_id": 0, **changes}), dtype=torch.float32
    )
    static = {"cache_implementation": "static", "max_cache_len": 64} if cache == "static" else {}
    settings = GenerationConfig(do_sample=False, pad_token_id=0, **static)
    prompt = batch_of(model, "mask", 2, example)
    prompt["attention_mask"] = prompt["attention_mask"].sort(1).values  # padded on the left
    exported = exporter.export_for_generation(
        model, prompt, config=options, generation_config=settings, multi_token_decode=several
    )
    steps = 2 * C + 1
    for length, rows in LENGTHS[::2]:
        ids = random_ids(model.config, rows, length + steps, seed=length)
        mask = torch.ones_like(ids)
        mask[0, : min(2, length - 1)] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, use_cache=False).logits
        state = StaticCache(model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
        start = 0
        while start < length + steps:
            stage = "decode" if start else "prefill"
            end = min(start + 3, length + steps) if several and start else start + 1 if start else length
            batch = {"input_ids": ids[:, start:end], "position_ids": positions[:, start:end], "cache": state}
            batch["attention_mask"] = mask[:, :end]
            taken = exported.components[stage].metadata.kwargs
            batch = {name: value for name, value in batch.items() if name in taken}
            outputs = exported.runners[stage](**batch)
            state = outputs.cache
            assert_close(outputs.logits[:, -1], expected[:, end - 1], 1e-5, f"prompt {length}, token {end - 1}")
            start = end


@pytest.mark.parametrize("case", ["causal", "quadratic causal"])
def test_executorch_recipe_is_refused(case):
    """It registers keys and values as buffers, and would export a program that forgets every token."""
    from transformers.integrations.executorch import convert_and_export_with_cache

    model, _ = build(case)
    sizes = {"batch_size": 1, "max_cache_len": 32}
    model.generation_config = GenerationConfig(cache_implementation="static", use_cache=True, cache_config=sizes)
    with pytest.raises(AttributeError, match="export_for_generation"):
        convert_and_export_with_cache(model)
