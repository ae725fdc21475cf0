"""Peers from transformer-engine, read in 2.9 and 2.11: its GroupedLinear over the same weights.

It takes the experts' numbers of rows from the host: they are read before, where a training step
would wait for them. Its permutation and router are called through megatron-core, in `megatron`.
"""

# E experts, T rows, A input and B output channels

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad as gradients

from bench.peers.needs import Call, needs

NAME = "transformer_engine"


@needs(NAME, gpu=True)
def grouped_linear(x: Tensor, weights: Tensor, ends: Tensor) -> Call:
    """[T, A] -> [T, B]."""
    linear, splits = _linear(weights), _splits(ends)

    def call() -> Tensor:
        with torch.no_grad():
            y: Tensor = linear(x, splits)
        return y

    return call


@needs(NAME, gpu=True)
def grouped_linear_dgrad(grad_y: Tensor, weights: Tensor, ends: Tensor) -> Call:
    """The gradient of the rows alone: its weights want none."""
    linear = _linear(weights).requires_grad_(False)
    x = grad_y.new_zeros(grad_y.size(0), weights.size(2), requires_grad=True)
    y = linear(x, _splits(ends))
    return lambda: gradients(y, x, grad_y, retain_graph=True)[0]


@needs(NAME, gpu=True)
def grouped_linear_wgrad_(
    main_grad: Tensor, weights: Tensor, grad_y: Tensor, x: Tensor, ends: Tensor
) -> Call:
    """The gradient of the weights alone, which its products add to `main_grad` in fp32."""
    # Else a first backward pass takes the rows' memory away, and there is no second one.
    linear = _linear(weights, fuse_wgrad_accumulation=True, save_original_input=True)
    for expert, weight in enumerate(linear.parameters()):
        weight.main_grad = main_grad[expert]
    y = linear(x, _splits(ends))
    return lambda: torch.autograd.backward(y, grad_y, retain_graph=True)


def _linear(weights: Tensor, **settings: bool) -> Any:
    """Its layer with weights [E, B, A], which it holds as E parameters."""
    from transformer_engine.pytorch import GroupedLinear

    num_experts, outputs, inputs = weights.shape
    linear = GroupedLinear(
        *(num_experts, inputs, outputs),
        bias=False,
        params_dtype=weights.dtype,
        device=weights.device,
        **settings,
    )
    for expert, weight in enumerate(linear.parameters()):
        weight.data = weights[expert]
    return linear


def _splits(ends: Tensor) -> list[int]:
    """Rows of each expert."""
    return [end - begin for begin, end in pairwise([0, *ends.tolist()])]
