"""The groups of a layout in one process, without its other ranks: for models on the meta device."""

from datetime import timedelta

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.distributed import groups


def build_fake(parallel: ParallelConfig, rank: int) -> ProcessGroupCollection:
    """The groups as `rank` of the layout sees them: ranks and sizes are right, nothing is sent.

    Takes the place of an earlier fake world; `destroy_fake` ends it.

    Args:
        parallel: the layout, of any world size.
        rank: which of its ranks to be.

    Raises:
        RuntimeError: when real processes are joined.
    """
    if dist.is_initialized() and dist.get_backend() != dist.Backend.FAKE:
        raise RuntimeError("a fake world takes a process of its own: this one has joined a run")
    destroy_fake()
    dist.init_process_group(
        dist.Backend.FAKE,
        rank=rank,
        world_size=parallel.world_size,
        store=FakeStore(),
        timeout=timedelta(minutes=1),
    )
    return groups.build(parallel, timeout_s=60)


def destroy_fake() -> None:
    """End the fake world; does nothing where there is none."""
    groups.destroy()
    if dist.is_initialized() and dist.get_backend() == dist.Backend.FAKE:
        dist.destroy_process_group()
