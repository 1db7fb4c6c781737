# SPDX-License-Identifier: Apache-2.0
"""The study: FLASH against its peers at equal parameters, tokens and effort of tuning."""
