"""What a data folder contains, and whether a run can train on it; plain Python, no torch.

<folder>/manifest.json    written last: a folder without it is unfinished
<folder>/tokenizer.json
<folder>/{train,validation}.{bin,idx}    megatron-core's indexed dataset
<folder>/skipped.jsonl    one line for each input that was not used, with the reason
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv2_train.config.problems import Problem
from dsv2_train.config.run import RunConfig

MANIFEST_NAME = "manifest.json"
VERSION = 1
SPLITS = ("train", "validation")
# Rows past the tokenizer's ids are never targets; DeepSeek pads 100,015 to 102,400.
MAX_PADDING_SHARE = 0.1


class DataError(Exception):
    """A corpus or data folder cannot be used; says which file, what was found, what to do."""


@dataclass(frozen=True)
class FileRecord:
    """A file of the folder as it was written."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitRecord:
    """One packed token stream and its index.

    Attributes:
        bin: the tokens.
        idx: where documents start, in megatron-core's format.
        dtype: numpy name of the token type.
        num_documents: documents in the stream.
        num_tokens: tokens in the stream, begin and end of sentence included.
        text_bytes: UTF-8 bytes of their text.
    """

    bin: FileRecord
    idx: FileRecord
    dtype: str
    num_documents: int
    num_tokens: int
    text_bytes: int


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer of the folder; `vocab_size` is its largest id plus one."""

    file: FileRecord
    vocab_size: int
    bos_id: int
    eos_id: int


@dataclass(frozen=True)
class Manifest:
    """Everything about a data folder.

    Attributes:
        source: what the documents are, for people.
        arguments: what `dsv2 prepare` was asked for; equal arguments, equal folder.
        tokenizer: the tokenizer.
        splits: `train` and `validation`.
        skipped: number of inputs not used, by reason.
    """

    source: str
    arguments: dict[str, Any]
    tokenizer: TokenizerRecord
    splits: dict[str, SplitRecord]
    skipped: dict[str, int]

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file that training reads."""
        streams = [file for split in self.splits.values() for file in (split.bin, split.idx)]
        return (self.tokenizer.file, *streams)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json; it appears whole or not at all."""
    temporary = folder / f"{MANIFEST_NAME}.tmp"
    temporary.write_text(json.dumps({"version": VERSION, **asdict(manifest)}, indent=2) + "\n")
    temporary.replace(folder / MANIFEST_NAME)


def read_manifest(folder: Path) -> Manifest:
    """Read manifest.json.

    Raises:
        DataError: the folder or its manifest is missing, or is not one of this version.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        what = "holds no manifest.json" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; write it with: {_prepare_command(folder)}")
    try:
        values = json.loads(path.read_bytes())
        version = values.pop("version")
        if version != VERSION:
            raise DataError(
                f"{path}: found version {version!r}, this release reads {VERSION}; "
                f"delete {folder} and run: {_prepare_command(folder)}"
            )
        return _from_values(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a manifest of dsv2 prepare ({type(error).__name__}: {error}); "
            f"delete {folder} and run: {_prepare_command(folder)}"
        ) from error


def describe_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file; reads all of it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.name, path.stat().st_size, digest)


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or whose size is not the manifest's; reads no file."""
    return [problem for record in manifest.files if (problem := _size_problem(folder, record))]


def verify(folder: Path, max_file_bytes: int | None = None) -> Manifest:
    """Compare the files of a data folder with its manifest, byte for byte (SHA-256).

    Args:
        folder: written by `dsv2 prepare`.
        max_file_bytes: larger files are held against their size alone; None reads all of them.

    Returns:
        The manifest.

    Raises:
        DataError: names every file that is missing, truncated, exchanged or otherwise changed.

    Note:
        Reads about 1 GB/s: once per run, on one rank, before training.
    """
    manifest = read_manifest(folder)
    problems = size_problems(folder, manifest)
    for record in manifest.files:
        is_read = max_file_bytes is None or record.num_bytes <= max_file_bytes
        if is_read and not _size_problem(folder, record):
            found = describe_file(folder / record.name).sha256
            if found != record.sha256:
                problems.append(
                    f"{folder / record.name}: found SHA-256 {found[:16]}..., "
                    f"the manifest says {record.sha256[:16]}..."
                )
    if problems:
        raise DataError(f"{'; '.join(problems)}; {_restore(folder)}")
    return manifest


def check_config(config: RunConfig) -> list[Problem]:
    """What keeps a run from training on its data folder; reads the manifest and file sizes.

    Fields that are themselves wrong may be absent from `config`: checks that need them are passed
    over.
    """
    try:
        path = config.data.path
    except AttributeError:
        return []
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [Problem("data.path", path, str(error))]
    problems = [
        Problem("data.path", path, f"{problem}; {_restore(folder)}")
        for problem in size_problems(folder, manifest)
    ]
    for check in _CHECKS:
        try:
            problems += check(config, manifest)
        except AttributeError:
            continue
    return problems


def _vocabulary(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    rows, needed = config.model.vocab_size, manifest.tokenizer.vocab_size
    most = int(needed * (1 + MAX_PADDING_SHARE))
    if not needed <= rows <= most:
        allowed = (
            f"must be {needed} to {most}: the tokenizer of {config.data.path} has {needed} ids, "
            f"and at most {MAX_PADDING_SHARE:.0%} more rows are padding"
        )
        yield Problem("model.vocab_size", rows, allowed)


def _train_size(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    length, num_tokens = config.recipe.sequence_length, manifest.splits["train"].num_tokens
    if length >= num_tokens:
        allowed = (
            f"must be at most {num_tokens - 1}: the train split of {config.data.path} "
            f"has {num_tokens} tokens, and a sample takes one more than its length"
        )
        yield Problem("recipe.sequence_length", length, allowed)


def _validation_size(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    length, num_tokens = config.recipe.sequence_length, manifest.splits["validation"].num_tokens
    num_samples = max(num_tokens - 1, 0) // length
    if config.recipe.eval_num_samples > num_samples:
        allowed = (
            f"must be at most {num_samples}: the validation split of {config.data.path} has "
            f"{num_tokens} tokens, so {num_samples} samples of recipe.sequence_length = {length}"
        )
        yield Problem("recipe.eval_num_samples", config.recipe.eval_num_samples, allowed)


_CHECKS: tuple[Callable[[RunConfig, Manifest], Iterator[Problem]], ...] = (
    _vocabulary,
    _train_size,
    _validation_size,
)


def _size_problem(folder: Path, record: FileRecord) -> str | None:
    path = folder / record.name
    if not path.is_file():
        return f"{path}: missing, the manifest says {record.num_bytes} bytes"
    found = path.stat().st_size
    if found != record.num_bytes:
        return f"{path}: found {found} bytes, the manifest says {record.num_bytes}"
    return None


def _from_values(values: Mapping[str, Any]) -> Manifest:
    tokenizer = dict(values["tokenizer"])
    tokenizer["file"] = FileRecord(**tokenizer["file"])
    splits = {}
    for name in SPLITS:
        split = dict(values["splits"][name])
        split["bin"], split["idx"] = FileRecord(**split["bin"]), FileRecord(**split["idx"])
        splits[name] = SplitRecord(**split)
    plain = {key: values[key] for key in ("source", "arguments", "skipped")}
    return Manifest(tokenizer=TokenizerRecord(**tokenizer), splits=splits, **plain)


def _prepare_command(folder: Path) -> str:
    default = folder == Path("data/stdlib")
    return "dsv2 prepare" if default else f"dsv2 prepare --source SOURCE --out {folder}"


def _restore(folder: Path) -> str:
    return f"restore the files, or delete {folder} and run: {_prepare_command(folder)}"
