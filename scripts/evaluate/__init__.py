# SPDX-License-Identifier: Apache-2.0
"""Measures of any causal or masked model: `python -m scripts.evaluate`, `python -m scripts.evaluate.book`."""
