"""Stopped and resumed equals straight through, bit for bit, on the same layout."""

import json
from pathlib import Path

import pytest

from dsv2_train.checkpoint.disk.integrity import newest_intact
from dsv2_train.config.run import RunConfig
from dsv2_train.data.manifest import read_manifest
from dsv2_train.monitor import monitor
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.monitor.report import StartUp
from dsv2_train.monitor.sinks.console import ConsoleSink
from dsv2_train.train import setup
from dsv2_train.train.loop import train
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import Owned, add_up, close_run, open_run, owned, run_config
from tests.helpers.world import World


def _train(rank: int, config: RunConfig, stop_at: int | None) -> list[Owned]:
    run = open_run(rank, config)
    if stop_at is not None:
        run.signals.agreed = lambda *_: run.clock.step >= stop_at  # type: ignore[method-assign]
    train(run)
    state = owned(run)
    close_run(run)
    return state


def _rows(config: RunConfig) -> list[dict[str, float]]:
    """What does not depend on the clock on the wall."""
    lines = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key[:5] not in ("perf/", "mem/p")}
        for line in lines
    ]


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, ()),
        (4, ("parallel.pp=2", "parallel.ep=2")),
        (4, ("parallel.ep=2", "parallel.bucket_size=3000")),
        (2, ("recipe.precision=bf16",)),
    ],
    ids=["one rank", "PP2 EP2", "EP2 DP2, buckets", "bf16 DP2"],
)
def test_resumed_equals_straight(
    world: World, tmp_path: Path, size: int, overrides: tuple[str, ...]
) -> None:
    data = synthetic_folder(tmp_path / "data")
    common = (f"parallel.world_size={size}", "monitor.log_every_steps=2", *overrides)
    straight = run_config(tmp_path, data, "run.name=straight", *common)
    resumed = run_config(tmp_path, data, "run.name=resumed", *common)
    expected = add_up(world.run(_train, size, straight, None))
    halfway = add_up(world.run(_train, size, resumed, 3))
    assert halfway != expected
    assert add_up(world.run(_train, size, resumed, None)) == expected
    assert _rows(resumed) == _rows(straight)


def test_skipping_from_here_on_equals_skipping_from_the_start(world: World, tmp_path: Path) -> None:
    """Samples 26 to 37 lie ahead after three steps of 8."""
    data = synthetic_folder(tmp_path / "data")
    size, skip = "parallel.world_size=2", "data.skip=[[26,38]]"
    whole = run_config(tmp_path, data, "run.name=whole", size)
    straight = run_config(tmp_path, data, "run.name=straight", size, skip)
    expected = add_up(world.run(_train, 2, straight, None))
    assert add_up(world.run(_train, 2, whole, None)) != expected
    name = "run.name=later"
    world.run(_train, 2, run_config(tmp_path, data, name, size), 3)
    world.run(_train, 2, run_config(tmp_path, data, name, size, skip), 4)
    # Not said again: it is in the checkpoint.
    later = run_config(tmp_path, data, name, size)
    assert add_up(world.run(_train, 2, later, None)) == expected
    assert _rows(later) == _rows(straight)
    state = newest_intact(later.run.checkpoint_folder).state
    assert state is not None
    assert state.skip_list == ((26, 38),)
    assert state.consumed_samples == 6 * 8
    assert state.corpus == read_manifest(data).splits["train"].bin.sha256


def _train_as(rank: int, config: RunConfig, run_id: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "wandb_run_id", run_id)
        run = open_run(rank, config)
        train(run)
        close_run(run)


def test_the_wandb_run_is_state(world: World, tmp_path: Path) -> None:
    config = run_config(tmp_path, synthetic_folder(tmp_path / "data"), "parallel.world_size=1")
    world.run(_train_as, 1, config, "a1b2")
    state = newest_intact(config.run.checkpoint_folder).state
    assert state is not None
    assert state.wandb_run_id == "a1b2"


def _told_totals(rank: int, config: RunConfig) -> tuple[int, int, int]:
    """Steps of the whole run in the start-up table and the progress counter; its tokens."""
    shown: list[StartUp] = []
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "start_up_table", lambda start: shown.append(start) or "")
        patch.setattr(
            monitor, "ConsoleSink", lambda total: counted.append(total) or ConsoleSink(total)
        )
        close_run(open_run(rank, config))
    [start], [steps] = shown, counted
    return start.total_steps, steps, start.total_tokens


def test_another_batch_moves_the_end_that_is_told(world: World, tmp_path: Path) -> None:
    """Of 6 steps of 8 samples 3 are done: 6 of 4 samples are left."""
    data = synthetic_folder(tmp_path / "data")
    tokens = ("recipe.num_steps=null", f"recipe.num_tokens={6 * 8 * 24}")
    config = run_config(tmp_path, data, "parallel.world_size=1", *tokens)
    world.run(_train, 1, config, 3)
    smaller = run_config(tmp_path, data, *tokens, "recipe.global_batch_size=4")
    assert world.run(_told_totals, 1, smaller) == [(9, 9, 6 * 8 * 24)]
    shorter = run_config(tmp_path, data, *tokens, "recipe.num_steps=4")
    assert world.run(_told_totals, 1, shorter) == [(4, 4, 4 * 8 * 24)]


def test_rows_after_the_restored_step_are_kept_aside(world: World, tmp_path: Path) -> None:
    data = synthetic_folder(tmp_path / "data")
    config = run_config(tmp_path, data, "parallel.world_size=1")
    world.run(_train, 1, config, 3)
    metrics = config.run.folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "train/loss": 9.0}\n')
    world.run(_train, 1, config, None)
    assert [row["step"] for row in _rows(config) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    [aside] = (config.run.folder / "logs").glob("metrics_after_step_00000003_*.jsonl")
    assert json.loads(aside.read_text())["train/loss"] == 9.0
