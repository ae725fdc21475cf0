"""silu(g) * u * gate and its gradient in plain torch."""

# R rows, f channels

import torch
from torch import Tensor


def swiglu_gate(projected: Tensor, gates: Tensor | None) -> Tensor:
    """[R, 2f] g and u, and [R] gates or none -> [R, f]."""
    g, u = projected.chunk(2, dim=-1)
    activation = torch.nn.functional.silu(g) * u
    return activation if gates is None else (activation * gates.unsqueeze(1)).to(projected.dtype)


def swiglu_gate_backward(
    grad_activation: Tensor, projected: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `projected` [R, 2f] and of `gates` [R] ([0] without), and the activation."""
    g, u = projected.chunk(2, dim=-1)
    sigmoid = g.sigmoid()
    silu = torch.nn.functional.silu(g)
    ungated = silu * u
    grad_gates = torch.empty(0, dtype=torch.float32, device=projected.device)
    grad = grad_activation
    activation = ungated
    if gates is not None:
        wide = torch.promote_types(projected.dtype, torch.float32)
        grad_gates = (grad_activation.to(wide) * ungated).sum(dim=-1, dtype=gates.dtype)
        grad = (grad_activation * gates.unsqueeze(1)).to(projected.dtype)
        activation = (ungated * gates.unsqueeze(1)).to(projected.dtype)
    grad_g = grad * u * sigmoid * (1 + g * (1 - sigmoid))
    return torch.cat([grad_g, grad * silu], dim=-1), grad_gates, activation
