"""\
python -m scripts.finetune --task classification --train_file tests/data/characters_train.jsonl --config scripts/tiny.json --tokenizer_vocab_size 600 --learning_rate 1e-2 --num_train_epochs 6 --output_dir runs/finetune

Fine-tune FLASH (--model: folder or Hub name; a new model without it) to classify texts, tag words or find answers in a
text. All options: --help.
"""  # noqa: E501

from flash_hf.commands.options import run_command


def main() -> None:
    from .arguments import parse_arguments
    from .run import describe, run_finetuning

    arguments = parse_arguments(description=__doc__)
    print(describe(run_finetuning(*arguments), arguments[2].output_dir))


if __name__ == "__main__":
    run_command(main)
