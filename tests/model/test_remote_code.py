# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that carry their code: what flash_hf.hub writes, and (remote_client.py) that it works alone."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForPreTraining, PreTrainedTokenizerFast
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import flash_hf
from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM, FlashForSequenceClassification, FlashModel
from flash_hf.hub import add_code, add_mean_pooling, registered_classes, save_with_code
from helpers import ROOT, make_model, random_ids, run_python, tiny_config


PACKAGE = Path(flash_hf.__file__).parent
SOURCES = {path.name for path in PACKAGE.glob("*_flash.py")}


def small_model(cls, **changes):
    return make_model(cls, tiny_config(**changes), dtype=torch.float32)


def test_every_class_that_the_package_exports_is_registered():
    classes = registered_classes()
    assert classes["AutoConfig"] is FlashConfig and classes["AutoModel"] is FlashModel
    public = {getattr(flash_hf, name) for name in flash_hf.__all__ if name.startswith("FlashFor")}
    assert set(classes.values()) == public | {FlashConfig, FlashModel}


def test_the_files_import_nothing_else():
    allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    assert "modeling_flash.py" in SOURCES
    for name in SOURCES:
        assert not set(get_imports(PACKAGE / name)) - allowed, name
        # transformers' finder reads the imports with regular expressions: a file that it misses is not copied.
        assert {Path(path).name for path in get_relative_import_files(PACKAGE / name)} <= SOURCES
    assert {Path(path).name for path in get_relative_import_files(PACKAGE / "modeling_flash.py")} == SOURCES - {
        "modeling_flash.py"
    }


def test_saving_leaves_the_classes_as_they_were(tmp_path):
    model = small_model(FlashForCausalLM)
    before = model.config.to_dict()
    written = save_with_code(model, tmp_path / "coded")
    assert {path.name for path in written} == SOURCES
    assert {name: value for name, value in model.config.to_dict().items() if value != before.get(name)} == {
        "architectures": ["FlashForCausalLM"],
        "dtype": "float32",
    }
    assert not any(cls._auto_class for cls in registered_classes().values()) and not model.is_remote_code()
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))


def test_bidirectional_models_with_a_tokenizer_become_sentence_transformers(tokenizer, tmp_path):
    files = {"modules.json", "sentence_bert_config.json", "1_Pooling/config.json"}
    for number, (cls, changes, embeds) in enumerate(
        [
            (FlashForMaskedLM, {}, True),
            (FlashModel, {}, True),
            (FlashModel, {"is_decoder": True}, False),
            (FlashForCausalLM, {}, False),
            (FlashForSequenceClassification, {}, False),
        ]
    ):
        save_with_code(small_model(cls, **changes), tmp_path / f"{number}", tokenizer)
        assert {(tmp_path / f"{number}" / file).exists() for file in files} == {embeds}
    save_with_code(small_model(FlashModel), tmp_path / "without")
    assert not (tmp_path / "without" / "modules.json").exists()
    add_mean_pooling(tmp_path / "3", max_seq_length=4000)
    limit = json.loads((tmp_path / "3" / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert limit == {"max_seq_length": 4000}
    with pytest.raises(ValueError, match="`folder` must hold a saved model"):
        add_mean_pooling(tmp_path)


def test_loaded_by_the_package_and_saved_it_does_not_promise_code(tmp_path):
    """With an auto_map but no files, loading without the package would fail."""
    save_with_code(small_model(FlashForCausalLM), tmp_path / "coded")
    for model in (FlashForCausalLM.from_pretrained(tmp_path / "coded"), AutoModel.from_pretrained(tmp_path / "coded")):
        assert type(model) in (FlashForCausalLM, FlashModel)
        model.save_pretrained(tmp_path / "again")
        assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
        add_code(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))["auto_map"]


def test_what_cannot_be_saved_is_refused(tmp_path):
    class Mine(FlashForCausalLM):
        pass

    with pytest.raises(ValueError, match="`model` must be one of FlashFor.*got Mine.*merge_and_unload"):
        save_with_code(Mine(tiny_config()), tmp_path)
    with pytest.raises(ValueError, match="got OptimizedModule.*Unwrap a compiled"):
        save_with_code(torch.compile(small_model(FlashModel)), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`folder` must hold a saved model.*config.json does not exist.*save_pretr"):
        add_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(ValueError, match="`folder` must hold a model of type 'flash_gau', got 'bert'"):
        add_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_class_of_the_users_own_is_not_promised():
    class Mine(FlashForCausalLM):
        pass

    AutoModelForPreTraining.register(FlashConfig, Mine)
    try:
        assert "AutoModelForPreTraining" not in registered_classes()
    finally:
        del AutoModelForPreTraining._model_mapping._extra_content[FlashConfig]


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(61)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0", pad_token="w1")


@pytest.fixture(scope="module")
def root(tmp_path_factory, tokenizer):
    """A folder for each Auto class, with the inputs and outputs of the model that was saved there."""
    root = tmp_path_factory.mktemp("remote")
    for name, cls in registered_classes().items():
        if name == "AutoConfig":
            continue
        model = small_model(cls, num_labels=3)
        ids = random_ids(model.config, *((2, 3, 21) if name == "AutoModelForMultipleChoice" else (2, 21)))
        save_with_code(model, root / name, tokenizer)
        with torch.no_grad():
            found = [value for value in model(ids).to_tuple() if isinstance(value, torch.Tensor)]
        expected = {"in.input_ids": ids, **{f"out.{i}": value.contiguous() for i, value in enumerate(found)}}
        if name == "AutoModelForCausalLM":
            expected["generated"] = model.generate(ids, max_new_tokens=20, do_sample=False)
        save_file(expected, root / name / "expected.safetensors")
    for name, line in (
        ("other", "# another version of this file\n"),
        ("tampered", f"open({str(root / 'mark')!r}, 'w').close()\n"),
    ):
        shutil.copytree(root / "AutoModelForCausalLM", root / name)
        (root / name / "expected.safetensors").unlink()
        with open(root / name / "cache_flash.py", "a", encoding="utf-8") as file:
            file.write(line)
    return root


@pytest.mark.slow
def test_without_the_package(root, tmp_path):
    environment = {
        "PYTHONPATH": None,
        "REMOTE_ROOT": str(root),
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "support" / "remote_client.py"]
    run_python(*command, cwd=tmp_path, **environment)


def test_older_code_keeps_its_own_caches():
    """Code pushed with the kernels' third interface makes caches under these names, and calls other methods."""
    assert not {*FlashConfig().layer_types, *FlashConfig(attention_type="quadratic").layer_types} & {
        "flash_gau",
        "flash_gau_quadratic",
    }
    assert not {"flash_gau", "flash_gau_quadratic"} & DYNAMIC_LAYER_TYPE_MAPPING.keys()


def test_the_package_wins_over_a_folders_code(root):
    """With the package installed, code in a checkpoint does not run: with the flag or without."""
    for flag in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        assert type(AutoModel.from_pretrained(root / "tampered", **flag)) is FlashModel
    assert not [name for name in sys.modules if name.startswith("transformers_modules.tampered")]
