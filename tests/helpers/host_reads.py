"""What makes a host wait for its GPU: values of tensors that it reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Ops whose result, or its shape, the host needs; on a CPU they are called as on a GPU.
READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Names of what reads values inside, in order. One that a GPU alone goes by is `tolist`."""
    reads: list[str] = []
    tolist = torch.Tensor.tolist

    def remember(tensor: torch.Tensor) -> Any:
        reads.append("tolist")
        return tolist(tensor)

    with mock.patch.object(torch.Tensor, "tolist", remember), _Watch(reads):
        yield reads


class _Watch(TorchDispatchMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READING or _indexes_by_mask(name, args):
            self._reads.append(name)
        return func(*args, **kwargs or {})


def _indexes_by_mask(name: str, args: Any) -> bool:
    return name.startswith("index") and any(
        isinstance(each, torch.Tensor) and each.dtype is torch.bool
        for indices in args[1:2]
        if isinstance(indices, list | tuple)
        for each in indices
    )
