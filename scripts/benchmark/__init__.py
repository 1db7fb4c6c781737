# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of FLASH and its peers: `python -m scripts.benchmark`, `.backends`, `.profile`."""
