# SPDX-License-Identifier: Apache-2.0
"""Seeds, threads, and memory that shows when it is read before it is written."""

import dataclasses
import functools
import os

import pytest
import torch


try:
    import fcntl
except ImportError:  # not on Windows; timings are then as noisy as the machine
    fcntl = None


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Kernels run in triton's interpreter where there is no GPU. It has to be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The suite runs in one process a core, and the scripts and notebooks that it starts have its core.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under this mode torch.empty returns NaN, so that a result with an unwritten element cannot pass.
torch.use_deterministic_algorithms(True, warn_only=True)


def hasten_interpreter():
    """What most of the time of triton's interpreter goes into is needed once, or not at all for sizes as in tests: it
    puts its own functions into triton's language anew for every call of one jitted function by another, checks every
    sum of integers for an overflow, looks for a shape that two equal ones broadcast to, makes a table of types
    whenever it needs one of them, and wraps the shape of every value."""
    try:
        import triton.language as tl
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    call, broadcast = interpreter.InterpretedFunction.__call__, TritonSemantic.broadcast_impl_value
    block_type, tensor = tl.block_type.__init__, tl.tensor.__init__
    numpy_type, types, shapes = functools.cache(interpreter._get_np_dtype), {}, {}

    def call_patched(self, *args, **kwargs):
        names = self.fn.__globals__
        if any(tl.core.is_builtin(language.arange) for language in (names.get("tl"), names.get("core")) if language):
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    def broadcast_patched(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    def numpy_type_patched(dtype):
        dtype = dtype.scalar
        return numpy_type(tl.uint64 if dtype.is_ptr() else dtype)

    def block_type_patched(self, element_ty, shape):
        key = (element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape))
        if key not in types:
            block_type(self, element_ty, shape)
            types[key] = self.shape, self.numel, self.name
        self.element_ty, (self.shape, self.numel, self.name) = element_ty, types[key]

    def tensor_patched(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in shapes:
            tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, shapes[key]

    interpreter.InterpretedFunction.__call__ = call_patched
    interpreter._get_np_dtype = numpy_type_patched
    TritonSemantic.broadcast_impl_value = broadcast_patched
    tl.block_type.__init__ = block_type_patched
    tl.tensor.__init__ = tensor_patched


if os.environ.get("TRITON_INTERPRET") == "1":
    hasten_interpreter()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
    """float32 products in full precision, whatever a test before has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def pytest_configure(config):
    # For this process and the workers of pytest-xdist. Scripts that tests start would print such warnings of other
    # packages, too, among the errors that the tests read.
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        os.environ.pop("PYTHONWARNDEFAULTENCODING", None)


def pytest_collection_modifyitems(items):
    # Who wants to be alone comes first: later it would wait for somebody's long test, and the others for both.
    items.sort(key=lambda item: item.get_closest_marker("alone") is None)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
