"""Checks of an op's arguments: what was wrong, what was found, what is supported.

What would make a result wrong is refused on every path. Strides, addresses, multiples of 16 bytes
and largest sizes matter to kernels alone; plain torch takes any, and float64 too.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from dsv2_kernels.native.library import DTYPES

# Of every pointer that is read 16 bytes at a time.
_ALIGNMENT = 16


class Arguments:
    """The checks of one op, which its errors name.

    Every method raises ValueError, and TypeError for a dtype, naming op, argument, what was found
    and what is supported.

    Args:
        op: its name.
        for_kernel: whether a kernel reads the tensors, or plain torch.

    Attributes:
        for_kernel: the same.
        floats: supported dtypes of activations and weights.
        wide: supported dtypes of what stays float32 beside activations of fewer bits, such as
            gates, cos and sin.
    """

    def __init__(self, op: str, *, for_kernel: bool) -> None:
        self._op = op
        self.for_kernel = for_kernel
        also = () if for_kernel else (torch.float64,)
        self.floats: tuple[torch.dtype, ...] = (*DTYPES, *also)
        self.wide: tuple[torch.dtype, ...] = (torch.float32, *also)

    def tensor(
        self,
        name: str,
        tensor: Tensor,
        shape: Sequence[int | None],
        dtypes: Sequence[torch.dtype],
        device: torch.device | None = None,
        *,
        aligned: bool = True,
        strided: bool = False,
    ) -> None:
        """Refuse a tensor that does not fit, or that a kernel cannot read.

        Args:
            name: of the argument.
            tensor: for a kernel contiguous, unless it may be strided.
            shape: what its shape must be; None for a dimension that may be anything.
            dtypes: those that are supported.
            device: of the op's other tensors.
            aligned: whether a kernel reads it 16 bytes at a time, and it must begin at a multiple
                of 16.
            strided: whether all but the last dimension may have any strides that keep every row
                16-byte aligned.
        """
        self.dtype(name, tensor.dtype, dtypes)
        expected = ["any" if size is None else str(size) for size in shape]
        fits = len(shape) == tensor.dim() and all(
            size in (None, found) for size, found in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            self.refuse(name, f"shape {list(tensor.shape)}", f"[{', '.join(expected)}]")
        if device is not None:
            self.device(name, tensor, device)
        if self.for_kernel:
            self._readable(name, tensor, aligned, strided)

    def device(self, name: str, tensor: Tensor, device: torch.device) -> None:
        """Refuse a tensor on another device."""
        if tensor.device != device:
            self.refuse(name, f"a tensor on {tensor.device}", str(device))

    def dtype(self, name: str, dtype: torch.dtype, supported: Sequence[torch.dtype]) -> None:
        """Refuse a dtype."""
        if dtype not in supported:
            names = ", ".join(str(each).removeprefix("torch.") for each in supported)
            raise TypeError(self._text(name, f"dtype {dtype}", names))

    def require(self, holds: bool, name: str, found: object, supported: str) -> None:
        """Refuse a value unless it holds."""
        if not holds:
            self.refuse(name, found, supported)

    def refuse(self, name: str, found: object, supported: str) -> NoReturn:
        """Refuse a value."""
        raise ValueError(self._text(name, str(found), supported))

    def at_least_one(self, name: str, count: int, what: str = "") -> None:
        """Refuse a number below 1, which the argument is, or has of `what`."""
        self.require(count >= 1, name, f"{count} {what}".strip(), "at least 1")

    def at_most(self, name: str, count: int, most: int, what: str = "") -> None:
        """Refuse a number that is too large for a kernel; `what` as above."""
        if self.for_kernel and count > most:
            self.refuse(name, f"{count} {what}".strip(), f"at most {most}")

    def vectors(self, name: str, width: int, dtype: torch.dtype, what: str = "channels") -> None:
        """Refuse rows that are not a multiple of 16 bytes, which a kernel reads at a time."""
        size = _ALIGNMENT // dtype.itemsize
        if self.for_kernel and width % size:
            self.refuse(name, f"{width} {what}", f"multiples of {size} for {dtype}")

    def indices(self, name: str, indices: Tensor, count: int, *, once: bool = False) -> None:
        """Refuse indices that do not exist, on the host; kernels look at theirs in debug builds.

        Args:
            name: of the argument.
            indices: int64; one dimension where none may be there twice.
            count: one past the largest index; negative ones do not exist.
            once: whether none may be there twice.
        """
        if self.for_kernel:
            return
        for found in indices[(indices < 0) | (indices >= count)][:1].tolist():
            self.refuse(name, found, f"numbers from 0 that are less than {count}")
        if once:
            for found in first(indices.bincount() > 1):
                self.refuse(name, f"{found} twice", "each number once")

    def _readable(self, name: str, tensor: Tensor, aligned: bool, strided: bool) -> None:
        supports = _has_aligned_rows if strided else Tensor.is_contiguous
        if not supports(tensor):
            found = f"strides {tensor.stride()} for shape {list(tensor.shape)}"
            supported = "a contiguous tensor"
            if strided:
                supported = (
                    f"1 in the last dimension, multiples of {_ALIGNMENT} bytes in the others"
                )
            self.refuse(name, found, supported)
        if aligned and tensor.data_ptr() % _ALIGNMENT:
            found = f"an address of {tensor.data_ptr() % _ALIGNMENT} modulo {_ALIGNMENT}"
            self.refuse(name, found, f"multiples of {_ALIGNMENT}")

    def _text(self, name: str, found: str, supported: str) -> str:
        return f"{self._op}: {name} has {found}; supported: {supported}"


def first(wrong: Tensor) -> list[int]:
    """The first place of a [n] bool tensor that is true, or none."""
    places: list[int] = wrong.nonzero()[:1].flatten().tolist()
    return places


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
