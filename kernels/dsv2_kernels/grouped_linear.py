"""Linear layers of experts over rows sorted by expert: y_r = W_e x_r for each row r of expert e.

`grouped_linear(x, weights, ends) -> y`

The products are torch's grouped matrix multiplication; what is ours is the addition of the weights'
gradient to fp32 `main_grad`. On Hopper and for bf16 torch has one kernel for all experts; for other
GPUs and dtypes it multiplies expert by expert and waits for `ends` on the host.
"""

# T rows, E experts, A input and B output channels

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from dsv2_kernels.native.checks import Arguments
from dsv2_kernels.native.library import checks_indices, launch
from dsv2_kernels.native.registry import register
from dsv2_kernels.reference import grouped_linear as reference


def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply each row with its expert's weights.

    Args:
        x: [T, A] float32, bfloat16 or float16, rows of expert 0 first, then of expert 1, and so
            on. For kernels a row is a multiple of 16 bytes.
        weights: [E, B, A] in the dtype of `x`. For kernels B elements are a multiple of 16 bytes.
        ends: [E] int32, one past the last row of each expert: ascending, the last is T. A GPU
            looks only where kernels are built for debugging.

    Returns:
        [T, B] in the dtype of `x`; summed in fp32.

    Raises:
        TypeError, ValueError: a dtype, shape or ends that are not supported; for kernels also a
            stride or an address.

    Note:
        Saves x and weights. Its gradient takes an fp32 buffer of the weights' shape: where there
        is `main_grad`, call `grouped_linear_dgrad` and `grouped_linear_wgrad_` instead. No
        communication.
    """
    y: Tensor = _forward(x, weights, ends)
    return y


def grouped_linear_dgrad(grad_y: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The gradient of the rows.

    Args:
        grad_y: [T, B].
        weights: [E, B, A].
        ends: [E] int32.

    Returns:
        [T, A] in the dtype of `grad_y`.
    """
    grad_x: Tensor = _dgrad(grad_y, weights, ends)
    return grad_x


def grouped_linear_wgrad_(main_grad: Tensor, grad_y: Tensor, x: Tensor, ends: Tensor) -> None:
    """Add the gradient of the weights to `main_grad`.

    Args:
        main_grad: [E, B, A] float32; that of an expert without rows is not touched.
        grad_y: [T, B].
        x: [T, A].
        ends: [E] int32.

    Note:
        Deterministic. The product of an expert is summed in fp32 and rounded to the dtype of `x`
        before it is added; it takes a tensor of the weights' size in that dtype.
    """
    _wgrad(main_grad, grad_y, x, ends)


def grouped_linear_accumulate_(main_grad: Tensor, gradient: Tensor, ends: Tensor) -> None:
    """Add to `main_grad` a gradient that is undefined for experts without rows.

    Args:
        main_grad: [E, B, A] float32.
        gradient: [E, B, A] float32, bfloat16 or float16; read for experts that have rows.
        ends: [E] int32.

    Note:
        Deterministic. One launch, no host synchronization.
    """
    _accumulate(main_grad, gradient, ends)


def _check_forward(arguments: Arguments, x: Tensor, weights: Tensor, ends: Tensor) -> None:
    arguments.tensor("x", x, [None, None], arguments.floats)
    _check_product(arguments, x, weights, [None, None, x.size(1)], ends)


def _check_dgrad(arguments: Arguments, grad_y: Tensor, weights: Tensor, ends: Tensor) -> None:
    arguments.tensor("grad_y", grad_y, [None, None], arguments.floats)
    _check_product(arguments, grad_y, weights, [None, grad_y.size(1), None], ends)


def _check_product(
    arguments: Arguments, rows: Tensor, weights: Tensor, shape: list[int | None], ends: Tensor
) -> None:
    arguments.tensor("weights", weights, shape, [rows.dtype], rows.device)
    _check_widths(arguments, "weights", weights, rows.dtype)
    _check_ends(arguments, ends, weights, rows.size(0))


def _check_wgrad(
    arguments: Arguments, main_grad: Tensor, grad_y: Tensor, x: Tensor, ends: Tensor
) -> None:
    arguments.tensor("x", x, [None, None], arguments.floats)
    arguments.tensor("grad_y", grad_y, [x.size(0), None], [x.dtype], x.device)
    shape = [None, grad_y.size(1), x.size(1)]
    arguments.tensor("main_grad", main_grad, shape, arguments.wide, x.device)
    _check_widths(arguments, "main_grad", main_grad, x.dtype)
    _check_ends(arguments, ends, main_grad, x.size(0))


def _check_accumulate(
    arguments: Arguments, main_grad: Tensor, gradient: Tensor, ends: Tensor
) -> None:
    arguments.tensor("gradient", gradient, [None, None, None], arguments.floats)
    arguments.tensor("main_grad", main_grad, gradient.shape, arguments.wide, gradient.device)
    _check_widths(arguments, "gradient", gradient, gradient.dtype)
    _check_ends(arguments, ends, gradient)


def _check_widths(arguments: Arguments, name: str, weights: Tensor, dtype: torch.dtype) -> None:
    arguments.vectors(name, weights.size(1), dtype, "output channels")
    arguments.vectors(name, weights.size(2), dtype, "input channels")


def _check_ends(
    arguments: Arguments, ends: Tensor, weights: Tensor, num_rows: int | None = None
) -> None:
    """Refuse ends that descend, or where `num_rows` is given do not end with it.

    On a GPU this reads them back: only in debug builds, and where no kernel of ours reads them.
    """
    arguments.tensor("ends", ends, [weights.size(0)], [torch.int32], weights.device)
    if arguments.for_kernel and (num_rows is None or not checks_indices()):
        return
    bounds = [0, *ends.tolist()]
    fits = sorted(bounds) == bounds and num_rows in (None, bounds[-1])
    expected = "" if num_rows is None else f" up to {num_rows}, the number of rows"
    arguments.require(fits, "ends", bounds[1:], f"ascending numbers{expected}")


def _multiply(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    if not (x.numel() and weights.numel()):
        return x.new_zeros(x.size(0), weights.size(1))
    return grouped_mm(x, weights.mT, offs=ends)


def _multiply_back(grad_y: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    if not (grad_y.numel() and weights.numel()):
        return grad_y.new_zeros(grad_y.size(0), weights.size(2))
    return grouped_mm(grad_y, weights, offs=ends)


def _add_gradient(main_grad: Tensor, grad_y: Tensor, x: Tensor, ends: Tensor) -> None:
    if x.size(0) and main_grad.numel():
        _launch(main_grad, grouped_mm(grad_y.t(), x, offs=ends), ends)


def _launch_accumulate(main_grad: Tensor, gradient: Tensor, ends: Tensor) -> None:
    if gradient.numel():
        _launch(main_grad, gradient, ends)


def _launch(main_grad: Tensor, gradient: Tensor, ends: Tensor) -> None:
    num_experts, size = gradient.size(0), gradient[0].numel()
    launch(
        "grouped_linear_accumulate", main_grad, gradient, ends, num_experts, size, gradient.dtype
    )


def _fake_forward(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.size(0), weights.size(1))


def _fake_dgrad(grad_y: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return grad_y.new_empty(grad_y.size(0), weights.size(2))


def _fake_wgrad(main_grad: Tensor, grad_y: Tensor, x: Tensor, ends: Tensor) -> None:
    return None


def _fake_accumulate(main_grad: Tensor, gradient: Tensor, ends: Tensor) -> None:
    return None


_forward = register(
    "grouped_linear", _check_forward, _multiply, reference.grouped_linear, _fake_forward
)
_dgrad = register(
    "grouped_linear_dgrad",
    _check_dgrad,
    _multiply_back,
    reference.grouped_linear_dgrad,
    _fake_dgrad,
)
_wgrad = register(
    "grouped_linear_wgrad_",
    _check_wgrad,
    _add_gradient,
    reference.grouped_linear_wgrad_,
    _fake_wgrad,
    mutates=("main_grad",),
)
_accumulate = register(
    "grouped_linear_accumulate_",
    _check_accumulate,
    _launch_accumulate,
    reference.grouped_linear_accumulate_,
    _fake_accumulate,
    mutates=("main_grad",),
)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weights, ends = ctx.saved_tensors
    grad_y = grad_y.contiguous()
    wide = torch.promote_types(weights.dtype, torch.float32)
    grad_weights = torch.zeros_like(weights, dtype=wide)
    grouped_linear_wgrad_(grad_weights, grad_y, x, ends)
    return grouped_linear_dgrad(grad_y, weights, ends), grad_weights.to(weights.dtype), None


_forward.register_autograd(_differentiate, setup_context=_save)
