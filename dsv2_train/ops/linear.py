"""Linear layer and embedding whose weight gradients go where the optimizer reads them.

`linear(x, weight) -> y` and `embedding(tokens, weight) -> x`
"""

from typing import Any

import torch
from torch import Tensor

from dsv2_train.ops.main_grad import add_gradient, add_products


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply every row by the weight: x weight^T.

    Args:
        x: [..., a].
        weight: [b, a] in the dtype of `x`; its gradient is added to `main_grad` where it has one
            (see `ops.main_grad`).
        dtype: of the products, forward and backward; that of `x` by default.

    Returns:
        [..., b] in `dtype`. No communication.

    Note:
        Saves `x` as it is, not in `dtype`.
    """
    y: Tensor = _Linear.apply(x, weight, dtype or x.dtype)
    return y


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Look up rows of the weight.

    Args:
        tokens: [...] int64 in [0, V).
        weight: [V, h]; its gradient is added to `main_grad` where it has one, row by row, without
            a gradient of the weight's size.

    Returns:
        [..., h] in the dtype of `weight`.

    Note:
        The gradient is deterministic. No communication.
    """
    x: Tensor = _Embedding.apply(tokens, weight)
    return x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        needs_x, needs_weight, _ = ctx.needs_input_grad
        rows = grad_y.reshape(-1, grad_y.size(-1))
        grad_x = (
            torch.mm(rows, weight.to(rows.dtype)).to(x.dtype).view(x.shape) if needs_x else None
        )
        if not needs_weight:
            return grad_x, None, None
        return (
            grad_x,
            add_products(weight, [(rows, x.reshape(-1, x.size(-1)))]),
            None,
        )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors

        def add(gradient: Tensor) -> None:
            rows = grad_x.flatten(0, -2).to(gradient.dtype)
            if gradient.is_cuda:  # index_add_ adds in any order there
                gradient.index_put_((tokens.flatten(),), rows, accumulate=True)
            else:
                gradient.index_add_(0, tokens.flatten(), rows)

        return None, add_gradient(ctx.weight, add)
