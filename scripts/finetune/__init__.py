# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on labelled files: `python -m scripts.finetune`."""
