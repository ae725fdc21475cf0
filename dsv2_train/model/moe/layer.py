"""The mixture-of-experts layer."""

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from dsv2_train.ops.permute import gather_gates, permute, row_plan, unpermute


class MixtureOfExperts(MoELayer):
    """megatron-core 0.16.1's layer: its all-to-all between expert ranks, none on a single one."""

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Shared experts plus the gated sum of the routed ones (equation 20, without residual).

        Args:
            hidden_states: [s, b, hidden_size], normalised.
            intermediate_tensors: must be None.
            padding_mask: must be None; samples are packed full.

        Returns:
            [s, b, hidden_size] and no bias. With ep > 1: one all-gather of counts and two
            all-to-alls over the expert-parallel group, and the same again in the backward pass.
        """
        assert intermediate_tensors is None and padding_mask is None
        if self.ep_group.size() > 1:
            return super().forward(hidden_states)
        gates, routed = self.route(hidden_states)
        plan = row_plan(routed)
        rows = permute(hidden_states.flatten(0, 1), plan)
        expert_output, _ = self.experts(rows, plan.tokens_per_expert, gather_gates(gates, plan))
        shared = self.shared_experts(hidden_states)
        return unpermute(expert_output, plan).view_as(shared) + shared, None
