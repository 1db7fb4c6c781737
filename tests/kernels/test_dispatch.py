# SPDX-License-Identifier: Apache-2.0
"""Launches without triton's dispatch. The launches themselves are stubs."""

from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("triton")
from flash_hf.kernels import dispatch  # noqa: E402


DEVICE = -1  # as CPU tensors say


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
            global_scratch_size=scratch, profile_scratch_size=0,
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
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(dispatch, "overlaps", lambda device: False)
    monkeypatch.setattr(dispatch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
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

    def straight(stub, *arguments, calls=4):
        kernel = dispatch.Kernel(stub)
        for _ in range(calls):
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
    monkeypatch.setattr(dispatch, "triton_version", lambda: (3, 7))
    assert straight(Stub(), x, y) == 0


def test_tensor_maps_are_made_once_per_address(maps, monkeypatch):
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [16, 16], "fp4_padded": False}
    stub = Stub(metas=[meta])
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
