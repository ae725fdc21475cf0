"""What a data folder contains; plain Python, no torch.

<folder>/manifest.json    written last: a folder without it is unfinished
<folder>/tokenizer.json
<folder>/{train,validation}.{bin,idx}    megatron-core's indexed dataset
<folder>/skipped.jsonl    one line for each input that was not used, with the reason
"""

import hashlib
import json
import reprlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

MANIFEST_NAME = "manifest.json"
VERSION = 1
SPLITS = ("train", "validation")
TOKEN_BYTES = {"uint16": 2, "int32": 4}
_KINDS = {int: "an integer, not negative", str: "a string", dict: "an object"}
_MAX_INTEGER = 2**63 - 1

T = TypeVar("T")


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
        dtype: numpy name of the token type, one of TOKEN_BYTES.
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
        DataError: the folder or its manifest is missing or unreadable, is not one of this version,
            or contradicts itself; names the field.
    """
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "holds no manifest.json" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; write it with: {_prepare_command(folder)}") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # characters that no path can have
        raise DataError(f"{folder}: cannot be a folder: {error}") from error
    try:
        return _from_values(json.loads(content))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not a manifest of this dsv2 prepare: {error}; "
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


def file_problems(folder: Path, manifest: Manifest, max_file_bytes: int | None) -> list[str]:
    """Files that are not the manifest's, by size and by SHA-256.

    Args:
        folder: where they are.
        manifest: its manifest.
        max_file_bytes: larger files are held against their size alone; None reads all of them.
    """
    problems = []
    for record in manifest.files:
        problem = _size_problem(folder, record)
        if problem is None and (max_file_bytes is None or record.num_bytes <= max_file_bytes):
            problem = _checksum_problem(folder, record)
        if problem is not None:
            problems.append(problem)
    return problems


def verify(folder: Path, max_file_bytes: int | None = None) -> Manifest:
    """Compare the files of a data folder with its manifest, byte for byte (SHA-256).

    Args:
        folder: written by `dsv2 prepare`.
        max_file_bytes: as in `file_problems`.

    Returns:
        The manifest.

    Raises:
        DataError: names every file that is missing, truncated, exchanged or otherwise changed.

    Note:
        Reads about 1 GB/s: once per run, on one rank, before training.
    """
    manifest = read_manifest(folder)
    if problems := file_problems(folder, manifest, max_file_bytes):
        raise DataError(f"{'; '.join(problems)}; {how_to_restore(folder)}")
    return manifest


def how_to_restore(folder: Path) -> str:
    """What to do about a folder that is not the manifest's."""
    return f"restore the files, or delete {folder} and run: {_prepare_command(folder)}"


def _size_problem(folder: Path, record: FileRecord) -> str | None:
    path = folder / record.name
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: missing, the manifest says {record.num_bytes} bytes"
    except (OSError, ValueError) as error:
        return f"{path}: cannot be read: {error}"
    if found != record.num_bytes:
        return f"{path}: found {found} bytes, the manifest says {record.num_bytes}"
    return None


def _checksum_problem(folder: Path, record: FileRecord) -> str | None:
    path = folder / record.name
    try:
        found = describe_file(path).sha256
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    if found != record.sha256:
        return f"{path}: found SHA-256 {found[:16]}..., the manifest says {record.sha256[:16]}..."
    return None


def _from_values(values: object) -> Manifest:
    """The manifest of what JSON held; ValueError names the field that is wrong."""
    fields = dict(_value(dict[str, Any], values, "the file"))
    version = _value(int, fields.pop("version", None), "version")
    if version != VERSION:
        raise ValueError(f"version: found {version}; this release reads {VERSION}")
    manifest = _record(Manifest, fields, "")
    if contradictions := list(_contradictions(manifest)):
        raise ValueError("; ".join(contradictions))
    return manifest


def _record(cls: type[T], values: dict[str, Any], prefix: str) -> T:
    """A record with exactly its declared fields, each of its declared type."""
    kinds = get_type_hints(cls)
    wrong = [f"{prefix}{name}: missing" for name in kinds if name not in values]
    wrong += [f"{prefix}{name}: unknown field" for name in values if name not in kinds]
    if wrong:
        raise ValueError("; ".join(wrong))
    return cls(**{name: _value(kinds[name], values[name], f"{prefix}{name}") for name in kinds})


def _value(kind: Any, value: Any, path: str) -> Any:
    """`value`, where it is of the declared type `kind`: a record, dict[str, kind], int or str."""
    if kind is Any:
        return value
    is_record = is_dataclass(kind)
    plain: Any = dict if is_record else get_origin(kind) or kind
    # bool is a subclass of int
    if type(value) is not plain or (plain is int and not 0 <= value <= _MAX_INTEGER):
        raise ValueError(f"{path}: found {reprlib.repr(value)}; must be {_KINDS[plain]}")
    if is_record:
        return _record(kind, value, f"{path}.")
    if plain is dict:
        _, inner = get_args(kind)
        return {key: _value(inner, each, f"{path}.{key}") for key, each in value.items()}
    return value


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Where fields disagree: a stream is mapped by its token count, so its bytes must hold it."""
    if set(manifest.splits) != set(SPLITS):
        yield f"splits: found {sorted(manifest.splits)}; must be {' and '.join(SPLITS)}"
    for name, split in manifest.splits.items():
        width = TOKEN_BYTES.get(split.dtype)
        if width is None:
            allowed = " or ".join(TOKEN_BYTES)
            yield f"splits.{name}.dtype: found {split.dtype!r}; must be {allowed}"
        elif split.num_tokens * width != split.bin.num_bytes:
            yield (
                f"splits.{name}.num_tokens: found {split.num_tokens}, {width} bytes each; "
                f"{split.bin.name} has {split.bin.num_bytes} bytes"
            )


def _prepare_command(folder: Path) -> str:
    default = folder == Path("data/stdlib")
    return "dsv2 prepare" if default else f"dsv2 prepare --source SOURCE --out {folder}"
