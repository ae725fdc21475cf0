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


def _poisoned(rank: int, config: RunConfig, name: str, bad: float = math.nan) -> str:
    """Train with a module of the last rank getting `bad` from step 2 on; what is raised."""
    run = open_run(rank, config)
    begin_step = run.telemetry.begin_step

    def poison_one() -> None:
        begin_step()
        if run.clock.step == 1 and rank == config.parallel.world_size - 1:
            module = run.chunks[0].module.get_submodule(name)
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0] + bad, *inputs[1:]))

    run.telemetry.begin_step = poison_one  # type: ignore[method-assign]
    try:
        loop.train(run)
    except (FloatingPointError, RuntimeError) as error:
        return str(error)
    finally:
        close_run(run)
    return "went on"


def test_a_bad_gradient_norm_stops_every_rank_and_is_no_row(world: World, tmp_path: Path) -> None:
    config = run_config(
        tmp_path, synthetic_folder(tmp_path / "data"), "parallel.world_size=2", "parallel.pp=2"
    )
    for said in world.run(_poisoned, 2, config, "output_layer"):
        assert said.startswith("step 2: the gradient norm is nan")
    assert [row["step"] for row in read_rows(config.run.folder / "metrics.jsonl")] == [1]


def _poisoned_and_gone(rank: int, config: RunConfig, told: Path, bad: float) -> None:
    """As a rank of a run, which ends with what it raises."""
    said = _poisoned(rank, config, "decoder.layers.2.mlp.router", bad)
    (told / str(rank)).write_text(said)
    os._exit(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_router_logits_are_told_by_step_layer_and_rank(
    pytestconfig: pytest.Config, tmp_path: Path, bad: float
) -> None:
    """Its peer in the exchange is not left waiting: it fails as soon as the rank is gone."""
    config = run_config(
        tmp_path, synthetic_folder(tmp_path / "data"), "parallel.world_size=2", "parallel.ep=2"
    )
    world = World(pytestconfig.getini("filterwarnings"))
    with pytest.raises(ChildProcessError):
        world.run(_poisoned_and_gone, 2, config, tmp_path, bad, timeout_s=60)
    peer, bad = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert bad.startswith("step 2: layer 2 on rank 1: ")
    assert bad.endswith("384 of 384 router logits are not finite")
    assert "onnection" in peer
