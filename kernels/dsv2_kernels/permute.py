"""Rows of tokens in the order of their experts or of their receivers, and back.

`plan = (tokens, rows, row_starts)`, then `rows = gather_rows(x, *plan)` and
`x = sum_rows(rows, *plan)`, each the other's gradient; `gather_gates(gates, assignments, *plan)`.

Deterministic: no sum is shared between blocks. Where the kernels are built for debugging, or
emulated, indices that are out of range are found, and rows that disagree with their tokens; not a
row that is named twice. The backward pass looks whether an assignment is of its row's token.
"""

# T tokens, R rows, h channels, E experts

from typing import Any

import torch
from torch import Tensor

from dsv2_kernels.native.checks import Arguments
from dsv2_kernels.native.library import launch
from dsv2_kernels.native.registry import register
from dsv2_kernels.reference import permute as reference

Plan = tuple[Tensor, Tensor, Tensor]


def gather_rows(x: Tensor, tokens: Tensor, rows: Tensor, row_starts: Tensor) -> Tensor:
    """A copy of its token for each row.

    Args:
        x: [T, h] float32, bfloat16 or float16; h elements are a multiple of 16 bytes.
        tokens: [R] int64, the token of each row.
        rows: [R] int64, the rows of token 0, then of token 1, and so on.
        row_starts: [T] int64, where each token begins in `rows`.

    Returns:
        [R, h] in the dtype of `x`.

    Raises:
        TypeError, ValueError: a dtype, shape, stride, address or device that is not supported.

    Note:
        Reads a token once, whatever its rows. Saves the plan alone. No communication.
    """
    gathered: Tensor = _gather_rows(x, tokens, rows, row_starts)
    return gathered


def sum_rows(
    values: Tensor,
    tokens: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    gates: Tensor | None = None,
) -> Tensor:
    """The sum of each token's rows, times their gates where given; zero for a token without any.

    Args:
        values: [R, h] float32, bfloat16 or float16; h elements are a multiple of 16 bytes.
        tokens: [R] int64, the token of each row.
        rows: [R] int64, the rows of token 0, then of token 1, and so on.
        row_starts: [T] int64, where each token begins in `rows`.
        gates: [R] float32; None for ones.

    Returns:
        [T, h] in the dtype of `values`; summed in fp32, rounded once.

    Raises:
        TypeError, ValueError: a dtype, shape, stride, address or device that is not supported.

    Note:
        Saves `values` only with gates, for their gradient. No communication.
    """
    sums: Tensor = _sum_rows(values, gates, tokens, rows, row_starts)
    return sums


def sum_rows_backward(
    grad_sums: Tensor,
    values: Tensor,
    gates: Tensor,
    tokens: Tensor,
    rows: Tensor,
    row_starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient of gated sums.

    Args:
        grad_sums: [T, h].
        values: [R, h].
        gates: [R] float32.
        tokens: [R] int64, the token of each row.
        rows: [R] int64, the rows of token 0, then of token 1, and so on.
        row_starts: [T] int64, where each token begins in `rows`.

    Returns:
        Gradients of `values` [R, h] and of `gates` [R] float32.
    """
    gradients: tuple[Tensor, Tensor] = _sum_rows_backward(
        grad_sums, values, gates, tokens, rows, row_starts
    )
    return gradients


def gather_gates(
    gates: Tensor, assignments: Tensor, tokens: Tensor, rows: Tensor, row_starts: Tensor
) -> Tensor:
    """The gate value of each row.

    Args:
        gates: [T, E] float32.
        assignments: [R] int64, token * E + expert of each row; none twice.
        tokens: [R] int64, the token of each row.
        rows: [R] int64, the rows of token 0, then of token 1, and so on.
        row_starts: [T] int64, where each token begins in `rows`.

    Returns:
        [R] float32.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device that is not supported.
    """
    gathered: Tensor = _gather_gates(gates, assignments, tokens, rows, row_starts)
    return gathered


def gather_gates_backward(
    grad_gathered: Tensor,
    assignments: Tensor,
    tokens: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    *,
    num_experts: int,
) -> Tensor:
    """The gradient of the gates.

    Args:
        grad_gathered: [R] float32.
        assignments: [R] int64, token * E + expert of each row; none twice.
        tokens: [R] int64, the token of each row.
        rows: [R] int64, the rows of token 0, then of token 1, and so on.
        row_starts: [T] int64, where each token begins in `rows`.
        num_experts: E.

    Returns:
        [T, E] float32, zero where a token has no row.
    """
    grad_gates: Tensor = _gather_gates_backward(
        grad_gathered, assignments, tokens, rows, row_starts, num_experts
    )
    return grad_gates


def _check_plan(
    arguments: Arguments, plan: Plan, num_tokens: int | None, device: torch.device
) -> None:
    tokens, rows, row_starts = plan
    integers = [torch.int64]
    arguments.tensor("tokens", tokens, [None], integers, device, aligned=False)
    arguments.tensor("rows", rows, [tokens.size(0)], integers, device, aligned=False)
    arguments.tensor("row_starts", row_starts, [num_tokens], integers, device, aligned=False)
    if not row_starts.size(0):
        arguments.require(
            not tokens.size(0), "tokens", f"{tokens.size(0)} rows", "0 without tokens"
        )


def _check_values(
    arguments: Arguments, values: Tensor, gates: Tensor | None, num_rows: int
) -> None:
    arguments.tensor("values", values, [num_rows, None])
    arguments.vectors("width", values.size(1), values.dtype)
    if gates is not None:
        device = values.device
        arguments.tensor("gates", gates, [num_rows], [torch.float32], device, aligned=False)


def _check_assignments(arguments: Arguments, assignments: Tensor, tokens: Tensor) -> None:
    shape, integers = [tokens.size(0)], [torch.int64]
    arguments.tensor("assignments", assignments, shape, integers, tokens.device, aligned=False)


def _launch_gather_rows(x: Tensor, tokens: Tensor, rows: Tensor, row_starts: Tensor) -> Tensor:
    arguments, plan = Arguments("gather_rows"), (tokens, rows, row_starts)
    arguments.tensor("x", x, [None, None])
    arguments.vectors("width", x.size(1), x.dtype)
    _check_plan(arguments, plan, x.size(0), x.device)
    gathered = _fake_gather_rows(x, *plan)
    if gathered.numel():
        row_bytes = x.size(1) * x.element_size()
        sizes = row_starts.size(0), tokens.size(0), row_bytes
        launch("permute_gather_rows", x, *plan, gathered, *sizes)
    return gathered


def _launch_sum_rows(
    values: Tensor, gates: Tensor | None, tokens: Tensor, rows: Tensor, row_starts: Tensor
) -> Tensor:
    arguments, plan = Arguments("sum_rows"), (tokens, rows, row_starts)
    _check_plan(arguments, plan, None, values.device)
    _check_values(arguments, values, gates, tokens.size(0))
    sums = _fake_sum_rows(values, gates, *plan)
    if not values.numel():
        return sums.zero_()
    sizes = row_starts.size(0), *values.shape
    launch("permute_sum_rows", values, gates, *plan, sums, *sizes, values.dtype)
    return sums


def _launch_sum_rows_backward(
    grad_sums: Tensor,
    values: Tensor,
    gates: Tensor,
    tokens: Tensor,
    rows: Tensor,
    row_starts: Tensor,
) -> tuple[Tensor, Tensor]:
    arguments, plan = Arguments("sum_rows_backward"), (tokens, rows, row_starts)
    _check_plan(arguments, plan, None, values.device)
    _check_values(arguments, values, gates, tokens.size(0))
    shape = [row_starts.size(0), values.size(1)]
    arguments.tensor("grad_sums", grad_sums, shape, [values.dtype], values.device)
    grads = _fake_sum_rows_backward(grad_sums, values, gates, *plan)
    if not values.numel():
        return grads[0], grads[1].zero_()
    sizes = row_starts.size(0), *values.shape
    inputs = grad_sums, values, gates
    launch("permute_sum_rows_backward", *inputs, *plan, *grads, *sizes, values.dtype)
    return grads


def _launch_gather_gates(
    gates: Tensor, assignments: Tensor, tokens: Tensor, rows: Tensor, row_starts: Tensor
) -> Tensor:
    arguments, plan = Arguments("gather_gates"), (tokens, rows, row_starts)
    arguments.tensor("gates", gates, [None, None], [torch.float32], aligned=False)
    _check_plan(arguments, plan, gates.size(0), gates.device)
    _check_assignments(arguments, assignments, tokens)
    gathered = _fake_gather_gates(gates, assignments, *plan)
    if gathered.numel():
        sizes = gates.numel(), tokens.size(0)
        launch("permute_gather_gates", gates, assignments, gathered, *sizes)
    return gathered


def _launch_gather_gates_backward(
    grad_gathered: Tensor,
    assignments: Tensor,
    tokens: Tensor,
    rows: Tensor,
    row_starts: Tensor,
    num_experts: int,
) -> Tensor:
    arguments, plan = Arguments("gather_gates_backward"), (tokens, rows, row_starts)
    _check_plan(arguments, plan, None, grad_gathered.device)
    _check_assignments(arguments, assignments, tokens)
    shape = [tokens.size(0)]
    arguments.tensor("grad_gathered", grad_gathered, shape, [torch.float32], aligned=False)
    grad_gates = _fake_gather_gates_backward(grad_gathered, assignments, *plan, num_experts)
    if not tokens.size(0):
        return grad_gates.zero_()
    sizes = row_starts.size(0), tokens.size(0), num_experts
    inputs = grad_gathered, assignments
    launch("permute_gather_gates_backward", *inputs, *plan, grad_gates, *sizes)
    return grad_gates


def _fake_gather_rows(x: Tensor, tokens: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(tokens.size(0), x.size(1))


def _fake_sum_rows(values: Tensor, *rest: Any) -> Tensor:
    return values.new_empty(rest[-1].size(0), values.size(1))


def _fake_sum_rows_backward(
    grad_sums: Tensor, values: Tensor, gates: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(gates)


def _fake_gather_gates(gates: Tensor, assignments: Tensor, *_: Tensor) -> Tensor:
    return gates.new_empty(assignments.size(0))


def _fake_gather_gates_backward(grad_gathered: Tensor, *rest: Any) -> Tensor:
    row_starts, num_experts = rest[-2:]
    return grad_gathered.new_empty(row_starts.size(0), num_experts)


_gather_rows = register(
    "gather_rows", _launch_gather_rows, reference.gather_rows, _fake_gather_rows
)
_sum_rows = register("sum_rows", _launch_sum_rows, reference.sum_rows, _fake_sum_rows)
_sum_rows_backward = register(
    "sum_rows_backward",
    _launch_sum_rows_backward,
    reference.sum_rows_backward,
    _fake_sum_rows_backward,
)
_gather_gates = register(
    "gather_gates", _launch_gather_gates, reference.gather_gates, _fake_gather_gates
)
_gather_gates_backward = register(
    "gather_gates_backward",
    _launch_gather_gates_backward,
    reference.gather_gates_backward,
    _fake_gather_gates_backward,
)


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_rows_gradient(ctx: Any, grad_gathered: Tensor) -> tuple[Tensor | None, ...]:
    return sum_rows(grad_gathered.contiguous(), *ctx.saved_tensors), None, None, None


def _save_what_gates_need(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, gates, *plan = inputs
    ctx.save_for_backward(None if gates is None else values, gates, *plan)


def _sum_rows_gradient(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    values, gates, *plan = ctx.saved_tensors
    grad_sums = grad_sums.contiguous()
    if gates is None:
        return gather_rows(grad_sums, *plan), None, None, None, None
    return *sum_rows_backward(grad_sums, values, gates, *plan), None, None, None


def _save_assignments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_experts = inputs[0].size(1)
    ctx.save_for_backward(*inputs[1:])


def _gather_gates_gradient(ctx: Any, grad_gathered: Tensor) -> tuple[Tensor | None, ...]:
    grad_gates = gather_gates_backward(
        grad_gathered.contiguous(), *ctx.saved_tensors, num_experts=ctx.num_experts
    )
    return grad_gates, None, None, None, None


_gather_rows.register_autograd(_gather_rows_gradient, setup_context=_save_plan)
_sum_rows.register_autograd(_sum_rows_gradient, setup_context=_save_what_gates_need)
_gather_gates.register_autograd(_gather_gates_gradient, setup_context=_save_assignments)
