"""The experiment for one GPU trains through our kernels as without them, here emulated."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.ours import Ours
from benchmarks.workload import batches
from dsv2_kernels.native import library
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.parallel import KERNEL_SETTINGS
from dsv2_train.distributed import cpu_ranks
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose
from tests.helpers.kernels import KERNELS

CPU = torch.device("cpu")
NUM_STEPS = 3


def config(implementation: str) -> RunConfig:
    """One short sequence a step: an emulated thread takes microseconds."""
    words = [
        "experiment=debug_1gpu",
        "recipe.sequence_length=16",
        "recipe.micro_batch_size=1",
        "recipe.global_batch_size=1",
        "recipe.capacity_factor=null",
        *(f"parallel.{name}={implementation}" for name in KERNEL_SETTINGS),
    ]
    return resolve(words, need_data=False)


@pytest.fixture
def groups() -> Iterator[ProcessGroupCollection]:
    cpu_ranks.install()
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    yield process_groups.build(config("auto").parallel, timeout_s=60)
    process_groups.destroy()
    dist.destroy_process_group()


def losses(implementation: str, groups: ProcessGroupCollection) -> list[float]:
    """Of the first steps."""
    run = config(implementation)
    ours = Ours(run, build_model(run, groups, choose(run.parallel, CPU), CPU), groups)
    found = []
    for batch in batches(run, NUM_STEPS):
        found.append(ours.forward_backward(batch))
        ours.update()
    return found


def test_with_and_without_kernels(
    groups: ProcessGroupCollection, emulated_library: Path, launched: list[str]
) -> None:
    """To bf16's rounding, 2^-8, of the one nat or so that predictions differ from uniform by."""
    with library.emulated(emulated_library):
        expected = losses("auto", groups)
        assert not launched
        found = losses("kernel", groups)
    assert set(launched) >= KERNELS
    assert found == pytest.approx(expected, abs=2**-7)
