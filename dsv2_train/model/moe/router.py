"""DeepSeek-V2's gate as a megatron-core router (read against 0.16.1)."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from dsv2_train.model.moe.balance_losses import BalanceLosses, balance_losses
from dsv2_train.model.moe.routing import gate_values, routing_map, select_experts
from dsv2_train.model.transformer_config import DeepSeekV2TransformerConfig


class DeviceLimitedRouter(Router):
    """Softmax gate in fp32, device-limited selection, balance losses on the routed map.

    Counters for monitoring accumulate on the device until `reset_counters`:

    Attributes:
        expert_counts: [E] int64, assignments of this rank's training tokens.
        balance_sums: [3] float32, unweighted expert, device and communication losses summed over
            micro-batches.
        num_microbatches: [] int64, micro-batches counted.
    """

    expert_counts: Tensor
    balance_sums: Tensor
    num_microbatches: Tensor

    def __init__(
        self,
        config: DeepSeekV2TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        device = self.weight.device
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        self.register_buffer("expert_counts", counts, persistent=False)
        sums = torch.zeros(3, dtype=torch.float32, device=device)
        self.register_buffer("balance_sums", sums, persistent=False)
        seen = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("num_microbatches", seen, persistent=False)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route.

        Args:
            input: [S, B, hidden_size], the normalised hidden states.
            padding_mask: must be None; samples are packed full.

        Returns:
            Gate values [S * B, E] in the routing dtype, and the routed map [S * B, E] bool.
        """
        assert padding_mask is None, "samples are packed full: there is no padding to mask"
        return self.routing(self.gating(input))

    def gating(self, input: Tensor) -> Tensor:
        """[S, B, hidden_size] -> [S, B, E] logits, product taken in fp32 (fp64 in fp64 mode)."""
        dtype = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        return torch.nn.functional.linear(input.to(dtype), self.weight.to(dtype))

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[S, B, E] logits -> gate values and routed map, both [S * B, E]."""
        config = self.config
        affinities = logits.softmax(dim=-1)
        flat = affinities.flatten(0, 1)
        experts = select_experts(
            flat, config.num_device_groups, config.num_limited_devices, config.moe_router_topk
        )
        selected = routing_map(experts, self.num_experts)
        gates = gate_values(flat, experts, config.moe_router_topk_scaling_factor)
        if self.training and torch.is_grad_enabled():
            gates = self._with_balance_losses(gates, affinities, selected)
        return gates, selected

    def reset_counters(self) -> None:
        """Start a new window of monitoring."""
        self.expert_counts.zero_()
        self.balance_sums.zero_()
        self.num_microbatches.zero_()

    def _with_balance_losses(self, gates: Tensor, affinities: Tensor, selected: Tensor) -> Tensor:
        """Attach the losses to the gates: the autograd node scales them like the main loss."""
        config = self.config
        losses = balance_losses(
            affinities,
            selected.view(affinities.shape),
            config.num_limited_devices,
            config.num_device_groups,
        )
        self._count(losses, selected)
        weighted = (
            config.expert_balance_alpha * losses.expert
            + config.device_balance_alpha * losses.device
            + config.communication_balance_alpha * losses.communication
        )
        return MoEAuxLossAutoScaler.apply(gates, weighted)

    @torch.no_grad()
    def _count(self, losses: BalanceLosses, selected: Tensor) -> None:
        self.expert_counts += selected.sum(dim=0)
        self.balance_sums += (
            torch.stack([losses.expert, losses.device, losses.communication])
            .detach()
            .to(torch.float32)
        )
        self.num_microbatches += 1
