"""megatron-core's groups against the rank map written out by hand, and the dry-run groups."""

import time

import pytest
import torch.distributed as dist

from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.distributed import groups
from tests.helpers.fake_world import build_fake, destroy_fake
from tests.helpers.world import World

# (pp, ep): the ranks of the group that rank 0, 1, 2, 3 is in.
EP_GROUPS = {
    (1, 1): [[0], [1], [2], [3]],
    (1, 2): [[0, 1], [0, 1], [2, 3], [2, 3]],
    (1, 4): [[0, 1, 2, 3]] * 4,
    (2, 1): [[0], [1], [2], [3]],
    (2, 2): [[0, 1], [0, 1], [2, 3], [2, 3]],
    (4, 1): [[0], [1], [2], [3]],
}
PP_GROUPS = {
    (1, 1): [[0], [1], [2], [3]],
    (1, 2): [[0], [1], [2], [3]],
    (1, 4): [[0], [1], [2], [3]],
    (2, 1): [[0, 2], [1, 3], [0, 2], [1, 3]],
    (2, 2): [[0, 2], [1, 3], [0, 2], [1, 3]],
    (4, 1): [[0, 1, 2, 3]] * 4,
}
DP_GROUPS = {
    (1, 1): [[0, 1, 2, 3]] * 4,
    (1, 2): [[0, 1, 2, 3]] * 4,
    (1, 4): [[0, 1, 2, 3]] * 4,
    (2, 1): [[0, 1], [0, 1], [2, 3], [2, 3]],
    (2, 2): [[0, 1], [0, 1], [2, 3], [2, 3]],
    (4, 1): [[0], [1], [2], [3]],
}
EXPERT_DP_GROUPS = {
    (1, 1): [[0, 1, 2, 3]] * 4,
    (1, 2): [[0, 2], [1, 3], [0, 2], [1, 3]],
    (1, 4): [[0], [1], [2], [3]],
    (2, 1): [[0, 1], [0, 1], [2, 3], [2, 3]],
    (2, 2): [[0], [1], [2], [3]],
    (4, 1): [[0], [1], [2], [3]],
}


def members(rank: int, layouts: list[tuple[int, int]]) -> list[dict[str, list[int]]]:
    seen = []
    for pp, ep in layouts:
        built = groups.build(ParallelConfig(world_size=4, pp=pp, ep=ep), timeout_s=17)
        seen.append(
            {
                name: dist.get_process_group_ranks(getattr(built, name))
                for name in ("ep", "pp", "dp", "expt_dp", "intra_dist_opt", "tp", "cp")
            }
        )
        assert built.ep.rank() == seen[-1]["ep"].index(rank)
        groups.destroy()
    return seen


def test_groups_are_the_rank_map(world: World) -> None:
    layouts = list(EP_GROUPS)
    for rank, seen in enumerate(world.run(members, 4, layouts)):
        for layout, found in zip(layouts, seen, strict=True):
            assert found["ep"] == EP_GROUPS[layout][rank], layout
            assert found["pp"] == PP_GROUPS[layout][rank], layout
            assert found["dp"] == DP_GROUPS[layout][rank], layout
            assert found["expt_dp"] == EXPERT_DP_GROUPS[layout][rank], layout
            assert found["intra_dist_opt"] == [0, 1, 2, 3], layout
            assert found["tp"] == found["cp"] == [rank], layout


def timeouts(rank: int) -> list[float]:
    created = groups.build(ParallelConfig(world_size=2, pp=1, ep=2), timeout_s=17)
    found = {field: getattr(created, field) for field in created.__dataclass_fields__}
    return [
        group._get_backend(group._device_types[0]).options._timeout.total_seconds()
        for group in found.values()
        if isinstance(group, dist.ProcessGroup)
    ]


def test_every_group_has_the_timeout(world: World) -> None:
    for found in world.run(timeouts, 2):
        assert len(found) >= 16
        assert set(found) == {17.0}


def wrong_world(rank: int) -> None:
    groups.build(ParallelConfig(world_size=4, pp=2, ep=2), timeout_s=17)


def test_another_number_of_processes_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match=r"parallel\.world_size is 4, but 2 processes run"):
        world.run(wrong_world, 2)


def test_a_dry_run_sees_every_rank_of_the_paper_s_layout() -> None:
    parallel = ParallelConfig(world_size=128, pp=16, ep=8)
    start_s = time.monotonic()
    places = set()
    for rank in range(parallel.world_size):
        built = build_fake(parallel, rank)
        assert dist.get_process_group_ranks(built.ep) == [rank // 8 * 8 + i for i in range(8)]
        assert dist.get_process_group_ranks(built.pp) == [rank % 8 + 8 * i for i in range(16)]
        places.add((built.pp.rank(), built.ep.rank(), built.pp.size(), built.ep.size()))
    destroy_fake()
    assert places == {(stage, place, 16, 8) for stage in range(16) for place in range(8)}
    assert not dist.is_initialized()
    assert time.monotonic() - start_s < 60
