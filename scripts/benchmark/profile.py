# SPDX-License-Identifier: Apache-2.0
"""\
python -m scripts.benchmark.profile --layers 2 --hidden_size 64 --context 256 --tokens 512

Where the time of a training step goes: the time of a step, the time Python needs to issue it, the time of each kernel
and the idle time of the device. Forward and backward of `FlashModel`, from input embeddings.
"""

import argparse
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from flash_hf import FlashConfig, FlashModel
from flash_hf.commands.options import OptionParser, natural, run_command


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=natural, default=8192)
    parser.add_argument("--tokens", type=natural, default=65_536, help="tokens per step")
    parser.add_argument("--layers", type=natural, default=24)
    parser.add_argument("--hidden_size", type=natural, default=768)
    parser.add_argument("--backend", choices=("auto", "torch", "triton"), default="auto")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--steps", type=natural, default=12)
    parser.add_argument("--rows", type=natural, default=20, help="kernels to list")
    options = parser.parse_args()
    if options.tokens < options.context:
        parser.error(f"--tokens must be at least --context={options.context}, got {options.tokens}")

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    config = FlashConfig(
        vocab_size=128, hidden_size=options.hidden_size, num_hidden_layers=options.layers, use_cache=False,
        is_decoder=not options.bidirectional, backend=options.backend,
    )  # fmt: skip
    model = FlashModel(config).to(device, dtype)
    shape = options.tokens // options.context, options.context, options.hidden_size
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(gradient)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    issued, done = [], []
    for _ in range(options.steps):
        begin = time.perf_counter()
        step()
        issued.append(1e3 * (time.perf_counter() - begin))
        wait()
        done.append(1e3 * (time.perf_counter() - begin))
    name = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.tokens:,} tokens in sequences of {options.context:,}, {dtype}")
    print(f"step: median {statistics.median(done):.1f} ms, {min(done):.1f} to {max(done):.1f}")
    print(f"issued in {statistics.median(issued):.1f} ms")
    if cuda:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

    runs = 2
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            step()
        wait()
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, spent), reverse=True)
    total = sum(getattr(event, spent) for event in events) / runs / 1e3
    print(f"{'kernels' if cuda else 'operators'}: {total:.1f} ms per step")
    for event in events[: options.rows]:
        print(f"{getattr(event, spent) / runs / 1e3:9.3f} ms  x {event.count // runs:4d}  {event.key[:90]}")
    if cuda:
        on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        spans = sorted((event.time_range.start, event.time_range.end) for event in on_device)
        waited, end = 0.0, spans[0][1]
        for start, stop in spans[1:]:
            waited += max(0.0, start - end)
            end = max(end, stop)
        print(f"device idle: {waited / runs / 1e3:.1f} ms per step")


if __name__ == "__main__":
    run_command(main)
