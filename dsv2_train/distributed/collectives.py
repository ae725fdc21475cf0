"""The few collectives that this project calls itself; the group is always an argument."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def all_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a tensor over the ranks of a group, in place; the same bits on every rank."""
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def all_max(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Elementwise maximum over the ranks of a group, in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """What the first rank of the group (None: of all ranks) passes. Pickled: small values only."""
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]
