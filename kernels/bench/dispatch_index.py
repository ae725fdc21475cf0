"""Orders the rows of DeepSeek-V2's 160 experts, six a token."""

from collections.abc import Iterator

import torch

from bench._sizes import EXPERTS, TOP_K, random_routing_map
from dsv2_kernels import dispatch_index as op
from dsv2_kernels.reference import dispatch_index as reference
from dsv2_kernels.testing.case import Case


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """A random map; the eager peer waits for the number of rows."""
    routing_map = random_routing_map(tokens, device)
    rows = TOP_K * tokens
    yield Case(
        "dispatch_index forward",
        {"tokens": tokens, "experts": EXPERTS, "rows": rows},
        tokens * EXPERTS + 8 * (3 * rows + EXPERTS + tokens),
        lambda: op.dispatch_index(routing_map, rows),
        {"eager": lambda: reference.dispatch_index(routing_map, rows)},
    )
