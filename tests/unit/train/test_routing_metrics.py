"""The `moe/` metrics against numpy, and counts summed over ranks and stages."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.config.sections.model import ModelConfig
from dsv2_train.model.moe.statistics import LayerStatistics, num_statistics
from dsv2_train.monitor.metrics import check_row
from dsv2_train.train.telemetry.routing_metrics import (
    RoutedStep,
    expert_map,
    gather_step,
    routing_row,
)
from tests.helpers.tiny import tiny_config
from tests.helpers.world import World


def model_of(
    num_experts: int, num_device_groups: int, top_k: int = 2, limit: int = 2
) -> ModelConfig:
    return tiny_config(
        f"model.num_routed_experts={num_experts}",
        f"model.num_device_groups={num_device_groups}",
        f"model.num_experts_per_tok={top_k}",
        f"model.num_limited_devices={min(limit, num_device_groups)}",
    ).model


def step_of(counts: list[list[int]], sent: list[list[int]], **scalars: list[float]) -> RoutedStep:
    table = torch.tensor(counts, dtype=torch.float64)
    ones = torch.ones(len(counts), dtype=torch.float64)
    named = {name: torch.tensor(values, dtype=torch.float64) for name, values in scalars.items()}
    tokens = table.sum(dim=1) / 2
    statistics = LayerStatistics(
        expert_counts=table,
        group_visits=torch.tensor(sent, dtype=torch.float64),
        balance_losses=named.pop("balance_losses", torch.ones(len(counts), 3)).double(),
        gate_entropy=named.pop("gate_entropy", ones),
        num_dropped_assignments=named.pop("num_dropped", ones * 0),
        num_exempt_tokens=named.pop("num_exempt", ones * 0),
        num_tokens=tokens,
        num_microbatches=named.pop("num_microbatches", ones),
        num_bad_tokens=ones * 0,
    )
    assert not named
    return RoutedStep(list(range(1, len(counts) + 1)), statistics)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_loads_equal_numpy(layers: int, groups: int, experts_a_group: int, seed: int) -> None:
    experts = groups * experts_a_group
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, (layers, experts))
    counts[:, 0] += 2
    sent = rng.integers(0, 5, (layers, groups))
    step = step_of(counts.tolist(), sent.tolist())
    model = model_of(experts, groups, top_k=min(2, experts), limit=min(2, groups))
    row = routing_row(step, model)
    check_row(row)
    of_groups = np.stack([part.sum(axis=1) for part in np.split(counts, groups, axis=1)], axis=1)
    tokens = counts.sum(axis=1) / 2
    share = counts / counts.sum(axis=1, keepdims=True)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=1) / np.log(
        max(experts, 2)
    )
    limit = model.num_limited_devices
    expected = {
        "moe/dead_experts": np.count_nonzero(counts == 0),
        "moe/expert_load_max_over_mean": (counts.max(axis=1) / counts.mean(axis=1)).max(),
        "moe/device_load_max_over_mean": (of_groups.max(axis=1) / of_groups.mean(axis=1)).max(),
        "moe/expert_load_evenness": entropy.min(),
        "moe/devices_per_token": (sent.sum(axis=1) / tokens).mean(),
        "moe/sent_load_max": (sent * groups / (limit * tokens[:, None])).max(),
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-12, abs=1e-12), key


def test_even_load_is_one() -> None:
    row = routing_row(step_of([[7] * 6, [3] * 6], [[14] * 3, [6] * 3]), model_of(6, 3))
    assert row["moe/expert_load_max_over_mean"] == 1.0
    assert row["moe/device_load_max_over_mean"] == 1.0
    assert row["moe/expert_load_evenness"] == pytest.approx(1.0)
    assert row["moe/sent_load_max"] == 1.0
    assert row["moe/dead_experts"] == 0


def test_collapse_shows_in_the_layer_that_collapsed() -> None:
    step = step_of([[2] * 6, [6, 6, 0, 0, 0, 0]], [[4] * 3, [6, 0, 0]])
    row = routing_row(step, model_of(6, 3))
    assert row["moe/expert_load_max_over_mean/layer_01"] == 1.0
    assert row["moe/expert_load_max_over_mean/layer_02"] == 3.0
    assert row["moe/expert_load_max_over_mean"] == 3.0
    assert row["moe/device_load_max_over_mean"] == 3.0
    assert row["moe/expert_load_evenness"] == pytest.approx(np.log(2) / np.log(6))
    assert row["moe/devices_per_token/layer_02"] == 1.0
    assert row["moe/dead_experts"] == row["moe/dead_experts/layer_02"] == 4


def test_shares_and_losses_are_means() -> None:
    step = step_of(
        [[2] * 6, [4] * 6],  # 6 and 12 tokens, 12 and 24 assignments
        [[4] * 3, [8] * 3],
        num_dropped=[3, 0],
        num_exempt=[3, 6],
        gate_entropy=[6.0, 24.0],
        balance_losses=[[2.0, 4.0, 6.0], [1.0, 1.0, 1.0]],
        num_microbatches=[2, 1],
    )
    row = routing_row(step, model_of(6, 3))
    assert row["moe/dropped_share/layer_01"] == 0.25
    assert row["moe/dropped_share"] == 0.125
    assert row["moe/exempt_share"] == 0.5
    assert row["moe/gate_entropy"] == 1.5
    assert row["moe/expert_balance_loss"] == 1.0
    assert row["moe/device_balance_loss/layer_01"] == 2.0
    assert row["moe/communication_balance_loss"] == 2.0


def test_the_dropped_share_is_of_all_assignments() -> None:
    """Nine tokens of three experts each, in at most two device groups: M is not K."""
    step = step_of([[3] * 6], [[6] * 3], num_dropped=[9])
    assert routing_row(step, model_of(6, 3, top_k=3))["moe/dropped_share"] == 9 / 27


def test_nothing_routed_is_an_empty_row() -> None:
    nothing = LayerStatistics.unflatten(torch.zeros(0, num_statistics(6, 3)), 6, 3)
    assert routing_row(RoutedStep([], nothing), model_of(6, 3)) == {}


def test_the_map_is_load_over_the_mean_and_what_groups_are_sent() -> None:
    one = expert_map(step_of([[6, 2, 2, 2, 0, 0]], [[6, 4, 0]]), model_of(6, 3))
    assert one.layers == [1]
    assert one.load == [[3.0, 1.0, 1.0, 1.0, 0.0, 0.0]]
    # Six tokens, M = 2 of D = 3 groups: an even load sends four to each.
    assert one.sent == [[1.5, 1.0, 0.0]]


NUM_EXPERTS, NUM_DEVICE_GROUPS = 8, 4


def _counted(rank: int, layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * rank + layer)
    width = num_statistics(NUM_EXPERTS, NUM_DEVICE_GROUPS)
    return torch.randint(1, 50, (width,), generator=generator).double()


def _gather(rank: int) -> tuple[list[int], torch.Tensor]:
    """Two stages of two ranks; stage 0 holds the dense layer 0 and layer 1, stage 1 the rest."""
    mine = (1,) if rank < 2 else (2, 3)
    mixtures: Any = {layer: SimpleNamespace(statistics=_counted(rank, layer)) for layer in mine}
    model = model_of(NUM_EXPERTS, NUM_DEVICE_GROUPS)
    assert dist.group.WORLD is not None
    step = gather_step(mixtures, model, dist.group.WORLD)
    return step.layers, step.statistics.flatten()


def test_every_rank_and_stage_is_counted_once(world: World) -> None:
    for layers, statistics in world.run(_gather, 4):
        assert layers == [1, 2, 3]
        for place, layer in enumerate(layers):
            ranks = (0, 1) if layer == 1 else (2, 3)
            assert torch.equal(statistics[place], sum(_counted(rank, layer) for rank in ranks))
