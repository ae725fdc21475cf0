"""The three balance losses of DeepSeek-V2 (section 2.2.3, equations 23 to 31)."""

# B sequences of S tokens, E routed experts, D device groups, K experts and M groups a token

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BalanceLosses:
    """Unweighted scalars, each 1 when load and probability are uniform."""

    expert: Tensor
    device: Tensor
    communication: Tensor


def balance_losses(
    affinities: Tensor, selected: Tensor, num_limited_devices: int, num_device_groups: int
) -> BalanceLosses:
    """Penalize uneven load of experts, of devices, and of what devices are sent.

    Loads are counted per sequence on the map that was routed, before any dropping; the losses are
    means over the sequences. The caller weighs them by the alphas and adds up the layers.

    Args:
        affinities: [S, B, E] float, softmax over all routed experts.
        selected: [S, B, E] bool, True where the token selected the expert.
        num_limited_devices: M.
        num_device_groups: D; experts are laid out contiguously.

    Returns:
        Three scalars of `affinities`' dtype.

    Note:
        Local to this rank's sequences; no communication. Gradient flows through `affinities` only.
    """
    num_positions, num_sequences, num_experts = affinities.shape
    by_group = (num_sequences, num_device_groups, num_experts // num_device_groups)
    visited = selected.view(num_positions, *by_group).any(dim=-1)
    return balance_losses_of_counts(
        selected.sum(dim=0),
        visited.sum(dim=0),
        affinities.mean(dim=0),
        num_positions,
        num_limited_devices,
    )


def balance_losses_of_counts(
    expert_counts: Tensor,
    group_visits: Tensor,
    expert_share: Tensor,
    num_positions: int,
    num_limited_devices: int,
) -> BalanceLosses:
    """The same from what was counted over each sequence.

    Args:
        expert_counts: [B, E] integer, tokens that selected the expert.
        group_visits: [B, D] integer, tokens with an expert in the group.
        expert_share: [B, E] float, mean affinities.
        num_positions: S.
        num_limited_devices: M.

    Returns:
        Three scalars of `expert_share`'s dtype, through which alone gradient flows.
    """
    num_experts, num_device_groups = expert_counts.size(1), group_visits.size(1)
    by_group = (-1, num_device_groups, num_experts // num_device_groups)
    counts = expert_counts.to(expert_share.dtype)
    expert_load = counts * num_experts / counts.sum(dim=-1, keepdim=True)
    device_load = expert_load.view(by_group).mean(dim=-1)
    device_share = expert_share.view(by_group).sum(dim=-1)
    sent_load = group_visits.to(expert_share.dtype) * (
        num_device_groups / (num_limited_devices * num_positions)
    )
    return BalanceLosses(
        expert=(expert_load * expert_share).sum(dim=-1).mean(),
        device=(device_load * device_share).sum(dim=-1).mean(),
        communication=(sent_load * device_share).sum(dim=-1).mean(),
    )
