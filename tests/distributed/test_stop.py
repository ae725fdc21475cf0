"""A stop asked of one rank, and numbers that are none, end all ranks at the same step."""

import math
import os
import signal
from pathlib import Path

import pytest

from dsv2_train.config.run import RunConfig
from dsv2_train.monitor.rows import read_rows
from dsv2_train.train import loop
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import before_step, close_run, open_run, run_config
from tests.helpers.world import World


def _signalled(rank: int, config: RunConfig, asked: int, at_step: int) -> int:
    """Train; one rank gets SIGTERM while a step runs. Returns the step it ended at."""
    run = open_run(rank, config)

    def signal_one() -> None:
        if rank == asked and run.clock.step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    before_step(run, signal_one)
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


def _poisoned(rank: int, config: RunConfig, name: str, bad: float = math.nan) -> str:
    """Train with a module of the last rank getting `bad` from step 2 on; what is raised."""
    run = open_run(rank, config)

    def poison_one() -> None:
        if run.clock.step == 1 and rank == config.parallel.world_size - 1:
            module = run.chunks[0].module.get_submodule(name)
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0] + bad, *inputs[1:]))

    before_step(run, poison_one)
    try:
        loop.train(run)
    except FloatingPointError as error:
        return str(error)
    finally:
        close_run(run)
    return "went on"


def _config(folder: Path, *overrides: str) -> RunConfig:
    data = synthetic_folder(folder / "data")
    return run_config(folder, data, "parallel.world_size=2", *overrides)


def test_a_bad_loss_stops_every_rank_and_is_no_row(world: World, tmp_path: Path) -> None:
    config = _config(tmp_path, "parallel.pp=2", "guards=stop")
    for said in world.run(_poisoned, 2, config, "output_layer"):
        assert said.startswith("step 2: the loss is nan, the gradient norm is nan; the loss of sam")
    assert [row["step"] for row in read_rows(config.run.folder / "metrics.jsonl")] == [1]


ROUTER = "decoder.layers.2.mlp.router"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_router_logits_of_one_rank_stop_every_rank(
    world: World, tmp_path: Path, bad: float
) -> None:
    """Its peer in the exchange is not left waiting; layer and rank are told."""
    config = _config(tmp_path, "parallel.ep=2", "guards=stop")
    for said in world.run(_poisoned, 2, config, ROUTER, bad):
        assert said.startswith("step 2: the loss is nan, the gradient norm is nan; layer 2 on rank")
        assert "layer 2 on rank 1: 96 tokens with router logits not finite" in said


def test_a_validation_loss_hides_no_bad_router_logits(world: World, tmp_path: Path) -> None:
    config = _config(tmp_path, "parallel.ep=2")
    assert world.run(_poisoned, 2, config, ROUTER) == ["went on"] * 2
    rows = read_rows(config.run.folder / "metrics.jsonl")
    assert [math.isnan(row["eval/loss"]) for row in rows if "eval/loss" in row] == [True, True]
