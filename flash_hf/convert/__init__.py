# SPDX-License-Identifier: Apache-2.0
"""Conversion of checkpoints of other FLASH implementations: exactly, or not at all, with the reason.

A converter takes the state dict of an original model and returns the class, configuration and state dict that compute
the same function. No original code is needed. Three identities are used: an embedding added to every token folds into
the word embeddings; a decoder's bias folds into its weight after a LayerNorm (`fold_decoder`); a constant divisor of
the global sum folds into the linear queries, whose own divisor is then `chunk_size`.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from ..configuration_flash import nearest
from .files import read_state_dict, save_tokenizer
from .junnyu import convert_junnyu_flash, convert_junnyu_flash_quad
from .lucidrains import convert_lucidrains
from .parts import Converted


CONVERTERS: dict[str, Callable[..., Converted]] = {
    "junnyu_flash": convert_junnyu_flash,
    "junnyu_flash_quad": convert_junnyu_flash_quad,
    "lucidrains": convert_lucidrains,
}
# A beginning of a name in the state dict, and why such a checkpoint cannot be converted.
REFUSED = {
    "gau_alpha.": "GAU-alpha normalizes after each residual sum (post-norm), which no pre-norm layer can imitate, and "
    "its softmax_plus scales scores by log(keys) / log(512), where FlashConfig's softmax has a constant. Use its own "
    "code, github.com/ZhuiyiTechnology/GAU-alpha",
    "offsetscale.gamma": "The standalone GAU of FLASH-pytorch divides its scores, bias included, by the length of the "
    "input, which makes it another function at every length. Convert FLASH or FLASHTransformer modules instead",
}


def detect_kind(state: Mapping[str, Tensor]) -> str:
    """The kind of checkpoint, a key of `CONVERTERS`, from its parameter names; ValueError if they fit none."""
    names = {name.removeprefix("net.") for name in state}
    for prefix, reason in REFUSED.items():
        if any(name.startswith(prefix) for name in names):
            raise ValueError(f"This checkpoint cannot be converted exactly. {reason}.")
    for prefix, kind in {"flash_quad.": "junnyu_flash_quad", "flash.encoder.": "junnyu_flash"}.items():
        if any(name.startswith(prefix) for name in names):
            return kind
    if "qk_offset_scale.gamma" in names or {"token_emb.weight", "abs_pos_emb.scale"} <= names:
        return "lucidrains"
    raise ValueError(
        f"The names of the tensors must be those of one of {', '.join(CONVERTERS)}, got {sorted(names)[:6]}... Remove "
        "a prefix that all of them share, or give the --kind to see the first difference."
    )


def convert(state: Mapping[str, Tensor], *, kind: str | None = None, **options) -> Converted:
    """Convert a checkpoint to a configuration and weights that compute the same function.

    Args:
        state: state dict of the original model.
        kind: key of `CONVERTERS`; detected from the parameter names by default.
        options: what the state dict does not store (direction, chunk size, ...): keyword arguments of the converter.

    Raises:
        ValueError: the checkpoint is unknown, FlashConfig cannot express it exactly, or an option does not belong to
            its kind.
    """
    kind = detect_kind(state) if kind is None else kind
    if kind not in CONVERTERS:
        raise ValueError(f"kind must be one of {', '.join(CONVERTERS)}, got {kind!r}.{nearest(kind, [*CONVERTERS])}")
    for name in sorted(options.keys() - CONVERTERS[kind].__kwdefaults__):
        raise ValueError(f"A checkpoint of kind {kind!r} takes no option --{name}.")
    return CONVERTERS[kind](state, **options)


__all__ = ["CONVERTERS", "Converted", "convert", "detect_kind", "read_state_dict", "save_tokenizer"]
