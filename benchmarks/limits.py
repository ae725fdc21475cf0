"""What limits our step: the share of matrix products, and what this CPU gives them."""

import time
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.profiler import ProfilerActivity, profile

from benchmarks.ours import Ours
from benchmarks.workload import NUM_TOKENS, batches, workload
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose
from dsv2_train.recipe.flops import forward_flops

_PRODUCTS = ("aten::mm", "aten::addmm_", "aten::bmm", "aten::baddbmm_", "aten::_grouped_mm")
_GROUPS = {
    "matrix products": _PRODUCTS,
    "AdamW": ("aten::_fused_adamw_",),
    "gradient norm, clipping, zeroing": (
        "aten::linalg_vector_norm",
        "aten::_foreach_norm",
        "aten::_foreach_mul_",
        "aten::fill_",
        "aten::zero_",
    ),
    "copies and gathers": (
        "aten::copy_",
        "aten::index_select",
        "aten::_embedding_bag",
        "aten::cat",
    ),
    "softmax": ("aten::_softmax",),
    "sorting": ("aten::sort", "aten::topk", "aten::nonzero"),
}


@dataclass(frozen=True)
class Limits:
    """Where the time of our step goes.

    Attributes:
        shares: of the step's CPU time, by kind of work; the rest is element-wise work and Python.
        step_gflop: what the step's mathematics needs (attention causal), forward and backward.
        peak_gflops: rate of a 1,024^3 product on this thread.
        products_gflops: rate that the step's own products reach, from their share of the step.
    """

    shares: dict[str, float]
    step_gflop: float
    peak_gflops: float
    products_gflops: float


def limits(
    num_experts: int, sequence_length: int, groups: ProcessGroupCollection, step_s: float
) -> Limits:
    """Profile one of our steps, after three unprofiled ones.

    Args:
        num_experts: of the workload.
        sequence_length: of the workload.
        groups: process groups of one rank.
        step_s: CPU seconds of an unprofiled step, which the shares are shares of.
    """
    config = workload(num_experts, sequence_length)
    device = torch.device("cpu")
    model = build_model(config, groups, choose(config.parallel, device), device)
    ours = Ours(config, model, groups)
    *warm, last = batches(config, 4)
    for batch in warm:
        ours.forward_backward(batch)
        ours.update()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        ours.forward_backward(last)
        ours.update()
    seconds = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    total_s = sum(seconds.values())
    by_group = {name: sum(seconds.get(key, 0.0) for key in keys) for name, keys in _GROUPS.items()}
    flops = forward_flops(config.model, sequence_length, "causal").training * NUM_TOKENS
    return Limits(
        shares={name: spent_s / total_s for name, spent_s in by_group.items()},
        step_gflop=flops / 1e9,
        peak_gflops=_peak_gflops(),
        products_gflops=flops / 1e9 / (step_s * by_group["matrix products"] / total_s),
    )


def _peak_gflops() -> float:
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty(1024, 1024)
    best_s = float("inf")
    for _ in range(20):
        start_s = time.process_time()
        torch.mm(a, b, out=out)
        best_s = min(best_s, time.process_time() - start_s)
    return float(2 * 1024**3 / best_s / 1e9)
