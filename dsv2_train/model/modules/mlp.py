"""Gated feed-forward parts in megatron-core's slots for them."""

from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from dsv2_train.ops.kernels import TorchOrKernel
from dsv2_train.ops.swiglu import swiglu


class GatedMLP(MLP):
    """The dense feed-forward part: W_down (silu(W_gate x) * (W_up x))."""

    def __init__(self, *arguments: Any, activation: TorchOrKernel, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.activation_implementation = activation

    def forward(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[s, b, hidden_size] -> the same, and no bias; `padding_mask` must be None."""
        assert padding_mask is None
        return _output(self, _activation(self, hidden_states)), None


class SharedExperts(SharedExpertMLP):
    """The shared experts of a layer, run as one gated feed-forward part without a gate value."""

    def __init__(self, *arguments: Any, activation: TorchOrKernel, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.activation_implementation = activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, hidden_size] -> the same."""
        return self.output(self.activation(hidden_states))

    def activation(self, hidden_states: Tensor) -> Tensor:
        """The first half: [s, b, hidden_size] -> [s, b, width of all shared experts]."""
        return _activation(self, hidden_states)

    def output(self, activation: Tensor) -> Tensor:
        """The second half, back to [s, b, hidden_size]."""
        return _output(self, activation)


def _activation(mlp: GatedMLP | SharedExperts, hidden_states: Tensor) -> Tensor:
    return swiglu(mlp.linear_fc1(hidden_states)[0], mlp.activation_implementation)


def _output(mlp: MLP, activation: Tensor) -> Tensor:
    return mlp.linear_fc2(activation)[0]
