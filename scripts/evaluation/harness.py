# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on the tasks of a folder, without network."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, *, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Run the tasks of a folder with lm-evaluation-harness.

    Args:
        folder: Tasks (`.yaml`), as for `--include_path` of the harness.
        limit: Use the first questions of each task only.

    Returns:
        The metrics of each task and their standard errors, by their names in the harness.

    Raises:
        ImportError: the harness is not installed.
        ValueError: no task in the folder.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('lm-eval-harness is missing: pip install "flash-hf[eval]".') from error
    if not any(Path(folder).glob("*.yaml")):
        raise ValueError(f"folder must hold tasks in .yaml files, but {folder} holds none.")
    manager = TaskManager(include_path=str(Path(folder).resolve()), include_defaults=False)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, add_bos_token=True)
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=manager.all_tasks, task_manager=manager, limit=limit, bootstrap_iters=1000,
        random_seed=0, numpy_random_seed=0, torch_random_seed=0,
    )  # fmt: skip
    scores = {}
    for task, metrics in found["results"].items():
        names = {name: name.removesuffix(",none").replace("_stderr", ", standard error") for name in metrics}
        numbers = {names[name]: value for name, value in metrics.items() if name != "alias"}
        scores[task] = {name: value for name, value in numbers.items() if isinstance(value, float)}
    return scores


__all__ = ["run_lm_eval"]
