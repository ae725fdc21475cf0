"""Host memory that a rank's state is copied to, so that training goes on while it is written."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.distributed.sharding import Piece

_ALIGNMENT = 64


class Staging:
    """A copy of a rank's pieces in host memory that is there from the start and used again.

    Bytes: those of the pieces, each rounded up to 64. For a rank that owns n parameters these are
    14 n in bf16 (weight 2, master 4, two moments 8) and 12 n in fp32 (weight 4, two moments 8).
    On a machine with GPUs the memory is page-locked.

    Args:
        pieces: what will be copied, by size; their values are not read.

    Raises:
        CheckpointError: if there is not as much memory.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.size_bytes = sum(_aligned(piece.data.nbytes) for piece in pieces)
        self._memory = _filled(self.size_bytes)
        self._on_device = any(piece.data.is_cuda for piece in pieces)
        if self._on_device:
            # As it is: torch's own allocator of such memory rounds up to a power of two.
            pin_memory(self._memory.data_ptr(), self.size_bytes)
            weakref.finalize(self, unpin_memory, self._memory.data_ptr())

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with their present values; valid until the next copy.

        Args:
            pieces: as many, of the same sizes, as the memory is for.

        Note:
            Returns when the copy is complete. No communication.
        """
        staged = []
        start = 0
        for piece in pieces:
            data = piece.data.detach()
            place = self._memory[start : start + data.nbytes]
            _copy(place, data)
            staged.append(Piece(piece.key, piece.shape, piece.offset, place.view(data.dtype)))
            start += _aligned(data.nbytes)
        if self._on_device:
            torch.cuda.current_stream().synchronize()
        return staged


def _filled(num_bytes: int) -> Tensor:
    """Bytes whose pages are there, so that the first copy is no slower than the next."""
    try:
        return torch.full((num_bytes,), 0, dtype=torch.uint8)
    except RuntimeError as error:
        raise CheckpointError(
            f"an asynchronous checkpoint needs {num_bytes:,} bytes of host memory on this rank: "
            f"{error}; checkpoint.asynchronous=false needs none"
        ) from error


def _copy(place: Tensor, data: Tensor) -> None:
    if data.is_cuda:
        place.view(data.dtype).copy_(data, non_blocking=True)
    else:
        np.copyto(place.numpy(), data.view(torch.uint8).numpy())  # memcpy; copy_ is slower


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
