"""What goes to later stages and what goes to earlier ones has a communicator each."""

from typing import NamedTuple
from unittest import mock

import pytest
import torch.distributed as dist
from torch import Tensor

from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from tests.helpers.pipeline import Pipeline, pipeline_config
from tests.helpers.world import World


class Sent(NamedTuple):
    """A message as one of its two ends issued it."""

    source: int
    target: int
    communicator: str


def _issued(rank: int, config: RunConfig) -> tuple[list[Sent], list[Sent]]:
    """Sends and receives of this rank, connecting included, in a step of a pipeline."""
    sends: list[Sent] = []
    receives: list[Sent] = []
    isend, irecv = dist.isend, dist.irecv

    def send(tensor: Tensor, peer: int, *, group: dist.ProcessGroup) -> dist.Work | None:
        sends.append(Sent(rank, peer, group.group_name))
        return isend(tensor, peer, group=group)

    def receive(tensor: Tensor, peer: int, *, group: dist.ProcessGroup) -> dist.Work | None:
        receives.append(Sent(peer, rank, group.group_name))
        return irecv(tensor, peer, group=group)

    with mock.patch.object(dist, "isend", send), mock.patch.object(dist, "irecv", receive):
        Pipeline(config).step(3)
    process_groups.destroy()
    return sends, receives


@pytest.mark.parametrize(
    ("pp", "schedule", "chunks"), [(2, "zb_h1", 1), (2, "zb_v", 2), (4, "interleaved", 2)]
)
def test_each_direction_has_a_communicator_that_both_ends_use(
    world: World, pp: int, schedule: str, chunks: int
) -> None:
    config = pipeline_config(
        pp, f"parallel.pp={pp}", f"parallel.schedule={schedule}", f"parallel.chunks={chunks}"
    )
    ranks = world.run(_issued, pp, config)
    sends = [each for sent, _ in ranks for each in sent]
    ahead = {each.communicator for each in sends if each.target > each.source}
    back = {each.communicator for each in sends if each.target < each.source}
    assert len(ahead) == len(back) == 1 and ahead != back
    for source, (sent, _) in enumerate(ranks):
        for target, (_, received) in enumerate(ranks):
            to_target = [each for each in sent if each.target == target]
            assert to_target == [each for each in received if each.source == source]
