"""A stop asked of one rank, and numbers that are none, end all ranks at the same step."""

import os
import signal
from pathlib import Path

import pytest
import torch

from dsv2_train.config.run import RunConfig
from dsv2_train.train import loop
from dsv2_train.train.step import train_step
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import close_run, open_run, run_config
from tests.helpers.world import World


def _signalled(rank: int, config: RunConfig, asked: int, at_step: int) -> int:
    """Train; one rank gets SIGTERM while a step runs. Returns the step it ended at."""
    run = open_run(rank, config)
    begin_step = run.telemetry.begin_step

    def signal_one() -> None:
        begin_step()
        if rank == asked and run.clock.step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    run.telemetry.begin_step = signal_one  # type: ignore[method-assign]
    loop.train(run)
    close_run(run)
    return run.clock.step


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_asked_of_one_rank_saves_once_at_one_step(
    world: World, tmp_path: Path, asked: int
) -> None:
    config = run_config(
        tmp_path, synthetic_folder(tmp_path / "data"), "parallel.world_size=2", "parallel.pp=2"
    )
    assert world.run(_signalled, 2, config, asked, 2) == [3, 3]
    saved = [path.name for path in (config.run.folder / "checkpoints").iterdir()]
    assert saved == ["step_00000003"]


def _poisoned(rank: int, config: RunConfig) -> str:
    """Train with one weight of the last rank made infinite before step 2."""
    run = open_run(rank, config)
    for step in range(2):
        if step == 1 and rank == config.parallel.world_size - 1:
            parameter = next(run.chunk.parameters())
            parameter.data.view(-1)[0] = torch.inf
        point = run.schedule.at(run.clock)
        result = train_step(run, point)
        run.clock = run.clock.advance(point)
        try:
            loop.require_finite(run.clock, result)
        except FloatingPointError as error:
            close_run(run)
            return str(error)
    close_run(run)
    return "went on"


def test_bad_numbers_stop_every_rank(world: World, tmp_path: Path) -> None:
    config = run_config(
        tmp_path, synthetic_folder(tmp_path / "data"), "parallel.world_size=2", "parallel.pp=2"
    )
    for said in world.run(_poisoned, 2, config):
        assert said.startswith("step 2: the gradient norm is nan")
