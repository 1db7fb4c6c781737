# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM that FLASH lacks, and checkpoints without a constant state: refused before anything is loaded."""

from __future__ import annotations

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import MambaModelConfig


class FlashChecks(MambaModelConfig):
    """vLLM's settings for models with a state of constant size, after FLASH's checks."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse (ValueError) checkpoints that do not decode in constant memory."""
        config, architecture = model_config.hf_config, model_config.architecture
        if architecture != "FlashForCausalLM" or model_config.runner_type != "generate":
            raise ValueError(
                f"FLASH in vLLM generates text with FlashForCausalLM, got the architecture {architecture} with "
                f"runner={model_config.runner_type!r}: run other heads and embeddings in transformers."
            )
        if config.attention_type == "quadratic":
            raise ValueError(
                "FLASH in vLLM needs a state of constant size, but attention_type='quadratic' (FLASH-Quad) keeps the "
                "keys and values of all tokens: use generate(), or a model with attention_type='mixed_chunk'."
            )
        if model_config.quantization is not None:
            raise ValueError(
                f"FLASH in vLLM has no quantised weights, got quantization={model_config.quantization!r}: serve the "
                "checkpoint in bfloat16."
            )

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse (ValueError) features of the engine that FLASH lacks."""
        parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
        refused = {
            "prefix caching (--enable-prefix-caching)": cache.enable_prefix_caching,
            "quantised cache (--kv-cache-dtype)": cache.cache_dtype != "auto",
            "speculative decoding (--speculative-config)": vllm_config.speculative_config,
            "LoRA adapters (--enable-lora; merge them with PEFT's merge_and_unload)": vllm_config.lora_config,
            "tensor parallelism": parallel.tensor_parallel_size > 1,
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "transfer of states between engines (--kv-transfer-config)": vllm_config.kv_transfer_config,
        }
        for feature, requested in refused.items():
            if requested:
                raise ValueError(f"FLASH in vLLM has no {feature}: leave it out.")
        super().verify_and_update_config(vllm_config)
