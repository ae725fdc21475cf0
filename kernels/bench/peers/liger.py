"""Peers from liger-kernel, read in 0.8.5: SwiGLU of one tensor [R, 2f], without gates."""

# R rows, f channels

from torch import Tensor
from torch.autograd import grad as gradients

from bench.peers.needs import Call, needs

NAME = "liger_kernel"


@needs(NAME, "triton", gpu=True)
def swiglu(projected: Tensor) -> Call:
    """silu(g) * u."""
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction as Swiglu

    return lambda: Swiglu.apply(projected)


@needs(NAME, "triton", gpu=True)
def swiglu_backward(grad: Tensor, projected: Tensor) -> Call:
    """Its gradient and, as ours, the activation once more."""
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction as Swiglu

    leaf = projected.detach().requires_grad_()
    activation = Swiglu.apply(leaf)
    return lambda: (
        *gradients(activation, leaf, grad, retain_graph=True),
        Swiglu.apply(projected),
    )
