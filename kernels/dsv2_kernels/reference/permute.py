"""Rows of tokens, sums of rows, and their gradients in plain torch."""

# T tokens, R rows, h channels, E experts; tokens, rows, row_starts: see `RowPlan`

import torch
from torch import Tensor


def gather_rows(x: Tensor, tokens: Tensor, rows: Tensor, row_starts: Tensor) -> Tensor:
    """[T, h] -> [R, h]."""
    return x.index_select(0, tokens)


def sum_rows(
    values: Tensor, gates: Tensor | None, tokens: Tensor, rows: Tensor, row_starts: Tensor
) -> Tensor:
    """[R, h] values and [R] gates or none -> [T, h]; sums in fp32 or wider, in order of `rows`."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if gates is not None:
        wide = wide * gates.unsqueeze(1)
    sums = wide.new_zeros(row_starts.size(0), values.size(1))
    sums.index_add_(0, tokens[rows], wide[rows])
    return sums.to(values.dtype)


def sum_rows_backward(
    grad_sums: Tensor,
    values: Tensor,
    gates: Tensor,
    tokens: Tensor,
    rows: Tensor,
    row_starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `values` [R, h] and of `gates` [R]."""
    wide = torch.promote_types(values.dtype, torch.float32)
    grad = grad_sums.index_select(0, tokens).to(wide)
    grad_gates = (grad * values).sum(dim=-1, dtype=gates.dtype)
    return (grad * gates.unsqueeze(1)).to(values.dtype), grad_gates


def gather_gates(
    gates: Tensor, assignments: Tensor, tokens: Tensor, rows: Tensor, row_starts: Tensor
) -> Tensor:
    """[T, E] -> [R]."""
    return gates.flatten().index_select(0, assignments)


def gather_gates_backward(
    grad_gathered: Tensor,
    assignments: Tensor,
    tokens: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    num_experts: int,
) -> Tensor:
    """The gradient of the gates, [T, E]."""
    grad_gates = grad_gathered.new_zeros(row_starts.size(0) * num_experts)
    grad_gates.index_copy_(0, assignments, grad_gathered)
    return grad_gates.view(row_starts.size(0), num_experts)
