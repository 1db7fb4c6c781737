# SPDX-License-Identifier: Apache-2.0
"""FLASH ("Transformer Quality in Linear Time", arXiv 2202.10447) for Hugging Face Transformers.

Importing this package registers its classes with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
`AutoModelForMaskedLM` under the model type `"flash_gau"`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .configuration_flash import FlashConfig
from .modeling_flash import FlashForCausalLM, FlashForMaskedLM, FlashModel, FlashPreTrainedModel


__version__ = "0.1.0"

AutoConfig.register(FlashConfig.model_type, FlashConfig, exist_ok=True)
AutoModel.register(FlashConfig, FlashModel, exist_ok=True)
AutoModelForCausalLM.register(FlashConfig, FlashForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(FlashConfig, FlashForMaskedLM, exist_ok=True)

__all__ = ["FlashConfig", "FlashForCausalLM", "FlashForMaskedLM", "FlashModel", "FlashPreTrainedModel", "__version__"]
