# SPDX-License-Identifier: Apache-2.0
"""Commands (files) and packages for `python -m scripts.NAME` (folders); flash_hf imports none of them."""
