"""The gated activation, at the width of DeepSeek-V2's experts."""

from collections.abc import Iterator

import torch

from dsv2_kernels import swiglu_gate as op
from dsv2_kernels.reference import swiglu_gate as reference
from dsv2_kernels.testing.bench import Case

WIDTH = 1536


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward over six rows a token, bf16."""
    rows = 6 * tokens
    projected = torch.randn(rows, 2 * WIDTH, device=device, dtype=torch.bfloat16)
    grad = torch.randn(rows, WIDTH, device=device, dtype=torch.bfloat16)
    gates = torch.rand(rows, device=device)
    shape = {"rows": rows, "width": WIDTH}
    element = projected.element_size()
    compiled = torch.compile(reference.swiglu_gate)
    yield Case(
        "swiglu_gate forward",
        shape,
        rows * (3 * WIDTH * element + 4),
        lambda: op.swiglu_gate(projected, gates),
        {
            "eager": lambda: reference.swiglu_gate(projected, gates),
            "compiled": lambda: compiled(projected, gates),
        },
    )
    compiled_backward = torch.compile(reference.swiglu_gate_backward)
    yield Case(
        "swiglu_gate backward",
        shape,
        rows * (6 * WIDTH * element + 8),
        lambda: op.swiglu_gate_backward(grad, projected, gates),
        {
            "eager": lambda: reference.swiglu_gate_backward(grad, projected, gates),
            "compiled": lambda: compiled_backward(grad, projected, gates),
        },
    )
