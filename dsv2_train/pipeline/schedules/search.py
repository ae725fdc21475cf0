"""A schedule made for given durations, communication time and room for activations.

It pays where a step has few microbatches for its stages, and with three chunks or more where p
does not divide m. With many microbatches a formula is as short: two chunks of DeepSeek-V2's 60
layers on each of 16 stages are idle for 20.4% of a step of 18 microbatches, beside ZB-V's 29.9%;
from 72 on nothing shorter than ZB-V is found (docs/pipeline.md).

A start is a priority for each op: by simple rules (`_unhindered`), or when a schedule with a
formula runs it. From each start, list scheduling passes over the step and over its mirrored graph
in turn, each pass with the times of the one before as priorities: it keeps what that one did well
and packs the end that it left ragged (forward-backward improvement, as project scheduling knows
it). Successive halving: the better half of the starts goes on, again and again, until nothing gets
better. A schedule with a formula is taken as it is where nothing beats it.

All this twice: with the time that messages take, and as if they took none. Waiting for what is on
its way often costs more than the wait itself, so neither is the better one everywhere.

Nothing is drawn at random and nothing depends on the clock: equal arguments give equal plans.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind, Plan
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.schedules.list_schedule import ListSchedule, Priorities, list_schedule
from dsv2_train.pipeline.schedules.step_graph import StepGraph, microbatch_path, step_graph
from dsv2_train.pipeline.simulate import peak_activations, simulate

# Starts: the time from one microbatch to the next, as a share of its work on a stage; by how much
# a W is less urgent than its B, as a share of a microbatch's way through the model; and how long a
# stage waits (`list_schedule`), forwards and mirrored.
_SPACINGS = (0.3, 0.15, 0.5, 0.7, 1.0)
_LAGS = (1.0, 0.2)
_PATIENCE = ((0.0, 0.25), (0.25, 0.0), (0.25, 0.25), (0.5, 0.5), (0.9, 0.9))

_MAX_PLACED = 200_000  # ops that all passes together put in order
_TICKS = 10_000  # of a mean duration: in whole numbers equal sums are equal, whatever their order


@dataclass
class _Start:
    """Where passes begin, and what became of it.

    Attributes:
        priorities: for the next pass.
        patience: of the pass forwards and of the mirrored one.
        step_s: of the shortest step so far.
    """

    priorities: Priorities
    patience: tuple[float, float]
    step_s: float = math.inf


def search(
    placement: Placement,
    num_microbatches: int,
    costs: Costs,
    max_activations: int,
    max_placed: int = _MAX_PLACED,
) -> Plan:
    """Order F, B and W so that the step is short.

    Args:
        placement: where the chunks are.
        num_microbatches: m.
        costs: durations by virtual stage.
        max_activations: chunk activations that a stage may hold, at least the number of chunks.
        max_placed: effort, as ops put in order by all passes together; as much again without the
            communication time, where there is any.

    Returns:
        A plan no slower than any schedule with a formula that has this placement and this room.
    """
    formulas = [
        fixed.build(name, placement, num_microbatches) for name in fixed.schedules_of(placement)
    ]
    in_ticks = _in_ticks(costs)
    plans = []
    for each in dict.fromkeys((in_ticks, replace(in_ticks, communication_s=0.0))):
        graph = step_graph(placement, num_microbatches, each, max_activations)
        ops = _shortest(graph, formulas, max_placed).ops(num_microbatches)
        plans.append(Plan("search", placement, num_microbatches, ops))
    plans += [
        replace(plan, schedule="search")
        for plan in formulas
        if max(peak_activations(plan)) <= max_activations
    ]
    return min(plans, key=lambda plan: simulate(plan, costs).step_s)


def _shortest(graph: StepGraph, formulas: Sequence[Plan], max_placed: int) -> ListSchedule:
    """The shortest step that any pass made, by successive halving of the starts."""
    rounds_left = max_placed // (2 * graph.num_ops)
    starts = list(itertools.islice(_starts(graph, formulas), max(1, rounds_left // 2)))
    best: ListSchedule | None = None
    while True:
        improved = False
        for start in starts:
            for found in _improve(graph, start):
                if best is None or found.step_s < best.step_s:
                    best, improved = found, True
        rounds_left -= len(starts)
        assert best is not None
        if rounds_left <= 0 or (len(starts) <= 2 and not improved):
            return best
        starts = sorted(starts, key=lambda each: each.step_s)[: max(2, len(starts) // 2)]


def _improve(graph: StepGraph, start: _Start) -> tuple[ListSchedule, ListSchedule]:
    """One pass forwards, one over the mirrored step; the start goes on from there."""
    forwards, backwards = start.patience
    first = list_schedule(graph, start.priorities, forwards)
    mirrored = list_schedule(graph.mirrored(), first.mirrored().times_s, backwards)
    second = mirrored.mirrored()
    start.priorities = second.times_s
    start.step_s = min(start.step_s, first.step_s, second.step_s)
    return first, second


def _starts(graph: StepGraph, formulas: Sequence[Plan]) -> Iterator[_Start]:
    """The most promising ones first."""
    rules = [
        _unhindered(graph, spacing, lag) for spacing, lag in itertools.product(_SPACINGS, _LAGS)
    ]
    of_formulas = (_simulated(plan, graph.costs) for plan in formulas)
    for priorities in (*rules[:2], *of_formulas, *rules[2:]):
        for patience in _PATIENCE:
            yield _Start(priorities, patience)


def _simulated(plan: Plan, costs: Costs) -> Priorities:
    """When each op of a plan starts."""
    priorities: Priorities = defaultdict(list)
    for stage, starts_s in enumerate(simulate(plan, costs).starts_s):
        for op, start_s in zip(plan.ops[stage], starts_s, strict=True):
            virtual_stage = plan.placement.virtual_stage(stage, op.chunk)
            for kind in (Kind.B, Kind.W) if op.kind is Kind.BW else (op.kind,):
                priorities[kind, virtual_stage].append(start_s)
    return priorities


def _unhindered(graph: StepGraph, spacing: float, lag: float) -> Priorities:
    """When each op would start if every microbatch went through the model unhindered."""
    queues = microbatch_path(graph.placement)
    durations_s = (graph.costs.duration_s(*queue) for queue in queues)
    *starts_s, end_s = itertools.accumulate(durations_s, initial=0.0)
    first_s = dict(zip(queues, starts_s, strict=True))
    for idx in range(graph.placement.num_virtual_stages):
        first_s[Kind.W, idx] = first_s[Kind.B, idx] + lag * end_s
    spacing_s = spacing * graph.costs.work_s(1) / graph.placement.num_stages
    return {
        queue: [start_s + idx * spacing_s for idx in range(graph.num_microbatches)]
        for queue, start_s in first_s.items()
    }


def _in_ticks(costs: Costs) -> Costs:
    """The same durations in whole numbers of a small unit."""
    durations = (*costs.forward_s, *costs.input_grad_s, *costs.weight_grad_s)
    tick_s = sum(durations) / len(durations) / _TICKS or 1.0

    def ticks(durations_s: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(float(round(duration_s / tick_s)) for duration_s in durations_s)

    return Costs(
        ticks(costs.forward_s),
        ticks(costs.input_grad_s),
        ticks(costs.weight_grad_s),
        float(round(costs.communication_s / tick_s)),
    )
