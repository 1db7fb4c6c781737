# SPDX-License-Identifier: Apache-2.0
"""Evaluation of causal and masked language models: `python -m scripts.evaluation`, and `.book`."""
