"""Gated feed-forward parts in megatron-core's slots for them."""

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from dsv2_train.ops.swiglu import swiglu


class GatedMLP(MLP):
    """The dense feed-forward part: W_down (silu(W_gate x) * (W_up x))."""

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[s, b, hidden_size] -> the same, and no bias; `padding_mask` must be None."""
        assert padding_mask is None
        return _gated(self, hidden_states), None


class SharedExperts(SharedExpertMLP):
    """The shared experts of a layer, run as one gated feed-forward part without a gate value."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, hidden_size] -> the same."""
        return _gated(self, hidden_states)


def _gated(mlp: MLP, hidden_states: Tensor) -> Tensor:
    projected, _ = mlp.linear_fc1(hidden_states)
    output, _ = mlp.linear_fc2(swiglu(projected))
    return output
