"""Expert load: numbers against numpy, counts summed over ranks and stages."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.monitor.metrics import check_row
from dsv2_train.monitor.moe_load import (
    ExpertLoad,
    LoadWindow,
    device_counts,
    load_row,
    max_over_mean,
)
from tests.helpers.world import World

NUM_LAYERS, NUM_EXPERTS, NUM_DEVICE_GROUPS = 5, 6, 3


def window_of(counts: list[list[int]]) -> LoadWindow:
    table = torch.tensor(counts, dtype=torch.float64)
    layers = torch.arange(1, len(counts) + 1)
    return LoadWindow(layers, table, torch.ones(len(counts), 3, dtype=torch.float64))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_load_equals_numpy(layers: int, groups: int, experts_a_group: int, seed: int) -> None:
    counts = np.random.default_rng(seed).integers(0, 5, (layers, groups * experts_a_group))
    counts[:, 0] += 1
    table = torch.tensor(counts, dtype=torch.float64)
    of_groups = np.stack([part.sum(axis=1) for part in np.split(counts, groups, axis=1)], axis=1)
    np.testing.assert_array_equal(device_counts(table, groups).numpy(), of_groups)
    # Equal up to the rounding of one division.
    expected = counts.max(axis=1) / counts.mean(axis=1)
    np.testing.assert_allclose(max_over_mean(table).numpy(), expected, rtol=1e-15)
    row = load_row(window_of(counts.tolist()), groups)
    assert row["moe/dead_experts"] == np.count_nonzero(counts == 0)
    assert row["moe/expert_load_max_over_mean"] == pytest.approx(expected.max(), rel=1e-15)


def test_even_load_is_one() -> None:
    row = load_row(window_of([[7] * 6, [3] * 6]), 3)
    assert row["moe/expert_load_max_over_mean"] == 1.0
    assert row["moe/device_load_max_over_mean"] == 1.0
    assert row["moe/dead_experts"] == 0


def test_collapse_shows_in_the_layer_that_collapsed() -> None:
    row = load_row(window_of([[2] * 6, [12, 0, 0, 0, 0, 0]]), 3)
    check_row(row)
    assert row["moe/expert_load_max_over_mean/layer_01"] == 1.0
    assert row["moe/expert_load_max_over_mean/layer_02"] == 6.0
    assert row["moe/expert_load_max_over_mean"] == 6.0
    assert row["moe/device_load_max_over_mean"] == 3.0
    assert row["moe/dead_experts"] == 5


def test_nothing_routed_is_an_empty_row() -> None:
    nothing = LoadWindow(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 6), torch.zeros(0, 3))
    assert load_row(nothing, 3) == {}


def local_counts(rank: int, layer: int, window: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * window + 10 * rank + layer)
    return torch.randint(0, 50, (NUM_EXPERTS,), generator=generator)


def two_windows(rank: int) -> list[tuple[list[int], list[list[float]], list[list[float]]]]:
    """Two stages of two ranks; stage 0 holds the dense layer 0 and the MoE layers 1 and 2."""
    load = ExpertLoad(NUM_LAYERS, NUM_EXPERTS, torch.device("cpu"))
    mine = (1, 2) if rank < 2 else (3, 4)
    seen = []
    for window in range(2):
        for layer in mine:
            counts = local_counts(rank, layer, window)
            losses = torch.tensor([1.0, 2.0, 3.0]) * layer + rank
            half = counts // 2
            load.add(layer, half, losses, torch.tensor(1))
            load.add(layer, counts - half, losses, torch.tensor(1))
        reduced = load.reduce(dist.distributed_c10d._get_default_group())
        losses_of = reduced.balance_losses.tolist()
        seen.append((reduced.layers.tolist(), reduced.expert_counts.tolist(), losses_of))
    return seen


def test_reduce_counts_every_rank_and_stage_once_and_starts_anew(world: World) -> None:
    answers = world.run(two_windows, 4)
    assert all(answer == answers[0] for answer in answers)
    for window, (layers, counts, losses) in enumerate(answers[0]):
        assert layers == [1, 2, 3, 4]
        for row, layer in enumerate(layers):
            ranks = (0, 1) if layer < 3 else (2, 3)
            by_rank = [local_counts(rank, layer, window).numpy() for rank in ranks]
            assert counts[row] == np.sum(by_rank, axis=0).tolist()
            mean_rank = sum(ranks) / 2
            assert losses[row] == [layer + mean_rank, 2 * layer + mean_rank, 3 * layer + mean_rank]


def test_counts_stay_exact_where_float32_is_not() -> None:
    load = ExpertLoad(1, 2, torch.device("cpu"))
    for _ in range(3):
        load.add(0, torch.tensor([2**24, 1]), torch.zeros(3), torch.tensor(1))
        load.add(0, torch.tensor([1, 0]), torch.zeros(3), torch.tensor(1))
    counts, _, _ = torch.split(load._sums[0], load._parts)
    assert counts.tolist() == [3 * 2**24 + 3, 3]
