"""The gated activation, at the width of DeepSeek-V2's experts."""

from collections.abc import Iterator

import torch

from bench._sizes import EXPERT_WIDTH, TOP_K
from dsv2_kernels import swiglu_gate as op
from dsv2_kernels.reference import swiglu_gate as reference
from dsv2_kernels.testing.bench import Case, peers


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward over six rows a token, bf16."""
    rows = TOP_K * tokens
    projected = torch.randn(rows, 2 * EXPERT_WIDTH, device=device, dtype=torch.bfloat16)
    grad = torch.randn(rows, EXPERT_WIDTH, device=device, dtype=torch.bfloat16)
    gates = torch.rand(rows, device=device)
    shape = {"rows": rows, "width": EXPERT_WIDTH}
    yield Case(
        "swiglu_gate forward",
        shape,
        projected.nbytes + grad.nbytes + gates.nbytes,
        lambda: op.swiglu_gate(projected, gates),
        peers(reference.swiglu_gate, projected, gates),
    )
    yield Case(
        "swiglu_gate backward",
        shape,
        2 * (projected.nbytes + grad.nbytes + gates.nbytes),
        lambda: op.swiglu_gate_backward(grad, projected, gates),
        peers(reference.swiglu_gate_backward, grad, projected, gates),
    )
