"""What a checkpoint contains: every tensor, every file, and checksums of both."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv2_train.checkpoint.disk.errors import CheckpointError, DamagedError

_FORMAT_VERSION = 1
_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Chunk:
    """A flat range of a tensor and where its bytes are.

    Attributes:
        offset: elements of the flattened tensor that precede it.
        numel: elements in it.
        file: name of the file.
        byte_offset: first byte in the file; little-endian elements follow without gaps.
    """

    offset: int
    numel: int
    file: str
    byte_offset: int


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor.

    Attributes:
        shape: its shape.
        dtype: its element type, as torch names it.
        checksum: see `checksum.tensor_checksum`.
        chunks: where it is, in order of offset, each element once.
    """

    shape: tuple[int, ...]
    dtype: str
    checksum: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file.

    Attributes:
        size_bytes: its length.
        crc32: zlib's CRC-32 of all its bytes.
    """

    size_bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """The contents of one checkpoint.

    Attributes:
        step: optimizer steps taken when it was written.
        tensors: by key, e.g. `weight/decoder.layers.3.mlp.experts.fc1`.
        files: by name; all but the manifest and the marker.
    """

    step: int
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]

    def to_json(self) -> str:
        """One line a tensor and a file; checksums in hexadecimal."""
        tensors = {key: _tensor_values(entry) for key, entry in self.tensors.items()}
        files = {
            name: {"size_bytes": entry.size_bytes, "crc32": f"{entry.crc32:08x}"}
            for name, entry in self.files.items()
        }
        return (
            f'{{\n"format_version": {_FORMAT_VERSION},\n"step": {self.step},\n'
            f'"files": {_lines(files)},\n"tensors": {_lines(tensors)}\n}}\n'
        )

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """Read what `to_json` wrote, and see that its tensors fit into its files.

        Raises:
            DamagedError: for text that is no manifest.
            CheckpointError: for another format version.
        """
        try:
            values = json.loads(text)
            version = _count(values["format_version"])
            if version != _FORMAT_VERSION:
                raise CheckpointError(
                    f"manifest: format_version: found {version}; this dsv2_train reads "
                    f"{_FORMAT_VERSION}; take the dsv2_train that wrote it, or another run.name"
                )
            files = {_name(name): _file_entry(entry) for name, entry in values["files"].items()}
            tensors = {_name(key): _tensor_entry(one) for key, one in values["tensors"].items()}
            manifest = cls(_count(values["step"]), tensors, files)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"manifest: cannot be read: {error!r:.200}") from error
        for problem in _problems(manifest):
            raise DamagedError(f"manifest: {problem}")
        return manifest


def _tensor_values(entry: TensorEntry) -> dict[str, Any]:
    return {
        "shape": entry.shape,
        "dtype": entry.dtype,
        "checksum": f"{entry.checksum:016x}",
        "chunks": [(c.offset, c.numel, c.file, c.byte_offset) for c in entry.chunks],
    }


def _problems(manifest: Manifest) -> Iterator[str]:
    """What keeps the tensors of a manifest from being in its files, each element once.

    The first is the one to tell: those behind it need not be true, or can be told.
    """
    for name in manifest.files:
        if "/" in name or name in (".", ".."):
            yield f"{name!r} is no file of this checkpoint"
    used_bytes: Counter[str] = Counter()
    for key, entry in manifest.tensors.items():
        for problem in _tensor_problems(entry, manifest.files):
            yield f"{key}: {problem}"
        for chunk in entry.chunks:
            used_bytes[chunk.file] += chunk.numel * _ITEM_BYTES[entry.dtype]
    for name, num_bytes in used_bytes.items():
        if num_bytes > manifest.files[name].size_bytes:
            yield f"{name}: is shorter than the tensors in it"


def _tensor_problems(entry: TensorEntry, files: Mapping[str, FileEntry]) -> Iterator[str]:
    if entry.dtype not in _ITEM_BYTES:
        yield f"dtype: found {entry.dtype!r}; must be one of {', '.join(_ITEM_BYTES)}"
    covered = 0
    for chunk in entry.chunks:
        if chunk.file not in files:
            yield f"{chunk.file!r} is no file of this checkpoint"
        end = chunk.byte_offset + chunk.numel * _ITEM_BYTES[entry.dtype]
        if end > files[chunk.file].size_bytes:
            yield f"ends at byte {end}, behind the end of {chunk.file}"
        if chunk.offset != covered or chunk.numel == 0:
            yield f"found {chunk.numel} elements at {chunk.offset}; must be some at {covered}"
        covered += chunk.numel
    if covered != math.prod(entry.shape):
        yield f"found {covered} elements for shape {entry.shape}"


def _file_entry(values: dict[str, Any]) -> FileEntry:
    return FileEntry(_count(values["size_bytes"]), _hexadecimal(values["crc32"], 8))


def _tensor_entry(values: dict[str, Any]) -> TensorEntry:
    shape = tuple(map(_count, values["shape"]))
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"found {len(shape)} dimensions; must be at most {_MOST_DIMENSIONS}")
    chunks = tuple(
        Chunk(_count(offset), _count(numel), _name(file), _count(byte_offset))
        for offset, numel, file, byte_offset in values["chunks"]
    )
    return TensorEntry(shape, _name(values["dtype"]), _hexadecimal(values["checksum"], 16), chunks)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"found {value!r:.50}; must be a whole number, at least 0")
    return value


def _hexadecimal(value: str, num_digits: int) -> int:
    if not re.fullmatch(rf"[0-9a-f]{{{num_digits}}}", value):
        raise ValueError(f"found {value!r:.50}; must be {num_digits} hexadecimal digits")
    return int(value, 16)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isascii() or not value.isprintable():
        raise ValueError(f"found {value!r:.50}; must be a name in ASCII")
    return value


def _lines(entries: dict[str, Any]) -> str:
    lines: Sequence[str] = [
        f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}"
