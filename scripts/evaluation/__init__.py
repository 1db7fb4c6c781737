# SPDX-License-Identifier: Apache-2.0
"""Measures of any causal or masked model: `python -m scripts.evaluation`, `python -m scripts.evaluation.book`."""
