# SPDX-License-Identifier: Apache-2.0
"""`pip install flash-hf` alone is enough for the model, which imports nothing of the extras. And it is a
library: research code is in scripts/, which imports it and is never imported by it."""

import ast
import graphlib
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

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
    assert "torch.Size([2, 30])" in done.stdout


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


def test_the_wheel_holds_no_research_code():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["options"]["packages"] == "find:"
    assert setup["options.packages.find"]["include"].split() == ["flash_hf*"]
    packages = [path.parent for path in (ROOT / "flash_hf").rglob("__init__.py")]
    assert {path.name for path in packages} <= {"flash_hf", "commands", "kernels", "training", "convert"}
    research = {"baselines", "benchmark", "cells", "evaluation", "finetuning", "passages", "provenance",
                "recall", "study"}  # fmt: skip
    for path in [path for package in packages for path in package.glob("*.py")]:
        assert not {path.stem, path.stem.partition("_")[0]} & research, path
