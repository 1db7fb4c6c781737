# SPDX-License-Identifier: Apache-2.0
"""A card says what is known and measured, in metadata that the Hub's client reads back; it is refused otherwise."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

import flash_hf
from flash_hf import FlashForCausalLM
from flash_hf.cards import PIPELINE_TAGS, check_facts, check_results, make_card
from flash_hf.hub import add_code, registered_classes
from flash_hf.testing import tiny_config


ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "model_cards" / "TEMPLATE.md"
FACTS = json.loads((ROOT / "tests" / "data" / "card_facts.json").read_text())
RESULTS = json.loads((ROOT / "tests" / "data" / "card_results.json").read_text())


@pytest.fixture
def folder(tmp_path):
    FlashForCausalLM(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def test_the_script_writes_a_card_with_everything(folder):
    facts, results = ROOT / "tests" / "data" / "card_facts.json", ROOT / "tests" / "data" / "card_results.json"
    command = [sys.executable, ROOT / "scripts" / "make_card.py"]
    done = subprocess.run(
        [*command, "--folder", folder, "--facts", facts, "--results", results],
        env={**os.environ, "PYTHONPATH": str(Path(flash_hf.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    card = ModelCard.load(folder / "README.md")
    for text in FACTS.values():
        assert str(text) in card.content or text == []
    rows = [line for line in card.text.splitlines() if line.startswith("| text-")]
    for row, result in zip(rows, RESULTS, strict=True):
        assert [cell.strip(" `") for cell in row.split("|")[1:-1]] == [str(value) for value in result.values()]
    parameters = sum(weight.numel() for weight in FlashForCausalLM(tiny_config()).parameters())
    assert f"| Parameters | {parameters} |" in card.text
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
    assert "trust_remote_code=True)" not in plain.text and "holds no code" in plain.text
    assert plain.data.eval_results is None
    add_code(folder)
    coded = make_card(folder, FACTS, [], TEMPLATE)
    assert 'AutoModelForCausalLM.from_pretrained("someone/flash-example", trust_remote_code=True)' in coded.text


@pytest.mark.parametrize("name", PIPELINE_TAGS)
def test_every_head_has_a_task(name, tmp_path):
    classes = registered_classes()
    assert set(PIPELINE_TAGS) == set(classes) - {"AutoConfig"}
    classes[name](tiny_config()).save_pretrained(tmp_path)
    card = make_card(tmp_path, FACTS, RESULTS, TEMPLATE)
    assert card.data.pipeline_tag == PIPELINE_TAGS[name] and f"import AutoTokenizer, {name}\n" in card.text


def test_the_code_of_a_card_runs(folder):
    """With the folder for the name on the Hub: this model has no tokenizer, so without its lines."""
    text = make_card(folder, FACTS, [], TEMPLATE).text
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("someone/flash-example", str(folder))
    names = {}
    exec("\n".join(line for line in code.splitlines() if not line.startswith("tokenizer")), names)
    assert type(names["model"]) is FlashForCausalLM


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
    (tmp_path / "template.md").write_text("---\n{{ card_data }}\n---\n{{ nobody_knows }}\n")
    with pytest.raises(jinja2.UndefinedError, match="nobody_knows"):
        make_card(folder, FACTS, RESULTS, tmp_path / "template.md")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="`folder` must hold the weights"):
        make_card(folder, FACTS, RESULTS, TEMPLATE)
