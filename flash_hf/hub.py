# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that carry their code: they load with `trust_remote_code=True` where flash_hf is not installed.

`save_pretrained` and `push_to_hub` write configuration and weights alone, which is all that users of the package need.
The functions here add the model's source files and the `auto_map` that leads every Auto class to them.
"""

import json
import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto import modeling_auto

from .configuration_flash import FlashConfig
from .modeling_flash import FlashPreTrainedModel


# What a push replaces. Weights of another layout must not stay behind: transformers prefers one file to shards, so an
# old model.safetensors would win over new shards. Only at the root: a Trainer's checkpoint folders are not touched.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def registered_classes() -> dict[str, type]:
    """`{"AutoConfig": FlashConfig, "AutoModel": FlashModel, ...}`: what flash_hf has registered with transformers."""
    classes = {"AutoConfig": FlashConfig}
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None) if isinstance(auto_class, type) else None
        # A user may have registered a class of their own, which is not in the files that are copied.
        if mapping is not None and FlashConfig in mapping and mapping[FlashConfig].__module__.startswith(__package__):
            classes[auto_class.__name__] = mapping[FlashConfig]
    return classes


def add_code(folder: str | os.PathLike) -> list[Path]:
    """Make a saved FLASH checkpoint, for example a Trainer's output, loadable without the package.

    Args:
        folder: A folder with the `config.json` of a FLASH model; any head.

    Returns:
        The source files written, flat beside `config.json`, whose `auto_map` names a class for each Auto class.

    Raises:
        ValueError: the folder holds no `config.json`, or one of another model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"`folder` must hold a saved model, but {path} does not exist. Call save_pretrained first.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != FlashConfig.model_type:
        raise ValueError(
            f"`folder` must hold a model of type {FlashConfig.model_type!r}, got {config.get('model_type')!r} in "
            f"{path}. Save the FLASH model itself there, not an adapter or another model."
        )
    # Not register_for_auto_class: it would mark the classes as remote code for the rest of the process.
    classes = registered_classes()
    written = {file for cls in classes.values() for file in custom_object_save(cls, folder)}
    config["auto_map"] = {name: f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for name, cls in classes.items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sorted(written)


def pad_on_the_left(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `tokenizer` pad on the left, as generate() needs it, and save that with it."""
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # `save_pretrained` writes what the tokenizer was made from


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The smallest `vocab_size` of a model that takes all ids of a tokenizer: the highest one, and 1.

    `len(tokenizer)` counts the tokens. It is less where ids are left unused, as some tokenizers do.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def save_with_code(
    model: FlashPreTrainedModel,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **save_options,
) -> list[Path]:
    """`save_pretrained` of model and tokenizer, and the code to load them without the package.

    Args:
        model: A FLASH model with any head.
        folder: Where to save. `AutoModelFor...from_pretrained(folder, trust_remote_code=True)` works there for every
            Auto class of the package, whatever head was saved: a missing head is new, as usual.
        tokenizer: Saved beside the model, if given.
        save_options: Passed to `model.save_pretrained`, for example `max_shard_size`.

    Returns:
        The source files written.

    Raises:
        ValueError: `model` is not an instance of one of the package's registered classes.
    """
    classes = list(registered_classes().values())[1:]
    if type(model) not in classes:
        # A subclass, an adapter or a wrapper is not in the files that are copied.
        names = ", ".join(sorted(cls.__name__ for cls in classes))
        raise ValueError(
            f"`model` must be one of {names}, got {type(model).__name__}. Unwrap a compiled or parallel model, and "
            "merge an adapter (merge_and_unload), first."
        )
    model.save_pretrained(folder, **save_options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return add_code(folder)


def push_with_code(
    model: FlashPreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    card: ModelCard | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload FLASH model with its code",
    **save_options,
) -> CommitInfo:
    """Push model, tokenizer, code and card to the Hub in one commit, so that nobody can load half of it.

    Weights of an earlier push that this one does not overwrite (another number of shards) are deleted in the same
    commit. Load with `trust_remote_code=True`, best with a fixed `revision`: the returned commit's `oid`.

    Args:
        model, tokenizer, save_options: as for `save_with_code`.
        repo_id: `"namespace/name"`, created if need be.
        card: Written as README.md, if given (scripts/cards of the repository makes one).
        private: Whether a new repository is private. Ignored for one that exists.
        revision: Branch to push to, created if need be. The main branch by default.
        create_pr: Open a pull request instead of pushing.
        token: A token with write permission. The saved one, or `HF_TOKEN`, by default.
        commit_message: First line of the commit.

    Raises:
        ValueError: as `save_with_code`.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, for example a read-only token.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_with_code(model, folder, tokenizer, **save_options)
        if card is not None:
            card.save(Path(folder) / "README.md")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = sorted(Path(folder).iterdir())
        operations = [CommitOperationAdd(path.name, path) for path in files]
        old = {name for name in api.list_repo_files(repo_id, revision=revision) if WEIGHTS.fullmatch(name)}
        operations += [CommitOperationDelete(name) for name in sorted(old - {path.name for path in files})]
        # Not upload_folder: with hf_xet it commits in parts when the upload takes long.
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
