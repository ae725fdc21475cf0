"""The flat ranges of the model that this rank updates (ZeRO-1)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from dsv2_train.distributed.sharding import GlobalTensor, whole_of
from dsv2_train.optim.param_groups import is_decayed


@dataclass(frozen=True)
class Shard:
    """A range of one parameter that only this rank updates.

    Attributes:
        place: the range's first element in the whole model.
        weight: [n] model dtype, in megatron-core's parameter buffer (what ranks gather).
        gradient: [n] fp32, in its gradient buffer (what ranks reduce).
        master: [n] fp32, what AdamW updates: the weight's own memory where that is fp32 and on
            the same device.
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
        return self.master.data_ptr() != self.weight.data_ptr()


def owned_shards(
    chunks: list[DistributedDataParallel], groups: ProcessGroupCollection, *, on_host: bool
) -> list[Shard]:
    """The shards of this rank: of dense weights over dp, of expert weights over expert dp.

    megatron-core's DistributedOptimizer decides who owns what, in agreement with how its
    DistributedDataParallel reduces gradients and gathers weights, and makes the fp32 masters.

    Args:
        chunks: this rank's stages, wrapped for ZeRO-1, every parameter tagged.
        groups: the rank's process groups.
        on_host: keep masters in host memory.

    Raises:
        TypeError: for weights that are neither fp32 nor bf16.
    """
    parts = (
        ({index: chunk.buffers for index, chunk in enumerate(chunks)}, groups.dp_cp),
        (
            {index: chunk.expert_parallel_buffers for index, chunk in enumerate(chunks)},
            groups.expt_dp,
        ),
    )
    return [
        shard
        for buffers, group in parts
        if any(buffers.values())
        for shard in _shards_of(_partition(chunks, buffers, group), on_host)
    ]


def _partition(
    chunks: list[DistributedDataParallel],
    buffers: dict[int, list[_ParamAndGradBuffer]],
    group: ProcessGroup,
) -> DistributedOptimizer:
    """megatron-core's own partition of the buffers; its inner optimizer is never stepped."""
    params = [
        param for several in buffers.values() for buffer in several for param in buffer.params
    ]
    partition = DistributedOptimizer(
        optimizer=torch.optim.AdamW(params),
        config=OptimizerConfig(use_distributed_optimizer=True),
        grad_scaler=None,
        init_state_fn=None,
        model_chunks=chunks,
        per_model_buffers=buffers,
        data_parallel_group=group,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=0,
        distributed_optimizer_instance_id=0,
    )
    partition.prepare_grads()  # fp32 gradients of the shards are views of the gradient buffer
    return partition


def _shards_of(partition: DistributedOptimizer, on_host: bool) -> Iterator[Shard]:
    bf16 = (
        partition.model_float16_groups,
        partition.shard_float16_groups,
        partition.shard_fp32_from_float16_groups,
    )
    fp32 = (
        partition.model_fp32_groups,
        partition.shard_fp32_groups,
        partition.shard_fp32_groups,
    )
    for kind in (bf16, fp32):
        for group in zip(*kind, strict=True):
            for param, weight, master in zip(*group, strict=True):
                first = partition._get_model_param_range_map(param)["param"].start
                yield _shard(param, first, weight, master, on_host)


def _shard(
    param: torch.nn.Parameter, first: int, weight: Tensor, master: Tensor, on_host: bool
) -> Shard:
    whole, gradient = whole_of(param), master.grad
    assert gradient is not None
    master = master.detach()
    if on_host and master.device.type != "cpu":
        master = master.to("cpu").pin_memory()
    if hasattr(param, "main_param"):
        param.main_param = None  # megatron-core's reference would keep a device copy alive
    return Shard(
        place=GlobalTensor(whole.name, whole.shape, whole.offset + first),
        weight=weight.detach(),
        gradient=gradient,
        master=master,
        decayed=is_decayed(param),
    )
