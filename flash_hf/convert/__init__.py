# SPDX-License-Identifier: Apache-2.0
"""Conversion of checkpoints of other FLASH implementations: exactly, or not at all, with the reason.

A converter takes the state dict of an original model and returns the class, configuration and state dict that compute
the same function. No original code is needed. Three identities are used: an embedding added to every token folds into
the word embeddings; a decoder's bias folds into its weight after a LayerNorm (`fold_decoder`); a constant divisor of
the global sum folds into the linear queries, whose own divisor is then `chunk_size`.
"""

from .detect import CONVERTERS, convert, detect_kind
from .files import read_state_dict, save_tokenizer
from .parts import Converted


__all__ = ["CONVERTERS", "Converted", "convert", "detect_kind", "read_state_dict", "save_tokenizer"]
