# SPDX-License-Identifier: Apache-2.0
"""The README's Python runs as it stands, its table names every field, its commands name what exists."""

import json
import pkgutil
import re
import subprocess
from dataclasses import fields

import pytest
from transformers import PreTrainedConfig

from flash_hf import FlashConfig
from helpers import ROOT, run_here, run_python


FOLDERS = ("flash_hf", "model_cards", "notebooks", "scripts", "tests")
DOCUMENTS = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
DOCUMENTS = [path for path in DOCUMENTS if path.name != "TEMPLATE.md"]  # of model cards, whose folder differs
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_first_lines_say_that_flash_is_not_flashattention():
    assert "FLASH is not FlashAttention" in "\n".join(README.splitlines()[:6])
    assert len(README.splitlines()) <= 260


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_names_lead_to_files(document):
    """Relative links, paths from the root, `-m scripts.NAME`, `flash_hf.NAME`, and names of our source files."""
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", prose) + re.findall(r"^\[[^]]+\]: ([^:\s]+)$", prose, re.M)
    missing = [target for target in targets if not (document.parent / target).exists()]
    paths = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w", text)
    missing += [path for path in paths if not any(ROOT.glob(path))]
    modules = re.findall(r"(?:-m |`)(scripts(?:\.[a-z_]\w*)+)", text)
    missing += [name for name in modules if not [*ROOT.glob(f"{name.replace('.', '/')}*")]]
    for name in re.findall(r"\b(flash_hf(?:\.\w+)+)", text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    names = re.findall(r"`([\w-]+\.(?:py|ya?ml|md))`", text)
    missing += [name for name in names if not any(name in found for found in SOURCES)]
    assert not missing


SOURCES = [{path.name for path in (ROOT / folder).rglob("*.*")} for folder in FOLDERS]


def test_links_of_the_readme_stand_in_one_list():
    """PyPI shows it without the repository: the owner puts the repository's URL in front of that list alone."""
    assert not re.search(r"\]\((?!#)", README)
    body, links = README.split("[paper]: ")
    used = set(re.findall(r"\]\[([\w-]+)\]|\[(flash-30m-\w+)\](?!\[)", body))
    defined = set(re.findall(r"^\[([\w-]+)\]: ", "[paper]: " + links, re.M))
    assert {first or second for first, second in used} == defined


def test_the_command_for_a_release_makes_links_absolute(tmp_path):
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    command = re.search(r"^sed -i (.*) README.md$", contributing, re.M)[1]
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    subprocess.run(f"URL=https://example.org/x; sed -i {command} README.md", shell=True, cwd=tmp_path, check=True)
    links = (tmp_path / "README.md").read_text(encoding="utf-8").split("[paper]: ")[1].splitlines()
    assert len(links) >= 9 and all(" https://" in f" {link.split(']: ')[-1]}" for link in links)
    assert "[picture]: https://example.org/x/raw/main/scripts/results/benchmark/h200/train_causal.png" in links
    assert "[scripts]: https://example.org/x/blob/main/scripts/README.md" in links


@pytest.mark.slow
def test_python_examples_run_in_order(tmp_path):
    examples = blocks("python")
    assert len(examples) >= 4
    for example in examples:
        assert len(example.strip().splitlines()) <= 12
    program = "\n".join(examples)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")  # "in a clone of this repository"
    run_python("-c", program, cwd=tmp_path)
    assert (tmp_path / "runs" / "my-classifier" / "model.safetensors").exists()


def test_table_names_fields_and_the_docstring_all():
    table = README.split("## Configuration")[1].split("## ")[0]
    own = {field.name for field in fields(FlashConfig)} - {field.name for field in fields(PreTrainedConfig)}
    first_column = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`(\w+)`", first_column))
    assert len(named) >= 14 and named <= own
    assert not {name for name in own if f"{name} (" not in FlashConfig.__doc__}


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_script_commands_run(monkeypatch, tmp_path):
    """The commands of "Train your own" that need no network, in order, from the root of the repository."""
    monkeypatch.chdir(ROOT)
    commands = blocks("bash")[1].strip().splitlines()
    assert len(commands) == 3
    for command in commands:
        words = command.replace("runs/", f"{tmp_path}/").replace('"Dorothy looked"', "Dorothy").split()
        assert words[0] == "python"
        run_here(*words[1:])
    assert (tmp_path / "clm" / "model.safetensors").exists()


def test_network_command_is_accepted_by_the_parser():
    """Its options exist and fit together; loading the data needs the network."""
    from flash_hf.commands.train import parse_arguments

    words = blocks("bash")[2].replace("\\\n", " ").split()
    # bf16 is refused without a GPU, unless the CPU is chosen.
    _, data_args, training_args = parse_arguments([*words[2:], "--use_cpu", "true"])
    assert data_args.streaming and training_args.max_steps == 125_000 and training_args.bf16
    assert data_args.block_size == 8192


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_study_is_what_the_kept_results_render_to(capsys):
    """And the kept table is what the kept cells give: no figure of the document is written by hand."""
    kept = "scripts/results/finetune_study.json"
    with pytest.raises(SystemExit) as ended:
        run_here("-m", "scripts.study.finetune", "--render", ROOT / kept)
    rendered = capsys.readouterr().out
    assert not ended.value.code
    document = (ROOT / "scripts" / "results" / "README.md").read_text(encoding="utf-8")
    assert "### Compared with a Transformer++" in rendered and rendered in document and f"`{kept}`" in document
    assert max(len(line) for line in rendered.split("```")[0].splitlines()) <= 119

    summary = json.loads((ROOT / kept).read_text(encoding="utf-8"))
    cells = summary["cells"].values()
    assert not any(cell["smoke"] for cell in cells) and {cell["commit"] for cell in cells} == {
        summary["settings"]["commit"]
    }
    for row in summary["table"]:
        tried = [cell for cell in cells if (cell["model"], cell.get("data")) == (row["model"], row["data"])]
        first = [cell for cell in tried if cell["seed"] == 0]
        best = max(first, key=lambda cell: cell["metrics"]["validation"][row["metric"]])
        chosen = [cell for cell in tried if cell["learning_rate"] == row["learning_rate"]]
        rates = {cell["learning_rate"] for cell in first}
        assert rates >= {*summary["settings"]["rates"]} and best["learning_rate"] == row["learning_rate"]
        for split in ("validation", "test"):
            scores = [cell["metrics"][split][row["metric"]] for cell in chosen]
            assert len(scores) == row["seeds"] and row[split] == pytest.approx(sum(scores) / len(scores))
