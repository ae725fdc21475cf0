"""The activation of DeepSeek-V2's experts: routed ones with gates, shared ones without."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._sizes import EXPERT_WIDTH, SHARED_EXPERTS, TOP_K
from bench.peers import liger, megatron
from dsv2_kernels import swiglu_gate as op
from dsv2_kernels.reference import swiglu_gate as reference
from dsv2_kernels.testing.case import Case, peers


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward over six rows a token, and over one that all shared experts take."""
    yield from _routed(tokens, device)
    yield from _shared(tokens, device)


def _routed(tokens: int, device: torch.device) -> Iterator[Case]:
    rows = TOP_K * tokens
    projected, grad = _random(rows, EXPERT_WIDTH, device)
    gates = torch.rand(rows, device=device)
    shape = {"rows": rows, "width": EXPERT_WIDTH}
    yield Case(
        "swiglu_gate forward",
        shape,
        projected.nbytes + grad.nbytes + gates.nbytes,
        lambda: op.swiglu_gate(projected, gates),
        peers(reference.swiglu_gate, projected, gates)
        | {"megatron-core": megatron.swiglu(projected, gates)},
    )
    yield Case(
        "swiglu_gate backward",
        shape,
        2 * (projected.nbytes + grad.nbytes + gates.nbytes),
        lambda: op.swiglu_gate_backward(grad, projected, gates),
        peers(reference.swiglu_gate_backward, grad, projected, gates)
        | {"megatron-core": megatron.swiglu_backward(grad, projected, gates)},
    )


def _shared(tokens: int, device: torch.device) -> Iterator[Case]:
    width = SHARED_EXPERTS * EXPERT_WIDTH
    projected, grad = _random(tokens, width, device)
    shape = {"rows": tokens, "width": width}
    yield Case(
        "swiglu_gate forward, no gates",
        shape,
        projected.nbytes + grad.nbytes,
        lambda: op.swiglu_gate(projected),
        peers(reference.swiglu_gate, projected, None)
        | {
            "megatron-core": megatron.swiglu(projected, None),
            "liger-kernel": liger.swiglu(projected),
        },
    )
    yield Case(
        "swiglu_gate backward, no gates",
        shape,
        2 * (projected.nbytes + grad.nbytes),
        lambda: op.swiglu_gate_backward(grad, projected),
        peers(reference.swiglu_gate_backward, grad, projected, None)
        | {
            "megatron-core": megatron.swiglu_backward(grad, projected, None),
            "liger-kernel": liger.swiglu_backward(grad, projected),
        },
    )


def _random(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[R, 2f] and [R, f], bf16."""
    projected, grad = (
        torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        for columns in (2 * width, width)
    )
    return projected, grad
