# SPDX-License-Identifier: Apache-2.0
"""Model cards, made of a checkpoint, a file of facts and a file of measured results; nothing else is filled in.

Facts are a JSON object, described in [`make_card`]. Results are a JSON list with one object per number, for example

    {"task": "text-generation", "dataset": "wikitext", "split": "test", "metric": "perplexity", "value": 21.5,
     "command": "python scripts/...", "machine": "1 x H200", "commit": "0123abc"}
"""

import json
import math
import os
import re
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from flash_hf.configuration_flash import FlashConfig, nearest
from flash_hf.hub import registered_classes


REQUIRED_FACTS = (
    "repo_id", "summary", "license", "language", "datasets", "training_data", "training", "intended_use", "limits",
)  # fmt: skip
OPTIONAL_FACTS = ("base_model", "example", "license_link", "license_name", "numbers", "picture", "tags")
SECTIONS = ("example", "numbers", "picture", "tags")  # optional, and not metadata of the Hub
MAX_NUMBERS = 6
RESULT_FIELDS = ("task", "dataset", "split", "metric", "value", "command", "machine", "commit")

# The Hub's names of tasks.
PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
PLACEHOLDER = re.compile(r"\b(TODO|TBD|FIXME)\b|(?i:more information needed|lorem ipsum|<your\b)|^\W*$")


def check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or PLACEHOLDER.search(value):
        raise ValueError(f"`{name}` must be a text without placeholders, got {value!r}.")


def check_facts(facts: dict) -> None:
    """Refuse facts that are missing, unknown or not yet written.

    Raises:
        ValueError: naming the fact.
    """
    for name in REQUIRED_FACTS:
        if name not in facts:
            raise ValueError(f"`facts` must have `{name}`, got only {', '.join(sorted(facts)) or 'nothing'}.")
    for name, value in facts.items():
        if name not in REQUIRED_FACTS + OPTIONAL_FACTS:
            valid = REQUIRED_FACTS + OPTIONAL_FACTS
            raise ValueError(f"`facts` must not have `{name}`; known are {', '.join(valid)}.{nearest(name, valid)}")
        if name == "numbers":
            continue  # see `shown_results`
        if name in ("datasets", "tags", "language") and isinstance(value, list):
            # Empty where no data set of the Hub was used; `training_data` then describes the text.
            if not value and name == "language":
                raise ValueError("`language` must name a language, got an empty list.")
            for entry in value:
                check_text(name, entry)
        else:
            check_text(name, value)
    languages = facts["language"] if isinstance(facts["language"], list) else [facts["language"]]
    for language in languages:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
            raise ValueError(f"`language` must be an ISO 639 code such as 'en', or 'multilingual', got {language!r}.")
    if not isinstance(facts["datasets"], list):
        raise ValueError(f"`datasets` must be a list of names on the Hub, empty if none, got {facts['datasets']!r}.")
    if not re.fullmatch(r"[a-z0-9.+-]+", facts["license"]):
        raise ValueError(f"`license` must be an identifier such as 'apache-2.0', got {facts['license']!r}.")
    if facts["license"] == "other" and not {"license_name", "license_link"} <= set(facts):
        raise ValueError("`license` 'other' must come with `license_name` and `license_link`.")


def check_results(results: list[dict]) -> None:
    """Refuse a number without its metric, data, command, machine and commit.

    Raises:
        ValueError: naming the entry and the field.
    """
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError(f"`results` must be a list of objects, got {type(results).__name__}.")
    for i, result in enumerate(results):
        if sorted(result) != sorted(RESULT_FIELDS):
            different = ", ".join(sorted(set(result) ^ set(RESULT_FIELDS)))
            raise ValueError(f"`results[{i}]` must have exactly {', '.join(RESULT_FIELDS)}; different: {different}.")
        for name, value in result.items():
            if name != "value":
                check_text(f"results[{i}].{name}", value)
                if "\n" in value or "|" in value or "`" in value:
                    raise ValueError(f"`results[{i}].{name}` must fit into a cell of a table, got {value!r}.")
        value = result["value"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"`results[{i}].value` must be a finite number, got {value!r}.")


def shown_results(facts: dict, results: list[dict]) -> list[dict]:
    """The results that the card shows, each with a `label`: those of `numbers`, or the first `MAX_NUMBERS`.

    Raises:
        ValueError: `numbers` is not a list of 1 to `MAX_NUMBERS` objects of `dataset`, `split`, `metric` and `label`,
            each the name of exactly one result.
    """
    if "numbers" not in facts:
        label = "{metric}, {dataset} ({split})"
        return [{**result, "label": label.format(**result)} for result in results[:MAX_NUMBERS]]
    numbers, keys = facts["numbers"], ("dataset", "split", "metric")
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= MAX_NUMBERS:
        raise ValueError(f"`numbers` must be a list of 1 to {MAX_NUMBERS} objects, got {numbers!r}.")
    shown = []
    for i, number in enumerate(numbers):
        if not isinstance(number, dict) or sorted(number) != sorted((*keys, "label")):
            raise ValueError(f"`numbers[{i}]` must have exactly dataset, split, metric and label, got {number!r}.")
        check_text(f"numbers[{i}].label", number["label"])
        found = [result for result in results if all(result[key] == number[key] for key in keys)]
        if len(found) != 1:
            raise ValueError(f"`numbers[{i}]` must name one result, but {number!r} names {len(found)}.")
        shown.append({**found[0], "label": number["label"]})
    return shown


def count_parameters(folder: Path) -> int:
    """Parameters in the weight files, read from their headers."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"`folder` must hold the weights, but there is no model*.safetensors in {folder}.")
    total = 0
    for file in files:
        with safe_open(file, "pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return total


def published(cards: Path) -> list[tuple[Path, Path, Path]]:
    """Folder, facts and results of each model in model_cards/; `facts/NAME.json` belongs to the folder NAME."""
    return [
        (cards / facts.stem, facts, cards / facts.stem / "results.json")
        for facts in sorted((cards / "facts").glob("*.json"))
    ]


def make_card(
    folder: str | os.PathLike,
    facts: dict,
    results: list[dict],
    template: str | os.PathLike,
    *,
    has_code: bool | None = None,
) -> ModelCard:
    """The card of a saved model.

    Args:
        folder: Where `save_pretrained` or `flash_hf.hub.save_with_code` saved it. Class, task and sizes are read from
            it, and whether it holds the code.
        facts: `repo_id`, `summary`, `license`, `language` (a code or a list), `datasets` (a list of names on the Hub),
            and the sections `training_data`, `training`, `intended_use` and `limits` in Markdown. Optional:
            `base_model`, `license_name`, `license_link`, `tags`, `numbers` (up to six objects of `dataset`, `split`,
            `metric` and `label`: the results that the card shows; the first six if left out), `example` (Markdown: an
            input and the model's output) and `picture` (a file of the folder: the training curve).
        results: Measured numbers, each with `task` (the Hub's name of the task), `dataset`, `split`, `metric`,
            `value`, `command`, `machine` and `commit`. With an empty list the card states that nothing was measured.
        template: model_cards/TEMPLATE.md of the repository, or another Jinja template.
        has_code: Whether the repository holds the code for `trust_remote_code`. By default as the folder does; True
            for a folder that will be pushed with its code.

    Raises:
        ValueError: a fact or a result is missing or wrong, or the folder lacks the weights or the picture.
        jinja2.UndefinedError: the template uses an unknown name.
    """
    check_facts(facts)
    check_results(results)
    shown = shown_results(facts, results)
    folder = Path(folder)
    config = FlashConfig.from_pretrained(folder)
    architecture = (config.architectures or ["nothing"])[0]
    auto_classes = {cls.__name__: name for name, cls in registered_classes().items() if name != "AutoConfig"}
    if architecture not in auto_classes:
        raise ValueError(f"`folder` must hold one of {', '.join(sorted(auto_classes))}, got {architecture}.")
    auto_class = auto_classes[architecture]
    name = facts["repo_id"].split("/")[-1]
    optional = {key: facts[key] for key in OPTIONAL_FACTS if key in facts and key not in SECTIONS}
    picture = facts.get("picture")
    if picture is not None and not (folder / picture).is_file():
        raise ValueError(f"`picture` must be a file of {folder}, and {picture!r} is not there.")
    if has_code is None:
        has_code = "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    data = ModelCardData(
        model_name=name,
        license=facts["license"],
        language=facts["language"],
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[auto_class],
        tags=[FlashConfig.model_type, "flash", "gated-attention-unit", "linear-attention", *facts.get("tags", [])],
        datasets=facts["datasets"] or None,
        eval_results=[
            EvalResult(
                task_type=result["task"],
                dataset_type=result["dataset"],
                dataset_name=result["dataset"],
                dataset_split=result["split"],
                metric_type=result["metric"],
                metric_value=result["value"],
            )
            for result in shown
        ]
        or None,
        **optional,
    )
    # Not ModelCard.from_template, which renders an unknown name of the template as nothing.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(Path(template).read_text(encoding="utf-8")).render(
        **{key: facts[key] for key in REQUIRED_FACTS},
        card_data=data.to_yaml(),
        model_name=name,
        architecture=architecture,
        auto_class=auto_class,
        parameters=f"{count_parameters(folder):,}",
        config=config,
        has_code=has_code,
        pipeline_tag=PIPELINE_TAGS[auto_class],
        shown=shown,
        example=facts.get("example"),
        picture=picture,
    )
    return ModelCard(text)


__all__ = ["check_facts", "check_results", "make_card", "published", "shown_results"]
