"""How much one layer of experts asks of torch, against megatron-core's; what the counting sees."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.op_count import Counts, count_layers, counted
from benchmarks.ranks import run_ranks
from benchmarks.workload import workload
from dsv2_train.distributed import groups as process_groups
from tests.helpers.model import build_on_cpu
from tests.helpers.moe_layer import layer_config
from tests.helpers.world import World


def test_a_tenth_of_megatron_core_s_ops_at_160_experts() -> None:
    parallel = workload(160, 256).parallel
    (found,) = run_ranks(_count_layers, parallel)
    megatron = found["megatron-core"].ops
    assert found["dsv2_train, grouped_mm"].ops <= megatron / 10
    # Expert by expert on a CPU: six products each, and megatron-core's glue between them is gone.
    assert 6 * 160 < found["dsv2_train, loop"].ops <= megatron / 2


def _count_layers(groups: object) -> dict[str, Counts]:
    return count_layers(160, 256, groups)  # type: ignore[arg-type]


@pytest.mark.parametrize("ep", [1, 2])
def test_the_host_waits_for_the_number_of_rows_and_the_sizes_of_the_exchange(
    world: World, ep: int
) -> None:
    """Routing, losses, capacity, statistics and experts read nothing back, forward or backward."""
    known = Counter(nonzero=1) if ep == 1 else Counter(nonzero=2, tolist=1)
    for counts in world.run(_layer_with_capacity, ep, ep):
        assert counts.reads <= known


@pytest.mark.parametrize("ep", [1, 2])
def test_with_our_kernels_it_waits_for_the_sizes_alone(
    world: World, ep: int, emulated_library: Path
) -> None:
    """On one rank for nothing, but for what is left after dropping."""
    known = Counter(item=1) if ep == 1 else Counter(tolist=1)
    for counts in world.run(_layer_of_kernels, ep, ep, emulated_library):
        assert counts.reads == known
    if ep == 1:
        (counts,) = world.run(
            _layer_of_kernels, ep, ep, emulated_library, "recipe.capacity_factor=null"
        )
        assert counts.reads == Counter()


def _layer_of_kernels(rank: int, ep: int, library: Path, *overrides: str) -> Counts:
    from dsv2_kernels.native.library import emulated  # noqa: PLC0415  of tests that use kernels alone

    kernels = [f"parallel.{op}=kernel" for op in ("routing", "permute", "activation")]
    with emulated(library):
        return _layer_with_capacity(rank, ep, *kernels, *overrides)


def _layer_with_capacity(rank: int, ep: int, *overrides: str) -> Counts:
    grouped = ("recipe.capacity_factor=1.0", "parallel.experts=grouped_mm")
    config = layer_config(ep, "fp32", *grouped, *overrides)
    model, _ = build_on_cpu(config)
    layer = model.decoder.layers[1].mlp
    layer.exempt = torch.tensor([False, True])
    hidden = torch.randn(8, 2, 16, requires_grad=True)
    with counted(lists=True) as counts:
        output, _ = layer(hidden)
        output.sum().backward()
    assert counts.ops > 100 and layer.statistics.any()
    process_groups.destroy()
    return counts


class _Reads(torch.autograd.Function):
    """Reads a value in the backward pass."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * grad.sum().item()


VALUES = torch.tensor([3, 0, 2])
READING: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda x: x[0].item(), "item"),
    "if": (lambda x: bool(x[0]), "item"),
    "int": (lambda x: int(x[0]), "item"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "cpu": (lambda x: x.cpu(), "cpu"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "mask": (lambda x: x[x > 0], "index by a mask"),
    "masked assignment": (lambda x: x.clone().index_put_((x > 0,), x[0]), "index by a mask"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "unique": (lambda x: x.unique(), "unique"),
    "bincount": (lambda x: x.bincount(), "bincount"),
    "equal": (lambda x: torch.equal(x, x + 1), "equal"),
    "repeats": (lambda x: x.repeat_interleave(x), "repeat_interleave"),
    "event": (lambda x: torch.cuda.Stream().synchronize(), "event"),
    "backward": (lambda x: _Reads.apply(x.float().requires_grad_()).sum().backward(), "item"),
}


@pytest.mark.parametrize("case", READING)
def test_what_would_wait_is_seen(world: World, case: str) -> None:
    (reads,) = world.run(_reads_of, 1, case)
    assert reads == Counter([READING[case][1]])


def _reads_of(rank: int, case: str) -> Counter[str]:
    with counted(lists=True) as counts:
        READING[case][0](VALUES)
    return counts.reads


def test_what_does_not_wait_is_not() -> None:
    with counted(lists=True) as counts:
        x = VALUES.index_select(0, torch.tensor([0, 2])).view(2, 1)
        x = torch.where(x > 2, x, 0)[torch.tensor([1])]
        x.repeat_interleave(torch.tensor([2]), 0, output_size=2).cumsum(0).sort()
    assert not counts.reads
    assert counts.views >= 1
    assert counts.by_op["cumsum"] == counts.by_op["sort"] == 1
    assert "view" not in counts.by_op


def test_lists_of_what_is_on_the_host_do_not_wait() -> None:
    with counted(lists=False) as counts:
        VALUES.tolist()
    assert not counts.reads
