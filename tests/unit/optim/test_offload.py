"""A host optimizer's memory and what moves to and from it, on a GPU that fake tensors play."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.distributed.sharding import GlobalTensor, tag
from dsv2_train.optim.adam import AdamChoice, FusedAdamW
from dsv2_train.optim.build import build_optimizer
from dsv2_train.optim.zero import ZeroOptimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"matrix": (3, 5), "norm": (7,)}


class Gpu(TorchFunctionMode):
    """What fake tensors of a GPU cannot do where torch was built without CUDA, noted."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.events: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            self.pinned.append(args[0])
            return args[0]
        if func is Tensor.__getitem__:
            start, stop, _ = args[1].indices(args[0].size(0))
            return args[0].narrow(0, start, stop - start)
        if func is Tensor.copy_:
            self.events.append(f"{args[1].device.type} to {args[0].device.type}")
            return args[0]
        if func is torch._foreach_copy_:
            to, source = args
            self.events.append(f"{source[0].device.type} to {to[0].device.type}")
            return None
        if func is torch._foreach_mul_:
            return None
        result = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self.pinned.append(result)
        return result

    def has_pinned(self, tensor: Tensor) -> bool:
        return any(tensor is each for each in self.pinned)


class NotedAdam(FusedAdamW):
    """Takes no step, but notes when it would."""

    events: list[str]

    def step(self) -> None:
        self.events.append("AdamW")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    mode = Gpu()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: mode.events.append("synchronize"))
    monkeypatch.setattr(NotedAdam, "events", mode.events, raising=False)
    with FakeTensorMode(), mode:
        yield mode


def build(precision: str, *, on_host: bool) -> tuple[ZeroOptimizer, FusedAdamW]:
    """Two tensors in one bucket, on one rank."""
    params, ranges, end = [], {}, 0
    for name, shape in SIZES.items():
        param = torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=DTYPES[precision]))
        tag(param, GlobalTensor(name, shape, 0))
        start, end = end, end + param.numel()
        params.append(param)
        ranges[param] = (start, end, 0)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    gradients = torch.empty(end, device="cuda")
    buffer = SimpleNamespace(
        data_parallel_group=alone,
        buckets=[SimpleNamespace(grad_data=gradients, offset=0, params_list=params)],
        param_index_map=ranges,
        param_data=torch.empty(end, device="cuda", dtype=DTYPES[precision]),
        grad_data=gradients,
    )
    chunk: Any = SimpleNamespace(
        buffers=[buffer],
        expert_parallel_buffers=[],
        dp_group=alone,
        ddp_config=SimpleNamespace(overlap_param_gather=False),
    )
    made: list[FusedAdamW] = []

    def make(*args: Any, **kwargs: Any) -> FusedAdamW:
        made.append(NotedAdam(*args, **kwargs))
        return made[0]

    choice = AdamChoice("", "", on_host, make)
    groups: Any = SimpleNamespace(intra_dist_opt=alone)
    return build_optimizer([chunk], OptimConfig(lr=1.0), choice, groups), made[0]


def masters(adam: FusedAdamW) -> list[Tensor]:
    return [master for group in adam.param_groups for master in group["params"]]


def devices(adam: FusedAdamW) -> set[tuple[str, torch.dtype]]:
    """Of masters, the gradients that update them, and moments."""
    every = []
    for master in masters(adam):
        moments = adam.state[master]
        every += [master, master.grad, moments["exp_avg"], moments["exp_avg_sq"]]
    assert len(every) == 4 * len(SIZES)
    return {(tensor.device.type, tensor.dtype) for tensor in every}


@pytest.mark.parametrize("precision", DTYPES)
def test_all_that_a_host_optimizer_touches_is_on_the_host(precision: str, gpu: Gpu) -> None:
    optimizer, adam = build(precision, on_host=True)
    assert devices(adam) == {("cpu", torch.float32)}
    assert all(gpu.has_pinned(each) and gpu.has_pinned(each.grad) for each in masters(adam))
    gpu.events.clear()
    optimizer.update(1.0, torch.zeros((), dtype=torch.float64, device="cuda"))
    brought = ["cuda to cpu"] * len(SIZES)
    assert gpu.events == [*brought, "synchronize", "AdamW", "cpu to cuda"]


@pytest.mark.parametrize("precision", DTYPES)
def test_without_it_nothing_leaves_the_gpu(precision: str, gpu: Gpu) -> None:
    optimizer, adam = build(precision, on_host=False)
    assert devices(adam) == {("cuda", torch.float32)}
    assert not gpu.pinned
    gpu.events.clear()
    optimizer.update(1.0, torch.zeros((), dtype=torch.float64, device="cuda"))
    assert gpu.events == (["AdamW", "cuda to cuda"] if precision == "bf16" else ["AdamW"])


@pytest.mark.parametrize("precision", DTYPES)
def test_a_checkpoint_does_not_tell_where_adamw_ran(precision: str, gpu: Gpu) -> None:
    """So that a run may go on under another back end."""
    here, there = (
        {(each.key, each.shape, each.offset, each.data.dtype) for each in optimizer.pieces()}
        for optimizer, _ in (build(precision, on_host=on_host) for on_host in (False, True))
    )
    assert here == there
    assert len(here) == len(SIZES) * (4 if precision == "bf16" else 3)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_what_is_loaded_reaches_the_masters(precision: str, on_host: bool, gpu: Gpu) -> None:
    optimizer, adam = build(precision, on_host=on_host)
    kind = "master" if precision == "bf16" else "weight"
    loaded = [each.data for each in optimizer.pieces() if each.key.startswith(kind)]
    assert set(map(id, loaded)) == set(map(id, masters(adam)))
