# SPDX-License-Identifier: Apache-2.0
"""Which implementation a checkpoint comes from, and its conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..configuration_flash import nearest
from .junnyu import convert_gau_alpha, convert_junnyu_flash, convert_junnyu_flash_quad
from .lucidrains import convert_lucidrains_gau, convert_lucidrains_layer, convert_lucidrains_transformer
from .parts import (
    Converted,
)


CONVERTERS: dict[str, Callable[..., Converted]] = {
    "junnyu_flash": convert_junnyu_flash,
    "junnyu_flash_quad": convert_junnyu_flash_quad,
    "gau_alpha": convert_gau_alpha,
    "lucidrains_transformer": convert_lucidrains_transformer,
    "lucidrains_layer": convert_lucidrains_layer,
    "lucidrains_gau": convert_lucidrains_gau,
}


def detect_kind(state: Mapping[str, Tensor]) -> str:
    """The key of `CONVERTERS` whose checkpoints have names like these.

    Raises:
        ValueError: none has.
    """
    names = {name.removeprefix("net.") for name in state}
    for kind, prefix in (
        ("junnyu_flash_quad", "flash_quad."),
        ("gau_alpha", "gau_alpha."),
        ("junnyu_flash", "flash.encoder."),
    ):
        if any(name.startswith(prefix) for name in names):
            return kind
    if "token_emb.weight" in names and "abs_pos_emb.scale" in names:
        return "lucidrains_transformer"
    if "qk_offset_scale.gamma" in names:
        return "lucidrains_layer"
    if "offsetscale.gamma" in names:
        return "lucidrains_gau"
    raise ValueError(
        f"state: its names must be those of one of {', '.join(CONVERTERS)}, got {sorted(names)[:6]}... If they only "
        "have a prefix more, remove it; pass kind=... to have the first difference named."
    )


def convert(state: Mapping[str, Tensor], *, kind: str | None = None, **options) -> Converted:
    """The conversion that fits `state`.

    Args:
        state: names to tensors, as saved by the original.
        kind: key of `CONVERTERS`; detected from the names by default.
        options: of that function.

    Raises:
        ValueError: the checkpoint is unknown, cannot be expressed exactly, or an option does not belong to its kind.
    """
    kind = detect_kind(state) if kind is None else kind
    if kind not in CONVERTERS:
        raise ValueError(f"`kind` must be one of {', '.join(CONVERTERS)}, got {kind!r}.{nearest(kind, [*CONVERTERS])}")
    converter = CONVERTERS[kind]
    # Those that refuse whatever they get have no options.
    accepted = set(converter.__kwdefaults__ or options)
    unknown = sorted(set(options) - accepted)
    if unknown:
        raise ValueError(f"options of {kind!r} must be among {', '.join(sorted(accepted))}, got {', '.join(unknown)}.")
    return converter(state, **options)
