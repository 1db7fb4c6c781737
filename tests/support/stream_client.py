# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402
"""python tests/support/stream_client.py FOLDER: a training on a stream from the Hub (hub_server.py) that falls silent.

A process of its own, since huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hub_server


FOLDER = Path(sys.argv[1])
SERVER, os.environ["HF_ENDPOINT"], HUB = hub_server.serve(root=str(FOLDER / "hub"))
os.environ["HF_TOKEN"] = "hf_alice"

import datasets
from huggingface_hub import HfApi
from huggingface_hub.utils import _http
from transformers import TrainerCallback

from flash_hf import training
from flash_hf.commands.train import parse_arguments
from flash_hf.training import run, stream
from flash_hf.training.checkpoints import is_complete


BOOK = Path(__file__).parents[1] / "data" / "wizard_of_oz.txt"
silent_until, refused = 0.0, 0  # a reading of time.monotonic(), and the requests that were not answered


def answer_or_not(handler, parse=SERVER.RequestHandlerClass.parse_request):
    global refused
    if time.monotonic() < silent_until:
        refused += 1
        handler.close_connection = True
        return False
    return parse(handler)


SERVER.RequestHandlerClass.parse_request = answer_or_not
# The waits of the libraries would make this test minutes long; and documents are to be read in small parts.
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 20
_http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0.1
stream.BATCH_CHARACTERS = 2000


def push() -> None:
    api, text = HfApi(), BOOK.read_text(encoding="utf-8")
    api.create_repo("alice/books", repo_type="dataset")
    for name, begin, end in [("validation", 150_000, 151_500), *((n, n * 4000, n * 4000 + 4000) for n in range(8))]:
        rows = [json.dumps({"text": text[i : i + 301], "part": str(name)}) + "\n" for i in range(begin, end, 301)]
        place = "validation.jsonl" if name == "validation" else f"train-{name}.jsonl"
        api.upload_file(
            path_or_fileobj="".join(rows).encode(), path_in_repo=place, repo_id="alice/books", repo_type="dataset"
        )


class Hush(TrainerCallback):
    """Let the server fall silent for `seconds` after step 5."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        global silent_until
        if state.global_step == 5:
            silent_until = time.monotonic() + self.seconds


def train(name: str, *more: str, hush: float = 0.0) -> dict[int, float]:
    command = (
        "--dataset_name alice/books --validation_split validation --streaming --tokenizer_vocab_size 400 "
        "--config_overrides hidden_size=32,num_hidden_layers=2,query_key_dim=16,chunk_size=16 "
        "--block_size 60 --shuffle_buffer 16 --per_device_train_batch_size 8 --max_steps 24 --save_steps 2 "
        "--logging_steps 1 --eval_strategy no --disable_tqdm true "
        f"--output_dir {FOLDER / name}"
    )
    parsed = parse_arguments([*command.split(), *more])
    build = run.build_trainer

    def build_with_hush(*args):
        trainer = build(*args)
        trainer.add_callback(Hush(hush))
        return trainer

    run.build_trainer = build_with_hush if hush else build
    try:
        training.run_training("causal", *parsed)
    finally:
        run.build_trainer = build
    log = json.loads((FOLDER / name / "log_history.json").read_text(encoding="utf-8"))
    return {line["step"]: line["loss"] for line in log if "loss" in line}


push()
whole = train("whole")
assert sorted(whole) == list(range(1, 25))
assert train("paused", hush=1.0) == whole and refused
try:
    train("broken", hush=float("inf"))
except ConnectionError as error:
    assert "alice/books could not be read: " in str(error) and "--resume_from_checkpoint last" in str(error), error
else:
    raise AssertionError("the stream did not notice that the server had fallen silent")
saved = sorted((FOLDER / "broken").glob("checkpoint-*"))
assert 2 <= len(saved) < 12 and all(is_complete(path, streaming=True) for path in saved)
silent_until = 0.0
assert train("broken", "--resume_from_checkpoint", "last") == whole
print("as if it had not happened")
