"""Write a rank's pieces into its file: from memory to disk once, checksummed on the way."""

import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dsv2_train.checkpoint.dcp.archive import stream_header
from dsv2_train.checkpoint.disk.checksum import add_checksums, tensor_checksum
from dsv2_train.checkpoint.disk.manifest import FileEntry
from dsv2_train.distributed import activity
from dsv2_train.distributed.sharding import Piece

_BLOCK_BYTES = 4 << 20
_BLOCKS_IN_FLIGHT = 16
_SYNC_BYTES = 32 << 20


@dataclass(frozen=True)
class WrittenPiece:
    """Where a piece went.

    Attributes:
        start: first byte of what `torch.load` reads as a tensor.
        byte_offset: first byte of the elements.
        end: byte after the last.
        checksum: of the elements, by their position in the whole tensor.
    """

    start: int
    byte_offset: int
    end: int
    checksum: int


def write_pieces(path: Path, pieces: Iterable[Piece]) -> tuple[FileEntry, list[WrittenPiece]]:
    """Write pieces one after the other into a new file, and wait until it is on the disk.

    Args:
        path: file to create.
        pieces: contiguous 1-D data on any device; must not change meanwhile.

    Returns:
        The file's entry in the manifest, and where each piece is, in the order of `pieces`.

    Note:
        Local to this rank. Data of a device is copied in blocks: at most 68 MiB of host memory.
    """
    with _File(path) as file:
        written = [_write_piece(file, piece) for piece in pieces]
    return FileEntry(file.size_bytes, file.crc32), written


def _write_piece(file: "_File", piece: Piece) -> WrittenPiece:
    start = file.size_bytes
    if piece.data.numel():
        file.append(stream_header(piece.data.dtype, piece.data.numel()))
    byte_offset = file.size_bytes
    checksums = []
    for offset, block in _blocks(piece):
        file.append(block.view(torch.uint8).numpy().data)
        checksums.append(tensor_checksum(block, offset))
        activity.tick()
    return WrittenPiece(start, byte_offset, file.size_bytes, add_checksums(checksums))


def _blocks(piece: Piece) -> Iterator[tuple[int, Tensor]]:
    data = piece.data.detach()
    numel = _BLOCK_BYTES // data.element_size()
    for start in range(0, data.numel(), numel):
        yield piece.offset + start, data[start : start + numel].cpu()


class _File:
    """A file that a thread appends to and another takes the CRC-32 of, behind the caller.

    A third one has what is written brought to the disk meanwhile, so that the end is not late.
    """

    def __init__(self, path: Path) -> None:
        self.size_bytes = 0
        self.crc32 = 0
        self._small = bytearray()
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._writer = ThreadPoolExecutor(1)
        self._hasher = ThreadPoolExecutor(1)
        self._syncer = ThreadPoolExecutor(1)
        self._in_flight: deque[Future[None]] = deque()
        self._unsynced_bytes = 0
        self._syncing: Future[None] | None = None

    def __enter__(self) -> "_File":
        return self

    def append(self, data: bytes | memoryview) -> None:
        """Write data after what is there; it is copied if small, and must not change if large."""
        self.size_bytes += len(data)
        if len(data) < _BLOCK_BYTES // 4:
            self._small += data
            if len(self._small) >= _BLOCK_BYTES:
                self._flush_small()
        else:
            self._flush_small()
            self._submit(data)

    def _flush_small(self) -> None:
        if self._small:
            self._submit(self._small)
            self._small = bytearray()

    def _submit(self, data: bytes | bytearray | memoryview) -> None:
        self._in_flight.append(self._writer.submit(self._write, data))
        self._in_flight.append(self._hasher.submit(self._hash, data))
        while len(self._in_flight) > 2 * _BLOCKS_IN_FLIGHT:
            self._in_flight.popleft().result()

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        _write_all(self._descriptor, data)
        self._unsynced_bytes += len(data)
        if self._unsynced_bytes >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._sync_result()
            self._syncing = self._syncer.submit(os.fdatasync, self._descriptor)
            self._unsynced_bytes = 0

    def _sync_result(self) -> None:
        """Raise what the disk told: it tells each error once, so the last sync may know nothing."""
        if self._syncing is not None:
            self._syncing.result()

    def _hash(self, data: bytes | bytearray | memoryview) -> None:
        self.crc32 = zlib.crc32(data, self.crc32)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._flush_small()
                for work in self._in_flight:
                    work.result()
                self._sync_result()
                os.fsync(self._descriptor)
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._hasher.shutdown(cancel_futures=True)
            self._syncer.shutdown()
            os.close(self._descriptor)


def _write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
