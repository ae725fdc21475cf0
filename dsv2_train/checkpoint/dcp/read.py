"""Read the ranges that are asked for, whatever ranges they were written in."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from dsv2_train.checkpoint.disk.checksum import add_checksums, tensor_checksum
from dsv2_train.checkpoint.disk.errors import CheckpointError, DamagedError
from dsv2_train.checkpoint.disk.integrity import reading
from dsv2_train.checkpoint.disk.manifest import Chunk, Manifest
from dsv2_train.distributed.sharding import Piece

_BLOCK_BYTES = 4 << 20
_THREADS = 4


@dataclass(frozen=True)
class _Read:
    """Some elements of a chunk, and where they go."""

    file: str
    byte_offset: int
    offset: int
    target: Tensor


def read_pieces(folder: Path, manifest: Manifest, pieces: Sequence[Piece]) -> list[int]:
    """Fill pieces with the elements of their ranges.

    Args:
        folder: a checkpoint.
        manifest: its manifest; has every key of the pieces, with their shapes and dtypes.
        pieces: contiguous 1-D data on any device, filled in place.

    Returns:
        Checksums of what the pieces hold afterwards, in the order of `pieces`.

    Raises:
        DamagedError: for a file that is not there or ends before its elements do, and where the
            disk cannot give them back.
        CheckpointError: for a file that may not be read.

    Note:
        Local to this rank; reads no byte of another range. 16 MiB of host memory beside the pieces.
    """
    reads = [
        (index, read)
        for index, piece in enumerate(pieces)
        for read in _reads(manifest.tensors[piece.key].chunks, piece)
    ]
    reads.sort(key=lambda item: (item[1].file, item[1].byte_offset))
    checksums = [0] * len(pieces)
    try:
        for file, of_file in groupby(reads, key=lambda item: item[1].file):
            with (
                reading(folder / file),
                _opened(folder / file) as descriptor,
                ThreadPoolExecutor(_THREADS) as threads,
            ):
                for index, part in threads.map(partial(_load, descriptor), of_file):
                    checksums[index] = add_checksums((checksums[index], part))
    except CheckpointError as error:
        raise type(error)(f"{folder}: {error}") from error
    return checksums


def _load(descriptor: int, item: tuple[int, _Read]) -> tuple[int, int]:
    index, read = item
    _fill(descriptor, read)
    return index, tensor_checksum(read.target, read.offset)


def _reads(chunks: Sequence[Chunk], piece: Piece) -> list[_Read]:
    data = piece.data.detach()
    size, end = data.element_size(), piece.offset + data.numel()
    block = _BLOCK_BYTES // size
    reads = []
    first = bisect_right(chunks, piece.offset, key=lambda chunk: chunk.offset) - 1
    for chunk in chunks[max(0, first) :]:
        start = max(chunk.offset, piece.offset)
        stop = min(chunk.offset + chunk.numel, end)
        for offset in range(start, stop, block):
            target = data[offset - piece.offset : min(offset + block, stop) - piece.offset]
            byte_offset = chunk.byte_offset + (offset - chunk.offset) * size
            reads.append(_Read(chunk.file, byte_offset, offset, target))
        if stop == end:
            break
    return reads


def _fill(descriptor: int, read: _Read) -> None:
    on_host = read.target.device.type == "cpu"
    buffer = read.target if on_host else torch.empty_like(read.target, device="cpu")
    left = buffer.view(torch.uint8).numpy().data
    position = read.byte_offset
    while left:
        count = os.preadv(descriptor, [left], position)
        if count == 0:
            raise DamagedError(f"{read.file}: ends at byte {position}, inside a tensor")
        left = left[count:]
        position += count
    if not on_host:
        read.target.copy_(buffer)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
