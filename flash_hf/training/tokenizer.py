# SPDX-License-Identifier: Apache-2.0
"""Training and loading tokenizers, and tokenizing documents."""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from ..sources import load_named


logger = logging.get_logger(__name__)

TOKENIZED = Features(
    {"input_ids": Sequence(Value("int32")), **dict.fromkeys(("n_bytes", "n_words", "n_unknown"), Value("int64"))}
)

# Byte-level BPE's words (runs of letters, digits, signs or blanks) are cut after this many characters: training time
# grows with the square of the longest word, and a page of DNA or Chinese is a single one.
LONGEST_WORD = 256

LONG_RUN = "|".join(rf"{kind}{{{LONGEST_WORD}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s"))

# A chat becomes plain text: the messages one after another, without roles, so that the model continues the last one.
# The generation marks allow a loss on the assistant's messages only.
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
    """Train a byte-level BPE tokenizer, which encodes any text without loss.

    Its special tokens are `<|endoftext|>` (start and end of a document, as in GPT-2), `<|pad|>` and `<|mask|>`.
    Encoding prepends `<|endoftext|>`, as training does to documents.

    Args:
        documents: rows with the column `text`.
        vocab_size: number of tokens, including 256 bytes and 3 special tokens.
        max_bytes: bytes of text to train on at most.
        causal: pad on the left, as generate() requires, and add a chat template that concatenates messages.

    Raises:
        ValueError: vocab_size is below 259.
    """
    end, pad, mask = "<|endoftext|>", "<|pad|>", "<|mask|>"
    # The mask includes the space before it, as words do: "the <|mask|> ran" masks " dog".
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
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=vocab_size, **options))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", pair=f"{end} $A {end} $B", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    if tokenizer.get_vocab_size() < vocab_size:
        logger.warning(
            f"The text yields only {tokenizer.get_vocab_size()} tokens, fewer than --tokenizer_vocab_size={vocab_size}"
        )
    tokens = {"bos_token": end, "eos_token": end, "pad_token": pad, "mask_token": special[2]}
    return PreTrainedTokenizerFast(
        **tokens, tokenizer_object=tokenizer, padding_side="left" if causal else "right",
        chat_template=CHAT_TEMPLATE if causal else None, model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def load_tokenizer(name_or_path: str, *, masked: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer by Hub name or folder; ValueError if it has no token to end documents, or none to mask with."""
    tokenizer = load_named(AutoTokenizer.from_pretrained, name_or_path, option="--tokenizer")
    if document_end(tokenizer) is None:
        raise ValueError(f"The tokenizer {name_or_path} must have an eos_token or sep_token to end documents with.")
    if masked and tokenizer.mask_token_id is None:
        raise ValueError(
            f"The tokenizer {name_or_path} must have a mask_token for masked language modeling. Use another one, or "
            "leave out --tokenizer to train one on the text."
        )
    return tokenizer


def document_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that ends a document: `eos_token`, else `sep_token` (BERT)."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def document_start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that starts a document: `bos_token`, else `cls_token` (BERT), else [`document_end`]."""
    ids = (tokenizer.bos_token_id, tokenizer.cls_token_id, document_end(tokenizer))
    return next((token_id for token_id in ids if token_id is not None), None)


def tokenize_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, num_proc: int | None = None
) -> Dataset:
    """Replace the column `text` by `input_ids` (without special tokens), `n_bytes` (in UTF-8), `n_words` (separated by
    whitespace) and `n_unknown`. Blank documents are dropped."""
    batches = {"batched": True, "batch_size": 32, "writer_batch_size": 32}  # documents may be whole books
    tokenize = partial(_tokenize, tokenizer=tokenizer)
    options = {"remove_columns": ["text"], "features": TOKENIZED, "num_proc": num_proc, "desc": "Tokenize"}
    return documents.map(tokenize, **batches, **options)


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
    """The texts that are not blank, and their tokens without special tokens."""
    texts = [text.removeprefix("\ufeff") for text in texts if text and text.strip()]  # without byte-order marks
    # verbose=False: documents may exceed model_max_length, since they are cut into blocks later.
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return texts, ids


def text_size(tokenized: Dataset) -> dict[str, int]:
    """Numbers of documents, bytes, words and unknown tokens in a tokenized data set."""
    columns = tokenized.select_columns(["n_bytes", "n_words", "n_unknown"]).with_format("numpy")[:]
    return {"n_documents": len(tokenized), **{name: int(np.sum(column)) for name, column in columns.items()}}
