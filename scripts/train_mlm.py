"""\
python scripts/train_mlm.py --train_file tests/data/wizard_of_oz.txt --config scripts/tiny.json --output_dir runs/mlm

The same as `flash-hf train-mlm`: train a bidirectional FLASH to fill in masked tokens. All options: --help;
--max_steps 20 makes it short.
"""

from flash_hf.commands.options import run_command
from flash_hf.commands.train import train_mlm


if __name__ == "__main__":
    run_command(train_mlm)
