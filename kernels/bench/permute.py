"""Rows of tokens and sums of rows, at the hidden size of DeepSeek-V2."""

from collections.abc import Iterator

import torch

from dsv2_kernels import permute as op
from dsv2_kernels.reference import permute as reference
from dsv2_kernels.testing.bench import Case

WIDTH = 5120
NUM_EXPERTS = 160
TOP_K = 6


def random_plan(tokens: int, device: torch.device) -> tuple[op.Plan, torch.Tensor]:
    """Six experts a token at random, rows sorted by expert; and the assignments."""
    ranks = torch.rand(tokens, NUM_EXPERTS, device=device).argsort(dim=1)
    routed = torch.zeros(tokens, NUM_EXPERTS, dtype=torch.bool, device=device)
    routed.scatter_(1, ranks[:, :TOP_K], True)
    experts, of_row = routed.t().nonzero(as_tuple=True)
    row_starts = torch.arange(tokens, device=device) * TOP_K
    return (of_row, of_row.argsort(stable=True), row_starts), of_row * NUM_EXPERTS + experts


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward, bf16; the backward of either plain op is the other."""
    plan, assignments = random_plan(tokens, device)
    num_rows = TOP_K * tokens
    x = torch.randn(tokens, WIDTH, device=device, dtype=torch.bfloat16)
    values = torch.randn(num_rows, WIDTH, device=device, dtype=torch.bfloat16)
    gates = torch.rand(num_rows, device=device)
    per_token = torch.rand(tokens, NUM_EXPERTS, device=device)
    shape = {"tokens": tokens, "rows": num_rows, "width": WIDTH}
    of_tokens, of_rows = x.numel() * 2, values.numel() * 2
    indices = (num_rows + tokens) * 8

    compiled = torch.compile(reference.gather_rows)
    yield Case(
        "gather_rows",
        shape,
        of_tokens + of_rows + indices,
        lambda: op.gather_rows(x, *plan),
        {
            "eager": lambda: reference.gather_rows(x, *plan),
            "compiled": lambda: compiled(x, *plan),
        },
    )
    compiled_sum = torch.compile(reference.sum_rows)
    _, rows, row_starts = plan
    yield Case(
        "sum_rows",
        shape,
        of_tokens + of_rows + indices,
        lambda: op.sum_rows(values, *plan),
        {
            "eager": lambda: reference.sum_rows(values, None, *plan),
            "compiled": lambda: compiled_sum(values, None, *plan),
            "embedding_bag": lambda: torch.nn.functional.embedding_bag(
                rows, values, row_starts, mode="sum"
            ),
        },
    )
    yield Case(
        "sum_rows with gates",
        shape,
        of_tokens + of_rows + indices + 4 * num_rows,
        lambda: op.sum_rows(values, *plan, gates),
        {
            "eager": lambda: reference.sum_rows(values, gates, *plan),
            "compiled": lambda: compiled_sum(values, gates, *plan),
        },
    )
    compiled_backward = torch.compile(reference.sum_rows_backward)
    yield Case(
        "sum_rows with gates backward",
        shape,
        of_tokens + 2 * of_rows + indices + 8 * num_rows,
        lambda: op.sum_rows_backward(x, values, gates, *plan),
        {
            "eager": lambda: reference.sum_rows_backward(x, values, gates, *plan),
            "compiled": lambda: compiled_backward(x, values, gates, *plan),
        },
    )
    yield Case(
        "gather_gates",
        {"tokens": tokens, "rows": num_rows, "experts": NUM_EXPERTS},
        # A gate's sector of 32 bytes.
        num_rows * (8 + 4 + 32),
        lambda: op.gather_gates(per_token, assignments, *plan),
        {"eager": lambda: reference.gather_gates(per_token, assignments, *plan)},
    )
