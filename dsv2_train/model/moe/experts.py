"""The routed experts of one rank as a single grouped computation."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from dsv2_train.model.transformer_config import DeepSeekV2TransformerConfig
from dsv2_train.ops.kernels import TorchOrKernel
from dsv2_train.ops.moe.grouped_experts import Implementation, grouped_experts


class GroupedExperts(nn.Module):
    """SwiGLU experts with stacked weights, for megatron-core's MoE layer.

    Attributes:
        fc1: [local experts, 2 * moe_intermediate_size, hidden_size]; gate rows first, then up.
        fc2: [local experts, hidden_size, moe_intermediate_size].
    """

    def __init__(
        self,
        num_local_experts: int,
        config: DeepSeekV2TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        implementation: Implementation,
        activation: TorchOrKernel,
    ) -> None:
        super().__init__()
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        self.fc1 = _stacked(num_local_experts, 2 * width, hidden, config)
        self.fc2 = _stacked(num_local_experts, hidden, width, config)
        self.implementation = implementation
        self.activation = activation

    def forward(
        self, rows: Tensor, tokens_per_expert: Tensor, gates: Tensor
    ) -> tuple[Tensor, None]:
        """Run each expert on its rows.

        Args:
            rows: [T, hidden_size], sorted by local expert.
            tokens_per_expert: [local experts] int64, rows of each.
            gates: [T], gate value of each row; multiplies the activation.

        Returns:
            [T, hidden_size] and no bias.
        """
        output = grouped_experts(
            rows,
            tokens_per_expert,
            self.fc1,
            self.fc2,
            gates,
            implementation=self.implementation,
            activation=self.activation,
        )
        return output, None


def _stacked(
    num_experts: int, rows: int, columns: int, config: DeepSeekV2TransformerConfig
) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(num_experts, rows, columns, dtype=config.params_dtype))
    # megatron-core reduces a parameter so marked over the expert-data-parallel group only.
    weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
    return weight
