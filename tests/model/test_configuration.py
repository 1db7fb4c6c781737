# SPDX-License-Identifier: Apache-2.0
import functools
import json
from dataclasses import fields

import pytest
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig

from flash_hf import FlashConfig, FlashForCausalLM, FlashModel
from helpers import tiny_config


def test_defaults_are_the_papers_base_model():
    config = FlashConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (24, 768, 1536)
    assert (config.query_key_dim, config.chunk_size, config.attention_divisor) == (128, 256, 256)
    import torch

    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in FlashModel(config).parameters())
    assert round(count / 1e6) == 112


def test_plus_is_five_fields_that_can_be_overridden(tmp_path):
    four = {
        "global_form": "previous_token", "local_key_shift": True, "use_scaled_sinusoid": False,
        "attention_init": "recent",
    }  # fmt: skip
    assert FlashConfig.plus().to_dict() == FlashConfig(chunk_shift=128, **four).to_dict()
    small = FlashConfig.plus(chunk_size=64, hidden_size=32, is_decoder=True)
    assert (
        small.to_dict()
        == FlashConfig(chunk_size=64, chunk_shift=32, hidden_size=32, is_decoder=True, **four).to_dict()
    )
    small.save_pretrained(tmp_path)
    assert {**AutoConfig.from_pretrained(tmp_path).to_dict(), "_name_or_path": ""} == small.to_dict()
    changed = {
        "chunk_shift": 3, "global_form": "paper", "local_key_shift": False, "use_scaled_sinusoid": True,
        "attention_init": "normal",
    }  # fmt: skip
    for name, value in changed.items():
        config, default = FlashConfig.plus(chunk_size=16, **{name: value}), FlashConfig.plus(chunk_size=16)
        assert config.to_dict() == {**default.to_dict(), name: value} and getattr(default, name) != value
    with pytest.raises(ValueError, match="unknown field `chunksize`.*Did you mean 'chunk_size'"):
        FlashConfig.plus(chunksize=64)
    with pytest.raises(Exception, match="`chunk_size` must be at least 1, got 0"):
        FlashConfig.plus(chunk_size=0)
    with pytest.raises(Exception, match="`chunk_shift` must be 0 where there are no chunks"):
        FlashConfig.plus(attention_type="quadratic", global_form="paper", local_key_shift=False)


def test_saves_and_loads_exactly(tmp_path):
    config = tiny_config(relative_bias="rotary", rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5})
    config.save_pretrained(tmp_path)
    for loaded in (FlashConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is FlashConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert config.rotary_dim == 6


def test_old_and_extra_keys_of_a_file_still_load(tmp_path):
    stored = {**tiny_config().to_dict(), "a_key_of_tomorrow": 3, "chunksize": 5, "torch_dtype": "float32"}
    stored.pop("norm_eps")
    (tmp_path / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    config = FlashConfig.from_pretrained(tmp_path)
    assert config.a_key_of_tomorrow == 3 and config.chunk_size == 8 and config.norm_eps == 1e-5
    config.save_pretrained(tmp_path / "again")
    assert FlashConfig.from_pretrained(tmp_path / "again").a_key_of_tomorrow == 3


def test_other_libraries_find_what_they_read(tmp_path):
    """PEFT reads heads from the dictionary; TRL reads `auto_map` from the configuration."""
    config = tiny_config()
    assert config.to_dict()["num_attention_heads"] == 1 and config.auto_map == {}
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert stored["num_attention_heads"] == 1 and "auto_map" not in stored
    (tmp_path / "config.json").write_text(json.dumps({**stored, "num_attention_heads": 4}), encoding="utf-8")
    for wrong in (lambda: FlashConfig.from_pretrained(tmp_path), lambda: FlashConfig(num_attention_heads=4)):
        with pytest.raises(Exception, match="`num_attention_heads` must be 1, got 4"):
            wrong()


def test_divisor_is_a_stored_constant(tmp_path):
    tiny_config(chunk_size=16).save_pretrained(tmp_path)
    assert FlashConfig.from_pretrained(tmp_path, chunk_size=8).attention_divisor == 16
    assert tiny_config(attention_type="quadratic").attention_divisor == 128


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"chunksize": 99}, ["chunksize", "99", "Did you mean 'chunk_size'"]),
        ({"atention_type": "local"}, ["atention_type", "Did you mean 'attention_type'"]),
        ({"intermediate_size": 99}, ["intermediate_size", "99", "Did you mean 'expansion_factor'"]),
        ({"num_heads": 4}, ["num_heads", "4", "Did you mean 'num_attention_heads'"]),
        ({"n_layer": 4}, ["n_layer", "4", "Did you mean 'num_hidden_layers'"]),
        ({"chunk_size": 0}, ["chunk_size", "at least 1", "0"]),
        ({"chunk_size": "256"}, ["chunk_size", "int", "256"]),
        ({"hidden_size": -8}, ["hidden_size", "at least 1", "-8"]),
        ({"hidden_size": 25, "expansion_factor": 2}, ["hidden_size", "even", "25", "use_scaled_sinusoid"]),
        ({"query_key_dim": 13}, ["query_key_dim", "even", "13", "use_rope"]),
        ({"expansion_factor": 0}, ["expansion_factor", "greater than 0"]),
        ({"expansion_factor": 1.3}, ["expansion_factor", "whole number", "1.3"]),
        ({"attention_type": "mixed-chunk"}, ["attention_type", "mixed-chunk", "Did you mean 'mixed_chunk'"]),
        ({"attention_activation": "relu"}, ["attention_activation", "'relu'", "Did you mean 'relu2'"]),
        ({"relative_bias": "alibi"}, ["relative_bias", "alibi", "toeplitz"]),
        ({"norm_type": "scalenorm"}, ["norm_type", "scalenorm", "Did you mean 'scale_norm'"]),
        ({"global_normalization": "sum"}, ["global_normalization", "'sum'", "mean"]),
        ({"global_form": "previous"}, ["global_form", "'previous'", "previous_token"]),
        ({"global_form": "previous_token", "attention_type": "local"}, ["global_form", "no global branch"]),
        ({"attention_init": "resent"}, ["attention_init", "'resent'", "Did you mean 'recent'"]),
        ({"attention_init": "recent", "relative_bias": "t5"}, ["attention_init", "toeplitz"]),
        ({"attention_init": "recent", "attention_type": "global"}, ["attention_init", "toeplitz"]),
        ({"chunk_shift": 8}, ["chunk_shift", "below chunk_size (8)", "got 8"]),
        ({"chunk_shift": -1}, ["chunk_shift", "0 or more", "got -1"]),
        ({"chunk_shift": 4, "attention_type": "quadratic"}, ["chunk_shift", "no chunks", "got 4"]),
        ({"local_key_shift": True, "attention_type": "quadratic"}, ["local_key_shift", "no chunks", "'quadratic'"]),
        ({"local_window": 3}, ["local_window", "1 or 2", "got 3"]),
        ({"local_window": 2, "attention_type": "global"}, ["local_window", "no chunks with keys", "'global'"]),
        ({"global_state": "detla"}, ["global_state", "'mean', 'delta'", "Did you mean 'delta'"]),
        ({"global_state": "delta", "attention_type": "local"}, ["global_state", "no global branch", "'local'"]),
        ({"global_state": "delta", "global_normalization": "chunk"}, ["global_normalization", "'mean'", "'chunk'"]),
        ({"local_key_shift": True, "query_key_dim": 6}, ["local_key_shift", "multiple of 4", "here 6"]),
        ({"hidden_act": "sillu"}, ["hidden_act", "sillu", "Did you mean 'silu'"]),
        ({"hidden_dropout": 1.0}, ["hidden_dropout", "[0, 1)", "1.0"]),
        ({"attention_dropout": -0.1}, ["attention_dropout", "[0, 1)", "-0.1"]),
        ({"norm_eps": 0.0}, ["norm_eps", "greater than 0"]),
        ({"initializer_range": -1.0}, ["initializer_range", "0 or more"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, ["rope_parameters", "even", "3"]),
        ({"relative_bias": "t5", "t5_num_buckets": 6}, ["t5_num_buckets", "multiple of 4"]),
        ({"relative_bias": "t5", "t5_max_distance": 2}, ["t5_max_distance", "greater than"]),
        ({"per_layer_config": {0: {"chunk_size": 4}}}, ["per_layer_config", "not supported"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_values_and_names_are_refused(changes, words):
    with pytest.raises(Exception) as error:
        tiny_config(**changes)
    for word in words:
        assert word in str(error.value), (word, str(error.value))


@pytest.mark.parametrize("changes, words", [
    ({"problem_type": "multilabel"}, ["'multi_label_classification'", "'multilabel'", "Did you mean"]),
    ({"id2label": ["no", "yes"]}, ["dictionary", "{0: 'no'", "['no', 'yes']"]),
    ({"id2label": {"no": 0, "yes": 1}}, ["keys", "'no'"]),
    ({"label2id": ["no", "yes"]}, ["dictionary", "{'no': 0}", "['no', 'yes']"]),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else None)  # fmt: skip
def test_wrong_fields_of_heads_are_refused(changes, words, tmp_path):
    """Also at loading. The oldest transformers refuses them itself, by the types of its fields."""
    tiny_config().save_pretrained(tmp_path)
    for make in (tiny_config, functools.partial(FlashConfig.from_pretrained, tmp_path)):
        with pytest.raises(Exception, match=next(iter(changes))) as error:
            make(**changes)
        if not str(error.value).startswith("Validation error for field"):
            assert [word for word in words if word not in str(error.value)] == []


def test_a_bad_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config().to_dict(), "chunk_size": 0}), encoding="utf-8")
    with pytest.raises(Exception, match="chunk_size.*at least 1"):
        FlashConfig.from_pretrained(tmp_path)


def test_an_override_at_loading_is_checked(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(Exception, match="chunk_size.*at least 1"):
        FlashConfig.from_pretrained(tmp_path, chunk_size=0)


def test_every_field_is_described():
    """transformers' decorator keeps our descriptions and adds its own for the arguments common to all models."""
    own = {field.name for field in fields(FlashConfig)} - {field.name for field in fields(PreTrainedConfig)}
    described = [line.split(" (")[0].strip() for line in FlashConfig.__doc__.splitlines() if line.endswith("):")]
    assert own <= set(described) and len(described) == len(set(described))
    assert "Not a speed setting" in FlashConfig.__doc__ and "Rows of the embedding matrix" in FlashConfig.__doc__


@pytest.mark.parametrize("changes", [
    {"attention_type": "lokal"}, {"norm_type": "foo"}, {"chunk_size": 0}, {"chunk_shift": 99}, {"query_key_dim": 15},
], ids=str)  # fmt: skip
def test_a_model_checks_fields_that_were_set_later(changes):
    """And not its first checkpoint, after hours of training."""
    config = tiny_config()
    ((name, value),) = changes.items()
    setattr(config, name, value)
    for build in (FlashModel, FlashForCausalLM, AutoModelForMaskedLM.from_config):
        with pytest.raises(Exception, match=f"`{name}` must be .*got {value!r}"):
            build(config)
