"""Which row belongs to which token and expert, with the number of rows known beforehand.

`dispatch_index(routing_map, num_rows) -> tokens, assignments, tokens_per_expert, rows, row_starts`
"""

# T tokens, E experts, R rows: one for every (token, expert) assignment

from typing import NamedTuple

import torch
from torch import Tensor

from dsv2_kernels.native.checks import Arguments
from dsv2_kernels.native.library import launch
from dsv2_kernels.native.registry import register
from dsv2_kernels.native.row_plan import RowPlan
from dsv2_kernels.reference import dispatch_index as reference

# csrc/dispatch_index.cu has the same numbers.
_CHUNK = 32
MAX_EXPERTS = 512


class DispatchIndex(NamedTuple):
    """Rows in the order of their experts, and back; all int64.

    Attributes:
        tokens: [R], the token of each row; rows of expert 0 first, in the order of tokens.
        assignments: [R], token * E + expert of each row.
        tokens_per_expert: [E].
        rows: [R], the rows of token 0, then of token 1, and so on; by expert within a token.
        row_starts: [T], where each token begins in `rows`.
    """

    tokens: Tensor
    assignments: Tensor
    tokens_per_expert: Tensor
    rows: Tensor
    row_starts: Tensor

    @property
    def row_plan(self) -> RowPlan:
        """What `permute` moves rows by."""
        return RowPlan(self.tokens, self.rows, self.row_starts)


def dispatch_index(routing_map: Tensor, num_rows: int) -> DispatchIndex:
    """Order the assignments by expert, then by token.

    Args:
        routing_map: [T, E] bool, for kernels E at most 512; any number of experts a token, zero
            too.
        num_rows: R, how often the map is true. Another number is refused on a CPU, and ends the
            launch on a GPU.

    Raises:
        TypeError, ValueError: a dtype, shape or number that is not supported; for kernels also a
            stride or an address.

    Note:
        Deterministic, and the same as the reference to the bit. No synchronization with the GPU.
    """
    return DispatchIndex(*_dispatch_index(routing_map, num_rows))


def _check(arguments: Arguments, routing_map: Tensor, num_rows: int) -> None:
    arguments.tensor("routing_map", routing_map, [None, None], [torch.bool])
    arguments.at_most("routing_map", routing_map.size(1), MAX_EXPERTS, "experts")
    most = routing_map.numel()
    arguments.require(0 <= num_rows <= most, "num_rows", num_rows, f"0 to {most}")
    arguments.at_most("num_rows", num_rows, torch.iinfo(torch.int32).max)


def _launch(routing_map: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = routing_map.shape
    results = _fake(routing_map, num_rows)
    if not routing_map.numel():
        for result in results:
            result.zero_()
        return results
    num_chunks = -(-num_tokens // _CHUNK)
    words = routing_map.new_empty(num_chunks, num_experts, dtype=torch.int32)
    counts = routing_map.new_empty(num_chunks, num_experts + 1, dtype=torch.int32)
    launch(
        "dispatch_index", routing_map, words, counts, *results, num_tokens, num_experts, num_rows
    )
    return results


def _fake(routing_map: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, num_experts = routing_map.shape
    tokens, assignments, per_expert, rows, starts = (
        routing_map.new_empty(size, dtype=torch.int64)
        for size in (num_rows, num_rows, num_experts, num_rows, num_tokens)
    )
    return tokens, assignments, per_expert, rows, starts


_dispatch_index = register("dispatch_index", _check, _launch, reference.dispatch_index, _fake)
