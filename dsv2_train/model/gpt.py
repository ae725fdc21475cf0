"""megatron-core's GPTModel with the head and its loss as one operation."""

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from dsv2_train.model.moe.layer import MixtureOfExperts
from dsv2_train.ops.cross_entropy import linear_cross_entropy
from dsv2_train.ops.linear import linear


class OutputHead(nn.Module):
    """The head and its loss in one module.

    A module of its own, because the gathering of its weight is waited for before its forward pass.

    Args:
        weight: [vocab_size, hidden_size], taken over with its attributes.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Losses, or logits without labels.

        Args:
            x: [s, b, hidden_size], after the final norm.
            labels: [s, b] int64.

        Returns:
            [s, b], or [s, b, vocab_size].
        """
        if labels is None:
            return linear(x, self.weight)
        return linear_cross_entropy(x, self.weight, labels)


class DeepSeekV2Model(GPTModel):
    """One chunk of the model (read against megatron-core 0.16.1)."""

    def forward(self, *inputs: Any, exempt: Tensor | None = None, **named: Any) -> Tensor:
        """Run the chunk.

        Args:
            inputs: megatron-core's.
            exempt: [b] bool, samples of which no assignment is dropped. Required in training with
                a capacity, not read otherwise.
            named: megatron-core's.
        """
        for mixture in self.mixtures().values():
            mixture.exempt = exempt
        return super().forward(*inputs, **named)

    def mixtures(self) -> dict[int, MixtureOfExperts]:
        """This chunk's mixtures of experts by the index of their layer in the whole model."""
        return {
            layer.layer_number - 1: layer.mlp
            for layer in self.decoder.layers
            if isinstance(layer.mlp, MixtureOfExperts)
        }

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **unused: Any) -> Tensor:
        """End a chunk.

        Args:
            hidden_states: [s, b, hidden_size] after the chunk's layers.
            labels: [b, s] int64, or None to get logits.
            unused: what megatron-core passes for other heads and for inference.

        Returns:
            [b, s] losses in the last chunk, or [b, s, vocab_size] logits without labels; in other
            chunks `hidden_states`.
        """
        del unused
        if not self.post_process:
            return hidden_states
        by_position = self.output_layer(hidden_states, None if labels is None else labels.t())
        return by_position.transpose(0, 1)
