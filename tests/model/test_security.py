# SPDX-License-Identifier: Apache-2.0
"""What an untrusted checkpoint cannot do: run code or a pickle, exhaust memory by absurd sizes, obtain a token.

Tokens in pushed files and in logs are looked for in test_hub.py, code beside a checkpoint in test_remote_code.py.
"""

import ast
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from flash_hf import FlashForCausalLM, FlashModel
from flash_hf.training import FlashTrainingArguments
from helpers import ROOT, Trap, tiny_config


SOURCES = sorted([*ROOT.glob("flash_hf/**/*.py"), *ROOT.glob("scripts/**/*.py")])

# Reading a pickle executes code; so do these.
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}


def unsafe_uses(source: str) -> list[str]:
    """Uses of pickle and of code in strings: imports, torch.load without weights_only=True, torch.save, eval ..."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in UNSAFE_MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in UNSAFE_BUILTINS or called == "torch.save" or options.get("allow_pickle", "False") != "False":
                found.append(called)
            elif called == "torch.load" and options.get("weights_only") != "True":
                found.append(called)
            elif options.get("trust_remote_code", "False") == "True" or options.get("weights_only") == "False":
                found.append(called)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, dill as d",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.save({}, 'x')",
        "model.from_pretrained('x', weights_only=False)",
        "model.from_pretrained('x', trust_remote_code=True)",
        "numpy.load('x', allow_pickle=True)",
        "eval('1 + 1')",
    ],
)
def test_the_search_finds(source):
    assert len(unsafe_uses(source)) == 1
    assert not unsafe_uses("import torch\nmodel.eval()\ntorch.load('x', weights_only=True)\ntorch.compile(f)")


def test_no_pickle_in_the_package_and_the_scripts():
    assert {"modeling_flash.py", "trainer.py", "train_mlm.py"} <= {path.name for path in SOURCES}
    assert not {str(path): uses for path in SOURCES if (uses := unsafe_uses(path.read_text(encoding="utf-8")))}


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
@pytest.mark.parametrize("options", [{}, {"weights_only": False}, {"use_safetensors": False, "weights_only": False}])
def test_a_pickle_is_never_read(write, options, tmp_path):
    mark, folder = tmp_path / "mark", tmp_path / "model"
    tiny_config().save_pretrained(folder)
    index = {"metadata": {}, "weight_map": {"embed_tokens.weight": "pytorch_model.bin"}}
    for name in ("pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"):
        write({"embed_tokens.weight": Trap(mark)}, folder / "pytorch_model.bin")
        if name == "model.safetensors":
            (folder / "pytorch_model.bin").rename(folder / name)
        elif name == "model.safetensors.index.json":
            (folder / name).write_text(json.dumps(index), encoding="utf-8")
        for auto_class in (AutoModel, FlashForCausalLM):
            with pytest.raises(Exception) as error:
                auto_class.from_pretrained(folder, **options)
            assert not mark.exists(), name
            if options or name == "pytorch_model.bin":
                assert "safetensors" in str(error.value)
        for path in folder.glob("*model*"):
            path.unlink()
    # The trap does work.
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()


def test_an_honest_pickle_is_not_read_either(tmp_path):
    model = FlashModel(tiny_config())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safetensors only, got use_safetensors=False.*passed as state_dict"):
        AutoModel.from_pretrained(tmp_path, use_safetensors=False)
    state_dict = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    loaded = FlashModel.from_pretrained(None, config=model.config, state_dict=state_dict)
    assert torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight)


@pytest.mark.parametrize("before", [None, "0"])
def test_no_conversion_service_is_asked_while_loading(before, tmp_path, monkeypatch):
    """test_hub.py sees that no request goes out; here, that it is disabled for our models, then enabled again."""
    name, seen = "DISABLE_SAFETENSORS_CONVERSION", []
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)
    own = FlashModel.__init__
    monkeypatch.setattr(
        FlashModel, "__init__", lambda self, config: (seen.append(os.environ.get(name)), own(self, config))[1]
    )
    FlashModel(tiny_config()).save_pretrained(tmp_path / "model")
    AutoModel.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModel.from_pretrained(tmp_path / "model")
    assert seen == [before, "1"] and os.environ.get(name) == before


def test_generation_code_of_a_checkpoint_does_not_run(tmp_path):
    FlashForCausalLM(tiny_config()).save_pretrained(tmp_path)
    (tmp_path / "custom_generate").mkdir()
    mark = tmp_path / "mark"
    (tmp_path / "custom_generate" / "generate.py").write_text(
        f"open({str(mark)!r}, 'w').close()\ndef generate(*args, **kwargs): pass\n", encoding="utf-8"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        model.generate(torch.tensor([[1, 2]]), custom_generate=str(tmp_path), trust_remote_code=False)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_file_does_not_choose_kernels(key, tmp_path):
    """transformers would fetch the kernel from the Hub, and a kernel is code."""
    FlashModel(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps({**config, key: "kernels-community/flash-attn2"}), encoding="utf-8"
    )
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="sdpa|scaled_dot_product"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")


def test_a_token_does_not_get_into_the_pickled_arguments(tmp_path):
    with pytest.raises(ValueError, match="`hub_token` must be left out.*training_args.bin.*HF_TOKEN"):
        FlashTrainingArguments(output_dir=tmp_path, hub_token="hf_secret")


HUGE = 10**9
SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "expansion_factor", "query_key_dim", "chunk_size"]
SIZES += ["max_position_embeddings", "t5_num_buckets", "num_labels"]
REALS = ["expansion_factor", "attention_divisor", "norm_eps", "hidden_dropout", "attention_dropout"]
REALS += ["initializer_range"]
NAMES = [
    "attention_type", "attention_activation", "relative_bias", "norm_type", "global_normalization", "global_form",
    "hidden_act",
]  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
REFUSED = [
    *({name: HUGE} for name in SIZES),
    *({name: 10**400} for name in [*SIZES, "attention_divisor", "t5_max_distance"]),
    *({name: value} for name in REALS for value in (float("nan"), float("inf"), float("-inf"))),
    *({name: "../../../etc/passwd"} for name in NAMES),
    *({name: value} for name in SIZES[:-1] for value in ("8", [8], {"8": 8}, None, True)),
    *({name: value} for name in NAMES for value in (8, ["relu2"], {})),
    *({"rope_parameters": {**ROPE, "rope_theta": value}} for value in (float("nan"), float("inf"), "1", 0, [1])),
    # query_key_dim times a string would be a string of that length.
    {"query_key_dim": 2**16, "rope_parameters": {**ROPE, "partial_rotary_factor": "1" * 100_000}},
    {"rope_parameters": {**ROPE, "partial_rotary_factor": float("inf")}},
    {"rope_parameters": {**ROPE, "rope_type": "../../../etc/passwd"}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}},
    {"rope_parameters": "../../../etc/passwd"},
    # In order one by one, but not together: 2e13 parameters.
    {"hidden_size": 2**16, "num_hidden_layers": 2**10},
    {"model_type": "../../../etc/passwd"},
    {"dtype": "../../../etc/passwd"},
    {"transformers_weights": "../../../etc/passwd"},
    {"transformers_weights": "/etc/passwd.safetensors"},
    {"quantization_config": "../../../etc/passwd"},
]

# Sizes that remain possible.
ACCEPTED = [
    {"vocab_size": 1_000_000},
    {"chunk_size": 2**20},
    {"max_position_embeddings": 100_000_000},
    {"num_hidden_layers": 2000},
    {"num_labels": 10_000},
    {"hidden_size": 12288, "query_key_dim": 512, "num_hidden_layers": 300, "vocab_size": 256_000},
]

# The limit on the address space is what is left of a small machine; without it a failure would take this one down.
CHILD = """
import json, resource, sys, time
from pathlib import Path
import transformers
import flash_hf

folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
config = json.loads((folder / "config.json").read_text())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
results = []
for auto_class, case in cases:
    (folder / "config.json").write_text(json.dumps({**config, **case}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        getattr(transformers, auto_class).from_pretrained(folder)
        error = None
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    results.append([error, time.perf_counter() - start, kilobytes / 1024])
    Path(sys.argv[2]).write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, list]:
    """For each Auto class, a list with `[case, error, seconds, megabytes]` for each change of config.json."""
    folder = tmp_path_factory.mktemp("configs")
    FlashModel(tiny_config()).save_pretrained(folder)
    cases = [("AutoModel", case) for case in REFUSED] + [("AutoConfig", case) for case in ACCEPTED]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(folder / "cases.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    outcomes = [[case, *result] for (_, case), result in zip(cases, results, strict=True)]
    return {"AutoModel": outcomes[: len(REFUSED)], "AutoConfig": outcomes[len(REFUSED) :]}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_malicious_config_is_refused_before_it_takes_memory(outcomes):
    for case, error, seconds, megabytes in outcomes["AutoModel"]:
        shown = str(case)[:100]
        assert error is not None, f"{shown} was accepted"
        assert "MemoryError" not in error and "alloc" not in error, (shown, error)
        assert len(error) < 3000, shown
        assert seconds < 2 and megabytes < 64, (shown, seconds, megabytes)
        if set(case) <= {*SIZES, *REALS, *NAMES}:
            assert any(name in error for name in case), (shown, error)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_sizes_that_make_sense_are_accepted(outcomes):
    for case, error, *_ in outcomes["AutoConfig"]:
        assert error is None, (case, error)
