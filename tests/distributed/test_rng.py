"""No generator moves in a step, so none is saved; what is drawn is keyed by what it is of."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from dsv2_train.config.run import RunConfig
from dsv2_train.recipe.exemption import is_exempt
from dsv2_train.train.evaluate import evaluate
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import Owned, add_up, close_run, open_run, owned, run_config, train_step
from tests.helpers.world import World

# What a step may draw for: dropped assignments and exempt samples, recomputation, several chunks.
_OVERRIDES = (
    "recipe.capacity_factor=1.0",
    "recipe.exempt_share=0.5",
    "parallel.recompute=[moe,mla_up_projection]",
)
LAYOUTS = {
    "one rank": (1, ()),
    "PP2 EP2 as a V": (
        4,
        ("parallel=pp2_ep2", "parallel.schedule=zb_v", "parallel.chunks=2"),
    ),
    "DP2": (2, ()),
}


def _generators() -> dict[str, object]:
    """The state of every generator of this process, comparable."""
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states() if tracker.is_initialized() else {}
    found: dict[str, object] = {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "megatron-core": {name: torch.as_tensor(one).tolist() for name, one in states.items()},
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state().tolist()
    return found


def _moved(rank: int, config: RunConfig, extra: str) -> list[str]:
    """Which generators a step and an evaluation move."""
    run = open_run(rank, config)
    before = _generators()
    point = run.schedule.at(run.clock)
    train_step(run, point)
    run.clock = run.clock.advance(point)
    evaluate(run)
    {"torch": lambda: torch.rand(1), "numpy": np.random.random, "python": random.random}.get(
        extra, int
    )()
    after = _generators()
    close_run(run)
    return [name for name in before if before[name] != after[name]]


def _config(folder: Path, layout: str, *overrides: str) -> RunConfig:
    size, more = LAYOUTS[layout]
    names = (f"run.name={layout.replace(' ', '_')}", f"parallel.world_size={size}")
    return run_config(folder, folder / "data", *_OVERRIDES, *more, *names, *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rng")
    synthetic_folder(root / "data")
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_moves_no_generator(world: World, folder: Path, layout: str) -> None:
    config = _config(folder, layout)
    assert world.run(_moved, config.parallel.world_size, config, "") == (
        [[]] * config.parallel.world_size
    )


@pytest.mark.parametrize("name", ["torch", "numpy", "python"])
def test_one_that_moves_is_found(world: World, folder: Path, name: str) -> None:
    """The negative controls."""
    assert world.run(_moved, 1, _config(folder, "one rank"), name) == [[name]]


def _initial(rank: int, config: RunConfig, seed_before: int) -> list[Owned]:
    """The model as it begins, whatever the generators of the process hold."""
    torch.manual_seed(seed_before + rank)
    run = open_run(rank, config)
    state = owned(run)
    close_run(run)
    return state


def test_initial_weights_are_drawn_by_tensor_and_not_by_rank(world: World, folder: Path) -> None:
    def begun(layout: str, seed_before: int, *overrides: str) -> dict[str, int]:
        config = _config(folder, layout, *overrides)
        return add_up(world.run(_initial, config.parallel.world_size, config, seed_before))

    expected = begun("one rank", 0)
    assert all(begun(layout, 5) == expected for layout in LAYOUTS)
    assert begun("one rank", 0, "run.seed=5") != expected


def test_exempt_samples_are_chosen_by_sample_and_seed() -> None:
    chosen = [is_exempt(sample, 1, 0.1) for sample in range(20_000)]
    assert chosen == [is_exempt(sample, 1, 0.1) for sample in range(20_000)]
    assert 0.09 < sum(chosen) / len(chosen) < 0.11
    assert chosen != [is_exempt(sample, 2, 0.1) for sample in range(20_000)]
