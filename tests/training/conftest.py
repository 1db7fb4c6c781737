# SPDX-License-Identifier: Apache-2.0
"""What the tests of training share."""

import pytest

from helpers import TEXT


@pytest.fixture(scope="session")
def tokenizer():
    """400 tokens, trained on a third of the book."""
    from flash_hf.training.tokenizer import train_tokenizer  # needs datasets, and test_graphs.py does not

    return train_tokenizer([{"text": TEXT[:60_000]}], 400)
