# SPDX-License-Identifier: Apache-2.0
"""The scenarios of hub_client.py with both transports, each in a new process."""

import os
import re

import pytest

from helpers import run_python


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["lfs", "xet"])
def test_hub(transport, tmp_path):
    environment = {name: None for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))}
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
        # Log every request, so that a token in a log is found below.
        "HF_DEBUG": "1",
        "TRANSFORMERS_VERBOSITY": "debug",
        "NO_PROXY": "*",
    }
    command = "-m pytest -q -s -p no:cacheprovider --durations=0 tests/support/hub_client.py".split()
    done = run_python(*command, **environment)
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 14
    log = done.stdout + done.stderr
    assert "authorization" in log.lower(), "the requests were not logged"
    assert "hf_alice" not in log and "hf_bob" not in log
    # No request goes elsewhere, such as to the service that converts pickles and is sent the token.
    asked = set(re.findall(r"Request \S+: [A-Z]+ https?://([^/:\s]+)", log))
    assert asked == {"127.0.0.1", "localhost"}
