"""SwiGLU experts over rows sorted by expert, as one operation.

`grouped_experts(x, tokens_per_expert, fc1, fc2, gate_values, *, implementation) -> y`: for each
row r of expert e, [g; u] = fc1[e] x_r and y_r = fc2[e] (gate_values_r * silu(g) * u).
"""

# T rows (assignments), E experts, h hidden size, f intermediate size of one expert

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dsv2_train.ops.kernels import TorchOrKernel
from dsv2_train.ops.main_grad import add_gradient
from dsv2_train.ops.swiglu import GatedActivation, gated_activation

Implementation = Literal["loop", "grouped_mm", "kernel"]


def grouped_experts(
    x: Tensor,
    tokens_per_expert: Tensor | Sequence[int],
    fc1: Tensor,
    fc2: Tensor,
    gate_values: Tensor,
    *,
    implementation: Implementation,
    activation: TorchOrKernel = "torch",
) -> Tensor:
    """Run each row through its expert, times its gate value (DeepSeek-V2, equations 20 and 21).

    Args:
        x: [T, h], rows of expert 0 first, then of expert 1, and so on.
        tokens_per_expert: E counts, zeros allowed, summing to T. `loop` reads them on the host:
            give a list or a CPU tensor.
        fc1: [E, 2f, h], gate rows first, then up rows. Dtype of `x`.
        fc2: [E, h, f]. Dtype of `x`.
        gate_values: [T], any float dtype; enters the activation, before fc2.
        implementation: `loop` multiplies expert by expert into one buffer: any device and dtype,
            fastest on CPU. `grouped_mm` is torch's grouped kernel: one launch, no host sync, CUDA
            bf16. `kernel` multiplies by the same, and adds weight gradients to an fp32 `main_grad`
            by our own kernel, which passes over experts without rows.
        activation: which code computes silu(g) * u * gate; `kernel` wants fp32 gate values.

    Returns:
        [T, h] in the dtype of `x`.

    Note:
        No communication. Weight gradients are added to `main_grad` where a weight has one (see
        `ops.main_grad`). Saves x, [g; u] and the gate values for the backward pass: T (h + 2f + 1)
        elements; the activation is recomputed.
    """
    assert x.size(-1) == fc1.size(-1) == fc2.size(-2) and fc1.size(-2) == 2 * fc2.size(-1)
    products: _Products
    if implementation == "loop":
        products = _Loop(tokens_per_expert)
    else:
        counts = torch.as_tensor(tokens_per_expert).to(x.device, non_blocking=True)
        ends = counts.cumsum(0, dtype=torch.int32)
        products = _Grouped(ends) if implementation == "grouped_mm" else _Kernel(ends)
    y: Tensor = _GroupedExperts.apply(
        x, fc1, fc2, gate_values, products, gated_activation(activation)
    )
    return y


class _Products(Protocol):
    """The three products of rows and of their experts' weights, which are [E, B, A]."""

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """[T, A] -> [T, B]."""

    def backward(self, grad_y: Tensor, weights: Tensor) -> Tensor:
        """[T, B] -> [T, A]."""

    def add_gradient(self, gradient: Tensor, grad_y: Tensor, x: Tensor) -> None:
        """Add that of the weights, from [T, B] and [T, A], to [E, B, A]."""


class _Loop:
    """The three products expert by expert, each into its slice of one buffer."""

    def __init__(self, tokens_per_expert: Tensor | Sequence[int]) -> None:
        counts = tokens_per_expert
        sizes = counts.tolist() if isinstance(counts, Tensor) else list(counts)
        self.used = [expert for expert, size in enumerate(sizes) if size]
        self.sizes = [sizes[expert] for expert in self.used]

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.backward(x, weights.mT)

    def backward(self, grad_y: Tensor, weights: Tensor) -> Tensor:
        grad_x = grad_y.new_empty(grad_y.size(0), weights.size(2))
        matrices = weights.unbind(0)
        slices = zip(
            self.used,
            grad_y.split_with_sizes(self.sizes),
            grad_x.split_with_sizes(self.sizes),
            strict=True,
        )
        for expert, rows, target in slices:
            torch.mm(rows, matrices[expert], out=target)
        return grad_x

    def add_gradient(self, gradient: Tensor, grad_y: Tensor, x: Tensor) -> None:
        if gradient.dtype != grad_y.dtype:
            grad_y, x = grad_y.to(gradient.dtype), x.to(gradient.dtype)
        matrices = gradient.unbind(0)
        slices = zip(
            self.used,
            grad_y.t().split_with_sizes(self.sizes, dim=1),
            x.split_with_sizes(self.sizes),
            strict=True,
        )
        for expert, left, right in slices:
            matrices[expert].addmm_(left, right)


class _Grouped:
    """The three products by torch's grouped matrix multiplication."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.backward(x, weights.mT)

    def backward(self, grad_y: Tensor, weights: Tensor) -> Tensor:
        if not grad_y.size(0):
            return grad_y.new_empty(0, weights.size(2))
        return torch.nn.functional.grouped_mm(grad_y, weights, offs=self.ends)

    def add_gradient(self, gradient: Tensor, grad_y: Tensor, x: Tensor) -> None:
        if x.size(0):
            gradient.add_(torch.nn.functional.grouped_mm(grad_y.t(), x, offs=self.ends))


class _Kernel:
    """The three products by our own package."""

    def __init__(self, ends: Tensor) -> None:
        from dsv2_kernels import grouped_linear

        self.ends = ends
        self.ops = grouped_linear

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.ops.grouped_linear(x, weights, self.ends)

    def backward(self, grad_y: Tensor, weights: Tensor) -> Tensor:
        return self.ops.grouped_linear_dgrad(grad_y, weights, self.ends)

    def add_gradient(self, gradient: Tensor, grad_y: Tensor, x: Tensor) -> None:
        if gradient.dtype == torch.float32:
            self.ops.grouped_linear_wgrad_(gradient, grad_y, x, self.ends)
            return
        wide = torch.zeros_like(gradient, dtype=torch.float32)
        self.ops.grouped_linear_wgrad_(wide, grad_y, x, self.ends)
        gradient.add_(wide)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        gates: Tensor,
        products: _Products,
        activation: GatedActivation,
    ) -> Tensor:
        projected = products.forward(x, fc1)
        ctx.save_for_backward(x, gates, projected)
        ctx.weights, ctx.products, ctx.activation = (fc1, fc2), products, activation
        return products.forward(activation.forward(projected, gates), fc2)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, projected = ctx.saved_tensors
        (fc1, fc2), products = ctx.weights, ctx.products
        grad_y = grad_y.contiguous()
        grad_projected, grad_gates, gated = ctx.activation.backward(
            products.backward(grad_y, fc2), projected, gates
        )
        grad_fc2 = add_gradient(
            fc2, lambda gradient: products.add_gradient(gradient, grad_y, gated)
        )
        grad_fc1 = add_gradient(
            fc1, lambda gradient: products.add_gradient(gradient, grad_projected, x)
        )
        grad_x = products.backward(grad_projected, fc1)
        return grad_x, grad_fc1, grad_fc2, grad_gates, None, None
