# SPDX-License-Identifier: Apache-2.0
"""PYTHONPATH=/tmp/flash_pytorch python tests/data/make_flash_pytorch.py

Small models of FLASH-pytorch 0.1.9 with random weights, `flash_*.safetensors`, and what they compute,
`flash_expected.safetensors`. Before: pip install --no-deps --target /tmp/flash_pytorch FLASH-pytorch==0.1.9
rotary-embedding-torch==0.9.1 einops==0.8.2
"""

from pathlib import Path

import torch
from flash_pytorch import FLASHTransformer
from safetensors.torch import save_file


HERE = Path(__file__).parent
CASES = {
    "causal": {"causal": True, "norm_type": "layernorm"},
    "bidirectional": {"causal": False, "norm_type": "layernorm"},
    "laplace": {"causal": True, "norm_type": "layernorm", "laplace_attn_fn": True},
    "scalenorm": {"causal": False, "norm_type": "scalenorm"},
}
LENGTHS = (5, 24, 61)


def main() -> None:
    expected = {}
    for seed, (name, options) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = FLASHTransformer(
            num_tokens=29, dim=16, depth=2, group_size=24, query_key_dim=40, shift_tokens=False, **options
        ).eval()
        for key, parameter in model.named_parameters():
            if "freqs" not in key:
                # At the usual scale the scores are so small that wrong attention would hardly show.
                torch.nn.init.normal_(parameter, mean=1.0 if key.endswith("norm.g") else 0.0, std=0.3)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        save_file(state, HERE / f"flash_{name}.safetensors")
        for length in LENGTHS:
            ids = torch.randint(0, 29, (2, length))
            stream = []
            hook = model.layers[-1].register_forward_hook(lambda module, given, out, stream=stream: stream.append(out))
            with torch.no_grad():
                logits = model(ids)
            hook.remove()
            for key, tensor in (("ids", ids), ("logits", logits), ("stream", stream[0])):
                expected[f"{name}.{length}.{key}"] = tensor
    save_file(expected, HERE / "flash_expected.safetensors")


if __name__ == "__main__":
    main()
