"""Which work a call's time goes to: of the GPU's kernels, or of torch's ops on a CPU."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

# The first that a kernel's or an op's name matches; what matches none is "other".
_WORK = {
    "attention": r"flash|fmha|sdpa|attention|attn",
    "experts' products": r"group",
    "other products": r"gemm|gemv|cutlass|cublas|nvjet|matmul|::(add|b|baddb)?mm_?$|linear",
    "routing, sorting": r"softmax|topk|sort|scan|cumsum|histogram|bincount|nonzero",
    "norms": r"norm",
    "copies, gathers": r"copy|memcpy|memset|index|gather|scatter|cat\b|catarray|fill|zero_",
    "element-wise, sums": r"elementwise|reduce|triton|::(mul|add|silu|sum|sub|div|neg)",
}
# Our kernels are in a namespace of their op.
_OURS = re.compile(r"^(void )?dsv2::(\w+)::")
_MOST_NAMES = 25


@dataclass(frozen=True)
class KernelTime:
    """Where time goes.

    Attributes:
        shares: by kind of work, of the time of all kernels together.
        us: by name, of those that take longest.
    """

    shares: dict[str, float]
    us: dict[str, float]


def kernel_time(call: Callable[[], object], device: torch.device) -> KernelTime:
    """Profile one call; on a GPU its kernels, on a CPU its ops."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return summary({event.key: getattr(event, field) for event in profiler.key_averages()})


def summary(us: dict[str, float]) -> KernelTime:
    """Put microseconds by name into kinds of work."""
    total = sum(us.values())
    by_work: dict[str, float] = {}
    for name, spent in us.items():
        by_work[work_of(name)] = by_work.get(work_of(name), 0.0) + spent / total
    return KernelTime(_longest(by_work), dict(list(_longest(us).items())[:_MOST_NAMES]))


def _longest(spent: dict[str, float]) -> dict[str, float]:
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def work_of(name: str) -> str:
    """The kind of work that a kernel or an op does, judged by its name; of ours, the op."""
    ours = _OURS.match(name)
    if ours:
        return f"our {ours[2]}"
    for work, pattern in _WORK.items():
        if re.search(pattern, name, re.IGNORECASE):
            return work
    return "other"
