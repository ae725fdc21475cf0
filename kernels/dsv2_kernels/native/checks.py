"""Checks of a kernel's arguments: what was wrong, what was found, what is supported."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv2_kernels.native.library import DTYPES

# Of every pointer that is read 16 bytes at a time.
_ALIGNMENT = 16


class Arguments:
    """The checks of one op, which its errors name."""

    def __init__(self, op: str) -> None:
        self._op = op

    def tensor(
        self,
        name: str,
        tensor: Tensor,
        shape: Sequence[int | None],
        dtypes: Sequence[torch.dtype] = tuple(DTYPES),
        device: torch.device | None = None,
        *,
        aligned: bool = True,
        strided: bool = False,
    ) -> None:
        """Refuse a tensor that a kernel cannot read.

        Args:
            name: of the argument.
            tensor: contiguous, unless it may be strided.
            shape: what its shape must be; None for a dimension that may be anything.
            dtypes: those that are supported.
            device: of the op's other tensors.
            aligned: whether it is read 16 bytes at a time, and must begin at a multiple of 16.
            strided: whether all but the last dimension may have any strides that keep every row
                16-byte aligned.

        Raises:
            ValueError, TypeError: naming op, argument, what was found and what is supported.
        """
        if tensor.dtype not in dtypes:
            names = ", ".join(str(each).removeprefix("torch.") for each in dtypes)
            raise TypeError(self._text(name, f"dtype {tensor.dtype}", names))
        expected = ["any" if size is None else str(size) for size in shape]
        fits = len(shape) == tensor.dim() and all(
            size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                self._text(name, f"shape {list(tensor.shape)}", f"[{', '.join(expected)}]")
            )
        if device is not None and tensor.device != device:
            raise ValueError(self._text(name, f"a tensor on {tensor.device}", str(device)))
        supports = _has_aligned_rows if strided else Tensor.is_contiguous
        if not supports(tensor):
            found = f"strides {tensor.stride()} for shape {list(tensor.shape)}"
            supported = "a contiguous tensor"
            if strided:
                supported = (
                    f"1 in the last dimension, multiples of {_ALIGNMENT} bytes in the others"
                )
            raise ValueError(self._text(name, found, supported))
        if aligned and tensor.data_ptr() % _ALIGNMENT:
            found = f"an address of {tensor.data_ptr() % _ALIGNMENT} modulo {_ALIGNMENT}"
            raise ValueError(self._text(name, found, f"multiples of {_ALIGNMENT}"))

    def require(self, holds: bool, name: str, found: object, supported: str) -> None:
        """Refuse a value.

        Raises:
            ValueError: as above.
        """
        if not holds:
            raise ValueError(self._text(name, str(found), supported))

    def vectors(self, name: str, width: int, dtype: torch.dtype) -> None:
        """Refuse rows that are not a multiple of 16 bytes.

        Raises:
            ValueError: as above.
        """
        size = _ALIGNMENT // dtype.itemsize
        self.require(width % size == 0, name, width, f"multiples of {size} for {dtype}")

    def _text(self, name: str, found: str, supported: str) -> str:
        return f"{self._op}: {name} has {found}; supported: {supported}"


def is_readable(tensor: Tensor) -> bool:
    """Whether a kernel can read a strided tensor's rows 16 bytes at a time."""
    return _has_aligned_rows(tensor) and tensor.data_ptr() % _ALIGNMENT == 0


def _has_aligned_rows(tensor: Tensor) -> bool:
    size = _ALIGNMENT // tensor.element_size()
    *others, last = [
        stride for stride, count in zip(tensor.stride(), tensor.shape, strict=True) if count > 1
    ] or [1]
    aligned = last == 1 and all(stride % size == 0 for stride in others)
    return aligned or tensor.numel() == 0
