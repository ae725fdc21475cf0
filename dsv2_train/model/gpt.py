"""megatron-core's GPTModel with the head and its loss as one operation."""

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from dsv2_train.ops.cross_entropy import linear_cross_entropy


class DeepSeekV2Model(GPTModel):
    """One pipeline stage of the model (read against megatron-core 0.16.1)."""

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **unused: Any) -> Tensor:
        """End a stage.

        Args:
            hidden_states: [s, b, hidden_size] after the stage's layers.
            labels: [b, s] int64, or None to get logits.
            unused: what megatron-core passes for other heads and for inference.

        Returns:
            [b, s] losses on the last stage, or [b, s, vocab_size] logits without labels; on other
            stages `hidden_states`.
        """
        del unused
        if not self.post_process:
            return hidden_states
        if labels is not None:
            losses = linear_cross_entropy(hidden_states, self.output_layer.weight, labels.t())
            return losses.t()
        logits, _ = self.output_layer(hidden_states)
        return logits.transpose(0, 1)
