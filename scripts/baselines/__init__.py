# SPDX-License-Identifier: Apache-2.0
"""The paper's baselines, with the interface of FLASH. Importing this registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .gau import GAUConfig, GAUForCausalLM, GAUForMaskedLM, GAUModel
from .presets import BASELINES, baseline_config, matched_config
from .transformer import (
    TransformerPPConfig,
    TransformerPPForCausalLM,
    TransformerPPForMaskedLM,
    TransformerPPForQuestionAnswering,
    TransformerPPForSequenceClassification,
    TransformerPPForTokenClassification,
    TransformerPPModel,
)


AUTO_CLASSES = {
    AutoModel: TransformerPPModel,
    AutoModelForCausalLM: TransformerPPForCausalLM,
    AutoModelForMaskedLM: TransformerPPForMaskedLM,
    AutoModelForQuestionAnswering: TransformerPPForQuestionAnswering,
    AutoModelForSequenceClassification: TransformerPPForSequenceClassification,
    AutoModelForTokenClassification: TransformerPPForTokenClassification,
}

GAU_CLASSES = {AutoModel: GAUModel, AutoModelForCausalLM: GAUForCausalLM, AutoModelForMaskedLM: GAUForMaskedLM}

AutoConfig.register(TransformerPPConfig.model_type, TransformerPPConfig, exist_ok=True)
AutoConfig.register(GAUConfig.model_type, GAUConfig, exist_ok=True)
for _auto, _model in GAU_CLASSES.items():
    _auto.register(GAUConfig, _model, exist_ok=True)
for _auto, _model in AUTO_CLASSES.items():
    _auto.register(TransformerPPConfig, _model, exist_ok=True)

__all__ = [
    "AUTO_CLASSES", "BASELINES", "GAUConfig", "GAUForCausalLM", "GAUForMaskedLM", "GAUModel",
    "TransformerPPConfig", "baseline_config", "matched_config",
    *(model.__name__ for model in AUTO_CLASSES.values()),
]  # fmt: skip
