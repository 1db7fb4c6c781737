# SPDX-License-Identifier: Apache-2.0
"""Text files are UTF-8 whatever the locale: each call that opens one names the encoding."""

import ast
import io
import json
import os
import sys
import warnings

import pytest

from flash_hf.commands.options import run_command
from helpers import ROOT


COMPRESSORS = ("bz2", "gzip", "lzma")


def text_calls(source: str) -> list[int]:
    """Lines that open a file, or start a process, as text in the encoding of the locale."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and is_text(node)]


def is_text(call: ast.Call) -> bool:
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in options or None in options:
        return False

    def mode(place: int) -> str:
        given = options.get("mode", call.args[place] if len(call.args) > place else ast.Constant("r"))
        return given.value if isinstance(given, ast.Constant) else "r"

    function = call.func
    name = getattr(function, "attr", getattr(function, "id", None))
    owner = getattr(getattr(function, "value", None), "id", None)
    if name == "open" and owner in COMPRESSORS:
        return "t" in mode(1)
    if name == "open" and owner not in ("os", "Image", "tarfile"):
        return "b" not in mode(0 if isinstance(function, ast.Attribute) else 1)
    if name == "fdopen":
        return "b" not in mode(1)
    if name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    return any(getattr(options.get(option), "value", False) for option in ("text", "universal_newlines"))


def test_what_counts_as_text():
    text = [
        "open(p)", "open(p, 'w')", "open(p, mode=m)", "p.open()", "p.open('a', newline='')", "gzip.open(p, 'rt')",
        "p.read_text()", "p.read_text(errors='replace')", "p.write_text(x)", "os.fdopen(1, 'w')",
        "subprocess.run(c, text=True)", "Popen(c, universal_newlines=True)",
    ]  # fmt: skip
    other = [
        "open(p, 'rb')", "open(p, encoding='utf-8')", "p.open('wb')", "gzip.open(p)", "p.read_bytes()",
        "p.read_text('utf-8')", "p.write_text(x, 'utf-8')", "os.fdopen(1, 'wb')", "Image.open(p)", "os.open(p, 0)",
        "tarfile.open(p)",
        "subprocess.run(c, text=True, encoding='utf-8')", "subprocess.run(c)", "open(p, **options)",
    ]  # fmt: skip
    assert [call for call in text if not text_calls(call)] == []
    assert [call for call in other if text_calls(call)] == []


def test_every_file_is_opened_as_utf8():
    sources = {
        path: path.read_text(encoding="utf-8")
        for folder in ("flash_hf", "scripts", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "code":
                sources[path / f"cell {number}"] = "".join(cell["source"])
    assert len(sources) > 100
    assert {str(path.relative_to(ROOT)): lines for path, text in sources.items() if (lines := text_calls(text))} == {}


class Out(io.BytesIO):
    terminal = False

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_commands_speak_utf8(terminal, monkeypatch):
    """To pipes; a terminal keeps its own encoding."""
    out = Out()
    out.terminal = terminal
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("日本 é".encode()), encoding="latin-1"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="latin-1"))
    run_command(lambda: print(sys.stdin.read(), end=""))
    assert out.getvalue() == ("?? \xe9".encode("latin-1") if terminal else "日本 é".encode())


def test_a_file_opened_otherwise_is_an_error_in_make_test(request, tmp_path):
    """Python's own warning finds calls that the check above cannot see; setup.cfg makes it an error."""
    assert sys.flags.warn_default_encoding or "MAKELEVEL" not in os.environ
    filters = request.config.getini("filterwarnings")
    assert "ignore::EncodingWarning" in filters  # of other packages
    if not sys.flags.warn_default_encoding:
        pytest.skip("Python warns only under PYTHONWARNDEFAULTENCODING=1, which make sets")
    (tmp_path / "file").write_bytes(b"")
    for module in ("flash_hf", "flash_hf.training.documents", "test_data", "conftest", "helpers"):
        with pytest.raises(EncodingWarning):
            exec("path.read_text()", {"__name__": module, "path": tmp_path / "file"})
    with warnings.catch_warnings(record=True) as caught:
        exec("path.read_text()", {"__name__": "transformers.trainer", "path": tmp_path / "file"})
    assert not caught
