"""\
python scripts/tokenize_text.py --files tests/data/wizard_of_oz.txt --tokenizer model_cards/flash-7m-causal --output runs/oz.parquet

Tokenize text once for many trainings, or before renting a GPU: the output is a --train_file or --validation_file of
train_clm.py and train_mlm.py, together with the same --tokenizer.
"""  # noqa: E501

import argparse
from pathlib import Path

from flash_hf.commands.options import OptionParser, natural, run_command
from flash_hf.hub import vocabulary_size


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", required=True, help="texts, in the formats of the training commands")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub name")
    parser.add_argument("--output", required=True, type=Path, help=".parquet file to write")
    parser.add_argument("--max_documents", type=natural, default=None, help="use the first documents only")
    parser.add_argument("--num_proc", type=natural, default=None, help="processes for tokenization")
    kinds = ("none", "snappy", "gzip", "brotli", "lz4", "zstd")
    parser.add_argument(
        "--compression", choices=kinds, default="zstd", help="compression of the file; none if it is packed afterwards"
    )
    args = parser.parse_args()
    if args.output.suffix != ".parquet":
        parser.error(f"--output must end in .parquet, got {args.output}")
    import pyarrow.parquet
    from datasets import Sequence, Value

    from flash_hf.training.documents import load_documents
    from flash_hf.training.tokenizer import load_tokenizer, text_size, tokenize_documents

    tokenizer = load_tokenizer(args.tokenizer, masked=False)
    documents = load_documents(args.files, max_documents=args.max_documents)
    tokenized = tokenize_documents(documents, tokenizer, num_proc=args.num_proc)
    if vocabulary_size(tokenizer) <= 2**16:
        tokenized = tokenized.cast_column("input_ids", Sequence(Value("uint16")))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # Not to_parquet, which chooses the compression itself. Dictionary encoding would make token ids compress worse.
    pyarrow.parquet.write_table(
        tokenized.with_format("arrow")[:], args.output, compression=args.compression, use_dictionary=False
    )
    print(f"{args.output}: {text_size(tokenized)}, {args.output.stat().st_size} bytes")


if __name__ == "__main__":
    run_command(main)
