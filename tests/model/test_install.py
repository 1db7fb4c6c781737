# SPDX-License-Identifier: Apache-2.0
"""`pip install flash-hf` alone is enough for the model, which imports nothing of the extras. And it is a
library: research code is in scripts/, which imports it and is never imported by it."""

import ast
import graphlib
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from helpers import ROOT


PROGRAM = """
import sys

# As if they were not installed.
for name in {absent!r}:
    sys.modules[name] = None
sys.path.insert(0, {root!r})
import torch
import flash_hf
from transformers import AutoModelForCausalLM

config = flash_hf.FlashConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, query_key_dim=8, chunk_size=8)
model = flash_hf.FlashForCausalLM(config)
ids = torch.randint(1, 50, (2, 21))  # 0 pads
model(ids, labels=ids).loss.backward()
model.save_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0).shape)

import flash_hf.convert
from flash_hf.training import GraphedBackward, training_flops
try:
    from flash_hf.training import load_documents
except ImportError as error:
    print(error)
try:
    from flash_hf.training import no_such_name
except ImportError as error:
    print(error)
"""


def test_the_plain_install_needs_none_of_the_extras(tmp_path):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    needed = setup["options"]["install_requires"]
    absent = ["triton", "einops", "datasets", "evaluate", "matplotlib", "peft", "accelerate", "pandas"]
    assert not any(name in needed for name in absent)
    program = PROGRAM.format(absent=absent, root=str(ROOT), folder=str(tmp_path / "model"))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    shape, extra, unknown = done.stdout.splitlines()[-3:]
    assert shape == "torch.Size([2, 30])"
    assert extra == "flash_hf.training.load_documents needs datasets: pip install 'flash-hf[train]'"
    assert unknown.startswith("cannot import name 'no_such_name' from 'flash_hf.training'")


def imported(path: Path, package: str) -> set[str]:
    """A file's imports, in functions as well, by full names: `a.b` and `a.b.c` for `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names} or {base}
            names.add(base)
    return names


def library_imports(root: Path) -> dict[str, set[str]]:
    """The imports of each module of flash_hf."""
    found = {}
    for path in (root / "flash_hf").rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        package = ".".join(parts[:-1])
        found[package if parts[-1] == "__init__" else ".".join(parts)] = imported(path, package)
    return found


def test_the_library_imports_neither_scripts_nor_tests():
    foreign = {"scripts", "tests", "conftest", "helpers", "hub_server"}
    for module, names in library_imports(ROOT).items():
        assert not {name.partition(".")[0] for name in names} & foreign, module


def circles(imports: dict[str, set[str]]) -> list[str]:
    """A circle of modules that import each other, if there is one."""
    # `from . import x` imports the package only to find its module x.
    graph = {
        module: {name for name in names & imports.keys() - {module}
                 if not any(other.startswith(name + ".") for other in names & imports.keys())}
        for module, names in imports.items()
    }  # fmt: skip
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_modules_of_the_library_import_each_other():
    assert circles(library_imports(ROOT)) == []
    assert set(circles({"a": {"b", "torch"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_imports_of_the_library_point_down():
    """commands import training and convert, and these the model: never the reverse. vLLM alone imports the plugin."""
    upper = {"commands", "convert", "training", "vllm"}
    above = {"flash_hf": upper, "kernels": upper, "vllm": upper - {"vllm"}, "training": upper - {"training"},
             "convert": upper - {"convert"}, "commands": {"vllm"}}  # fmt: skip
    for module, names in library_imports(ROOT).items():
        parts = module.split(".")
        room = parts[1] if len(parts) > 1 and parts[1] in above else "flash_hf"
        for name in names:
            assert not {*name.split(".")[1:2]} & above[room] or not name.startswith("flash_hf."), f"{module}: {name}"


@pytest.mark.slow
def test_what_is_distributed(tmp_path):
    """The sdist holds the package and no tests, and builds the wheel; the wheel holds the package alone."""
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("flash_hf", "scripts", "tests", "model_cards", "notebooks"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results", "*.safetensors")
        )
    build = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])('dist'))"

    def make(kind: str, cwd: Path) -> Path:
        done = subprocess.run([sys.executable, "-c", build, kind], cwd=cwd, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return cwd / "dist" / done.stdout.splitlines()[-1]

    shutil.unpack_archive(make("build_sdist", tmp_path), tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "flash_hf").rglob("*.py")}
    meta = {"PKG-INFO", "LICENSE", "README.md", "pyproject.toml", "setup.cfg"}
    assert {name for name in names if not name.startswith("flash_hf.egg-info/")} == package | meta
    with zipfile.ZipFile(make("build_wheel", source)) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == package
        assert "flash-hf = flash_hf.commands:main" in wheel.read("flash_hf-0.1.0.dist-info/entry_points.txt").decode()


def test_the_library_is_small_at_its_root_and_holds_no_research_code():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["options"]["packages"] == "find:"
    assert setup["options.packages.find"]["include"].split() == ["flash_hf*"]
    packages = {path.parent for path in (ROOT / "flash_hf").rglob("*.py")}
    assert {path.name for path in packages} == {
        "flash_hf",
        "commands",
        "convert",
        "kernels",
        "parallel",
        "training",
        "vllm",
    }
    assert all((path / "__init__.py").is_file() for path in packages)
    assert len([*(ROOT / "flash_hf").glob("*.py")]) <= 13
    research = {"baselines", "benchmark", "cells", "evaluation", "finetuning", "passages", "provenance",
                "recall", "study"}  # fmt: skip
    for path in [path for package in packages for path in package.glob("*.py")]:
        assert not {path.stem, path.stem.partition("_")[0]} & research, path
