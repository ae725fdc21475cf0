"""Byte-level BPE in the manner of DeepSeek: trained here, or an existing tokenizer.json."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv2_train.data.manifest import DataError, TokenizerRecord, describe_file, read_manifest

BOS_TOKEN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS_TOKEN = "<\uff5cend\u2581of\u2581sentence\uff5c>"
MIN_VOCAB_SIZE = 256 + 2

_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"
# One alternation instead of a chain of splitters: the same classes at half the time.
_PIECES = "|".join(
    (
        r"[\r\n]",
        r"\p{N}",
        rf"[{_CJK}]+",
        rf"\s?[\p{{L}}\p{{M}}&&[^{_CJK}]]+",
        r"\s?[\p{P}\p{S}]+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (DeepSeek LLM, section 2.1, which DeepSeek-V2 takes over).

    Newlines, punctuation and CJK are never merged with other classes, and numbers are split into
    single digits. Any text is representable, and decoding gives back its exact bytes.

    Args:
        texts: training text.
        vocab_size: tokens including the 256 bytes and begin/end of sentence (ids 0 and 1). A small
            corpus may yield fewer, when no pair of tokens is left that occurs twice.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json so that it encodes documents whole and as text only.

    Truncation and padding that the file asks for are turned off, and a special token spelled out in
    a document is text, not that token.

    Raises:
        DataError: the file is missing or is no tokenizer.
    """
    if not path.is_file():
        raise DataError(f"tokenizer {path}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"tokenizer {path}: not a tokenizer.json of `tokenizers`: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token.

    Raises:
        DataError: the tokenizer has no such token; names those it has.
    """
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        added = [entry.content for entry in tokenizer.get_added_tokens_decoder().values()]
        raise DataError(
            f"tokenizer: has no token {token!r}; name one it has with --bos-token and --eos-token "
            f"(special tokens found: {', '.join(added[:20]) or 'none'})"
        )
    return int(token_id)


def num_rows(tokenizer: Tokenizer) -> int:
    """Embedding rows that the tokenizer needs: its largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_document(
    tokenizer: Tokenizer, text: str, bos_id: int, eos_id: int, dtype: npt.DTypeLike
) -> npt.NDArray[np.integer]:
    """Token ids of one document, [n] of `dtype`: begin of sentence, its text, end of sentence."""
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return np.array([bos_id, *encoding.ids, eos_id], dtype=dtype)


def hugging_face_files(folder: Path, max_length: int) -> tuple[TokenizerRecord, dict[str, bytes]]:
    """The tokenizer of a data folder as transformers reads it.

    Args:
        folder: written by `dsv2 prepare`.
        max_length: longest sequence of the model, in tokens.

    Returns:
        Its record, and the files by name. As in `dsv2 prepare`, encoding adds no special token.

    Raises:
        DataError: if the folder cannot be used, or its tokenizer is not the manifest's.
    """
    record = read_manifest(folder).tokenizer
    path = folder / record.file.name
    tokenizer = load_tokenizer(path)
    if describe_file(path) != record.file:
        raise DataError(f"{path}: not the file of the manifest; restore it")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(record.bos_id),
        "eos_token": tokenizer.id_to_token(record.eos_id),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    return record, {
        "tokenizer.json": path.read_bytes(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
