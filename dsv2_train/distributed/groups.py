"""The process groups of a layout; the only file that names megatron-core's parallel_state.

Rank order, slowest first: pipeline stage, expert data parallelism, expert parallelism. So an
expert-parallel group is consecutive ranks (one node where it fits), and so is a pipeline stage.
"""

from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv2_train.config.sections.parallel import ParallelConfig

RANK_ORDER = "tp-cp-ep-dp-pp"


def build(parallel: ParallelConfig, timeout_s: float) -> ProcessGroupCollection:
    """Create every process group of the layout.

    Args:
        parallel: the layout; its world size is that of the running processes.
        timeout_s: how long a collective of any of the groups may wait for its peers.

    Returns:
        This rank's groups, as GPTModel, MoELayer, the schedules, DistributedDataParallel and the
        DistributedOptimizer take them. `embd`, `pos_embd` are None away from the pipeline's ends.

    Raises:
        ValueError: when the number of processes is not the layout's.

    Note:
        Collective over all processes. megatron-core keeps them in globals too, until `destroy`.
    """
    running = dist.get_world_size()
    if running != parallel.world_size:
        raise ValueError(
            f"parallel.world_size is {parallel.world_size}, but {running} processes run"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        distributed_timeout_minutes=timeout_s / 60,
        order=RANK_ORDER,
        create_gloo_process_groups=False,
    )
    return ProcessGroupCollection.use_mpu_process_groups()


def build_hosts(timeout_s: float) -> dist.ProcessGroup:
    """All ranks over gloo, for what their hosts agree on without waiting for a device.

    Note:
        Collective over all processes; the group ends with the processes' own.
    """
    return dist.new_group(backend=dist.Backend.GLOO, timeout=timedelta(seconds=timeout_s))


def destroy() -> None:
    """Forget what `build` created; does nothing where there is nothing."""
    parallel_state.destroy_model_parallel()
