"""Rows of tokens in the order of their experts or of their receivers, and back.

`plan = RowPlan(tokens, rows, row_starts)`, then `rows = gather_rows(x, plan)` and
`x = sum_rows(rows, plan)`, each the other's gradient; `gather_gates(gates, assignments, plan)`.

Deterministic: no sum is shared between blocks. On a CPU a row plan or assignments that are wrong
are refused. Debug builds and the emulation detect indices out of range and rows whose token differs
from `tokens`. They do not detect a row that is listed twice. Whether an assignment belongs to its
row's token is checked only in the backward pass of `gather_gates`.
"""

# T tokens, R rows, h channels, E experts

from typing import Any

import torch
from torch import Tensor

from dsv2_kernels.native.checks import Arguments
from dsv2_kernels.native.library import launch
from dsv2_kernels.native.registry import register
from dsv2_kernels.native.row_plan import RowPlan, check_assignments, check_row_plan
from dsv2_kernels.reference import permute as reference


def gather_rows(x: Tensor, plan: RowPlan) -> Tensor:
    """A copy of its token for each row.

    Args:
        x: [T, h] float32, bfloat16 or float16; for kernels h elements are a multiple of 16
            bytes.
        plan: which row belongs to which token.

    Returns:
        [R, h] in the dtype of `x`.

    Raises:
        TypeError, ValueError: a dtype, shape, device or, on a CPU, index that is not supported; for
            kernels also a stride or an address.

    Note:
        Reads a token once, whatever its rows. Saves the plan alone. No communication.
    """
    gathered: Tensor = _gather_rows(x, *plan)
    return gathered


def sum_rows(values: Tensor, plan: RowPlan, gates: Tensor | None = None) -> Tensor:
    """The sum of each token's rows, times their gates where given; zero for a token without any.

    Args:
        values: [R, h] float32, bfloat16 or float16; for kernels h elements are a multiple of 16
            bytes.
        plan: which row belongs to which token.
        gates: [R] float32; None for ones.

    Returns:
        [T, h] in the dtype of `values`; summed in fp32, rounded once.

    Raises:
        TypeError, ValueError: a dtype, shape, device or, on a CPU, index that is not supported; for
            kernels also a stride or an address.

    Note:
        Saves `values` only with gates, for their gradient. No communication.
    """
    sums: Tensor = _sum_rows(values, gates, *plan)
    return sums


def sum_rows_backward(
    grad_sums: Tensor, values: Tensor, gates: Tensor, plan: RowPlan
) -> tuple[Tensor, Tensor]:
    """The gradient of gated sums.

    Args:
        grad_sums: [T, h].
        values: [R, h].
        gates: [R] float32.
        plan: which row belongs to which token.

    Returns:
        Gradients of `values` [R, h] and of `gates` [R] float32.
    """
    gradients: tuple[Tensor, Tensor] = _sum_rows_backward(grad_sums, values, gates, *plan)
    return gradients


def gather_gates(gates: Tensor, assignments: Tensor, plan: RowPlan) -> Tensor:
    """The gate value of each row.

    Args:
        gates: [T, E] float32, E at least 1.
        assignments: [R] int64, token * E + expert of each row; none twice.
        plan: which row belongs to which token.

    Returns:
        [R] float32.

    Raises:
        TypeError, ValueError: a dtype, shape, device or, on a CPU, index that is not supported; for
            kernels also a stride.
    """
    gathered: Tensor = _gather_gates(gates, assignments, *plan)
    return gathered


def gather_gates_backward(
    grad_gathered: Tensor, assignments: Tensor, plan: RowPlan, *, num_experts: int
) -> Tensor:
    """The gradient of the gates.

    Args:
        grad_gathered: [R] float32.
        assignments: [R] int64, token * E + expert of each row; none twice.
        plan: which row belongs to which token.
        num_experts: E, at least 1.

    Returns:
        [T, E] float32, zero where a token has no row.
    """
    grad_gates: Tensor = _gather_gates_backward(grad_gathered, assignments, *plan, num_experts)
    return grad_gates


def _check_gather_rows(arguments: Arguments, x: Tensor, *indices: Tensor) -> None:
    arguments.tensor("x", x, [None, None], arguments.floats)
    arguments.vectors("x", x.size(1), x.dtype)
    check_row_plan(arguments, RowPlan(*indices), num_tokens=x.size(0), device=x.device)


def _check_sum_rows(
    arguments: Arguments, values: Tensor, gates: Tensor | None, *indices: Tensor
) -> None:
    plan, device = RowPlan(*indices), values.device
    check_row_plan(arguments, plan, num_tokens=None, device=device)
    num_rows = plan.tokens.size(0)
    arguments.tensor("values", values, [num_rows, None], arguments.floats)
    arguments.vectors("values", values.size(1), values.dtype)
    if gates is not None:
        arguments.tensor("gates", gates, [num_rows], arguments.wide, device, aligned=False)


def _check_sum_rows_backward(
    arguments: Arguments, grad_sums: Tensor, values: Tensor, gates: Tensor, *indices: Tensor
) -> None:
    _check_sum_rows(arguments, values, gates, *indices)
    shape = [RowPlan(*indices).row_starts.size(0), values.size(1)]
    arguments.tensor("grad_sums", grad_sums, shape, [values.dtype], values.device)


def _check_gather_gates(
    arguments: Arguments, gates: Tensor, assignments: Tensor, *indices: Tensor
) -> None:
    plan = RowPlan(*indices)
    arguments.tensor("gates", gates, [None, None], arguments.wide, aligned=False)
    arguments.at_least_one("gates", gates.size(1), "experts")
    check_row_plan(arguments, plan, num_tokens=gates.size(0), device=gates.device)
    check_assignments(arguments, assignments, plan, gates.size(1))


def _check_gather_gates_backward(
    arguments: Arguments, grad_gathered: Tensor, assignments: Tensor, *rest: Any
) -> None:
    *indices, num_experts = rest
    arguments.at_least_one("num_experts", num_experts)
    plan, device = RowPlan(*indices), grad_gathered.device
    check_row_plan(arguments, plan, num_tokens=None, device=device)
    check_assignments(arguments, assignments, plan, num_experts)
    arguments.tensor(
        "grad_gathered", grad_gathered, plan.tokens.shape, arguments.wide, aligned=False
    )


def _launch_gather_rows(x: Tensor, tokens: Tensor, rows: Tensor, row_starts: Tensor) -> Tensor:
    plan = RowPlan(tokens, rows, row_starts)
    gathered = _fake_gather_rows(x, *plan)
    if gathered.numel():
        row_bytes = x.size(1) * x.element_size()
        sizes = row_starts.size(0), tokens.size(0), row_bytes
        launch("permute_gather_rows", x, *plan, gathered, *sizes)
    return gathered


def _launch_sum_rows(
    values: Tensor, gates: Tensor | None, tokens: Tensor, rows: Tensor, row_starts: Tensor
) -> Tensor:
    plan = RowPlan(tokens, rows, row_starts)
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
    plan = RowPlan(tokens, rows, row_starts)
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
    plan = RowPlan(tokens, rows, row_starts)
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
    plan = RowPlan(tokens, rows, row_starts)
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
    "gather_rows",
    _check_gather_rows,
    _launch_gather_rows,
    reference.gather_rows,
    _fake_gather_rows,
)
_sum_rows = register(
    "sum_rows", _check_sum_rows, _launch_sum_rows, reference.sum_rows, _fake_sum_rows
)
_sum_rows_backward = register(
    "sum_rows_backward",
    _check_sum_rows_backward,
    _launch_sum_rows_backward,
    reference.sum_rows_backward,
    _fake_sum_rows_backward,
)
_gather_gates = register(
    "gather_gates",
    _check_gather_gates,
    _launch_gather_gates,
    reference.gather_gates,
    _fake_gather_gates,
)
_gather_gates_backward = register(
    "gather_gates_backward",
    _check_gather_gates_backward,
    _launch_gather_gates_backward,
    reference.gather_gates_backward,
    _fake_gather_gates_backward,
)


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_gather_rows(ctx: Any, grad_gathered: Tensor) -> tuple[Tensor | None, ...]:
    plan = RowPlan(*ctx.saved_tensors)
    return sum_rows(grad_gathered.contiguous(), plan), None, None, None


def _save_what_gates_need(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, gates, *plan = inputs
    ctx.save_for_backward(None if gates is None else values, gates, *plan)


def _differentiate_sum_rows(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    values, gates, *indices = ctx.saved_tensors
    plan = RowPlan(*indices)
    grad_sums = grad_sums.contiguous()
    if gates is None:
        return gather_rows(grad_sums, plan), None, None, None, None
    return *sum_rows_backward(grad_sums, values, gates, plan), None, None, None


def _save_assignments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_experts = inputs[0].size(1)
    ctx.save_for_backward(*inputs[1:])


def _differentiate_gather_gates(ctx: Any, grad_gathered: Tensor) -> tuple[Tensor | None, ...]:
    assignments, *indices = ctx.saved_tensors
    grad_gates = gather_gates_backward(
        grad_gathered.contiguous(), assignments, RowPlan(*indices), num_experts=ctx.num_experts
    )
    return grad_gates, None, None, None, None


_gather_rows.register_autograd(_differentiate_gather_rows, setup_context=_save_plan)
_sum_rows.register_autograd(_differentiate_sum_rows, setup_context=_save_what_gates_need)
_gather_gates.register_autograd(_differentiate_gather_gates, setup_context=_save_assignments)
