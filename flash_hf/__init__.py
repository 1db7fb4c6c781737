# SPDX-License-Identifier: Apache-2.0
"""FLASH ("Transformer Quality in Linear Time", arXiv 2202.10447) for Hugging Face Transformers.

Importing this package registers its classes with the Auto classes of transformers under the model type `"flash_gau"`.
"""

import transformers

from .configuration_flash import FlashConfig
from .hub import push_with_code, save_with_code
from .modeling_flash import (
    FlashForCausalLM,
    FlashForMaskedLM,
    FlashForMultipleChoice,
    FlashForQuestionAnswering,
    FlashForSequenceClassification,
    FlashForTokenClassification,
    FlashModel,
    FlashPreTrainedModel,
)


__version__ = "0.1.0"

# For peft.LoraConfig(target_modules=...): every projection of the gated attention unit (gate_proj only with
# global_state="delta").
LORA_TARGET_MODULES = ["u_proj", "v_proj", "z_proj", "o_proj", "gate_proj"]

AUTO_CLASSES = {
    transformers.AutoModel: FlashModel,
    transformers.AutoModelForCausalLM: FlashForCausalLM,
    transformers.AutoModelForMaskedLM: FlashForMaskedLM,
    transformers.AutoModelForMultipleChoice: FlashForMultipleChoice,
    transformers.AutoModelForQuestionAnswering: FlashForQuestionAnswering,
    transformers.AutoModelForSequenceClassification: FlashForSequenceClassification,
    transformers.AutoModelForTokenClassification: FlashForTokenClassification,
}

transformers.AutoConfig.register(FlashConfig.model_type, FlashConfig, exist_ok=True)
for _auto, _model in AUTO_CLASSES.items():
    _auto.register(FlashConfig, _model, exist_ok=True)

__all__ = [
    "AUTO_CLASSES", "FlashConfig", "FlashForCausalLM", "FlashForMaskedLM", "FlashForMultipleChoice",
    "FlashForQuestionAnswering", "FlashForSequenceClassification", "FlashForTokenClassification", "FlashModel",
    "FlashPreTrainedModel", "LORA_TARGET_MODULES", "__version__", "push_with_code", "save_with_code",
]  # fmt: skip
