"""Device-limited routing (DeepSeek-V2, sections 2.2.1 and 2.2.2) as pure functions."""

# T tokens, E routed experts, D device groups of E / D consecutive experts, M groups a token may
# reach, K experts a token selects

import torch
from torch import Tensor


def select_experts(
    affinities: Tensor, num_device_groups: int, num_limited_devices: int, top_k: int
) -> Tensor:
    """Choose each token's experts inside the M device groups that hold its best ones.

    A group's score is the largest affinity among its experts (megatron-core sums several, which is
    DeepSeek-V3's rule). Ties go to the lower index, of groups and of experts.

    Args:
        affinities: [T, E] float, softmax over all routed experts, so not negative.
        num_device_groups: D; experts are laid out contiguously, E % D == 0.
        num_limited_devices: M.
        top_k: K, at most M * E / D.

    Returns:
        [T, K] int64 expert ids, best first.

    Note:
        No communication, no gradient, deterministic.
    """
    num_tokens, num_experts = affinities.shape
    group_size = num_experts // num_device_groups
    with torch.no_grad():
        if num_limited_devices == num_device_groups:
            return _best(affinities, top_k)
        group_scores = affinities.view(num_tokens, num_device_groups, group_size).amax(dim=-1)
        groups = _best(group_scores, num_limited_devices).sort(dim=-1).values
        within = torch.arange(group_size, device=affinities.device)
        candidates = (groups.unsqueeze(-1) * group_size + within).flatten(1)
        return candidates.gather(1, _best(affinities.gather(1, candidates), top_k))


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest entries of each row; `topk` alone would break ties arbitrarily.

    The bits of a float that is not negative order as the float does: with the index below them,
    reversed, no two keys of a row are equal.
    """
    if scores.dtype is not torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    last = scores.size(1) - 1
    reversed_index = torch.arange(last, -1, -1, device=scores.device)
    keys = (scores.view(torch.int32).to(torch.int64) << 32) | reversed_index
    return last - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)


def gate_values(affinities: Tensor, experts: Tensor, scaling_factor: float) -> Tensor:
    """The selected affinities, times the routed scaling factor, not renormalised (eq. 20 to 22).

    Args:
        affinities: [T, E] float.
        experts: [T, K] int64.
        scaling_factor: lambda; 16 for DeepSeek-V2.

    Returns:
        [T, E], zero where an expert was not selected; differentiable in `affinities`.
    """
    selected = affinities.gather(1, experts) * scaling_factor
    return gate_map(selected, experts, affinities.size(1))


def gate_map(selected: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """[T, K] gate values of [T, K] expert ids -> [T, E], zero elsewhere; differentiable."""
    return selected.new_zeros(selected.size(0), num_experts).scatter(1, experts, selected)


def routing_map(experts: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """[T, K] expert ids -> [T, E] bool, True where the token selected the expert.

    With `kept`, [T, K] bool, only for the assignments that it marks.
    """
    chosen = torch.zeros(experts.size(0), num_experts, dtype=torch.bool, device=experts.device)
    return chosen.scatter_(1, experts, True if kept is None else kept)
