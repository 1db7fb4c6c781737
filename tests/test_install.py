# SPDX-License-Identifier: Apache-2.0
"""`pip install flash-hf` alone is enough for the model: nothing of the extras is imported or missed."""

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path


ROOT = Path(__file__).parent.parent

PROGRAM = """
import sys

# As if they were not installed.
for name in {absent!r}:
    sys.modules[name] = None
sys.path.insert(0, {root!r})
import torch
import flash_hf
from transformers import AutoModelForCausalLM

config = flash_hf.FlashConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, query_key_dim=8, chunk_size=8)
model = flash_hf.FlashForCausalLM(config)
ids = torch.randint(1, 50, (2, 21))  # 0 pads
model(ids, labels=ids).loss.backward()
model.save_pretrained({folder!r})
model = AutoModelForCausalLM.from_pretrained({folder!r})
print(model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0).shape)
"""


def test_the_plain_install_needs_none_of_the_extras(tmp_path):
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    needed = setup["options"]["install_requires"]
    absent = ["triton", "einops", "datasets", "evaluate", "matplotlib", "peft", "accelerate", "pandas"]
    assert not any(name in needed for name in absent)
    program = PROGRAM.format(absent=absent, root=str(ROOT), folder=str(tmp_path / "model"))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 30])" in done.stdout
