"""Read all of a checkpoint and hold every byte against what was written."""

from collections.abc import Iterator
from pathlib import Path

import torch

from dsv2_train.checkpoint.dcp.coverage import dtype_of
from dsv2_train.checkpoint.dcp.read import read_pieces
from dsv2_train.checkpoint.disk import integrity
from dsv2_train.checkpoint.disk.checksum import add_checksums
from dsv2_train.checkpoint.disk.errors import DamagedError
from dsv2_train.checkpoint.disk.manifest import Manifest, TensorEntry
from dsv2_train.distributed.sharding import Piece

_BLOCK_BYTES = 4 << 20


def verify(path: Path, manifest: Manifest) -> Iterator[tuple[int, str | None]]:
    """Verify the CRC-32 of every data file, and the checksum of every tensor.

    Args:
        path: a checkpoint that `disk.integrity.open_verified` has opened.
        manifest: its manifest.

    Yields:
        After each file and each tensor: bytes that were read for it, and what is wrong with it.

    Note:
        One process; reads everything twice, in 4 MiB of memory.
    """
    for name in sorted(filter(integrity.is_data, manifest.files)):
        problems = integrity.crc_problems(path, manifest, [name])
        yield (
            manifest.files[name].size_bytes,
            problems[0].removeprefix("  - ") if problems else None,
        )
    for key, entry in sorted(manifest.tensors.items()):
        yield _verify_tensor(path, manifest, key, entry)


def _verify_tensor(
    path: Path, manifest: Manifest, key: str, entry: TensorEntry
) -> tuple[int, str | None]:
    numel = torch.Size(entry.shape).numel()
    checksums = []
    try:
        dtype = dtype_of(entry.dtype)
        buffer = torch.empty(_BLOCK_BYTES // dtype.itemsize, dtype=dtype)
        for offset in range(0, numel, buffer.numel()):
            piece = Piece(key, entry.shape, offset, buffer[: numel - offset])
            checksums += read_pieces(path, manifest, [piece])
    except DamagedError as error:
        return 0, f"{key}: {error}"
    wrong = add_checksums(checksums) != entry.checksum
    problem = f"{key}: its checksum is not the manifest's" if wrong else None
    return numel * dtype.itemsize, problem
