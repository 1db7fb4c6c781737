# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""Folders written by flash_hf.hub as users without the package see them.

test_remote_code.py saves the folders under REMOTE_ROOT and runs pytest on this file in a process of its own.
"""

import json
import os
import sys
from pathlib import Path


# Also where the package is installed: from here on, `import flash_hf` fails.
sys.modules["flash_hf"] = None

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, StaticCache, pipeline


ROOT = Path(os.environ["REMOTE_ROOT"])
SAVED = sorted(path.name for path in ROOT.iterdir() if (path / "expected.safetensors").exists())
AUTO_MAP = json.loads((ROOT / SAVED[0] / "config.json").read_text(encoding="utf-8"))["auto_map"]


def load(folder: Path, auto_class: str, **options):
    return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True, **options)


def outputs(model, inputs: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        return [value for value in model(**inputs).to_tuple() if isinstance(value, torch.Tensor)]


def check_exact(folder: Path, auto_class: str) -> None:
    """The saved head gives the same outputs as in the process that saved it."""
    stored = load_file(folder / "expected.safetensors")
    inputs = {name.removeprefix("in."): value for name, value in stored.items() if name.startswith("in.")}
    model, report = load(folder, auto_class, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    # The order of sums depends on addresses, and those of weights mapped from a file are not aligned.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    found = outputs(model, inputs)
    assert found and all(torch.equal(value, stored[f"out.{i}"]) for i, value in enumerate(found))


# First, before any of the folders' code has been imported.
@pytest.mark.parametrize("auto_class", AUTO_MAP)
def test_refused_without_the_flag(auto_class, monkeypatch):
    # At a terminal transformers prompts; this user answers no. Without a terminal it refuses as well.
    for answer, flag in (("n", {}), (None, {}), ("y", {"trust_remote_code": False})):
        monkeypatch.setattr("builtins.input", lambda prompt, answer=answer: answer or (_ for _ in ()).throw(EOFError))
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            getattr(transformers, auto_class).from_pretrained(ROOT / SAVED[0], **flag)
    assert not [name for name in sys.modules if name.endswith("_flash")]


@pytest.mark.parametrize("saved", SAVED)
def test_the_saved_head_is_exact(saved):
    check_exact(ROOT / saved, saved)
    assert "flash_hf" not in {name.split(".")[0] for name, module in sys.modules.items() if module}


@pytest.mark.parametrize("auto_class", AUTO_MAP)
@pytest.mark.parametrize("saved", ["AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"])
def test_every_auto_class_loads_every_folder(saved, auto_class):
    if auto_class == "AutoConfig":
        config = AutoConfig.from_pretrained(ROOT / saved, trust_remote_code=True)
        assert type(config).__name__ == "FlashConfig" and config.model_type == "flash_gau"
        return
    model, report = load(ROOT / saved, auto_class, output_loading_info=True)
    assert type(model).__name__ == AUTO_MAP[auto_class].split(".")[1]
    # Only a head may be new.
    assert not [name for name in report["missing_keys"] if name.startswith("model.")]


def test_generation_is_exact():
    folder = ROOT / "AutoModelForCausalLM"
    stored = load_file(folder / "expected.safetensors")
    model = load(folder, "AutoModelForCausalLM")
    new = {"max_new_tokens": 20, "do_sample": False}
    expected = stored["generated"]
    assert torch.equal(model.generate(stored["in.input_ids"], **new), expected)
    ids = stored["in.input_ids"]
    logits = model(ids).logits
    for name in ("cache", "past_key_values"):
        cache = StaticCache(config=model.config, max_cache_len=64)
        assert torch.equal(model.generate(ids, **{name: cache}, **new), expected)
        cache = StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            model(ids[:, :3], **{name: cache})
            torch.testing.assert_close(model(ids[:, 3:], **{name: cache}).logits, logits[:, 3:])
    with pytest.raises(ValueError, match="Unknown argument `cache_params`"):
        model(ids, cache_params=cache)


def test_pipelines():
    folder = ROOT / "AutoModelForCausalLM"
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("w5 w6", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[5, 6]]
    generate = pipeline("text-generation", folder, trust_remote_code=True)
    found = generate("w5 w6", max_new_tokens=9, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    expected = load(folder, "AutoModelForCausalLM").generate(ids, max_new_tokens=9, do_sample=False)[0]
    assert torch.as_tensor(found).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("text-generation", folder, trust_remote_code=False)


def test_sentence_transformers_embeds_the_mean_over_real_tokens(monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = ROOT / "AutoModelForMaskedLM"
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    with pytest.raises((ValueError, OSError), match="trust_remote_code=True"):
        sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    embedder = sentence_transformers.SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    assert embedder.max_seq_length == embedder[0].config.max_position_embeddings == 128
    texts = ["w5 w6 w7", " ".join(["w9", "w4", "w7"] * 60)]  # of 180, 128 are read
    encoder = load(folder, "AutoModel")
    for text, found in zip(texts, embedder.encode(texts, convert_to_tensor=True), strict=True):
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = encoder(ids[:, :128]).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_saved_again_it_carries_the_code_on(tmp_path):
    stored = load_file(ROOT / "AutoModelForMaskedLM" / "expected.safetensors")
    model = load(ROOT / "AutoModelForMaskedLM", "AutoModelForMaskedLM")
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(outputs(again, {"input_ids": stored["in.input_ids"]})[0], stored["out.0"])
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"] == AUTO_MAP


def test_two_versions_in_one_process():
    """The last one that was loaded has registered its cache layers; the first one still generates."""
    models = [load(ROOT / name, "AutoModelForCausalLM") for name in ("AutoModelForCausalLM", "other")]
    assert type(models[0]) is not type(models[1])
    stored = load_file(ROOT / "AutoModelForCausalLM" / "expected.safetensors")
    for model in (*models, models[0]):
        for options in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}):
            ids = stored["in.input_ids"][:1] if "prompt_lookup_num_tokens" in options else stored["in.input_ids"]
            found = model.generate(ids, max_new_tokens=20, do_sample=False, **options)
            assert torch.equal(found, stored["generated"][: len(ids)]), options


def test_code_runs_only_with_the_flag():
    """`tampered` holds code that leaves a mark when it is imported."""
    mark = ROOT / "mark"
    for auto_class in AUTO_MAP:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            getattr(transformers, auto_class).from_pretrained(ROOT / "tampered", trust_remote_code=False)
    assert not mark.exists()
    AutoModelForCausalLM.from_pretrained(ROOT / "tampered", trust_remote_code=True)
    assert mark.exists()


def test_trainer_shifts_the_labels_of_label_smoothing(tmp_path):
    """It goes by the names of classes, which have to be known without the package, too."""
    model = load(ROOT / "AutoModelForCausalLM", "AutoModelForCausalLM")
    args = transformers.TrainingArguments(str(tmp_path), label_smoothing_factor=0.3, use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, args)
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    log_probs = model(ids).logits[:, :-1].log_softmax(-1)
    expected = -0.7 * log_probs.gather(-1, ids[:, 1:, None]).mean() - 0.3 * log_probs.mean()
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    assert torch.allclose(found, expected, rtol=1e-5)
