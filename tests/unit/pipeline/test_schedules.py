"""Schedules with a formula: idle time and activations in closed form, and other people's orders."""

from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order
from torch.distributed.pipelining.schedules import (
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.messages import with_messages
from dsv2_train.pipeline.plans import Kind, Plan
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.schedules.build import build_forward_plan, build_plan
from dsv2_train.pipeline.simulate import peak_activations, simulate
from tests.unit.pipeline.compared import runs_as_simulated
from tests.unit.pipeline.drawn import FIXED, bubble_of, costs, fixed_plans, placement, v2_costs

duration = st.floats(0.01, 10.0)
stages, chunks = st.integers(1, 32), st.integers(2, 4)


def idle(schedule: str, p: int, m: int, v: int, durations: tuple[float, float, float]) -> float:
    """Idle time that every stage has; chunks of equal cost."""
    place = placement(schedule, p, v)
    step = simulate(fixed.build(schedule, place, m), Costs.equal(place, *durations)).step_s
    return step - m * sum(durations)


def close(step_work: float, expected: float) -> object:
    """1e-9 of a step: a step is a sum, and what is idle in it a difference."""
    return pytest.approx(expected, abs=1e-9 * (step_work + expected))


@settings(max_examples=25)
@given(p=stages, m=st.integers(1, 128), durations=st.tuples(duration, duration, duration))
def test_idle_time_of_1f1b(p: int, m: int, durations: tuple[float, float, float]) -> None:
    work = sum(durations)
    assert idle("1f1b", p, m, 1, durations) == close(m * work, (p - 1) * work)


@settings(max_examples=15)
@given(
    p=stages, rounds=st.integers(1, 3), v=chunks, durations=st.tuples(duration, duration, duration)
)
def test_idle_time_of_interleaved(
    p: int, rounds: int, v: int, durations: tuple[float, float, float]
) -> None:
    m, work = rounds * p, sum(durations)
    assert idle("interleaved", p, m, v, durations) == close(m * work, (p - 1) * work / v)


@settings(max_examples=25)
@given(p=stages, more=st.integers(0, 96), durations=st.tuples(duration, duration, duration))
def test_idle_time_of_zb_h1(p: int, more: int, durations: tuple[float, float, float]) -> None:
    f, b, w = durations
    assume(w <= min(f, b))
    m = p + more
    assert idle("zb_h1", p, m, 1, durations) == close(m * (f + b + w), (p - 1) * (f + b - w))


@settings(max_examples=15)
@given(
    p=stages, rounds=st.integers(1, 3), v=chunks, durations=st.tuples(duration, duration, duration)
)
def test_idle_time_of_interleaved_zb(
    p: int, rounds: int, v: int, durations: tuple[float, float, float]
) -> None:
    f, b, w = durations
    assume(w <= min(f, b))
    m = rounds * p
    expected = (p - 1) * (f + b - w) / v
    assert idle("interleaved_zb", p, m, v, durations) == close(m * (f + b + w), expected)


@settings(max_examples=15)
@given(p=stages, more=st.integers(0, 32), each=duration)
def test_idle_time_of_zb_v(p: int, more: int, each: float) -> None:
    m = 2 * p - 1 + more
    assert idle("zb_v", p, m, 2, (each,) * 3) == close(3 * m * each, (p - 1) * each / 2)


@pytest.mark.parametrize(
    ("schedule", "v", "m", "percent"),
    [
        ("1f1b", 1, 18, 45.5),
        ("1f1b", 1, 72, 17.2),
        ("zb_h1", 1, 18, 30.8),
        ("zb_h1", 1, 72, 10.0),
        ("zb_v", 2, 18, 26.8),
        ("zb_v", 2, 36, 9.0),
        ("zb_v", 2, 72, 4.7),
        ("interleaved", 2, 80, 8.6),
        ("interleaved", 4, 80, 4.5),
        ("interleaved_zb", 2, 80, 4.8),
        ("interleaved_zb", 4, 80, 2.4),
    ],
)
def test_bubbles_at_the_costs_of_deepseek_v2(schedule: str, v: int, m: int, percent: float) -> None:
    """16 stages; figures that another simulation gave."""
    place = placement(schedule, 16, v)
    bubble = simulate(fixed.build(schedule, place, m), v2_costs(place)).bubble
    assert 100 * bubble == pytest.approx(percent, abs=0.051)


def test_a_bubble_by_hand() -> None:
    """ZB-H1: 15 (1.27 + 2.02 - 1) idle of 72 x 4.29 + 34.35, for 16 stages and 72 microbatches."""
    place = placement("zb_h1", 16, 1)
    bubble = simulate(fixed.build("zb_h1", place, 72), v2_costs(place)).bubble
    assert bubble == pytest.approx(bubble_of(34.35, 72), rel=1e-9)


def most_held(schedule: str, p: int, stage: int, m: int, v: int) -> int:
    """Chunk activations that a stage holds where m is a multiple of p, and at least 2 p."""
    return {
        "1f1b": p - stage,
        "zb_h1": p,
        "zb_v": 2 * p,
        "interleaved": (v - 1) * p + 2 * (p - 1 - stage) + 1,
        "interleaved_zb": v * p,
    }[schedule]


@settings(max_examples=25)
@given(schedule=st.sampled_from(FIXED), p=stages, rounds=st.integers(2, 4), v=chunks)
def test_activations_held(schedule: str, p: int, rounds: int, v: int) -> None:
    v = {"1f1b": 1, "zb_h1": 1, "zb_v": 2}.get(schedule, v)
    plan = fixed.build(schedule, placement(schedule, p, v), rounds * p)
    expected = tuple(most_held(schedule, p, stage, rounds * p, v) for stage in range(p))
    assert peak_activations(plan) == expected


@settings(max_examples=25)
@given(data=st.data(), plan=fixed_plans(), ahead=st.integers(1, 4))
def test_every_schedule_runs_every_layout(data: st.DataObject, plan: Plan, ahead: int) -> None:
    """However few receives are posted ahead, nothing deadlocks; no stage holds more than it may."""
    drawn = data.draw(costs(plan.placement))
    simulation = simulate(plan, drawn, with_messages(plan, ahead))
    assert 0 <= simulation.bubble <= 1
    p, v = plan.placement.num_stages, plan.placement.num_chunks
    if plan.forward_only:
        assert set(simulation.peak_activations) == {0}
        return
    for stage, held in enumerate(simulation.peak_activations):
        assert 0 < held <= most_held(plan.schedule, p, stage, plan.num_microbatches, v)


@pytest.mark.parametrize("schedule", FIXED)
def test_every_schedule_runs_the_largest_layout(schedule: str) -> None:
    v = {"1f1b": 1, "zb_h1": 1, "zb_v": 2}.get(schedule, 4)
    plan = fixed.build(schedule, placement(schedule, 32, v), 128)
    assert 0 < runs_as_simulated(plan, v2_costs(plan.placement), 4).bubble < 0.2


@pytest.mark.parametrize(
    ("p", "m", "v"), [(2, 4, 2), (4, 4, 3), (4, 12, 2), (8, 24, 4), (16, 32, 3), (4, 8, 1)]
)
def test_orders_without_w_are_megatron_cores(p: int, m: int, v: int) -> None:
    schedule = "1f1b" if v == 1 else "interleaved"
    plan = fixed.build(schedule, placement(schedule, p, v), m)
    table = get_schedule_table(m, v, p)
    for stage, ops in enumerate(plan.ops):
        group = SimpleNamespace(size=lambda: p, rank=lambda stage=stage: stage)
        peer = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=None if v == 1 else v
        )
        _, _, num_warmup, _ = get_pp_rank_microbatches(m, v, p, p2p_communicator=peer)
        order = [op.chunk + 1 if op.kind is Kind.F else -op.chunk - 1 for op in ops]
        assert order == convert_schedule_table_to_order(num_warmup, v, table)
        assert [(op.microbatch, op.chunk) for op in ops if op.kind is Kind.F] == table


def torchs_order(schedule: type, p: int, m: int, v: int, stage: int) -> list[tuple[str, int, int]]:
    """Kind, virtual stage and microbatch of a stage's ops, without any process or model."""
    maker = object.__new__(schedule)
    maker.pp_group_size, maker.num_stages, maker._n_microbatches = p, p * v, m
    maker.n_local_stages, maker.microbatches_per_round = v, p
    actions = maker._calculate_single_rank_operations(stage)
    kinds = {"FORWARD": "F", "BACKWARD_INPUT": "B", "BACKWARD_WEIGHT": "W"}
    return [
        (kinds[each.computation_type.name], each.stage_index, each.microbatch_index)
        for each in actions
        if each is not None
    ]


def ours(plan: Plan, stage: int) -> list[tuple[str, int, int]]:
    place = plan.placement
    return [
        (op.kind.value, place.virtual_stage(stage, op.chunk), op.microbatch)
        for op in plan.ops[stage]
    ]


@pytest.mark.parametrize(
    ("p", "m"), [(1, 1), (1, 4), (2, 3), (4, 2), (4, 7), (4, 12), (8, 15), (8, 40), (16, 18)]
)
def test_zb_v_is_torchs_order(p: int, m: int) -> None:
    plan = fixed.build("zb_v", placement("zb_v", p, 2), m)
    for stage in range(p):
        assert ours(plan, stage) == torchs_order(ScheduleZBVZeroBubble, p, m, 2, stage)


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 12, 3), (8, 16, 4)])
def test_interleaved_zb_is_torchs_order(p: int, m: int, v: int) -> None:
    plan = fixed.build("interleaved_zb", placement("interleaved_zb", p, v), m)
    for stage in range(p):
        order = torchs_order(ScheduleInterleavedZeroBubble, p, m, v, stage)
        assert ours(plan, stage) == order


@settings(max_examples=30)
@given(p=st.integers(1, 16), m=st.integers(1, 40), v=st.integers(1, 4))
def test_an_evaluation_is_as_short_as_it_can_be(p: int, m: int, v: int) -> None:
    """Its work, and the way of the first microbatch to the last stage; whole groups for chunks."""
    m = m if v == 1 else m * p
    plan = build_forward_plan(Placement(p, v, "loop"), m)
    assert plan.forward_only
    step = simulate(plan, Costs.equal(plan.placement, 1.0, 0, 0)).step_s
    assert step == pytest.approx(m + (p - 1) / v, rel=1e-9)


def test_an_evaluation_of_a_v_runs_every_microbatch_forward() -> None:
    plan = build_forward_plan(Placement(4, 2, "v"), 5)
    assert [len(ops) for ops in plan.ops] == [10] * 4
    assert simulate(plan, Costs.equal(plan.placement, 1.0, 0, 0)).step_s == 5 + 3


@pytest.mark.parametrize(
    ("schedule", "place", "count", "message"),
    [
        ("zb_h1", Placement(4, 1, "loop"), 0, "num_microbatches: found 0; must be at least 1"),
        ("zb_v", Placement(4, 1, "loop"), 8, "num_chunks: found 1; must be 2 for zb_v"),
        ("interleaved", Placement(4, 1, "loop"), 8, "num_chunks: found 1; must be at least 2 for"),
        ("zb_v", Placement(4, 2, "loop"), 8, "shape: found loop; must be v for zb_v"),
        ("interleaved", Placement(4, 2, "v"), 8, "shape: found v; must be loop for interleaved"),
        ("search", Placement(4, 3, "loop"), 8, "max_activations: found 2; must be at least num_"),
    ],
)
def test_what_a_schedule_cannot_run_is_refused(
    schedule: str, place: Placement, count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_plan(schedule, place, count, costs=v2_costs(place), max_activations=2)
