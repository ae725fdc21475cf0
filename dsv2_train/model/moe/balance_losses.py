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
    num_tokens, num_sequences, num_experts = affinities.shape
    by_group = (num_sequences, num_device_groups, num_experts // num_device_groups)
    counts = selected.sum(dim=0).to(affinities.dtype)
    expert_load = counts * num_experts / counts.sum(dim=-1, keepdim=True)
    expert_share = affinities.mean(dim=0)
    device_load = expert_load.view(by_group).mean(dim=-1)
    device_share = expert_share.view(by_group).sum(dim=-1)
    visited = selected.view(num_tokens, *by_group).any(dim=-1).sum(dim=0)
    sent_load = visited.to(affinities.dtype) * (
        num_device_groups / (num_limited_devices * num_tokens)
    )
    return BalanceLosses(
        expert=(expert_load * expert_share).sum(dim=-1).mean(),
        device=(device_load * device_share).sum(dim=-1).mean(),
        communication=(sent_load * device_share).sum(dim=-1).mean(),
    )
