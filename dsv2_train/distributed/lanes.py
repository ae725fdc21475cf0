"""Messages between the stages of a pipeline: a communicator for each direction.

NCCL has one communicator for a pair of ranks in a group, and works off its messages in the order in
which they were issued, sends and receives alike. On a single one, what goes ahead and what goes
back would wait for each other.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Lanes:
    """Sends to and receives from other stages of this rank's pipeline.

    Args:
        ahead: the ranks of the pipeline in the order of stages, for messages to later stages.
        back: the same ranks, for messages to earlier stages.
        hosts: the same ranks over gloo, for what their hosts agree on.
    """

    def __init__(
        self, ahead: dist.ProcessGroup, back: dist.ProcessGroup, hosts: dist.ProcessGroup
    ) -> None:
        self._ahead, self._back, self.hosts = ahead, back, hosts
        self.stage, self.num_stages = ahead.rank(), ahead.size()
        self._ranks = dist.get_process_group_ranks(ahead)

    def send(self, tensor: Tensor, target: int) -> dist.Work:
        """Start to send a contiguous tensor, which must be kept until the work is done."""
        work = dist.isend(tensor, self._ranks[target], group=self._lane(self.stage, target))
        assert work is not None
        return work

    def receive(self, buffer: Tensor, source: int) -> dist.Work:
        """Start to receive into a contiguous tensor."""
        work = dist.irecv(buffer, self._ranks[source], group=self._lane(source, self.stage))
        assert work is not None
        return work

    def connect(self, device: torch.device, *, is_ring: bool) -> None:
        """Use every lane between neighbours once, in one order on all ranks.

        A communicator is made at its first use, which both ranks wait in.

        Args:
            device: of the tensors that are sent.
            is_ring: the last stage and the first one are neighbours.

        Note:
            Collective over the ranks of the pipeline.
        """
        token = torch.zeros(1, device=device)
        count = self.num_stages
        for source in range(count):
            targets = {source + 1, source - 1} - {-1, count}
            if is_ring:
                targets = {(source + 1) % count, (source - 1) % count}
            for target in sorted(targets):
                if self.stage == source:
                    self.send(token, target).wait()
                elif self.stage == target:
                    self.receive(token, source).wait()

    def _lane(self, source: int, target: int) -> dist.ProcessGroup:
        return self._ahead if target > source else self._back


def build_lanes(
    pipelines: Sequence[Sequence[int]], timeout_s: float, device: torch.device, *, is_ring: bool
) -> Lanes:
    """Make and connect the lanes of this rank's pipeline.

    Args:
        pipelines: ranks of every pipeline of the run in the order of stages, at least two each.
        timeout_s: how long a message may wait for its peer.
        device: of the tensors that are sent.
        is_ring: the last stage sends to the first one: chunks in a loop, more than one a stage.

    Note:
        Collective over all ranks.
    """
    timeout, backend = timedelta(seconds=timeout_s), dist.get_backend()
    ahead, back, hosts = (
        dist.new_subgroups_by_enumeration(pipelines, timeout=timeout, backend=each)[0]
        for each in (backend, backend, dist.Backend.GLOO)
    )
    lanes = Lanes(ahead, back, hosts)
    lanes.connect(device, is_ring=is_ring)
    return lanes
