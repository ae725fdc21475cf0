"""Rows of tokens and sums of rows, at the hidden size of DeepSeek-V2."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from bench._sizes import EXPERTS, HIDDEN, TOP_K, random_routing_map
from dsv2_kernels import permute as op
from dsv2_kernels.reference import permute as reference
from dsv2_kernels.reference.dispatch_index import dispatch_index
from dsv2_kernels.testing.bench import Case, peers


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward, bf16; the backward of either plain op is the other."""
    num_rows = TOP_K * tokens
    of_row, assignments, _, rows, row_starts = dispatch_index(
        random_routing_map(tokens, device), num_rows
    )
    plan = of_row, rows, row_starts
    x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    values = torch.randn(num_rows, HIDDEN, device=device, dtype=torch.bfloat16)
    yield from _plain(x, values, plan)
    yield from _gated(x, values, plan)
    per_token = torch.rand(tokens, EXPERTS, device=device)
    yield Case(
        "gather_gates",
        {"tokens": tokens, "rows": num_rows, "experts": EXPERTS},
        # A gate's sector of 32 bytes.
        num_rows * (8 + 4 + 32),
        lambda: op.gather_gates(per_token, assignments, *plan),
        {"eager": lambda: reference.gather_gates(per_token, assignments, *plan)},
    )


def _plain(x: Tensor, values: Tensor, plan: op.Plan) -> Iterator[Case]:
    shape, indices = _shape(x, values), _index_bytes(x, values)
    yield Case(
        "gather_rows",
        shape,
        x.nbytes + values.nbytes + indices,
        lambda: op.gather_rows(x, *plan),
        peers(reference.gather_rows, x, *plan),
    )
    _, rows, row_starts = plan
    bags = {"embedding_bag": lambda: embedding_bag(rows, values, row_starts, mode="sum")}
    yield Case(
        "sum_rows",
        shape,
        x.nbytes + values.nbytes + indices,
        lambda: op.sum_rows(values, *plan),
        peers(reference.sum_rows, values, None, *plan) | bags,
    )


def _gated(x: Tensor, values: Tensor, plan: op.Plan) -> Iterator[Case]:
    shape, indices = _shape(x, values), _index_bytes(x, values)
    gates = torch.rand(values.size(0), device=values.device)
    yield Case(
        "sum_rows with gates",
        shape,
        x.nbytes + values.nbytes + indices + gates.nbytes,
        lambda: op.sum_rows(values, *plan, gates),
        peers(reference.sum_rows, values, gates, *plan),
    )
    yield Case(
        "sum_rows with gates backward",
        shape,
        x.nbytes + 2 * values.nbytes + indices + 2 * gates.nbytes,
        lambda: op.sum_rows_backward(x, values, gates, *plan),
        peers(reference.sum_rows_backward, x, values, gates, *plan),
    )


def _shape(x: Tensor, values: Tensor) -> dict[str, int]:
    return {"tokens": x.size(0), "rows": values.size(0), "width": x.size(1)}


def _index_bytes(x: Tensor, values: Tensor) -> int:
    return 8 * (values.size(0) + x.size(0))
