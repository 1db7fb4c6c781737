# SPDX-License-Identifier: Apache-2.0
"""Runs every kernel on small, awkward shapes, for a memory checker to look at. Needs a GPU.

export PYTORCH_NO_CUDA_MEMORY_CACHING=1
compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernels/sanitize_kernels.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/kernels/sanitize_kernels.py
python tests/kernels/sanitize_kernels.py bfloat16 ours    # only the cases of one type or one form (paper, ours, delta)
"""

import itertools
import sys

import torch

from flash_hf import FlashConfig, FlashForCausalLM, FlashModel


# chunk_size, query_key_dim, hidden_size, tokens: whole chunks (descriptors), an odd length (descriptors of rows),
# chunks that are no whole tiles (pointers), and what Hopper scans in bfloat16: with and without the gate's product,
# and rows of two chunks.
SHAPES = (
    (128, 128, 64, 512), (128, 64, 96, 300), (48, 24, 40, 131), (256, 128, 192, 256 * 3), (256, 128, 64, 600),
    (256, 128, 64, 512),
)  # fmt: skip


def form(name: str, chunk_size: int) -> dict:
    """The paper's form, or shifted chunks in a second layer and keys of the token before, or these with the delta
    rule."""
    if name == "paper":
        return {"num_hidden_layers": 1}
    shifted = {"num_hidden_layers": 2, "chunk_shift": chunk_size // 2, "global_form": "previous_token"}
    return shifted | {"global_state": "delta" if name == "delta" else "mean"}


def train(causal: bool, ragged: bool, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    chunk_size, query_key_dim, width, tokens = shape
    config = FlashConfig(
        vocab_size=11, hidden_size=width, query_key_dim=query_key_dim, chunk_size=chunk_size, is_decoder=causal,
        backend="triton", local_key_shift=name != "paper", **form(name, chunk_size),
    )  # fmt: skip
    model = FlashModel(config).to("cuda", dtype)
    x = torch.randn(2, tokens, width, device="cuda", dtype=dtype, requires_grad=True)
    mask = torch.ones(2, tokens, dtype=torch.long, device="cuda")
    mask[0, : tokens // 3] = 0
    model(inputs_embeds=x, attention_mask=mask if ragged else None).last_hidden_state.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *model.parameters()) if p.grad is not None)


def train_quadratic(causal: bool, tokens: int, dtype: torch.dtype) -> None:
    """FLASH-Quad, whose rows are chunks."""
    config = FlashConfig(
        vocab_size=11, hidden_size=192, query_key_dim=128, num_hidden_layers=1, is_decoder=causal, backend="triton",
        attention_type="quadratic", max_position_embeddings=tokens,
    )  # fmt: skip
    model = FlashModel(config).to("cuda", dtype)
    x = torch.randn(2, tokens, 192, device="cuda", dtype=dtype, requires_grad=True)
    model(inputs_embeds=x).last_hidden_state.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (x, *model.parameters()) if p.grad is not None)


def decode(name: str, dtype: torch.dtype) -> None:
    """Steps after a prompt, a second turn, which begins inside of a chunk, and a few tokens, of which some stay."""
    config = FlashConfig(
        vocab_size=11, hidden_size=64, query_key_dim=32, chunk_size=32, backend="triton",
        local_key_shift=name != "paper", **form(name, 32),
    )  # fmt: skip
    model = FlashForCausalLM(config).to("cuda", dtype).eval()
    ids = torch.randint(1, 11, (2, 61), device="cuda")  # no padding, which 0 stands for below
    words = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "return_dict_in_generate": True}
    out = model.generate(ids, max_new_tokens=6, **words)
    assert out.sequences.shape == (2, 67)
    longer = torch.cat((out.sequences, ids), 1)
    seen = torch.ones_like(longer)  # a 0 that was generated is no padding
    out = model.generate(longer, attention_mask=seen, past_key_values=out.past_key_values, max_new_tokens=2, **words)
    assert out.sequences.shape == (2, 130)
    with torch.no_grad():
        out.past_key_values.activate_past_recording()
        for few, removed in ((7, 3), (21, 0), (30, 29)):
            model(ids[:, :few], past_key_values=out.past_key_values)
            out.past_key_values.crop(-removed)


def main() -> None:
    asked = set(sys.argv[1:])
    for dtype, name in itertools.product((torch.bfloat16, torch.float32), ("paper", "ours", "delta")):
        if not asked <= {str(dtype).removeprefix("torch."), name}:
            continue
        for shape, causal, ragged in itertools.product(SHAPES, (True, False), (False, True)):
            if name == "delta" and not causal:
                continue
            train(causal, ragged, name, shape, dtype)
            direction = "causal" if causal else "bidirectional"
            print("ran", dtype, shape, direction, "ragged" * ragged, name, flush=True)
        for tokens, causal in itertools.product((512, 300), (True, False)) if name == "paper" else ():
            train_quadratic(causal, tokens, dtype)
            print("ran", dtype, "FLASH-Quad", tokens, "causal" if causal else "bidirectional", flush=True)
        decode(name, dtype)
        print("ran", dtype, "decoding", name, flush=True)


if __name__ == "__main__":
    main()
