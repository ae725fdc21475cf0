"""From this rank's stages to their data-parallel wrappers and the ZeRO-1 optimizer."""

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.optim.adam import AdamChoice
from dsv2_train.optim.shards import owned_shards
from dsv2_train.optim.zero import ZeroOptimizer


def wrap(
    chunks: list[MegatronModule],
    parallel: ParallelConfig,
    precision: str,
    groups: ProcessGroupCollection,
) -> list[DistributedDataParallel]:
    """Give the stages contiguous weight and gradient buffers that reduce and gather (ZeRO-1).

    Gradients are means over dp: dense ones are summed over the dp group, those of experts
    (`allreduce` False on the parameter) over the expert-dp group, since the all-to-all has already
    summed the rest; both are scaled by 1/dp.

    Args:
        chunks: this rank's stages, tagged and initialized; their parameters move into the buffers.
        parallel: which communication overlaps, and the size of a bucket, in elements.
        precision: bf16 and fp32 reduce gradients in fp32; fp64 (tests) in fp64.
        groups: the rank's process groups.
    """
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=precision != "fp64",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
    )
    return [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=config,
            module=chunk,
            disable_bucketing=index > 0,
            pg_collection=groups,
        )
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    chunks: list[DistributedDataParallel],
    config: OptimConfig,
    choice: AdamChoice,
    groups: ProcessGroupCollection,
) -> ZeroOptimizer:
    """The optimizer of this rank's shards, moments allocated: ready to step or to load into.

    Args:
        chunks: from `wrap`.
        config: AdamW's hyper-parameters and the gradient clip.
        choice: from `choose_adam`.
        groups: the rank's process groups.

    Raises:
        TypeError: for weights that are neither fp32 nor bf16 (fp64 is for gradient tests).
    """
    shards = owned_shards(chunks, groups, on_host=choice.on_host)
    return ZeroOptimizer(chunks, shards, choice, config, world=groups.intra_dist_opt)
