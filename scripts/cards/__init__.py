# SPDX-License-Identifier: Apache-2.0
"""Model cards: `python -m scripts.cards`."""
