"""A plan's number tells of any difference on any stage."""

from dataclasses import replace

import pytest

from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.stage.agreement import plan_hash
from tests.unit.pipeline.drawn import placement


@pytest.mark.parametrize("stage", range(4))
def test_plans_that_differ_on_one_stage_have_other_numbers(stage: int) -> None:
    plan = fixed.build("1f1b", placement("1f1b", 4, 1), 8)
    other = [list(ops) for ops in plan.ops]
    other[stage][-1], other[stage][-2] = other[stage][-2], other[stage][-1]
    changed = replace(plan, ops=tuple(map(tuple, other)))
    assert plan_hash(plan) == plan_hash(replace(plan, schedule="search"))
    assert plan_hash(plan) != plan_hash(changed)
