# SPDX-License-Identifier: Apache-2.0
"""Where the work is done: in the Triton kernels of an installed flash_hf, or in the functions of attention_flash.py.

The choice is made once per forward (`with_plans`), for the device, the configuration and the call; and in each layer
(`fuses_layer`, `fuses_attention`, `normalise`), whose modules may be hooked, quantised or replaced.
"""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .attention_flash import DecodingState, QueryKeys
from .chunking_flash import (
    AppendLayout,
    Documents,
    Places,
    QuadraticLayout,
    StepLayout,
    can_append,
    child,
    chunk_layout,
    is_distributed,
    is_exporting,
    is_tracing,
    is_transformed,
    parameter,
    projections,
    without_padding,
)


logger = logging.get_logger(__name__)

# Code loaded from the Hub uses the kernels of an installed package if its interface is the same.
KERNEL_INTERFACE = 13

# FLASH-Quad's kernels hold the attention weights of some rows at a time, of at most this many tokens.
LONGEST_QUADRATIC_ROW = 8192

# With more rows than these, a step's projections are left to cuBLAS.
MOST_STEP_ROWS = 64

# Up to this many tokens on a cache are taken as steps are, at once. Assisted decoding proposes 20 by default.
MOST_STEPS = 32

# The activation that kernels compute themselves, by its names in transformers.
SILU = ("silu", "swish")

_loaded: list[tuple[ModuleType | None, str]] = []


def load_kernels() -> tuple[ModuleType | None, str]:
    """The package of Triton kernels, or None and the reason."""
    if not _loaded:  # not functools.cache, which torch.compile warns about
        _loaded.append(_import_kernels())
    return _loaded[0]


def _import_kernels() -> tuple[ModuleType | None, str]:
    try:
        import triton  # noqa: F401
    except ImportError:
        return None, "triton is not installed"
    try:
        from flash_hf import kernels
    except ImportError as error:
        return None, f"flash_hf.kernels cannot be imported ({error})"
    if kernels.INTERFACE != KERNEL_INTERFACE:
        return None, "the installed flash_hf is another version than this model's code"
    return kernels, ""


def kernels_for(config, device: torch.device, dtype: torch.dtype, *, dropout: bool) -> ModuleType | None:
    """The kernels, if `config.backend` allows them and they can run; else None, and torch computes. `dtype` is what
    products are computed in, `dropout` whether attention dropout is active."""
    exporting = is_exporting() or torch.jit.is_tracing()
    if config.backend == "torch" or (config.backend == "auto" and exporting):
        return None  # an exported graph is to run where there is no flash_hf
    kernels, reason = load_kernels()
    if kernels is not None:
        reason = kernels.unavailable(device, dtype) or kernels.unsupported(config, device)
        if reason is None and dropout:
            reason = "attention_dropout has no kernels"
        if reason is None and device.type == "cpu" and config.backend == "auto":
            reason = "the device is a CPU"  # the interpreter is for tests that ask for it
    if not reason:
        return kernels
    if config.backend == "triton":
        raise ValueError(
            f"FlashConfig: `backend` = 'triton' cannot run here: {reason}. Use backend='auto', which falls back to "
            "torch, or backend='torch'; kernels need triton, an NVIDIA GPU of compute capability 8.0 or later, and "
            "bfloat16, float16 or float32."
        )
    if device.type == "cuda" and not is_tracing():  # elsewhere there is nothing that a user could change
        logger.warning_once(f"FLASH computes in plain torch, which is correct but slower than its kernels: {reason}.")
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that products with x are computed in: autocast's, or x's own."""
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def is_bare(module: nn.Module) -> bool:
    """Whether calling a module only runs its class's forward, so that its parameters can be used directly."""
    # accelerate replaces `forward`, and loads offloaded parameters only while it runs.
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain_linear(module: nn.Module, *, bias: bool = True) -> bool:
    """Whether a projection is a stock linear layer: not replaced (LoRA), hooked, quantised or sharded."""
    return (
        type(module) is nn.Linear
        and type(parameter(module, "weight")) in (nn.Parameter, Tensor)
        and type(parameter(module, "bias")) in ((nn.Parameter, Tensor) if bias else (type(None),))
        and is_bare(module)
    )


# ---- Once per forward ----
def with_plans(places: list[Places], config, x_BND: Tensor, *, causal: bool, dropout: bool, cache) -> list[Places]:
    """`places` with what the kernels need, where they can compute this call: embedded tokens `x_BND`, with active
    attention dropout or not, and the first layer's cache or None."""
    kernels = kernels_for(config, x_BND.device, compute_dtype(x_BND), dropout=dropout)
    if kernels is None:
        return places
    return [_with_plan(each, kernels, config, x_BND, causal, cache) for each in places]


def takes_steps(config, x_BND: Tensor, documents: Documents, *, dropout: bool, cache) -> bool:
    """Whether kernels take embedded tokens `x_BND` on a constant-size cache as steps do, instead of by chunks.
    Arguments as of `with_plans`."""
    # A step goes through the state, which carries no gradient.
    if cache is None or torch.is_grad_enabled() or is_watched(x_BND):
        return False
    B, N = x_BND.shape[:2]
    if not can_append(documents, config.chunk_size) or N > MOST_STEPS or B * N > MOST_STEP_ROWS:
        return False
    kernels = kernels_for(config, x_BND.device, compute_dtype(x_BND), dropout=dropout)
    return kernels is not None and _fits(cache.state, kernels)


def appends_in_torch(config, x_BND: Tensor, documents: Documents, *, dropout: bool, cache) -> bool:
    """Whether embedded tokens `x_BND` on a constant-size cache are few, and no kernels compute this call: those want a
    grid of chunks. Arguments as of `with_plans`."""
    if cache is None or not can_append(documents, config.chunk_size):
        return False
    if cache.record_past or config.global_state == "delta" or torch.is_grad_enabled():
        return True
    return kernels_for(config, x_BND.device, compute_dtype(x_BND), dropout=dropout) is None


def is_watched(x_BND: Tensor) -> bool:
    """Whether kernels have to be called as operators, which those of prompts with the delta rule are not."""
    return is_tracing() or is_transformed() or type(x_BND) is not Tensor


def can_call_steps(x_BND: Tensor, cache) -> bool:
    """Whether a step's kernels can be called: directly, or as operators of a compiled call."""
    if torch.compiler.is_compiling():
        return type(x_BND) is Tensor and not (is_exporting() or cache.record_past)
    return not is_watched(x_BND)


def _fits(state: DecodingState | None, kernels: ModuleType) -> bool:
    """Whether a step's kernels can advance a state, which the user may have changed."""
    return state is None or (
        state.value.dtype in kernels.DTYPES and all(x is None or x.is_contiguous() for x in state)
    )


def _with_plan(places: Places, kernels: ModuleType, config, x_BND: Tensor, causal: bool, cache) -> Places:
    layout, batch = places.layout, len(x_BND)
    neighbours = getattr(layout, "neighbours", None)
    if isinstance(layout, AppendLayout) or (neighbours is not None and not neighbours.fused):
        return places
    # CODEPATH: FLASHQuad checkpoints. To the kernels, a row that is one document is one chunk.
    if isinstance(layout, QuadraticLayout):
        length = layout.position_BN.shape[1]
        if layout.visible_BNM is not None or is_tracing() or length > LONGEST_QUADRATIC_ROW:
            return places
        layout = chunk_layout(places.documents, batch, length, causal=causal)
        places = replace(places, layout=layout, bias_length=length)
    delta = config.global_state == "delta"
    if isinstance(layout, StepLayout):
        # Checked here once, for all layers.
        return replace(places, fused=_fits(cache.state, kernels) and (not delta or can_call_steps(x_BND, cache)))
    # A rollback needs the keys of each token.
    if cache is not None and (cache.record_past or (delta and is_watched(x_BND))):
        return places
    # Kernels cannot put cached slots into the grid of a packed row.
    if cache is not None and places.documents.start_BN is not None:
        return places
    amid = layout.phase_B is not None and (is_tracing() or bool(layout.phase_B.any()))
    # The backward of the delta rule takes first chunks to read nothing.
    if (amid or (delta and layout.phase_B is not None)) and (is_tracing() or torch.is_grad_enabled()):
        return places
    # One chunk reads no state: its kernels would leave the gates without a gradient.
    if delta and cache is None and layout.position_BGC.shape[1] == 1:
        return places
    sizes = {"width": config.intermediate_size, "chunk_size": config.chunk_size}
    plan = kernels.chunk_plan(
        layout, batch, causal=causal, normalization=config.global_normalization, amid=amid, delta=delta, **sizes
    )
    return replace(places, fused=True, plan=plan)


# ---- In every layer ----
def normalise(norm: nn.Module, x: Tensor, places: Places) -> Tensor:
    """`norm(x)`, by a kernel if kernels compute this call and have this norm. A compiler joins that of a step to
    the sum before."""
    joins = isinstance(places.layout, StepLayout) and torch.compiler.is_compiling()
    if places.fused and not joins and has_kernel(norm):
        return load_kernels()[0].scale_norm(x, norm.weight, norm.eps)
    return norm(x)


def has_kernel(module: nn.Module | None) -> bool:
    """Whether a norm or a relative bias is one that has a kernel."""
    # Not inherited: a subclass may compute something else.
    return "has_kernel" in type(module).__dict__ and is_bare(module)


def fuses_attention(unit: nn.Module, places: Places) -> bool:
    """Whether one kernel computes everything between the projections of a unit."""
    return places.fused and is_bare(unit.offset_scale)


def fused_attention(unit: nn.Module, x_BND: Tensor, places: Places, cache) -> Tensor:
    """`u * attention(z, v)`, `[B, N, E]`: the projections as modules of any kind, then one kernel."""
    kernels = load_kernels()[0]
    u_BNE, v_BNE, z_BNS = unit.u_proj(x_BND), unit.v_proj(x_BND), unit.z_proj(x_BND)
    silu = unit.kernel_activation
    if not silu:
        u_BNE, v_BNE, z_BNS = unit.act_fn(u_BNE), unit.act_fn(v_BNE), unit.act_fn(z_BNS)
    options: dict[str, Any] = {"bias_R": fused_bias(unit, places), "silu": silu}
    if unit.delta:
        options["gates_BN2"] = unit.gate_proj(x_BND)
    if isinstance(places.layout, StepLayout):
        tokens = StepTokens(unit, u_BNE, v_BNE, z_BNS, **options) if cache.record_past else None
        states = cache.begin_steps(v_BNE, places, tokens)
        return kernels.attention_step(unit, u_BNE, v_BNE, z_BNS, places, states=states, **options)
    options |= continuation(places, cache)
    out_BNE, state = kernels.gated_attention(unit, u_BNE, v_BNE, z_BNS, places, **options)
    if cache is not None:
        cache.update(state, places)
    return out_BNE


def fused_bias(unit: nn.Module, places: Places) -> Tensor | None:
    """`unit.bias(places)`, the rotary one by a kernel."""
    bias = child(unit, "relative_bias")
    if not has_kernel(bias):
        return unit.bias(places)
    return load_kernels()[0].rotary_bias(bias, places.bias_rotary)


def continuation(places: Places, cache) -> dict[str, Any]:
    """Arguments of attention over chunks: the cached state to continue, and whether to return the new one."""
    continues = cache is not None and places.layout.phase_B is not None
    return {"state": cache.state if continues else None, "return_state": cache is not None}


def fuses_layer(layer: nn.Module, x_BND: Tensor, places: Places) -> bool:
    """Whether one kernel call computes a whole layer: its modules are the stock classes, with no hooks attached."""
    return (
        places.plan is not None
        and not places.plan.cached  # cached slots come between the projections
        and compute_dtype(x_BND) in (torch.bfloat16, torch.float32)
        and is_stock(layer)
    )


def is_stock(layer: nn.Module) -> bool:
    """Whether a layer's modules are those whose parameters kernels take: the stock classes, with no hooks attached."""
    unit = child(layer, "gau")
    return (
        has_kernel(child(layer, "norm"))
        and unit.kernel_activation
        and is_bare(unit)
        and is_bare(child(unit, "offset_scale"))
        and all(map(is_plain_linear, projections(unit)))
        and (not unit.delta or is_plain_linear(unit.gate_proj, bias=False))
    )


def fuses_step(layer: nn.Module, x_BND: Tensor, places: Places, cache) -> bool:
    """Whether kernels compute a layer's whole step: of a few rows, in one type, for the tensors themselves."""
    unit = layer.gau
    return (
        places.fused
        and isinstance(places.layout, StepLayout)
        and cache.is_initialized
        and len(x_BND) <= MOST_STEP_ROWS
        and can_call_steps(x_BND, cache)
        and not (cache.record_past and is_distributed())  # keys are made between the modules
        and not (layer.hidden_dropout and layer.training)
        and is_stock(layer)
        and all(x_BND.dtype == parameter(module, "weight").dtype for module in projections(unit))
        and compute_dtype(x_BND) == x_BND.dtype
    )


def fused_step(layer: nn.Module, x_BND: Tensor, places: Places, cache) -> Tensor:
    """`x + GAU(norm(x))` of one new token per row, or of a few, `[B, N, D]`."""
    unit = layer.gau
    bias_R = fused_bias(unit, places)

    def begin(u_BNE: Tensor, v_BNE: Tensor, z_BNS: Tensor, gates_BN2: Tensor | None):
        tokens = StepTokens(unit, u_BNE, v_BNE, z_BNS, bias_R, True, gates_BN2) if cache.record_past else None
        return cache.begin_steps(v_BNE, places, tokens)

    return load_kernels()[0].layer_step(layer, x_BND, places, bias_R=bias_R, begin=begin)


@dataclass(frozen=True)
class StepTokens:
    """The projections of tokens that kernels take as steps: what is recorded of them for a rollback, which takes some
    of them again.

    Attributes:
        u_BNE, v_BNE, z_BNS: the projections, still without SiLU if `silu`.
        bias_R: the relative bias over offsets.
        gates_BN2: the delta rule's gates, without their bias.
    """

    unit: nn.Module
    u_BNE: Tensor
    v_BNE: Tensor
    z_BNS: Tensor
    bias_R: Tensor | None
    silu: bool
    gates_BN2: Tensor | None = None

    def advance(self, state: DecodingState, places: Places, columns: int) -> None:
        """Take the first `columns` tokens again, on the state before them."""
        tokens = (x[:, :columns] for x in (self.u_BNE, self.v_BNE, self.z_BNS))
        gates = None if self.gates_BN2 is None else self.gates_BN2[:, :columns]
        options = {"bias_R": self.bias_R, "silu": self.silu, "gates_BN2": gates, "states": (state, state)}
        load_kernels()[0].attention_step(self.unit, *tokens, places.first(columns), **options)

    @torch.no_grad
    def keys(self, places: Places) -> tuple[QueryKeys, Tensor]:
        """Queries, keys and gates of the tokens, and their values, 0 at padding."""
        made = [self.unit.act_fn(x) if self.silu else x for x in (self.v_BNE, self.z_BNS)]
        made.append(None if self.gates_BN2 is None else self.unit.gates_of(self.gates_BN2))
        v_BNE, z_BNS, gates_BN2 = without_padding(places.layout.padding_BN1, *made)
        return self.unit.query_keys(z_BNS, places.rotary)._replace(gates=gates_BN2), v_BNE


def fused_layer(layer: nn.Module, x_BND: Tensor, places: Places, cache) -> Tensor:
    """`x + GAU(norm(x))` by one kernel call, `[B, N, D]`; with dropout the sum comes after it."""
    dtype, bias_R = compute_dtype(x_BND), fused_bias(child(layer, "gau"), places)
    dropout = layer.hidden_dropout if layer.training else 0.0
    out_BND, state = load_kernels()[0].layer(
        layer, x_BND, places, bias_R=bias_R, dtype=dtype, residual=not dropout, **continuation(places, cache)
    )
    if cache is not None:
        cache.update(state, places)
    return x_BND + F.dropout(out_BND, dropout) if dropout else out_BND
