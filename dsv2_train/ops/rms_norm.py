"""Root-mean-square normalization with a hand-written gradient.

`rms_norm(x, weight, eps) -> y`
"""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last dimension: weight * x / sqrt(mean(x^2) + eps).

    Args:
        x: [..., h].
        weight: [h] in the dtype of `x`.
        eps: added to the mean square.

    Returns:
        Like `x`.

    Note:
        Statistics in fp32 at least; `x` is normalized and rounded to its dtype, then multiplied by
        the weight. Saves `x` and one number a row. No communication.
    """
    y: Tensor = _RMSNorm.apply(x, weight, eps)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normalized: Tensor = (wide * scale).to(x.dtype)
        return normalized.mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        width = x.size(-1)
        rows, grad_rows = _wide(x).reshape(-1, width), _wide(grad_y).reshape(-1, width)
        wide_weight, scale = _wide(weight), scale.view(-1, 1)
        # y = w s x with s = (mean(x^2) + eps)^(-1/2): ds/dx = -s^3 x / width.
        products = grad_rows * rows
        grad_weight = torch.mv(products.t(), scale.squeeze(1))
        grad_scale = torch.mv(products, wide_weight).unsqueeze(1)
        grad_x = (grad_rows * wide_weight).mul_(scale)
        grad_x.addcmul_(rows, grad_scale.mul_(scale.pow(3)), value=-1 / width)
        return grad_x.to(x.dtype).view(x.shape), grad_weight.to(weight.dtype), None


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is so already."""
    return x if x.dtype == torch.float64 else x.float()
