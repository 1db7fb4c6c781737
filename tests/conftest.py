# SPDX-License-Identifier: Apache-2.0
"""Seeds, threads, and memory that shows when it is read before it is written."""

import gc
import os

import pytest
import torch


try:
    import fcntl
except ImportError:  # not on Windows, where timings then share the machine
    fcntl = None


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a GPU, kernels run in Triton's interpreter, which must be selected before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The suite runs one process per core; the scripts and notebooks that a test starts share its core.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too: sums depend on the number
# Under this mode torch.empty returns NaN, so that a result with an unwritten element cannot pass.
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def frozen():
    """Keep the garbage collector off what is alive before a test: modules, collected tests, what earlier ones left.
    Trainer calls it at each start and would wait a second or two while it goes through these millions of objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def lane(request, tmp_path_factory):
    """Tests marked `alone` measure time: while one runs, the other processes of pytest-xdist wait."""
    if fcntl is None:
        yield
        return
    with open(tmp_path_factory.getbasetemp().parent / "lane.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH)
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Keep `datasets` from answering with the results of an earlier test or run, here and in new processes."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def exact_float32():
    """float32 products in full precision, whatever an earlier test has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def pytest_configure(config):
    # This process and xdist's workers have read it. Scripts started by tests would print such warnings of other
    # packages to the stderr that the tests check.
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        os.environ.pop("PYTHONWARNDEFAULTENCODING", None)


def pytest_collection_modifyitems(items):
    # Tests marked `alone` come first: later, one would wait for a long test, and all others for both.
    items.sort(key=lambda item: item.get_closest_marker("alone") is None)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
