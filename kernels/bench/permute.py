"""Rows of tokens and sums of rows, at the hidden size of DeepSeek-V2."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bench._sizes import EXPERTS, HIDDEN, TOP_K, random_routing_map
from bench.peers import megatron
from bench.peers.needs import plain_and_fused
from dsv2_kernels import permute as op
from dsv2_kernels.dispatch_index import DispatchIndex, dispatch_index
from dsv2_kernels.reference import dispatch_index as index_reference
from dsv2_kernels.reference import permute as reference
from dsv2_kernels.testing.case import Case, peers

# What a GPU's memory moves at least: gates of a token that share a sector are read with it.
SECTOR_BYTES = 32


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward, bf16; the backward of either plain op is the other."""
    routing_map = random_routing_map(tokens, device)
    index = dispatch_index(routing_map, TOP_K * tokens)
    plan = index.row_plan
    x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    values = torch.randn(TOP_K * tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    yield from _plain(x, values, plan, routing_map)
    yield _with_index(x, values, index, routing_map)
    yield from _gated(x, values, plan)
    yield from _gates(index, tokens)


def _plain(x: Tensor, values: Tensor, plan: op.RowPlan, routing_map: Tensor) -> Iterator[Case]:
    shape, num_bytes = _shape(x, values), x.nbytes + values.nbytes + _index_bytes(plan)
    yield Case(
        "gather_rows",
        shape,
        num_bytes,
        lambda: op.gather_rows(x, plan),
        peers(reference.gather_rows, x, *plan),
    )
    bags = {"embedding_bag": lambda: embedding_bag(plan.rows, values, plan.row_starts, mode="sum")}
    yield Case(
        "sum_rows",
        shape,
        num_bytes,
        lambda: op.sum_rows(values, plan),
        peers(reference.sum_rows, values, None, *plan)
        | bags
        | plain_and_fused(megatron.unpermute, values, x, routing_map),
    )


def _with_index(x: Tensor, values: Tensor, index: DispatchIndex, routing_map: Tensor) -> Case:
    """Libraries make the index, and rows by it, in one function."""
    num_rows = values.size(0)

    def ours() -> Tensor:
        return op.gather_rows(x, dispatch_index(routing_map, num_rows).row_plan)

    def eager() -> Tensor:
        tokens, _, _, rows, row_starts = index_reference.dispatch_index(routing_map, num_rows)
        return reference.gather_rows(x, tokens, rows, row_starts)

    return Case(
        "dispatch_index and gather_rows",
        _shape(x, values),
        routing_map.nbytes + sum(each.nbytes for each in index) + x.nbytes + values.nbytes,
        ours,
        {"eager": eager, **plain_and_fused(megatron.permute, x, routing_map, num_rows)},
    )


def _gated(x: Tensor, values: Tensor, plan: op.RowPlan) -> Iterator[Case]:
    shape, indices = _shape(x, values), _index_bytes(plan)
    gates = torch.rand(values.size(0), device=values.device)
    yield Case(
        "sum_rows with gates",
        shape,
        x.nbytes + values.nbytes + indices + gates.nbytes,
        lambda: op.sum_rows(values, plan, gates),
        peers(reference.sum_rows, values, gates, *plan),
    )
    yield Case(
        "sum_rows with gates backward",
        shape,
        x.nbytes + 2 * values.nbytes + indices + 2 * gates.nbytes,
        lambda: op.sum_rows_backward(x, values, gates, plan),
        peers(reference.sum_rows_backward, x, values, gates, *plan),
    )


def _gates(index: DispatchIndex, tokens: int) -> Iterator[Case]:
    assignments, plan = index.assignments, index.row_plan
    gates = torch.rand(tokens, EXPERTS, device=assignments.device)
    grad = torch.rand(assignments.size(0), device=assignments.device)
    shape = {"tokens": tokens, "rows": assignments.size(0), "experts": EXPERTS}
    read = (assignments * gates.element_size() // SECTOR_BYTES).unique().numel() * SECTOR_BYTES
    yield Case(
        "gather_gates",
        shape,
        read + assignments.nbytes + grad.nbytes,
        lambda: op.gather_gates(gates, assignments, plan),
        peers(reference.gather_gates, gates, assignments, *plan),
    )
    yield Case(
        "gather_gates backward",
        shape,
        grad.nbytes + assignments.nbytes + _index_bytes(plan) + gates.nbytes,
        lambda: op.gather_gates_backward(grad, assignments, plan, num_experts=EXPERTS),
        peers(reference.gather_gates_backward, grad, assignments, *plan, EXPERTS),
    )


def _shape(x: Tensor, values: Tensor) -> dict[str, int]:
    return {"tokens": x.size(0), "rows": values.size(0), "width": x.size(1)}


def _index_bytes(plan: op.RowPlan) -> int:
    """Of the rows of each token, and where they begin."""
    return plan.rows.nbytes + plan.row_starts.nbytes
