# SPDX-License-Identifier: Apache-2.0
"""Recipes, options that stand for others, batches in tokens, the sequence warm-up, and the speed in the log."""

import json
import re
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from flash_hf import FlashConfig, FlashForCausalLM, training
from flash_hf.commands.train import parse_arguments
from flash_hf.training.arguments import config_fields, set_batch, warmup_length
from flash_hf.training.run import load_model, load_text, new_config
from flash_hf.training.throughput import SpeedBar, SpeedMeter, device_peak, training_flops
from flash_hf.training.tokenizer import train_tokenizer
from helpers import OVERRIDES, ROOT, write_documents
from scripts.benchmark.sizes import BASE, flash_flops


pytestmark = pytest.mark.usefixtures("own_cache")
RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A training and a validation file of short documents."""
    folder = tmp_path_factory.mktemp("files")
    write_documents(folder / "train.jsonl", 0, 40_000, 999)
    write_documents(folder / "validation.jsonl", 150_000, 153_000, 999)
    return folder


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "log_history.json").read_text(encoding="utf-8"))


# --- recipes ---------------------------------------------------------------------------------------------------------


def kind_of(recipe: Path) -> str:
    script = re.search(
        r"^# python scripts/train_(clm|mlm)\.py --config scripts/recipes/(\S+)", recipe.read_text(encoding="utf-8")
    )
    assert script[2] == recipe.name
    return {"clm": "causal", "mlm": "masked"}[script[1]]


def test_there_is_a_recipe_for_each_data_set_of_the_paper():
    kinds = {recipe.stem: kind_of(recipe) for recipe in RECIPES}
    assert kinds == {"c4_masked": "masked", "wiki40b_causal": "causal", "pg19_causal": "causal", "pg19_plus": "causal"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_have_the_settings_of_the_paper(recipe, tmp_path):
    """At every context, on one device and on eight (bf16 needs a GPU, or to be asked of the CPU)."""
    for block_size in (512, 1024, 2048, 4096, 8192):
        command = ["--config", recipe, "--block_size", block_size, "--use_cpu", "true", "--output_dir", tmp_path]
        model_args, data_args, args = parse_arguments(list(map(str, command)))
        assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-6)
        assert (args.learning_rate, args.weight_decay, args.warmup_steps, args.max_steps) == (
            7e-4,
            0.01,
            10_000,
            125_000,
        )
        assert args.lr_scheduler_type == "linear" and args.optim.startswith("adamw") and args.bf16
        assert data_args.streaming and data_args.shuffle_buffer > 0 and data_args.mlm_probability == 0.15
        config = new_config(kind_of(recipe), config_fields(model_args))
        assert (config.num_hidden_layers, config.hidden_size, config.chunk_size) == (24, 768, 256)
        assert (config.global_form == "previous_token") == (recipe.stem == "pg19_plus")
        assert config.max_position_embeddings == 8192 and config.hidden_dropout == config.attention_dropout == 0
        for devices in (1, 8):
            there = SimpleNamespace(**{**vars(args), "world_size": devices, "n_gpu": 1})
            set_batch(there, block_size)
            rows = there.per_device_train_batch_size * there.gradient_accumulation_steps * devices
            assert rows * block_size == 2**18


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_run_on_other_text(recipe, files, tmp_path):
    """A few steps of each, scaled down: only what a test machine lacks is overridden."""
    command = {
        "config": recipe, "train_file": files / "train.jsonl", "validation_file": files / "validation.jsonl",
        "config_overrides": OVERRIDES, "tokenizer_vocab_size": 400, "block_size": 64, "batch_tokens": 1024,
        "per_device_batch_tokens": 256, "bf16": "false", "max_steps": 3, "warmup_steps": 1, "logging_steps": 1,
        "shuffle_buffer": 30, "eval_steps": 3, "disable_tqdm": "true", "output_dir": tmp_path / "run",
    }  # fmt: skip
    words = [str(word) for name, value in command.items() for word in (f"--{name}", value)]
    model_args, data_args, args = parse_arguments(words)
    assert data_args.dataset_name is data_args.dataset_config_name is data_args.validation_split is None
    result = training.run_training(kind_of(recipe), model_args, data_args, args)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 4)
    losses = [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line]
    assert len(losses) == 3 and result["after"]["eval_loss"] < result["before"]["eval_loss"]


def test_preset_is_the_form_of_a_new_model(tmp_path, capsys):
    def fields(*command):
        words = ["--train_file", "x.txt", "--output_dir", str(tmp_path), *command]
        return config_fields(parse_arguments(words)[0])

    plus = {
        "global_form": "previous_token", "local_key_shift": True, "use_scaled_sinusoid": False,
        "attention_init": "recent",
    }  # fmt: skip
    assert fields() == fields("--preset", "flash") == {}
    assert fields("--preset", "plus") == {"chunk_shift": 128, **plus}
    assert fields("--preset", "plus", "--config_overrides", "chunk_size=64,attention_init=normal") == {
        **plus, "chunk_size": 64, "chunk_shift": 32, "attention_init": "normal",
    }  # fmt: skip
    recipe = ROOT / "scripts" / "recipes" / "pg19_plus.yaml"
    assert fields("--config", str(recipe), "--use_cpu", "true", "--model", "some/model") == {}
    with pytest.raises(ValueError, match="--model some/model has its own configuration"):
        fields("--model", "some/model", "--preset", "plus")
    with pytest.raises(SystemExit):
        fields("--preset", "pluss")
    assert re.search(r"invalid choice: 'pluss' \(choose from '?flash'?, '?plus'?\)", capsys.readouterr().err)


def test_what_the_command_line_says_takes_the_place_of_its_alternatives(tmp_path):
    recipe = {
        "dataset_name": "a/b", "dataset_config_name": "en", "validation_split": "validation", "max_steps": 7,
        "batch_tokens": 4096, "per_device_batch_tokens": 1024, "model_config": {"hidden_size": 64},
        "output_dir": str(tmp_path), "text_column": "content", "disable_tqdm": True, "seed": None,
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")

    def parse(*command):
        return parse_arguments(["--config", str(tmp_path / "recipe.json"), *command])

    model_args, data_args, args = parse()
    assert (data_args.dataset_name, data_args.validation_split, args.max_steps) == ("a/b", "validation", 7)
    assert config_fields(model_args) == {"hidden_size": 64} and args.disable_tqdm and args.seed == 42
    _, data_args, args = parse("--train-file=x.txt", "--per_device_train_batch_size", "3", "--num_train_epochs", "2")
    assert (data_args.train_file, data_args.dataset_name, data_args.validation_split) == (["x.txt"], None, None)
    assert (args.per_device_batch_tokens, args.batch_tokens, args.max_steps) == (None, 4096, -1)
    assert data_args.text_column == "content"
    model_args, data_args, args = parse(
        "--model", "c/d", "--dataset_name", "e/f", "--gradient_accumulation_steps", "2"
    )
    assert config_fields(model_args) == {} and data_args.dataset_config_name is None
    assert (args.batch_tokens, args.per_device_batch_tokens) == (None, 1024)
    with pytest.raises(ValueError, match="give exactly one"):
        parse("--train_file", "x.txt", "--dataset_name", "e/f")


def test_batches_that_cannot_be_made_are_refused():
    def batch(devices=2, rows=8, **tokens):
        args = {"batch_tokens": None, "per_device_batch_tokens": None, "gradient_accumulation_steps": 5, **tokens}
        args = SimpleNamespace(world_size=devices, n_gpu=0, per_device_train_batch_size=rows, **args)
        set_batch(args, 128)
        return args.per_device_train_batch_size, args.gradient_accumulation_steps

    assert batch() == (8, 5)
    assert batch(per_device_batch_tokens=512) == (4, 5)
    assert batch(batch_tokens=8192) == (8, 4)
    assert batch(devices=4, batch_tokens=8192, per_device_batch_tokens=1024) == (8, 2)
    with pytest.raises(ValueError, match="per_device_batch_tokens must be a multiple of 128 .*, got 1000. Try 896"):
        batch(per_device_batch_tokens=1000)
    with pytest.raises(ValueError, match="multiple of 128 .*, got 64. Try 128"):
        batch(per_device_batch_tokens=64)
    for tokens in (1024, 5000):
        with pytest.raises(ValueError, match=rf"batch_tokens must be a multiple of 2048 \(devices x .*, got {tokens}"):
            batch(batch_tokens=tokens)


# --- sequence-length warm-up -----------------------------------------------------------------------------------------


def test_rows_grow_as_the_line_allows():
    lengths = [warmup_length(step, steps=100, start=16, block_size=128) for step in range(101)]
    assert lengths[0] == 16 and lengths[99:] == [64, 128] and lengths == sorted(lengths)
    # 16 + 112 step / 100 reaches 32 at step 14.3 and 64 at step 42.9.
    assert [lengths.count(n) for n in (16, 32, 64, 128)] == [15, 28, 57, 1]
    for start in (0, 12, 256):
        with pytest.raises(ValueError, match="must give block_size=128 when doubled"):
            warmup_length(0, steps=100, start=start, block_size=128)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_the_sequence_warmup_feeds_the_same_tokens_in_shorter_rows(kind, files, tmp_path):
    fed, counted = {}, {}
    for steps in (0, 4):
        command = (
            f"--train_file {files / 'train.jsonl'} --config_overrides {OVERRIDES} --tokenizer_vocab_size 400 "
            f"--packing documents --block_size 64 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
            f"--max_steps 6 --eval_strategy no --eval_on_start false --save_strategy no --disable_tqdm true "
            f"--sequence_warmup_steps {steps} --sequence_warmup_start 16 --output_dir {tmp_path / str(steps)}"
        )
        model_args, data_args, args = parse_arguments(command.split())
        train, validation = load_text(data_args)
        tokenizer = train_tokenizer(train, 400)
        model = load_model(kind, model_args, tokenizer, None)
        trainer = training.build_trainer(kind, model, tokenizer, train, validation, data_args, args)
        seen, counts, step = fed.setdefault(steps, []), counted.setdefault(steps, []), trainer.training_step

        def noted(model, inputs, count, seen=seen, counts=counts, step=step):
            seen.append({name: value.clone() for name, value in inputs.items()})
            counts.append(int(count))
            return step(model, inputs, count)

        trainer.training_step = noted
        trainer.train()
    # 16 + 48 step / 4: 16, 28, 40, 52, and whole blocks from step 4 on; two batches a step.
    assert [batch["input_ids"].shape[1] for batch in fed[4]] == [16] * 4 + [32] * 4 + [64] * 4
    for short, whole in zip(fed[4], fed[0], strict=True):
        assert torch.equal(short["input_ids"].flatten(), whole["input_ids"].flatten())
        assert torch.equal(short["labels"].flatten(), whole["labels"].flatten())
        assert (short["position_ids"][:, 0] == 0).all()
    for steps, batches in fed.items():  # no row's first token counts, in a causal model
        predicted = [
            int(((batch["labels"] != -100) & ((batch["position_ids"] > 0) | (kind == "masked"))).sum())
            for batch in batches
        ]
        assert counted[steps] == [sum(predicted[i // 2 * 2 : i // 2 * 2 + 2]) for i in range(len(predicted))]


# --- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention_type", ["mixed_chunk", "quadratic"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("context", [100, 512, 8192])
def test_training_flops_agree_with_the_benchmark(context, causal, attention_type):
    """Which counts the backbone's forward alone."""
    config = FlashConfig(attention_type=attention_type)
    forward = flash_flops(BASE, context, causal, attention_type)
    head = 2 * config.hidden_size * config.vocab_size
    got = training_flops(config, context, causal=causal)
    assert got == pytest.approx(3 * (forward + head))
    assert training_flops(config, context, causal=causal, head=False) == pytest.approx(3 * forward)


def test_training_flops_by_hand():
    """D = 4, E = 8, S = 2, C = 3, context 9: projections 2*4*18 + 2*8*4 = 208, local 2*3*10 = 60, global 4*2*8 = 64.

    The head: 2*4*7 = 56.
    """
    config = FlashConfig(hidden_size=4, query_key_dim=2, chunk_size=3, num_hidden_layers=5, vocab_size=7)
    for kind, layer in (("mixed_chunk", 332), ("local", 268), ("global", 272)):
        config.attention_type = kind
        assert training_flops(config, 9, causal=False) == 3 * (5 * layer + 56)


def test_peaks_of_devices(monkeypatch):
    def peak(name, half=True, **options):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        return device_peak(half=half, **options)

    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA L4", "NVIDIA L40S"]
    assert [peak(name) for name in names] == [989.4e12, 756.4e12, 312e12, 121e12, 362.1e12]
    assert peak(names[0], half=False) is None  # the table is not for float32
    assert peak("NVIDIA GeForce 256") is None and peak(None) is None
    assert peak(None, half=False, peak_tflops=2.5) == 2.5e12


def test_the_meter_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("flash_hf.training.throughput.time.perf_counter", lambda: now[0])
    meter = SpeedMeter(peak=1e6)
    meter.pause(5.0)  # before the first step: no clock runs yet
    assert meter.read() == {}
    meter.count(1000, 50.0)
    now[0] = 104.0
    meter.pause(2.0)
    meter.count(1000, 50.0)
    assert meter.read() == {"tokens_per_second": 1000.0, "mfu": 0.05}
    meter.count(300, None)
    now[0] = 105.0
    assert meter.read() == {"tokens_per_second": 300.0}


def train(files: Path, folder: Path, *more: str):
    command = (
        f"--train_file {files / 'train.jsonl'} --config_overrides {OVERRIDES} --tokenizer_vocab_size 400 "
        f"--block_size 64 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
        f"--max_steps 4 --logging_steps 2 --eval_strategy no --eval_on_start false --save_strategy no "
        f"--output_dir {folder}"
    )
    return training.run_training("causal", *parse_arguments([*command.split(), *more]))


def test_the_log_and_the_bar_show_speed(files, tmp_path, capsys):
    train(files, tmp_path / "run", "--peak_tflops", "0.05", "--save_strategy", "steps", "--save_steps", "2")
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    config = FlashForCausalLM.from_pretrained(tmp_path / "run").config
    for line in lines:
        assert line["tokens_per_second"] > 0 and line["grad_norm"] > 0
        flops = line["tokens_per_second"] * training_flops(config, 64, causal=True)
        assert line["mfu"] == pytest.approx(flops / 0.05e12)
    bar = capsys.readouterr().err.replace("\r", "\n")
    shown = re.search(r"loss=([\d.]+), grad=([\d.]+), tok/s=([\d,]+), mfu=([\d.]+)%", bar)
    assert float(shown[1]) == pytest.approx(lines[0]["loss"], abs=1e-4)
    assert float(shown[3].replace(",", "")) == pytest.approx(lines[0]["tokens_per_second"], abs=1)


def test_without_a_known_device_there_is_no_mfu(files, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the device may be known")
    train(files, tmp_path / "run", "--disable_tqdm", "true")
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert len(lines) == 2 and all("tokens_per_second" in line and "mfu" not in line for line in lines)


def test_the_bar_writes_what_is_no_loss_on_a_line(capsys):
    bar, state = SpeedBar(), TrainerState(max_steps=4)
    bar.on_train_begin(None, state, TrainerControl())
    bar.on_log(None, state, TrainerControl(), logs={"eval_loss": 1.25})
    bar.on_train_end(None, state, TrainerControl())
    bar.on_log(None, state, TrainerControl(), logs={"loss": 1.0})  # without a bar, there is nothing to show it in
    assert "'eval_loss': '1.25'" in "".join(capsys.readouterr())


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_trackers_log_the_speed(tracker, files, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    pytest.importorskip(tracker)
    wanted = {"loss", "grad_norm", "tokens_per_second", "mfu", "learning_rate"}
    more = ["--project", "flash-test", "--trackio_static_space_id", "false"] if tracker == "trackio" else []
    train(files, tmp_path / "run", "--report_to", tracker, "--disable_tqdm", "true", "--peak_tflops", "0.05", *more)
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "board"))
        events.Reload()
        for name in wanted:
            told = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
            assert told == [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines]
    else:
        with sqlite3.connect(tmp_path / "trackio" / "flash-test.db") as database:
            told = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by id")]
        told = [line for line in told if "train/loss" in line]
        assert [line["train/global_step"] for line in told] == [2, 4]
        assert [[line[f"train/{name}"] for name in wanted] for line in told] == [
            [line[name] for name in wanted] for line in lines
        ]
