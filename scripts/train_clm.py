"""\
python scripts/train_clm.py --train_file tests/data/wizard_of_oz.txt --config scripts/tiny.json --output_dir runs/clm

Train a causal FLASH on text, or go on training one (--model). All arguments: --help; --max_steps 20 makes it short.
"""

from flash_hf.command_line import run_command


def main() -> None:
    from flash_hf.training import describe, parse_arguments, run_training

    print(describe("causal", run_training("causal", *parse_arguments(description=__doc__))))


if __name__ == "__main__":
    run_command(main)
