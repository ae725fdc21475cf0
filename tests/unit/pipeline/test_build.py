"""The executor of a run: the lanes that are connected before the first step, and its plans."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsv2_train.config.placement import Placement
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import lanes
from dsv2_train.pipeline import build, executor
from dsv2_train.pipeline.messages import with_messages
from dsv2_train.pipeline.plans import Plan
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.schedules.run_plan import run_plan
from dsv2_train.pipeline.stage.activation import Hidden
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")
STAGES = 4


def connected(config: RunConfig, stage: int) -> list[tuple[int, int]]:
    """Source and target of every message that a stage takes part in, by the time it is built."""
    used = []

    def sent(tensor: Tensor, peer: int, group: object) -> mock.Mock:
        used.append((stage, peer))
        return mock.Mock()

    def received(tensor: Tensor, peer: int, group: object) -> mock.Mock:
        used.append((peer, stage))
        return mock.Mock()

    group = SimpleNamespace(rank=lambda: stage, size=lambda: STAGES)
    fake = mock.Mock(
        wraps=dist,
        isend=sent,
        irecv=received,
        get_backend=lambda: "gloo",
        get_process_group_ranks=lambda group: list(range(STAGES)),
        new_subgroups_by_enumeration=lambda *ranks, **named: (group, [group]),
    )
    chunk = mock.Mock(config=SimpleNamespace(hidden_size=8, pipeline_dtype=torch.float32))
    chunks = [chunk] * config.parallel.chunks
    nothing = mock.patch.multiple(build, ChunkSync=mock.DEFAULT, Executor=mock.DEFAULT)
    with mock.patch.object(lanes, "dist", fake), nothing:
        build.build_executor(config, chunks, CPU, timeout_s=1)
    return used


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("1f1b", 1), ("zb_v", 2), ("interleaved", 2), ("search", 2), ("search", 3)],
)
def test_every_lane_that_a_plan_uses_is_connected_in_one_order(schedule: str, chunks: int) -> None:
    """Both its ends wait for each other there; the last stage sends to the first one in a loop."""
    config = tiny_config(
        "model.num_layers=24",
        f"parallel.world_size={STAGES}",
        f"parallel.pp={STAGES}",
        f"parallel.schedule={schedule}",
        f"parallel.chunks={chunks}",
    )
    sends = [each.sends for program in with_messages(run_plan(config, 4)) for each in program]
    lanes_used = sorted({(e.source, e.target) for e in sends if e is not None and not e.is_local})
    for stage in range(STAGES):
        assert connected(config, stage) == [each for each in lanes_used if stage in each]


def test_a_plan_is_made_and_proved_once_for_each_number_of_microbatches() -> None:
    place, made = Placement(1, 1, "loop"), []

    def plan_of(num_microbatches: int, forward_only: bool) -> Plan:
        made.append((num_microbatches, forward_only))
        return fixed.build("1f1b", place, num_microbatches)

    stage = executor.Executor([], [], place, None, Hidden(8, torch.float32, CPU), plan_of)
    with (
        mock.patch.object(executor, "StageStep") as step,
        mock.patch.object(executor, "prove") as prove,
    ):
        step.return_value.executed = []
        for count, forward_only in [(2, False), (3, False), (2, False), (2, True), (3, False)]:
            stage(
                forward_step_func=mock.Mock(),
                data_iterator=[],
                num_microbatches=count,
                seq_length=4,
                micro_batch_size=1,
                forward_only=forward_only,
            )
    assert made == [(2, False), (3, False), (2, True)]
    assert prove.call_count == 3
    assert step.return_value.run.call_count == 5
