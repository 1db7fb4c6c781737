# SPDX-License-Identifier: Apache-2.0
"""What the tests share."""

from torch import Tensor

from scripts.benchmark.tiny import error_ratio, make_model, naive_config, random_ids, tiny_config


def assert_close(actual: Tensor, expected: Tensor, ratio: float, what: str = "result") -> None:
    """Fail unless shapes agree and the error ratio is at most `ratio`."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = error_ratio(actual, expected)
    assert error <= ratio, f"{what}: error ratio {error:.3g} exceeds {ratio:.3g}"


__all__ = ["assert_close", "error_ratio", "make_model", "naive_config", "random_ids", "tiny_config"]
