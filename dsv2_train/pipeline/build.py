"""The executor of a run."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed.lanes import build_lanes
from dsv2_train.pipeline.executor import Executor
from dsv2_train.pipeline.plans import Plan
from dsv2_train.pipeline.schedules.build import build_forward_plan
from dsv2_train.pipeline.schedules.run_plan import run_plan
from dsv2_train.pipeline.stage.activation import Hidden
from dsv2_train.pipeline.stage.gradients import ChunkSync
from dsv2_train.recipe.rank_map import pipelines


def build_executor(
    config: RunConfig,
    chunks: Sequence[DistributedDataParallel],
    device: torch.device,
    timeout_s: float,
) -> Executor:
    """Connect this rank's stage to its neighbours, and its chunks to its schedule.

    Args:
        config: the run.
        chunks: this rank's, wrapped for data parallelism, by chunk.
        device: where activations live.
        timeout_s: how long a message between stages may wait for its peer.

    Note:
        Collective over all ranks.
    """

    def plan_of(num_microbatches: int, forward_only: bool) -> Plan:
        if forward_only:
            return build_forward_plan(config.parallel.placement, num_microbatches)
        return run_plan(config, num_microbatches)

    model, parallel = chunks[0].config, config.parallel
    placement = parallel.placement
    is_ring = placement.shape == "loop" and placement.num_chunks > 1
    lanes = (
        build_lanes(pipelines(parallel), timeout_s, device, is_ring=is_ring)
        if parallel.pp > 1
        else None
    )
    return Executor(
        chunks,
        [ChunkSync(chunk) for chunk in chunks],
        placement,
        lanes,
        Hidden(model.hidden_size, model.pipeline_dtype, device),
        plan_of,
    )
