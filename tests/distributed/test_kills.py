"""SIGKILL at any moment costs what was not saved: the run that is started again ends the same."""

import random
import shutil
from pathlib import Path

import pytest

from dsv2_train.checkpoint.disk import layout
from dsv2_train.config.run import RunConfig
from tests.helpers.corpus import synthetic_folder
from tests.helpers.history import final_tensors, trace
from tests.helpers.kills import Kill, attempt, draw
from tests.helpers.run import run_config

WORLD_SIZE = 2
NUM_STEPS = 12
MOST_KILLS = 3  # of a trial

SAVES = {
    "behind training": "checkpoint.asynchronous=true",
    "blocking": "checkpoint.asynchronous=false",
}


def _config(folder: Path, name: str, save: str) -> RunConfig:
    return run_config(
        folder,
        folder / "data",
        f"run.name={name}",
        f"parallel.world_size={WORLD_SIZE}",
        "parallel.pp=2",
        "parallel.schedule=zb_h1",
        f"recipe.num_steps={NUM_STEPS}",
        "checkpoint.every_steps=2",
        save,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kills")
    synthetic_folder(root / "data")
    return root


@pytest.mark.soak
@pytest.mark.parametrize("save", SAVES)
def test_a_killed_run_ends_as_the_undisturbed_one(
    folder: Path, soak: bool, pytestconfig: pytest.Config, save: str
) -> None:
    straight = _config(folder, f"straight_{save.split()[0]}", SAVES[save])
    ended, training_s = attempt(straight, None)
    assert ended
    rows, tensors = trace(straight.run.folder), final_tensors(straight.run.folder, NUM_STEPS)
    assert len([row for row in rows if "train/loss" in row]) == NUM_STEPS
    num_trials = pytestconfig.getoption("--kills") or (50 if soak else 2)
    for trial in range(num_trials):
        generator = random.Random(trial)
        killed = _config(folder, f"killed_{save.split()[0]}_{trial}", SAVES[save])
        kills = [draw(generator, WORLD_SIZE, training_s) for _ in range(MOST_KILLS)]
        for kill in kills:
            if attempt(killed, kill)[0]:
                break
        assert attempt(killed, None)[0]
        assert trace(killed.run.folder) == rows, (trial, kills)
        assert final_tensors(killed.run.folder, NUM_STEPS) == tensors, (trial, kills)
        assert layout.leftovers(killed.run.checkpoint_folder) == []
        shutil.rmtree(killed.run.folder)


def test_a_run_that_was_killed_had_not_ended(folder: Path) -> None:
    """The negative control: a kill kills, and what it costs is not there before the restart."""
    config = _config(folder, "once", SAVES["blocking"])
    assert not attempt(config, Kill((0,), in_save=True, delay_s=0.0, others_s=0.05))[0]
    newest = layout.latest_complete(config.run.checkpoint_folder)
    assert newest is None or layout.step_of(newest) != NUM_STEPS
