"""The output head and its loss as one operation.

`linear_cross_entropy(x, weight, labels) -> losses`
"""

# T tokens, h hidden size, V vocabulary

from typing import Any

import torch
from torch import Tensor

from dsv2_train.ops.main_grad import weight_gradient

# Rows of logits worked on at once: enough for a fast product, few enough for a CPU's cache.
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
        num_tokens, vocab_size = x.size(0), weight.size(0)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = x.new_empty(num_tokens, vocab_size + _PADDING, dtype=dtype)[:, :vocab_size]
        losses, sums = x.new_empty(2, num_tokens, 1, dtype=dtype)
        target = labels.unsqueeze(1)
        pieces = (torch.split(tensor, _ROWS) for tensor in (x, logits, losses, sums, target))
        for x_rows, rows, loss, total, label in zip(*pieces, strict=True):
            if rows.dtype == x.dtype:
                torch.mm(x_rows, weight.t(), out=rows)
            else:
                rows.copy_(torch.mm(x_rows, weight.t()))
            largest = rows.amax(dim=1, keepdim=True)
            rows.sub_(largest)
            picked = rows.gather(1, label)
            torch.sum(rows.exp_(), dim=1, keepdim=True, out=total)
            torch.sub(total.log(), picked, out=loss)
        # d loss / d logits = softmax - onehot(label) = (exp(logits) - sum onehot(label)) / sum.
        logits.scatter_add_(1, target, -sums)
        ctx.save_for_backward(x, weight, logits, sums)
        return losses.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, grad_logits, sums = ctx.saved_tensors
        share = (grad_losses.unsqueeze(1) / sums).to(x.dtype)
        grad_logits = grad_logits.to(x.dtype)
        grad_x = torch.mm(grad_logits, weight).mul_(share)
        return grad_x, weight_gradient(weight, grad_logits, x * share), None
