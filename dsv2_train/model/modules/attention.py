"""Multi-head latent attention (DeepSeek-V2, section 2.1) in megatron-core's slot for it."""

from typing import Any

import torch
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from dsv2_train.ops.attention import causal_attention
from dsv2_train.ops.kernels import TorchOrKernel
from dsv2_train.ops.latent_heads import latent_heads


class NoCoreAttention(nn.Module):
    """Fills megatron-core's slot for the softmax part, which `LatentAttention` computes itself."""

    def __init__(self, **_unused: Any) -> None:
        super().__init__()


class LatentAttention(MLASelfAttention):
    """megatron-core 0.16.1's MLA modules with our computation between them.

    Its local `DotProductAttention` refuses MLA's two head widths, and its assembly of query and key
    copies each of them several times. Attention is causal over the whole sample: documents in it
    are not masked from each other (the paper names no mask).
    """

    def __init__(self, *args: Any, rope: TorchOrKernel, backend: str | None, **kwargs: Any) -> None:
        """Add to megatron-core's arguments which code computes what is ours.

        Args:
            args: megatron-core's.
            rope: rotates and assembles the heads.
            backend: of attention on CUDA; None leaves it to torch.
            kwargs: megatron-core's.
        """
        super().__init__(*args, **kwargs)
        self.rope, self.backend = rope, backend

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """Attend (equations 37 to 47).

        Args:
            hidden_states: [s, b, hidden_size], normalised.
            attention_mask: must be None; causality needs no mask tensor.
            unused: what megatron-core passes for inference and packing; must all be None.

        Returns:
            [s, b, hidden_size] and no bias.
        """
        assert attention_mask is None
        assert all(value is None for value in unused.values()), unused
        query_source = hidden_states
        if self.config.q_lora_rank is not None:
            query_source, _ = self.linear_q_down_proj(hidden_states)
        latents, _ = self.linear_kv_down_proj(hidden_states)
        if self.recompute_up_proj and torch.is_grad_enabled():
            attended = self._attend_and_discard_heads(query_source, latents)
        else:
            query, key, value = self._heads(query_source, latents)
            attended = self._attend(query, key, value)
        return self.linear_proj(attended)[0], None

    def _heads(self, query_source: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Up-projections and rotation.

        Args:
            query_source: [s, b, q_lora_rank], or [s, b, hidden_size] without a query latent.
            latents: [s, b, kv_lora_rank + qk_rope_head_dim].

        Returns:
            Query, key and value heads as `latent_heads` returns them.
        """
        config = self.config
        head_shape = (*latents.shape[:2], config.num_attention_heads, -1)
        query = self._query(query_source).view(head_shape)
        kv_latent, k_rope = latents.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        kv, _ = self.linear_kv_up_proj(self.kv_layernorm(kv_latent))
        cos, sin = self._rotation(latents.size(0))
        return latent_heads(query, kv.view(head_shape), k_rope, cos, sin, self.rope)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query, key, value, self.softmax_scale, self.backend)

    def _attend_and_discard_heads(self, query_source: Tensor, latents: Tensor) -> Tensor:
        """Attention whose heads are computed again when its gradient has come."""
        up_projection = CheckpointWithoutOutput(fp8=None)  # its default asks for FP8
        query, key, value = up_projection.checkpoint(self._heads, query_source, latents)
        attended = self._attend(query, key, value)
        up_projection.discard_output_and_register_recompute(attended)
        return attended

    def _query(self, query_source: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.linear_q_proj(query_source)[0]
        return self.linear_q_up_proj(self.q_layernorm(query_source))[0]

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [length, qk_rope_head_dim / 2], YaRN's factor included."""
        angles, factor = self.rotary_pos_emb(length)
        angles = angles[:, 0, 0, : angles.size(-1) // 2]
        return angles.cos() * factor, angles.sin() * factor
