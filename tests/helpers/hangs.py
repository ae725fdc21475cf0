"""A rank that stops itself (SIGSTOP) in the middle of something, once: the others hang."""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from dsv2_train.cli.launch.hang.watchdog import Watchdog
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import activity, cpu_ranks
from dsv2_train.model.moe.dispatcher import ExpertParallelDispatch
from dsv2_train.optim.zero import ZeroOptimizer
from dsv2_train.pipeline.stage.stage import StageStep
from dsv2_train.train import loop
from tests.helpers.run import close_run, open_run
from tests.helpers.world import ROOT, preloaded_context

MICROBATCH = 1  # of which an op is interrupted
STEP = 2


@dataclass(frozen=True)
class Stop:
    """Where a rank stops, and what a report must say of it.

    Attributes:
        rank: that stops.
        place: one of `PLACES`.
        told: what must be in the report's line about the rank.
    """

    rank: int
    place: str
    told: str


STOPS = (
    Stop(3, "F", "F of microbatch 1, chunk 0"),
    Stop(0, "B", "B of microbatch 1, chunk 0"),
    Stop(2, "W", "W of microbatch 1, chunk 0"),
    Stop(1, "dispatch", "in dispatch"),
    Stop(3, "optimizer", "optimizer"),
)


def stop_in_step(stop: Stop, rank: int, when: Path) -> None:
    """This process stops in `STEP` when it comes to the place; the time is written down before."""
    measure = loop.measure

    def stopping(run: Any, point: Any) -> Any:
        if rank == stop.rank and run.clock.step == STEP - 1:
            PLACES[stop.place](lambda: _stop(when))
        return measure(run, point)

    loop.measure = stopping


def run_watched(
    config: RunConfig, stop: Stop | None, log_dir: Path, timeout_s: float
) -> list[int | None]:
    """All ranks of a run under a watchdog, without torchrun; the exit codes of their processes."""
    context = preloaded_context()
    watchdog = Watchdog(log_dir, timeout_s)
    with tempfile.TemporaryDirectory(prefix="hang-") as folder, watchdog.watching():
        arguments = (config, stop, f"{folder}/store", log_dir / "stopped", watchdog.environment)
        ranks = range(config.parallel.world_size)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    return codes


def _rank(
    rank: int,
    config: RunConfig,
    stop: Stop | None,
    store: str,
    when: Path,
    environment: dict[str, str],
) -> None:
    os.environ.update({"CUDA_VISIBLE_DEVICES": "", "RANK": str(rank), **environment})
    sys.path.insert(0, str(ROOT))
    activity.start()
    if stop is not None:
        stop_in_step(stop, rank, when)
    torch.set_num_threads(1)
    cpu_ranks.install()
    size, timeout = config.parallel.world_size, timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
    )
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        run = open_run(rank, config)
        with activity.phase(activity.Phase.BETWEEN_STEPS):
            loop.train(run)
        close_run(run)
    dist.destroy_process_group()


Interrupt = Callable[[], None]


def _in_op(method: str) -> Callable[[Interrupt], None]:
    def install(interrupt: Interrupt) -> None:
        original = getattr(StageStep, method)

        def interrupted(self: Any, op: Any, *arguments: Any) -> Any:
            if op.microbatch == MICROBATCH:
                interrupt()
            return original(self, op, *arguments)

        setattr(StageStep, method, interrupted)

    return install


def _in_dispatch(interrupt: Interrupt) -> None:
    original, exchange = ExpertParallelDispatch.__init__, dist.all_to_all_single

    def interrupted_exchange(*arguments: Any, **options: Any) -> Any:
        interrupt()
        return exchange(*arguments, **options)

    def interrupted(*arguments: Any) -> None:
        with patch.object(dist, "all_to_all_single", interrupted_exchange):
            original(*arguments)

    ExpertParallelDispatch.__init__ = interrupted  # type: ignore[method-assign]


def _in_optimizer(interrupt: Interrupt) -> None:
    original = ZeroOptimizer._clip

    def interrupted(*arguments: Any) -> None:
        interrupt()
        original(*arguments)

    ZeroOptimizer._clip = interrupted  # type: ignore[method-assign]


def _stop(when: Path) -> None:
    when.parent.mkdir(exist_ok=True)
    when.write_text(f"{time.time()} {os.getpid()}")
    os.kill(os.getpid(), signal.SIGSTOP)


PLACES: dict[str, Callable[[Interrupt], None]] = {
    "F": _in_op("_forward"),
    "B": _in_op("_input_gradient"),
    "W": _in_op("_weight_gradients"),
    "dispatch": _in_dispatch,
    "optimizer": _in_optimizer,
}
