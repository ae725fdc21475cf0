"""The output head and its loss as one operation.

`linear_cross_entropy(x, weight, labels) -> losses`
"""

# T tokens, h hidden size, V vocabulary

from typing import Any

import torch
from torch import Tensor

from dsv2_train.ops.main_grad import weight_gradient

# Rows of logits worked on at once, so that they stay in a CPU's cache from product to softmax.
_ROWS = 256

# One cache line more than a power of two: rows that are whole pages apart would share few sets of
# the cache, which costs the products that read the softmax about 10%.
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
        Softmax in fp32 at least. Keeps T V numbers for the backward pass, made in place of the
        logits, and nothing else of that size; the backward pass can run once. No communication.
    """
    losses: Tensor = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, labels.flatten())
    return losses.view(labels.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        num_tokens, vocab_size = x.size(0), weight.size(0)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = x.new_empty(num_tokens, vocab_size + _PADDING, dtype=dtype)[:, :vocab_size]
        losses = x.new_empty(num_tokens, 1, dtype=dtype)
        target = labels.unsqueeze(1)
        pieces = (torch.split(tensor, _ROWS) for tensor in (x, logits, losses, target))
        for x_rows, rows, loss, label in zip(*pieces, strict=True):
            if rows.dtype == x.dtype:
                torch.mm(x_rows, weight.t(), out=rows)
            else:
                rows.copy_(torch.mm(x_rows, weight.t()))
            picked = rows.gather(1, label)
            largest = rows.amax(dim=1, keepdim=True)
            torch.softmax(rows, dim=1, out=rows)
            # The largest softmax is exp(largest - logsumexp), and at least 1 / V.
            log_sum = largest - rows.amax(dim=1, keepdim=True).log_()
            torch.sub(log_sum, picked, out=loss)
        # d loss / d logits = softmax - onehot(label), up to the token's share of the total.
        logits.scatter_add_(1, target, logits.new_tensor(-1.0).expand_as(target))
        ctx.save_for_backward(x, weight, logits)
        return losses.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, grad_logits = ctx.saved_tensors
        share = grad_losses.unsqueeze(1).to(x.dtype)
        grad_logits = grad_logits.to(x.dtype)
        grad_x = torch.mm(grad_logits, weight).mul_(share)
        return grad_x, weight_gradient(weight, grad_logits, x * share), None
