"""A linear layer without bias, whose weight gradient goes where the optimizer reads it.

`linear(x, weight) -> y`
"""

from typing import Any

import torch
from torch import Tensor

from dsv2_train.ops.main_grad import weight_gradient


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply every row by the weight: x weight^T.

    Args:
        x: [..., a].
        weight: [b, a] in the dtype of `x`; its gradient is added to `main_grad` where it has one
            (see `ops.main_grad`).

    Returns:
        [..., b] in the dtype of `x`. No communication.
    """
    y: Tensor = _Linear.apply(x, weight)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        rows = grad_y.reshape(-1, grad_y.size(-1))
        grad_x = torch.mm(rows, weight).view(x.shape) if needs_x else None
        if not needs_weight:
            return grad_x, None
        return grad_x, weight_gradient(weight, [(rows, x.reshape(-1, x.size(-1)))])
