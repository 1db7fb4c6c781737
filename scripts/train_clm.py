"""\
python scripts/train_clm.py --train_file tests/data/wizard_of_oz.txt --config scripts/tiny.json --output_dir runs/clm

The same as `flash-hf train-clm`: train a causal FLASH on text. All options: --help; --max_steps 20 makes it short.
"""

from flash_hf.commands.options import run_command
from flash_hf.commands.train import train_clm


if __name__ == "__main__":
    run_command(train_clm)
