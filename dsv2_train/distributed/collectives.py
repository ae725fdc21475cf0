"""Reductions over the ranks of a group, which is always an argument."""

import torch.distributed as dist
from torch import Tensor

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place


def all_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a tensor over the ranks of a group, in place; the same bits on every rank."""
    with activity.waiting(Place.REDUCTION):
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def all_max(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Elementwise maximum over the ranks of a group, in place."""
    with activity.waiting(Place.REDUCTION):
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor
