"""The same seed gives the same model, and the same first steps, at any layout."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dsv2_train.config.run import RunConfig
from dsv2_train.monitor.expert_map import decode_map
from dsv2_train.monitor.rows import read_rows
from dsv2_train.train import loop
from dsv2_train.train.run import Run
from tests.helpers.corpus import synthetic_folder
from tests.helpers.gradients import Gradients, owned_gradients, whole_gradients
from tests.helpers.run import (
    Owned,
    add_up,
    close_run,
    open_run,
    owned,
    run_config,
    train_step,
)
from tests.helpers.world import World

NUM_STEPS = 5

# A hundred times the paper's: a loss that is scaled wrongly moves every gradient.
ALPHAS = (
    "recipe.expert_balance_alpha=0.3",
    "recipe.device_balance_alpha=5.0",
    "recipe.communication_balance_alpha=2.0",
)

LAYOUTS = {
    "PP1 EP1": (1, ()),
    "PP1 EP1, 4 microbatches": (1, ("recipe.micro_batch_size=2",)),
    "PP1 EP1, 2 microbatches": (1, ("recipe.micro_batch_size=4",)),
    "PP1 EP1, 1 microbatch": (1, ("recipe.micro_batch_size=8",)),
    "PP1 EP1, recompute": (1, ("parallel.recompute=[moe,mla_up_projection]",)),
    "PP1 EP2, 2 microbatches, recompute": (
        2,
        ("parallel.ep=2", "recipe.micro_batch_size=2", "parallel.recompute=[moe]"),
    ),
    "PP1 EP4": (4, ("parallel.ep=4",)),
    "PP1 EP1 DP4": (4, ()),
    "PP2 EP2, no overlap, recompute": (
        4,
        (
            "parallel.pp=2",
            "parallel.ep=2",
            "parallel.overlap_shared_experts=false",
            "parallel.recompute=[moe,mla_up_projection]",
        ),
    ),
    "PP1 EP2, megatron-core's all-to-all": (
        2,
        (
            "parallel.ep=2",
            "parallel.dispatcher=megatron_alltoall",
            "parallel.overlap_shared_experts=false",
        ),
    ),
    "PP2 EP1": (2, ("parallel.pp=2",)),
    "PP1 EP2": (2, ("parallel.ep=2",)),
    "PP2 EP2": (4, ("parallel.pp=2", "parallel.ep=2")),
    "PP4 EP1": (4, ("parallel.pp=4",)),
    "PP1 EP2 DP2": (4, ("parallel.ep=2",)),
    "PP2 EP2, zb_h1": (4, ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=zb_h1")),
    "PP2 DP2, zb_v": (
        4,
        ("parallel.pp=2", "parallel.schedule=zb_v", "parallel.chunks=2"),
    ),
    "PP2 DP2, zb_h1, nothing overlaps": (
        4,
        (
            "parallel.pp=2",
            "parallel.schedule=zb_h1",
            "parallel.overlap_grad_reduce=false",
            "parallel.overlap_param_gather=false",
        ),
    ),
    "PP2 EP2, interleaved": (
        4,
        ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=interleaved", "parallel.chunks=2"),
    ),
    "PP2 EP1, interleaved_zb": (
        2,
        ("parallel.pp=2", "parallel.schedule=interleaved_zb", "parallel.chunks=2"),
    ),
    "PP2 EP1, search": (2, ("parallel.pp=2", "parallel.schedule=search", "parallel.chunks=2")),
    "PP2 EP1 uneven": (2, ("parallel.pp=2", "parallel.layers_per_chunk=[1,3]")),
}


@dataclass(frozen=True)
class Trace:
    """What a rank saw."""

    initial: list[Owned]
    gradients: dict[tuple[str, int], torch.Tensor]
    losses: list[float]
    norms: list[float]


def _first_steps(rank: int, config: RunConfig) -> Trace:
    run = open_run(rank, config)
    initial = owned(run)
    losses, norms = [], []
    gradients: dict[tuple[str, int], torch.Tensor] = {}
    for step in range(NUM_STEPS):
        point = run.schedule.at(run.clock)
        result = train_step(run, point)
        if step == 0:
            gradients = _gradient_shards(run, result.grad_norm)
        run.clock = run.clock.advance(point)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    close_run(run)
    return Trace(initial, gradients, losses, norms)


def _gradient_shards(run: Run, norm: float) -> Gradients:
    """Reduced gradients of the owned ranges, clipping undone, by tensor and offset."""
    clip = min(1.0, run.config.optim.clip_grad_norm / (norm + 1e-6))
    return {place: gradient / clip for place, gradient in owned_gradients(run.chunks).items()}


def _whole(traces: list[Trace]) -> dict[str, torch.Tensor]:
    return whole_gradients(trace.gradients for trace in traces)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(world: World, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    return _traces(world, data, tmp_path_factory.mktemp("reference"), "PP1 EP1")


def _traces(world: World, data: Path, folder: Path, layout: str, *more: str) -> list[Trace]:
    size, overrides = LAYOUTS[layout]
    world_size = f"parallel.world_size={size}"
    config = run_config(folder, data, world_size, *ALPHAS, *overrides, *more)
    return world.run(_first_steps, size, config)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "PP1 EP1"])
def test_model_and_first_steps_do_not_depend_on_the_layout(
    world: World, data: Path, reference: list[Trace], tmp_path: Path, layout: str
) -> None:
    traces = _traces(world, data, tmp_path, layout)
    assert add_up([trace.initial for trace in traces]) == add_up([reference[0].initial])

    # fp32 sums of a different order: 1e-5 of the largest element holds with a margin of ten.
    expected = _whole(reference)
    gradients = _whole(traces)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= 1e-5 * scale, name

    for trace in traces:
        numbers = torch.tensor([trace.losses, trace.norms])
        known = torch.tensor([reference[0].losses, reference[0].norms])
        torch.testing.assert_close(numbers, known, rtol=1e-5, atol=0)


def _rows(rank: int, config: RunConfig) -> tuple[list[dict[str, float]], float]:
    """A whole run: its rows, and on one rank its validation loss worked out sample by sample."""
    run = open_run(rank, config)
    loop.train(run)
    by_hand = 0.0
    if config.parallel.world_size == 1:
        windows = run.validation_split.windows[: config.recipe.eval_num_samples]
        samples = torch.from_numpy(windows.astype("int64"))
        run.chunks[0].eval()
        with torch.no_grad():
            inputs = {"position_ids": None, "attention_mask": None}
            losses = [
                run.chunks[0](one[:, :-1], labels=one[:, 1:], **inputs) for one in samples.split(1)
            ]
        by_hand = torch.cat(losses).double().mean().item()
    close_run(run)
    return read_rows(config.run.folder / "metrics.jsonl"), by_hand


@pytest.mark.parametrize("layout", ["PP2 EP2", "PP1 EP1 DP4", "PP4 EP1", "PP2 DP2, zb_v"])
def test_a_run_tells_the_same_at_any_layout(
    world: World, data: Path, tmp_path: Path, layout: str
) -> None:
    def run(name: str) -> tuple[list[dict[str, float]], float, list[str]]:
        size, overrides = LAYOUTS[name]
        folder = tmp_path / name.replace(" ", "").replace(",", "_")
        maps = "monitor.expert_map_every_steps=2"
        config = run_config(folder, data, f"parallel.world_size={size}", maps, *overrides)
        rows: list[tuple[list[dict[str, float]], float]] = world.run(_rows, size, config)
        lines = (config.run.folder / "expert_map.jsonl").read_text().splitlines()
        return *rows[0], lines

    expected, by_hand, _ = run("PP1 EP1")
    # fp32 means over the samples of a microbatch.
    assert expected[-1]["eval/loss"] == pytest.approx(by_hand, rel=1e-6)
    rows, _, lines = run(layout)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert [row["step"] for row in rows if "eval/loss" in row] == [3, 6]
    for row, other in zip(rows, expected, strict=True):
        told = {key for key in other if not key.startswith(("perf/", "mem/"))}
        assert told == {key for key in row if not key.startswith(("perf/", "mem/"))}
        assert {"train/loss", "train/grad_norm", "moe/devices_per_token"} < told
        for key in told:
            # After six steps of fp32 sums in other orders.
            assert row[key] == pytest.approx(other[key], rel=1e-4), key
    maps = [decode_map(line) for line in lines]
    assert [(step, one.layers) for step, one in maps] == [(step, [1, 2, 3]) for step in (2, 4, 6)]


def test_a_balance_loss_of_half_the_weight_is_another_gradient(
    world: World, data: Path, reference: list[Trace], tmp_path: Path
) -> None:
    """The negative control: what a schedule does that sets the losses' scale wrongly."""
    parts = (line.split("=") for line in ALPHAS)
    halves = [f"{name}={float(value) / 2}" for name, value in parts]
    traces = _traces(world, data, tmp_path, "PP1 EP1", *halves)
    expected, gradients = (
        _whole(reference),
        _whole(traces),
    )
    for name, gradient in gradients.items():
        if "router" in name:
            assert (gradient - expected[name]).abs().max() > 0.1 * expected[name].abs().max(), name


def test_another_seed_is_another_model(
    world: World, data: Path, reference: list[Trace], tmp_path: Path
) -> None:
    traces = _traces(world, data, tmp_path, "PP1 EP1", "run.seed=1235")
    ours, other = add_up([reference[0].initial]), add_up([traces[0].initial])
    matrices = [key for key in ours if key.startswith("weight/") and "norm" not in key]
    assert all(ours[key] != other[key] for key in matrices)
