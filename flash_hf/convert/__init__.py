# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other FLASH implementations (JunnYu, lucidrains) as flash_hf configurations and weights."""

from .detect import CONVERTERS, convert, detect_kind
from .files import read_state_dict, read_tensors, save_tokenizer
from .parts import Converted


__all__ = ["CONVERTERS", "Converted", "convert", "detect_kind", "read_state_dict", "read_tensors", "save_tokenizer"]
