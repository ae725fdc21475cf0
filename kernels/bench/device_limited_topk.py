"""The router from its logits on, as DeepSeek-V2's: six of 160 experts in three of eight groups."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench._sizes import EXPERTS, GROUPS, LIMIT, SCALE, TOP_K
from bench.peers import megatron
from bench.peers.needs import plain_and_fused
from dsv2_kernels import device_limited_topk as op
from dsv2_kernels.reference import device_limited_topk as reference
from dsv2_kernels.testing.case import Case, peers


def cases(tokens: int, device: torch.device) -> Iterator[Case]:
    """Forward and backward over one sequence's fp32 logits, sums included."""
    logits = torch.randn(tokens, EXPERTS, device=device)
    shape = {"tokens": tokens, "experts": EXPERTS, "top_k": TOP_K}
    sizes = GROUPS, LIMIT, TOP_K, SCALE
    routed = _routed(logits)
    yield Case(
        "device_limited_topk forward",
        shape,
        logits.nbytes + sum(each.nbytes for each in routed),
        lambda: _routed(logits),
        peers(reference.device_limited_topk, logits, 1, *sizes)
        | plain_and_fused(megatron.topk, logits, *sizes, note=" (groups by sum)"),
    )
    grad_gates, grad_sums = torch.randn_like(routed.gates), torch.randn_like(routed.affinity_sums)
    inputs = (grad_gates, routed.affinities, routed.experts, grad_sums)
    by_expert = torch.zeros_like(logits).scatter(1, routed.experts, grad_gates)
    yield Case(
        "device_limited_topk backward",
        shape,
        logits.nbytes + sum(each.nbytes for each in inputs),
        lambda: op.device_limited_topk_backward(*inputs, scaling_factor=SCALE, dtype=logits.dtype),
        peers(reference.device_limited_topk_backward, *inputs, SCALE, logits.dtype)
        | plain_and_fused(
            *(megatron.topk_backward, logits, by_expert, grad_sums[0], *sizes),
            note=" (groups by sum)",
        ),
    )


def _routed(logits: Tensor) -> op.DeviceLimitedTopk:
    return op.device_limited_topk(
        logits,
        num_sequences=1,
        num_groups=GROUPS,
        num_limited=LIMIT,
        top_k=TOP_K,
        scaling_factor=SCALE,
    )
