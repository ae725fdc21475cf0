"""Rows of tokens in the order of their experts, and back.

`plan = row_plan(routing_map)`, then `rows = permute(x, plan)` and `y = unpermute(rows, plan)`.
"""

# T tokens, E experts, R rows: one for every (token, expert) assignment

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv2_train.ops.kernels import TorchOrKernel


@dataclass(frozen=True)
class RowPlan:
    """Which row belongs to which token and expert.

    Attributes:
        tokens: [R] int64, the token of each row; rows of expert 0 first, in the order of tokens.
        assignments: [R] int64, token * E + expert of each row.
        tokens_per_expert: [E] int64.
        rows: [R] int64, the rows of token 0, then of token 1, and so on; by expert within a token.
        row_starts: [T] int64, where each token begins in `rows`.
        moves: the code that moves rows by the plan.
    """

    tokens: Tensor
    assignments: Tensor
    tokens_per_expert: Tensor
    rows: Tensor
    row_starts: Tensor
    moves: "RowMoves"


class RowMoves(NamedTuple):
    """`permute`, `unpermute` and `gather_gates` of an implementation."""

    permute: Callable[[Tensor, RowPlan], Tensor]
    unpermute: Callable[[Tensor, RowPlan], Tensor]
    gather_gates: Callable[[Tensor, RowPlan], Tensor]


def row_plan(
    routing_map: Tensor, implementation: TorchOrKernel = "torch", num_rows: int | None = None
) -> RowPlan:
    """Order the assignments by expert, then by token.

    Args:
        routing_map: [T, E] bool; any number of experts a token, zero too.
        implementation: which code makes the plan, and moves rows by it; `kernel` takes rows of a
            multiple of 16 bytes and fp32 gates.
        num_rows: R, where it is known beforehand.

    Note:
        `torch` reads R back from a GPU; `kernel` only where it is not given. No communication.
    """
    if implementation == "kernel":
        from dsv2_kernels.dispatch_index import dispatch_index

        known = int(routing_map.sum()) if num_rows is None else num_rows
        return RowPlan(*dispatch_index(routing_map, known), moves=_kernel_moves())
    num_experts = routing_map.size(1)
    experts, tokens = routing_map.t().nonzero(as_tuple=True)
    per_token = routing_map.sum(dim=1)
    return RowPlan(
        tokens=tokens,
        assignments=tokens * num_experts + experts,
        tokens_per_expert=routing_map.sum(dim=0),
        rows=tokens.argsort(stable=True),
        row_starts=per_token.cumsum(0) - per_token,
        moves=RowMoves(_Permute.apply, _Unpermute.apply, _pick_gates),
    )


def permute(x: Tensor, plan: RowPlan) -> Tensor:
    """[T, h] tokens -> [R, h] rows: a copy for each assignment."""
    return plan.moves.permute(x, plan)


def unpermute(rows: Tensor, plan: RowPlan) -> Tensor:
    """[R, h] rows -> [T, h] tokens: the sum of each token's rows, by expert; zero without any."""
    return plan.moves.unpermute(rows, plan)


def gather_gates(gate_values: Tensor, plan: RowPlan) -> Tensor:
    """[T, E] gate values -> [R], that of each row."""
    return plan.moves.gather_gates(gate_values, plan)


def _kernel_moves() -> RowMoves:
    from dsv2_kernels import permute as kernels

    def indices(plan: RowPlan) -> kernels.RowPlan:
        return kernels.RowPlan(plan.tokens, plan.rows, plan.row_starts)

    return RowMoves(
        lambda x, plan: kernels.gather_rows(x, indices(plan)),
        lambda rows, plan: kernels.sum_rows(rows, indices(plan)),
        lambda gates, plan: kernels.gather_gates(gates, plan.assignments, indices(plan)),
    )


def _pick_gates(gate_values: Tensor, plan: RowPlan) -> Tensor:
    return gate_values.flatten().gather(0, plan.assignments)


def _copies(x: Tensor, plan: RowPlan) -> Tensor:
    return x.index_select(0, plan.tokens)


def _sums(rows: Tensor, plan: RowPlan) -> Tensor:
    """A sum of embeddings is the one fused gather-and-sum that torch has, on CPU as on CUDA."""
    if not rows.size(0):
        return rows.new_zeros(plan.row_starts.size(0), rows.size(1))
    return torch.nn.functional.embedding_bag(plan.rows, rows, plan.row_starts, mode="sum")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return _copies(x, plan)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        return _sums(grad_rows, ctx.plan), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: RowPlan) -> Tensor:
        ctx.plan = plan
        return _sums(rows, plan)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, None]:
        return _copies(grad_x, ctx.plan), None
