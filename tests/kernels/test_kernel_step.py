# SPDX-License-Identifier: Apache-2.0
"""The fused decoding step equals the torch tier: the same functions one by one, over many steps and every border.

Without a CUDA device the kernel runs in triton's interpreter, which has to be asked for before the kernel is imported.
"""

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="the kernels need triton: pip install flash-hf[kernels]")

from flash_hf import kernels  # noqa: E402
from flash_hf.attention_flash import DecodingState, QueryKeys, mixed_chunk_step, offset_scale, shifted_dims, wide  # noqa: E402
from flash_hf.chunking_flash import StepLayout  # noqa: E402
from flash_hf.kernels import step as kernel  # noqa: E402
from flash_hf.kernels import steps  # noqa: E402
from helpers import assert_close, error_ratio  # noqa: E402


COMPILED = any(isinstance(x, triton.JITFunction) for x in (triton.language.sum, kernel._gated_step_kernel.function))
if DEVICE == "cpu" and COMPILED:
    pytest.skip("triton was imported without TRITON_INTERPRET=1, and there is no CUDA device", allow_module_level=True)

BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


def allocated(B, C, E, S, dtype, quad=True, lin=True, previous=False, local=False, fill=float("nan")):
    """A state that has seen nothing, in whose slots earlier chunks left `fill`."""

    def leftover(*shape):
        return torch.full((B, *shape), fill, dtype=dtype, device=DEVICE)

    total = torch.zeros(B, S, E, dtype=wide(dtype), device=DEVICE) if lin else None
    seen = torch.zeros(B, dtype=torch.long, device=DEVICE)
    keys = (leftover(slots, S) if present else None for present, slots in ((quad, C + local), (lin, C + previous)))
    return DecodingState(*keys, leftover(C, E), total, seen)


def copied(state):
    return state.map(torch.clone)


def without_nan(state: DecodingState) -> DecodingState:
    """A copy with 0 instead of what was never written."""
    return state.map(lambda x: x.nan_to_num(0))


def converted(state, dtype):
    return state.map(lambda x: x if x.dtype == torch.long else x.to(wide(dtype) if x is state.total else dtype))


def angles(position_B1, half):
    """cos and sin, `[B, 1, half]`."""
    angle = position_B1[..., None].float() * 10000.0 ** -(torch.arange(half, device=DEVICE) / max(half, 1))
    return angle.cos(), angle.sin()


def torch_step(u, v, z, gamma, beta, rotary, position, valid, state, *, divisor, bias_R, normalization, has_quad=True,
               has_lin=True, interleaved=False, silu=True, shift=0, previous_key=False, local=False):  # fmt: skip
    """What the kernel replaces, in the dtype of its arguments."""
    if silu:
        u, v, z = (torch.nn.functional.silu(x) for x in (u, v, z))
    heads = offset_scale(z, gamma, beta, rotary, interleaved=interleaved).unbind(-2)
    if previous_key:
        heads = (*heads[:-2], *offset_scale(z, gamma[-2:], beta[-2:], None).unbind(-2))
    heads = QueryKeys(*(heads[:2] if has_quad else (None, None)), *(heads[-2:] if has_lin else (None, None)))
    layout = StepLayout(position, valid, shift=shift)
    return u * mixed_chunk_step(
        heads, v, layout, state, divisor=divisor, bias_R=bias_R, normalization=normalization,
        previous_key=previous_key, shifted_S=shifted_dims(z.shape[-1], interleaved, z.device) if local else None,
    )  # fmt: skip


def step(u, v, z, gamma, beta, rotary, position, valid, state, *, divisor, bias_R, normalization, has_quad=True,
         has_lin=True, interleaved=False, silu=True, shift=0, previous_key=False, local=False):  # fmt: skip
    """The same by the kernel, which reads from the state what branches there are."""
    assert (has_quad, has_lin) == (state.quad_k is not None, state.lin_k is not None)
    cos, sin = (None, None) if rotary is None else rotary
    return torch.ops.flash_hf.gated_step.default(
        u=u, v=v, z=z, gamma=gamma, beta=beta, cos=cos, sin=sin, position=position, valid=valid, quad_k=state.quad_k,
        lin_k=state.lin_k, value=state.value, total=state.total, seen=state.seen, bias_R=bias_R, divisor=divisor,
        mean=normalization == "mean", interleaved=interleaved, silu=silu, shift=shift, previous=previous_key,
        local_shift=local,
    )  # fmt: skip


class Case:
    """Weights, and tokens as slices of one buffer of projections, as a fused projection would give them."""

    def __init__(self, dtype=torch.float32, B=3, C=4, E=24, S=8, r=None, quad=True, lin=True, bias=True,
                 normalization="mean", interleaved=False, silu=True, shift=0, previous=False, local=False,
                 seed=0):  # fmt: skip
        self.dtype, self.B, self.C, self.E, self.S, self.r = dtype, B, C, E, S, S if r is None else r
        self.generator = torch.Generator().manual_seed(seed)
        H = 2 * (quad + lin)
        self.gamma, self.beta = self.randn(H, S), self.randn(H, S) * 0.3
        self.settings = {
            "divisor": 2.0, "bias_R": self.randn(2 * C - 1) * 0.5 if bias and quad else None, "has_lin": lin,
            "has_quad": quad, "normalization": normalization, "interleaved": interleaved, "silu": silu, "shift": shift,
            "previous_key": previous, "local": local,
        }  # fmt: skip
        self.state = allocated(B, C, E, S, dtype, quad, lin, previous, local)

    def randn(self, *shape):
        return torch.randn(shape, generator=self.generator).to(DEVICE, self.dtype)

    def token(self):
        return self.randn(self.B, 1, 2 * self.E + self.S).split([self.E, self.E, self.S], -1)

    def arguments(self, state, valid=None, token=None):
        position = state.seen[:, None].clone()
        rotary = angles(position, self.r // 2) if self.r else None
        return (*(token or self.token()), self.gamma, self.beta, rotary, position, valid, state)


def stored(state, shift=0):
    """Everything the state means, named: slots from the phase on, and before the first token, mean nothing, but for
    the newest token's key."""
    C = state.value.shape[1]
    count = torch.where(state.seen > 0, (state.seen - 1 + shift) % C + 1, 0)
    for name, x in vars(state).items():
        if x is not None and name in ("quad_k", "lin_k", "value"):
            slot = torch.arange(x.shape[1], device=DEVICE)
            filled = slot < (count + (x.shape[1] > C) * (state.seen > 0))[:, None]
            x = torch.where((filled & (slot >= (count - state.seen)[:, None]))[..., None], x, 0)
        if x is not None:
            yield name, x


def assert_same(case, steps, ratio=1e-5, valids=None):
    """Kernel and torch tier step by step, from one state each; the torch tier's leftovers must be finite."""
    mine, theirs = case.state, without_nan(case.state)
    for index in range(steps):
        valid = None if valids is None else valids[:, index : index + 1].to(DEVICE)
        token = case.token()
        real = torch.ones(case.B, dtype=torch.bool, device=DEVICE) if valid is None else valid[:, 0]
        before = copied(mine)
        out = step(*case.arguments(mine, valid, token), **case.settings)
        expected = torch_step(*case.arguments(theirs, valid, token), **case.settings)
        assert out.shape == (case.B, 1, case.E) and out.dtype == case.dtype and out.isfinite().all()
        assert_close(out[real], expected[real], ratio, f"output of step {index}")
        shift = case.settings["shift"]
        for (name, x), (_, y) in zip(stored(mine, shift), stored(theirs, shift), strict=True):
            assert x.dtype == y.dtype
            assert_close(x, y, ratio, f"{name} after step {index}")
        assert torch.equal(mine.seen, theirs.seen)
        for old, new in zip(before, mine, strict=True):
            if old is not None:
                assert torch.equal(old[~real].nan_to_num(7), new[~real].nan_to_num(7))


FORMS = {
    "paper": {}, "shifted": {"shift": 3}, "previous": {"previous": True}, "plus": {"shift": 1, "previous": True},
    "local": {"local": True}, "plus, local": {"shift": 1, "previous": True, "local": True},
}  # fmt: skip
forms = pytest.mark.parametrize("form", FORMS)


@forms
def test_steps_across_three_borders(form):
    assert_same(Case(C=4, **FORMS[form]), 13)


@pytest.mark.parametrize("lin", [True, False])
@pytest.mark.parametrize("C, S, r, interleaved", [(2, 12, 8, False), (3, 10, 6, True), (5, 6, 0, False)])
def test_local_keys_of_every_rotation(C, S, r, interleaved, lin):
    assert_same(Case(C=C, S=S, r=r, interleaved=interleaved, lin=lin, local=True), 2 * C + 3)


@pytest.mark.parametrize("quad, lin", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("normalization", ["mean", "chunk"])
@pytest.mark.parametrize("bias", [True, False])
def test_branches_and_scales(quad, lin, normalization, bias):
    assert_same(Case(quad=quad, lin=lin, normalization=normalization, bias=bias, C=3), 8)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("r", [0, 2, 6, 12])
def test_rotary(r, interleaved):
    assert_same(Case(S=12, r=r, interleaved=interleaved), 6)


@pytest.mark.parametrize("C, E, S", [(1, 24, 8), (2, 37, 12), (5, 1, 2), (4, 16, 1), (3, 130, 20)])
def test_sizes_that_no_block_divides(C, E, S):
    assert_same(Case(C=C, E=E, S=S, B=2, r=S // 4 * 2), 2 * C + 2)


@pytest.mark.parametrize("C, phase", [(40, 38), (65, 31), (512, 510)])
def test_chunks_of_several_blocks(C, phase):
    """From a state with closed chunks, over the border of a block and of the chunk."""
    case = Case(C=C, B=1, S=4)
    state = case.state
    for name in ("quad_k", "lin_k", "value"):
        getattr(state, name)[:, :phase] = case.randn(1, phase, getattr(state, name).shape[2]) * 0.3
    state.total.copy_(case.randn(*state.total.shape) * C)
    state.seen.fill_(2 * C + phase)
    assert_same(case, 4)


@pytest.mark.parametrize(
    "batch, width, key_dim, itemsize", [(1, 1536, 128, 2), (8, 1536, 128, 4), (64, 1536, 128, 2), (64, 1000, 256, 4)]
)
def test_launch_shapes(batch, width, key_dim, itemsize, monkeypatch):
    """Every shape of blocks that a launch may choose gives the same numbers; the batch itself is too large here."""
    block_c, block_e, warps = kernel.launch_shape(batch, width, key_dim, itemsize)
    padded = triton.next_power_of_2(key_dim)
    assert block_e * padded <= 16384 and block_c * padded * itemsize <= 8192
    monkeypatch.setattr(kernel, "launch_shape", lambda *sizes: (block_c, block_e, warps))
    assert_same(Case(B=1, C=3, E=150, S=key_dim, r=key_dim // 2), 5)


@pytest.mark.parametrize("silu", [True, False])
def test_before_and_after_the_activation(silu):
    assert_same(Case(silu=silu), 6)


@forms
def test_ragged_rows_and_padding_leave_no_trace(form):
    """Rows at phase 0, mid and last slot of their chunks at once; padding between, before and after real tokens."""
    valids = torch.rand(4, 14, generator=torch.Generator().manual_seed(1)) < 0.6
    valids[0], valids[1, :5] = False, False
    valids[1, 5:] = True
    assert_same(Case(B=4, C=4, **FORMS[form]), 14, valids=valids)


def test_padding_at_a_position_that_is_not_seen():
    """Padding's position is some valid position: not even its phase may be believed."""
    case = Case(B=2, C=4)
    assert_same(case, 5)
    before = copied(case.state)
    u, v, z, gamma, beta, rotary, position, valid, state = case.arguments(case.state)
    valid = torch.zeros(2, 1, dtype=torch.bool, device=DEVICE)
    out = step(u, v, z, gamma, beta, rotary, position + 2, valid, state, **case.settings)
    assert (out == 0).all()
    for old, new in zip(before, case.state, strict=True):
        assert old is None or torch.equal(old.nan_to_num(7), new.nan_to_num(7))


@forms
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_low_precision_error_is_at_most_twice_torchs(dtype, form):
    case = Case(dtype=dtype, B=2, C=8, E=64, S=32, **FORMS[form])
    mine, theirs, exact = case.state, copied(case.state), copied(case.state)
    theirs, exact = map(without_nan, (theirs, exact))
    exact = converted(exact, torch.float64)
    errors = []
    for _ in range(18):
        token = case.token()
        arguments = case.arguments(exact, token=token)
        doubles = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments[:5]]
        settings = {**case.settings, "bias_R": case.settings["bias_R"].double()}
        expected = torch_step(*doubles, *arguments[5:], **settings)
        ours = step(*case.arguments(mine, token=token), **case.settings)
        plain = torch_step(*case.arguments(theirs, token=token), **case.settings)
        errors.append((error_ratio(ours, expected), error_ratio(plain, expected)))
        assert_close(mine.total, exact.total, 2 * error_ratio(theirs.total, exact.total) + 1e-6, "total")
    ours, plain = (torch.tensor(column).mean() for column in zip(*errors, strict=True))
    assert 0 < ours <= 2 * plain, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_an_open_chunk_cancels_from_the_total(dtype):
    """The total less the slots is the closed chunks' sum: a slot that differs from what was summed would stay in."""
    case = Case(dtype=dtype, B=1, C=4, lin=True, quad=False, normalization="chunk")
    for _ in range(4):
        step(*case.arguments(case.state), **case.settings)
    closed = case.state.total.clone()
    for _ in range(3):
        step(*case.arguments(case.state), **case.settings)
    key, value = (x[:, :3].float() for x in (case.state.lin_k, case.state.value))
    assert_close(case.state.total - key.transpose(1, 2) @ value, closed, 2e-6)


def test_parameters_of_another_type_and_one_position_for_all_rows():
    """Under autocast projections are float16 and parameters float32; a row of positions may serve every row."""
    case = Case(dtype=torch.float16, B=2)
    case.gamma, case.beta = case.gamma.float(), case.beta.float()
    u, v, z, *_ = case.arguments(case.state)
    position = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    theirs = without_nan(case.state)
    rest = (case.gamma, case.beta, angles(position, 4), position, None)
    out = step(u, v, z, *rest, case.state, **case.settings)
    settings = {**case.settings, "bias_R": case.settings["bias_R"].float()}
    expected = torch_step(u.float(), v.float(), z.float(), *rest, converted(theirs, torch.float32), **settings)
    assert_close(out, expected, 2e-3)


def test_a_unit_hands_its_step_to_the_kernel():
    """Also with projections that are not dense in their last dimension."""
    case = Case()
    theirs, (u, v, z) = copied(case.state), case.token()
    *_, rotary, position, valid, state = case.arguments(case.state)
    unit = SimpleNamespace(
        offset_scale=SimpleNamespace(weight=case.gamma, bias=case.beta), divisor=2.0, normalization="mean",
        interleaved=False, previous_key=False, local_key_shift=False, delta=False,
    )  # fmt: skip
    places = SimpleNamespace(layout=StepLayout(position, valid), rotary=rotary)
    sparse = torch.stack([u, u], -1)[..., 0]
    assert sparse.stride(-1) == 2
    bias_R = case.settings["bias_R"]
    out = kernels.attention_step(unit, sparse, v, z, places, bias_R=bias_R, silu=True, states=(state, state))
    assert torch.equal(out, step(*case.arguments(theirs, token=(u, v, z)), **case.settings))


# ------------------------------------------------------------------------------------------------------------------
# A few tokens
# ------------------------------------------------------------------------------------------------------------------
def take(case, tokens, valid_BN, state, target):
    """Some tokens by the kernels at once, `[B, N, E]`."""
    B, N = tokens[0].shape[:2]
    counts = torch.ones(B, N, device=DEVICE).long() if valid_BN is None else valid_BN.long()
    position_BN = state.seen[:, None] + counts.cumsum(1) - counts
    cos, sin = None, None
    if case.r:
        cos, sin = (
            torch.cat(x, 1) for x in zip(*(angles(p, case.r // 2) for p in position_BN.split(1, 1)), strict=True)
        )
    settings = {name: case.settings[name] for name in ("bias_R", "divisor", "interleaved", "silu", "shift")}
    return steps.advance(
        state, target, *tokens, case.gamma, case.beta, cos, sin, position_BN, valid_BN,
        mean=case.settings["normalization"] == "mean", previous=case.settings["previous_key"],
        local_shift=case.settings["local"], **settings,
    )  # fmt: skip


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("settings", [
    *FORMS.values(), {"quad": False, "normalization": "chunk"}, {"lin": False, "bias": False, "interleaved": True},
    {"C": 5, "E": 37, "S": 20, "r": 6, "silu": False}, {"C": 40, "S": 40, "local": True, "previous": True},
    {"C": 7, "r": 0, "local": True, "lin": False, "interleaved": True, "shift": 3},
], ids=str)  # fmt: skip
def test_a_few_tokens_are_as_many_steps(settings, elsewhere, padded):
    """Over borders of chunks, also several in one call, with padding anywhere; slots that no token took have NaN."""
    case = Case(B=3, **settings)
    shift = case.settings["shift"]
    state, theirs, generator = case.state, without_nan(case.state), torch.Generator().manual_seed(3)
    for N in (2, 16, 1, 5, 27, 16, 3):
        tokens = [torch.cat(x, 1) for x in zip(*(case.token() for _ in range(N)), strict=True)]
        valid_BN = None
        if padded:
            valid_BN = (torch.rand(3, N, generator=generator) < 0.6).to(DEVICE)
            valid_BN[N % 3] = N % 2 == 0
        before, target = copied(state), state.map(lambda x: torch.full_like(x, 99)) if elsewhere else state
        out = take(case, tokens, valid_BN, state, target)
        expected = []
        for n in range(N):
            valid = None if valid_BN is None else valid_BN[:, n : n + 1]
            expected.append(torch_step(
                *case.arguments(theirs, valid, [x[:, n : n + 1] for x in tokens]), **case.settings
            ))  # fmt: skip
        real = torch.ones(3, N, dtype=torch.bool, device=DEVICE) if valid_BN is None else valid_BN
        assert out.shape == (3, N, case.E) and (out[~real] == 0).all()
        assert_close(out[real], torch.cat(expected, 1)[real], 1e-5)
        for (name, x), (_, y) in zip(stored(target, shift), stored(theirs, shift), strict=True):
            assert_close(x.double(), y.double(), 1e-5, name)
        unchanged = range(3) if elsewhere else (~real.any(1)).nonzero()
        for old, same in zip(before, state, strict=True):
            assert old is None or all(torch.equal(old[b].nan_to_num(7), same[b].nan_to_num(7)) for b in unchanged)
        state = target


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@forms
def test_low_precision_error_of_a_few_tokens_is_at_most_twice_that_of_steps(form, dtype):
    case = Case(dtype=dtype, B=2, C=8, E=64, S=32, **FORMS[form])
    state, theirs = case.state, copied(case.state)
    exact = converted(without_nan(case.state), torch.float64)
    double = {**case.settings, "bias_R": case.settings["bias_R"].double()}
    errors = []
    for N in (3, 7, 16, 2, 8):
        given = [case.token() for _ in range(N)]
        ours = take(case, [torch.cat(x, 1) for x in zip(*given, strict=True)], None, state, state)
        plain, expected = [], []
        for token in given:
            plain.append(step(*case.arguments(theirs, token=token), **case.settings))
            arguments = case.arguments(exact, token=token)
            expected.append(torch_step(*(x.double() for x in arguments[:5]), *arguments[5:], **double))
        expected = torch.cat(expected, 1)
        errors.append((error_ratio(ours, expected), error_ratio(torch.cat(plain, 1), expected)))
        assert_close(state.total, exact.total, 2 * error_ratio(theirs.total, exact.total) + 1e-6)
    ours, plain = (torch.tensor(column).mean() for column in zip(*errors, strict=True))
    assert 0 < ours <= 2 * plain, errors


@pytest.mark.gpu
@pytest.mark.parametrize("form", [{}, {"shift": 128, "previous": True, "local": True}], ids=["paper", "plus, local"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("B, N", [(1, 16), (1, 6), (4, 16), (32, 2), (1, 21), (2, 32)])
def test_a_few_tokens_at_full_size(B, N, dtype, form):
    """Two runs are bit-equal; over borders."""
    case = Case(dtype=dtype, B=B, C=256, E=1536, S=128, **form)
    case.gamma *= 0.1
    state, theirs = case.state, converted(without_nan(case.state), torch.float64)
    double = {**case.settings, "bias_R": case.settings["bias_R"].double()}
    for index in range(544 // N):
        given = [case.token() for _ in range(N)]
        tokens = [torch.cat(x, 1) for x in zip(*given, strict=True)]
        again = copied(state)
        out = take(case, tokens, None, state, state)
        assert torch.equal(out, take(case, tokens, None, again, again))
        for one, other in zip(state, again, strict=True):
            assert one is None or torch.equal(one.nan_to_num(7), other.nan_to_num(7))
        expected = []
        for token in given:
            arguments = case.arguments(theirs, token=token)
            expected.append(torch_step(*(x.double() for x in arguments[:5]), *arguments[5:], **double))
        assert_close(out, torch.cat(expected, 1), 2e-5 if dtype == torch.float32 else 0.02, f"call {index}")
    assert (state.seen == 544 // N * N).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize(("rows", "D", "E", "S"), [(1, 24, 40, 8), (3, 130, 96, 48), (70, 256, 272, 10)])
def test_error_of_the_products_is_at_most_twice_the_torch_tiers(rows, D, E, S, dtype):
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    x, h, gain = randn(rows, D), randn(rows, E), randn(()) + 2
    weights, biases = [randn(N, D) * D**-0.5 for N in (E, E, S)], [randn(N) for N in (E, E, S)]
    w_o, b_o = randn(D, E) * E**-0.5, randn(D)

    def torch_products(*tensors):
        x, h, gain, w_o, b_o, *others = tensors
        wide_x = x.to(wide(x.dtype))
        normed = (wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + 1e-5) * gain).to(x.dtype)
        linear = torch.nn.functional.linear
        projected = [linear(normed, w, b) for w, b in zip(others[:3], others[3:], strict=True)]
        return torch.cat(projected, 1), x + linear(h, w_o, b_o)

    tensors = x, h, gain, w_o, b_o, *weights, *biases
    exact = torch_products(*(x.double() for x in tensors))
    theirs = torch_products(*tensors)
    ours = kernel.project(x, gain, *weights, *biases, 1e-5), kernel.add_output(x, h, w_o, b_o)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert_close(mine, right, max(2 * error_ratio(other, right), 1e-6))


def test_products_follow_the_precision_that_is_set(exact_float32, monkeypatch):
    """At every call, as those of training do, not as it was at the first one."""
    used = []
    for name in ("_project_kernel", "_residual_kernel"):
        monkeypatch.setattr(kernel, name, lambda *a, PRECISION, **k: used.append(PRECISION))
    x, w, b = torch.zeros(2, 16), torch.zeros(16, 16), torch.zeros(16)
    for precision in ("highest", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        kernel.project(x, b[0], w, w, w, b, b, b, 1e-5)
        kernel.add_output(x, x, w, b)
    assert used == ["ieee"] * 2 + ["tf32"] * 2 + ["ieee"] * 2


def op_arguments(case, valid=None):
    u, v, z, gamma, beta, rotary, position, valid, state = case.arguments(case.state, valid)
    cos, sin = rotary or (None, None)
    form = (case.settings[name] for name in ("shift", "previous_key", "local"))
    own = state.quad_k, state.lin_k, state.value, state.total, state.seen
    tensors = u, v, z, gamma, beta, cos, sin, position, valid, *own, case.settings["bias_R"]
    return (*tensors, 2.0, True, False, True, *form)


@pytest.mark.parametrize(
    "settings",
    [{}, {"quad": False}, {"lin": False}, {"r": 0, "bias": False}, {"shift": 2, "previous": True, "local": True}],
)
def test_opcheck(settings):
    case = Case(**settings)
    branches = settings.get("quad", True), settings.get("lin", True), settings.get("previous", False)
    branches = *branches, settings.get("local", False)
    case.state = allocated(case.B, 4, 24, 8, torch.float32, *branches, fill=0.5)
    valid = torch.tensor([[True], [False], [True]], device=DEVICE) if settings else None
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.flash_hf.gated_step.default, op_arguments(case, valid), test_utils=tests)


def test_opcheck_of_the_products():
    sizes = (3, 24), (1,), (40, 24), (8, 24), (3, 40), (24, 40), (40,), (8,), (24,)
    x, gain, w, z, h, o, b, b_z, b_o = (torch.randn(size, device=DEVICE) for size in sizes)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(kernel.project_operator, (x, gain, w, w, z, b, b, b_z, 1e-5), test_utils=tests)
    torch.library.opcheck(kernel.output_operator, (x, h, o, b_o), test_utils=tests)


@pytest.mark.parametrize("form", ["gates of x, shifted keys", "given gates, global"])
def test_opcheck_of_the_delta_rule(form):
    (B, C, E, S), whole = (3, 4, 24, 8), form.startswith("gates of x")
    tensor = partial(torch.randn, device=DEVICE)
    position = torch.tensor([[5], [3], [0]], device=DEVICE)
    state = (
        tensor(B, C + 1, S) if whole else None, tensor(B, 1, S) if whole else None, tensor(B, C, E), tensor(B, S, E),
        position[:, 0].clone(),
    )  # fmt: skip
    heads = 4 if whole else 2
    torch.library.opcheck(
        kernel.delta_operator,
        (
            tensor(B, E), tensor(B, E), tensor(B, S), tensor(heads, S), tensor(heads, S), None, None, position, None,
            *state, tensor(2 * C - 1) if whole else None, 2.0, False, False, True, 0, whole, whole, tensor(B, S, E),
            tensor(B), None if whole else tensor(B, 1, 2), tensor(2), tensor(B, 16) if whole else None,
            tensor(1) if whole else None, tensor(2, 16) if whole else None, 1e-5,
        ),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


@forms
def test_compiles_in_one_graph(form):
    case = Case(**FORMS[form])
    shift = case.settings["shift"]
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    mine, theirs = copied(case.state), case.state
    addresses = [x.data_ptr() for x in mine if x is not None]
    for _ in range(6):
        token = case.token()
        out = compiled(*case.arguments(mine, token=token), **case.settings)
        assert torch.equal(out, step(*case.arguments(theirs, token=token), **case.settings))
        for (name, x), (_, y) in zip(stored(mine, shift), stored(theirs, shift), strict=True):
            assert torch.equal(x, y), name
    assert addresses == [x.data_ptr() for x in mine if x is not None]


@pytest.mark.gpu
@pytest.mark.parametrize("form", [{}, {"shift": 128, "previous": True, "local": True}], ids=["paper", "plus, local"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("B", [1, 5, 64])
def test_full_size_in_a_cuda_graph(dtype, B, form):
    """A captured step replayed over borders: the phase is read on the device."""
    case = Case(dtype=dtype, B=B, C=256, E=1536, S=128, **form)
    case.gamma *= 0.1
    state = case.state
    arguments = case.arguments(state)
    # Compiled outside of the capture, on another state.
    step(*arguments[:-1], copied(state), **case.settings)
    theirs = converted(without_nan(state), torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*arguments, **case.settings)
    plain = {**case.settings, "bias_R": case.settings["bias_R"].float()}
    for index in range(600):
        new, position = case.token(), state.seen[:, None].clone()
        for old, value in zip(
            (*arguments[:3], *arguments[5], arguments[6]), (*new, *angles(position, 64), position), strict=True
        ):
            old.copy_(value)
        graph.replay()
        floats = [x.float() for x in (*new, case.gamma, case.beta)]
        expected = torch_step(*floats, angles(position, 64), position, None, theirs, **plain)
        if index % 50 in (0, 1) or 250 < index < 262 or 508 < index < 518:
            assert_close(out, expected, 1e-4 if dtype == torch.float32 else 0.02, f"step {index}")
    assert (state.seen == 600).all()


@pytest.mark.gpu
@forms
def test_two_runs_are_bit_equal(form):
    first, second = (Case(dtype=torch.float16, B=16, C=64, E=1536, S=128, **FORMS[form]) for _ in range(2))
    for case in (first, second):
        case.gamma *= 0.1
    for _ in range(130):
        outs = [step(*case.arguments(case.state), **case.settings) for case in (first, second)]
        assert torch.equal(*outs)
    for one, other in zip(first.state, second.state, strict=True):
        assert one is None or torch.equal(one.nan_to_num(7), other.nan_to_num(7))
