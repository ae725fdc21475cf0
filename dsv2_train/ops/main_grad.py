"""Where a weight's gradient goes, and when: into megatron-core's gradient buffer, now or later.

megatron-core's data-parallel wrapper gives each parameter `main_grad`, a view of one contiguous
gradient buffer, and `grad_added_to_main_grad`. An op that adds its weight gradient to `main_grad`
itself and sets the flag saves a gradient tensor of the weight's size and a pass over it. It keeps
the weight on `ctx`: in what torch's checkpoint recomputes, `ctx.saved_tensors` are copies without
these attributes.

A zero-bubble pipeline computes weight gradients apart from the backward pass (W after B):

    deferred = DeferredGradients(model.parameters())
    with deferred.collecting() as pending:
        loss.backward()                 # input gradients alone
    ...
    for gradient in pending:
        gradient.add()                  # weight gradients
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Deferred:
    """A weight gradient that has not been computed; what it needs is held until then.

    Attributes:
        weight: whose.
        compute: adds the gradient to the weight's `main_grad`.
    """

    weight: Tensor
    compute: Callable[[], object]

    @torch.no_grad()
    def add(self) -> None:
        """Compute it and add it to the weight's `main_grad`; to be called once."""
        self.compute()


class DeferredGradients:
    """Puts off the weight gradients of some weights while a backward pass collects them.

    Args:
        weights: with `main_grad`; from now on their ops ask here.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._pending: list[Deferred] | None = None
        for weight in weights:
            # On the weight, since its op has nothing else at hand in the backward pass.
            weight.deferred_gradients = self  # type: ignore[attr-defined]

    @contextmanager
    def collecting(self) -> Iterator[list[Deferred]]:
        """Backward passes inside leave their weight gradients in the list, in their order."""
        assert self._pending is None, "a backward pass is collecting already"
        pending: list[Deferred] = []
        self._pending = pending
        try:
            yield pending
        finally:
            self._pending = None

    @property
    def is_collecting(self) -> bool:
        """Whether a backward pass collects now."""
        return self._pending is not None

    def put_off(self, gradient: Deferred) -> bool:
        """Keep a gradient for later; False if nothing collects."""
        if self._pending is None:
            return False
        self._pending.append(gradient)
        return True


def gradient_buffer(weight: Tensor) -> Tensor | None:
    """The buffer that `weight`'s gradient is to be added to, None where autograd keeps it."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    return buffer


def add_gradient(weight: Tensor, add: Callable[[Tensor], object]) -> Tensor:
    """Add to `weight`'s gradient: into its buffer, now or when it is asked for, or for autograd.

    Args:
        weight: of any shape.
        add: adds the gradient to a tensor of that shape, in the buffer's dtype or the weight's.

    Returns:
        What backward hands to autograd for `weight`.
    """
    buffer = gradient_buffer(weight)
    if buffer is None:
        gradient = torch.zeros_like(weight)
        add(gradient)
        return gradient
    deferred: DeferredGradients | None = getattr(weight, "deferred_gradients", None)
    if deferred is None or not deferred.put_off(Deferred(weight, partial(add, buffer))):
        add(buffer)
    return mark_added(weight)


def add_products(weight: Tensor, rows: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Add the gradient of `weight` in y = x weight^T.

    Args:
        weight: [b, a].
        rows: the gradient of y [T, b] and x [T, a], in as many pieces along T as there are; the
            product is taken in the dtype of the first.

    Returns:
        What backward hands to autograd for `weight`.
    """
    pieces = list(rows)

    def add(gradient: Tensor) -> None:
        for grad_y, x in pieces:
            wide_x = x.to(grad_y.dtype)
            if gradient.dtype == grad_y.dtype:
                gradient.addmm_(grad_y.t(), wide_x)
            else:
                gradient.add_(torch.mm(grad_y.t(), wide_x))

    return add_gradient(weight, add)


def mark_added(weight: Tensor) -> Tensor:
    """Say that `weight`'s gradient is in its buffer, or will be.

    Returns:
        An uninitialized tensor like `weight`: the wrapper's hook asserts that some gradient
        exists when reductions overlap the backward pass, and drops it unread. Its memory is never
        touched.
    """
    assert not getattr(weight, "zero_out_wgrad", False), "embedding and head are not tied here"
    # megatron-core's mark, which its hook reads.
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)
