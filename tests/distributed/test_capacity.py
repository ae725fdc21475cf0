"""One budget for a group of ranks, whoever holds which sequence; exempt ones lose nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.moe.capacity import DeviceCapacity
from dsv2_train.monitor.rows import read_rows
from dsv2_train.recipe.exemption import is_exempt
from dsv2_train.train import loop
from tests.helpers.corpus import synthetic_folder
from tests.helpers.model import build_on_cpu, roughen
from tests.helpers.moe_layer import layer_config, statistics_of
from tests.helpers.run import close_run, open_run, run_config
from tests.helpers.world import World

NUM_SEQUENCES, LENGTH, NUM_EXPERTS, NUM_GROUPS, TOP_K = 4, 40, 16, 8, 3
EXEMPT = torch.tensor([True, False, True, False])


def _affinities() -> torch.Tensor:
    """[S, B, E] that prefer some experts, with many ties."""
    generator = torch.Generator().manual_seed(7)
    shape = (LENGTH, NUM_SEQUENCES, NUM_EXPERTS)
    steps = torch.randint(0, 4, shape, generator=generator) + torch.arange(NUM_EXPERTS) // 6
    return (steps * 0.5).softmax(-1)


def _decide(rank: int, scope: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, K] experts of this rank's sequences and which are kept, by sequence."""
    size = dist.get_world_size()
    per_rank = NUM_SEQUENCES // size
    ours = slice(rank * per_rank, (rank + 1) * per_rank)
    affinities = _affinities()[:, ours]
    experts = affinities.flatten(0, 1).topk(TOP_K).indices
    group = dist.group.WORLD if scope == "ep_group" else None
    capacity = DeviceCapacity(1.0, NUM_GROUPS, group)
    kept = capacity.decide(affinities, experts, EXEMPT[ours])
    by_sequence = (LENGTH, per_rank, TOP_K)
    return experts.view(by_sequence).transpose(0, 1), kept.view(by_sequence).transpose(0, 1)


def _everyone(world: World, size: int, scope: str) -> tuple[torch.Tensor, torch.Tensor]:
    results: list[Any] = world.run(_decide, size, scope)
    experts, kept = (torch.cat(parts) for parts in zip(*results, strict=True))
    return experts, kept


def test_the_decision_does_not_depend_on_the_split_over_ranks(world: World) -> None:
    experts, alone = _everyone(world, 1, "ep_group")
    assert 0 < (~alone).sum() < alone.numel()
    for size in (2, 4):
        split_experts, split = _everyone(world, size, "ep_group")
        assert torch.equal(split_experts, experts)
        assert torch.equal(split, alone)


def test_a_budget_of_its_own_for_each_rank_is_another_decision(world: World) -> None:
    _, together = _everyone(world, 4, "ep_group")
    _, apart = _everyone(world, 4, "rank")
    assert not torch.equal(together, apart)


def test_no_group_exceeds_its_budget_but_by_exempt_assignments(world: World) -> None:
    experts, kept = _everyone(world, 4, "ep_group")
    budget = NUM_SEQUENCES * LENGTH * TOP_K // NUM_GROUPS
    groups = experts // (NUM_EXPERTS // NUM_GROUPS)
    over_budget = False
    for group in range(NUM_GROUPS):
        routed = groups == group
        over_budget |= bool(routed[EXEMPT].sum() > budget)
        allowed = max(budget, int(routed[EXEMPT].sum()))
        assert (routed & kept).sum() == min(allowed, int(routed.sum()))
    assert kept[EXEMPT].all()
    assert over_budget, "the case is meant to have a group that exempt assignments alone fill"


def _outputs(rank: int, capacity: str, *overrides: str) -> dict[str, torch.Tensor]:
    """Of one layer, by sequence: in training, in evaluation, and how many were dropped."""
    config = layer_config(2, "fp64", f"recipe.capacity_factor={capacity}", *overrides)
    model, _ = build_on_cpu(config)
    roughen(model)
    layer = model.decoder.layers[1].mlp
    hidden = torch.randn(
        8, 2, 16, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
    )
    layer.exempt = torch.tensor([False, True])
    training = layer(hidden)[0].detach()
    dropped = statistics_of(layer).num_dropped_assignments
    layer.eval()
    evaluation = layer(hidden)[0].detach()
    process_groups.destroy()
    return {"training": training, "evaluation": evaluation, "dropped": dropped}


@pytest.mark.parametrize("capacity", ["0.5", "1.0"])
def test_exempt_sequences_and_evaluation_are_as_without_a_capacity(
    world: World, capacity: str
) -> None:
    limited, free = (world.run(_outputs, 2, value) for value in (capacity, "null"))
    for ours, theirs in zip(limited, free, strict=True):
        assert ours["dropped"] > 0 and theirs["dropped"] == 0
        # fp64 sums in another order.
        torch.testing.assert_close(
            ours["training"][:, 1], theirs["training"][:, 1], rtol=1e-12, atol=1e-12
        )
        assert not torch.allclose(ours["training"][:, 0], theirs["training"][:, 0])
        assert torch.equal(ours["evaluation"], theirs["evaluation"])


def test_the_scope_of_a_budget_is_the_group_or_the_rank(world: World) -> None:
    together = world.run(_outputs, 2, "1.0", "recipe.capacity_scope=ep_group")
    apart = world.run(_outputs, 2, "1.0", "recipe.capacity_scope=rank")
    default = world.run(_outputs, 2, "1.0")
    for one, other, usual in zip(together, apart, default, strict=True):
        assert not torch.allclose(one["training"], other["training"])
        assert torch.equal(one["training"], usual["training"])


def _rows(rank: int, config: RunConfig) -> list[dict[str, float]]:
    run = open_run(rank, config)
    loop.train(run)
    close_run(run)
    return read_rows(config.run.folder / "metrics.jsonl")


def test_a_run_exempts_samples_by_their_id_and_counts_steps_apart(
    world: World, tmp_path: Path
) -> None:
    config = run_config(
        tmp_path,
        synthetic_folder(tmp_path / "data"),
        "parallel.world_size=2",
        "parallel.ep=2",
        "recipe.micro_batch_size=2",
        "recipe.capacity_factor=1.0",
        "recipe.exempt_share=0.4",
        "recipe.eval_every_steps=2",
    )
    shares = []
    for row in world.run(_rows, 2, config)[0]:
        step = int(row["step"])
        samples = range(8 * step - 8, 8 * step)
        exempt = [is_exempt(sample, config.run.seed, 0.4) for sample in samples]
        assert row["moe/exempt_share"] == sum(exempt) / 8
        assert 0 < row["moe/dropped_share"] < 0.5
        assert 1 <= row["moe/devices_per_token"] <= config.model.num_limited_devices
        shares.append(row["moe/exempt_share"])
    assert len(set(shares)) > 1


@pytest.mark.parametrize(("capacity", "is_over"), [("1.0", True), ("100", False)])
def test_alerts_hold_device_loads_against_the_budget_of_the_run(
    world: World, tmp_path: Path, capacity: str, is_over: bool
) -> None:
    config = run_config(
        tmp_path,
        synthetic_folder(tmp_path / "data"),
        "parallel.world_size=1",
        f"recipe.capacity_factor={capacity}",
        "monitor.alerts={max_device_load:1.0,min_load_evenness:0.0,patience_rows:1}",
    )
    first = world.run(_rows, 1, config)[0][0]
    assert 1.0 < first["moe/device_load_max_over_mean"] < 100
    has_dead = first["moe/dead_experts"] > 0
    assert first.get("moe/num_alerts", 0) == has_dead + is_over
