# SPDX-License-Identifier: Apache-2.0
"""Recorded launches get the arguments, and return the tensors, that the operation itself would have. On the CPU the
launches are stubs."""

import collections
import ctypes
import inspect
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from flash_hf import FlashConfig, FlashModel


pytest.importorskip("triton")
from flash_hf.kernels import choice, dispatch, launches, ops, replay, tiles  # noqa: E402
from flash_hf.kernels.dispatch import Described, Launch  # noqa: E402
from test_kernels import DEVICE  # noqa: E402


HERE = -1  # the device that CPU tensors say


class StubLaunch(Launch):
    """A launch by a function in Python, which gets what the one in C would get."""

    def __init__(self, function, described: int, constants: list):
        self.function, self.head, self.constants = function, ("head",), constants
        self.maps = [({}, ()) for _ in range(described)]


@pytest.fixture
def launched(monkeypatch):
    """The launches, as their kernel and what the function in C gets."""
    made, kernels = [], []

    def by_triton(self, key, device, grid, arguments, constants, num_warps, maxnreg):
        kernels.append(self)
        described = sum(type(x) is Described for x in arguments)
        function = self.function if inspect.isfunction(self.function) else lambda *passed: made.append((self, *passed))
        self.launches[key] = StubLaunch(function, described, list(constants.values()))

    active = SimpleNamespace(
        get_current_stream=lambda device: "stream",
        utils=SimpleNamespace(fill_tma_descriptor=lambda address, *rest: SimpleNamespace(address=address)),
    )
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    monkeypatch.setattr(replay, "INTERPRET", False)
    monkeypatch.setattr(dispatch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(dispatch.Kernel, "launch_by_triton", by_triton)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: HERE)
    tiles.shape_of.cache_clear()
    yield made
    for kernel in kernels:
        kernel.launches.clear()


# ------------------------------------------------------------------------------------------------------------------
# A layer
# ------------------------------------------------------------------------------------------------------------------
class Allocated(TorchDispatchMode):
    """Numbers all memory in the order in which it is allocated, and keeps it."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, torch.Tensor) and x.numel() and self.where(x.data_ptr()) == x.data_ptr():
                self.tensors.append(x)
        return result

    def where(self, address: int):
        """The number of the memory that an address is in, and where; otherwise the address."""
        for number, x in enumerate(self.tensors):
            offset = address - x.data_ptr()
            if 0 <= offset < x.numel() * x.element_size():
                return number, offset
        return address


def model_of(**changes) -> FlashModel:
    torch.manual_seed(0)
    config = {
        "vocab_size": 16, "hidden_size": 64, "num_hidden_layers": 2, "query_key_dim": 128, "chunk_size": 256,
        "is_decoder": True, "backend": "triton",
    }  # fmt: skip
    return FlashModel(FlashConfig(**config | changes)).to(torch.bfloat16)


def on_hopper(monkeypatch):
    monkeypatch.setattr(choice, "scan_for", lambda device: True)
    monkeypatch.setattr(launches, "multiprocessors", lambda device: 4)


stubs_for_hopper = pytest.mark.skipif(
    choice.scan is None or not dispatch.INTERPRET, reason="launches stubs of the kernels for Hopper"
)
FORMS = {
    "causal": ({}, 512),
    "general": ({"chunk_size": 64, "query_key_dim": 64}, 300),
    "plus": ({"chunk_shift": 128, "global_form": "previous_token", "local_key_shift": True}, 640),
    "delta": ({"global_state": "delta"}, 512),
    "bidirectional": ({"is_decoder": False}, 512),
    "long": ({"is_decoder": False}, 1100),
    "quadratic": ({"attention_type": "quadratic", "max_position_embeddings": 512}, 512),
    "padded": ({}, 300),
    "filled": ({}, 512),
    "unaligned": ({"attention_type": "quadratic", "max_position_embeddings": 512}, 500),  # its bias is a view
}


@stubs_for_hopper
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_replayed_launches_get_the_same_arguments(form, hooked, launched, monkeypatch):
    """Of a step, and of what surrounds it: every address is at the same place of the same allocation, and so is every
    gradient."""
    changes, N = FORMS[form]
    on_hopper(monkeypatch)
    monkeypatch.setattr(ops, "is_watched", lambda tensors: False)
    model = model_of(**changes)
    if hooked:
        # Between two operations, of projections of any kind.
        model.layers[0].gau.z_proj.register_forward_hook(lambda module, inputs, output: None)
    x = torch.randn(2, N, 64, dtype=torch.bfloat16, requires_grad=True)
    call, filled = {"inputs_embeds": x, "use_cache": False}, form == "filled"
    if form == "padded":
        call["attention_mask"] = torch.ones(2, N).tril(N - 20)
    if filled:
        call |= {"use_cache": True, "inputs_embeds": x.detach()}
        model.eval()
    replays = []
    play = replay.Tape.replay
    monkeypatch.setattr(replay.Tape, "replay", lambda *a: replays.append(a[0]) or play(*a))

    def step(replayed: bool) -> list:
        launched.clear()
        model.zero_grad()
        x.grad = None
        with Allocated() as allocated, pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(not filled):
            if not replayed:
                patch.setattr(ops, "replayed", lambda operation, run, *rest: run())
            y = model(**call).last_hidden_state
            if not filled:
                y.backward(torch.zeros_like(y))

        def place(value):
            address = getattr(value, "address", value)
            return allocated.where(address) if type(address) is int and address > 2**20 else address

        found = [place(y.data_ptr()), *(tuple(map(place, launch)) for launch in launched)]
        if filled:
            return found
        found += [(name, place(p.grad.data_ptr()), p.grad.stride()) for name, p in model.layers.named_parameters()]
        return [*found, place(x.grad.data_ptr())]

    for _ in range(4):
        step(True)
    replays.clear()
    expected = step(False)
    assert not replays
    assert step(True) == expected
    assert len(replays) == (2 if filled else 4)


@stubs_for_hopper
def test_a_replayed_layers_step_has_few_operations(launched, monkeypatch):
    """Those of torch, each of which takes about as long as a launch: buffers, products, and views of the gradients
    alone."""
    on_hopper(monkeypatch)
    monkeypatch.setattr(choice, "FEW_SCANS", 0)
    monkeypatch.setattr(launches, "multiprocessors", lambda device: 1)

    def counts(layers: int) -> collections.Counter:
        model = model_of(num_hidden_layers=layers)
        x = torch.zeros(1, 512, 64, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(5):
            model.zero_grad()
            launched.clear()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(torch.zeros_like(x))
        events = {event.key: event.count for event in profiler.key_averages()}
        return collections.Counter(launches=len(launched), **events)

    one, three = counts(1), counts(3)
    per_layer = {name: (count - one[name]) / 2 for name, count in three.items()}
    assert per_layer["launches"] == 14 and per_layer["aten::mm"] == 4
    assert not any(per_layer.get(f"aten::{name}") for name in ("cat", "to", "reshape", "copy_"))
    assert per_layer.get("aten::empty", 0) + per_layer["aten::empty_strided"] <= 21
    assert per_layer["aten::as_strided"] + per_layer["aten::view"] <= 25  # views


@stubs_for_hopper
def test_layers_are_run_without_torchs_getattr(launched, monkeypatch):
    """It is written in Python, and a layer would ask it for ten modules and parameters."""
    on_hopper(monkeypatch)
    model, asked, own = model_of(), [], torch.nn.Module.__getattr__
    x = torch.zeros(1, 512, 64, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setattr(torch.nn.Module, "__getattr__", lambda *a: asked.append(a) or own(*a))
    for _ in range(5):
        asked.clear()
        model(inputs_embeds=x, use_cache=False)
    inside = {id(module) for module in model.layers.modules()}
    assert asked and not [name for module, name in asked if id(module) in inside]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="runs the kernels")
@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("padded", "filled")])
def test_replayed_steps_are_bit_equal(form):
    changes, N = FORMS[form]
    model = model_of(hidden_size=512, **changes).to(DEVICE)
    x = torch.randn(2, N, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    own = dict(model.layers.named_parameters())
    tiles.shape_of.cache_clear()

    def step():
        for p in (x, *own.values()):
            p.grad = None
        y = model(inputs_embeds=x, use_cache=False).last_hidden_state
        y.backward(torch.ones_like(y))
        return [y.detach(), *(p.grad for p in (x, *own.values()))]

    def same(found, expected):
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "replayed", lambda operation, run, *rest: run())
        expected = step()
    replays, play = [], replay.Tape.replay
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.Tape, "replay", lambda *a: replays.append(a[0]) or play(*a))
        assert all(same(step(), expected) for _ in range(6)) and len(replays) >= 8
        for p in own.values():
            p.data = p.data.clone()  # elsewhere
        assert same(step(), expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert same(step(), expected)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for x_ in captured:
            x_.zero_()
        graph.replay()
        assert same(captured, expected)


# ------------------------------------------------------------------------------------------------------------------
# An operation
# ------------------------------------------------------------------------------------------------------------------
SHAPE = tiles.Shape(
    B=1, N=1, G=1, C=16, shift=0, D=0, E=16, S=16, H=2, causal=True, quad=True, lin=False, previous=False,
    local_shift=False, delta=False, silu=True, interleaved=False, rotary_dim=0, scale=1.0, dtype=torch.float32,
)  # fmt: skip


def numbers(address: int, count: int):
    return (ctypes.c_float * count).from_address(address)


def twice(gx, gy, gz, stream, head, x, y, count):
    """y = 2 x, of floats at addresses."""
    numbers(y, count)[:] = [2 * value for value in numbers(x, count)]


class Toy:
    """An operation on x and y, `[8]`, and a matrix w, `[4, 8]`; in `watched` is what a launch finds of earlier
    buffers."""

    def __init__(self):
        self.double, self.look = dispatch.Kernel(twice), dispatch.Kernel(lambda *passed: self.watch())
        self.watch, self.runs = (lambda: None), 0

    def launch(self, x, y):
        self.double((1,), x, y, 8, num_warps=4)

    def run(self, x, y, w):
        self.runs += 1
        pair = x.new_empty(16)
        self.launch(x, pair[8:])
        pair.view(2, 8)[0].copy_(y)  # through a view
        product = torch.mm(pair.view(2, 8), w.t())
        between, four = torch.empty_like(x), x.new_empty(8)
        self.launch(y, between)
        self.launch(between, four)
        self.look((1,), four, 8, num_warps=4)
        four += 1
        return [product, *pair.split(8), four, None, tiles.absent(x.device, x.dtype)]

    def __call__(self, x, y, w, *more, run=None, shape=SHAPE):
        return replay.replayed(Toy, run or (lambda: self.run(x, y, w)), shape, [x, None, y, w], INDEX, *more)


INDEX = tiles.ChunkIndex(*(torch.zeros(4) for _ in tiles.ChunkIndex._fields))


def drawn():
    return torch.randn(8), torch.randn(8), torch.randn(4, 8)


@pytest.fixture
def toy(launched):
    SHAPE.tapes.clear()
    yield Toy()
    SHAPE.tapes.clear()


def check(toy, x, y, w):
    product, first, second, four, nothing, absent = toy(x, y, w)
    assert torch.equal(first, y) and torch.equal(second, 2 * x) and torch.equal(four, 4 * y + 1)
    assert torch.equal(product, torch.stack([y, 2 * x]) @ w.t())
    assert nothing is None and absent.numel() == 0


def ready(toy):
    """By now it is replayed; its buffers are not filled before that, since the launches are not by triton here."""
    for _ in range(replay.EARLIER + 1):
        toy(*drawn())
    assert toy.runs == replay.EARLIER + 1


def test_an_operation_is_replayed_on_other_tensors(toy):
    ready(toy)
    for _ in range(3):
        check(toy, *drawn())
    both, w = torch.randn(16), torch.randn(4, 8)
    check(toy, both[:8], both[8:], w)  # in the same memory
    x, y, w = drawn()
    check(toy, x, y, torch.nn.Parameter(w).detach())
    assert toy.runs == replay.EARLIER + 1
    for _ in range(replay.EARLIER + 1):
        toy(torch.randn(12)[1:9], y, w)
    check(toy, torch.randn(12)[1:9], y, w)  # a view
    assert toy.runs == 2 * (replay.EARLIER + 1)


def test_tensors_are_dropped_behind_their_last_use(toy, monkeypatch):
    made, empty = [], torch.empty_strided

    def spied(*size, **options):
        x = empty(*size, **options)
        made.append(weakref.ref(x))
        return x

    monkeypatch.setattr(torch, "empty_strided", spied)
    ready(toy)
    made.clear()
    found = []
    toy.watch = lambda: found.append([x() is not None for x in made])
    toy(*drawn())
    assert found == [[True, False, True]]  # the pair, what was between, four


def test_other_kinds_of_tensors_are_recorded_anew(toy, monkeypatch):
    ready(toy)
    x, y, w = drawn()
    runs = toy.runs
    toy(x, y, w, "more")
    toy(x, y, torch.randn(5, 8))
    toy(torch.randn(12)[1:9], y, w)
    toy(x, torch.randn(12)[1:9], w)
    toy(x, y, w.double(), run=lambda: [x])
    assert toy.runs == runs + 4
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    toy(x, y, w)
    assert toy.runs == runs + 5


def test_few_kinds_are_kept(toy):
    for number in range(5 * replay.MOST_KINDS):
        toy(*drawn(), number)
        assert 0 < len(SHAPE.tapes) <= replay.MOST_KINDS
    toy.runs = 0
    ready(toy)
    check(toy, *drawn())
    assert toy.runs == replay.EARLIER + 1


def test_what_launches_themselves_have_to_see_is_not_replayed(toy, monkeypatch):
    ready(toy)
    x, y, w = drawn()

    def runs(*tensors) -> int:
        before = toy.runs
        toy(*tensors)
        return toy.runs - before

    assert runs(x, y, w) == 0
    assert runs(x, y, torch.randn(8, 4).t()) == 1
    assert runs(torch.randn(16)[::2], y, w) == 1
    with monkeypatch.context() as patch:
        patch.setattr(dispatch.knobs.runtime, "launch_enter_hook", SimpleNamespace(calls=[print]))
        patch.setattr(Toy, "launch", lambda *a: None)
        patch.setattr(toy, "look", lambda *a, **options: None)
        assert runs(x, y, w) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)  # where these tensors are not
        patch.setattr(Toy, "run", lambda self, *a: setattr(self, "runs", self.runs + 1))
        assert runs(x, y, w) == 1


OUTSIDE = torch.ones(8)


@pytest.mark.parametrize("why", ["by triton", "outside", "number", "twice"])
def test_what_would_not_be_the_same_again_is_not_replayed(toy, monkeypatch, why):
    if why == "by triton":
        monkeypatch.setattr(dispatch.Kernel, "launch_by_triton", lambda *a: None)
    runs = []

    def run(x, y, w):
        runs.append(why)
        if why == "outside":
            return [x + OUTSIDE]
        if why == "number":
            return [x.new_empty(int(w.sum().abs() * 0) + 1)]
        return toy.run(x, y, w)

    for _ in range(8):
        x, y, w = drawn()
        y = x if why == "twice" else y
        toy(x, y, w, run=lambda x=x, y=y, w=w: run(x, y, w))
    assert len(runs) == 8


def test_an_error_while_recording_leaves_nothing_behind(toy):
    def fail():
        raise RuntimeError("once")

    for _ in range(replay.EARLIER):
        toy(*drawn())
    with pytest.raises(RuntimeError, match="once"):
        toy(*drawn(), run=fail)
    assert dispatch.recorder.recording is None
    toy(*drawn())
    check(toy, *drawn())
    assert toy.runs == replay.EARLIER + 1
