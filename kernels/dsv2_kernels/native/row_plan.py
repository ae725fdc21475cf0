"""The row plan: which row belongs to which token; and its checks."""

# T tokens, R rows, E experts

from typing import NamedTuple

import torch
from torch import Tensor

from dsv2_kernels.native.checks import Arguments, first


class RowPlan(NamedTuple):
    """Which row belongs to which token; all int64.

    Attributes:
        tokens: [R], the token of each row.
        rows: [R], the rows of token 0, then of token 1, and so on.
        row_starts: [T], where each token begins in `rows`.
    """

    tokens: Tensor
    rows: Tensor
    row_starts: Tensor


def check_row_plan(
    arguments: Arguments, plan: RowPlan, *, num_tokens: int | None, device: torch.device
) -> None:
    """Refuse a row plan of other shapes or dtypes, and on a CPU one whose parts disagree.

    Args:
        arguments: of the op.
        plan: of the op.
        num_tokens: T; None where only the plan says it.
        device: of the op's other tensors.
    """
    tokens, rows, row_starts = plan
    integers = [torch.int64]
    arguments.tensor("tokens", tokens, [None], integers, device, aligned=False)
    num_rows = tokens.size(0)
    arguments.tensor("rows", rows, [num_rows], integers, device, aligned=False)
    arguments.tensor("row_starts", row_starts, [num_tokens], integers, device, aligned=False)
    if not row_starts.size(0):
        arguments.require(not num_rows, "tokens", f"{num_rows} rows", "0 without tokens")
    if not arguments.for_kernel:
        _check_order(arguments, plan)


def check_assignments(
    arguments: Arguments, assignments: Tensor, plan: RowPlan, num_experts: int
) -> None:
    """Refuse assignments of another shape or dtype, and on a CPU those of another token.

    Args:
        arguments: of the op.
        assignments: [R], token * E + expert of each row.
        plan: of the op, checked.
        num_experts: E.
    """
    tokens, _, row_starts = plan
    shape, integers, device = tokens.shape, [torch.int64], tokens.device
    arguments.tensor("assignments", assignments, shape, integers, device, aligned=False)
    arguments.indices("assignments", assignments, row_starts.size(0) * num_experts, once=True)
    if not arguments.for_kernel:
        for row in first(assignments // num_experts != tokens):
            found = f"{assignments[row]} for a row of token {tokens[row]}"
            arguments.refuse("assignments", found, f"token * {num_experts} + expert")


def _check_order(arguments: Arguments, plan: RowPlan) -> None:
    """The rows of token 0, then of token 1, and so on, each once."""
    tokens, rows, row_starts = plan
    arguments.indices("tokens", tokens, row_starts.size(0))
    arguments.indices("rows", rows, rows.size(0), once=True)
    expected = tokens.sort().values
    for place in first(tokens[rows] != expected):
        found = f"row {rows[place]} in place {place}"
        arguments.refuse("rows", found, f"a row of token {expected[place]} there")
    counts = tokens.bincount(minlength=row_starts.size(0))
    starts = counts.cumsum(0) - counts
    for token in first(row_starts != starts):
        found = f"{row_starts[token]} for token {token}"
        arguments.refuse("row_starts", found, f"{starts[token]} there")
