"""The safetensors file format: 8 bytes of length, a JSON header, the bytes of the tensors.

Written and read here, because the library's writer wants all tensors of a file in memory at once.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2_train.checkpoint.disk.errors import CheckpointError

INDEX = "model.safetensors.index.json"

# torch's names; little-endian, as everything in both formats.
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
ITEM_BYTES = {"BF16": 2, "F32": 4}

_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: its element type, as the format names it.
        file: where it is.
        byte_offset: first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    byte_offset: int


def file_header(tensors: Iterable[tuple[str, tuple[int, ...]]], dtype: str) -> bytes:
    """What precedes the bytes of tensors that follow each other without gaps.

    Args:
        tensors: names and shapes, in their order.
        dtype: element type of all, as torch names it; one of `DTYPES`.
    """
    stored = DTYPES[dtype]
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + math.prod(shape) * ITEM_BYTES[stored]
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(path: Path) -> list[StoredTensor]:
    """Where the tensors of a file are.

    Raises:
        CheckpointError: for a file that is not of this format, or is cut off.
        OSError: for a file that cannot be read.
    """
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        data = _LENGTH_BYTES + length
        if not 0 < length <= _MAX_HEADER_BYTES or data > size_bytes:
            raise CheckpointError(
                f"{path}: no safetensors file, or cut off: found {size_bytes} bytes, of which a "
                f"header is said to take {length}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop(_METADATA, None)
        ranges = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        tensors = [_stored(path, name, entry, data) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no safetensors file: its header: {error!r}") from error
    expected = 0
    for start, end, name in ranges:
        if start != expected:
            raise CheckpointError(
                f"{path}: {name}: found at byte {start} of the data; the one before ends at "
                f"{expected}"
            )
        expected = end
    if data + expected != size_bytes:
        raise CheckpointError(
            f"{path}: cut off, or longer than its header says: found {size_bytes} bytes of "
            f"{data + expected}"
        )
    return tensors


def _stored(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    start, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"{name}: shape {shape} and data_offsets [{start}, {end}]")
    if not isinstance(dtype, str):
        raise ValueError(f"{name}: dtype {dtype!r}")
    if dtype in ITEM_BYTES and end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name}: {end - start} bytes for shape {shape} of {dtype}")
    return StoredTensor(name, shape, dtype, path, data + start)
