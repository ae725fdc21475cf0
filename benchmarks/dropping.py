"""What a capacity of 1.0 drops: per device group over all tokens, and per expert and source rank.

Routers are random with a bias of its own for each expert, as untrained ones are: the larger the
bias, the less balanced. megatron-core's `apply_router_token_dropping` gets each rank's tokens, as
its router does, and the same assignments.
"""

import statistics
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from torch import Tensor

from dsv2_train.model.moe.capacity import DeviceCapacity
from dsv2_train.model.moe.routing import routing_map, select_experts

BIAS_STDS = (0.0, 0.1, 0.3, 0.6)
SEEDS = range(6)
_RANKS, _TOKENS_PER_RANK = 8, 4096
_EXPERTS, _GROUPS, _LIMIT, _TOP_K = 160, 8, 3, 6


@dataclass(frozen=True)
class Dropped:
    """Shares of all assignments.

    Attributes:
        device: per device group, over the tokens of all eight ranks: ours.
        device_by_rank: per device group, each rank's tokens alone: our approximation.
        expert_by_rank: per expert, each rank's tokens alone: megatron-core's.
    """

    device: float
    device_by_rank: float
    expert_by_rank: float


def dropped_shares(bias_std: float, seed: int) -> Dropped:
    """For one router over 32,768 tokens, at DeepSeek-V2's 160 experts, D 8, M 3, K 6."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = _RANKS * _TOKENS_PER_RANK
    logits = torch.randn(num_tokens, _EXPERTS, generator=generator)
    bias = bias_std * torch.randn(_EXPERTS, generator=generator)
    affinities = (logits + bias).softmax(-1)
    experts = select_experts(affinities, _GROUPS, _LIMIT, _TOP_K)
    ranks = list(
        zip(affinities.split(_TOKENS_PER_RANK), experts.split(_TOKENS_PER_RANK), strict=True)
    )
    capacity = DeviceCapacity(1.0, _GROUPS, group=None)

    def by_device(affinities: Tensor, experts: Tensor) -> float:
        exempt = torch.zeros(1, dtype=torch.bool)
        kept = capacity.decide(affinities.unsqueeze(1), experts, exempt)
        return 1.0 - kept.double().mean().item()

    return Dropped(
        device=by_device(affinities, experts),
        device_by_rank=statistics.fmean(by_device(a, e) for a, e in ranks),
        expert_by_rank=statistics.fmean(_by_expert(a, e) for a, e in ranks),
    )


def _by_expert(affinities: Tensor, experts: Tensor) -> float:
    routed = routing_map(experts, _EXPERTS)
    _, kept = apply_router_token_dropping(affinities * routed, routed, _TOP_K, capacity_factor=1.0)
    return 1.0 - kept.sum().item() / experts.numel()
