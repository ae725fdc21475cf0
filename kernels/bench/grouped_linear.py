"""Experts' linears and the addition of their gradient, at the sizes of DeepSeek-V2."""

# E experts of a rank, A input and B output channels

from collections.abc import Iterator

import torch

from dsv2_kernels import grouped_linear as op
from dsv2_kernels.testing.bench import Case

E, A, B = 20, 5120, 3072


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Products over six rows a token, evenly spread, and what is added of them to fp32; bf16."""
    rows = 6 * tokens
    shape = {"rows": rows, "experts": E, "inputs": A, "outputs": B}
    x = torch.randn(rows, A, device=device, dtype=torch.bfloat16)
    grad_y = torch.randn(rows, B, device=device, dtype=torch.bfloat16)
    weights = torch.randn(E, B, A, device=device, dtype=torch.bfloat16)
    main_grad = torch.zeros(E, B, A, device=device)
    ends = torch.arange(1, E + 1, device=device).mul(rows).div(E).to(torch.int32)
    num_bytes = 2 * (x.numel() + grad_y.numel() + weights.numel())
    num_flops = 2 * rows * A * B
    # One matrix of as many products: what the GPU reaches without groups.
    dense = {"one matrix": lambda: x @ weights[0].t()}
    dense_back = {"one matrix": lambda: grad_y @ weights[0]}
    yield Case(
        "grouped_linear forward",
        shape,
        num_bytes,
        lambda: op.grouped_linear(x, weights, ends),
        dense,
        num_flops=num_flops,
    )
    yield Case(
        "grouped_linear dgrad",
        shape,
        num_bytes,
        lambda: op.grouped_linear_dgrad(grad_y, weights, ends),
        dense_back,
        num_flops=num_flops,
    )
    yield Case(
        "grouped_linear wgrad",
        shape,
        num_bytes + 6 * weights.numel(),
        lambda: op.grouped_linear_wgrad_(main_grad, grad_y, x, ends),
        {"one matrix": lambda: grad_y.t() @ x},
        num_flops=num_flops,
    )
    yield Case(
        "grouped_linear accumulate",
        {"experts": E, "inputs": A, "outputs": B},
        10 * weights.numel(),
        lambda: op.grouped_linear_accumulate_(main_grad, weights, ends),
        {"eager": lambda: main_grad.add_(weights)},
    )
