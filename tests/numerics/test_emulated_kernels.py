"""A training step through all our kernels, run by the host, against the same step through torch."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dsv2_kernels.native import library
from dsv2_kernels.native.build import SOURCES, build_emulated
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.parallel import KERNEL_SETTINGS
from tests.helpers.gradients import whole_gradients
from tests.helpers.pipeline import Stepped, pipeline_config, run_steps
from tests.helpers.world import World

LAYOUTS = {
    "as it comes": (),
    "weight gradients later": ("parallel.schedule=zb_h1",),
    "recomputed": ("parallel.recompute=[moe,mla_up_projection]",),
    "two expert ranks": ("parallel.ep=2",),
}
# Sums of at most some hundred products of fp32 (6e-8 each), in another order, through two layers
# and back, over the largest gradient of a tensor.
TOLERANCE = 1e-5
MICROBATCHES = 2

Step = Callable[..., list[Stepped]]  # by rank


def config_of(layout: str, *fields: str) -> RunConfig:
    """Two layers, with the given ops through kernels."""
    return pipeline_config(
        2 if layout == "two expert ranks" else 1,
        "model.num_layers=2",
        "recipe.sequence_length=16",
        *LAYOUTS[layout],
        *(f"parallel.{field}=kernel" for field in fields),
    )


def step_of(rank: int, config: RunConfig, kernels: Path | None) -> Stepped:
    with library.emulated(kernels) if kernels else nullcontext():
        return run_steps(rank, config, (MICROBATCHES,))[0]


def refusal_of(rank: int, config: RunConfig, kernels: Path) -> str:
    """What a library says that lacks what a step asks for."""
    try:
        step_of(rank, config, kernels)
    except AttributeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def step(world: World) -> Step:
    """A step under a layout, through a library or through torch, of the given ops."""

    def run(layout: str, kernels: Path | None, *fields: str) -> list[Stepped]:
        config = config_of(layout, *fields)
        return world.run(step_of, config.parallel.world_size, config, kernels)

    return run


def deviation(found: list[Stepped], expected: list[Stepped]) -> float:
    """Largest of a loss, over the loss, or of a tensor's gradient, over its largest."""
    ours, theirs = (whole_gradients(rank.gradients for rank in run) for run in (found, expected))
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name], theirs[name]) for name in theirs]
    losses = [torch.tensor([rank.losses for rank in run]) for run in (found, expected)]
    pairs.append((losses[0], losses[1]))
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_that_of_torch(step: Step, emulated_library: Path, layout: str) -> None:
    found = step(layout, emulated_library, *KERNEL_SETTINGS)
    expected = step(layout, None)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.num_deferred == theirs.num_deferred
        assert bool(ours.num_deferred) == (layout == "weight gradients later")
        assert all(bool(each.any()) for each in theirs.gradients.values())
    assert deviation(found, expected) < TOLERANCE


@pytest.mark.parametrize("field", KERNEL_SETTINGS)
def test_what_is_asked_for_is_launched(world: World, tmp_path: Path, field: str) -> None:
    shutil.copytree(SOURCES, tmp_path / "csrc")
    for kernel in (tmp_path / "csrc").glob("*.cu"):
        kernel.unlink()
    build_emulated(tmp_path / "none.so", sources=tmp_path / "csrc")
    config = config_of("as it comes", field)
    (said,) = world.run(refusal_of, 1, config, tmp_path / "none.so")
    assert "undefined symbol" in said


@pytest.fixture(scope="module")
def wrong_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels with a mistake in each of two."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(SOURCES, folder / "csrc")
    for name, before, after in (
        ("swiglu_gate.cu", "grad_gate += grad.values[j] * ungated", "grad_gate += ungated"),
        ("grouped_linear.cu", "sum.values[j] += added", "sum.values[j] = added"),
    ):
        file = folder / "csrc" / name
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after))
    build_emulated(folder / "kernels.so", sources=folder / "csrc")
    return folder / "kernels.so"


@pytest.mark.parametrize("field", ["activation", "experts"])
def test_a_mistake_in_a_kernel_is_seen(step: Step, wrong_library: Path, field: str) -> None:
    found, expected = step("as it comes", wrong_library, field), step("as it comes", None)
    assert deviation(found, expected) > 100 * TOLERANCE
