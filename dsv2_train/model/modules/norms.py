"""RMSNorm as DeepSeek-V2 uses it, for megatron-core's spec slots."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dsv2_train.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """`weight * cast(x / sqrt(mean(x^2) + eps))`, statistics in fp32 (fp64 for fp64 input).

    Args:
        config: gives the weight's dtype.
        hidden_size: width of the last dimension.
        eps: added to the mean square.
        scale: constant factor on the output; the paper's scaling at the latent bottlenecks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-6,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> same shape and dtype."""
        normed = rms_norm(x, self.weight, self.eps)
        return normed if self.scale == 1.0 else normed * self.scale


class LatentNorm(RMSNorm):
    """The norm of a compressed latent: eps is 1e-6 whatever the model's is, as released.

    Args:
        config: gives the weight's dtype.
        hidden_size: width of the latent.
        eps: the model's, which does not apply here.
        scale: constant factor on the output.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, scale: float
    ) -> None:
        del eps
        super().__init__(config, hidden_size, eps=1e-6, scale=scale)
