"""The gated activation of every feed-forward part.

`swiglu(projected) -> activation`
"""

from typing import Any

import torch
from torch import Tensor


def swiglu(projected: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        projected: [..., 2f], gate channels first, then up.

    Returns:
        [..., f] in the dtype of `projected`, which is what is saved for the backward pass.
    """
    activation: Tensor = _SwiGLU.apply(projected)
    return activation


def swiglu_gradient(grad_activation: Tensor, projected: Tensor, silu: Tensor) -> Tensor:
    """Gradient of `projected`; overwrites `grad_activation`.

    Args:
        grad_activation: [..., f].
        projected: [..., 2f].
        silu: [..., f], silu of the gate channels.
    """
    gate, up = projected.chunk(2, dim=-1)
    grad_projected = torch.empty_like(projected)
    grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
    torch.mul(grad_activation, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_activation.mul_(up), gate, grad_input=grad_gate)
    return grad_projected


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        gate, up = projected.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_activation: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        silu = torch.nn.functional.silu(projected.chunk(2, dim=-1)[0])
        return swiglu_gradient(grad_activation.clone(), projected, silu)
