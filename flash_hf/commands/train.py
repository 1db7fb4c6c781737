# SPDX-License-Identifier: Apache-2.0
"""Train a causal or a masked FLASH on text, or go on training one (--model); --max_steps 20 makes it short."""


def train(kind: str) -> None:
    """Train as the command line says.

    Args:
        kind: `"causal"` or `"masked"`.
    """
    from ..training import describe, parse_arguments, run_training

    print(describe(kind, run_training(kind, *parse_arguments(description=__doc__))))


def train_clm() -> None:
    train("causal")


def train_mlm() -> None:
    train("masked")
