"""What a mixture-of-experts layer decided, counted on the device as one vector."""

# S positions, B sequences, T = S * B tokens, E routed experts, K experts a token, D device groups,
# W = E + D + 8

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2_train.model.moe.router import Routing

_NUM_LOSSES = 3
_NUM_SCALARS = 5


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over micro-batches of training; every field may have leading dimensions.

    Attributes:
        expert_counts: [E] assignments before dropping.
        sent_counts: [D] tokens with at least one assignment in the group, before dropping.
        balance_losses: [3] unweighted expert, device and communication loss.
        gate_entropy: [] entropy of the affinities in nats, over all tokens.
        num_dropped: [] assignments dropped.
        num_exempt: [] tokens of sequences that are exempt from dropping.
        num_tokens: [] tokens.
        num_microbatches: [] micro-batches.
    """

    expert_counts: Tensor
    sent_counts: Tensor
    balance_losses: Tensor
    gate_entropy: Tensor
    num_dropped: Tensor
    num_exempt: Tensor
    num_tokens: Tensor
    num_microbatches: Tensor

    def flatten(self) -> Tensor:
        """[..., W] float64, where counts are exact below 2^53; to be summed over ranks."""
        vectors = (self.expert_counts, self.sent_counts, self.balance_losses)
        scalars = (
            self.gate_entropy,
            self.num_dropped,
            self.num_exempt,
            self.num_tokens,
            self.num_microbatches,
        )
        parts = [*vectors, *(scalar.unsqueeze(-1) for scalar in scalars)]
        return torch.cat([part.to(torch.float64) for part in parts], dim=-1)

    @classmethod
    def unflatten(cls, flat: Tensor, num_experts: int, num_device_groups: int) -> "LayerStatistics":
        """The inverse of `flatten`."""
        sizes = [num_experts, num_device_groups, _NUM_LOSSES, *[1] * _NUM_SCALARS]
        parts = flat.split(sizes, dim=-1)
        return cls(*parts[:3], *(part.squeeze(-1) for part in parts[3:]))


def num_statistics(num_experts: int, num_device_groups: int) -> int:
    """W, the length of a flat vector."""
    return num_experts + num_device_groups + _NUM_LOSSES + _NUM_SCALARS


@torch.no_grad()
def count(
    routing: Routing, kept: Tensor | None, exempt: Tensor | None, num_device_groups: int
) -> LayerStatistics:
    """Count one micro-batch of this rank.

    Args:
        routing: its routing.
        kept: [T, K] bool, assignments that are computed; None if all are.
        exempt: [B] bool, sequences that lose nothing; None where nothing is dropped.
        num_device_groups: D.

    Note:
        No communication; nothing is read back to the host.
    """
    selected, losses = routing.selected, routing.losses
    num_tokens, num_experts = selected.shape
    by_group = selected.view(num_tokens, num_device_groups, num_experts // num_device_groups)
    zero = losses.expert.new_zeros((), dtype=torch.float64)
    return LayerStatistics(
        expert_counts=selected.sum(dim=0),
        sent_counts=by_group.any(dim=-1).sum(dim=0),
        balance_losses=torch.stack([losses.expert, losses.device, losses.communication]),
        gate_entropy=torch.special.entr(routing.affinities).sum(),
        num_dropped=zero if kept is None else (~kept).sum(),
        num_exempt=zero if exempt is None else exempt.sum() * routing.affinities.size(0),
        num_tokens=zero + num_tokens,
        num_microbatches=zero + 1,
    )
