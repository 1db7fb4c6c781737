# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that carry their code: they load with `trust_remote_code=True` where flash_hf is not installed.

`save_pretrained` and `push_to_hub` only write configuration and weights, which is all that users of the package need.
The functions here add the model's source files, and the `auto_map` that points every Auto class to them.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto import modeling_auto

from .configuration_flash import FlashConfig
from .modeling_flash import FlashForMaskedLM, FlashModel, FlashPreTrainedModel


def replaced_weights(variant: str | None) -> re.Pattern[str]:
    """Names of the weights that a push of `variant` replaces: transformers prefers one file to shards, so an old
    model.safetensors would win over new shards. Other variants, and checkpoint folders of a Trainer, stay."""
    mark = "" if variant is None else rf"\.{re.escape(variant)}"
    return re.compile(rf"model{mark}(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index{mark}\.json")


def registered_classes() -> dict[str, type]:
    """`{"AutoConfig": FlashConfig, "AutoModel": FlashModel, ...}`: the classes registered with transformers."""
    classes = {"AutoConfig": FlashConfig}
    for auto_class in vars(modeling_auto).values():
        mapping = getattr(auto_class, "_model_mapping", None) if isinstance(auto_class, type) else None
        # A class that a user has registered is not in the files that are copied.
        if mapping is not None and FlashConfig in mapping and mapping[FlashConfig].__module__.startswith(__package__):
            classes[auto_class.__name__] = mapping[FlashConfig]
    return classes


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The `config.json` of a saved FLASH model with any head; ValueError for another folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"`folder` must hold a saved model, but {path} does not exist. Call save_pretrained first.")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != FlashConfig.model_type:
        raise ValueError(
            f"`folder` must hold a model of type {FlashConfig.model_type!r}, got {config.get('model_type')!r} in "
            f"{path}. Save the FLASH model itself there, not an adapter or another model."
        )
    return config


def write_json(path: Path, value: dict | list) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_code(folder: str | os.PathLike) -> list[Path]:
    """Make a saved FLASH checkpoint, for example a Trainer's output, loadable without the package.

    Args:
        folder: A folder with the `config.json` of a FLASH model with any head.

    Returns:
        The source files, written beside `config.json`, whose `auto_map` names a class for each Auto class.

    Raises:
        ValueError: the folder holds no `config.json`, or one of another model.
    """
    config = read_config(folder)
    # Not register_for_auto_class: it would mark the classes as remote code for the rest of the process.
    classes = registered_classes()
    written = {file for cls in classes.values() for file in custom_object_save(cls, folder)}
    config["auto_map"] = {name: f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for name, cls in classes.items()}
    write_json(Path(folder) / "config.json", config)
    return sorted(written)


def add_mean_pooling(folder: str | os.PathLike, max_seq_length: int | None = None) -> None:
    """Turn a saved FLASH checkpoint with a tokenizer into a sentence-transformers model: `SentenceTransformer(folder)`
    then embeds a text as the mean over its tokens, `[hidden_size]`.

    Args:
        folder: A folder with the `config.json` of a FLASH model with any head.
        max_seq_length: Tokens to which longer texts are truncated; by default the training length,
            `config.max_position_embeddings`. FLASH takes any length.

    Raises:
        ValueError: as `add_code`.
    """
    config = read_config(folder)
    # Names that sentence-transformers 5 and 6 read.
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (path, name) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
    ]
    write_json(Path(folder) / "modules.json", modules)
    pooling = {"word_embedding_dimension": config["hidden_size"], "pooling_mode_mean_tokens": True}
    write_json(Path(folder) / "1_Pooling" / "config.json", pooling)
    length = config["max_position_embeddings"] if max_seq_length is None else max_seq_length
    write_json(Path(folder) / "sentence_bert_config.json", {"max_seq_length": length})


def pad_on_the_left(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `tokenizer` pad on the left, as generate() needs, also when it is saved and loaded."""
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # written by `save_pretrained`


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The smallest `vocab_size` that a model needs for a tokenizer: its highest id plus 1, which is more than
    `len(tokenizer)` if some ids are unused."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def save_with_code(
    model: FlashPreTrainedModel,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **save_options,
) -> list[Path]:
    """`save_pretrained` of model and tokenizer, with the code to load them without the package. A bidirectional model,
    with its masked head or none, also becomes a model of sentence-transformers ([`add_mean_pooling`]).

    Args:
        model: A FLASH model with any head.
        folder: Where to save. `from_pretrained(folder, trust_remote_code=True)` then works for every Auto class of the
            package; a head that was not saved is new, as usual.
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
        if isinstance(model, (FlashModel, FlashForMaskedLM)) and not model.config.is_decoder:
            add_mean_pooling(folder)
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
    """Push model, tokenizer, code and card to the Hub in one commit, which also deletes an earlier push's weights (of
    the same `variant`) with another number of shards. Load with `trust_remote_code=True`, preferably with the `oid`
    of the returned commit as `revision`.

    Args:
        model, tokenizer, save_options: as for `save_with_code`.
        repo_id: `"namespace/name"`, created if needed.
        card: Written as README.md; scripts/cards in the repository makes one.
        private: Whether a new repository is private. Ignored for one that exists.
        revision: Branch to push to, created if needed. The main branch by default.
        create_pr: Open a pull request instead of pushing.
        token: A token with write permission; by default `HF_TOKEN` or the saved one.
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
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        weights = replaced_weights(save_options.get("variant"))
        old = {name for name in api.list_repo_files(repo_id, revision=revision) if weights.fullmatch(name)}
        operations += [CommitOperationDelete(name) for name in sorted(old - files.keys())]
        # Not upload_folder, which with hf_xet splits a long upload into several commits.
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
