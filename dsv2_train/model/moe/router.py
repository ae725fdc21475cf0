"""DeepSeek-V2's gate as a megatron-core router (read against 0.16.1)."""

# S positions, B sequences, T = S * B tokens, E routed experts, K experts a token

from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from dsv2_train.model.moe.balance_losses import BalanceLosses, balance_losses
from dsv2_train.model.moe.routing import gate_values, routing_map, select_experts
from dsv2_train.model.transformer_config import DeepSeekV2TransformerConfig
from dsv2_train.ops.linear import linear


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
    """

    affinities: Tensor
    experts: Tensor
    selected: Tensor
    gates: Tensor
    losses: BalanceLosses


class DeviceLimitedRouter(Router):
    """Softmax gate in fp32, device-limited selection, balance losses on the routed map."""

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
        config: DeepSeekV2TransformerConfig = self.config
        affinities = logits.softmax(dim=-1)
        flat = affinities.flatten(0, 1)
        experts = select_experts(
            flat, config.num_device_groups, config.num_limited_devices, config.moe_router_topk
        )
        selected = routing_map(experts, self.num_experts)
        gates = gate_values(flat, experts, config.moe_router_topk_scaling_factor)
        losses = balance_losses(
            affinities,
            selected.view(affinities.shape),
            config.num_limited_devices,
            config.num_device_groups,
        )
        if self.training and torch.is_grad_enabled():
            gates = _with_balance_losses(gates, losses, config)
        return Routing(affinities, experts, selected, gates, losses)


def _with_balance_losses(
    gates: Tensor, losses: BalanceLosses, config: DeepSeekV2TransformerConfig
) -> Tensor:
    """Attach the losses to the gates.

    megatron-core's node hands the weighted loss the gradient that its schedules set, in a setting
    of the whole process, on every stage and for every microbatch: that of the main loss.
    """
    weighted = (
        config.expert_balance_alpha * losses.expert
        + config.device_balance_alpha * losses.device
        + config.communication_balance_alpha * losses.communication
    )
    return MoEAuxLossAutoScaler.apply(gates, weighted)
