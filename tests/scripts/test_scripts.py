# SPDX-License-Identifier: Apache-2.0
"""The scripts as a user runs them: the first-line commands, all options of generate.py, a small demo."""

import contextlib
import importlib.metadata
import io
import json
import os
import pickle
import re
import runpy
import sys
from configparser import ConfigParser
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from flash_hf import commands, training
from flash_hf.commands import options as command_line
from flash_hf.commands.train import parse_arguments
from helpers import BOOK, DATA, OVERRIDES, ROOT, TEXT, first_line, run_here, run_python
from scripts.finetune.arguments import parse_arguments as finetuning_arguments
from scripts.provenance import program_words


pytestmark = pytest.mark.usefixtures("own_cache")
CARD = ROOT / "model_cards" / "flash-30m-causal"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a causal model trained on some of the book."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        parsed = parse_arguments(
            f"--train_file {BOOK} --config_overrides {OVERRIDES} --tokenizer_vocab_size 400 --block_size 64 "
            f"--max_steps 20 --learning_rate 5e-3 --eval_strategy no --eval_on_start false --disable_tqdm true "
            f"--output_dir {folder / 'run'}".split()
        )
        training.run_training("causal", *parsed)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_clm.py", "train_mlm.py"])
def test_first_line_commands_train(script, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    command = first_line(script)
    place = command.index("--output_dir") + 1
    command[place] = str(tmp_path / "run")
    if script == "train_clm.py":
        out = run_python(*command, "--max_steps", 4).stdout
    else:
        run_here(*command, "--max_steps", 4)
        out = capsys.readouterr().out
    before, after = re.search(r"^perplexity +([\d.,]+) +([\d.,]+)$", out, re.M).groups()
    assert float(after.replace(",", "")) < float(before.replace(",", ""))
    assert {"model.safetensors", "config.json", "tokenizer.json", "loss.png"} <= set(os.listdir(tmp_path / "run"))

    with pytest.raises(SystemExit) as refused:
        run_here(*command, "--max_steps", 4)
    assert refused.value.code == 1 and "--overwrite_output_dir" in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def fail(capsys, monkeypatch, tmp_path):
    """Run a script in this process, from an empty folder; return its exit code and the one line that it ends with."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(script: str, *options) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            run_here(*(["-m", script] if script.startswith("scripts.") else [f"scripts/{script}"]), *options)
        out, err = capsys.readouterr()
        name = f"python -m {script}" if script.startswith("scripts.") else Path(script).name
        assert out == "" and err.count("\n") == 1 and err.startswith(f"{name}: "), (out, err)
        return ended.value.code, err.strip()

    return run


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["train_clm.py", "--train_file", "none.txt", "--output_dir", "run"], 1, "none.txt does not exist"),
        (["train_clm.py", "--train_fil", BOOK, "--output_dir", "run"], 2, "Did you mean --train_file?"),
        (["train_clm.py", "--train_file", BOOK, "--max-step", 5], 2, "Did you mean --max_steps?"),
        (["train_clm.py", "--train_file", BOOK, "--max_steps", "five"], 2, "invalid int value: 'five'"),
        (["train_clm.py", "--train_file", BOOK, "--max_steps", 0, "--output_dir", "run"], 1, "at least 1, or -1"),
        (["train_clm.py", "--train_file", BOOK, "--max_steps", -5, "--output_dir", "run"], 1, "got -5"),
        (["train_mlm.py", "--hidden_size=64"], 2, "--config_overrides hidden_size=VALUE"),
        (["train_mlm.py", "--train_file", BOOK], 1, "output_dir must name the folder"),
        (["train_mlm.py", "--train_file", BOOK, "--output_dir", BOOK], 1, "must be a folder that can be written to"),
        (["train_mlm.py", "--train_file", "empty.txt", "--output_dir", "run"], 1, "must hold text, but has none"),
        (["train_mlm.py", "--train_file", "latin1.txt", "--output_dir", "run"], 1, "byte 0xe4 in position 1"),
        (["train_clm.py", "--train_file", BOOK, "--output_dir", "run", "--model", "a/b/c"], 1, "no folder a/b/c"),
        (["train_clm.py", "--train_file", BOOK, "--output_dir", "run", "--tokenizer", "old"], 1, "is not a folder"),
        (["train_clm.py", "--train_file", BOOK, "--output_dir", "run", "--model", BOOK], 1, "is a file"),
        (["train_clm.py", "--dataset_name", "./none", "--output_dir", "run"], 1, "there is no folder ./none"),
        (["train_clm.py", "--dataset_name", "no/ne", "--output_dir", "run"], 1, "no/ne is not a folder"),
        (["train_clm.py", "--train_file", BOOK, "--output_dir", "run", "more"], 2, "unrecognized arguments: more"),
        (["train_clm.py", "damaged.yaml"], 1, "--config damaged.yaml cannot be read"),
        (["train_clm.py", "--train_file", BOOK, "--output_dir", "run", "--config_overrides", "hidden_size=x"], 1,
         "expected int, got str"),
        (["scripts.finetune", "--task", "nonsense", "--train_file", BOOK, "--output_dir", "run"], 2, "invalid choice"),
        (["scripts.finetune", "--task", "qa", "--train_file", "none.json", "--output_dir", "run"], 1, "not exist"),
        (["scripts.finetune", "--task", "qa", "--train_files", "none.json"], 2, "Did you mean --train_file?"),
        (["generate.py", "--modle", "a", "--prompt", "b"], 2, "Did you mean --model?"),
        (["generate.py", "--model", "./none", "--prompt", "b"], 1, "there is no folder ./none"),
        (["generate.py", "--model", "here/none", "--prompt", "b"], 1, "there is no folder here/none"),
        (["generate.py", "--model", "none", "--prompt", "b"], 1, "there is no folder none"),
        (["generate.py", "--model", "here", "--prompt", "b"], 2, "here has no config.json"),
        (["generate.py", "--model", CARD, "--prompt", " "], 2, "the prompt is empty: give at least one word"),
        (["generate.py", "--model", CARD, "--prompt", "b", "--device", "gpu"], 1, "--device must be a device"),
        (["generate.py", "--model", CARD, "--prompt_file", "latin1.txt"], 1, "latin1.txt must be UTF-8 text"),
        (["generate.py", "--model", CARD, "--prompt", "b", "--top_p", 3], 2, "--top_p: must be at most 1, got 3"),
        (["generate.py", "--model", CARD, "--prompt", "b", "--temperature", 0], 2, "must be above 0, got 0"),
        (["generate.py", "--model", CARD, "--prompt", "b", "--seed", "x"], 2, "invalid int value: 'x'"),
        (["generate.py", "--model", CARD, "--prompt", "b", "--seed", 2**32], 2, "--seed: must be at most 4294967295"),
        (["scripts.finetune", "--task", "qa", "--dataset_name", "/no", "--output_dir", "run"], 1, "no folder /no"),
        (["scripts.evaluation.book", "--model", CARD, "--book", BOOK, "--tokens", 1], 2, "must be at least 2, got 1"),
        (["scripts.evaluation.book", "--model", CARD, "--book", "none.txt"], 1, "No such file or directory: none.txt"),
        (["scripts.evaluation", "--model", CARD, "--measure", "speed", "--output", "damaged.yaml"], 1, "must be JSON"),
        (["scripts.evaluation", "--model", "a b", "--measure", "speed"], 1, "there is no folder a b"),
        (["scripts.evaluation", "--model", CARD, "--measure", "perplexity", "--files", "none.txt"], 1, "not exist"),
        (["convert_checkpoint.py", "none.bin", "out"], 1, "There is no file or folder none.bin"),
        (["convert_checkpoint.py", "none.bin", "out", "--chunksize", 3], 2, "Did you mean --chunk_size?"),
        (["convert_checkpoint.py", "none.bin", "empty.txt"], 2, "empty.txt is a file"),
        (["cut_passages.py", "--files", "none.txt", "--output", "a.jsonl"], 1, "none.txt does not exist"),
        (["demo.py", "--book", "none.txt"], 2, "--book must be a text file"),
        (["scripts.cards", "--folder", CARD, "--facts", "damaged.yaml", "--results", BOOK], 1, "must be JSON"),
        (["scripts.benchmark.backends", "--text", "none.txt"], 2, "--text must be a text file"),
        (["scripts.benchmark", "--models", "nonsense"], 2, "unknown ['nonsense']"),
        (["scripts.benchmark.backends", "--text", BOOK, "--length", 10**7], 2, "more than --length=10000000 bytes"),
        (["scripts.benchmark", "--contexts", "512,x"], 2, "--contexts must be whole numbers"),
        (["scripts.benchmark", "--table", "none.csv"], 1, "No such file or directory: none.csv"),
        (["scripts.study", "--only", "nonsense", "--list"], 1, "no cell is called 'nonsense'"),
        (["scripts.study", "--report", "--results", "none"], 1, "there is no folder none"),
        (["scripts.study", "--unbundle", "damaged.yaml"], 1, "must be JSON"),
        (["scripts.study.finetune", "--worker", "3"], 2, "Did you mean --workers?"),
        (["scripts.study.finetune", "--work", "run", "--flash", CARD], 2, "--flash and --transformer are needed"),
        (["scripts.study.pretrain", "--recipe", "a", "--output", "b", "--search", 1], 2, "--search needs --steps"),
        (["scripts.benchmark.profile", "--tokens", "3"], 2, "--tokens must be at least --context=8192, got 3"),
        (["scripts.benchmark.profile", "--layer", "3"], 2, "Did you mean --layers?"),
        (["scripts.benchmark.length", "--parts", "scaling"], 2, "need several processes: torchrun"),
        (["scripts.benchmark.length", "--forms", "transformer++"], 2, "takes --parts train alone"),
        (["scripts.evaluation.lm_eval_tasks.make_tasks", "--books", "none.txt"], 1, "none.txt does not exist"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_one_sentence(fail, command, code, words):
    Path("here").mkdir()
    Path("empty.txt").touch()
    Path("latin1.txt").write_bytes(b"M\xe4dchen")
    Path("damaged.yaml").write_text("{a: [", encoding="utf-8")
    ended, line = fail(*command)
    assert ended == code and words in line
    assert not list(Path("run").glob("*"))


def test_the_packages_command(capsys, monkeypatch, tmp_path):
    """`flash-hf`, which pip installs: the same commands as in scripts/, and mistakes in one sentence."""

    def flash_hf(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/flash-hf", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            sys.exit(commands.main())
        return ended.value.code or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    assert flash_hf("--version")[1] == f"flash-hf {importlib.metadata.version('flash-hf')}\n"
    code, out, err = flash_hf("--help")
    assert code == 0 and err == "" and len(out.splitlines()) < 12
    for name in commands.COMMANDS:
        assert f"\n  {name} " in out
        code, options, err = flash_hf(name, "--help")
        # The options of `serve` are transformers' own, which typer shows.
        assert code == 0 and err == "" and " ".join(options.split()).lower().startswith(f"usage: flash-hf {name} ")
    assert flash_hf() == (2, "", out)
    code, _, err = flash_hf("trian-clm")
    assert code == 2 and err.startswith("flash-hf: there is no command 'trian-clm'. Did you mean 'train-clm'?\n")
    assert flash_hf("generate", "--modle", "a", "--prompt", "b")[2].startswith(
        "flash-hf generate: There is no option --modle."
    )
    code, _, err = flash_hf("train-mlm", "--train_file", "none.txt", "--output_dir", "run")
    assert code == 1 and err.startswith("flash-hf train-mlm: ") and "none.txt does not exist" in err

    original = DATA / "flash_causal.safetensors"
    code, out, err = flash_hf("convert", original, "hf", "--causal", "--no-shift", "--chunk_size", 24)
    assert code == 0 and json.loads(out)["output"] == "hf" and (tmp_path / "hf" / "config.json").is_file()
    assert program_words() == ["flash-hf", "convert"]
    code, _, err = flash_hf("convert", original, "hf", "--causal", "--no-shift", "--chunk_size", 24)
    assert code == 2 and "output must be a new or empty folder, and hf holds files" in err

    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    module, _, function = setup["options.entry_points"]["console_scripts"].split("=")[1].strip().partition(":")
    assert getattr(import_module(module), function) is commands.main
    for script, name in (("train_clm", "train_clm"), ("train_mlm", "train_mlm"), ("generate", "main"),
                         ("convert_checkpoint", "main")):  # fmt: skip
        assert runpy.run_path(str(ROOT / "scripts" / f"{script}.py"))[name].__module__.startswith("flash_hf.commands.")


def test_a_missing_package_is_named_with_its_extra(fail, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, line = fail("train_clm.py", "--train_file", BOOK, "--output_dir", "run")
    assert code == 1 and line == "train_clm.py: The package matplotlib is missing: pip install 'flash-hf[train]'"
    lines = (ROOT / "setup.cfg").read_text(encoding="utf-8").partition("[options.extras_require]")[2].splitlines()
    for extra in ("train", "eval", "embed"):
        begin = lines.index(f"{extra} =") + 1
        end = next(i for i in range(begin, len(lines)) if not lines[i].startswith(" "))
        names = {"pyyaml": "yaml", "lm-eval": "lm_eval", "sentence-transformers": "sentence_transformers"}
        for package in (line.strip() for line in lines[begin:end]):
            assert package.startswith("flash-hf[") or command_line.EXTRAS[names.get(package, package)] == extra


def test_a_fault_of_the_code_keeps_its_traceback(capsys, monkeypatch):
    ours = {"__name__": "flash_hf.somewhere"}
    exec(
        "def refuse():\n    raise ValueError('chunk_size must be\\n  at least 1, got 0.')\n"
        "def unpack():\n    first, second = 1, 2, 3\n"
        "def look_up():\n    return {}['chunk_size']\n",
        ours,
    )
    monkeypatch.setattr(sys, "argv", ["/a/script.py"])
    faults = {ours["unpack"]: ValueError, ours["look_up"]: KeyError, lambda: int("a"): ValueError,
              lambda: torch.ones(2) @ torch.ones(3): RuntimeError}  # fmt: skip
    for fault, kind in faults.items():
        with pytest.raises(kind):
            command_line.run_command(fault)

    def stop():
        raise KeyboardInterrupt

    for main, code, line in (
        (ours["refuse"], 1, "script.py: chunk_size must be at least 1, got 0."),
        (stop, 130, "script.py: interrupted"),
    ):
        with pytest.raises(SystemExit) as ended:
            command_line.run_command(main)
        assert ended.value.code == code and capsys.readouterr().err.strip() == line
    monkeypatch.setenv("FLASH_TRACEBACK", "1")
    with pytest.raises(ValueError, match="chunk_size"):
        command_line.run_command(ours["refuse"])
    assert command_line.run_command(lambda: None) is None


def test_a_command_ends_its_distributed_run(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    command_line.run_command(lambda: None)
    assert not torch.distributed.is_initialized()


def test_a_program_is_called_as_it_was_started(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "package").mkdir()
    for name in ("__main__", "book"):
        (tmp_path / "package" / f"{name}.py").write_text(
            "from flash_hf.commands.options import OptionParser\nfrom scripts.provenance import program_words\n"
            "said = OptionParser().prog, program_words()\n",
            encoding="utf-8",
        )
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("package", "package.book"):
        prog, words = runpy.run_module(module, run_name="__main__", alter_sys=True)["said"]
        assert prog == f"python -m {module}" and words == ["python", "-m", module]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "scripts" / "demo.py"), "-m"])
    assert command_line.program_name() == "demo.py"
    assert program_words() == ["python", os.path.join("scripts", "demo.py")]
    monkeypatch.setattr(sys, "argv", [""])
    assert command_line.OptionParser().prog == ""


def test_help_shows_one_screen_or_everything(capsys):
    for parse, own in ((parse_arguments, "--block_size"), (finetuning_arguments, "--task")):
        shown = {}
        for words in (["--help"], ["--help", "all"]):
            with pytest.raises(SystemExit):
                parse(words, "what it does")
            text = capsys.readouterr().out
            names = re.findall(r"^  (--\w+)", text, re.M)
            assert len(names) == len(set(names)) and "[--OPTION VALUE ...]" in text.splitlines()[0]
            shown[len(words)] = names
        assert {own, "--output_dir", "--learning_rate", "--max_steps", "--config_overrides"} <= set(shown[1])
        assert len(shown[1]) < 25
        assert {f"--{field.name}" for field in fields(TrainingArguments)} <= set(shown[2])


def test_options_may_be_spelt_with_dashes(fail):
    generate = ["generate.py", "--model", "./none", "--prompt", "a", "--max-new-tokens", 3, "--top-k=2"]
    for command in (["train_clm.py", "--train-file=none.txt", "--output-dir", "run"], generate):
        code, line = fail(*command)
        assert code == 1 and "none" in line


@pytest.mark.parametrize("bar", ["true", "false"])
def test_results_go_to_stdout_and_progress_to_stderr(bar, capsys, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[:8000], encoding="utf-8")
    command = (
        f"scripts/train_clm.py --train_file text.txt --config_overrides {OVERRIDES} --tokenizer_vocab_size 300 "
        f"--block_size 64 --max_steps 2 --logging_steps 1 --save_strategy no --disable_tqdm {bar} --output_dir run"
    )
    monkeypatch.chdir(tmp_path)
    run_here(*command.split())
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["validation", "loss"] and out.splitlines()[-1] == (
        "Try it: flash-hf generate --model run --prompt 'Once upon a time'"
    )
    assert (
        "'eval_perplexity'" in err and "{" not in out and "Training a causal model of 0.0 M parameters on cpu" in err
    )
    assert "2 steps of 512 tokens each" in err


def generate(capsys, model: Path, *options: str) -> tuple[str, str]:
    """Run generate.py in this process; returns stdout and stderr."""
    run_here("scripts/generate.py", "--model", model, "--device", "cpu", *options)
    return capsys.readouterr()


def test_generate_continues_the_prompt_alike_in_every_arrangement(capsys, model, tmp_path, monkeypatch):
    prompt = "Dorothy looked at the Scarecrow – and said, " * 4
    options = ["--greedy", "--max_new_tokens", "40"]  # over two borders of chunks
    out, err = generate(capsys, model, "--prompt", prompt, *options)
    assert out.startswith(prompt) and len(out) > len(prompt) + 40
    numbers = re.search(r"(\d+) prompt tokens, 40 new ones in ([\d.]+) s: ([\d.]+) tokens/s", err)
    assert int(numbers[1]) > 48 and float(numbers[2]) > 0 and float(numbers[3]) > 1

    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    for other in (
        ["--prompt_file", str(tmp_path / "prompt.txt")],
        ["--prompt_file", "-"],
        ["--prompt", prompt, "--dtype", "float32"],
    ):
        assert generate(capsys, model, *other, *options)[0] == out


def test_generate_samples_by_seed(capsys, model):
    def sample(*options):
        return generate(capsys, model, "--prompt", "Dorothy", "--max_new_tokens", "20", *options)[0]

    assert sample("--seed", "1") == sample("--seed", "1") != sample("--seed", "2")
    nearly_greedy = sample("--temperature", "1e-4", "--top_p", "1.0", "--top_k", "0")
    assert nearly_greedy == sample("--greedy") == sample("--top_k", "1")


def test_generate_refuses_bad_options(capsys, model):
    for options in ([], ["--prompt", "a", "--prompt_file", "b"], ["--prompt", "a", "--dtype", "none"]):
        with pytest.raises(SystemExit):
            generate(capsys, model, *options)
    with pytest.raises(SystemExit):
        generate(capsys, model, "--prompt_file", str(model / "none.txt"))
    assert capsys.readouterr().err.endswith(f"generate.py: No such file or directory: {model / 'none.txt'}\n")


def test_a_book_is_continued_with_a_state_of_constant_size(capsys, monkeypatch):
    """The checkpoint of this repository on the whole of Oz's first 3,000 tokens, and on a longer reading of it."""
    monkeypatch.chdir(ROOT)
    options = ["--tokens", 3000, "--segment", 512, "--max_new_tokens", 30]
    run_here(*first_line("scripts.evaluation.book"), *options)
    out = capsys.readouterr().out
    rows = re.findall(r"^ +([\d,]+) +[\d.]+ +\d+ +([\d.]+) MiB +(\d+) MiB$", out, re.M)
    assert [row[0] for row in rows] == ["1,000", "2,999"]
    # 16 layers of [257, 128], [1, 128] and [256, 1024], and twice [128, 1024] numbers of four bytes.
    assert {row[1] for row in rows} == {"34.02"} and "state 34.02 MiB" in out
    assert 0 < int(rows[1][2]) < int(rows[0][2]) + 200
    story = out.split("\n...")[1].split("tokens written")[0]
    assert "Aunt Em" in story and len(story.split()) > 50


@pytest.mark.slow
def test_demo_in_small(tmp_path):
    command = ["scripts/demo.py", "--output_dir", str(tmp_path / "demo"), "--config_overrides", OVERRIDES]
    done = run_python(*command, "--causal_steps", 6, "--masked_steps", 6)
    for kind in ("causal", "masked"):
        folder = tmp_path / "demo" / kind
        before, after, shown, plot = re.search(
            rf"^  {kind}: ([\d,.]+) -> ([\d,.]+) +checkpoint (\S+) +plot (\S+)$", done.stdout, re.M
        ).groups()
        assert float(after.replace(",", "")) < float(before.replace(",", ""))
        assert Path(shown) == folder and (folder / "model.safetensors").is_file() and Path(plot).is_file()
    text = (tmp_path / "demo" / "text.txt").read_text(encoding="utf-8")
    assert str(tmp_path / "demo" / "text.txt") in done.stdout
    assert text.startswith("Dorothy looked") and len(text.split()) > 20
    assert text.splitlines()[0] in done.stdout  # what was streamed is what was saved
    answers = [float(answer) for answer in re.findall(r"^ +([\d.]+)% '", done.stdout, re.M)]
    assert len(answers) == 10  # of the checkpoint and of the new model
    for five in (answers[:5], answers[5:]):
        assert sorted(five, reverse=True) == five
    assert re.search(r"continues a text ===\n.*It was a cold evening in November, and the old house \w", done.stdout)


@pytest.mark.slow
def test_compare_backends_in_small(tmp_path, monkeypatch):
    """Its processes, one for each run, in this one: each gets what can be pickled, and returns it."""

    def run_all(function, rows):
        return [pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(function))(row))) for row in rows]

    def executor(workers, mp_context, max_tasks_per_child):
        assert workers == max_tasks_per_child == 1 and mp_context.get_start_method() == "spawn"
        return contextlib.nullcontext(SimpleNamespace(map=run_all))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", executor)
    run_here(*first_line("scripts.benchmark.backends"), "--folder", tmp_path, "--batch", 2, "--length", 100)
    lines = (tmp_path / "backends.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "step,torch,torch-float32" and len(lines) == 6
    first = [float(value) for value in lines[1].split(",")[1:]]
    assert first[0] == pytest.approx(first[1], rel=1e-2) and first[1] == pytest.approx(5.55, abs=0.1)  # ln 256
    assert (tmp_path / "backends.png").stat().st_size > 1000


@pytest.mark.slow
def test_profile_step_in_small(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    run_here(*first_line("scripts.benchmark.profile"), "--steps", 2)
    out = capsys.readouterr().out
    total = float(re.search(r"^operators: ([\d.]+) ms per step$", out, re.M).group(1))
    rows = [float(value) for value in re.findall(r"^ +([\d.]+) ms  x +\d+  ", out, re.M)]
    assert 0 < sum(rows) <= total * 1.01 and rows == sorted(rows, reverse=True)


@pytest.mark.slow
def test_long_contexts_in_small(tmp_path, monkeypatch):
    """Every measurement succeeds, and the state has one size at any context."""
    monkeypatch.chdir(ROOT)
    command = (*first_line("scripts.benchmark.length")[:-2], "--output", tmp_path / "length.json")
    run_here(*command, "--parts", "train", "--forms", "transformer++")
    baseline = json.loads((tmp_path / "length.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["form"], row["rows"] * row["context"]) for row in baseline] == [
        ("transformer++", 128),
        ("transformer++", 256),
    ]
    run_here(*command)
    rows = json.loads((tmp_path / "length.json").read_text(encoding="utf-8"))["rows"]
    assert not [row for row in [*baseline, *rows] if "note" in row]
    assert {row["part"] for row in rows} == {"train", "prefill", "decode"}
    assert len({row["cache_bytes"] for row in rows if row.get("form") == "plus-keys" and row["part"] == "decode"}) == 1


def test_no_script_hides_a_package():
    """A script imports from its own folder first: scripts/datasets would shadow the package `datasets`."""
    packages = {name.split(".")[0] for name in importlib.metadata.packages_distributions()}
    beside = {path.stem for path in (ROOT / "scripts").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert beside & (packages | set(sys.stdlib_module_names)) <= {"__pycache__"}
