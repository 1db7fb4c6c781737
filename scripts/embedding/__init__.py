# SPDX-License-Identifier: Apache-2.0
"""Embeddings with sentence-transformers: fine-tuning, search in books, and speed."""
