"""What precedes the bytes of a tensor so that `torch.load` reads them as one.

torch's own stream format (`torch.save(..., _use_new_zipfile_serialization=False)`): a few pickles
that describe the tensor, its length, its bytes. Unlike a zip it has no trailer and no second
checksum of the bytes, so bytes go from the tensor's memory to the file once and as they are.
"""

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from dsv2_train.checkpoint.disk.errors import CheckpointError

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_STORAGE_KEY = "0"
_PICKLE_PROTOCOL = 2  # the newest that torch.load(weights_only=True) accepts


@lru_cache(maxsize=4096)
def stream_header(dtype: torch.dtype, numel: int) -> bytes:
    """Bytes that make a 1-D tensor of the bytes that follow them.

    Args:
        dtype: element type of the bytes that follow, which are little-endian.
        numel: elements that follow.

    Raises:
        CheckpointError: for a dtype that torch's stream format has no name for.
    """
    if dtype not in _STORAGES:
        allowed = ", ".join(map(str, _STORAGES))
        raise CheckpointError(f"dtype: found {dtype}; a checkpoint holds {allowed}")
    stream = io.BytesIO()
    stream.write(_preamble())
    _TensorPickler(stream, _PICKLE_PROTOCOL).dump(_Flat(_Bytes(dtype, numel)))
    pickle.dump([_STORAGE_KEY], stream, _PICKLE_PROTOCOL)
    stream.write(numel.to_bytes(8, "little"))
    return stream.getvalue()


@cache
def _preamble() -> bytes:
    system = {
        "protocol_version": torch.serialization.PROTOCOL_VERSION,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    parts = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, system)
    return b"".join(pickle.dumps(part, _PICKLE_PROTOCOL) for part in parts)


@dataclass(frozen=True)
class _Bytes:
    """Stands for the storage whose bytes follow the pickles."""

    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Flat:
    """Unpickles as a 1-D tensor over a storage."""

    storage: _Bytes

    def __reduce__(self) -> tuple[Any, ...]:
        shape, strides = (self.storage.numel,), (1,)
        arguments: tuple[Any, ...] = (self.storage, 0, shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _TensorPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Bytes):
            return None
        return ("storage", _STORAGES[obj.dtype], _STORAGE_KEY, "cpu", obj.numel, None)
