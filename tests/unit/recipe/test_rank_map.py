"""The rank map against megatron-core's own rank generator."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.recipe.rank_map import coordinates, expert_groups, stage_ranks
from tests.unit.recipe.presets import preset

ORDER = "tp-cp-ep-dp-pp"


@st.composite
def layouts(draw: st.DrawFn) -> ParallelConfig:
    pp, ep = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return ParallelConfig(world_size=pp * ep * draw(st.integers(1, 5)), pp=pp, ep=ep)


def positions(groups: list[list[int]]) -> dict[int, int]:
    """Rank -> its position in the group it belongs to."""
    return {rank: position for group in groups for position, rank in enumerate(group)}


@given(layouts())
def test_coordinates_equal_megatron_core(parallel: ParallelConfig) -> None:
    dense = RankGenerator(1, 1, parallel.dp, parallel.pp, 1, ORDER)
    expert = RankGenerator(1, parallel.ep, parallel.edp, parallel.pp, 1, ORDER)
    expected = [
        positions(groups)
        for groups in (
            dense.get_ranks("pp"),
            dense.get_ranks("dp"),
            expert.get_ranks("ep"),
            expert.get_ranks("dp"),
        )
    ]
    for rank in range(parallel.world_size):
        found = coordinates(rank, parallel, ranks_per_node=8)
        ours = (found.pp_rank, found.dp_rank, found.ep_rank, found.edp_rank)
        assert ours == tuple(axis[rank] for axis in expected)
        assert rank == (found.pp_rank * parallel.edp + found.edp_rank) * parallel.ep + found.ep_rank


@given(layouts())
def test_groups_equal_megatron_core(parallel: ParallelConfig) -> None:
    expert = RankGenerator(1, parallel.ep, parallel.edp, parallel.pp, 1, ORDER)
    groups = expert_groups(parallel, ranks_per_node=8)
    assert sorted(list(group.ranks) for group in groups) == sorted(expert.get_ranks("ep"))
    for group in groups:
        for position, rank in enumerate(group.ranks):
            found = coordinates(rank, parallel, ranks_per_node=8)
            assert (found.pp_rank, found.edp_rank) == (group.pp_rank, group.edp_rank)
            assert found.ep_rank == position
            assert found.node in group.nodes
    dense = RankGenerator(1, 1, parallel.dp, parallel.pp, 1, ORDER)
    assert sorted(list(ranks) for ranks in stage_ranks(parallel)) == sorted(dense.get_ranks("dp"))


@pytest.mark.parametrize("replicas", range(1, 17))
def test_an_ep_group_of_the_paper_layout_is_one_node(replicas: int) -> None:
    parallel = preset("dsv2_236b_pretrain").parallel
    parallel = parallel.model_copy(update={"world_size": 128 * replicas})
    groups = expert_groups(parallel, ranks_per_node=8)
    assert len(groups) == 16 * replicas
    assert all(len(group.nodes) == 1 for group in groups)
    assert sorted(node for group in groups for node in group.nodes) == list(range(16 * replicas))


def test_an_ep_group_wider_than_a_node_is_on_two() -> None:
    parallel = ParallelConfig(world_size=8, ep=8)
    assert expert_groups(parallel, ranks_per_node=4)[0].nodes == (0, 1)


@pytest.mark.parametrize("rank", [-1, 128])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 128\)"):
        coordinates(rank, preset("dsv2_236b_pretrain").parallel, ranks_per_node=8)
