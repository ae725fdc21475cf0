"""The output head and its loss as one operation.

`linear_cross_entropy(x, weight, labels) -> losses`
"""

# T tokens, h hidden size, V vocabulary

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv2_train.ops.main_grad import add_products

# Rows of logits worked on at once: enough for a fast product, few enough for a CPU's cache, and for
# an allocation that the C library reuses, where it would take larger ones anew from the system.
_ROWS = 512

# One cache line more than a power of two: rows that are whole pages apart would share few sets of
# the cache, which costs the products that read them about 10%.
_PADDING = 16


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(x weight^T)[label] for every token.

    Args:
        x: [..., h].
        weight: [V, h] in the dtype of `x`; its gradient is added to `main_grad` where it has one
            (see `ops.main_grad`).
        labels: [...] int64 in [0, V).

    Returns:
        [...] float32 (float64 for float64 `x`).

    Note:
        Softmax in fp32 at least. Keeps T V numbers of that precision for the backward pass, made in
        place of the logits, and nothing else of that size. No communication.
    """
    losses: Tensor = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, labels.flatten())
    return losses.view(labels.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        losses, sums = x.new_empty(2, x.size(0), 1, dtype=dtype)
        blocks = []
        for x_rows, loss, total, label in _by_rows(x, losses, sums, labels.unsqueeze(1)):
            logits = _logits(x_rows, weight, dtype)
            logits.sub_(logits.amax(dim=1, keepdim=True))
            picked = logits.gather(1, label)
            torch.sum(logits.exp_(), dim=1, keepdim=True, out=total)
            torch.sub(total.log(), picked, out=loss)
            # d loss / d logits = softmax - onehot(label) = (exp(logits) - sum onehot(label)) / sum.
            blocks.append(logits.scatter_add_(1, label, -total))
        ctx.save_for_backward(x, sums, *blocks)
        ctx.weight = weight
        return losses.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None]:
        x, sums, *blocks = ctx.saved_tensors
        share = (grad_losses.unsqueeze(1) / sums).to(x.dtype)
        grad_x, shared_x = torch.empty_like(x), x * share
        grad_logits = [block.to(x.dtype) for block in blocks]
        for block, (grad_rows,) in zip(grad_logits, _by_rows(grad_x), strict=True):
            torch.mm(block, ctx.weight, out=grad_rows)
        pairs = zip(grad_logits, torch.split(shared_x, _ROWS), strict=True)
        return grad_x.mul_(share), add_products(ctx.weight, pairs), None


def _by_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, _ROWS) for tensor in tensors), strict=True)


def _logits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, h] -> [T, V] in `dtype`, in rows of one cache line more."""
    padded = x.new_empty(x.size(0), weight.size(0) + _PADDING, dtype=dtype)
    logits = padded[:, : weight.size(0)]
    if dtype == x.dtype:
        return torch.mm(x, weight.t(), out=logits)
    return logits.copy_(torch.mm(x, weight.t()))
