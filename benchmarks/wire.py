"""Bytes that collectives bring to a rank, counted where torch hands them to the back end."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Received:
    """Bytes that a rank receives from others, for one microbatch and layer.

    Attributes:
        rows: hidden states and their gradients.
        other: counts, gate values and their gradients, keys.
    """

    rows: int = 0
    other: int = 0

    def __add__(self, more: "Received") -> "Received":
        return Received(self.rows + more.rows, self.other + more.other)

    @property
    def total(self) -> int:
        """All of them."""
        return self.rows + self.other


class Counter(TorchDispatchMode):
    """Counts what collectives bring to this rank; refuses those that it does not know."""

    def __init__(self, hidden_size: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._hidden_size, self._group = hidden_size, group
        self.received = Received()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "alltoall_base_":
            output, _, _, splits = args[:4]
            splits = splits or [output.size(0) // self._group.size()] * self._group.size()
            rows = sum(splits) - splits[self._group.rank()]
            num_bytes = rows * output[:1].numel() * output.element_size() if rows else 0
        elif name == "_allgather_base_":
            output, source = args[:2]
            num_bytes = output.nbytes - source.nbytes
        elif name == "barrier":
            return
        else:
            raise ValueError(f"c10d.{name}: found a collective whose bytes are not counted here")
        if output.dim() == 2 and output.size(-1) == self._hidden_size:
            self.received += Received(rows=num_bytes)
        else:
            self.received += Received(other=num_bytes)
