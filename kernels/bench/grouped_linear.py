"""Experts' first linear and the addition of its gradient, at the sizes of DeepSeek-V2."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from bench._sizes import EXPERT_WIDTH, HIDDEN, LOCAL_EXPERTS, TOP_K
from bench.peers import transformer_engine
from dsv2_kernels import grouped_linear as op
from dsv2_kernels.reference import grouped_linear as reference
from dsv2_kernels.testing.case import Case

TRIED_ON_CPU = 2, 64, 32


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Six rows a token, spread evenly or by Zipf's law over a rank's 20 experts; bf16."""
    sizes = (LOCAL_EXPERTS, HIDDEN, 2 * EXPERT_WIDTH) if device.type == "cuda" else TRIED_ON_CPU
    num_experts, hidden, width = sizes
    weights = torch.randn(num_experts, width, hidden, device=device, dtype=torch.bfloat16)
    main_grad = torch.zeros(weights.shape, device=device)
    ranks = torch.arange(1, num_experts + 1, dtype=torch.float64)
    for spread, shares in (("even", torch.ones_like(ranks)), ("Zipf", 1 / ranks)):
        ends = (TOP_K * tokens * shares.cumsum(0) / shares.sum()).round().to(device, torch.int32)
        yield from _products(spread, TOP_K * tokens, weights, main_grad, ends)
    yield Case(
        "grouped_linear accumulate",
        {"experts": num_experts, "inputs": hidden, "outputs": width},
        2 * main_grad.nbytes + weights.nbytes + ends.nbytes,
        lambda: op.grouped_linear_accumulate_(main_grad, weights, ends),
        {"eager": lambda: main_grad.add_(weights)},
    )


def _products(
    spread: str, rows: int, weights: Tensor, main_grad: Tensor, ends: Tensor
) -> Iterator[Case]:
    num_experts, width, hidden = weights.shape
    x, grad_y = (torch.randn(rows, n, device=ends.device).bfloat16() for n in (hidden, width))
    shape = {"rows": rows, "experts": num_experts, "inputs": hidden, "outputs": width}
    num_bytes = x.nbytes + grad_y.nbytes + ends.nbytes
    num_flops = 2 * rows * hidden * width
    yield Case(
        f"grouped_linear forward, {spread}",
        shape,
        num_bytes + weights.nbytes,
        lambda: op.grouped_linear(x, weights, ends),
        {
            "loop": lambda: reference.grouped_linear(x, weights, ends),
            "one matrix": lambda: x @ weights[0].t(),
            "transformer-engine": transformer_engine.grouped_linear(x, weights, ends),
        },
        num_flops=num_flops,
    )
    yield Case(
        f"grouped_linear dgrad, {spread}",
        shape,
        num_bytes + weights.nbytes,
        lambda: op.grouped_linear_dgrad(grad_y, weights, ends),
        {
            "loop": lambda: reference.grouped_linear_dgrad(grad_y, weights, ends),
            "one matrix": lambda: grad_y @ weights[0],
            "transformer-engine": transformer_engine.grouped_linear_dgrad(grad_y, weights, ends),
        },
        num_flops=num_flops,
    )
    yield Case(
        f"grouped_linear wgrad, {spread}",
        shape,
        num_bytes + 2 * main_grad.nbytes,
        lambda: op.grouped_linear_wgrad_(main_grad, grad_y, x, ends),
        {
            "loop": lambda: reference.grouped_linear_wgrad_(main_grad, grad_y, x, ends),
            "grouped_mm, then add": lambda: main_grad.add_(grouped_mm(grad_y.t(), x, offs=ends)),
            "transformer-engine": transformer_engine.grouped_linear_wgrad_(
                main_grad, weights, grad_y, x, ends
            ),
        },
        num_flops=num_flops,
    )
