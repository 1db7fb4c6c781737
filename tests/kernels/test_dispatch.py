# SPDX-License-Identifier: Apache-2.0
"""Launches without triton's dispatch, and what a layer's step consists of. The launches themselves are stubs."""

import collections
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flash_hf import FlashConfig, FlashModel


pytest.importorskip("triton")
from flash_hf.kernels import choice, dispatch, launches  # noqa: E402
from test_kernels import DEVICE  # noqa: E402


HERE = -1  # the device that CPU tensors say
META = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [16, 16], "fp4_padded": False}


class Stub:
    """A jitted function, and its only compiled kernel, which records its launches: by triton's way, or straight by the
    function in C."""

    arg_names, function, packed_metadata = ("x", "y", "size", "BLOCK"), "function", "metadata"

    def __init__(self, metas=(), scratch=0):
        self.by_triton, self.straight, self.compilations = [], [], 0

        def launcher(*arguments):
            self.straight.append(arguments)

        def describing(*arguments):
            launcher(*arguments)

        self.metadata = SimpleNamespace(tensordesc_meta=list(metas))
        self.run = SimpleNamespace(
            launch=describing if metas else launcher, launch_cooperative_grid=False, launch_pdl=True,
            global_scratch_size=scratch, profile_scratch_size=0, arg_annotations="annotations",
            kernel_signature="signature",
        )  # fmt: skip

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            if not constants:
                self.by_triton.append((grid, arguments))
                return None
            self.compilations += 1
            return self

        return launch


@pytest.fixture
def maps(monkeypatch):
    """The addresses that tensor maps were made for."""
    made = []

    def fill(address, *rest):
        made.append(address)
        return "map", address

    active = SimpleNamespace(
        get_current_stream=lambda device: "stream", utils=SimpleNamespace(fill_tma_descriptor=fill)
    )
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    monkeypatch.setattr(dispatch, "tried_triton", lambda: True)
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(dispatch, "overlaps", lambda device: False)
    monkeypatch.setattr(dispatch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: HERE)
    return made


def test_later_launches_get_addresses(maps):
    stub = Stub()
    kernel = dispatch.Kernel(stub)
    x, y = torch.zeros(32), torch.zeros(32)
    for _ in range(4):
        kernel((3,), x, y, 32, BLOCK=16, num_warps=4)
    assert stub.compilations == 1 and len(stub.by_triton) == 1
    assert stub.by_triton == [((3, 1, 1), (x, y, 32, 16))]
    head = "function", False, True, None, None, "metadata", None, None, None
    assert stub.straight == 2 * [(3, 1, 1, "stream", *head, x.data_ptr(), y.data_ptr(), 32, 16)]


def test_what_a_kernel_is_specialised_for_makes_another_launch(maps):
    stub = Stub()
    kernel = dispatch.Kernel(stub)
    x, y = torch.zeros(32), torch.zeros(32)

    def launch(x=x, y=y, size=32, block=16, warps=4):
        before = len(stub.straight)
        kernel((3,), x, y, size, BLOCK=block, num_warps=warps)
        return len(stub.straight) > before

    for _ in range(2):
        launch()
    assert launch() and launch(y=torch.zeros(8))
    for number, changes in enumerate(
        ({"x": x[1:]}, {"y": y.half()}, {"size": 31}, {"size": 1}, {"block": 32}, {"warps": 8}), start=2
    ):
        assert [launch(**changes) for _ in range(3)] == [False, False, True], changes
        assert stub.compilations == number
    assert [launch(size=64) for _ in range(2)] == [False, True]  # compiled before, as another multiple of 16
    assert launch() and stub.compilations == 7


def test_what_triton_has_to_see_goes_through_triton(maps, monkeypatch):
    x, y = torch.zeros(32), torch.zeros(32)

    def straight(stub, *arguments):
        kernel = dispatch.Kernel(stub)
        for _ in range(4):
            kernel((3,), *arguments, 32, BLOCK=16, num_warps=4)
        return len(stub.straight)

    assert straight(Stub(), x, y) == 2
    assert straight(Stub(scratch=64), x, y) == 0
    assert straight(Stub(), x, torch.zeros(32, device="meta")) == 2  # also says -1
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)  # where these tensors are not
        assert straight(Stub(), x, y) == 0
    with monkeypatch.context() as patch:
        patch.setattr(dispatch.knobs.runtime, "launch_enter_hook", SimpleNamespace(calls=[print]))
        assert straight(Stub(), x, y) == 0
    monkeypatch.setattr(dispatch, "tried_triton", lambda: False)
    assert straight(Stub(), x, y) == 0


@pytest.mark.parametrize("described", [False, True])
def test_from_triton_3_7_on_one_function_launches_all_kernels(described, maps, monkeypatch):
    """It gets the types of a kernel's arguments, and these as one."""
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 7))
    utils = dispatch.driver.active.utils
    utils.fill_tma_descriptor_tiled = utils.fill_tma_descriptor
    del utils.fill_tma_descriptor
    stub = Stub(metas=[META] if described else ())
    kernel, x, y = dispatch.Kernel(stub), torch.zeros(2, 16, 32), torch.zeros(32)
    form = dispatch.Form.matrix(SimpleNamespace, (2, 16, 32), (512, 32, 1), (16, 16))
    for _ in range(4):
        kernel((3,), dispatch.Described(x, form) if described else x, y, 32, BLOCK=16, num_warps=4)
    address = x.data_ptr()
    passed = (("map", address), 32, 32, 32, 1) if described else (address,)
    head = "function", False, True, "metadata", None, None, None, None, None, "annotations", "signature"
    assert stub.straight == 2 * [(3, 1, 1, "stream", *head, (*passed, y.data_ptr(), 32, 16))]


def test_tensor_maps_are_made_once_per_address(maps, monkeypatch):
    stub = Stub(metas=[META])
    kernel = dispatch.Kernel(stub)
    form = dispatch.Form.matrix(SimpleNamespace, (2, 16, 32), (512, 32, 1), (16, 16))
    tensors = [torch.zeros(2, 16, 32) for _ in range(3)]
    for x in tensors * 3:
        kernel((1,), dispatch.Described(x, form), tensors[0], 32, BLOCK=16, num_warps=4)
    assert maps == [x.data_ptr() for x in (tensors[2], *tensors[:2])]
    first = tensors[2].data_ptr()
    assert stub.straight[0][13:] == (("map", first), 32, 32, 32, 1, tensors[0].data_ptr(), 32, 16)
    monkeypatch.setattr(dispatch.Launch, "MOST_MAPS", 2)
    for x in tensors * 3:
        kernel((1,), dispatch.Described(x, form), tensors[0], 32, BLOCK=16, num_warps=4)
    assert all(len(made) <= 3 for launch in kernel.launches.values() for made, _ in launch.maps)
    assert all(values[13][1] in {x.data_ptr() for x in tensors} for values in stub.straight)


def test_only_some_launches_are_kept(maps, monkeypatch):
    monkeypatch.setattr(dispatch.Kernel, "MOST", 3)
    stub = Stub()
    kernel = dispatch.Kernel(stub)
    x = torch.zeros(32)
    for size in range(32, 320, 16):
        kernel((1,), x, x, size, BLOCK=16, num_warps=4)
        assert len(kernel.launches) <= 3


# ------------------------------------------------------------------------------------------------------------------
# A layer's step
# ------------------------------------------------------------------------------------------------------------------
def counts(layers: int) -> tuple[collections.Counter, int]:
    """The torch operations of one forward and backward, and the number of launches."""
    torch.manual_seed(0)
    config = FlashConfig(
        vocab_size=16, hidden_size=64, num_hidden_layers=layers, query_key_dim=128, chunk_size=256, is_decoder=True,
        backend="triton",
    )  # fmt: skip
    model = FlashModel(config).to(torch.bfloat16)
    x = torch.zeros(1, 512, 64, dtype=torch.bfloat16, requires_grad=True)
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.Kernel, "__call__", lambda self, *arguments, **constants: launched.append(self))
        for _ in range(2):
            launched.clear()
            model.zero_grad()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(torch.zeros_like(x))
    return collections.Counter({event.key: event.count for event in profiler.key_averages()}), len(launched)


def test_a_layers_output_may_be_changed_in_place():
    """It is no view of what only the operation knows."""
    config = FlashConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, query_key_dim=16, chunk_size=16, is_decoder=True,
        backend="triton",
    )  # fmt: skip
    model = FlashModel(config).to(DEVICE)
    model.layers[0].register_forward_hook(lambda module, inputs, output: output.mul_(2.0))
    x = torch.randn(1, 20, 16, device=DEVICE, requires_grad=True)
    model(inputs_embeds=x).last_hidden_state.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.skipif(choice.scan is None or not dispatch.INTERPRET, reason="counts what surrounds the Hopper kernels")
def test_a_layers_step_has_few_operations(monkeypatch):
    """Each takes Python and torch as long as some kernels of a narrow model run."""
    monkeypatch.setattr(choice, "scan_for", lambda device: True)
    monkeypatch.setattr(choice, "FEW_SCANS", 0)
    monkeypatch.setattr(launches, "multiprocessors", lambda device: 1)
    (one, launched), (three, launched_by_three) = counts(1), counts(3)
    per_layer = {name: (count - one[name]) / 2 for name, count in three.items()}
    assert launched_by_three - launched == 2 * 14
    assert per_layer["aten::mm"] == 4 and not per_layer.get("aten::cat")
    # 20, and the joined weights, which `torch.cat` would allocate uncounted.
    assert per_layer["aten::empty"] + per_layer["aten::empty_strided"] <= 21
    assert per_layer["aten::as_strided"] <= 43  # views
    nodes = {name: count for name, count in per_layer.items() if name.startswith("autograd::") and count}
    # One node for the layer, and one for each of its parameters.
    assert sorted(nodes.values()) == [1, 12]
