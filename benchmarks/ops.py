"""Our ops beside what torch offers for the same mathematics, forward and backward.

As in training: gradients of weights end up added to buffers. Ours do that themselves; for torch's
megatron-core's hook adds them, and `_forward_backward` does here.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import Ratio, alternate, ratio
from dsv2_train.ops.attention import causal_attention
from dsv2_train.ops.cross_entropy import linear_cross_entropy
from dsv2_train.ops.moe.grouped_experts import grouped_experts
from dsv2_train.ops.moe.permute import permute, row_plan, unpermute
from dsv2_train.ops.rms_norm import rms_norm

Function = Callable[..., Tensor]


def compare_ops(repeats: int) -> dict[str, Ratio]:
    """Seconds of torch's way over seconds of ours, by op and shape."""
    torch.manual_seed(0)
    results = {}
    for name, (theirs, ours, inputs) in _cases().items():
        calls = [_forward_backward(function, inputs) for function in (theirs, ours)]
        slow, fast = alternate(calls, repeats)
        results[name] = ratio(slow, fast)
    return results


def _cases() -> dict[str, tuple[Function, Function, list[Tensor]]]:
    cases: dict[str, tuple[Function, Function, list[Tensor]]] = {}
    for length in (256, 1024):
        heads = [_random(length, 1024 // length, 8, width) for width in (48, 48, 32)]
        cases[f"attention, {length} positions: SDPA"] = (
            _sdpa,
            lambda q, k, v: causal_attention(q, k, v, 48**-0.5),
            heads,
        )
    labels = torch.randint(8192, (1024,))
    cases["head and loss: linear, cross_entropy"] = (
        lambda x, weight: functional.cross_entropy(x @ weight.t(), labels),
        lambda x, weight: linear_cross_entropy(x, weight, labels).mean(),
        [_random(1024, 256), _weight(8192, 256)],
    )
    cases["RMSNorm: torch.rms_norm"] = (
        lambda x, weight: functional.rms_norm(x, (256,), weight, 1e-6),
        lambda x, weight: rms_norm(x, weight, 1e-6),
        [_random(1024, 256), _weight(256)],
    )
    counts = torch.full((160,), 38)
    experts = [_random(38 * 160, 256), _weight(160, 192, 256), _weight(160, 256, 96)]
    cases["160 experts of 38 rows: grouped_mm"] = (
        _experts_by_grouped_mm(counts),
        lambda x, fc1, fc2: grouped_experts(
            x, counts, fc1, fc2, x.new_ones(x.size(0)), implementation="loop"
        ),
        experts,
    )
    plan = row_plan(torch.rand(1024, 160).argsort(dim=1) < 6)
    cases["permute and back: index, index_add"] = (
        lambda x: torch.zeros_like(x).index_add(0, plan.tokens, x[plan.tokens]),
        lambda x: unpermute(permute(x, plan), plan),
        [_random(1024, 256)],
    )
    return cases


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads.permute(1, 2, 0, 3) for heads in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def _experts_by_grouped_mm(counts: Tensor) -> Function:
    ends = counts.cumsum(0, dtype=torch.int32)

    def run(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        gate, up = functional.grouped_mm(x, fc1.mT, offs=ends).chunk(2, dim=-1)
        return functional.grouped_mm(functional.silu(gate) * up, fc2.mT, offs=ends)

    return run


def _forward_backward(function: Function, inputs: list[Tensor]) -> Callable[[], None]:
    def call() -> None:
        weights = [tensor for tensor in inputs if hasattr(tensor, "main_grad")]
        for weight in weights:
            # megatron-core marks weights by attributes that torch knows nothing of.
            weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        out = function(*inputs)
        out.backward(torch.ones_like(out))
        for weight in weights:
            if not weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
                weight.main_grad.add_(weight.grad)
        for tensor in inputs:
            tensor.grad = None

    return call


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _weight(*shape: int) -> Tensor:
    weight = _random(*shape)
    # As megatron-core's data-parallel wrapper gives it to a weight.
    weight.main_grad = torch.zeros(shape)  # type: ignore[attr-defined]
    return weight
