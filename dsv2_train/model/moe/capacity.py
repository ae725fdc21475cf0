"""Device capacity: a budget of assignments for each device group (DeepSeek-V2, section 2.2.4).

The decision is a pure function of every assignment of an expert-parallel group; `DeviceCapacity`
gathers them.
"""

# S positions, B sequences, T = S * B tokens, E routed experts, K experts a token, D device groups,
# A assignments

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place

# A key, from high bits to low: device group, 1 for an exempt sequence, affinity. The bits of a
# float that is not negative order as the float does.
_GROUP_SHIFT = 32
_EXEMPT_SHIFT = 31


def device_budget(factor: float, num_assignments: int, num_device_groups: int) -> int:
    """Assignments that a device group computes: `factor` times the mean load, rounded up.

    Exact: a factor of 1.1 is eleven tenths.
    """
    return math.ceil(Fraction(str(factor)) * num_assignments / num_device_groups)


def sort_keys(affinities: Tensor, device_groups: Tensor, exempt: Tensor) -> Tensor:
    """One number for each assignment that tells its device group and who is kept before whom.

    Args:
        affinities: of any shape, float in [0, 1]; ordered in fp32.
        device_groups: int64, of the same shape.
        exempt: bool, of a shape that broadcasts to it.

    Returns:
        int64, of the same shape: in a device group, larger ones are kept first, exempt ones before
        all others.
    """
    bits = affinities.to(torch.float32).view(torch.int32).to(torch.int64)
    return (device_groups << _GROUP_SHIFT) | (exempt.to(torch.int64) << _EXEMPT_SHIFT) | bits


def surviving(keys: Tensor, num_device_groups: int, budget: int) -> Tensor:
    """Drop what exceeds each device group's budget, lowest affinity first.

    Args:
        keys: [A] int64, from `sort_keys`; among equal ones those in front are kept first.
        num_device_groups: D.
        budget: for each group. Exempt assignments are kept in any case, and count.

    Returns:
        [A] bool, True for assignments that are computed.

    Note:
        No communication; deterministic. One sort of A numbers.
    """
    descending, order = keys.sort(descending=True, stable=True)
    groups = descending >> _GROUP_SHIFT
    # Groups are consecutive, the highest first: a group begins after all that are above it.
    every_group = torch.arange(num_device_groups, device=keys.device)
    starts = (groups.unsqueeze(1) > every_group).sum(dim=0)
    place = torch.arange(keys.numel(), device=keys.device) - starts[groups]
    exempt = (descending >> _EXEMPT_SHIFT) & 1
    kept = (place < budget) | (exempt == 1)
    return torch.empty_like(kept).scatter_(0, order, kept)


@dataclass(frozen=True)
class DeviceCapacity:
    """Which assignments of a microbatch are computed.

    Attributes:
        factor: the budget over the mean load of the device groups.
        num_device_groups: D.
        group: the ranks whose tokens share a budget: the expert-parallel group; or None for this
            rank's tokens alone, an approximation that needs no communication.
    """

    factor: float
    num_device_groups: int
    group: dist.ProcessGroup | None

    @torch.no_grad()
    def decide(self, affinities: Tensor, experts: Tensor, exempt: Tensor) -> Tensor:
        """Which assignments survive, the same on every rank of the group.

        Args:
            affinities: [S, B, E], of this rank's microbatch.
            experts: [S * B, K] int64, selected by each token.
            exempt: [B] bool, sequences that lose nothing.

        Returns:
            [S * B, K] bool, True for the assignments in `experts` that are computed.

        Note:
            One all-gather of 8 K bytes a token. Equal affinities are kept in the order of the
            sequences in the group, then of positions: it does not matter how ranks split them.
        """
        num_positions, num_sequences, num_experts = affinities.shape
        by_sequence = (num_positions, num_sequences, -1)
        keys = sort_keys(
            affinities.flatten(0, 1).gather(1, experts),
            experts // (num_experts // self.num_device_groups),
            exempt.repeat(num_positions).unsqueeze(1),
        )
        ours = keys.view(by_sequence).transpose(0, 1).flatten()
        everyone, first = self._gathered(ours)
        budget = device_budget(self.factor, everyone.numel(), self.num_device_groups)
        kept = surviving(everyone, self.num_device_groups, budget)[first : first + ours.numel()]
        return kept.view(num_sequences, num_positions, -1).transpose(0, 1).reshape(experts.shape)

    def _gathered(self, keys: Tensor) -> tuple[Tensor, int]:
        """The keys of the whole group by rank, and where this rank's begin."""
        if self.group is None or self.group.size() == 1:
            return keys, 0
        everyone = keys.new_empty(self.group.size() * keys.numel())
        with activity.waiting(Place.CAPACITY):
            dist.all_gather_into_tensor(everyone, keys, group=self.group)
        return everyone, self.group.rank() * keys.numel()
