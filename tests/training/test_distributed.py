# SPDX-License-Identifier: Apache-2.0
"""Two CPU processes give the results of one: data parallel, FSDP2, tensor parallel; a model spread over devices."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM, training
from flash_hf.commands.train import parse_arguments
from flash_hf.training.arguments import check_arguments
from helpers import ROOT, assert_close, make_model, random_ids, run_python, tiny_config, write_documents


TRAIN = (
    "scripts/train_clm.py --train_file tests/data/wizard_of_oz.txt --config scripts/tiny.json --block_size 64 "
    "--max_steps 5 --logging_steps 1 --eval_strategy no --eval_on_start false --use_cpu true --save_strategy no "
    "--report_to none --tokenizer_vocab_size 400 --validation_fraction 0.01 --config_overrides chunk_size=32"
).split()


def train_here(kind, *command):
    """A training script's work in this process, with its own cache beside the output."""
    command = [str(word) for word in command]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", Path(command[command.index("--output_dir") + 1]) / "cache")
        training.run_training(kind, *parse_arguments(command[1:]))


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    train_here("causal", *TRAIN, "--per_device_train_batch_size", 8, "--output_dir", folder / "out")
    return folder / "out"


def for_two_cpus(name, folder):
    """The YAML file of the repo, with what a test machine lacks changed: GPUs, bf16, eight of them."""
    settings = yaml.safe_load((ROOT / "scripts" / "accelerate_configs" / name).read_text(encoding="utf-8"))
    settings.update(num_processes=2, mixed_precision="no", use_cpu=True)
    path = folder / name
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "streaming"), [("clm", True), ("mlm", False)])
def test_two_processes_read_and_mask_what_one_does(kind, streaming, tmp_path):
    """A stream is read once and shared out, a tokenizer is trained once, and masks do not depend on the process.

    One process resumes a checkpoint of the two, at the stream's position.
    """
    write_documents(tmp_path / "train.jsonl", 0, 60_000, 700)
    write_documents(tmp_path / "validation.jsonl", 60_000, 61_000, 700)
    command = (
        f"scripts/train_{kind}.py --train_file {tmp_path / 'train.jsonl'} --config scripts/tiny.json --block_size 64 "
        f"--validation_file {tmp_path / 'validation.jsonl'} --batch_tokens 1024 --max_steps 5 --logging_steps 1 "
        f"--shuffle_buffer 30 --eval_strategy no --eval_on_start false --use_cpu true --save_steps 3 "
        f"--tokenizer_vocab_size 400 --streaming {str(streaming).lower()} --ddp_find_unused_parameters false"
    ).split()
    here = partial(train_here, "causal" if kind == "clm" else "masked", *command, "--per_device_train_batch_size", 8)
    here("--output_dir", tmp_path / "one")
    launch = ["-m", "accelerate.commands.launch", "--config_file", for_two_cpus("ddp.yaml", tmp_path)]
    port = 32500 + os.getpid() % 1000 + 3 * (kind == "mlm") + streaming
    command += ["--per_device_train_batch_size", 4, "--ddp_backend", "gloo", "--output_dir", tmp_path / "two"]
    run_python(*launch, "--main_process_port", port, *command)
    assert len(losses(tmp_path / "one")) == 5
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), 1e-5)
    checkpoint = tmp_path / "two" / "checkpoint-3"
    here("--output_dir", tmp_path / "two", "--resume_from_checkpoint", checkpoint)
    assert len(losses(tmp_path / "two")) == 5
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "machines", "shared"),
    [("ddp.yaml", 2, 1), ("fsdp2.yaml", 1, 1), ("ddp.yaml", 1, 2), ("fsdp2.yaml", 1, 2)],
)
def test_two_processes_give_the_losses_of_one(name, machines, shared, single, tmp_path):
    """On one machine, or on two (here with one address), each with its own launch; with whole rows, or shared ones."""
    port = 29500 + os.getpid() % 1000 + (name == "ddp.yaml") * 1000 + shared * 7
    launch = ["-m", "accelerate.commands.launch", "--config_file", for_two_cpus(name, tmp_path), "--num_machines",
              machines, "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]  # fmt: skip
    train = [*TRAIN, "--per_device_train_batch_size", 4, "--ddp_backend", "gloo", "--output_dir", tmp_path / "out"]
    train += ["--context_parallel_size", shared]
    with ThreadPoolExecutor() as pool:
        for launched in [pool.submit(run_python, *launch, rank, *train) for rank in range(machines)]:
            launched.result()
    assert len(losses(single)) == 5
    assert_close(losses(tmp_path / "out"), losses(single), 1e-5)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", single))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert_close(ours[key], value, 1e-3, key)


def test_every_launch_file_is_read_and_names_the_layer():
    from accelerate.commands.config.config_args import load_config_from_file

    folder = ROOT / "scripts" / "accelerate_configs"
    kinds = {path.name: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    types = {name: str(config.distributed_type).split(".")[-1] for name, config in kinds.items()}
    assert types == {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP", "deepspeed_zero2.yaml": "DEEPSPEED"}
    assert kinds["fsdp2.yaml"].fsdp_config["fsdp_transformer_layer_cls_to_wrap"] in FlashForCausalLM._no_split_modules
    assert kinds["fsdp2.yaml"].fsdp_config["fsdp_version"] == 2


def test_the_deepspeed_file_selects_zero(monkeypatch):
    """Without DeepSpeed: what `accelerate launch` passes to its processes, and what they do with it."""
    from accelerate.commands import launch
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    launched = []
    monkeypatch.setattr(launch, "deepspeed_launcher", launched.append)
    path = ROOT / "scripts" / "accelerate_configs" / "deepspeed_zero2.yaml"
    launch.launch_command(launch.launch_command_parser().parse_args(["--config_file", str(path), *TRAIN]))
    (args,) = launched
    assert [args.training_script, *args.training_script_args] == TRAIN and args.num_processes == 8
    _, environment = prepare_deepspeed_cmd_env(args)
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name in [name for name in environment if name.startswith("ACCELERATE_")]:
        monkeypatch.setenv(name, environment[name])
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true" and environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "none"
    # Trainer fills these in.
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


TENSOR_PARALLEL = """
import os
import sys
import torch
import flash_hf
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto"))
assert model.model.layers[0].gau.u_proj.weight.to_local().shape[0] == 24, "u_proj is not sharded"
inputs = torch.load(sys.argv[1] + "/inputs.pt", weights_only=True)
with torch.no_grad():
    logits = model(inputs["ids"], attention_mask=inputs["mask"]).logits
tokens = model.generate(
    inputs["ids"], attention_mask=inputs["mask"], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
)
if torch.distributed.get_rank() == 0:
    torch.save({"logits": logits, "tokens": tokens}, sys.argv[1] + "/out.pt")
torch.distributed.destroy_process_group()
os._exit(0)  # a thread of gloo that waits for the interpreter while this ends aborts the process
"""


@pytest.mark.slow
def test_tensor_parallel_over_two_processes(tmp_path):
    model = make_model(FlashForCausalLM, tiny_config(tie_word_embeddings=False, vocab_size=62), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    model = FlashForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(model.config, 2, 29)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    torch.save({"ids": ids, "mask": mask}, tmp_path / "inputs.pt")
    (tmp_path / "program.py").write_text(TENSOR_PARALLEL, encoding="utf-8")
    port = 31500 + os.getpid() % 1000
    run_python(
        "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port, tmp_path / "program.py", tmp_path
    )
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        assert_close(out["logits"][mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()], 1e-4)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(out["tokens"], model.generate(ids, attention_mask=mask, **options))


def test_tensor_parallel_plan_names_modules_that_exist():
    model = make_model(FlashForMaskedLM, tiny_config())
    names = {name for name, _ in model.model.named_modules()}
    for pattern in FlashConfig.base_model_tp_plan:
        assert pattern.replace("*", "1") in names
    for cls in (FlashForMaskedLM, FlashForCausalLM):
        assert set(cls._tp_plan) == {"lm_head"}


def test_device_map_with_layers_on_disk(tmp_path):
    """Layers wait on disk and are fetched one by one: the layout has to follow them from device to device."""
    model = make_model(FlashForCausalLM, tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    model = FlashForCausalLM.from_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.embed_positions": "cpu", "model.layers.0": "cpu",
              "model.layers.1": "disk", "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "cpu"}  # fmt: skip
    spread = FlashForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert spread.model.layers[1].gau.u_proj.weight.device.type == "meta"
    ids = random_ids(model.config, 2, 29)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        assert_close(spread(ids, attention_mask=mask).logits, expected, 1e-6)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = spread.generate(ids, attention_mask=mask, **options)
    assert torch.equal(got, model.generate(ids, attention_mask=mask, **options))
    automatic = FlashForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    with torch.no_grad():
        out = automatic(ids.to(automatic.device), attention_mask=mask.to(automatic.device)).logits
    assert_close(out, expected, 1e-4)


def test_what_cannot_be_distributed_is_refused():
    model = make_model(FlashForCausalLM, tiny_config(), dtype=torch.float32)
    assert not model.supports_context_parallel
    # Trainer requires SDPA; without it, ranks would get these positions: one part of the sequence, or two.
    settings = SimpleNamespace(cp_enabled=True, cp_backend="torch")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(parallelism_config=settings))
    ids = random_ids(model.config, 1, 8)
    with pytest.raises(ValueError, match="Context parallelism is supported only with SDPA"):
        Trainer._prepare_context_parallel_inputs(trainer, model, {"input_ids": ids})
    for positions in ([*range(8, 16)], [0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]):
        with pytest.raises(ValueError, match="position_ids"):
            model(ids, position_ids=torch.tensor([positions]))
    for start in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(NotImplementedError, match="Continuous batching.*left-padded batch"):
            start([[1, 2, 3]], max_new_tokens=2)


def test_what_cannot_share_rows_is_refused(tmp_path):
    model = make_model(FlashForCausalLM, tiny_config(), dtype=torch.float32)
    options = {
        "output_dir": str(tmp_path),
        "report_to": [],
        "use_cpu": True,
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    for more, message in (
        ({"context_parallel_size": 2}, "needs a multiple of 2 processes .got 1."),
        ({"context_parallel_size": 0}, "context_parallel_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            args = training.FlashTrainingArguments(**options, **more)
            check_arguments(args, ["loss"])
            training.FlashTrainer(model=model, args=args)
    trainer = training.FlashTrainer(model=model, args=training.FlashTrainingArguments(**options))
    trainer.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_enabled=True, cp_size=2))
    with pytest.raises(ValueError, match="ParallelismConfig.cp_size=2. .*use context_parallel_size=2"):
        trainer._context_mesh()
