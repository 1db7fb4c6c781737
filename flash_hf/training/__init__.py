# SPDX-License-Identifier: Apache-2.0
"""Training of causal and masked language models on the Trainer of transformers; needs `pip install 'flash-hf[train]'`.

A name is imported with its file when it is first used, so that what needs torch alone (`GraphedBackward`) works
without the extra.
"""

from importlib import import_module


FILES = {
    "arguments": ("DataArguments", "FlashTrainingArguments", "ModelArguments"),
    "budget": ("TimeBudget",),
    "documents": ("load_documents", "split_documents"),
    "graphs": ("GraphedBackward",),
    "metrics": ("make_compute_metrics", "token_scores"),
    "packing": ("MaskingCollator", "collate", "pack_documents"),
    "run": ("build_trainer", "describe", "run_training"),
    "stream": ("BlockStream",),
    "throughput": ("training_flops",),
    "tokenizer": ("load_tokenizer", "tokenize_documents", "train_tokenizer"),
    "trainer": ("FlashTrainer", "LossPlotCallback"),
}
FILE_OF = {name: file for file, names in FILES.items() for name in names}


def __getattr__(name: str):
    if name not in FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{FILE_OF[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{__name__}.{name} needs {error.name.partition('.')[0]}: pip install 'flash-hf[train]'"
        ) from error


__all__ = sorted(FILE_OF)
