# SPDX-License-Identifier: Apache-2.0
"""The models of the study by name, each with as many parameters as FLASH of the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flash_hf.configuration_flash import FlashConfig
from flash_hf.modeling_flash import FlashForCausalLM, FlashForMaskedLM, FlashGatedAttentionUnit

from ..baselines import TransformerPPForCausalLM, TransformerPPForMaskedLM, matched_config
from ..baselines.gau import GAUConfig, GAUForCausalLM, GAUForMaskedLM


@dataclass(frozen=True)
class Size:
    """Shape of FLASH; the other models get its width and number of parameters.

    Attributes:
        init: Standard deviation of the weights. 0.02 suits widths of hundreds; at 128 it leaves products of queries
            and keys so small that no recall is learnt in the available time (observed on a CPU).
    """

    width: int
    layers: int
    chunk: int = 256
    key_dim: int = 128
    init: float = 0.02


SIZES = {
    "s": Size(384, 8),
    "m": Size(512, 12),
    "l": Size(640, 16),
    "base": Size(768, 24),  # the paper's
    "m-eps": Size(512, 12),  # with another eps of AdamW: cell.RECIPES
    "m-decay": Size(512, 12),  # with more weight decay
    "xs": Size(128, 4, 64, 64, init=0.04),  # for a CPU
    "recall": Size(128, 4, init=0.1),
    "recall-cpu": Size(64, 2, 16, 32, init=0.1),
    "recall-cpu-deep": Size(64, 4, 16, 32, init=0.1),  # two blocks of Transformer++, since one cannot recall
    "tiny": Size(32, 2, 16, 16),
    "tiny-recall": Size(32, 2, 16, 16, init=0.1),
}


@dataclass(frozen=True)
class Model:
    """A model of the study.

    Attributes:
        title: Its name in tables.
        build: `(FLASH's configuration, causal)` to a language model whose `.model(ids)` returns hidden states, to be
            multiplied by the transposed embedding.
        compiled: Whether its layers are compiled one by one on a GPU (FLASH has its own kernels).
        long: Whether it accepts more tokens than it was trained with.
        causal_only, gpu_only: Whether it is limited to causal training, or to GPUs.
    """

    title: str
    build: Callable[[FlashConfig, bool], nn.Module]
    compiled: bool = True
    long: bool = True
    causal_only: bool = False
    gpu_only: bool = False


def _flash(*, heads: str = "", recent: bool = False, **changes) -> Callable[[FlashConfig, bool], nn.Module]:
    def build(config: FlashConfig, causal: bool) -> nn.Module:
        config = FlashConfig(**settings(config, changes))
        model = (FlashForCausalLM if causal else FlashForMaskedLM)(config)
        for layer in model.model.layers:
            start(layer.gau, heads, recent)
        return model

    return build


@torch.no_grad()
def start(gau: FlashGatedAttentionUnit, heads: str, recent: bool) -> None:
    """Other initialisations than the paper's, whose scales and biases of 0.02 leave the unit almost without output.

    Args:
        heads: `"ones"`: scales of queries and keys are 1; `"local"`: those of the local ones are 1 and those of global
            queries 0; `""`: as in the paper.
        recent: Local attention starts at the token itself and the three around it.
    """
    scale = gau.offset_scale.weight
    if heads:
        scale.fill_(1.0)
    if heads == "local":
        scale[2].zero_()
    if recent:
        gau.relative_bias.weight.copy_(gau.relative_bias.recent())


def _gau(**changes) -> Callable[[FlashConfig, bool], nn.Module]:
    def build(config: FlashConfig, causal: bool) -> nn.Module:
        config = GAUConfig(**settings(config, changes), is_decoder=causal)
        return (GAUForCausalLM if causal else GAUForMaskedLM)(config)

    return build


def _baseline(name: str, **changes) -> Callable[[FlashConfig, bool], nn.Module]:
    def build(config: FlashConfig, causal: bool) -> nn.Module:
        return (TransformerPPForCausalLM if causal else TransformerPPForMaskedLM)(
            matched_config(name, config, tolerance=0.02, **changes)
        )

    return build


def shared(config: FlashConfig) -> dict[str, Any]:
    """The settings shared by every kind of FLASH in the study."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "query_key_dim", "chunk_size",
             "max_position_embeddings", "initializer_range")  # fmt: skip
    return {name: getattr(config, name) for name in names}


def settings(config: FlashConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """The [`shared`] settings with a model's changes, some of which are in units of chunks."""
    chunk = changes.get("chunk_size", config.chunk_size)
    sizes = {name: int(changes[name] * chunk) for name in ("chunk_shift", "wide_chunk") if name in changes}
    return shared(config) | changes | sizes


def gated_deltanet(config: FlashConfig, causal: bool) -> nn.Module:
    """Gated DeltaNet (arXiv 2412.06464) of flash-linear-attention, one block for two layers of FLASH, its feed-forward
    width chosen for equal parameters. For CUDA; its kernels are tuned over at most `TUNED` configurations each, since
    all of them take minutes at every start.

    Raises:
        ImportError: flash-linear-attention is not installed. (Its 0.6.0 trains on Hopper GPUs only with triton 3.7.1
            or later, or tilelang, and says so in the first backward pass.)
    """
    few_configurations()
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    def build(inner: int) -> nn.Module:
        return GatedDeltaNetForCausalLM(GatedDeltaNetConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=inner,
            num_hidden_layers=max(1, config.num_hidden_layers // 2), head_dim=128, expand_v=2,
            num_heads=max(1, round(config.hidden_size * 0.75 / 128)), tie_word_embeddings=True, use_cache=False,
            max_position_embeddings=config.max_position_embeddings,
        ))  # fmt: skip

    def count(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    with torch.device("meta"):
        target = count(FlashForCausalLM(config))
    small = count(build(64))
    step = count(build(128)) - small
    return build(max(64, 64 + 64 * round((target - small) / step)))


TUNED = 4


def few_configurations() -> None:
    """Let triton's autotuner try at most `TUNED` configurations, spread evenly over those that a kernel offers."""
    from triton.runtime.autotuner import Autotuner

    if getattr(Autotuner, "few", False):
        return
    original = Autotuner.__init__

    def init(self, fn, arg_names, configs, *args, **kwargs):
        if configs and len(configs) > TUNED:
            configs = [configs[i * (len(configs) - 1) // (TUNED - 1)] for i in range(TUNED)]
        original(self, fn, arg_names, configs, *args, **kwargs)

    Autotuner.__init__, Autotuner.few = init, True


# FLASH-Quad's divisor is the training length, from max_position_embeddings; its bias, for such spans, the rotary one.
_QUAD = {"attention_type": "quadratic", "relative_bias": "rotary"}

# Shifted chunks and keys (a part of FLASH+, see FlashConfig.plus), and the same on variants of the unit.
_SHIFTS = {"chunk_shift": 0.5, "global_form": "previous_token"}
_SHIFTED = {"chunk_shift": 0.5, "key_shift": True, "global_rope": False}
# FLASH+ before its local keys were shifted, as a variant of the unit, and changes to it that may use more of the
# context; all are causal.
_PLUS = {**_SHIFTED, "use_scaled_sinusoid": False, "attention_init": "recent"}
_CHANGES = {
    "512": ("chunks of 512", {"chunk_size": 512}),
    "window": ("local part over two chunks", {"local_window": 2}),
    "softmax": ("softmax in the local part", {"attention_activation": "softmax"}),
    "heads": ("4 local heads", {"local_heads": 4}),
    "keys": ("half of the local keys shifted", {"local_key_shift": True}),
    "gated": ("gated global mean", {"gated_mean": True}),
    "features": ("of exponential features", {"global_features": True}),
    "delta": ("global state by the delta rule", {"global_state": "delta"}),
    "dropout": ("hidden dropout of 0.1", {"hidden_dropout": 0.1}),
    "hybrid": ("3 of 12 layers quadratic with softmax (a hybrid)", {"quadratic_every": 4}),
}
# Each alone, and together.
PLUS_FORMS = (
    "512", "window", "softmax", "heads", "keys", "gated", "gated-features", "delta", "hybrid", "window-softmax-gated",
    "window-softmax-heads-gated", "window-keys", "keys-gated", "keys-delta", "window-keys-gated", "window-keys-delta",
    "window-keys-heads-delta", "keys-dropout",
)  # fmt: skip


def _plus(name: str) -> Model:
    changes = [_CHANGES[part] for part in name.split("-")]
    merged = {key: value for _, change in changes for key, value in change.items()}
    titles = ["FLASH+" if "local_key_shift" in merged else "plain-key FLASH+"]
    titles += [title for title, change in changes if "local_key_shift" not in change]
    return Model(", ".join(titles), _gau(**_PLUS, **merged), causal_only=True)


MODELS: dict[str, Model] = {
    "flash": Model("FLASH", _flash(), compiled=False),
    "flash-local": Model("FLASH, local only", _flash(attention_type="local"), compiled=False),
    "flash-global": Model("FLASH, global only", _flash(attention_type="global"), compiled=False),
    "flash-quad": Model("FLASH-Quad", _flash(**_QUAD), long=False),
    "transformer++": Model("Transformer++", _baseline("transformer++")),
    "transformer": Model("Transformer", _baseline("transformer"), long=False),
    "gated-deltanet": Model("Gated DeltaNet", gated_deltanet, compiled=False, causal_only=True, gpu_only=True),
    "mc-transformer++": Model("MC-Transformer++", _baseline("mc-transformer++")),
    "performer": Model("Performer", _baseline("performer")),
    "performer-relu": Model("Performer, ReLU kernel", _baseline("performer-relu")),
    "combiner": Model("Combiner", _baseline("combiner"), long=False),
    # Table 1 of the paper: the unit, changed towards attention.
    "gau-softmax": Model("GAU, softmax", _flash(**_QUAD, attention_activation="softmax"), long=False),
    "gau-heads": Model("GAU, 4 heads", _gau(**_QUAD, num_heads=4), long=False),
    "gau-ungated": Model("GAU, not gated", _gau(**_QUAD, gated=False, expansion_factor=3), long=False),
    # Table 2: attention, changed towards the unit.
    "mhsa-relu2": Model("MHSA, relu^2", _baseline("mhsa-relu2"), long=False),
    "mhsa-single-head": Model("MHSA, one head", _baseline("mhsa-single-head"), long=False),
    "mhsa-gated": Model("MHSA, gated", _baseline("mhsa-gated"), long=False),
    # Forms of the global branch.
    "flash-norope": Model("global branch without RoPE", _gau(global_rope=False)),
    "flash-norm": Model("global output normalised", _gau(global_norm=True)),
    "flash-decay": Model("decayed mean", _gau(chunk_weighting="decay")),
    "flash-decay-norm": Model("decayed mean, normalised", _gau(chunk_weighting="decay", global_norm=True)),
    "flash-keyshift": Model("shifted keys", _gau(key_shift=True)),
    "flash-keyshift-norope": Model("shifted keys, no RoPE", _gau(key_shift=True, global_rope=False)),
    "flash-keyshift-norope-norm": Model(
        "shifted keys, no RoPE, normalised", _gau(key_shift=True, global_rope=False, global_norm=True)
    ),
    "flash-previous": Model(
        'global_form="previous_token"', _flash(global_form="previous_token"), compiled=False
    ),
    "flash-shifted": Model(
        "FLASH, shifted chunks and keys", _flash(**_SHIFTS),
        compiled=False,
    ),
    "flash-stagger": Model("shifted chunks", _flash(chunk_shift=0.5), compiled=False),
    "flash-stagger-local": Model(
        "shifted chunks, local only", _flash(chunk_shift=0.5, attention_type="local"), compiled=False
    ),
    "flash-stagger-decay": Model("shifted chunks, decayed mean", _gau(chunk_shift=0.5, chunk_weighting="decay")),
    "flash-stagger-norope": Model("shifted chunks, no RoPE", _gau(chunk_shift=0.5, global_rope=False)),
    "flash-stagger-keyshift": Model(
        "shifted chunks, shifted keys, no RoPE", _gau(**_SHIFTED)
    ),
    "flash-conv": Model("convolution of 4 tokens", _gau(conv_size=4), causal_only=True),
    "flash-shifted-conv": Model(
        "shifted chunks, shifted keys, no RoPE, convolution of 4 tokens",
        _gau(**_SHIFTED, conv_size=4), causal_only=True,
    ),
    "flash-shifted-tokens": Model(
        "shifted chunks, shifted keys, no RoPE, half of the channels shifted",
        _gau(**_SHIFTED, token_shift=True),
    ),
    "flash-shifted-heads": Model(
        "shifted chunks, shifted keys, no RoPE, 4 heads", _gau(**_SHIFTED, num_heads=4)
    ),
    "flash-shifted-heads-tokens": Model(
        "shifted chunks, shifted keys, no RoPE, 4 heads, half of the channels shifted",
        _gau(**_SHIFTED, num_heads=4, token_shift=True),
    ),
    # How training starts: heads, biases, positions, norms, the deviation of the weights.
    "flash-ones": Model("query and key scales of 1", _flash(heads="ones"), compiled=False),
    "flash-bare": Model("no sinusoid", _flash(use_scaled_sinusoid=False), compiled=False),
    "flash-bare-ones-recent": Model(
        "no sinusoid, attention starts at recent tokens",
        _flash(use_scaled_sinusoid=False, attention_init="recent"), compiled=False,
    ),
    "flash-shifted-bare-ones-recent": Model(
        "plain-key FLASH+",
        _flash(**_SHIFTS, use_scaled_sinusoid=False, attention_init="recent"), compiled=False,
    ),
    "flash-stagger-local-bare-ones-recent": Model(
        "plain-key FLASH+, local only",
        _flash(chunk_shift=0.5, attention_type="local", use_scaled_sinusoid=False, attention_init="recent"),
        compiled=False,
    ),
    **{
        f"flash-shifted-{name}": Model(title, _flash(**_SHIFTS, **changes), compiled=False)
        for name, title, changes in (
            ("ones", "shifted chunks and keys, query and key scales of 1", {"heads": "ones"}),
            ("recent", "shifted chunks and keys, biases raised at recent tokens", {"recent": True}),
            ("ones-recent", "shifted chunks and keys, attention starts at recent tokens",
             {"attention_init": "recent"}),
            ("local-recent", "shifted chunks and keys, local query and key scales of 1, global query scales of 0, "
                             "biases raised at recent tokens",
             {"heads": "local", "recent": True}),
            ("bare", "shifted chunks and keys, no sinusoid", {"use_scaled_sinusoid": False}),
            ("bare-ones", "shifted chunks and keys, no sinusoid, query and key scales of 1",
             {"use_scaled_sinusoid": False, "heads": "ones"}),
            ("rms", "shifted chunks and keys, RMS norm", {"norm_type": "rms_norm"}),
            ("bare-rms-ones-recent", "plain-key FLASH+, RMS norm",
             {"use_scaled_sinusoid": False, "norm_type": "rms_norm", "attention_init": "recent"}),
            ("std", "shifted chunks and keys, weights with std 0.04", {"initializer_range": 0.04}),
            ("bare-std-ones-recent", "plain-key FLASH+, weights with std 0.04",
             {"use_scaled_sinusoid": False, "initializer_range": 0.04, "attention_init": "recent"}),
        )
    },
    "flash-shifted-normed": Model("shifted chunks and keys, output normalised", _gau(**_SHIFTED, attended_norm=True)),
    "flash-shifted-bare-normed": Model(
        "shifted chunks and keys, no sinusoid, output normalised",
        _gau(**_SHIFTED, attended_norm=True, use_scaled_sinusoid=False),
    ),
    "flash-shifted-bare-conv": Model(
        "shifted chunks and keys, no sinusoid, convolution of 4 tokens, randomly initialised",
        _gau(**_SHIFTED, conv_size=4, conv_init=0.5, use_scaled_sinusoid=False), causal_only=True,
    ),
    **{f"plus-{name}": _plus(name) for name in PLUS_FORMS},
    # The library's, which has kernels.
    **{
        f"plus-{name}": Model(
            _plus(name).title,
            _flash(**_SHIFTS, use_scaled_sinusoid=False, attention_init="recent", **changes),
            compiled=False, causal_only=True,
        )
        for name, changes in (
            ("keys", {"local_key_shift": True}),
            ("keys-dropout", {"local_key_shift": True, "hidden_dropout": 0.1}),
            ("keys-delta", {"local_key_shift": True, "global_state": "delta"}),
        )
    },
    "flash-heads": Model("4 heads", _gau(num_heads=4)),
    "flash-wide": Model("every 4th layer's chunk 4 times as wide", _gau(wide_every=4, wide_chunk=4)),
}  # fmt: skip


def build(name: str, size: str, vocab_size: int, context: int, *, causal: bool) -> nn.Module:
    """A language model with its random weights, on the CPU.

    Raises:
        ValueError: the model has no such direction, or needs a GPU and there is none.
    """
    model = MODELS[name]
    if model.causal_only and not causal:
        raise ValueError(f"study: {name!r} is causal only.")
    if model.gpu_only and not torch.cuda.is_available():
        raise ValueError(f"study: {name!r} needs a CUDA device.")
    shape = SIZES[size]
    config = FlashConfig(
        vocab_size=vocab_size, hidden_size=shape.width, num_hidden_layers=shape.layers, query_key_dim=shape.key_dim,
        chunk_size=shape.chunk, max_position_embeddings=context, initializer_range=shape.init,
    )  # fmt: skip
    return model.build(config, causal)


__all__ = ["MODELS", "SIZES", "Model", "Size", "build", "few_configurations", "gated_deltanet"]
