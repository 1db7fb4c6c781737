# SPDX-License-Identifier: Apache-2.0
"""What changed between the transformers versions that setup.cfg allows: the same calls work with each.

transformers 5.24 renamed `past_key_values` to `cache`. `make test` runs this with the newest, `make oldest` with the
oldest; each name is then transformers' own in one of them.
"""

import configparser
import inspect
import re
import subprocess
import sys
import warnings

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from flash_hf import FlashForCausalLM, FlashForMaskedLM, FlashForSequenceClassification, FlashModel
from flash_hf.cache_flash import CACHE_NAME, resolve_cache
from flash_hf.cache_flash import OTHER_CACHE_NAME as OTHER_NAME
from flash_hf.modeling_flash import FlashLayer
from helpers import ROOT, assert_close, make_model, random_ids, tiny_config


NAMES = ("cache", "past_key_values")
GREEDY = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def no_deprecations():
    """transformers warns of its old names by FutureWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield


@pytest.fixture(scope="module")
def model():
    return make_model(FlashForCausalLM, tiny_config(), dtype=torch.float64)


def batch(model):
    """Two rows of 21 tokens, the first padded on the left."""
    ids = random_ids(model.config, 2, 21)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return ids, mask


def filled(model, kind, ids, mask):
    dynamic = kind == "dynamic"
    cache = DynamicCache(config=model.config) if dynamic else StaticCache(config=model.config, max_cache_len=99)
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=True, **{CACHE_NAME: cache})
    return cache


def test_the_name_is_the_hosts():
    """The name that Llama accepts and returns."""
    config = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **config)).eval()
    assert CACHE_NAME in inspect.signature(llama.forward).parameters
    assert OTHER_NAME not in inspect.signature(llama.forward).parameters
    assert CACHE_NAME in llama(torch.tensor([[1, 2]])).keys()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_both_names(model, name, kind):
    ids, mask = batch(model)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, use_cache=False).logits
        base_full = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        for module, expected in ((model, full), (model.model, base_full)):
            cache = filled(model, kind, ids[:, :13], mask[:, :13])
            out = module(ids[:, 13:], attention_mask=mask, **{name: cache})
            assert out[CACHE_NAME] is cache and list(out.keys()).count(CACHE_NAME) == 1
            assert OTHER_NAME not in list(out.keys())
            assert_close(out[0], expected[:, 13:], 1e-9)
        # By position, in the order of transformers' models.
        cache = filled(model, kind, ids[:, :13], mask[:, :13])
        assert_close(model(ids[:, 13:], mask, None, cache).logits, full[:, 13:], 1e-9)
        # A caller may have the same cache under both names, and None under either.
        cache = filled(model, kind, ids[:, :13], mask[:, :13])
        both = {"cache": cache, "past_key_values": cache}
        assert_close(model(ids[:, 13:14], attention_mask=mask[:, :14], **both).logits, full[:, 13:14], 1e-9)
        assert_close(model(ids, attention_mask=mask, cache=None, past_key_values=None).logits, full, 1e-9)


def test_two_different_caches_are_refused(model):
    ids, _ = batch(model)
    two = {name: DynamicCache(config=model.config) for name in NAMES}
    for call in (model, model.model, lambda *args, **kwargs: model.generate(*args, **GREEDY, **kwargs)):
        with pytest.raises(ValueError, match="`cache` and `past_key_values` are two names of one argument"):
            call(ids, **two)


@pytest.mark.parametrize("name", [
    "cache_params", "past_key_value", "kv_cache", "layer_past", "past", "past_kv", "past_key_vaules", "mems", "state",
    "memory",
])  # fmt: skip
def test_a_cache_under_another_name_is_refused(model, name):
    """If ignored, the logits would be those of a text without its beginning."""
    ids, _ = batch(model)
    bidirectional = make_model(FlashForMaskedLM, tiny_config())
    task = make_model(FlashForSequenceClassification, tiny_config(is_decoder=True))
    for refusing in (model, model.model, bidirectional, task):
        with pytest.raises(ValueError, match=rf"Unknown argument `{name}`.*`cache` \(or `past_key_values`\)"):
            refusing(ids, **{name: DynamicCache(config=model.config)})
    if name != "memory":
        with pytest.raises(ValueError, match=f"Unknown argument `{name}`"):
            model(ids, **{name: ((torch.ones(1), torch.ones(1)),)})
    assert model(ids, **{name: None}).logits.shape[:2] == ids.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_bidirectional_model_refuses_both_names(name):
    masked = make_model(FlashForMaskedLM, tiny_config())
    with pytest.raises(ValueError, match="bidirectional"):
        masked(random_ids(masked.config, 1, 5), **{name: DynamicCache()})


def test_resolving():
    first, second = DynamicCache(), DynamicCache()
    assert resolve_cache(None, None, use_cache=True, cache_position=torch.arange(2)) is None
    assert resolve_cache(first, None) is resolve_cache(None, first) is resolve_cache(first, first) is first
    with pytest.raises(ValueError, match="two names"):
        resolve_cache(first, second)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_generate_continues_a_cache_of_either_name(model, name, kind):
    ids, mask = batch(model)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    cache = filled(model, kind, ids[:, :17], mask[:, :17])
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY, **{name: cache})
    assert torch.equal(out.sequences, expected)
    assert out[CACHE_NAME] is cache and int(cache.get_seq_length()) == expected.shape[1] - 1
    with pytest.raises(ValueError, match="kv_cache"):
        model.generate(ids, attention_mask=mask, kv_cache=cache, **GREEDY)


@pytest.mark.parametrize("name", NAMES)
def test_preparing_inputs_takes_both_names(model, name):
    """PEFT and serving code use the name of their transformers version."""
    ids, mask = batch(model)
    cache = filled(model, "static", ids[:, :20], mask[:, :20])
    options = {"attention_mask": mask, "next_sequence_length": 1, name: cache}
    prepared = model.prepare_inputs_for_generation(ids, **options)
    assert prepared[CACHE_NAME] is cache and OTHER_NAME not in prepared and prepared["input_ids"].shape == (2, 1)
    full = model(ids, attention_mask=mask).logits
    with torch.no_grad():
        assert_close(model(**prepared).logits[:, -1], full[:, -1], 1e-9)
    expected = {"input_ids", "next_sequence_length", "inputs_embeds", "attention_mask", CACHE_NAME}
    assert expected <= set(inspect.signature(model.prepare_inputs_for_generation).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_masks_for_generate_take_both_names(model, name):
    """The padding of the call's own columns, which transformers requests before a compiled call."""
    ids, mask = batch(model)
    embeds = torch.empty(2, 4, 0)
    cache = DynamicCache(config=model.config)
    options = {"config": model.config, "inputs_embeds": embeds, "attention_mask": mask, "position_ids": None}
    own = model.create_masks_for_generate(**options, **{name: cache}, is_first_iteration=False)
    assert torch.equal(own, mask[:, -4:])
    assert torch.equal(model.create_masks_for_generate(model.config, embeds, mask, cache), own)


def test_gradient_checkpointing_drops_the_cache_of_a_layer():
    """transformers drops it by name; a layer that kept it would add every token twice, in forward and backward."""
    model = make_model(FlashForCausalLM, tiny_config(), dtype=torch.float64)
    ids, _ = batch(model)
    cache, seen = DynamicCache(config=model.config), []
    model.train()
    # The first is the name since 5.24.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for layer in model.model.layers:
        assert isinstance(layer, FlashLayer)
        layer.gau.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["cache"]), with_kwargs=True
        )
    model(ids, labels=ids, **{OTHER_NAME: cache}).loss.backward()
    assert len(seen) == 2 * len(model.model.layers) and set(seen) == {None}
    assert cache.get_seq_length() == 0


def test_trainer_and_accelerate_know_both_names():
    """Trainer would gather the state with the predictions, accelerate would copy it to every device."""
    for names in (tiny_config().keys_to_ignore_at_inference, FlashModel._skip_keys_device_placement):
        assert set(NAMES) <= set(names)


IMPORT = """
import warnings
warnings.filterwarnings("error", module="flash_hf")
warnings.filterwarnings("error", category=FutureWarning)
import flash_hf
from flash_hf import FlashConfig, FlashForCausalLM, FlashForMultipleChoice
from transformers import AutoModelForCausalLM
import torch
config = FlashConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, query_key_dim=16, chunk_size=8)
config.backend = "torch"
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.arange(1, 20)[None]
options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
for changes in ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
    assert model.generate(ids, attention_mask=torch.ones_like(ids), **options, **changes).shape == (1, 31)
model(ids, labels=ids).loss.backward()
"""


def test_import_and_use_are_silent():
    """transformers prints no message or warning about our code; messages of other packages do not count."""
    alone = "import transformers.modeling_utils, transformers.generation.utils, transformers.modeling_layers\n"
    words = [sys.executable, "-c"]
    theirs = subprocess.run([*words, alone], capture_output=True, encoding="utf-8", check=True)
    ours = subprocess.run([*words, alone + IMPORT], capture_output=True, encoding="utf-8")
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == theirs.stdout == ""

    def lines(text):  # without the times and process ids of torch's own messages
        return [line.split("]")[-1] for line in text.splitlines()]

    assert [line for line in lines(ours.stderr) if line not in lines(theirs.stderr)] == []


def test_the_pins_are_versions_that_setup_cfg_allows():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [*setup["options.extras_require"]["dev"].split("\n"), *setup["options"]["install_requires"].split("\n")]
    pinned = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    versions = {canonicalize_name(name): version for name, version in pinned}
    for wanted in (Requirement(line) for line in lines if line and not line.startswith("flash-hf")):
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), wanted


def test_contracts_are_files_of_tests():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    contracts = re.search(r"^CONTRACTS := (.*)$", makefile, re.MULTILINE)[1].split()
    assert "tests/model" in contracts and "tests/scripts/test_readme.py" in contracts
    for name in contracts:
        assert (ROOT / name).exists(), name
