# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: trained on documents or loaded, and documents turned into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from datasets import (
    Dataset,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from ..hub import vocabulary_size
from ..sources import load_named
from .documents import TOKENIZED


logger = logging.get_logger(__name__)

# What byte-level BPE takes for one word (letters, digits, signs or blanks in a row) is cut after this many characters.
# The time to train grows with the square of the longest word, and DNA or Chinese is a single one for whole pages.
LONGEST_WORD = 256

LONG_RUN = "|".join(rf"{kind}{{{LONGEST_WORD}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s"))

# A chat as running text: the messages one after another, as they are. A model of this package knows no roles; what it
# continues is the last message. The marks of the assistant's messages are for losses on these alone.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content -%}{%- for part in content -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- text(message['content']) -}}{%- endgeneration -%}
{%- else -%}
{{- text(message['content']) -}}
{%- endif -%}
{%- endfor -%}
"""


def train_tokenizer(
    documents: Iterable[dict], vocab_size: int, *, max_bytes: int = 100_000_000, causal: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: no text is unknown to it, and decoding gives every byte back.

    Its special tokens are `<|endoftext|>` (begin and end of a document, as in GPT-2), `<|pad|>` and `<|mask|>`.
    Encoding puts `<|endoftext|>` in front, because that is what stands before a document in training.
    A word has at most 256 characters: longer runs of letters, digits, signs or blanks are cut, so that text without
    blanks (DNA, Chinese) takes no longer than other text.

    Args:
        documents: rows with the column `text`.
        vocab_size: number of tokens, special ones included; at least 256 bytes and 3 special tokens.
        max_bytes: read no more text than this.
        causal: whether it is for a causal model: then it pads on the left, where generate() needs the padding, and has
            a chat template, which puts the messages of a chat one after another.

    Raises:
        ValueError: vocab_size is below 259.
    """
    end, pad, mask = "<|endoftext|>", "<|pad|>", "<|mask|>"
    # The mask takes the space before it, like the words it stands for ("the <|mask|> ran" hides " dog").
    special = [AddedToken(token, special=True, lstrip=token == mask) for token in (end, pad, mask)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(special)} (256 bytes and {len(special)} special "
            f"tokens), got {vocab_size}."
        )

    def texts() -> Iterator[str]:
        left = max_bytes
        for document in documents:
            if left <= 0:
                break
            left -= len((document["text"] or "").encode())
            yield document["text"] or ""

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LONG_RUN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", pair=f"{end} $A {end} $B", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    if tokenizer.get_vocab_size() < vocab_size:
        logger.warning(f"The text gives {tokenizer.get_vocab_size()} tokens only, fewer than vocab_size={vocab_size}.")
    return PreTrainedTokenizerFast(
        padding_side="left" if causal else "right",
        chat_template=CHAT_TEMPLATE if causal else None,
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        mask_token=special[2],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name_or_path: str, *, masked: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer by Hub name or folder, and check that it has the special tokens the training needs.

    Raises:
        ValueError: no token to end documents with, or none to mask with.
        OSError: there is no such tokenizer.
    """
    tokenizer = load_named(AutoTokenizer.from_pretrained, name_or_path, option="--tokenizer")
    if document_end(tokenizer) is None:
        raise ValueError(
            f"The tokenizer {name_or_path} has neither an eos_token nor a sep_token to end documents with."
        )
    if masked and tokenizer.mask_token_id is None:
        raise ValueError(
            f"The tokenizer {name_or_path} has no mask_token, which masked language modelling needs. Take another, or "
            "leave --tokenizer out to have one trained on the data."
        )
    return tokenizer


def document_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that ends a document: `eos_token`, else `sep_token` (BERT)."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def document_start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that begins a document: `bos_token`, else `cls_token` (BERT), else the one that ends it."""
    for token_id in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        if token_id is not None:
            return token_id
    return document_end(tokenizer)


def tokenize_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None
) -> Dataset:
    """Turn the column `text` into `input_ids` (no special tokens), `n_bytes`, `n_words` and `n_unknown`.

    Blank rows are left out. Bytes are those of the text in UTF-8; words are what whitespace separates. Documents that
    are tokenised already stay as they are.

    Raises:
        ValueError: they have tokens that the tokenizer does not know.
    """
    if "input_ids" in documents.column_names:
        column = documents.select_columns(["input_ids"]).with_format("numpy")
        largest = max((int(row["input_ids"].max(initial=0)) for row in column), default=0)
        if largest >= vocabulary_size(tokenizer):
            raise ValueError(
                f"The tokenised documents hold the token {largest}, and the tokenizer's ids end at "
                f"{vocabulary_size(tokenizer) - 1}. Give the --tokenizer that they were made with."
            )
        return documents
    return documents.map(
        partial(_tokenize, tokenizer=tokenizer),
        batched=True,
        batch_size=32,  # documents may be whole books
        remove_columns=["text"],
        features=TOKENIZED,
        num_proc=num_proc,
        desc="Tokenize",
        writer_batch_size=32,
    )


def _tokenize(batch: dict, tokenizer: PreTrainedTokenizerBase) -> dict:
    texts, ids = tokenize_texts(batch["text"], tokenizer)
    return {
        "input_ids": ids,
        "n_bytes": [len(text.encode()) for text in texts],
        "n_words": [len(text.split()) for text in texts],
        "n_unknown": [row.count(tokenizer.unk_token_id) for row in ids],
    }


def tokenize_texts(
    texts: Iterable[str | None], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[list[int]]]:
    """The texts that are not blank, and their tokens, without special ones.

    Raises:
        ValueError: a text is no string.
    """
    texts = [text for text in texts if text and (not isinstance(text, str) or text.strip())]
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"The text column must hold strings, got {type(wrong).__name__}: {str(wrong)[:80]!r}.")
    texts = [text.removeprefix("\ufeff") for text in texts]  # a byte-order mark is not text
    # verbose=False: documents longer than the tokenizer's model_max_length are cut into blocks later.
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return texts, ids


def text_size(tokenized: Dataset) -> dict[str, int]:
    """Documents, bytes, words and unknown tokens of a tokenised data set."""
    columns = tokenized.select_columns(["n_bytes", "n_words", "n_unknown"]).with_format("numpy")[:]
    return {"n_documents": len(tokenized), **{name: int(np.sum(column)) for name, column in columns.items()}}
