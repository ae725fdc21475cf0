"""Linear layers of experts over rows sorted by expert, expert by expert in plain torch."""

# T rows, E experts, A input and B output channels

from itertools import pairwise

from torch import Tensor


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """[T, A] rows, [E, B, A] weights and [E] ends of experts' rows -> [T, B]."""
    return grouped_linear_dgrad(x, weights.mT, ends)


def grouped_linear_dgrad(grad_y: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the rows [T, A], from that of the output [T, B]."""
    grad_x = grad_y.new_empty(grad_y.size(0), weights.size(2))
    for expert, rows in _spans(ends):
        grad_x[rows] = grad_y[rows] @ weights[expert]
    return grad_x


def grouped_linear_wgrad_(main_grad: Tensor, grad_y: Tensor, x: Tensor, ends: Tensor) -> None:
    """Add the weights' gradient, a product in the dtype of the rows, to `main_grad` [E, B, A]."""
    for expert, rows in _spans(ends):
        main_grad[expert] += grad_y[rows].t() @ x[rows]


def grouped_linear_accumulate_(main_grad: Tensor, gradient: Tensor, ends: Tensor) -> None:
    """Add `gradient` [E, B, A] to `main_grad` [E, B, A] for experts that have rows."""
    for expert, _ in _spans(ends):
        main_grad[expert] += gradient[expert]


def _spans(ends: Tensor) -> list[tuple[int, slice]]:
    """Experts that have rows, and which; reads the ends back from a GPU."""
    found = enumerate(pairwise([0, *ends.tolist()]))
    return [(expert, slice(begin, end)) for expert, (begin, end) in found if begin < end]
