"""From this rank's chunks to their data-parallel wrappers and the ZeRO-1 optimizer."""

import copy
from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.optim.adam import AdamChoice
from dsv2_train.optim.shards import owned_shards
from dsv2_train.optim.zero import ZeroOptimizer


def wrap(
    model: MegatronModule,
    parallel: ParallelConfig,
    precision: str,
    groups: ProcessGroupCollection,
) -> DistributedDataParallel:
    """Give a chunk contiguous weight and gradient buffers that reduce and gather (ZeRO-1).

    Gradients are means over dp: dense ones are summed over the dp group, those of experts
    (`allreduce` False on the parameter) over the expert-dp group, since the all-to-all has already
    summed the rest; both are scaled by 1/dp.

    Args:
        model: a chunk, tagged and initialized; its parameters move into the buffers.
        parallel: which communication overlaps, and the size of a bucket, in elements.
        precision: bf16 and fp32 reduce gradients in fp32; fp64 (tests) in fp64.
        groups: the rank's process groups.
    """
    has_peers = groups.dp.size() > 1
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=precision != "fp64",
        overlap_grad_reduce=parallel.overlap_grad_reduce and has_peers,
        overlap_param_gather=parallel.overlap_param_gather and has_peers,
        align_param_gather=True,  # the executor starts all gathers of a step
        bucket_size=parallel.bucket_size,
    )
    # megatron-core 0.16.1 cuts only the first stage's gradients into buckets: to the wrapper every
    # chunk is a pipeline of its own (the tensor-parallel group is this rank alone).
    alone = copy.copy(groups)
    alone.pp = groups.tp
    return DistributedDataParallel(
        config=model.config, ddp_config=config, module=model, pg_collection=alone
    )


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: OptimConfig,
    choice: AdamChoice,
    groups: ProcessGroupCollection,
) -> ZeroOptimizer:
    """The optimizer of this rank's shards, moments allocated: ready to step or to load into.

    Args:
        chunks: this rank's, from `wrap`.
        config: AdamW's hyper-parameters and the gradient clip.
        choice: from `choose_adam`.
        groups: the rank's process groups.

    Raises:
        TypeError: for weights that are neither fp32 nor bf16 (fp64 is for gradient tests).
    """
    shards = [shard for chunk in chunks for shard in owned_shards(chunk, on_host=choice.on_host)]
    return ZeroOptimizer(chunks, shards, choice, config, world=groups.intra_dist_opt)
