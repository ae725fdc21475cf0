"""The schedule that runs a step's micro-batches through the pipeline (megatron-core's 1F1B)."""

import functools
from collections.abc import Callable

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

ForwardBackward = Callable[..., list[dict[str, Tensor]]]


def build_forward_backward(
    chunk: DistributedDataParallel, groups: ProcessGroupCollection
) -> ForwardBackward:
    """Choose the schedule for a layout and connect it to gradient reduction.

    Args:
        chunk: this rank's stage, wrapped for data parallelism. Its configuration is told how to
            hold back, start and finish the reduction of gradients, where there is anybody to
            reduce them with.
        groups: the rank's process groups.

    Returns:
        A function of megatron-core's keyword arguments (`forward_step_func`, `data_iterator`,
        `num_microbatches`, `seq_length`, `micro_batch_size`, `forward_only`) that returns, on the
        last stage, what the loss function reported for each micro-batch.
    """
    config = chunk.config
    if groups.dp.size() > 1:
        config.no_sync_func = chunk.no_sync
        config.finalize_model_grads_func = finalize_model_grads
    if groups.pp.size() == 1:
        return functools.partial(
            forward_backward_no_pipelining, model=[chunk], pg_collection=groups
        )
    return functools.partial(
        forward_backward_pipelining_without_interleaving,
        model=[chunk],
        pg_collection=groups,
        p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=config),
    )
