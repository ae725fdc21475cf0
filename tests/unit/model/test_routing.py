"""Routing against a reference in plain Python, written from the paper's words."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.model.moe.routing import gate_values, routing_map, select_experts


def reference(row: list[float], groups: int, limit: int, top_k: int) -> list[int]:
    """The M device groups holding the highest affinities, then the K best experts in them.

    `sorted` is stable, so among equals the lower index comes first.
    """
    size = len(row) // groups
    best_of = [max(row[group * size : (group + 1) * size]) for group in range(groups)]
    chosen = sorted(range(groups), key=lambda group: -best_of[group])[:limit]
    inside = [expert for expert in range(len(row)) if expert // size in chosen]
    return sorted(inside, key=lambda expert: -row[expert])[:top_k]


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int]:
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    size = draw(st.integers(1, 6))
    limit = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, limit * size))
    tokens = draw(st.integers(0, 9))
    levels = draw(st.sampled_from([2, 5, 10_000]))  # few levels make ties, of groups and of experts
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(levels, (tokens, groups * size), generator=generator)
    return ranks.to(dtype) / levels, groups, limit, top_k


@given(routings())
@settings(max_examples=200)
def test_selection_equals_the_reference(case: tuple[torch.Tensor, int, int, int]) -> None:
    affinities, groups, limit, top_k = case
    selected = select_experts(affinities, groups, limit, top_k)
    assert selected.tolist() == [
        reference(row, groups, limit, top_k) for row in affinities.tolist()
    ]


def test_groups_are_chosen_by_their_best_expert() -> None:
    # Group 0 holds the best expert; groups 1 and 2 have the larger sums of two.
    affinities = torch.tensor([[0.30, 0.00, 0.20, 0.19, 0.16, 0.15]])
    assert select_experts(affinities, 3, 1, 2).tolist() == [[0, 1]]
    assert select_experts(affinities, 3, 2, 3).tolist() == [[0, 2, 3]]


def test_fewer_experts_than_groups_allowed() -> None:
    # K < M: megatron-core's rule would score every group 0 here.
    affinities = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert select_experts(affinities, 4, 3, 1).tolist() == [[3]]


def test_ties_go_to_the_lower_index() -> None:
    assert select_experts(torch.full((1, 64), 1 / 64), 8, 3, 6).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_a_token_reaches_at_most_m_groups(limit: int) -> None:
    affinities = torch.randn(512, 160, generator=torch.Generator().manual_seed(limit)).softmax(-1)
    groups = select_experts(affinities, 8, limit, 6) // 20
    reached = torch.tensor([len(set(row)) for row in groups.tolist()])
    assert reached.max() <= limit
    if limit == 8:
        # Closed form for random logits: 8 * (1 - C(140,6) / C(160,6)) = 4.459, spread 0.9 a token.
        assert abs(reached.double().mean() - 4.459) < 4 * 0.9 / 512**0.5


def test_gates_are_scaled_and_not_renormalised() -> None:
    affinities = torch.tensor([[0.5, 0.2, 0.2, 0.1]], requires_grad=True)
    gates = gate_values(affinities, torch.tensor([[0, 3]]), 16.0)
    assert torch.equal(gates, torch.tensor([[8.0, 0.0, 0.0, 1.6]]))
    gates.sum().backward()
    assert torch.equal(affinities.grad, torch.tensor([[16.0, 0.0, 0.0, 16.0]]))


def test_map_marks_the_selected() -> None:
    marked = routing_map(torch.tensor([[2, 0], [1, 2]]), 4)
    assert marked.tolist() == [[True, False, True, False], [False, True, True, False]]
