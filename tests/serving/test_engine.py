# SPDX-License-Identifier: Apache-2.0
"""vLLM's real engine, in this process: its greedy tokens are generate()'s, however it cuts, mixes and interrupts
requests."""

import contextlib
import gc
import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import flash_hf
import flash_hf.vllm
from flash_hf import FlashConfig, FlashForCausalLM, FlashForMaskedLM
from flash_hf.backend_flash import load_kernels
from helpers import ROOT, TEXT, make_model, random_ids, tiny_config


vllm = pytest.importorskip("vllm")
requests = pytest.importorskip("flash_hf.vllm.requests")
pytestmark = pytest.mark.slow

CARD = ROOT / "model_cards" / "flash-30m-causal"
TIE = 1e-4
ENGINE = {"dtype": "float32", "enforce_eager": True, "seed": 0}


@contextlib.contextmanager
def engine(folder, **options):
    """An engine in this process whose cache holds NaN, as the state of an earlier request may; fails unless all blocks
    are free at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        llm = vllm.LLM(str(folder), **ENGINE | options)
        try:
            for pages in served(llm).pages:
                for page in pages.kv_cache:
                    page.fill_(torch.nan)
            pool = scheduler(llm).kv_cache_manager.block_pool
            free = pool.get_num_free_blocks()
            yield llm
            assert pool.get_num_free_blocks() == free
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            vllm.distributed.cleanup_dist_env_and_memory()


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def served(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def greedy(count: int):
    return vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)


def tokens_of(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def generate(llm, prompts: list[list[int]], count: int) -> list[list[int]]:
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return tokens_of(llm.generate(requests, greedy(count), use_tqdm=False))


@torch.no_grad()
def check_greedy(model, prompts: list[list[int]], answers: list[list[int]], count: int) -> None:
    """Fail unless each token is the most likely one after the tokens before it, or within `TIE` of it."""
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == count
        logits = model(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        gap = float((logits.amax(1) - chosen).max())
        assert gap <= TIE, f"prompt of {len(prompt)} tokens: {gap} below the best logit"


def save(folder, *, with_code: bool = False, **changes) -> FlashForCausalLM:
    config = tiny_config(**{"max_position_embeddings": 512, "is_decoder": True} | changes)
    model = make_model(FlashForCausalLM, config, dtype=torch.float32)
    if config.tie_word_embeddings:
        model.tie_weights()
    if with_code:
        flash_hf.save_with_code(model, folder)
    else:
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def check_prompt_logprobs(llm, model, prompt: list[int]) -> None:
    """Fail unless the prompt's own tokens have the model's log probabilities, which shows every hidden state."""
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    logits = model(torch.tensor([prompt]), use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=1e-4)


def random_prompts(config: FlashConfig, lengths) -> list[list[int]]:
    return [random_ids(config, length, seed=length).tolist() for length in lengths]


def test_requests_are_divided_by_kind_and_length():
    lengths, seen = [1, 40, 0, 1, 33, 64, 2, 1], [5, 0, 0, 9, 0, 0, 7, 0]
    pages = torch.tensor([4, 6, 9, 3, 5, 7, 8, 2])
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    groups = requests.group_requests(starts, seen, pages)
    found = {tuple(rows.page_B.tolist()): rows for rows in groups}
    assert set(found) == {(3, 4), (5, 6, 7), (8,), (2,)}  # the request without tokens is left out
    steps, prompts = found[3, 4], found[5, 6, 7]
    assert steps.valid_BN is None and steps.span == slice(3, 5)
    assert steps.seen_B.tolist() == [9, 5] and steps.token_BN.tolist() == [[starts[3]], [0]]
    assert prompts.seen_B is None and prompts.valid_BN.sum(1).tolist() == [33, 40, 64]
    assert prompts.valid_BN.float().mean() > 0.5
    assert prompts.token_BN[1][prompts.valid_BN[1]].tolist() == list(range(1, 41))
    (rows,) = requests.group_requests([0, 1, 2], [3, 3], torch.tensor([1, 5]))
    assert rows.span is None and rows.page_B.tolist() == [1, 5]


LENGTHS = [1, 2, 3, 7, 8, 9, 16, 17, 40, 64, 65, 131]
PLUS = {
    "chunk_shift": 4, "global_form": "previous_token", "use_scaled_sinusoid": False, "attention_init": "recent",
}  # fmt: skip
FORMS = {
    "paper": {"tie_word_embeddings": False},
    "plus": PLUS,
    "plus, local keys shifted": {**PLUS, "local_key_shift": True, "tie_word_embeddings": False, "with_code": True},
    "delta rule": {**PLUS, "local_key_shift": True, "global_state": "delta"},
    "odd sizes": {"query_key_dim": 3, "chunk_size": 5, "hidden_size": 14, "expansion_factor": 1.5, "use_rope": False},
    "global": {"attention_type": "global", "global_normalization": "chunk", "norm_type": "layer_norm"},
    "local": {"attention_type": "local", "attention_activation": "softmax", "chunk_shift": 3, "relative_bias": "t5"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_pieces_of_a_prompt(form, tmp_path):
    """Pieces of 13 tokens end inside of chunks, and each step mixes them with single tokens."""
    model = save(tmp_path, **FORMS[form])
    prompts = random_prompts(model.config, LENGTHS)
    with engine(tmp_path, skip_tokenizer_init=True, max_num_batched_tokens=13, max_num_seqs=8) as llm:
        check_greedy(model, prompts, generate(llm, prompts, 20), 20)
        check_prompt_logprobs(llm, model, prompts[-1])


def test_with_kernels_as_on_a_gpu(tmp_path, monkeypatch):
    """In Triton's interpreter, with states copied as on devices whose host does not know which blocks are adjacent."""
    pytest.importorskip("triton")
    kernels, calls = load_kernels()[0], Counter()
    for name in ("layer", "gated_attention", "layer_step"):
        original = getattr(kernels, name)

        def counted(*args, name=name, original=original, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(kernels, name, counted)
    original_rows = requests._rows
    monkeypatch.setattr(requests, "_rows", lambda *args: replace(original_rows(*args), span=None))
    model = save(tmp_path, **PLUS, backend="triton", query_key_dim=16, hidden_size=16, num_hidden_layers=2)
    prompts = random_prompts(model.config, [1, 8, 19])
    with engine(tmp_path, skip_tokenizer_init=True, max_num_batched_tokens=13, max_num_seqs=4) as llm:
        check_greedy(model, prompts, generate(llm, prompts, 4), 4)
    assert min(calls[name] for name in ("layer", "gated_attention", "layer_step")) > 0


def test_arrivals_while_others_decode_and_preemption(tmp_path, monkeypatch):
    original, adjacent = requests._rows, Counter()

    def rows_of(*args):
        rows = original(*args)
        adjacent[rows.span is not None] += 1
        return rows

    monkeypatch.setattr(requests, "_rows", rows_of)
    model = save(tmp_path, **PLUS)
    prompts = random_prompts(model.config, LENGTHS)
    with engine(tmp_path, skip_tokenizer_init=True, max_num_batched_tokens=48, max_num_seqs=5) as llm:
        server, answers, preempted = llm.llm_engine, {}, 0
        for step in range(200):
            if step % 3 == 0 and step // 3 < len(prompts):
                index = step // 3
                server.add_request(str(index), {"prompt_token_ids": prompts[index]}, greedy(20))
            if step in (4, 11, 12, 25):
                preempted += len(scheduler(llm).running)
                server.reset_prefix_cache(reset_running_requests=True)
            for output in server.step():
                if output.finished:
                    answers[int(output.request_id)] = list(output.outputs[0].token_ids)
            if len(answers) == len(prompts):
                break
        assert preempted >= 8 and min(adjacent[True], adjacent[False]) > 5
        check_greedy(model, prompts, [answers[index] for index in range(len(prompts))], 20)


def test_a_tiny_cache_makes_requests_wait(tmp_path):
    """One block is vLLM's own; a request has one from its first token to its last, so that three run at a time."""
    model = save(tmp_path, **PLUS)
    prompts = random_prompts(model.config, LENGTHS)
    options = {"num_gpu_blocks_override": 4, "max_num_seqs": 16, "skip_tokenizer_init": True}
    with engine(tmp_path, **options) as llm:
        for index, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, greedy(20))
        answers, most = {}, 0
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
            most = max(most, len(scheduler(llm).running))
            answers |= {int(out.request_id): list(out.outputs[0].token_ids) for out in outputs if out.finished}
        assert most == 3
        check_greedy(model, prompts, [answers[index] for index in range(len(prompts))], 20)


@pytest.fixture(scope="module")
def card():
    model = AutoModelForCausalLM.from_pretrained(CARD, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(CARD)(TEXT)["input_ids"]
    lengths = [1, 2, 17, 100, 127, 128, 129, 255, 256, 257, 383, 511, 600, 1025, 2000, 5000]
    return model, [tokens[1000 * i : 1000 * i + length] for i, length in enumerate(lengths)]


@pytest.mark.parametrize("budget", [8192, 300])
def test_the_shipped_checkpoint_generates_as_in_transformers(card, budget):
    """16 prompts of 1 to 5,000 tokens at once."""
    model, prompts = card
    with engine(CARD, max_model_len=6000, max_num_batched_tokens=budget, max_num_seqs=16) as llm:
        answers = generate(llm, prompts, 16)
    check_greedy(model, prompts, answers, 16)
    same = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        input_ids = torch.tensor([prompt])
        expected: Tensor = model.generate(
            input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        same += expected[0, len(prompt) :].tolist() == answer
    assert same >= len(prompts) - 1  # one near tie may turn, which check_greedy allows


def test_bfloat16_and_what_vllm_chooses_itself(card):
    """Without options vLLM takes the checkpoint's bfloat16 and its length of 8,192, and compiles what it can."""
    model, prompts = card
    prompts = [prompt for prompt in prompts if len(prompt) < 1000]
    with engine(CARD, dtype="auto", enforce_eager=False, max_num_seqs=8) as llm:
        assert llm.llm_engine.model_config.max_model_len == 8192
        state = served(llm).pages[0]
        assert dict(zip(state.stored, state.get_state_dtype(), strict=True))["total"] == torch.float32
        assert torch.bfloat16 in state.get_state_dtype()
        answers = generate(llm, prompts, 4)
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
            chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert (logits.amax(1) - chosen).max() < 0.15  # rounding to bfloat16


def test_another_version_of_vllm_goes_on_without_flash(monkeypatch):
    said = []
    monkeypatch.setattr(flash_hf.vllm.logger, "warning", said.append)
    monkeypatch.setitem(sys.modules, "flash_hf.vllm.checks", None)
    flash_hf.vllm.register()
    assert len(said) == 1 and said[0].startswith("vLLM cannot serve FLASH: flash_hf's plugin needs vLLM 0.32 (")


def refusal(folder, **options) -> str:
    with pytest.raises(Exception) as caught:
        vllm.EngineArgs(str(folder), skip_tokenizer_init=True, **ENGINE | options).create_engine_config()
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"enable_prefix_caching": True}, "prefix caching"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"enable_lora": True}, "LoRA"),
        ({"kv_cache_dtype": "fp8"}, "quantised cache"),
        ({"tensor_parallel_size": 2}, "tensor parallelism"),
        ({"quantization": "fp8"}, "quantised weights"),
    ],
)
def test_what_the_engine_offers_and_flash_has_not_is_refused(tmp_path, options, feature):
    save(tmp_path)
    message = refusal(tmp_path, **options)
    assert "FLASH in vLLM has no" in message and feature in message


def test_models_without_a_state_of_constant_size_are_refused(tmp_path):
    save(tmp_path / "quad", attention_type="quadratic")
    assert "needs a state of constant size, but attention_type='quadratic'" in refusal(tmp_path / "quad")
    FlashForMaskedLM(tiny_config()).save_pretrained(tmp_path / "masked")
    assert "got the architecture FlashForMaskedLM" in refusal(tmp_path / "masked")
    config = json.loads((tmp_path / "quad" / "config.json").read_text(encoding="utf-8"))
    config |= {"architectures": ["FlashForSequenceClassification"], "attention_type": "mixed_chunk"}
    (tmp_path / "quad" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "got the architecture FlashForSequenceClassification" in refusal(tmp_path / "quad")
