# SPDX-License-Identifier: Apache-2.0
"""A card holds what is known and measured, in metadata that the Hub's client reads back; else it is refused."""

import copy
import json
import math
import re
import runpy
import shutil
from dataclasses import fields
from pathlib import Path

import jinja2
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import flash_hf
from flash_hf import FlashConfig, FlashForCausalLM, FlashForSequenceClassification
from flash_hf.hub import add_code, registered_classes
from flash_hf.training.tokenizer import CHAT_TEMPLATE
from helpers import DATA, ROOT, run_here, run_python, tiny_config
from scripts.cards.card import PIPELINE_TAGS, check_facts, check_results, make_card, published, shown_results
from scripts.study.pretrain import Pretraining


TEMPLATE = ROOT / "model_cards" / "TEMPLATE.md"
FACTS = json.loads((DATA / "card_facts.json").read_text(encoding="utf-8"))
RESULTS = json.loads((DATA / "card_results.json").read_text(encoding="utf-8"))
NUMBERS = [{"dataset": "wizard-of-oz", "split": "validation", "metric": "accuracy", "label": "share of right tokens"}]
PUBLISHED = {folder.name: (folder, facts, results) for folder, facts, results in published(ROOT / "model_cards")}


@pytest.fixture
def folder(tmp_path):
    FlashForCausalLM(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def test_the_script_writes_a_card_with_everything(folder):
    facts, results = DATA / "card_facts.json", DATA / "card_results.json"
    run_here("-m", "scripts.cards", "--folder", folder, "--facts", facts, "--results", results)
    card = ModelCard.load(folder / "README.md")
    for text in FACTS.values():
        assert str(text) in card.content or text == []
    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")][2:]
    assert rows == [[f"{r['metric']}, {r['dataset']} ({r['split']})", f"{r['value']:.4g}"] for r in RESULTS]
    parameters = sum(weight.numel() for weight in FlashForCausalLM(tiny_config()).parameters())
    assert f"{parameters:,} parameters" in card.text and "(results.json)" in card.text
    assert "2202.10447" in card.text and "Hua, Weizhe" in card.text
    assert not re.search(r"{{|{%|}}|None|Undefined|\[\]|TODO|More Information", card.content)


def test_the_metadata_reads_back(folder):
    card = make_card(folder, {**FACTS, "datasets": ["wikitext"], "language": ["en", "de"]}, RESULTS, TEMPLATE)
    data = ModelCard(str(card)).data
    assert (data.license, data.language, data.datasets) == ("apache-2.0", ["en", "de"], ["wikitext"])
    assert (data.library_name, data.pipeline_tag, data.model_name) == (
        "transformers",
        "text-generation",
        "flash-example",
    )
    assert "flash_gau" in data.tags and len(set(data.tags)) == len(data.tags)
    keys = ("task_type", "dataset_type", "dataset_name", "dataset_split", "metric_type", "metric_value")
    found = [tuple(getattr(result, key) for key in keys) for result in data.eval_results]
    assert found == [(r["task"], r["dataset"], r["dataset"], r["split"], r["metric"], r["value"]) for r in RESULTS]
    # The block is YAML by itself, and what the client makes of it is the same block again.
    block = yaml.safe_load(str(card).split("---\n")[1])
    assert ModelCardData(**copy.deepcopy(block)).to_dict() == block
    assert len(block["model-index"][0]["results"]) == 2


def test_code_is_promised_only_where_it_is(folder):
    plain = make_card(folder, FACTS, [], TEMPLATE)
    assert "it runs this repository's code" not in plain.text and "holds no code" in plain.text
    assert plain.data.eval_results is None and "Nothing has been measured." in plain.text
    add_code(folder)
    coded = make_card(folder, FACTS, [], TEMPLATE)
    assert "`trust_remote_code=True`: it runs this repository's code" in coded.text and "`revision`" in coded.text


@pytest.mark.parametrize("name", PIPELINE_TAGS)
def test_every_head_has_a_task(name, tmp_path):
    classes = registered_classes()
    assert set(PIPELINE_TAGS) == set(classes) - {"AutoConfig"}
    classes[name](tiny_config()).save_pretrained(tmp_path)
    card = make_card(tmp_path, FACTS, RESULTS, TEMPLATE)
    assert card.data.pipeline_tag == PIPELINE_TAGS[name]
    pipelines = {"AutoModelForCausalLM": '"text-generation"', "AutoModelForMaskedLM": '"fill-mask"'}
    assert pipelines.get(name, f"import AutoTokenizer, {name}\n") in card.text


@pytest.mark.parametrize("name", ["causal", "masked", "classifier"])
def test_the_code_of_a_card_runs(name, tmp_path, capsys):
    """With a folder in place of the name on the Hub."""
    if name == "classifier":
        FlashForSequenceClassification(tiny_config()).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(PUBLISHED["flash-30m-masked"][0]).save_pretrained(tmp_path)
        folder, facts = tmp_path, FACTS
    else:
        folder = PUBLISHED[f"flash-30m-{name}"][0]
        facts = json.loads(PUBLISHED[folder.name][1].read_text(encoding="utf-8"))
    text = make_card(folder, {**facts, "numbers": NUMBERS} if "numbers" in facts else facts, RESULTS, TEMPLATE).text
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace(facts["repo_id"], str(folder))
    names = {}
    exec(code, names)
    printed = capsys.readouterr().out
    if name == "classifier":
        assert type(names["model"]) is FlashForSequenceClassification
    else:
        assert printed.startswith("It was a cold evening" if name == "causal" else "She opened the door")


def test_a_card_shows_the_chosen_numbers_alone(folder):
    card = make_card(folder, {**FACTS, "numbers": NUMBERS}, RESULTS, TEMPLATE)
    assert "| share of right tokens | 0.01562 |" in card.text and "123" not in card.content
    assert [result.metric_value for result in ModelCard(str(card)).data.eval_results] == [0.015625]
    many = [{**RESULTS[0], "metric": f"metric {i}"} for i in range(9)]
    assert len(shown_results(FACTS, many)) == 6


@pytest.mark.parametrize(
    "numbers, words",
    [
        ([], "must be a list of 1 to 6"),
        ("accuracy", "must be a list of 1 to 6"),
        ([NUMBERS[0]] * 7, "must be a list of 1 to 6"),
        ([{**NUMBERS[0], "unit": "%"}], r"`numbers\[0\]` must have exactly dataset, split, metric and label"),
        ([{**NUMBERS[0], "label": "TODO"}], r"`numbers\[0\].label` must be a text"),
        ([{**NUMBERS[0], "metric": "accurracy"}], "must name one result, but .* names 0"),
    ],
)
def test_wrong_numbers_are_refused(numbers, words, folder):
    with pytest.raises(ValueError, match=words):
        make_card(folder, {**FACTS, "numbers": numbers}, RESULTS, TEMPLATE)


@pytest.mark.parametrize("name", FACTS)
def test_a_missing_or_unwritten_fact_is_refused(name, folder):
    facts = {key: value for key, value in FACTS.items() if key != name}
    with pytest.raises(ValueError, match=f"`facts` must have `{name}`"):
        make_card(folder, facts, RESULTS, TEMPLATE)
    for unwritten in ("", " ", "TODO", "[More Information Needed]", "<Your text>", None, 3):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            make_card(folder, {**FACTS, name: unwritten}, RESULTS, TEMPLATE)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"licence": "mit"}, "must not have `licence`.*Did you mean 'license'"),
        ({"language": "English"}, "`language` must be an ISO 639 code.*'English'"),
        ({"language": []}, "`language` must name a language"),
        ({"license": "Apache 2.0"}, "`license` must be an identifier.*'Apache 2.0'"),
        ({"license": "other"}, "`license` 'other' must come with `license_name`"),
        ({"datasets": "wikitext"}, "`datasets` must be a list"),
        ({"datasets": ["TODO"]}, "`datasets` must be a text"),
    ],
)
def test_wrong_facts_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        check_facts({**FACTS, **changes})
    check_facts({**FACTS, "license": "other", "license_name": "own", "license_link": "https://example.org"})


@pytest.mark.parametrize("field", RESULTS[0])
def test_a_result_without_a_field_is_refused(field):
    with pytest.raises(ValueError, match=rf"`results\[0\]` must have exactly.*different: {field}\."):
        check_results([{key: value for key, value in RESULTS[0].items() if key != field}])
    with pytest.raises(ValueError, match=rf"`results\[0\].{field}` must be"):
        check_results([{**RESULTS[0], field: "TBD"}])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.9", None, True])
def test_a_value_is_a_number(value):
    with pytest.raises(ValueError, match=r"`results\[1\].value` must be a finite number"):
        check_results([RESULTS[0], {**RESULTS[0], "value": value}])


def test_other_mistakes_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="`results` must be a list of objects, got dict"):
        make_card(folder, FACTS, {"metrics": {}}, TEMPLATE)
    with pytest.raises(ValueError, match=r"`results\[0\].command` must fit into a cell"):
        check_results([{**RESULTS[0], "command": "python a.py | tee log"}])
    (tmp_path / "template.md").write_text("---\n{{ card_data }}\n---\n{{ nobody_knows }}\n", encoding="utf-8")
    with pytest.raises(jinja2.UndefinedError, match="nobody_knows"):
        make_card(folder, FACTS, RESULTS, tmp_path / "template.md")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="`folder` must hold the weights"):
        make_card(folder, FACTS, RESULTS, TEMPLATE)


def test_a_picture_must_be_there(folder):
    with pytest.raises(ValueError, match="`picture` must be a file of .*'curve.png' is not there"):
        make_card(folder, {**FACTS, "picture": "curve.png"}, RESULTS, TEMPLATE)
    (folder / "curve.png").write_bytes(b"")
    card = make_card(folder, {**FACTS, "picture": "curve.png", "example": "It wrote: *once*"}, RESULTS, TEMPLATE)
    assert "](curve.png)" in card.text and "## Example\n\nIt wrote: *once*" in card.text
    assert "picture" not in card.data.to_dict() and "example" not in card.data.to_dict()


# --- the checkpoints of this repository: each folder is what a Hub repository holds ----------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_folder_is_up_to_date(name):
    """The card is made from its facts and results by `make cards`; the code is added by a push, not kept here."""
    folder, facts, results = (
        PUBLISHED[name][0],
        *(json.loads(path.read_text(encoding="utf-8")) for path in PUBLISHED[name][1:]),
    )
    card = make_card(folder, facts, results, TEMPLATE, has_code=True)
    assert len(card.text.splitlines()) <= 90 and 5 <= len(shown_results(facts, results)) <= 6
    assert card.content == (folder / "README.md").read_text(encoding="utf-8"), "make cards"
    assert not list(folder.glob("*.py")) and "auto_map" not in json.loads(
        (folder / "config.json").read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_small_and_measured(name):
    folder, _, results = PUBLISHED[name]
    weights = folder / "model.safetensors"
    assert weights.stat().st_size < 2**26
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}
    # What the results tell of the training is what it logged, near the end of its curve: that is of other passages.
    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    last, rows = log["runs"][-1], json.loads(results.read_text(encoding="utf-8"))
    rows = [row for row in rows if "scripts.study.pretrain" in row["command"]]
    assert rows == log["results"]
    found = {row["metric"]: row["value"] for row in rows if row["dataset"] != "wiki_valid"}
    assert {"perplexity"} < set(found) and last["commit"].startswith(rows[0]["commit"])
    assert math.log(found["perplexity"]) == pytest.approx(last["valid_curve"][-1][1], abs=0.3)


def test_the_readme_shows_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert runpy.run_module("scripts.cards")["table"]() in readme


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_what_its_recipe_makes(name):
    recipe = ROOT / "scripts" / "recipes" / "checkpoints" / f"{name}.yaml"
    recipe = Pretraining(**yaml.safe_load(recipe.read_text(encoding="utf-8")))
    folder = PUBLISHED[name][0]
    config = FlashConfig.from_pretrained(folder)
    made = recipe.config(config.vocab_size, config.eos_token_id, config.pad_token_id)
    own = {field.name for field in fields(FlashConfig)} - {"dtype", "architectures", "is_decoder"}
    own -= {"transformers_version"}
    assert {field: getattr(made, field) for field in own} == {field: getattr(config, field) for field in own}
    assert config.is_decoder == recipe.causal and config.vocab_size == 8192
    # Runs may differ in warm-up and decay.
    runs = json.loads((folder / "training.json").read_text(encoding="utf-8"))["runs"]
    for field in ("model_config", "context", "batch_tokens", "learning_rate", "weight_decay", "eps", "clip"):
        assert {str(run["recipe"][field]) for run in runs} == {str(getattr(recipe, field))}, field


def test_the_published_causal_model_knows_english():
    folder = PUBLISHED["flash-30m-causal"][0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.max_position_embeddings == 8192 and isinstance(model.config, FlashConfig)
    # A passage of "The Wind in the Willows", which it has not read; a text of the same letters costs far more.
    text = "The Mole had been working very hard all the morning, spring-cleaning his little home."
    shuffled = "".join(sorted(text))

    def bits_per_byte(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
        return loss.item() * (ids.shape[1] - 1) / len(text) / 0.6931

    assert bits_per_byte(text) < 2 < 4 < bits_per_byte(shuffled)
    # What it says of generation is in its folder: sampling, padding on the left, chats as running text.
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k) == (True, 0.8, 40)
    assert (settings.pad_token_id, settings.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokenizer.padding_side == "left" and tokenizer.chat_template == CHAT_TEMPLATE
    prompt = tokenizer("It was a cold evening in November, and", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    new = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
    assert len(re.findall(r"\b(?:the|a|and|of|to|was|he|she|I|it|in|had)\b", new)) >= 8


def test_the_published_masked_model_fills_in_words():
    folder = PUBLISHED["flash-30m-masked"][0]
    fill_mask = pipeline("fill-mask", model=str(folder), dtype=torch.float32)
    mask = fill_mask.tokenizer.mask_token
    for sentence, word in (
        (f"I have never{mask} such a thing in all my life.", " seen"),
        (f"He was born in London, the capital of{mask}.", " England"),
        (f"She opened the{mask} and went into the room.", " door"),
        (f"He shook his{mask} and said nothing.", " head"),
    ):
        assert word in [answer["token_str"] for answer in fill_mask(sentence)], sentence


@pytest.mark.slow
def test_a_published_model_loads_without_the_package(tmp_path):
    """As pushed: with the code that `add_code` puts beside the weights."""
    package = {path.name for path in Path(flash_hf.__file__).parent.glob("*_flash.py")}
    for name, (folder, *_) in PUBLISHED.items():
        shutil.copytree(folder, tmp_path / name)
        assert {path.name for path in add_code(tmp_path / name)} == package
    program = f"""
import sys; sys.modules["flash_hf"] = None
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
for name, auto in (("causal", AutoModelForCausalLM), ("masked", AutoModelForMaskedLM)):
    folder = {str(tmp_path)!r} + f"/flash-30m-{{name}}"
    model, report = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    print(type(model).__name__)
"""
    done = run_python("-c", program)
    assert done.stdout.split() == ["FlashForCausalLM", "FlashForMaskedLM"]
