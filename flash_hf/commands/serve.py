# SPDX-License-Identifier: Apache-2.0
"""Serve a causal model with an OpenAI-compatible API: `transformers serve` with FLASH's classes registered."""

import transformers

from .. import AUTO_CLASSES
from .options import program_name


def main() -> None:
    import typer  # comes with transformers
    from transformers.cli.serve import Serve

    for model in AUTO_CLASSES.values():  # where the server looks up the class of a checkpoint
        setattr(transformers, model.__name__, model)
    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    app(prog_name=program_name())
