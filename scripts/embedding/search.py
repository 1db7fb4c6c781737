"""\
python -m scripts.embedding.search --model model_cards/flash-30m-masked --books tests/data/wizard_of_oz.txt --query "a house is carried away by the storm"

Embed every passage of whole books and print those that are nearest to each query. --index keeps the embeddings: the
first run writes the file, later ones read it and need no books.
"""  # noqa: E501

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flash_hf.commands.options import OptionParser, natural, run_command
from flash_hf.sources import load_named


def cut_passages(text: str, shortest: int) -> Iterator[str]:
    """Whole paragraphs, joined until they have at least `shortest` words; the last ones may have fewer."""
    found, words = [], 0
    for paragraph in text.split("\n\n"):
        found.append(paragraph.strip())
        words += len(paragraph.split())
        if words >= shortest:
            yield "\n\n".join(found)
            found, words = [], 0
    if words:
        yield "\n\n".join(found)


def nearest(queries_QD: np.ndarray, passages_PD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and cosines of the passages nearest to each query, each `[Q, count]`, for embeddings of length 1."""
    scores_QP = queries_QD @ passages_PD.T
    order_QK = np.argsort(-scores_QP, axis=1, kind="stable")[:, :count]
    return order_QK, np.take_along_axis(scores_QP, order_QK, axis=1)


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an encoder")
    parser.add_argument("--books", nargs="+", type=Path, help="texts (.txt, .jsonl with the column text)")
    parser.add_argument("--query", nargs="+", required=True, help="descriptions to search for")
    parser.add_argument("--index", type=Path, help=".npz file of passages and embeddings")
    parser.add_argument("--shortest", type=natural, default=60, help="words of a passage; default: %(default)s")
    parser.add_argument("--top", type=natural, default=3, help="passages to print; default: %(default)s")
    args = parser.parse_args()
    if args.index is not None and args.index.suffix != ".npz":
        parser.error(f"--index must end in .npz, got {args.index}")
    stored = args.index is not None and args.index.exists()
    if stored == (args.books is not None):
        parser.error("give --books, or an --index that exists without them")

    import torch
    from sentence_transformers import SentenceTransformer

    from flash_hf.training.documents import load_documents

    model = load_named(SentenceTransformer, args.model, option="--model", model_kwargs={"dtype": torch.float32})

    def embed(texts: list[str], bar: bool) -> np.ndarray:
        return model.encode(texts, normalize_embeddings=True, show_progress_bar=bar)

    if stored:
        with np.load(args.index) as index:
            passages, passages_PD = index["passages"].tolist(), index["embeddings"]
    else:
        passages = [p for text in load_documents(args.books)["text"] for p in cut_passages(text, args.shortest)]
        passages_PD = embed(passages, bar=True)
        if args.index is not None:
            args.index.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(args.index, passages=passages, embeddings=passages_PD)
    for query, *found in zip(args.query, *nearest(embed(args.query, bar=False), passages_PD, args.top), strict=True):
        print(f"# {query}")
        for number, score in zip(*found, strict=True):
            print(f"\n{score:.3f}, passage {number + 1} of {len(passages)}\n{passages[number]}")
        print()


if __name__ == "__main__":
    run_command(main)
