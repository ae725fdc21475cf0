"""torch.distributed.checkpoint's own index of the files, so that its tools read them too.

A checkpoint's tensors appear there flattened, under their keys. This project reads the manifest
instead: the index is a pickle, and loading a checkpoint must not run code from it.
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
