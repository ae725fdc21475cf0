"""DeepSeek-V2's gate as a megatron-core router (read against 0.16.1)."""

# S positions, B sequences, T = S * B tokens, E routed experts, K experts a token

from dataclasses import dataclass, replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from dsv2_train.model.moe.balance_losses import (
    BalanceLosses,
    balance_losses,
    balance_losses_of_counts,
)
from dsv2_train.model.moe.routing import gate_map, gate_values, routing_map, select_experts
from dsv2_train.model.transformer_config import DeepSeekV2TransformerConfig
from dsv2_train.ops.linear import linear
from dsv2_train.ops.moe.routing import device_limited_topk


@dataclass(frozen=True)
class RoutedCounts:
    """What a microbatch's routing is counted as, before any dropping.

    Attributes:
        expert_counts: [E] integer, assignments.
        group_visits: [D] integer, tokens with at least one assignment in the group.
        gate_entropy: [] entropy of the affinities in nats, over all tokens.
        num_bad_tokens: [] integer, tokens whose affinities are NaN.
    """

    expert_counts: Tensor
    group_visits: Tensor
    gate_entropy: Tensor
    num_bad_tokens: Tensor


@dataclass(frozen=True)
class Routing:
    """Where the tokens of a microbatch go, before any dropping.

    Attributes:
        affinities: [S, B, E] in the routing dtype, softmax over all routed experts.
        experts: [T, K] int64, selected by each token, best first.
        selected: [T, E] bool, the same as a map.
        gates: [T, E] in the routing dtype, zero where an expert was not selected; in training they
            carry the gradient of the balance losses.
        losses: the balance losses, unweighted.
        counts: counted on the way by a kernel, otherwise None.
    """

    affinities: Tensor
    experts: Tensor
    selected: Tensor
    gates: Tensor
    losses: BalanceLosses
    counts: RoutedCounts | None = None


class DeviceLimitedRouter(Router):
    """Softmax gate in fp32, device-limited selection, balance losses on the routed map."""

    def __init__(
        self,
        config: DeepSeekV2TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        implementation: str,
    ) -> None:
        """Build as megatron-core does.

        Args:
            config: of the model.
            pg_collection: the rank's process groups.
            implementation: `torch`, or `kernel`, which takes CUDA tensors in fp32.
        """
        super().__init__(config, pg_collection)
        self._decide = _decide_in_torch if implementation == "torch" else _decide_in_a_kernel

    def forward(self, input: Tensor) -> Routing:
        """Route.

        Args:
            input: [S, B, hidden_size], the normalised hidden states.

        Note:
            No communication. Logits that are not finite are routed somewhere, and told of by the
            affinities, which are NaN then.
        """
        return self.routing(self.gating(input))

    def gating(self, input: Tensor) -> Tensor:
        """[S, B, hidden_size] -> [S, B, E] logits, products taken in fp32 (fp64 in fp64 mode)."""
        dtype = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        return linear(input, self.weight, dtype)

    def routing(self, logits: Tensor) -> Routing:
        """[S, B, E] logits -> what `forward` returns."""
        routing = self._decide(logits, self.config)
        if self.training and torch.is_grad_enabled():
            return replace(routing, gates=_with_balance_losses(routing, self.config))
        return routing


def _decide_in_torch(logits: Tensor, config: DeepSeekV2TransformerConfig) -> Routing:
    affinities = logits.softmax(dim=-1)
    flat = affinities.flatten(0, 1)
    experts = select_experts(
        flat, config.num_device_groups, config.num_limited_devices, config.moe_router_topk
    )
    selected = routing_map(experts, flat.size(1))
    gates = gate_values(flat, experts, config.moe_router_topk_scaling_factor)
    losses = balance_losses(
        affinities,
        selected.view(affinities.shape),
        config.num_limited_devices,
        config.num_device_groups,
    )
    return Routing(affinities, experts, selected, gates, losses)


def _decide_in_a_kernel(logits: Tensor, config: DeepSeekV2TransformerConfig) -> Routing:
    """The gradients of gates and losses meet in the kernel's backward pass."""
    num_positions, num_sequences, num_experts = logits.shape
    routed = device_limited_topk(
        logits.flatten(0, 1),
        num_sequences,
        config.num_device_groups,
        config.num_limited_devices,
        config.moe_router_topk,
        config.moe_router_topk_scaling_factor,
    )
    losses = balance_losses_of_counts(
        routed.expert_counts,
        routed.group_visits,
        routed.affinity_sums / num_positions,
        num_positions,
        config.num_limited_devices,
    )
    return Routing(
        affinities=routed.affinities.view(logits.shape),
        experts=routed.experts,
        selected=routing_map(routed.experts, num_experts),
        gates=gate_map(routed.gates, routed.experts, num_experts),
        losses=losses,
        counts=RoutedCounts(
            expert_counts=routed.expert_counts.sum(dim=0),
            group_visits=routed.group_visits.sum(dim=0),
            gate_entropy=routed.entropy_sums.sum(),
            num_bad_tokens=routed.bad_token_counts.sum(),
        ),
    )


def _with_balance_losses(routing: Routing, config: DeepSeekV2TransformerConfig) -> Tensor:
    """The gates, with the losses attached.

    megatron-core's node hands the weighted loss the gradient that its schedules set, in a setting
    of the whole process, on every stage and for every microbatch: that of the main loss.
    """
    losses = routing.losses
    weighted = (
        config.expert_balance_alpha * losses.expert
        + config.device_balance_alpha * losses.device
        + config.communication_balance_alpha * losses.communication
    )
    return MoEAuxLossAutoScaler.apply(routing.gates, weighted)
