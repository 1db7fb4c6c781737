"""python scripts/convert_checkpoint.py tests/data/flash_causal.safetensors runs/hf --causal --no-shift --chunk_size 24

The same as `flash-hf convert`: convert a checkpoint of another FLASH implementation. All options: --help.
"""

from flash_hf.commands.convert import main
from flash_hf.commands.options import run_command


if __name__ == "__main__":
    run_command(main)
