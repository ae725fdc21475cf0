"""The experiment for one GPU trains through our kernels as without them, here emulated."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.ours import Ours
from benchmarks.workload import batches
from dsv2_kernels.native import library
from dsv2_kernels.native.build import build_emulated
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.parallel import ParallelConfig, TorchOrKernel
from dsv2_train.distributed import cpu_ranks
from dsv2_train.distributed import groups as process_groups
from dsv2_train.model.build import build_model
from dsv2_train.model.implementation import choose

CPU = torch.device("cpu")
CHOICES = [
    name for name, field in ParallelConfig.model_fields.items() if field.annotation == TorchOrKernel
]
NUM_STEPS = 3


def config(implementation: str) -> RunConfig:
    """One short sequence a step: an emulated thread takes microseconds."""
    words = [
        "experiment=debug_1gpu",
        "recipe.sequence_length=16",
        "recipe.micro_batch_size=1",
        "recipe.global_batch_size=1",
        "recipe.capacity_factor=null",
        *(f"parallel.{name}={implementation}" for name in CHOICES),
    ]
    return resolve(words, need_data=False)


@pytest.fixture
def groups() -> Iterator[ProcessGroupCollection]:
    cpu_ranks.install()
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    yield process_groups.build(config("torch").parallel, timeout_s=60)
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
    groups: ProcessGroupCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To bf16's rounding, 2^-8, of the one nat or so that predictions differ from uniform by."""
    launched: list[str] = []
    launch = library._call

    def noted(_: Any, name: str, *rest: Any) -> None:
        launched.append(name)
        launch(_, name, *rest)

    monkeypatch.setattr(library, "_call", noted)
    build_emulated(tmp_path / "kernels.so")
    with library.emulated(tmp_path / "kernels.so"):
        expected = losses("torch", groups)
        assert not launched
        found = losses("kernel", groups)
    assert {"swiglu_gate_forward", "swiglu_gate_backward"} <= set(launched)
    assert found == pytest.approx(expected, abs=2**-7)
