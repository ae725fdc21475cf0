"""What a checkpoint contains: every tensor, every file, and checksums of both."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv2_train.checkpoint.disk.layout import CheckpointError, DamagedError

_FORMAT_VERSION = 1


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
        """Read what `to_json` wrote.

        Raises:
            DamagedError: for text that is no manifest.
            CheckpointError: for another format version.
        """
        try:
            values = json.loads(text)
            version = values["format_version"]
            if version != _FORMAT_VERSION:
                raise CheckpointError(
                    f"manifest: format_version: found {version!r}; this dsv2_train reads "
                    f"{_FORMAT_VERSION}; take the dsv2_train that wrote it, or another run.name"
                )
            files = {
                name: FileEntry(entry["size_bytes"], int(entry["crc32"], 16))
                for name, entry in values["files"].items()
            }
            tensors = {key: _tensor_entry(entry) for key, entry in values["tensors"].items()}
            step = values["step"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"manifest: cannot be read: {error!r}") from error
        used = {chunk.file for entry in tensors.values() for chunk in entry.chunks}
        foreign = sorted((used - files.keys()) | {name for name in files if "/" in name})
        if foreign:
            raise DamagedError(f"manifest: {foreign[0]!r} is no file of this checkpoint")
        return cls(step, tensors, files)


def _tensor_values(entry: TensorEntry) -> dict[str, Any]:
    return {
        "shape": entry.shape,
        "dtype": entry.dtype,
        "checksum": f"{entry.checksum:016x}",
        "chunks": [(c.offset, c.numel, c.file, c.byte_offset) for c in entry.chunks],
    }


def _tensor_entry(values: dict[str, Any]) -> TensorEntry:
    chunks = tuple(Chunk(*chunk) for chunk in values["chunks"])
    checksum = int(values["checksum"], 16)
    return TensorEntry(tuple(values["shape"]), values["dtype"], checksum, chunks)


def _lines(entries: dict[str, Any]) -> str:
    lines: Sequence[str] = [
        f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}"
