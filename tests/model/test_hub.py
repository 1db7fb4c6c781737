# SPDX-License-Identifier: Apache-2.0
"""The scenarios of hub_client.py in both transports, each in a process of its own."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

import warm


SUPPORT = Path(__file__).resolve().parents[1] / "support"
PACKAGE = Path(importlib.util.find_spec("flash_hf").origin).parent


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["lfs", "xet"])
def test_hub(transport, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    environment |= {
        "HUB_TRANSPORT": transport,
        "HUB_ROOT": str(tmp_path / "hub"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if transport == "xet" else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # datasets would count the download elsewhere.
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        # hf_xet tries for five minutes by default.
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
        # Every request is logged, so that a token that gets into a log is seen below.
        "HF_DEBUG": "1",
        "TRANSFORMERS_VERBOSITY": "debug",
        "NO_PROXY": "*",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(SUPPORT)]),
    }
    command = [warm.python(), "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--durations=0", "hub_client.py"]
    done = subprocess.run(command, cwd=SUPPORT, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 14
    log = done.stdout + done.stderr
    assert "authorization" in log.lower(), "the requests were not logged"
    assert "hf_alice" not in log and "hf_bob" not in log
    # Nothing is asked of anybody else, such as the service that converts pickles and gets the token for it.
    asked = set(re.findall(r"Request \S+: [A-Z]+ https?://([^/:\s]+)", log))
    assert asked == {"127.0.0.1", "localhost"}
