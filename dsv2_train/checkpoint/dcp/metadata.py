"""Which tensor is where in the files: the manifest's record, and torch.distributed.checkpoint's.

torch's index is there for its tools: tensors appear in it flattened, under their keys. This project
reads the manifest: the index is a pickle, and loading a checkpoint must not run code from it.
"""

import pickle
from collections.abc import Iterable
from functools import cache

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dsv2_train.checkpoint.dcp.coverage import Range, whole_numel
from dsv2_train.checkpoint.dcp.write import WrittenPiece
from dsv2_train.checkpoint.disk.checksum import add_checksums
from dsv2_train.checkpoint.disk.manifest import Chunk, TensorEntry


def tensor_entries(written: Iterable[tuple[str, Range, WrittenPiece]]) -> dict[str, TensorEntry]:
    """The manifest's record of the tensors that pieces make up.

    Args:
        written: file, range and place of every piece of every rank: each tensor exactly once.

    Returns:
        By key, in order of key.
    """
    pieces: dict[str, list[tuple[str, Range, WrittenPiece]]] = {}
    for piece in sorted(written, key=lambda piece: (piece[1].key, piece[1].offset)):
        pieces.setdefault(piece[1].key, []).append(piece)
    return {key: _tensor_entry(of_key) for key, of_key in pieces.items()}


def _tensor_entry(pieces: list[tuple[str, Range, WrittenPiece]]) -> TensorEntry:
    _, first, _ = pieces[0]
    return TensorEntry(
        shape=first.shape,
        dtype=first.dtype,
        checksum=add_checksums(place.checksum for _, _, place in pieces),
        chunks=tuple(
            Chunk(part.offset, part.numel, file, place.byte_offset)
            for file, part, place in pieces
            if part.numel
        ),
    )


def metadata_bytes(written: Iterable[tuple[str, Range, WrittenPiece]]) -> bytes:
    """The content of `.metadata`.

    Args:
        written: file, range and place of every piece of every rank.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file, part, place in written:
        if part.numel == 0:
            continue
        offsets, sizes = torch.Size([part.offset]), torch.Size([part.numel])
        whole = TensorStorageMetadata(_properties(part.dtype), torch.Size([whole_numel(part)]), [])
        tensor = tensors.setdefault(part.key, whole)
        index = MetadataIndex(part.key, offsets, len(tensor.chunks))
        tensor.chunks.append(ChunkStorageMetadata(offsets, sizes))
        storage[index] = _StorageInfo(file, place.start, place.end - place.start)
    names = {key: (key,) for key in tensors}
    return pickle.dumps(Metadata({**tensors}, names, storage))


@cache
def _properties(dtype: str) -> TensorProperties:
    return TensorProperties(dtype=getattr(torch, dtype))
