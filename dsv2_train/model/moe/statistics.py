"""What a mixture-of-experts layer decided, counted on the device as one vector."""

# S positions, B sequences, T = S * B tokens, E routed experts, K experts a token, D device groups,
# W = E + D + 9

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2_train.model.moe.balance_losses import BalanceLosses
from dsv2_train.model.moe.router import RoutedCounts, Routing


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over microbatches of training; every field may have leading dimensions.

    Attributes:
        expert_counts: [E] assignments before dropping.
        group_visits: [D] tokens with at least one assignment in the group, before dropping.
        balance_losses: [3] unweighted expert, device and communication loss.
        gate_entropy: [] entropy of the affinities in nats, over all tokens.
        num_dropped_assignments: [] assignments dropped.
        num_exempt_tokens: [] tokens of sequences that are exempt from dropping.
        num_tokens: [] tokens.
        num_microbatches: [] microbatches.
        num_bad_tokens: [] tokens whose router logits are not finite.
    """

    expert_counts: Tensor
    group_visits: Tensor
    balance_losses: Tensor
    gate_entropy: Tensor
    num_dropped_assignments: Tensor
    num_exempt_tokens: Tensor
    num_tokens: Tensor
    num_microbatches: Tensor
    num_bad_tokens: Tensor

    def flatten(self) -> Tensor:
        """[..., W] float64, where counts are exact below 2^53; to be summed over ranks."""
        fields = [getattr(self, field.name).to(torch.float64) for field in dataclasses.fields(self)]
        batch = self.num_tokens.dim()
        return torch.cat([field.reshape(*field.shape[:batch], -1) for field in fields], dim=-1)

    @classmethod
    def unflatten(cls, flat: Tensor, num_experts: int, num_device_groups: int) -> "LayerStatistics":
        """The inverse of `flatten`."""
        widths = _widths(num_experts, num_device_groups)
        parts = flat.split([max(width, 1) for width in widths], dim=-1)
        return cls(
            *(
                part if width else part.squeeze(-1)
                for width, part in zip(widths, parts, strict=True)
            )
        )


def num_statistics(num_experts: int, num_device_groups: int) -> int:
    """W, the length of a flat vector."""
    return sum(max(width, 1) for width in _widths(num_experts, num_device_groups))


def _widths(num_experts: int, num_device_groups: int) -> list[int]:
    """Of every field of `LayerStatistics`, in order; 0 for a scalar."""
    vectors = {"expert_counts": num_experts, "group_visits": num_device_groups}
    vectors["balance_losses"] = len(dataclasses.fields(BalanceLosses))
    return [vectors.get(field.name, 0) for field in dataclasses.fields(LayerStatistics)]


@torch.no_grad()
def count(
    routing: Routing, kept: Tensor | None, exempt: Tensor | None, num_device_groups: int
) -> LayerStatistics:
    """Count one microbatch of this rank.

    Args:
        routing: its routing.
        kept: [T, K] bool, assignments that are computed; None if all are.
        exempt: [B] bool, sequences that lose nothing; None where nothing is dropped.
        num_device_groups: D.

    Note:
        No communication; nothing is read back to the host.
    """
    losses, num_tokens = routing.losses, routing.selected.size(0)
    counts = routing.counts or _routed_counts(routing, num_device_groups)
    zero = losses.expert.new_zeros((), dtype=torch.float64)
    return LayerStatistics(
        expert_counts=counts.expert_counts,
        group_visits=counts.group_visits,
        balance_losses=torch.stack([losses.expert, losses.device, losses.communication]),
        gate_entropy=counts.gate_entropy,
        num_dropped_assignments=zero if kept is None else (~kept).sum(),
        num_exempt_tokens=zero if exempt is None else exempt.sum() * routing.affinities.size(0),
        num_tokens=zero + num_tokens,
        num_microbatches=zero + 1,
        num_bad_tokens=counts.num_bad_tokens,
    )


def _routed_counts(routing: Routing, num_device_groups: int) -> RoutedCounts:
    num_tokens, num_experts = routing.selected.shape
    by_group = (num_tokens, num_device_groups, num_experts // num_device_groups)
    return RoutedCounts(
        expert_counts=routing.selected.sum(dim=0),
        group_visits=routing.selected.view(by_group).any(dim=-1).sum(dim=0),
        gate_entropy=torch.special.entr(routing.affinities).sum(),
        num_bad_tokens=routing.affinities.isnan().any(dim=-1).sum(),
    )
