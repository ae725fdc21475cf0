"""Which ranges a rank owns, against what megatron-core's DistributedOptimizer would own."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.distributed import cpu_ranks
from dsv2_train.distributed.sharding import whole_of
from dsv2_train.optim.build import wrap
from dsv2_train.optim.shards import owned_shards
from tests.helpers.fake_world import build_fake, destroy_fake
from tests.helpers.toy import NUM_LAYERS, Toy

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@pytest.fixture(autouse=True)
def fake_world() -> Iterator[None]:
    cpu_ranks.install()
    yield
    destroy_fake()


def build(
    rank: int, world_size: int, ep: int, precision: str, bucket_size: int | None = None
) -> DistributedDataParallel:
    parallel = ParallelConfig(world_size=world_size, ep=ep, bucket_size=bucket_size)
    groups = build_fake(parallel, rank)
    toy = Toy(range(NUM_LAYERS), groups.ep.rank(), ep, PRECISIONS[precision])
    return wrap(toy, parallel, precision, groups)


Owned = tuple[str, int, int, int]


def what_megatron_core_owns(chunk: DistributedDataParallel) -> set[Owned]:
    """Name, first element in the whole, size, and address of the gradient."""
    found = set()
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        for index in range(len(buffer.buckets)):
            ranges = DistributedOptimizer._build_model_gbuf_range(buffer, index)["param_map"]
            for param, its in ranges.items():
                gradient = buffer.grad_data[its["gbuf_world"].start :]
                whole = whole_of(param)
                offset = whole.offset + its["param"].start
                found.add((whole.name, offset, its["param"].size, gradient.data_ptr()))
    return found


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2), (4, 2), (4, 4), (8, 2)]),
    precision=st.sampled_from(["fp32", "bf16"]),
    bucket_size=st.sampled_from([None, 1, 50, 300, 10_000]),
    data=st.data(),
)
def test_the_ranges_are_megatron_core_s(
    layout: tuple[int, int], precision: str, bucket_size: int | None, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, layout[0] - 1))
    chunk = build(rank, *layout, precision, bucket_size)
    shards = owned_shards(chunk, on_host=False)
    found = {
        (s.place.name, s.place.offset, s.weight.numel(), s.gradient.data_ptr()) for s in shards
    }
    assert len(found) == len(shards)
    assert found == what_megatron_core_owns(chunk)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shards_are_views_and_masters_are_fp32(precision: str) -> None:
    chunk = build(1, 4, 2, precision, bucket_size=300)
    wholes = {(whole_of(p).name, whole_of(p).offset): p for p in chunk.parameters()}
    shards = owned_shards(chunk, on_host=False)
    assert shards
    for shard in shards:
        (param, first) = next(
            (param, shard.place.offset - offset)
            for (name, offset), param in wholes.items()
            if name == shard.place.name
        )
        owned = slice(first, first + shard.weight.numel())
        assert torch.equal(shard.master, param.detach().flatten()[owned].float())
        shard.weight.fill_(7)
        shard.gradient.fill_(5)
        assert (param.detach().flatten()[owned] == 7).all()
        assert (param.main_grad.flatten()[owned] == 5).all()
        assert shard.master.dtype == shard.gradient.dtype == torch.float32
        assert shard.has_own_master is (precision == "bf16")
        assert bool((shard.master == 7).all()) is not shard.has_own_master


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"\S+ is torch.float64; allowed: torch.float32, torch.bfloat16"
    ):
        owned_shards(build(0, 2, 1, "fp64"), on_host=False)
