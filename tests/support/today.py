# SPDX-License-Identifier: Apache-2.0
"""Run tests with the newest transformers that setup.cfg allows, if it is newer than the installed one: `make test`.

    .venv/bin/python tests/support/today.py tests/model/test_generation.py ...

Users get the newest release, not the pinned one, so a rename there has to be seen within a day. The newest is laid
over this environment: .venv-today holds only what has to be newer. Exits with pytest's status; with 0 where the
installed one is the newest, which takes seconds, and where PyPI cannot be reached, which it says.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


FOLDER = Path(__file__).parents[2] / ".venv-today"
PIP = (sys.executable, "-m", "pip")


def requirement() -> str:
    """`transformers>=...` of setup.cfg, as it was installed."""
    return next(line for line in importlib.metadata.requires("flash-hf") if line.startswith("transformers"))


def newest(wanted: str) -> str | None:
    """The version that pip would install for a new user; None where it cannot tell."""
    # pip would accept the installed version without looking at the network.
    options = ("--dry-run", "--ignore-installed", "--no-deps", "--report", "-", "--retries", "1", "--timeout", "15")
    done = subprocess.run([*PIP, "install", "--quiet", *options, wanted], capture_output=True, encoding="utf-8")
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
        return None
    return json.loads(done.stdout)["install"][0]["metadata"]["version"]


def lay_over(version: str) -> Path:
    """An environment with this transformers and what it needs in newer versions; all else is this environment's."""
    venv.create(FOLDER, clear=True, with_pip=False)
    python = FOLDER / ("Scripts" if os.name == "nt" else "bin") / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout.strip()
    below = sysconfig.get_path("purelib")
    Path(site, "below.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    words = [*PIP, "--python", python, "install", "--quiet", "--no-compile", f"transformers=={version}"]
    subprocess.run(words, check=True)
    return python


def main(tests: list[str]) -> int:
    installed, version = importlib.metadata.version("transformers"), newest(requirement())
    if version is None:
        print(f"PyPI was not reached: whether there is a newer transformers than {installed} is not known.")
        return 0
    if version == installed:
        print(f"transformers {installed} is the newest.")
        return 0
    print(f"transformers {version} is newer than {installed}, which constraints.txt pins: testing it.", flush=True)
    return subprocess.run([lay_over(version), "-m", "pytest", "-n", "2", "--dist", "worksteal", *tests]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
