# SPDX-License-Identifier: Apache-2.0
"""vLLM on a CPU: read from the environment when it is imported."""

import os


os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
    VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING",
)  # fmt: skip
