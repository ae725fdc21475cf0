"""Whole runs on test ranks: the production path, small."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv2_train.checkpoint.disk.checksum import add_checksums, tensor_checksum
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.distributed.env import Env
from dsv2_train.recipe.clock import Point
from dsv2_train.train.run import Run
from dsv2_train.train.setup import build_run
from dsv2_train.train.step import measure
from dsv2_train.train.telemetry.telemetry import StepResult
from tests.helpers.tiny import tiny_config


def run_config(folder: Path, data: Path, *overrides: str) -> RunConfig:
    """The tiny model on a data folder, writing below `folder`, in fp32."""
    return tiny_config(
        f"run.dir={folder}",
        f"data.path={data}",
        "monitor.wandb=disabled",
        "monitor.log_every_steps=1",
        "recipe.micro_batch_size=1",
        "recipe.global_batch_size=8",
        "recipe.eval_num_samples=8",
        "recipe.warmup_steps=2",
        "recipe.num_steps=6",
        "recipe.eval_every_steps=3",
        "checkpoint.every_steps=100",
        *overrides,
    )


def open_run(rank: int, config: RunConfig) -> Run:
    """Build a rank's run in a test world; `close_run` ends it."""
    env = Env(rank, config.parallel.world_size, rank, torch.device("cpu"))
    return build_run(config, env)


def close_run(run: Run) -> None:
    """End what `open_run` began."""
    if run.monitor is not None:
        run.monitor.close()
    process_groups.destroy()


def train_step(run: Run, point: Point) -> StepResult:
    """One step, its numbers not looked at; the clock stays."""
    result = measure(run, point)
    run.optimizer.update(point.lr, result.norm)
    return result


def before_step(run: Run, fault: Callable[[], None]) -> None:
    """Have `fault` called before every step, when telemetry has begun it."""
    begin_step = run.telemetry.begin_step

    def begin() -> None:
        begin_step()
        fault()

    run.telemetry.begin_step = begin  # type: ignore[method-assign]


@dataclass(frozen=True)
class Owned:
    """What one rank owns of one tensor: checksum parts add up over ranks."""

    key: str
    checksum: int


def owned(run: Run) -> list[Owned]:
    """Position-keyed checksums of this rank's state."""
    return [
        Owned(piece.key, tensor_checksum(piece.data, piece.offset))
        for piece in run.optimizer.pieces()
    ]


def add_up(of_ranks: list[list[Owned]]) -> dict[str, int]:
    """Checksum of every whole tensor."""
    parts: dict[str, list[int]] = {}
    for rank in of_ranks:
        for part in rank:
            parts.setdefault(part.key, []).append(part.checksum)
    return {key: add_checksums(checksums) for key, checksums in sorted(parts.items())}
