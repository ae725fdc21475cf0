"""The number by which stages compare their plans."""

from dataclasses import replace

import pytest

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.stage.agreement import plan_hash

PLAN = fixed.build("zb_h1", Placement(4, 1, "loop"), 6)


@pytest.mark.parametrize("stage", range(4))
def test_another_order_on_any_stage_is_another_number(stage: int) -> None:
    ops = PLAN.ops[stage]
    other = (*PLAN.ops[:stage], (*ops[:-2], ops[-1], ops[-2]), *PLAN.ops[stage + 1 :])
    assert plan_hash(replace(PLAN, ops=other)) != plan_hash(PLAN)


def test_another_placement_is_another_number() -> None:
    assert plan_hash(replace(PLAN, placement=Placement(2, 2, "v"))) != plan_hash(PLAN)


def test_the_same_plan_is_the_same_number() -> None:
    assert plan_hash(fixed.build("zb_h1", PLAN.placement, 6)) == plan_hash(PLAN)
