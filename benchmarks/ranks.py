"""Functions on gloo ranks, each in a process of its own on one thread."""

import logging
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.distributed import cpu_ranks
from dsv2_train.distributed import groups as process_groups

_TIMEOUT_S = 300.0


def run_ranks(function: Callable[..., Any], parallel: ParallelConfig, *args: Any) -> list[Any]:
    """Call `function(groups, *args)` on every rank of a layout; what each returned, by rank."""
    return run_processes(_with_groups, parallel.world_size, function, parallel, *args)


def run_processes(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on `size` gloo ranks without more groups; what each returned.

    A gloo group wakes up a hundred times a second, on every rank, while nobody uses it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron.core.models.gpt.gpt_model"])
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(size, mp_context=context) as pool,
    ):
        store = os.path.join(folder, "store")
        calls = [pool.submit(_on_rank, function, size, rank, store, args) for rank in range(size)]
        return [call.result() for call in calls]


def quiet() -> None:
    """No words of megatron-core's among the tables."""
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _on_rank(
    function: Callable[..., Any], size: int, rank: int, store: str, args: tuple[Any, ...]
) -> Any:
    quiet()
    torch.set_num_threads(1)
    cpu_ranks.install()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()


def _with_groups(function: Callable[..., Any], parallel: ParallelConfig, *args: Any) -> Any:
    groups: ProcessGroupCollection = process_groups.build(parallel, _TIMEOUT_S)
    try:
        return function(groups, *args)
    finally:
        process_groups.destroy()
