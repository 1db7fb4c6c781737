# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""What users do with the Hub, with the real clients against the server of hub_server.py.

huggingface_hub reads HF_ENDPOINT when it is imported, so test_hub.py runs pytest on this file in a process of its own,
once for each transport (HUB_TRANSPORT=lfs or xet). Every load below uses a cache of its own: it comes from the server.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hub_server


TRANSPORT = os.environ["HUB_TRANSPORT"]
SERVER, os.environ["HF_ENDPOINT"], HUB = hub_server.serve(root=os.environ["HUB_ROOT"], xet=TRANSPORT == "xet")
WRITE, READ, OTHER = "hf_alice", "hf_alice_ro", "hf_bob"
os.environ["HF_TOKEN"] = WRITE

import datasets
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from flash_hf import FlashForCausalLM, FlashForMaskedLM, push_with_code, training
from flash_hf.commands.train import parse_arguments
from helpers import make_model, random_ids, tiny_config


API = HfApi()
CONFIG = tiny_config(hidden_size=48, num_hidden_layers=4)
IDS = random_ids(CONFIG, 2, 21)


def make(seed: int = 0) -> FlashForCausalLM:
    return make_model(FlashForCausalLM, CONFIG, seed=seed, dtype=torch.float32)


@pytest.fixture
def model():
    return make()


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(CONFIG.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w1", eos_token="w2")


@pytest.fixture
def quick(monkeypatch):
    """The clients' pauses between retries would take most of the time."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def load(repo: str, cache: Path, **options) -> FlashForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(repo, cache_dir=cache, **options)
    assert type(model) is FlashForCausalLM
    return model


def same(first, second) -> bool:
    with torch.no_grad():
        return torch.equal(first(IDS).logits, second(IDS).logits)


def weight_files(repo: str) -> list[str]:
    return sorted(f for f in API.list_repo_files(repo) if f.endswith(".safetensors"))


def history(repo: str) -> list[str]:
    return [commit.commit_id for commit in API.list_repo_commits(repo)]


def no_weights(cache: Path) -> bool:
    """Whether no snapshot in `cache` offers a weight file, whole or partial."""
    return not list(cache.glob("models--*/snapshots/*/*.safetensors"))


def stored(repo: str) -> Path:
    """The file on the server that holds the bytes of `repo`'s weights."""
    (entry,) = API.get_paths_info(repo, "model.safetensors")
    if TRANSPORT == "lfs":
        return Path(HUB.lfs(entry.lfs.sha256))
    ((xorb, *_),) = HUB.files[HUB.xet_of[entry.lfs.sha256][0]]
    return Path(HUB.root, "cas", xorb)


def test_model_and_tokenizer_by_name(model, tokenizer, tmp_path):
    model.push_to_hub("alice/plain")
    tokenizer.push_to_hub("alice/plain")
    loaded = load("alice/plain", tmp_path)
    assert same(loaded, model)
    texts = AutoTokenizer.from_pretrained("alice/plain", cache_dir=tmp_path)
    assert texts("w5 w6")["input_ids"] == [5, 6]
    new = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **new), model.generate(IDS, **new))
    used_xet = any("/v1/reconstructions/" in path for _, path, _ in HUB.log)
    assert used_xet == (TRANSPORT == "xet")
    # The cache alone is enough for the next time.
    assert same(load("alice/plain", tmp_path, local_files_only=True), model)


def test_shards_and_what_replaces_them(model, tmp_path):
    model.push_to_hub("alice/sharded", max_shard_size="60KB")
    assert len(weight_files("alice/sharded")) > 2
    assert same(load("alice/sharded", tmp_path / "1"), model)
    whole = make(seed=1)
    push_with_code(whole, "alice/sharded")
    assert weight_files("alice/sharded") == ["model.safetensors"]
    assert same(load("alice/sharded", tmp_path / "2"), whole)
    # transformers prefers one file to shards: if it were left, the old weights would be loaded.
    push_with_code(model, "alice/sharded", max_shard_size="60KB")
    assert "model.safetensors" not in weight_files("alice/sharded")
    assert same(load("alice/sharded", tmp_path / "3"), model)


def test_a_variant_stands_beside_the_other_weights(model, tmp_path):
    half = make(seed=1)
    push_with_code(model, "alice/variants")
    push_with_code(make(seed=2), "alice/variants", variant="half", max_shard_size="60KB")
    push_with_code(half, "alice/variants", variant="half")
    assert weight_files("alice/variants") == ["model.half.safetensors", "model.safetensors"]
    assert same(load("alice/variants", tmp_path / "1"), model)
    assert same(load("alice/variants", tmp_path / "2", variant="half"), half)
    push_with_code(make(seed=2), "alice/variants", variant="half", max_shard_size="60KB")
    assert same(load("alice/variants", tmp_path / "3", variant="half"), make(seed=2))
    assert same(load("alice/variants", tmp_path / "4"), model)


def test_push_with_code_is_one_commit(model, tokenizer, tmp_path):
    card = ModelCard("---\nlicense: apache-2.0\n---\n# A card")
    commit = push_with_code(model, "alice/coded", tokenizer, card=card, private=True, commit_message="All of it")
    assert history("alice/coded")[0] == commit.oid and len(history("alice/coded")) == 2
    assert API.list_repo_commits("alice/coded")[0].title == "All of it"
    assert API.model_info("alice/coded").private
    files = set(API.list_repo_files("alice/coded"))
    sources = {path.name for path in Path(sys.modules["flash_hf"].__file__).parent.glob("*_flash.py")}
    assert sources | {"config.json", "tokenizer.json", "README.md", "model.safetensors"} <= files
    assert {name for name in files if name.endswith(".py")} == sources
    # The package's own classes win over the repository's code, without a question.
    assert same(load("alice/coded", tmp_path, revision=commit.oid), model)
    # A branch, and a pull request, leave the main branch alone.
    push_with_code(make(seed=2), "alice/coded", revision="draft")
    push_with_code(make(seed=3), "alice/coded", create_pr=True)
    assert same(load("alice/coded", tmp_path, revision="draft"), make(seed=2))
    assert same(load("alice/coded", tmp_path, revision="refs/pr/1"), make(seed=3))
    assert same(load("alice/coded", tmp_path), model) and history("alice/coded")[0] == commit.oid


def test_a_pushed_encoder_is_a_sentence_transformer(tokenizer, tmp_path):
    encoder = make_model(FlashForMaskedLM, CONFIG, dtype=torch.float32)
    push_with_code(encoder, "alice/encoder", tokenizer)
    assert {"modules.json", "1_Pooling/config.json"} <= set(API.list_repo_files("alice/encoder"))
    sentence_transformers = pytest.importorskip("sentence_transformers")
    embedder = sentence_transformers.SentenceTransformer("alice/encoder", cache_folder=str(tmp_path), device="cpu")
    with torch.no_grad():
        expected = encoder.model(tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"]).last_hidden_state[0].mean(0)
    torch.testing.assert_close(embedder.encode("w5 w6 w7", convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(TRANSPORT == "xet", reason="source files travel the same way in both transports")
def test_remote_code_by_name(model, tmp_path):
    """By name, in a process without the package; test_remote_code.py does the rest with a folder."""
    push_with_code(model, "alice/remote")
    torch.save(model(IDS).logits, tmp_path / "logits.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['flash_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('alice/remote', trust_remote_code=True)\n"
        "saved = torch.load('logits.pt', weights_only=True)\n"
        f"assert torch.equal(model(torch.tensor({IDS.tolist()})).logits, saved)\n"
        "print(type(model).__module__)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # The module carries the commit, so that another version of the code would not be mixed with it.
    assert done.stdout.strip() == f"transformers_modules.alice.remote.{history('alice/remote')[0]}.modeling_flash"


def test_branch_tag_and_commit(model, tmp_path):
    model.push_to_hub("alice/versions")
    API.create_tag("alice/versions", tag="v1")
    first = history("alice/versions")[0]
    second, third = make(seed=1), make(seed=2)
    second.push_to_hub("alice/versions")
    third.push_to_hub("alice/versions", revision="experiment")
    for revision, expected in (("v1", model), (first, model), (None, second), ("main", second), ("experiment", third)):
        assert same(load("alice/versions", tmp_path, revision=revision), expected), revision
    with pytest.raises(OSError, match="v9 is not a valid git identifier"):
        load("alice/versions", tmp_path, revision="v9")


def test_private_repository(model, tmp_path):
    model.push_to_hub("alice/secret", private=True)
    assert same(load("alice/secret", tmp_path / "1", token=READ), model)
    for token in (False, OTHER):
        with pytest.raises(OSError, match="alice/secret is not a local folder and is not a valid model identifier"):
            load("alice/secret", tmp_path / "2", token=token)
    assert no_weights(tmp_path / "2")


def test_gated_repository(model, tmp_path):
    model.push_to_hub("alice/gated")
    API.update_repo_settings("alice/gated", gated="auto")
    for token in (False, OTHER):
        with pytest.raises(OSError, match="gated repo") as error:
            load("alice/gated", tmp_path, token=token)
        assert "alice/gated" in str(error.value)
        with pytest.raises(GatedRepoError):
            hf_hub_download("alice/gated", "model.safetensors", token=token, cache_dir=tmp_path)
    assert no_weights(tmp_path)
    HUB.repos[("model", "alice/gated")].granted.add("bob")
    assert same(load("alice/gated", tmp_path, token=OTHER), model)


def test_tokens_that_may_not_write(model, tmp_path):
    model.push_to_hub("alice/fixed")
    before = history("alice/fixed")
    for token, status in ((READ, "403"), (OTHER, "403"), ("hf_wrong", "401")):
        for push in (model.push_to_hub, lambda repo, token: push_with_code(make(seed=1), repo, token=token)):
            for repo in ("alice/fixed", "alice/new"):
                with pytest.raises(HfHubHTTPError) as error:
                    push(repo, token=token)
                assert status in str(error.value) and token not in str(error.value)
    assert history("alice/fixed") == before and not API.repo_exists("alice/new")
    with pytest.raises(OSError, match="alice/fixed"):
        load("alice/fixed", tmp_path, token="hf_wrong")
    assert no_weights(tmp_path)
    assert same(load("alice/fixed", tmp_path, token=READ), model)


def test_a_dropped_connection(model, tmp_path, quick):
    model.push_to_hub("alice/drops")
    half = stored("alice/drops").stat().st_size // 2
    # Once in the middle: the client resumes.
    HUB.drops[:] = [half]
    assert same(load("alice/drops", tmp_path / "1"), model)
    assert not HUB.drops
    # For good: an error, nothing to load from the cache, and the next try succeeds.
    HUB.drops[:] = [half] + [0] * 100
    with pytest.raises(OSError, match="Can't load the model for 'alice/drops'") as error:
        load("alice/drops", tmp_path / "2")
    assert error.value.__cause__ is not None, "the message does not say why; its cause must"
    assert 0 < len(HUB.drops) < 100
    HUB.drops.clear()
    assert no_weights(tmp_path / "2")
    with pytest.raises(OSError, match="alice/drops"):
        load("alice/drops", tmp_path / "2", local_files_only=True)
    assert same(load("alice/drops", tmp_path / "2"), model)


def flip(path: Path) -> None:
    """Change one byte in the middle of a weight."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 3] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_byte_is_found_and_mended(model, tmp_path):
    model.push_to_hub("alice/flipped")
    path = stored("alice/flipped")
    good = path.read_bytes()
    flip(path)
    # Neither the clients nor safetensors compare checksums: this loads, and only the comparison finds it.
    assert not same(load("alice/flipped", tmp_path), model)
    report = API.verify_repo_checksums("alice/flipped", cache_dir=tmp_path)
    assert [mismatch["path"] for mismatch in report.mismatches] == ["model.safetensors"]
    assert hf("cache", "verify", "alice/flipped", "--cache-dir", str(tmp_path)).returncode != 0
    # An ordinary second load would take the bad copy from the cache.
    path.write_bytes(good)
    assert not same(load("alice/flipped", tmp_path), model)
    assert same(load("alice/flipped", tmp_path, force_download=True), model)
    assert not API.verify_repo_checksums("alice/flipped", cache_dir=tmp_path).mismatches
    done = hf("cache", "verify", "alice/flipped", "--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_repository_without_safetensors(model, tmp_path):
    model.push_to_hub("alice/pickled")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    API.upload_file(
        repo_id="alice/pickled", path_or_fileobj=tmp_path / "pytorch_model.bin", path_in_repo="pytorch_model.bin"
    )
    assert same(load("alice/pickled", tmp_path / "1"), model)
    API.delete_file("model.safetensors", "alice/pickled")
    with pytest.raises(OSError, match="alice/pickled does not appear to have a file named model.safetensors"):
        load("alice/pickled", tmp_path / "2")
    assert not list((tmp_path / "2").rglob("*.bin"))


def hf(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [Path(sys.executable).with_name("hf"), *command],
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def test_hf_download(model, tmp_path):
    push_with_code(model, "alice/cli")
    done = hf("download", "alice/cli", "--local-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert same(load(str(tmp_path), tmp_path), model)
    done = hf("download", "alice/cli", "--local-dir", str(tmp_path / "no"), HF_TOKEN="hf_wrong")
    assert done.returncode != 0 and not list((tmp_path / "no").rglob("*.safetensors"))


def trainer(folder: Path, max_steps: int, **options) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in random_ids(CONFIG, 24, 16, seed=5).tolist()]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(make(seed=4), arguments, train_dataset=data, data_collator=default_data_collator)


def test_trainer_pushes_and_resumes(tmp_path, tokenizer):
    whole = trainer(tmp_path / "whole", 6, save_strategy="no")
    whole.train()
    options = {"push_to_hub": True, "hub_model_id": "alice/trained", "hub_strategy": "checkpoint"}
    first = trainer(tmp_path / "run", 4, hub_always_push=True, hub_private_repo=True, **options)
    first.processing_class = tokenizer
    first.train()
    first.push_to_hub()
    files = set(API.list_repo_files("alice/trained"))
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files
    assert same(load("alice/trained", tmp_path / "cache"), first.model)
    # Elsewhere, the pushed checkpoint is resumed as if unbroken.
    copy = snapshot_download("alice/trained", allow_patterns="last-checkpoint/*", cache_dir=tmp_path / "cache")
    second = trainer(tmp_path / "elsewhere", 6, save_strategy="no")
    second.train(resume_from_checkpoint=str(Path(copy) / "last-checkpoint"))
    assert second.state.global_step == 6
    assert same(second.model, whole.model) and not same(second.model, first.model)


def test_a_training_run_pushes_its_end(tmp_path):
    """Model, tokenizer, card, loss plot and last scores."""
    words = " ".join(f"word{n % 50}" for n in range(3000))
    (tmp_path / "text.txt").write_text(words, encoding="utf-8")
    command = (
        f"--train_file {tmp_path / 'text.txt'} --tokenizer_vocab_size 300 --block_size 32 --max_steps 2 --use_cpu "
        "--config_overrides hidden_size=32,num_hidden_layers=1,query_key_dim=16,chunk_size=16 --save_strategy no "
        f"--disable_tqdm true --push_to_hub --hub_model_id alice/run --output_dir {tmp_path / 'run'}"
    )
    result = training.run_training("causal", *parse_arguments(command.split()))
    files = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "loss.png", "eval_results.json"}
    assert files <= set(API.list_repo_files("alice/run"))
    pushed = hf_hub_download("alice/run", "eval_results.json", cache_dir=tmp_path / "cache")
    assert json.loads(Path(pushed).read_text(encoding="utf-8"))["eval_loss"] == result["after"]["eval_loss"]


def test_datasets(tmp_path, monkeypatch):
    # Otherwise it tries datasets-server.127.0.0.1 first.
    monkeypatch.setattr("datasets.config.USE_PARQUET_EXPORT", False)
    rows = random_ids(CONFIG, 20, 8).tolist()
    splits = {"train": datasets.Dataset.from_dict({"input_ids": rows}), "test": datasets.Dataset.from_dict({"n": [1]})}
    splits["train"].push_to_hub("alice/tokens", private=True)
    splits["test"].push_to_hub("alice/tokens", "counts", split="test")
    loaded = datasets.load_dataset("alice/tokens", split="train", cache_dir=tmp_path)
    assert loaded["input_ids"][:] == rows
    assert datasets.load_dataset("alice/tokens", "counts", split="test", cache_dir=tmp_path)["n"][:] == [1]
    stream = datasets.load_dataset("alice/tokens", split="train", streaming=True)
    assert [row["input_ids"] for row in stream] == rows
    with pytest.raises(HfHubHTTPError, match="403"):
        splits["train"].push_to_hub("alice/tokens", token=READ)


def test_no_token_is_stored():
    """Everything above was pushed with a token in the environment; test_hub.py looks through the logs likewise."""
    files = [path for path in Path(HUB.root).rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        assert b"hf_alice" not in path.read_bytes(), path
