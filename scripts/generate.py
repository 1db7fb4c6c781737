"""python scripts/generate.py --model runs/demo/causal --prompt "Dorothy looked at the Tin Woodman"

The same as `flash-hf generate`: continue a text with a causal model. All options: --help.
"""

from flash_hf.commands.generate import main
from flash_hf.commands.options import run_command


if __name__ == "__main__":
    run_command(main)
