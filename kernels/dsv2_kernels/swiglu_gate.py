"""The gated activation of the experts.

`swiglu_gate(projected, gates) -> activation`
"""

# R rows, f channels

from typing import Any

import torch
from torch import Tensor

from dsv2_kernels.native.checks import Arguments
from dsv2_kernels.native.library import launch
from dsv2_kernels.native.registry import register
from dsv2_kernels.reference import swiglu_gate as reference


def swiglu_gate(projected: Tensor, gates: Tensor | None = None) -> Tensor:
    """silu(g) * u * gate (DeepSeek-V2, equation 20: the gate value enters before the output).

    Args:
        projected: [R, 2f] float32, bfloat16 or float16; g first, then u. For kernels 2f
            elements are a multiple of 32 bytes.
        gates: [R] float32; None for ones.

    Returns:
        [R, f] in the dtype of `projected`; computed in fp32.

    Raises:
        TypeError, ValueError: a dtype or shape that is not supported; for kernels also a stride or
            an address.

    Note:
        Deterministic. Saves its inputs; the backward pass recomputes. No communication.
    """
    activation: Tensor = _forward(projected, gates)
    return activation


def swiglu_gate_backward(
    grad_activation: Tensor, projected: Tensor, gates: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, and the activation once more, which a weight's gradient needs.

    Args:
        grad_activation: [R, f].
        projected: [R, 2f].
        gates: [R] float32, or None.

    Returns:
        Gradients of `projected` and of `gates` ([R] float32; [0] without gates), and [R, f], the
        activation.
    """
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(grad_activation, projected, gates)
    return gradients


def _check_forward(arguments: Arguments, projected: Tensor, gates: Tensor | None) -> None:
    arguments.tensor("projected", projected, [None, None], arguments.floats)
    width = projected.size(1)
    arguments.require(width % 2 == 0, "projected", f"{width} channels", "even numbers")
    arguments.vectors("projected", width // 2, projected.dtype, "channels in each half")
    if gates is not None:
        shape, device = [projected.size(0)], projected.device
        arguments.tensor("gates", gates, shape, arguments.wide, device, aligned=False)


def _check_backward(
    arguments: Arguments, grad_activation: Tensor, projected: Tensor, gates: Tensor | None
) -> None:
    _check_forward(arguments, projected, gates)
    shape = [projected.size(0), projected.size(1) // 2]
    dtypes, device = [projected.dtype], projected.device
    arguments.tensor("grad_activation", grad_activation, shape, dtypes, device)


def _launch_forward(projected: Tensor, gates: Tensor | None) -> Tensor:
    rows, width = projected.size(0), projected.size(1) // 2
    activation = _fake_forward(projected, gates)
    if activation.numel():
        launch("swiglu_gate_forward", projected, gates, activation, rows, width, projected.dtype)
    return activation


def _launch_backward(
    grad_activation: Tensor, projected: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = projected.size(0), projected.size(1) // 2
    grad_projected, grad_gates, activation = _fake_backward(grad_activation, projected, gates)
    if activation.numel():
        launch(
            "swiglu_gate_backward",
            grad_activation,
            projected,
            gates,
            grad_projected,
            grad_gates,
            activation,
            rows,
            width,
            projected.dtype,
        )
    else:
        grad_gates.zero_()
    return grad_projected, grad_gates, activation


def _fake_forward(projected: Tensor, gates: Tensor | None) -> Tensor:
    return projected.new_empty(projected.size(0), projected.size(1) // 2)


def _fake_backward(
    grad_activation: Tensor, projected: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gates = projected.new_empty(0, dtype=torch.float32)
    if gates is not None:
        grad_gates = torch.empty_like(gates)
    return torch.empty_like(projected), grad_gates, torch.empty_like(grad_activation)


_forward = register(
    "swiglu_gate", _check_forward, _launch_forward, reference.swiglu_gate, _fake_forward
)
_backward = register(
    "swiglu_gate_backward",
    _check_backward,
    _launch_backward,
    reference.swiglu_gate_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_activation: Tensor) -> tuple[Tensor, Tensor | None]:
    projected, gates = ctx.saved_tensors
    grads = swiglu_gate_backward(grad_activation.contiguous(), projected, gates)
    return grads[0], None if gates is None else grads[1]


_forward.register_autograd(_differentiate, setup_context=_save)
