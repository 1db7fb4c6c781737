# SPDX-License-Identifier: Apache-2.0
"""The metrics of fine-tuning as modules of the `evaluate` library, here because `evaluate.load("accuracy")` downloads.

Each file stands alone, so that `evaluate.load("flash_hf/metrics/span_f1.py")` works too.
"""

from .accuracy import Accuracy
from .macro_f1 import MacroF1
from .span_f1 import SpanF1
from .squad import Squad


__all__ = ["Accuracy", "MacroF1", "SpanF1", "Squad"]
