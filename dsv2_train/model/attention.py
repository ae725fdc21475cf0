"""The softmax part of multi-head latent attention, for megatron-core's MLA layer."""

from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dsv2_train.ops.attention import causal_attention


class CausalCoreAttention(nn.Module):
    """Causal attention over q/k heads of one width and v heads of another.

    Replaces megatron-core 0.16.1's local `DotProductAttention`, which refuses the two widths that
    MLA passes (`k_channels`, `v_channels`). The mask is always causal: DeepSeek-V2 packs documents
    without masking them from each other.
    """

    def __init__(
        self, config: TransformerConfig, *, softmax_scale: float, **_unused: Any
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, qk_head_dim].
            key: [s, b, heads, qk_head_dim].
            value: [s, b, heads, v_head_dim].
            attention_mask: must be None; causality needs no mask tensor.
            attn_mask_type: megatron-core's wish, must be causal where given.
            packed_seq_params: must be None.

        Returns:
            [s, b, heads * v_head_dim].
        """
        assert attention_mask is None and packed_seq_params is None
        assert attn_mask_type in (None, AttnMaskType.causal)
        return causal_attention(query, key, value, self.softmax_scale)
