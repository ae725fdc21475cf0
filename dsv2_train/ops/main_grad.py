"""Where a weight's gradient goes: into megatron-core's gradient buffer, or back to autograd.

megatron-core's data-parallel wrapper gives each parameter `main_grad`, a view of one contiguous
gradient buffer, and `grad_added_to_main_grad`. An op that adds its weight gradient to `main_grad`
itself and sets the flag saves a gradient tensor of the weight's size and a pass over it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_buffer(weight: Tensor) -> Tensor | None:
    """The buffer that `weight`'s gradient is to be added to, None where autograd keeps it."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    return buffer


def mark_added(weight: Tensor) -> Tensor:
    """Say that `weight`'s gradient is in its buffer; returns what backward hands to autograd.

    Returns:
        An uninitialized tensor like `weight`: the wrapper's hook asserts that some gradient
        exists when reductions overlap the backward pass, and drops it unread. Its memory is never
        touched.
    """
    assert not getattr(weight, "zero_out_wgrad", False), "embedding and head are not tied here"
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


def weight_gradient(weight: Tensor, rows: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradient of `weight` in y = x weight^T, added to its buffer where it has one.

    Args:
        weight: [b, a].
        rows: the gradient of y [T, b] and x [T, a], in as many pieces along T as there are.

    Returns:
        What backward hands to autograd for `weight`.
    """
    buffer = gradient_buffer(weight)
    gradient = torch.zeros_like(weight) if buffer is None else buffer
    for grad_y, x in rows:
        if gradient.dtype == x.dtype:
            gradient.addmm_(grad_y.t(), x)
        else:
            gradient.add_(torch.mm(grad_y.t(), x))
    return gradient if buffer is None else mark_added(weight)
