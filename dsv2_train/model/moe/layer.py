"""The mixture-of-experts layer."""

# S positions, B sequences, T = S * B tokens, E routed experts, K experts a token, h hidden size

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsv2_train.model.moe.capacity import DeviceCapacity
from dsv2_train.model.moe.dispatcher import (
    Dispatch,
    ExpertParallelDispatch,
    LocalDispatch,
    MegatronDispatch,
)
from dsv2_train.model.moe.router import Routing
from dsv2_train.model.moe.routing import routing_map
from dsv2_train.model.moe.statistics import count, num_statistics
from dsv2_train.model.transformer_config import DeepSeekV2TransformerConfig
from dsv2_train.ops.kernels import TorchOrKernel


class MixtureOfExperts(MoELayer):
    """DeepSeekMoE across devices, in megatron-core 0.16.1's place for a layer of experts.

    Attributes:
        exempt: [B] bool, sequences of the next microbatch that lose nothing to device capacity.
            Required in training with a capacity, not read otherwise.
        statistics: [W] float64, flat `LayerStatistics` of this rank's training tokens, added up
            until someone zeroes it.
    """

    exempt: Tensor | None = None
    statistics: Tensor

    def __init__(
        self,
        config: DeepSeekV2TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        dispatcher: str,
        permute: TorchOrKernel,
    ) -> None:
        """Build as megatron-core does.

        Args:
            config: of the model.
            submodules: classes of router, routed and shared experts.
            layer_number: of the layer, from 1.
            pg_collection: the rank's process groups.
            dispatcher: as `implementation.choose` resolved it; `none` where nothing travels.
            permute: which code orders the rows of all dispatchers but megatron-core's.
        """
        super().__init__(config, submodules, layer_number, pg_collection)
        self._dispatcher, self._permute = dispatcher, permute
        self._capacity: DeviceCapacity | None = None
        if config.capacity_factor is not None:
            group = self.ep_group if config.capacity_scope == "ep_group" else None
            self._capacity = DeviceCapacity(config.capacity_factor, config.num_device_groups, group)
        width = num_statistics(config.num_moe_experts, config.num_device_groups)
        zeros = torch.zeros(width, dtype=torch.float64, device=self.router.weight.device)
        self.register_buffer("statistics", zeros, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Shared experts plus the gated sum of the routed ones (equation 20, without residual).

        Args:
            hidden_states: [S, B, h], normalised.
            intermediate_tensors: must be None.
            padding_mask: must be None; samples are packed full.

        Returns:
            [S, B, h] and no bias.

        Note:
            Communication: see `DeviceCapacity` and `ExpertParallelDispatch`. Recomputation repeats
            what follows the routing: it is decided, counted and its losses are attached once.
        """
        assert intermediate_tensors is None and padding_mask is None
        routing = self.router(hidden_states)
        learns = self.training and torch.is_grad_enabled()
        routed = self._drop_and_count(routing) if learns else routing.selected
        # How many are left after dropping is not known without a look at them.
        num_rows = routing.experts.numel() if routed is routing.selected else None
        if learns and self.moe_layer_recompute:
            # Stopping early would leave unwaited the exchange that is recomputed last.
            output: Tensor = checkpoint(
                self._mix,
                hidden_states,
                routing.gates,
                routed,
                num_rows,
                use_reentrant=False,
                preserve_rng_state=False,
                early_stop=False,
            )
            return output, None
        return self._mix(hidden_states, routing.gates, routed, num_rows), None

    def _drop_and_count(self, routing: Routing) -> Tensor:
        """[T, E] bool, the assignments that are computed."""
        config, kept = self.config, None
        if self._capacity is not None:
            assert self.exempt is not None, "capacity needs to know which sequences are exempt"
            kept = self._capacity.decide(routing.affinities, routing.experts, self.exempt)
        exempt = None if kept is None else self.exempt
        self.statistics += count(routing, kept, exempt, config.num_device_groups).flatten()
        if kept is None:
            return routing.selected
        return routing_map(routing.experts, routing.selected.size(1), kept)

    def _mix(
        self, hidden_states: Tensor, gates: Tensor, routed: Tensor, num_rows: int | None
    ) -> Tensor:
        """[S, B, h], gate values [T, E] and assignments [T, E] -> the layer's output [S, B, h]."""
        overlap = self.config.overlap_shared_experts
        dispatch = self._dispatch(hidden_states.flatten(0, 1), gates, routed, num_rows)
        activation = self.shared_experts.activation(hidden_states) if overlap else None
        rows = dispatch.arrived()
        expert_output, _ = self.experts(rows.rows, rows.tokens_per_expert, rows.gates)
        dispatch.issue_combine(expert_output)
        shared = None if activation is None else self.shared_experts.output(activation)
        combined = dispatch.combined().view_as(hidden_states)
        return combined + (self.shared_experts(hidden_states) if shared is None else shared)

    def _dispatch(
        self, tokens: Tensor, gates: Tensor, routed: Tensor, num_rows: int | None
    ) -> Dispatch:
        if self._dispatcher == "none":
            return LocalDispatch(tokens, gates, routed, self._permute, num_rows)
        if self._dispatcher == "device_dedup":
            return ExpertParallelDispatch(tokens, gates, routed, self.ep_group, self._permute)
        return MegatronDispatch(tokens, gates, routed, self.token_dispatcher)
