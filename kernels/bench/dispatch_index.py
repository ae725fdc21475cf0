"""Orders the rows of DeepSeek-V2's 160 experts, six a token."""

from collections.abc import Iterator

import torch

from dsv2_kernels import dispatch_index as op
from dsv2_kernels.reference import dispatch_index as reference
from dsv2_kernels.testing.bench import Case

NUM_EXPERTS, TOP_K = 160, 6


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """A random map; the eager peer waits for the number of rows."""
    experts = torch.rand(tokens, NUM_EXPERTS, device=device).topk(TOP_K).indices
    routing_map = torch.zeros(tokens, NUM_EXPERTS, dtype=torch.bool, device=device)
    routing_map.scatter_(1, experts, True)
    rows = TOP_K * tokens
    yield Case(
        "dispatch_index forward",
        {"tokens": tokens, "experts": NUM_EXPERTS, "rows": rows},
        tokens * NUM_EXPERTS + 8 * (3 * rows + NUM_EXPERTS + tokens),
        lambda: op.dispatch_index(routing_map, rows),
        {"eager": lambda: reference.dispatch_index(routing_map, rows)},
    )
