"""What crosses between the stages of a pipeline."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hidden:
    """The hidden state of one position, without its values.

    Attributes:
        size: its width.
        dtype: of its elements.
        device: where it lives.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    def activation(self, seq_length: int, micro_batch_size: int) -> "Activation":
        """Of all positions of a microbatch."""
        return Activation((seq_length, micro_batch_size, self.size), self.dtype, self.device)


@dataclass(frozen=True)
class Activation:
    """An activation, or its gradient, without its values.

    Attributes:
        shape: positions, samples, width.
        dtype: of its elements.
        device: where it lives.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """A tensor like it, not initialized."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def is_like(self, tensor: Tensor) -> bool:
        """Whether a tensor has this shape and dtype."""
        return tensor.shape == self.shape and tensor.dtype == self.dtype

    def __str__(self) -> str:
        return described(self.shape, self.dtype)


def described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Shape and dtype for people: `[24, 1, 48] bfloat16`."""
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
