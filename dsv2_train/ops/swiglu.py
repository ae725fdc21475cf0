"""The gated activation of every feed-forward part.

`swiglu(projected) -> activation`; for experts, `gated_activation(implementation)`.
"""

# R rows, f channels

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv2_train.ops.kernels import TorchOrKernel


class GatedActivation(NamedTuple):
    """silu(g) * u * gate, as two functions for an op that saves what it needs itself.

    Attributes:
        forward: [R, 2f] projected (g first, then u) and [R] gates -> [R, f].
        backward: gradient of the activation [R, f] (overwritten or not), projected and gates ->
            gradients of projected and gates, and the activation once more.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def gated_activation(implementation: TorchOrKernel) -> GatedActivation:
    """The functions of an implementation; `kernel` takes CUDA tensors and fp32 gates."""
    if implementation == "torch":
        return GatedActivation(_gated, _gated_backward)
    from dsv2_kernels import swiglu_gate

    return GatedActivation(swiglu_gate.swiglu_gate, swiglu_gate.swiglu_gate_backward)


def swiglu(projected: Tensor, implementation: TorchOrKernel = "torch") -> Tensor:
    """silu(g) * u.

    Args:
        projected: [..., 2f], g first, then u.
        implementation: which code computes it.

    Returns:
        [..., f] in the dtype of `projected`, which is what is saved for the backward pass.
    """
    if implementation == "torch":
        activation: Tensor = _SwiGLU.apply(projected)
        return activation
    from dsv2_kernels.swiglu_gate import swiglu_gate

    return swiglu_gate(projected.flatten(0, -2)).view(*projected.shape[:-1], -1)


def _gated(projected: Tensor, gates: Tensor) -> Tensor:
    g, u = projected.chunk(2, dim=-1)
    return torch.nn.functional.silu(g).mul_(u).mul_(gates.unsqueeze(-1))


def _gated_backward(
    grad_activation: Tensor, projected: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    g, u = projected.chunk(2, dim=-1)
    silu = torch.nn.functional.silu(g)
    activation = silu * u
    grad_gates = (grad_activation * activation).sum(dim=-1, dtype=gates.dtype)
    grad_ungated = grad_activation.mul_(gates.unsqueeze(-1))
    gated = activation.mul_(gates.unsqueeze(-1))
    return _swiglu_gradient(grad_ungated, projected, silu), grad_gates, gated


def _swiglu_gradient(grad_activation: Tensor, projected: Tensor, silu: Tensor) -> Tensor:
    """Gradient of `projected`; overwrites `grad_activation`."""
    g, u = projected.chunk(2, dim=-1)
    grad_projected = torch.empty_like(projected)
    grad_g, grad_u = grad_projected.chunk(2, dim=-1)
    torch.mul(grad_activation, silu, out=grad_u)
    torch.ops.aten.silu_backward.grad_input(grad_activation.mul_(u), g, grad_input=grad_g)
    return grad_projected


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        g, u = projected.chunk(2, dim=-1)
        return torch.nn.functional.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, grad_activation: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        silu = torch.nn.functional.silu(projected.chunk(2, dim=-1)[0])
        return _swiglu_gradient(grad_activation.clone(), projected, silu)
