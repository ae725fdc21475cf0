"""The flat ranges of the model that this rank updates (ZeRO-1)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from dsv2_train.distributed.sharding import GlobalTensor, whole_of
from dsv2_train.optim.param_groups import is_decayed

WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Shard:
    """A range of one parameter that only this rank updates.

    Attributes:
        place: the range's first element in the whole model.
        weight: [n] model dtype, in megatron-core's parameter buffer (what ranks gather).
        gradient: [n] fp32, in its gradient buffer (what ranks reduce).
        master: [n] fp32, what AdamW updates: the weight itself where that is fp32 and on the
            same device.
        decayed: weight decay applies.
    """

    place: GlobalTensor
    weight: Tensor
    gradient: Tensor
    master: Tensor
    decayed: bool

    @property
    def has_own_master(self) -> bool:
        """True if the master is memory apart from the weight."""
        return self.master is not self.weight


def owned_shards(chunk: DistributedDataParallel, *, on_host: bool) -> list[Shard]:
    """The shards of this rank: of dense weights over dp, of expert weights over expert dp.

    Of every bucket, rank r of D in the buffer's group owns the r-th of D equal ranges: the one that
    the bucket's reduce-scatter leaves with it, and that its all-gather takes from it.

    Args:
        chunk: wrapped for ZeRO-1, every parameter tagged.
        on_host: keep masters in host memory.

    Raises:
        TypeError: for weights that are neither fp32 nor bf16.
    """
    return list(_shards(chunk, on_host))


def owned_gradients(chunk: DistributedDataParallel) -> list[Tensor]:
    """The gradients of all shards as one [n] fp32 view a bucket; padding in it is zero."""
    return [buffer.grad_data[ours] for buffer, _, ours in owned_ranges(chunk)]


def owned_ranges(chunk: DistributedDataParallel) -> Iterator[tuple[Any, Any, slice]]:
    """Every buffer and bucket, and which elements of the buffer are this rank's."""
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel() // group.size()
            first = bucket.offset + group.rank() * size
            yield buffer, bucket, slice(first, first + size)


def _shards(chunk: DistributedDataParallel, on_host: bool) -> Iterator[Shard]:
    for buffer, bucket, ours in owned_ranges(chunk):
        for param in bucket.params_list:
            start, end, _ = buffer.param_index_map[param]
            owned = slice(max(start, ours.start), min(end, ours.stop))
            if owned.start < owned.stop:
                weight, gradient = buffer.param_data[owned], buffer.grad_data[owned]
                yield _shard(param, owned.start - start, weight, gradient, on_host)


def _shard(param: Tensor, first: int, weight: Tensor, gradient: Tensor, on_host: bool) -> Shard:
    whole = whole_of(param)
    if weight.dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in WEIGHT_DTYPES)
        raise TypeError(f"optimizer: {whole.name} is {weight.dtype}; allowed: {allowed}")
    master = weight.to("cpu" if on_host else weight.device, torch.float32)
    if on_host and weight.is_cuda:
        master = master.pin_memory()
    return Shard(
        place=GlobalTensor(whole.name, whole.shape, whole.offset + first),
        weight=weight,
        gradient=gradient,
        master=master,
        decayed=is_decayed(param),
    )
