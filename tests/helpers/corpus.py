"""Data folders for tests: synthetic tokens of any vocabulary, and small texts to prepare."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from dsv2_train.data.manifest import (
    FileRecord,
    Manifest,
    SplitRecord,
    TokenizerRecord,
    describe_file,
    write_manifest,
)
from dsv2_train.data.parts import token_dtype, write_index


def synthetic_folder(
    folder: Path,
    *,
    vocab_size: int = 128,
    train_tokens: int = 20_000,
    validation_tokens: int = 4_000,
    seed: int = 0,
) -> Path:
    """A complete data folder of learnable tokens: each has four possible successors.

    Ids 0 and 1 are begin and end of sentence and do not occur. Entropy is ln 4 = 1.39 nats a token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    successors = rng.integers(2, vocab_size, size=(vocab_size, 4))
    splits = {
        name: _write_split(folder, name, _chain(rng, successors, count), vocab_size)
        for name, count in (("train", train_tokens), ("validation", validation_tokens))
    }
    words = {f"w{index}": index for index in range(vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    tokenizer = TokenizerRecord(describe_file(folder / "tokenizer.json"), vocab_size, 0, 1)
    write_manifest(folder, Manifest("synthetic tokens", {"seed": seed}, tokenizer, splits, {}))
    return folder


def write_texts(folder: Path, num_files: int = 24, seed: int = 0) -> dict[str, str]:
    """Write small .txt files of repetitive words; returns text by relative path."""
    rng = np.random.default_rng(seed)
    words = np.array(
        ["alpha", "beta", "gamma42", "d\u00e9lta", "\u6f22\u5b57", "x = 1;", "\n", "  "]
    )
    texts = {}
    for index in range(num_files):
        path = folder / f"d{index % 3}" / f"file{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = " ".join(rng.choice(words, size=int(rng.integers(5, 400))))
        path.write_bytes(text.encode())
        texts[path.relative_to(folder).as_posix()] = text
    return texts


def _chain(rng: np.random.Generator, successors: np.ndarray, count: int) -> np.ndarray:
    choices = rng.integers(0, 4, size=count)
    tokens = np.empty(count, dtype=np.int64)
    token = 2
    for position in range(count):
        token = successors[token, choices[position]]
        tokens[position] = token
    return tokens


def _write_split(folder: Path, name: str, tokens: np.ndarray, vocab_size: int) -> SplitRecord:
    dtype = token_dtype(vocab_size)
    tokens.astype(dtype).tofile(folder / f"{name}.bin")
    lengths = [len(part) for part in np.array_split(tokens, 10)]
    write_index(folder / f"{name}.idx", lengths, dtype)
    files: list[FileRecord] = [describe_file(folder / f"{name}.{end}") for end in ("bin", "idx")]
    return SplitRecord(files[0], files[1], dtype, len(lengths), tokens.size, 0)
