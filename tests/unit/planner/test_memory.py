"""Bytes of model state against figures by hand and a sum over the ranks."""

import pytest

from dsv2_train.config.sections.parallel import ParallelConfig
from dsv2_train.planner.layout import plan_stages
from dsv2_train.planner.memory import rank_memory, stage_memory
from dsv2_train.recipe.parameters import ParameterCount, stage_parameters
from tests.unit.recipe.presets import preset

V2 = preset("dsv2_236b_pretrain")


def test_the_mean_rank_of_the_paper_layout() -> None:
    """Facts 5.2: 1.740B expert and 0.748B other parameters on a rank, of 1024."""
    held = ParameterCount(attention=748_000_000, routed_experts=1_740_000_000)
    memory = rank_memory(held, ParallelConfig(world_size=1024, pp=16, ep=8), "bf16")
    # Printed in GB with one decimal.
    assert memory.weight_bytes / 1e9 == pytest.approx(5.0, abs=0.05)
    assert memory.gradient_bytes / 1e9 == pytest.approx(10.0, abs=0.05)
    assert memory.optimizer_bytes / 1e9 == pytest.approx(2.6 + 0.14, abs=0.05)


def test_a_middle_stage_of_the_paper_layout_by_hand() -> None:
    """Four layers, on 128 ranks: experts owned whole by their rank, the rest by an eighth."""
    experts = 4 * 20 * 23_592_960
    other = 4 * (149_237_760 + 819_200 + 2 * 23_592_960)
    memory = stage_memory(V2)[1]
    assert memory.weight_bytes == 2 * (experts + other)
    assert memory.gradient_bytes == 4 * (experts + other)
    assert memory.optimizer_bytes == 12 * (experts + other // 8)
    assert memory.checkpoint_bytes == 14 * (experts + other // 8)
    assert memory.total_bytes == 18 * experts + 6 * other + 12 * other // 8


@pytest.mark.parametrize("world_size", [128, 512])
def test_the_ranks_own_the_optimizer_state_once(world_size: int) -> None:
    config = V2.model_copy(
        update={"parallel": V2.parallel.model_copy(update={"world_size": world_size})}
    )
    held = sum(memory.optimizer_bytes for memory in stage_memory(config)) * config.parallel.dp
    # What does not divide rounds up by less than one parameter on each rank, for each of the two.
    assert 0 <= held - 12 * 235_741_434_880 < 2 * 12 * world_size


def test_precisions() -> None:
    held = ParameterCount(head=1000)
    alone = ParallelConfig(world_size=1)
    by_precision = {
        name: rank_memory(held, alone, name).total_bytes // 1000
        for name in ("bf16", "fp32", "fp64")
    }
    # bf16: 2 + 4 + (4 + 4 + 4); fp32: 4 + 4 + (4 + 4); fp64: 8 + 8, with no optimizer.
    assert by_precision == {"bf16": 18, "fp32": 16, "fp64": 16}


def test_every_stage_is_counted() -> None:
    memories, stages = stage_memory(V2), stage_parameters(V2.model, V2.parallel)
    assert [memory.weight_bytes for memory in memories] == [
        2 * (stage.total - stage.routed_experts * 7 // 8) for stage in stages
    ]


def test_host_memory_is_the_checkpoint_of_the_rank_if_it_is_copied() -> None:
    for asynchronous in (True, False):
        checkpoint = V2.checkpoint.model_copy(update={"asynchronous": asynchronous})
        stages = plan_stages(V2.model_copy(update={"checkpoint": checkpoint}))
        assert [stage.host_bytes_per_rank for stage in stages] == [
            stage.memory.checkpoint_bytes * asynchronous for stage in stages
        ]
