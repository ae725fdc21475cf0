"""Device capacity against lists sorted by hand, whoever holds which tokens."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.model.moe.capacity import DeviceCapacity, device_budget, sort_keys, surviving
from tests.helpers.host_reads import host_reads

# Few distinct values, so that ties are many; 0 and 1 are the ends of what a softmax gives.
AFFINITIES = [0.0, 1e-30, 0.1, 0.25, 0.2500001, 0.5, 1.0]


def by_hand(
    affinities: list[float], groups: list[int], exempt: list[bool], num_groups: int, budget: int
) -> list[bool]:
    kept = [False] * len(affinities)
    for group in range(num_groups):
        members = [i for i in range(len(groups)) if groups[i] == group]
        members.sort(key=lambda i: (not exempt[i], -affinities[i], i))
        for place, i in enumerate(members):
            kept[i] = place < budget or exempt[i]
    return kept


@given(
    st.integers(1, 8).flatmap(
        lambda d: st.tuples(
            st.just(d),
            st.lists(
                st.tuples(st.sampled_from(AFFINITIES), st.integers(0, d - 1), st.booleans()),
                min_size=1,
                max_size=60,
            ),
        )
    ),
    st.integers(0, 12),
)
@settings(max_examples=200)
def test_the_lowest_affinities_of_a_group_go_first(
    drawn: tuple[int, list[tuple[float, int, bool]]], budget: int
) -> None:
    num_groups, assignments = drawn
    affinities, groups, exempt = map(list, zip(*assignments, strict=True))
    keys = sort_keys(torch.tensor(affinities), torch.tensor(groups), torch.tensor(exempt))
    kept = surviving(keys, num_groups, budget).tolist()
    # fp32 is what decides.
    rounded = torch.tensor(affinities, dtype=torch.float32).tolist()
    assert kept == by_hand(rounded, groups, exempt, num_groups, budget)


@pytest.mark.parametrize(
    ("factor", "assignments", "groups", "budget"),
    [(1.0, 48, 8, 6), (1.0, 49, 8, 7), (1.1, 80, 8, 11), (0.5, 10, 8, 1), (1.25, 32, 4, 10)],
)
def test_budget_is_the_mean_load_times_the_factor_rounded_up(
    factor: float, assignments: int, groups: int, budget: int
) -> None:
    assert device_budget(factor, assignments, groups) == budget


def test_a_factor_is_taken_as_it_is_written() -> None:
    # 1.1 in binary is a little more than eleven tenths.
    assert math.ceil(1.1 * 800 / 8) == 111
    assert device_budget(1.1, 800, 8) == 110


def micro_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Affinities [S, B, E] and experts [S * B, K] with ties, and exempt sequences [B]."""
    generator = torch.Generator().manual_seed(seed)
    affinities = torch.randint(1, 5, (6, 4, 8), generator=generator).float().softmax(-1)
    experts = affinities.flatten(0, 1).topk(3).indices
    return affinities, experts, torch.tensor([False, True, False, False])


def test_sequences_of_the_own_rank_alone() -> None:
    affinities, experts, exempt = micro_batch(0)
    kept = DeviceCapacity(0.75, 4, None).decide(affinities, experts, exempt)
    flat = affinities.flatten(0, 1).gather(1, experts)
    order = [(t, k) for b in range(4) for t in range(b, 24, 4) for k in range(3)]
    expected = by_hand(
        [flat[t, k].item() for t, k in order],
        [int(experts[t, k]) // 2 for t, k in order],
        [bool(exempt[t % 4]) for t, _ in order],
        4,
        math.ceil(Fraction(3, 4) * 72 / 4),
    )
    assert [bool(kept[t, k]) for t, k in order] == expected
    assert kept[1::4].all() and not kept.all()


def test_the_decision_needs_no_look_at_the_values() -> None:
    """Tensors without data cannot be read: what waits for a GPU fails."""
    affinities, experts, exempt = (tensor.to("meta") for tensor in micro_batch(1))
    kept = DeviceCapacity(1.0, 4, None).decide(affinities, experts, exempt)
    assert kept.is_meta and kept.shape == experts.shape
    with host_reads() as reads:
        DeviceCapacity(1.0, 4, None).decide(*micro_batch(1))
    assert reads == []
    with pytest.raises(NotImplementedError):
        kept.nonzero()


def test_the_decision_takes_no_gradient() -> None:
    affinities, experts, exempt = micro_batch(1)
    kept = DeviceCapacity(1.0, 4, None).decide(affinities.requires_grad_(), experts, exempt)
    assert not kept.requires_grad
