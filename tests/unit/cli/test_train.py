"""What a run says last: how far it is, and command lines that would be accepted."""

import shlex
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv2_train.cli import train
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.run import RunConfig
from dsv2_train.recipe.clock import Clock, Schedule

QUICKSTART = "experiment=quickstart"
COMMAND = f"launch/local.sh {QUICKSTART}"


def ended(config: RunConfig, clock: Clock, device: str = "cpu") -> Any:
    """As much of a run as its last words are made of."""
    schedule = Schedule(config.recipe, config.optim)
    return SimpleNamespace(
        config=config,
        clock=clock,
        schedule=schedule,
        is_done=schedule.is_done(clock),
        env=SimpleNamespace(device=torch.device(device)),
    )


def commands(*overrides: str, device: str = "cpu") -> dict[str, str]:
    config = resolve([QUICKSTART, *overrides], need_data=False)
    return dict(train._next_commands(ended(config, Clock(300, 2400), device), COMMAND))


def test_every_command_would_be_accepted() -> None:
    told = commands()
    assert list(told) == ["train longer", "in another layout", "on one GPU"]
    for line in told.values():
        program, *overrides = shlex.split(line)
        assert program == "launch/local.sh"
        resolve(overrides, need_data=False)


def test_one_gpu_is_the_experiment_for_it() -> None:
    config = resolve(shlex.split(commands()["on one GPU"])[1:], need_data=False)
    assert (config.run.name, config.recipe.precision) == ("debug_1gpu", "bf16")
    assert config.parallel.world_size == 1
    assert config.model == resolve([QUICKSTART], need_data=False).model


@pytest.mark.parametrize(
    ("overrides", "device"),
    [(("model.num_layers=8",), "cpu"), (("data.path=mine",), "cpu"), ((), "cuda")],
)
def test_one_gpu_is_not_offered_for_another_model_or_data_or_after_a_run_on_gpus(
    overrides: tuple[str, ...], device: str
) -> None:
    assert "on one GPU" not in commands(*overrides, device=device)


def test_a_layout_that_does_not_fit_is_not_offered() -> None:
    assert "in another layout" not in commands("parallel.pp=4", "parallel.ep=1")
    assert "in another layout" not in commands("parallel=single")


def test_the_end_that_is_told_is_that_of_the_clock() -> None:
    """3,200 samples; after 250 steps of 8, 60 of 16 make 2,960, 75 would make all."""
    tokens = ("recipe.num_steps=null", f"recipe.num_tokens={400 * 8 * 256}")
    config = resolve([QUICKSTART, *tokens, "recipe.global_batch_size=16"], need_data=False)
    stopped = ended(config, Clock(310, 2960))
    assert train._headline(stopped) == "stopped cleanly: 310 of 325 steps"
    done = ended(config, Clock(325, 3200))
    assert train._headline(done) == "done: 325 of 325 steps"
    longer = dict(train._next_commands(done, COMMAND))["train longer"]
    assert longer.endswith(" recipe.num_steps=650")
