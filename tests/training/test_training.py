# SPDX-License-Identifier: Apache-2.0
"""Checks, metrics, resuming and learning of flash_hf/training/."""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, GenerationConfig

from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM, training
from flash_hf.commands.train import parse_arguments
from flash_hf.loss_flash import IGNORE
from flash_hf.training.arguments import config_fields
from flash_hf.training.checkpoints import check_output_dir, find_checkpoint
from flash_hf.training.documents import load_documents, split_documents
from flash_hf.training.packing import MaskingCollator, collate, pack_documents
from flash_hf.training.run import load_model, load_text, new_config
from flash_hf.training.tokenizer import load_tokenizer, tokenize_documents, train_tokenizer
from helpers import BOOK, OVERRIDES, TEXT, TINY, history, tiny_config, write_documents


pytestmark = pytest.mark.usefixtures("own_cache")
KINDS = ("causal", "masked")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Short documents of uneven length, so that the last block and the last batch are partly filled."""
    folder = tmp_path_factory.mktemp("files")
    write_documents(folder / "train.jsonl", 0, 6000, 301)
    write_documents(folder / "validation.jsonl", 150_000, 152_500, 301)
    train_tokenizer([{"text": TEXT[:60_000]}], 300).save_pretrained(folder / "tokenizer")
    return folder


def arguments(files: Path, output_dir: Path, *more: str, **changes):
    """Arguments of a run of 10 steps and 1.x epochs that logs every step; `changes` with None are left out."""
    options = {
        "train_file": files / "train.jsonl",
        "validation_file": files / "validation.jsonl",
        "tokenizer": files / "tokenizer",
        "config_overrides": OVERRIDES,
        "block_size": 60,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "learning_rate": 3e-3,
        "max_steps": 10,
        "eval_steps": 5,
        "save_steps": 5,
        "logging_steps": 1,
        "disable_tqdm": "true",
        "output_dir": output_dir,
        **changes,
    }
    command = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return parse_arguments([*command, *more])


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- the whole run, and resuming it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["map", "workers", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_unbroken_one(files, tmp_path, kind, data):
    """Bit for bit: with dropout, across the border of an epoch, with accumulation, for data read in any way."""
    streaming = data == "stream"
    config = f"{OVERRIDES},hidden_dropout=0.1"
    changes = {"config_overrides": config, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    # The stream's 8 documents, 27 blocks, end long before the break after 40.
    more = {
        "map": "",
        "workers": "--dataloader_num_workers 1 --dataloader_persistent_workers --eval_steps 3 --eval_on_start false",
        "stream": "--streaming --shuffle_buffer 20 --max_train_documents 8",
    }[data].split()
    model_args, data_args, args = arguments(files, tmp_path / "whole", *more, **changes)
    result = training.run_training(kind, model_args, data_args, args)
    whole = history(tmp_path / "whole")
    assert sorted(whole) == list(range(1, 11))
    if not streaming:
        epochs = history(tmp_path / "whole", "epoch")
        assert epochs[5] % 1 != 0 and int(epochs[10]) > int(
            epochs[5]
        )  # the break is inside an epoch, and one ends after

    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    parsed = arguments(files, tmp_path / "resumed", "--resume_from_checkpoint", "last", *more, **changes)
    again = training.run_training(kind, *parsed)
    assert history(tmp_path / "resumed") == whole
    assert history(tmp_path / "resumed", "eval_loss") == history(tmp_path / "whole", "eval_loss")
    assert again["after"]["eval_loss"] == result["after"]["eval_loss"]
    assert again["before"] == result["before"]  # kept from before the break
    ours, theirs = (torch.load(tmp_path / run / "checkpoint-10" / "optimizer.pt") for run in ("resumed", "whole"))
    assert all(
        torch.equal(ours["state"][index][name], value)
        for index, state in theirs["state"].items()
        for name, value in state.items()
    )


def test_rows_grouped_by_length_keep_their_order_after_a_break(tmp_path):
    """In the second epoch: the first begins with the random numbers of the seed in any run."""
    rows = [{"input_ids": [1 + n % 7] * (1 + n % 7), "labels": [n] * (1 + n % 7)} for n in range(24)]
    args = {
        "output_dir": str(tmp_path), "train_sampling_strategy": "group_by_length", "eval_strategy": "no",
        "eval_on_start": False, "per_device_train_batch_size": 4, "num_train_epochs": 3, "save_steps": 8,
        "disable_tqdm": True, "remove_unused_columns": False,
    }  # fmt: skip

    def order(resume: str | None) -> list[int]:
        seen = []

        def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
            seen.extend(row["labels"][0] for row in rows)
            full = {name: [row[name] + [0] * (7 - len(row[name])) for row in rows] for name in ("input_ids", "labels")}
            return {name: torch.tensor(values) for name, values in full.items()}

        trainer = training.FlashTrainer(
            tiny_model("causal"), training.FlashTrainingArguments(**args), train_dataset=rows, data_collator=padded
        )
        trainer.train(resume_from_checkpoint=resume)
        return seen

    whole = order(None)
    assert len(whole) == 72 and whole[:24] != whole[24:48] != whole[48:]
    assert order(str(tmp_path / "checkpoint-8")) == whole[32:]


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_bfloat16_checkpoints_are_trained_in_float32(kind, files, tmp_path):
    """In bfloat16 small updates would be lost."""
    cls = {"causal": FlashForCausalLM, "masked": FlashForMaskedLM}[kind]
    cls(tiny_config(vocab_size=300)).bfloat16().save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(str(files / "tokenizer"), masked=True)
    model = load_model(kind, training.ModelArguments(model=str(tmp_path / "model")), tokenizer, None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("workers", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}])
def test_masks_of_later_epochs_differ(workers, files, tmp_path):
    """A set of one batch in fixed order comes back unchanged each epoch: only the epoch makes its masks differ, also
    in workers that live for all epochs."""
    model_args, data_args, args = arguments(
        files, tmp_path, max_steps=3, per_device_train_batch_size=100, train_sampling_strategy="sequential", **workers
    )
    tokenizer = load_tokenizer(str(files / "tokenizer"), masked=True)
    train, validation = load_text(data_args)
    model = load_model("masked", model_args, tokenizer, None)
    trainer = training.build_trainer("masked", model, tokenizer, train, validation, data_args, args)
    seen, step = [], trainer.training_step

    def spy(model, inputs, *rest):
        seen.append((inputs["input_ids"].clone(), inputs["labels"].clone()))
        return step(model, inputs, *rest)

    trainer.training_step = spy
    trainer.train()
    originals = [torch.where(labels == IGNORE, ids, labels) for ids, labels in seen]
    assert len(seen) == 3 and all(torch.equal(originals[0], other) for other in originals)
    assert len({tuple(labels.flatten().tolist()) for _, labels in seen}) == 3


def test_streaming_trains_like_a_map_style_set(files, tmp_path):
    """In the same order, the same losses, up to where the map-style set has its padded last block."""
    losses = []
    for name, more in (("map", []), ("stream", ["--streaming", "--shuffle_buffer", "0"])):
        changes = {"max_steps": 5, "train_sampling_strategy": "sequential"} if name == "map" else {"max_steps": 5}
        training.run_training("causal", *arguments(files, tmp_path / name, *more, **changes))
        losses.append(history(tmp_path / name))
    assert len(losses[0]) == 5 and losses[0] == losses[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_everything_that_is_promised(files, tmp_path, kind):
    result = training.run_training(kind, *arguments(files, tmp_path / "run", "--packing", "documents"))
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM
    model, tokenizer = auto.from_pretrained(tmp_path / "run"), AutoTokenizer.from_pretrained(tmp_path / "run")
    assert type(model) is (FlashForCausalLM if kind == "causal" else FlashForMaskedLM)
    config = model.config
    assert (config.hidden_size, config.vocab_size, config.use_cache) == (32, 300, True)
    assert config.is_decoder == (kind == "causal")
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    if kind == "causal":
        sampling = GenerationConfig.from_pretrained(tmp_path / "run")
        assert (sampling.do_sample, sampling.temperature, sampling.top_k) == (True, 0.8, 40)
        assert sampling.pad_token_id == tokenizer.pad_token_id
        assert sampling.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])  # a list in 5.17
    assert result["before"]["step"] == 0
    # An untrained model knows nothing: about log(300) nats.
    assert result["before"]["eval_loss"] == pytest.approx(math.log(300), abs=0.5)
    assert result["after"]["eval_loss"] < result["before"]["eval_loss"] - 0.2
    saved = json.loads((tmp_path / "run" / "eval_results.json").read_text(encoding="utf-8"))
    assert saved["eval_loss"] == result["after"]["eval_loss"]
    table = training.describe(kind, result)
    assert f"{result['after']['eval_loss']:.4f}" in table and str(tmp_path / "run" / "loss.png") in table
    assert re.search(r"^loss +- +\d\.\d{4}$", training.describe(kind, {**result, "before": None}), re.M)

    lines = json.loads((tmp_path / "run" / "log_history.json").read_text(encoding="utf-8"))
    assert {"step", "loss", "eval_loss", "learning_rate"} <= {name for line in lines for name in line}
    with Image.open(result["plot"]) as image:
        assert image.format == "PNG" and min(image.size) >= 400
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two: both curves are drawn


def test_what_is_saved_has_not_been_rounded_for_the_evaluation(files, tmp_path):
    """Trainer's evaluation with bf16_full_eval leaves the model in bfloat16."""
    for name, more in (("plain", []), ("rounded", ["--bf16_full_eval", "--use_cpu"])):
        training.run_training("causal", *arguments(files, tmp_path / name, *more, max_steps=2))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "rounded")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights[0].values())


def test_dropping_the_last_batch_is_for_training(files, tmp_path):
    results, changes = [], {"max_steps": 2, "per_device_eval_batch_size": 1000}
    for name, more in (("all", []), ("dropped", ["--dataloader_drop_last"])):
        results.append(training.run_training("causal", *arguments(files, tmp_path / name, *more, **changes))["after"])
    for metric in ("eval_tokens", "eval_loss", "eval_word_perplexity"):
        assert results[0][metric] == results[1][metric]


def test_the_best_checkpoint_is_the_one_with_the_lowest_perplexity(files, tmp_path):
    more = ["--load_best_model_at_end", "--metric_for_best_model", "perplexity", "--warmup_steps", "0"]
    result = training.run_training("causal", *arguments(files, tmp_path, *more, learning_rate=10.0, max_grad_norm=0))
    found = history(tmp_path, "eval_perplexity")
    assert found[5] != found[10] and result["after"]["eval_perplexity"] == min(found[5], found[10])
    for metric, greater in (("word_perplexity", False), ("eval_bits_per_byte", False), ("accuracy", True)):
        assert arguments(files, tmp_path, metric_for_best_model=metric)[2].greater_is_better is greater
    args = arguments(files, tmp_path, "--greater_is_better", "true", save_strategy="best")[2]
    assert args.metric_for_best_model == "loss" and args.greater_is_better is True


def test_training_continues_from_a_model(files, tmp_path):
    first = training.run_training("causal", *arguments(files, tmp_path / "first"))
    GenerationConfig(do_sample=True, temperature=0.6).save_pretrained(tmp_path / "first")
    more = {"model": tmp_path / "first", "config_overrides": None, "tokenizer": None}
    second = training.run_training("causal", *arguments(files, tmp_path / "second", **more))
    assert second["before"]["eval_loss"] == pytest.approx(first["after"]["eval_loss"], rel=1e-6)
    assert second["after"]["eval_loss"] < first["after"]["eval_loss"]
    more["resume_from_checkpoint"] = next((tmp_path / "second").glob("checkpoint-*"))
    training.run_training("causal", *arguments(files, tmp_path / "third", **more))
    for name in ("second", "third"):
        kept = GenerationConfig.from_pretrained(tmp_path / name)
        assert (kept.do_sample, kept.temperature, kept.top_k) == (True, 0.6, None), name


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_checkpoints_tokenizer_pads_on_the_left(kind, trained, files, tmp_path):
    """That of --tokenizer pads on the right and does not say so, as GPT-2's."""
    own = AutoTokenizer.from_pretrained(files / "tokenizer")
    del own.init_kwargs["padding_side"]
    own.save_pretrained(tmp_path / "own")
    more = {"tokenizer": None, "tokenizer_vocab_size": 300} if trained else {"tokenizer": tmp_path / "own"}
    parsed = arguments(files, tmp_path / "run", **more)
    training.run_training(kind, *parsed)
    for folder in (tmp_path / "run", *(tmp_path / "run").glob("checkpoint-*")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.padding_side == ("left" if kind == "causal" else "right")
        assert (tokenizer.chat_template is not None) == (kind == "causal" and trained)
    if kind == "causal":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
        texts = ["Dorothy looked at the", "The"]
        out = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        for text, row in zip(texts, out, strict=True):
            alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)
            assert torch.equal(row[-8:], alone[0, -8:])


@pytest.mark.slow
def test_trainer_really_learns(tmp_path):
    """On the repo's book, 60 steps reduce the validation loss by at least 1.8 nats per token (measured: 2.27)."""
    parsed = parse_arguments(
        f"--train_file {BOOK} --validation_fraction 0.1 --tokenizer_vocab_size 1024 --block_size 128 --max_steps 60 "
        "--config_overrides hidden_size=128,num_hidden_layers=2,query_key_dim=64,chunk_size=64 --learning_rate 8e-3 "
        f"--warmup_steps 6 --save_strategy no --disable_tqdm true --output_dir {tmp_path / 'run'}".split()
    )
    result = training.run_training("causal", *parsed)
    before, after = result["before"]["eval_loss"], result["after"]["eval_loss"]
    assert before == pytest.approx(math.log(1024), abs=0.3)
    assert before - after >= 1.8
    # Lower than the loss of token frequencies alone: context is used.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    train, validation = split_documents(load_documents(BOOK), 0.1)
    counts = np.bincount(tokenizer(train[0]["text"])["input_ids"], minlength=1024) + 1.0
    unigram = -np.log(counts / counts.sum())[tokenizer(validation[0]["text"])["input_ids"]].mean()
    assert after < unigram


# --- losses, gradients, metrics --------------------------------------------------------------------------------------


def blocks_of(files: Path, kind: str) -> tuple:
    """Blocks with uneven numbers of labels: padding, borders, masks."""
    tokenizer = load_tokenizer(str(files / "tokenizer"), masked=True)
    documents = load_documents(files / "train.jsonl")
    tokenized = tokenize_documents(documents, tokenizer)
    blocks = pack_documents(tokenized, tokenizer, block_size=60, causal=kind == "causal", packing="documents")
    if kind == "masked":
        blocks = MaskingCollator(tokenizer, seed=0).mask_once(blocks)
    return blocks, tokenizer


def tiny_model(kind: str, **changes):
    torch.manual_seed(0)
    config = FlashConfig(vocab_size=300, **{**TINY, "initializer_range": 0.2, **changes})
    return (FlashForCausalLM if kind == "causal" else FlashForMaskedLM)(config)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_of_four_equals_one_large_batch(files, tmp_path, kind):
    """Same gradients at every step, though the four parts count different numbers of tokens."""
    blocks, _ = blocks_of(files, kind)
    # Three quarters of the first batch are blocks with few labels.
    few = [{**row, "labels": [IGNORE] * 50 + row["labels"][50:]} for row in blocks.select(range(6))]
    blocks = Dataset.from_list([*few, *blocks.select(range(6, 24))], features=blocks.features)
    gradients = {}
    for size, accumulate in ((8, 1), (2, 4)):
        args = training.FlashTrainingArguments(
            output_dir=tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
            max_steps=3, learning_rate=0.05, optim="sgd", max_grad_norm=0.0, logging_steps=1, eval_strategy="no",
            eval_on_start=False, save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        model = tiny_model(kind).double()
        trainer = training.FlashTrainer(model=model, args=args, train_dataset=blocks, data_collator=collate)
        seen = gradients[size] = []
        callback = training.LossPlotCallback()
        callback.on_pre_optimizer_step = lambda *args, seen=seen, model=model, **kwargs: seen.append(
            torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])
        )
        trainer.add_callback(callback)
        trainer.train()
        seen.append(torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log]))
    assert len(gradients[8]) == 4 and gradients[8][0].abs().max() > 0.01
    for one, four in zip(gradients[8], gradients[2], strict=True):
        torch.testing.assert_close(one, four, rtol=1e-6, atol=1e-8)


def test_graphs_without_a_gpu_are_refused_in_a_word(files, tmp_path, caplog):
    blocks, _ = blocks_of(files, "causal")
    losses = []
    for graph in (True, False):
        args = training.FlashTrainingArguments(
            output_dir=tmp_path / str(graph), max_steps=2, logging_steps=1, eval_strategy="no", eval_on_start=False,
            save_strategy="no", disable_tqdm=True, use_cpu=True, cuda_graph=graph,
        )  # fmt: skip
        trainer = training.FlashTrainer(
            model=tiny_model("causal"), args=args, train_dataset=blocks, data_collator=collate
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert caplog.text.count("cuda_graph needs one CUDA device") == 1


def test_weight_decay_is_for_matrices_only(tmp_path):
    for relative_bias in ("toeplitz", "rotary", "t5"):
        model = tiny_model("causal", relative_bias=relative_bias, norm_type="layer_norm", tie_word_embeddings=False)
        args = training.FlashTrainingArguments(
            output_dir=tmp_path, weight_decay=0.1, eval_strategy="no", eval_on_start=False
        )
        trainer = training.FlashTrainer(model=model, args=args)
        optimizer = trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
        assert set(decay) == {0.1, 0.0}
        layers = [f"model.layers.{i}.gau.{part}_proj.weight" for i in range(2) for part in "uvzo"]
        assert decay[0.1] == {"model.embed_tokens.weight", "lm_head.weight", *layers}
        assert decay[0.1] | decay[0.0] == set(names.values())
        assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-6


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_equal_a_direct_computation(files, tmp_path, kind, packing):
    """Trainer's evaluation against a plain loop over the blocks, one at a time, in float64."""
    parsed = arguments(files, tmp_path, packing=packing)
    _, data_args, args = parsed
    tokenizer = load_tokenizer(str(files / "tokenizer"), masked=True)
    train, validation = load_text(data_args)
    model = tiny_model(kind)
    results = []
    for size in (4, 3):
        args.per_device_eval_batch_size = size
        trainer = training.build_trainer(kind, model, tokenizer, train, validation, data_args, args)
        results.append(trainer.evaluate())
    got = results[0]

    nats, right, count = 0.0, 0, 0
    model = model.eval()
    for row in trainer.eval_dataset:
        inputs = {key: torch.tensor(value)[None] for key, value in row.items() if key != "labels"}
        with torch.no_grad():
            probabilities = model(**inputs).logits[0].double().log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label != IGNORE:
                guess = probabilities[place - 1 if kind == "causal" else place]
                nats, right, count = nats - guess[label].item(), right + int(guess.argmax() == label), count + 1
    assert trainer.model.skip_logits  # in training; the metrics above had their logits
    assert got["eval_tokens"] == count
    assert got["eval_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert got["eval_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    if kind == "masked":
        assert got["eval_masked_accuracy"] == pytest.approx(right / count)
        assert set(got).isdisjoint({"eval_bits_per_byte", "eval_word_perplexity"})
    else:
        text = [
            json.loads(line)["text"] for line in (files / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text]
        assert count == sum(map(len, ids)) + len(ids)  # every token of the text, and the end of every document
        assert got["eval_accuracy"] == pytest.approx(right / count)
        n_bytes, n_words = (sum(len(f(part)) for part in text) for f in (str.encode, str.split))
        assert got["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
        assert got["eval_word_perplexity"] == pytest.approx(math.exp(nats / n_words), rel=1e-4)
    # The batches' sizes do not matter, although the last block counts fewer tokens.
    for name in ("eval_loss", "eval_tokens"):
        assert results[1][name] == pytest.approx(got[name], rel=1e-6)


def test_evaluation_keeps_no_logits():
    logits, labels = torch.randn(2, 5, 300), torch.randint(0, 300, (2, 5))
    labels[0, :3] = IGNORE
    for causal in (True, False):
        nll, right = training.token_scores((logits, logits), labels, causal=causal)
        assert nll.shape == right.shape == labels.shape
        assert (nll[labels == IGNORE] == 0).all()
        shifted = logits.roll(1, 1) if causal else logits
        want = -shifted.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        counted = labels != IGNORE
        counted[:, 0] &= not causal
        torch.testing.assert_close(nll[counted], want[counted])


def test_a_broken_loss_is_shown(files, tmp_path):
    """Trainer would leave NaN out of its log and out of its mean."""
    model_args, data_args, args = arguments(files, tmp_path, max_steps=1, max_grad_norm=1e-3)
    tokenizer = load_tokenizer(str(files / "tokenizer"), masked=True)
    train, validation = load_text(data_args)
    model = tiny_model("causal")
    torch.nn.init.constant_(model.model.layers[0].gau.u_proj.weight, float("nan"))
    trainer = training.build_trainer("causal", model, tokenizer, train, validation, data_args, args)
    trainer.train()
    assert math.isnan(history(tmp_path)[1]) and math.isnan(trainer.evaluate()["eval_loss"])


# --- bad input: refused before any work ------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch):
    """Fail if the data is touched: a refusal should not wait for it."""

    def touched(*args, **kwargs):
        raise AssertionError("the data was loaded before the arguments were checked")

    monkeypatch.setattr("flash_hf.training.run.load_text", touched)


@pytest.mark.parametrize("place", ["below a file", "read-only"])
def test_an_unwritable_output_dir_is_refused(files, tmp_path, no_work, place):
    """Also for root, which ignores permission bits."""
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    folder = tmp_path / "file" / "run" if place == "below a file" else Path("/proc/flash_hf_run")
    if place == "read-only" and not Path("/proc/version").exists():
        pytest.skip("no /proc here")
    with pytest.raises(OSError, match=f"output_dir {folder} must be a folder that can be written to"):
        training.run_training("causal", *arguments(files, folder))
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"


def test_an_earlier_run_is_not_overwritten_silently(files, tmp_path, no_work):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_text("precious", encoding="utf-8")
    with pytest.raises(FileExistsError, match="must be empty.*another one, or start over with --overwrite_output_dir"):
        training.run_training("causal", *arguments(files, tmp_path / "run"))
    assert fingerprint(tmp_path / "run").keys() == {"model.safetensors"}
    assert (tmp_path / "run" / "model.safetensors").read_text(encoding="utf-8") == "precious"
    (tmp_path / "run" / "checkpoint-5").mkdir()
    with pytest.raises(FileExistsError, match="must be empty.*--resume_from_checkpoint last.*--overwrite_output_dir"):
        check_output_dir(tmp_path / "run")
    check_output_dir(tmp_path / "run", overwrite=True)
    check_output_dir(tmp_path / "run", resume=tmp_path / "run" / "checkpoint-5")


def test_overwriting_removes_the_old_checkpoints(files, tmp_path):
    training.run_training("causal", *arguments(files, tmp_path / "run"))
    (tmp_path / "run" / "checkpoint-notes").mkdir()
    parsed = arguments(files, tmp_path / "run", "--overwrite_output_dir", max_steps=4, save_steps=2)
    training.run_training("causal", *parsed)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-notes",
    ]  # fmt: skip
    assert find_checkpoint("last", tmp_path / "run").name == "checkpoint-4"


def test_resuming_from_what_is_no_checkpoint(files, tmp_path, monkeypatch):
    run = tmp_path / "run"
    training.run_training("causal", *arguments(files, run))
    monkeypatch.setattr("flash_hf.training.run.load_text", lambda *args: pytest.fail("the data was loaded first"))

    def refused(folder, *complete):
        saved = fingerprint(tmp_path)
        with pytest.raises(ValueError, match="must be a complete checkpoint of this training") as error:
            training.run_training("causal", *arguments(files, run, "--resume_from_checkpoint", str(folder)))
        assert f"Complete checkpoints in {run}: {', '.join(map(str, complete)) or 'none'}." in str(error.value)
        assert fingerprint(tmp_path) == saved

    first, second = run / "checkpoint-5", run / "checkpoint-10"
    refused(tmp_path / "nowhere", first, second)
    refused(run, first, second)  # it has the model and a log, but no random state
    # A checkpoint whose saving was cut off: Trainer writes its state last.
    content = (second / "trainer_state.json").read_bytes()
    (second / "trainer_state.json").write_bytes(content[: len(content) // 2])
    refused(second, first)
    assert find_checkpoint("last", run) == find_checkpoint("True", run) == first
    (second / "trainer_state.json").write_bytes(content)
    assert find_checkpoint("last", run) == find_checkpoint(str(second), tmp_path) == second
    for folder in (first, second):
        (folder / "trainer_state.json").unlink()
    refused("last")
    assert find_checkpoint(None, run) is None


def test_resuming_with_another_model_is_refused(files, tmp_path):
    training.run_training("causal", *arguments(files, tmp_path / "run", max_steps=5))
    saved = fingerprint(tmp_path / "run")
    changes = {"config_overrides": "hidden_size=64,num_hidden_layers=2,query_key_dim=16,chunk_size=16"}
    with pytest.raises(ValueError, match="has hidden_size=32, the arguments 64"):
        training.run_training(
            "causal", *arguments(files, tmp_path / "run", "--resume_from_checkpoint", "last", **changes)
        )
    assert fingerprint(tmp_path / "run") == saved


def test_wrong_arguments_are_refused_before_the_data(files, tmp_path, no_work, capsys, monkeypatch):
    def run(*more, **changes):
        training.run_training("causal", *arguments(files, tmp_path / "run", *more, **changes))

    with pytest.raises(ValueError, match="unknown field `hiden_size`.*Did you mean 'hidden_size'"):
        run(config_overrides="hiden_size=64")
    with pytest.raises(Exception, match="`query_key_dim` must be even"):
        run(config_overrides="query_key_dim=15")
    with pytest.raises(ValueError, match="must read name=value,name=value, got 'chunk_size'"):
        run(config_overrides="chunk_size")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        run(config=tmp_path / "none.json")
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a mapping of options, got list"):
        run(config=tmp_path / "list.yaml")
    (tmp_path / "misspelt.yaml").write_text("learning_rat: 1.0\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run(config=tmp_path / "misspelt.yaml")
    assert "no option --learning_rat. Did you mean --learning_rate?" in capsys.readouterr().err
    (tmp_path / "flat.json").write_text('{"query_key_dim": 16}', encoding="utf-8")
    with pytest.raises(SystemExit):
        run(config=tmp_path / "flat.json")
    error = capsys.readouterr().err
    assert "--query_key_dim is a field of FlashConfig, not an option" in error and "its entry model_config" in error
    for wrong, message in (("{", "must be JSON"), ("[1]", "must be a mapping of fields, got list")):
        with pytest.raises(ValueError, match=f"--model_config {message}"):
            run(model_config=wrong)
    with pytest.raises(ValueError, match="has its own configuration"):
        run(model="somewhere")
    warned = []
    monkeypatch.setattr("flash_hf.training.run.logger.warning", warned.append)
    with pytest.raises(AssertionError, match="the data was loaded"):
        training.run_training("masked", *arguments(files, tmp_path / "run", "--preset", "plus", config_overrides=None))
    assert "plus is for causal models" in warned[0] and len(warned) == 1
    with pytest.raises(ValueError, match="--streaming needs .* neither dataloader_num_workers"):
        run("--streaming", dataloader_num_workers=2)
    with pytest.raises(ValueError, match="sequence_warmup_start must give block_size=60 when doubled.*got 7"):
        run(sequence_warmup_steps=5, sequence_warmup_start=7)
    with pytest.raises(ValueError, match="--streaming needs max_steps of at least 1"):
        run("--streaming", max_steps=None)
    for changes in ({"train_file": None}, {"dataset_name": "x/y"}):
        with pytest.raises(ValueError, match="give exactly one"):
            run(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prediction_loss_only", "prediction_loss_only must be False, got True"),
        ("--batch_eval_metrics", "batch_eval_metrics must be False, got True"),
        ("--eval_do_concat_batches false", "eval_do_concat_batches must be True, got False"),
        ("--label_names input_ids", r"label_names must be left out, got \['input_ids'\]"),
        ("--load_best_model_at_end --metric_for_best_model perplexty", "got 'perplexty'. Did you mean 'perplexity'"),
        ("--load_best_model_at_end --eval_strategy no", "requires the save and eval strategy to match"),
        ("--per_device_eval_batch_size 0", "per_device_eval_batch_size must be at least 1, got 0"),
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps must be at least 1, got 0"),
        ("--max_steps -1 --num_train_epochs -1", "num_train_epochs must be at least 0, got -1"),
        ("--max_steps -1 --num_train_epochs nan", "num_train_epochs must be at least 0, got nan"),
        ("--max_grad_norm nan", "max_grad_norm must be at least 0, got nan"),
        ("--warmup_steps nan", "warmup_steps must be at least 0, got nan"),
        ("--weight_decay -1", "weight_decay must be at least 0, got -1"),
        ("--neftune_noise_alpha -1", "neftune_noise_alpha must be at least 0, got -1"),
        ("--label_smoothing_factor -1", "label_smoothing_factor must be at least 0, got -1"),
        ("--label_smoothing_factor 2", "label_smoothing_factor must be at most 1, got 2"),
        ("--dataloader_num_workers 1 --dataloader_prefetch_factor 0", "prefetch_factor must be at least 1, got 0"),
        ("--eval_accumulation_steps 0", "eval_accumulation_steps must be at least 1, got 0"),
        ("--learning_rate nan", "learning_rate must be at least 0, got nan"),
        ("--adam_beta2 1", "adam_beta2 must be below 1, got 1"),
        (
            "--lr_scheduler_type cosine_with_min_lr",
            "must fit lr_scheduler_type=cosine_with_min_lr, got None: .*min_lr",
        ),
        ('--lr_scheduler_kwargs {"rate":1}', "must fit lr_scheduler_type=linear, got {'rate': 1}: .*'rate'"),
        ('--lr_scheduler_kwargs {"rate"', 'lr_scheduler_kwargs must be JSON, got {"rate": Expecting'),
        ("--seed -1", "seed must be at least 0, got -1"),
        ("--data_seed -1", "data_seed must be at least 0, got -1"),
        ("--seed 4294967296", r"seed must be below 2\*\*32 = 4294967296, got 4294967296"),
        ("--torch_compile --torch_compile_backend eagre", "got 'eagre'. Did you mean 'eager'"),
        ("--auto_find_batch_size --batch_tokens 480", "auto_find_batch_size must be left out with batch_tokens"),
        ("--auto_find_batch_size --streaming", "--streaming needs .* nor auto_find_batch_size"),
        ("--mlm_probability 0", "mlm_probability must be above 0 and at most 1, got 0"),
        ("--block_size 1", "block_size must be at least 2"),
        ("--max_eval_documents 0", "max_eval_documents must be at least 1, got 0"),
        ("--tokenizer /no/where", "--tokenizer must be a folder or a name on the Hub; there is no folder /no/where"),
        ("--tokenizer nowhere", "--tokenizer nowhere is not a folder, and cannot be loaded from the Hub"),
    ],
)
def test_options_that_would_end_a_run_in_its_middle_are_refused(files, tmp_path, no_work, options, message):
    with pytest.raises((ValueError, ImportError, OSError), match=message):
        training.run_training("causal", *arguments(files, tmp_path / "run", *options.split()))


def test_a_run_needs_an_output_dir(files):
    with pytest.raises(ValueError, match="output_dir must name the folder for the model and the log"):
        arguments(files, None)


def test_wrong_data_is_refused(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        training.run_training("causal", *arguments(files, tmp_path / "run", train_file=tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="with --streaming give --validation_file"):
        training.run_training("causal", *arguments(files, tmp_path / "run", "--streaming", validation_file=None))
    (tmp_path / "latin1.txt").write_bytes("Das Mädchen".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1\.txt must be a complete file of UTF-8 text, but: .*0xe4"):
        training.run_training("masked", *arguments(files, tmp_path / "run", validation_file=tmp_path / "latin1.txt"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt must hold text, but has none"):
        training.run_training("causal", *arguments(files, tmp_path / "run", train_file=tmp_path / "empty.txt"))
    assert not list((tmp_path / "run").iterdir())  # and the next attempt finds the folder unused


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_tokenizer_with_unused_ids(kind, files, tmp_path):
    """The model has a row for the highest id, which is in the text, and not only as many as there are tokens."""
    tokenizer = load_tokenizer(str(files / "tokenizer"), masked=True)
    tokenizer.save_pretrained(tmp_path / "gaps")
    content = json.loads((tmp_path / "gaps" / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["Dorothy"] = 1000
    content["added_tokens"].append({**content["added_tokens"][0], "id": 1000, "content": "Dorothy", "special": False})
    (tmp_path / "gaps" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "text.txt").write_text("Dorothy ran. " * 200, encoding="utf-8")
    options = {name: tmp_path / "text.txt" for name in ("train_file", "validation_file")}
    parsed = arguments(files, tmp_path / "run", tokenizer=tmp_path / "gaps", max_steps=2, eval_steps=2, **options)
    training.run_training(kind, *parsed)
    model = (AutoModelForCausalLM if kind == "causal" else AutoModelForMaskedLM).from_pretrained(tmp_path / "run")
    assert len(load_tokenizer(str(tmp_path / "run"), masked=True)) < model.config.vocab_size == 1001
    small = training.ModelArguments(config_overrides="vocab_size=500,hidden_size=32,num_hidden_layers=1")
    with pytest.raises(ValueError, match="vocab_size must be at least 1001, the tokenizer's highest id"):
        load_model(kind, small, load_tokenizer(str(tmp_path / "gaps"), masked=True), None)


def test_config_file_and_overrides(files, tmp_path):
    (tmp_path / "a.json").write_text('{"model_config": {"hidden_size": 48, "norm_eps": 1e-6}}', encoding="utf-8")
    fields = "{hidden_size: 48, relative_bias: null, rope_parameters: {rope_theta: 500.0}}"
    (tmp_path / "a.yaml").write_text(f"model_config: {fields}\n", encoding="utf-8")
    overrides = "chunk_size=32,attention_type=local,relative_bias=null,use_rope=false,norm_eps=1e-4"
    args = arguments(files, tmp_path, config=tmp_path / "a.json", config_overrides=overrides)[0]
    assert config_fields(args) == {
        "hidden_size": 48, "norm_eps": 1e-4, "chunk_size": 32, "attention_type": "local", "relative_bias": None,
        "use_rope": False,
    }  # fmt: skip
    args = arguments(files, tmp_path, config=tmp_path / "a.yaml", config_overrides=None)[0]
    assert new_config("causal", config_fields(args)).rope_parameters["rope_theta"] == 500
    tokenizer = load_tokenizer(str(files / "tokenizer"), masked=True)
    padded = training.ModelArguments(config_overrides="vocab_size=320,hidden_size=32,num_hidden_layers=1")
    assert load_model("causal", padded, tokenizer, None).config.vocab_size == 320
    small = training.ModelArguments(config_overrides="vocab_size=200,hidden_size=32,num_hidden_layers=1")
    with pytest.raises(ValueError, match="vocab_size must be at least 300, the tokenizer's highest id . 1, got 200"):
        load_model("causal", small, tokenizer, None)


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_arguments_from_a_file(tmp_path, ending):
    """As the first argument, or named by --config; the command line overrides the file."""
    options = {"train_file": ["a.txt"], "output_dir": str(tmp_path), "block_size": 128, "learning_rate": 0.002}
    (tmp_path / f"run.{ending}").write_text(json.dumps(options), encoding="utf-8")  # JSON is YAML, too
    _, data_args, args = parse_arguments([str(tmp_path / f"run.{ending}")])
    assert (data_args.block_size, data_args.train_file, args.learning_rate) == (128, ["a.txt"], 0.002)
    assert (args.adam_epsilon, args.weight_decay, args.data_seed) == (1e-6, 0.01, args.seed)
    command = ["--block_size", "64", "--config", str(tmp_path / f"run.{ending}"), "--train_file", "b.txt", "c.txt"]
    _, data_args, args = parse_arguments(command)
    assert (data_args.block_size, data_args.train_file, args.learning_rate) == (64, ["b.txt", "c.txt"], 0.002)
