"""Device-limited routing and its gradient in plain torch."""

# T = S * B tokens, token s * B + b at position s of sequence b, E experts in D groups of E / D, M
# groups and K experts a token

import torch
from torch import Tensor


def device_limited_topk(
    logits: Tensor,
    num_sequences: int,
    num_groups: int,
    num_limited: int,
    top_k: int,
    scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """[T, E] logits -> the fields of `dsv2_kernels.device_limited_topk.DeviceLimitedTopk`."""
    num_tokens, num_experts = logits.shape
    by_sequence = (num_tokens // num_sequences, num_sequences)
    group_of = torch.arange(num_experts, device=logits.device) // (num_experts // num_groups)
    affinities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    scores = affinities.view(num_tokens, num_groups, num_experts // num_groups).amax(dim=-1)
    groups = _marked(_best(scores, num_limited), num_groups)
    experts = _best(affinities.where(groups[:, group_of], -1.0), top_k)
    gates = affinities.gather(1, experts) * scaling_factor
    selected, visited = _marked(experts, num_experts), _marked(group_of[experts], num_groups)
    by_token = affinities.view(*by_sequence, num_experts)
    return (
        affinities,
        experts,
        gates,
        selected.view(*by_sequence, num_experts).sum(dim=0, dtype=torch.int32),
        visited.view(*by_sequence, num_groups).sum(dim=0, dtype=torch.int32),
        by_token.sum(dim=0),
        torch.special.entr(by_token).sum(dim=(0, 2)),
        by_token.isnan().any(dim=-1).sum(dim=0, dtype=torch.int32),
    )


def device_limited_topk_backward(
    grad_gates: Tensor,
    affinities: Tensor,
    experts: Tensor,
    grad_affinity_sums: Tensor | None,
    scaling_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """Gradients of gates [T, K] and of affinity sums [B, E] or none -> of the logits [T, E]."""
    grad = torch.zeros_like(affinities)
    if grad_affinity_sums is not None:
        grad = grad_affinity_sums.repeat(affinities.size(0) // grad_affinity_sums.size(0), 1)
    grad = grad.scatter_add(1, experts, grad_gates * scaling_factor)
    return (affinities * (grad - (affinities * grad).sum(dim=-1, keepdim=True))).to(dtype)


def _best(scores: Tensor, count: int) -> Tensor:
    """[T, n] -> [T, count] int64, best first, ties to the lower index, NaNs before all."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


def _marked(indices: Tensor, count: int) -> Tensor:
    """[T, n] indices -> [T, count] bool."""
    return indices.new_zeros(indices.size(0), count, dtype=torch.bool).scatter(1, indices, True)
