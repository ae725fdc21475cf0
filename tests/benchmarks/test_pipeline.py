"""The comparison of pipeline runtimes: every contender sleeps what its plan says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import pipeline, report
from benchmarks.pipeline import (
    Measured,
    PipelineRow,
    PipelineStep,
    Planned,
    measure,
    plans,
    rows,
)
from benchmarks.timing import Ratio, Times
from dsv2_train.pipeline.plans import Kind
from tests.helpers.world import World

STEP = PipelineStep(
    num_stages=2, num_microbatches=4, forward_s=3e-3, input_grad_s=5e-3, weight_grad_s=2e-3
)
REPEATS = 1


def _measured(rank: int, planned: Planned) -> dict[str, Measured]:
    """Raises where a stage does not sleep F, B and W in the order of its plan."""
    del rank
    return measure(STEP, planned, REPEATS)


def test_every_runtime_sleeps_its_plan_and_takes_at_least_its_time(world: World) -> None:
    found = rows(STEP, world.run(_measured, STEP.num_stages, plans(STEP)))
    assert [row.name for row in found] == [*plans(STEP), pipeline.TORCH_ZB_V]
    for row in found:
        assert len(row.step_s.seconds) == REPEATS
        # Of each kind, the first op of a step may be shortened by what the step before was late.
        assert row.step_s.best > 0.8 * row.theoretical_step_s
    by_name = {row.name: row for row in found}
    ours, theirs = by_name["dsv2_train zb_v v=2"], by_name[pipeline.TORCH_ZB_V]
    assert ours.theoretical_step_s == pytest.approx(theirs.theoretical_step_s)
    assert by_name[pipeline.MEGATRON_1F1B].of_megatron.median == 1
    assert theirs.of_torch.median == 1


def test_a_runtime_that_sleeps_in_another_order_is_found(world: World) -> None:
    runtime, plan = plans(STEP)[pipeline.MEGATRON_1F1B]
    forwards_first = tuple(
        tuple(sorted(ops, key=lambda op: op.kind is not Kind.F)) for ops in plan.ops
    )
    planned = {pipeline.MEGATRON_1F1B: (runtime, replace(plan, ops=forwards_first))}
    with pytest.raises(RuntimeError, match=r"1f1b: stage \d did not sleep as planned"):
        world.run(_measured, STEP.num_stages, planned)


def test_what_is_derived_from_a_row_is_written_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work of 6 s in steps of 8, 10 and 12 s, where theory has one of 7.5 s."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    one = Ratio(1.0, 1.0, 1.0, 1.0)
    row = PipelineRow("ours", Times((8.0, 12.0, 10.0)), 6.0, 7.5, 0.2, 2.0, one, one)
    written = json.loads(report.write("pipeline", {"rows": [row]}).read_text())["rows"][0]
    assert written["step_s"] == {"seconds": [8.0, 12.0, 10.0], "best": 8.0, "median": 10.0}
    assert written["bubble"] == pytest.approx(0.4)
    assert written["excess"] == pytest.approx(0.2)
    assert written["least_excess"] == pytest.approx(0.05)
