# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, and the committed files show what they showed: text, pictures, no errors."""

import base64
import json
import os
import re
import struct
import sys
from pathlib import Path

import matplotlib.font_manager
import nbformat
import pytest
from nbclient import NotebookClient

from helpers import DATA, ROOT


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Paths of the machine that ran them are private, and differ on each run.
PRIVATE_PATHS = re.compile(r"(?:/tmp|/home|/root|/Users|/var/folders|/work|/private)/|[A-Z]:\\\\|site-packages")
# What the committed outputs took some minutes of training for need not be learnt again to see that the code runs.
SHORTER = {
    "01_quickstart": {"steps=250": "steps=20", "steps=500": "steps=20"},
    "02_mixed_chunk_attention": {"(config), 300, masked": "(config), 20, masked", "(config), 500, ": "(config), 20, "},
    "03_train_a_small_language_model": {"max_steps=400": "max_steps=20"},
    "04_finetune_a_classifier": {
        "STEPS = 200": "STEPS = 20", "epochs=5": "epochs=2", "epochs=12": "epochs=1", "[:400]": "[:160]",
        "chapters[17:]": "chapters[21:]",
    },
    "05_long_context": {"range(7)": "range(2)"},
    "06_embed_and_search": {"len(text) // 2": "len(text) // 24", "512, 1024, 2048, 4096, 8192]": "256, 512]"},
}  # fmt: skip
# 01 teaches calls, the others measure or draw.
PICTURES = {
    "01_quickstart": 0,
    "02_mixed_chunk_attention": 5,
    "03_train_a_small_language_model": 1,
    "04_finetune_a_classifier": 1,
    "05_long_context": 1,
    "06_embed_and_search": 2,
}


def by_name(path: Path) -> str:
    return path.stem


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts_of(output) -> list[str]:
    """What a reader sees of an output, pictures left out."""
    if output.output_type == "stream":
        return [output.text]
    return [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]


def pictures_of(notebook) -> list[bytes]:
    data = [output.get("data", {}).get("image/png") for output in outputs_of(notebook)]
    return [base64.b64decode(png) for png in data if png is not None]


def check_outputs(notebook, name: str) -> None:
    """No error, no warning, no private path, and all pictures."""
    for output in outputs_of(notebook):
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output.text
        for text in texts_of(output):
            assert not PRIVATE_PATHS.search(text), text
    pictures = pictures_of(notebook)
    assert len(pictures) == PICTURES[name]
    for png in pictures:
        assert png.startswith(b"\x89PNG") and min(struct.unpack(">II", png[16:24])) > 200


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == list(PICTURES)
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 2_500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_committed_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Executed once, in order, from a fresh kernel.
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    check_outputs(notebook, path.stem)
    assert any(texts_of(output) for output in outputs_of(notebook))
    assert "FLASH is not FlashAttention" in notebook.cells[0].source or path.stem != "01_quickstart"


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks", DATA], ids=lambda path: path.name)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_find_the_book_from_any_folder(path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    for line in re.findall(r"^ROOT = .*$", code, re.MULTILINE):
        names = {"Path": Path}
        exec(line, names)
        assert names["ROOT"] == ROOT
    assert ("wizard_of_oz.txt" in code) == ("\nROOT = " in code)


# The notebooks need the extra "notebooks" only. torchao is there for other tests, transformers imports it where it is
# found, and without CUDA's libraries it complains to stderr, where the notebooks shall not show anything.
STARTUP = "import sys; sys.modules['torchao'] = None"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_runs(path, monkeypatch, tmp_path):
    if path.stem.startswith("06"):
        pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Ignore the user's IPython profile and any kernel of that name in the home folder.
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text(STARTUP, encoding="utf-8")
    kernel = tmp_path / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}), encoding="utf-8"
    )
    # The first time, matplotlib reports on stderr that it builds a font cache; do that beforehand.
    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
    notebook = nbformat.read(path, as_version=4)
    for long, short in SHORTER[path.stem].items():
        assert any(long in cell.source for cell in notebook.cells), f"{long} is not in the notebook: see SHORTER"
        for cell in notebook.cells:
            cell.source = cell.source.replace(long, short)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    check_outputs(notebook, path.stem)
