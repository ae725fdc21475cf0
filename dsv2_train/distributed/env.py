"""This process among all: where it runs, and how the processes of a run find each other."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dsv2_train.distributed import cpu_ranks


@dataclass(frozen=True)
class Env:
    """The place of this process.

    Attributes:
        rank: 0 to world_size - 1, over all nodes.
        world_size: processes of the run.
        local_rank: which process of its node.
        device: where its tensors live.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def start(timeout_s: float) -> Env:
    """Join the processes that torchrun started: NCCL where CUDA is, gloo on CPU ranks elsewhere.

    Args:
        timeout_s: how long a collective may wait for its peers before the run fails.

    Raises:
        RuntimeError: when a variable that torchrun sets is missing.

    Note:
        Blocks until all processes have joined. Installs `cpu_ranks`, and without CUDA gives each
        process its share of the cores, unless OMP_NUM_THREADS is set.
    """
    rank, world_size, local_rank, local_world_size = (
        _from_torchrun(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    cpu_ranks.install()
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        backend, device = "gloo", torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    dist.init_process_group(
        backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    return Env(rank, world_size, local_rank, device)


def stop() -> None:
    """Leave the processes of the run; `start` may be called again."""
    dist.destroy_process_group()


def _from_torchrun(name: str) -> int:
    try:
        return int(os.environ[name])
    except KeyError:
        raise RuntimeError(
            f"{name} is not set: start the run with launch/local.sh or torchrun"
        ) from None
