"""A plan's proof: what it takes for granted, what it finds, and its times against another way."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.messages import Program, with_messages
from dsv2_train.pipeline.plans import Kind, Op, Plan
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.schedules.build import build_forward_plan
from dsv2_train.pipeline.simulate import PlanError, peak_activations, simulate, validate
from tests.unit.pipeline.compared import runs_as_simulated
from tests.unit.pipeline.drawn import FIXED, costs, fixed_plans, v2_costs
from tests.unit.pipeline.events import World

ZB = fixed.build("zb_h1", Placement(4, 1, "loop"), 6)


def with_ops(plan: Plan, stage: int, ops: list[Op]) -> Plan:
    return replace(plan, ops=(*plan.ops[:stage], tuple(ops), *plan.ops[stage + 1 :]))


def swapped(plan: Plan, stage: int, one: Op, other: Op) -> Plan:
    ops = list(plan.ops[stage])
    i, j = ops.index(one), ops.index(other)
    ops[i], ops[j] = other, one
    return with_ops(plan, stage, ops)


@pytest.mark.parametrize("schedule", FIXED)
@settings(max_examples=10)
@given(data=st.data(), ahead=st.integers(1, 5))
def test_the_times_are_those_of_an_event_simulation(
    schedule: str, data: st.DataObject, ahead: int
) -> None:
    """Up to 32 stages, 128 microbatches and 4 chunks."""
    plan = data.draw(fixed_plans(schedules=[schedule]))
    runs_as_simulated(plan, data.draw(costs(plan.placement)), ahead)


def test_activations_are_held_from_f_to_w() -> None:
    assert peak_activations(ZB) == (4, 4, 4, 4)
    assert peak_activations(fixed.build("1f1b", Placement(4, 1, "loop"), 6)) == (4, 3, 2, 1)


def test_a_bubble_counts_the_idle_time_of_all_stages() -> None:
    """Two stages of cost 3 and 1: one microbatch, 4 + 2 of 2 x 6 busy with BW as long as F."""
    place = Placement(2, 1, "loop")
    uneven = Costs((3.0, 1.0), (1.0, 0.5), (0.0, 0.5))
    simulation = simulate(fixed.build("1f1b", place, 1), uneven)
    assert simulation.step_s == 6.0
    assert simulation.bubble == pytest.approx(1 - 6 / 12)


def _both_at_last_b(ops: tuple[Op, ...]) -> list[Op]:
    """The last B as a BW, which completes the gradients of its chunk before earlier W."""
    last, both = Op(Kind.B, 5, 0), Op(Kind.BW, 5, 0)
    return [both if op == last else op for op in ops if op != Op(Kind.W, 5, 0)]


BROKEN = [
    (
        swapped(ZB, 3, Op(Kind.F, 2, 0), Op(Kind.B, 2, 0)),
        "stage 3 runs B of microbatch 2, chunk 0 before F of microbatch 2, chunk 0",
    ),
    (
        swapped(ZB, 0, Op(Kind.B, 2, 0), Op(Kind.W, 2, 0)),
        "stage 0 runs W of microbatch 2, chunk 0 before B of microbatch 2, chunk 0",
    ),
    (
        swapped(ZB, 1, Op(Kind.F, 0, 0), Op(Kind.F, 1, 0)),
        "stage 1 runs F of microbatch 0, chunk 0 after a later microbatch",
    ),
    (
        with_ops(ZB, 3, _both_at_last_b(ZB.ops[3])),
        "stage 3 runs W of microbatch 2, chunk 0 after a later microbatch",
    ),
    (
        with_ops(ZB, 2, [op for op in ZB.ops[2] if op != Op(Kind.W, 4, 0)]),
        "stage 2 has B of microbatch 4, chunk 0; must have B and W, or BW",
    ),
    (
        with_ops(ZB, 2, [op for op in ZB.ops[2] if op.microbatch != 5]),
        "stage 2 lacks F of microbatch 5, chunk 0",
    ),
    (
        with_ops(ZB, 1, [*ZB.ops[1], Op(Kind.BW, 5, 0)]),
        "stage 1 runs BW of microbatch 5, chunk 0 after a later microbatch",
    ),
    (
        with_ops(ZB, 1, [*ZB.ops[1], Op(Kind.W, 5, 0)]),
        "stage 1 runs W of microbatch 5, chunk 0 twice",
    ),
    (
        with_ops(ZB, 1, [*ZB.ops[1], Op(Kind.F, 6, 0)]),
        "stage 1 runs F of microbatch 6, chunk 0, of 1 chunks and 6 microbatches",
    ),
    (replace(ZB, ops=ZB.ops[:3]), "the plan has ops for 3 stages, its placement 4 stages"),
]


@pytest.mark.parametrize(("plan", "message"), BROKEN)
def test_a_broken_stage_is_named(plan: Plan, message: str) -> None:
    with pytest.raises(PlanError) as refused:
        validate(plan)
    assert str(refused.value) == message


def test_bw_beside_w_is_found() -> None:
    plan = fixed.build("1f1b", Placement(2, 1, "loop"), 2)
    mixed = with_ops(plan, 0, [*plan.ops[0][:2], Op(Kind.B, 0, 0), *plan.ops[0][3:]])
    with pytest.raises(PlanError, match="stage 0 has B of microbatch 0, chunk 0; must"):
        validate(mixed)


def test_what_the_turn_of_a_v_contradicts_is_found() -> None:
    plan = fixed.build("zb_v", Placement(2, 2, "v"), 3)
    early = swapped(plan, 1, Op(Kind.F, 0, 0), Op(Kind.F, 0, 1))
    with pytest.raises(PlanError, match="stage 1 runs F of microbatch 0, chunk 1 before F of"):
        validate(early)


def test_a_deadlock_names_both_stages_and_ops() -> None:
    """Stage 0 wants a gradient before it sends what that gradient is made from."""
    plan = fixed.build("1f1b", Placement(2, 1, "loop"), 3)
    first, second, *rest = plan.ops[0]
    assert (first.kind, second.kind, rest[0].kind) == (Kind.F, Kind.F, Kind.BW)
    waiting = list(plan.ops[1])
    waiting[1], waiting[2] = waiting[2], waiting[1]  # F of 1 before BW of 0
    stuck = with_ops(with_ops(plan, 1, waiting), 0, [first, rest[0], second, *rest[1:]])
    with pytest.raises(PlanError) as refused:
        simulate(stuck, v2_costs(plan.placement))
    assert str(refused.value) == (
        "a deadlock: stage 0 waits at BW of microbatch 0, chunk 0 for BW of microbatch 0, chunk 0"
        " of stage 1, stage 1 waits at F of microbatch 1, chunk 0 for F of microbatch 1, chunk 0"
        " of stage 0"
    )


@settings(max_examples=60)
@given(data=st.data(), plan=fixed_plans(max_microbatches=12))
def test_any_swap_is_found_or_does_no_harm(data: st.DataObject, plan: Plan) -> None:
    """Two ops of a stage change places: refused, or it runs in the event simulation as well."""
    stage = data.draw(st.integers(0, plan.placement.num_stages - 1))
    place = data.draw(st.integers(0, max(0, len(plan.ops[stage]) - 2)))
    one, other = plan.ops[stage][place], plan.ops[stage][(place + 1) % len(plan.ops[stage])]
    changed, drawn = swapped(plan, stage, one, other), v2_costs(plan.placement)
    try:
        validate(changed)
    except PlanError as error:
        assert f"stage {stage} runs" in str(error)
        return
    world = World(changed, drawn, 4)
    if world.run():
        assert simulate(changed, drawn).step_s == max(spans[-1][1] for spans in world.spans)
    else:
        with pytest.raises(PlanError, match="a deadlock: stage"):
            simulate(changed, drawn)


def exchange_posts(program: Program, stage: int, place: int) -> Program:
    """The first two receives of an action, the other way round."""
    action = program[stage][place]
    posts = (action.posts[1], action.posts[0], *action.posts[2:])
    actions = list(program[stage])
    actions[place] = replace(action, posts=posts)
    return (*program[:stage], tuple(actions), *program[stage + 1 :])


def test_receives_in_another_order_are_found() -> None:
    program = with_messages(ZB)
    broken = exchange_posts(program, 2, 0)
    assert [str(message) for message in broken[2][0].posts[:2]] == [
        "F of microbatch 1, chunk 0 (stage 1 to stage 2)",
        "F of microbatch 0, chunk 0 (stage 1 to stage 2)",
    ]
    with pytest.raises(PlanError) as refused:
        simulate(ZB, v2_costs(ZB.placement), broken)
    assert str(refused.value) == (
        "stage 1 sends F of microbatch 0, chunk 0 to stage 2, "
        "whose next receive from there is F of microbatch 1, chunk 0"
    )


def without_a_post(program: Program, stage: int) -> Program:
    actions = list(program[stage])
    actions[0] = replace(actions[0], posts=actions[0].posts[:-1])
    return (*program[:stage], tuple(actions), *program[stage + 1 :])


def test_a_receive_that_is_never_posted_is_found() -> None:
    plan = fixed.build("1f1b", Placement(2, 1, "loop"), 1)
    with pytest.raises(PlanError, match="stage 1 waits at F of microbatch 0, chunk 0 for F of"):
        simulate(plan, v2_costs(plan.placement), without_a_post(with_messages(plan), 1))


def test_a_message_too_many_is_found() -> None:
    plan = fixed.build("1f1b", Placement(2, 1, "loop"), 2)
    program = with_messages(plan)
    message = program[0][0].sends
    assert message is not None
    idle = (replace(program[0][-1], sends=message),)
    with pytest.raises(PlanError, match="is sent and never received"):
        simulate(plan, v2_costs(plan.placement), ((*program[0][:-1], *idle), program[1]))
    twice = replace(program[1][-1], posts=(message,))
    with pytest.raises(PlanError, match="is to be received and never sent"):
        simulate(plan, v2_costs(plan.placement), (program[0], (*program[1][:-1], twice)))


def test_another_order_of_actions_than_the_plans_is_found() -> None:
    program = with_messages(ZB)
    with pytest.raises(PlanError, match="stage 0: the actions are not the plan's ops"):
        simulate(ZB, v2_costs(ZB.placement), (program[0][::-1], *program[1:]))


@pytest.mark.parametrize(("ahead", "step_s"), [(1, 4.0), (2, 3.5)])
def test_what_is_sent_waits_for_its_receive(ahead: int, step_s: float) -> None:
    """Stage 1 runs F of 0 from 1.5 to 2.5; F of 1 is sent at 2, its receive posted at 2.5 or 0."""
    plan = build_forward_plan(Placement(2, 1, "loop"), 2)
    drawn = Costs.equal(plan.placement, 1.0, 0.0, 0.0, communication_s=0.5)
    assert simulate(plan, drawn, with_messages(plan, ahead)).step_s == step_s
