"""A schedule made for given durations, communication time and room for activations.

It starts from simple rules of how urgent an op is (`_ranks`), and from the schedules that have a
formula. Passes over the step, forwards and backwards in turn (`greedy`), improve on one another.
Of many starts the better half goes on, again and again, until nothing gets better. A schedule with
a formula is taken as it is where nothing beats it.

Nothing is drawn at random and nothing depends on the clock: equal arguments give equal plans.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind, Plan
from dsv2_train.pipeline.schedules import fixed
from dsv2_train.pipeline.schedules.greedy import KINDS, Pass, Problem, Ranks, run_pass
from dsv2_train.pipeline.simulate import peak_activations, simulate

# Starts: the time from one microbatch to the next, as a share of its work on a stage; by how much
# a W is less urgent than its B, as a share of a microbatch's way through the model; and how long a
# stage waits (`greedy.run_pass`), forwards and backwards.
_SPACINGS = (0.3, 0.15, 0.5, 0.7, 1.0)
_LAGS = (1.0, 0.2)
_PATIENCE = ((0.0, 0.25), (0.25, 0.0), (0.25, 0.25), (0.5, 0.5), (0.9, 0.9))

_MAX_PLACED = 200_000  # ops that all passes together put in order: a second
_TICKS = 10_000  # of a mean duration: in whole numbers equal sums are equal, whatever their order


@dataclass
class _Contender:
    """A start and what became of it; `step_s` is the best so far."""

    ranks: Ranks
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
        max_placed: effort, as ops put in order by all passes together.

    Returns:
        A plan no slower than any schedule with a formula that has this placement and this room.
    """
    problem = Problem(placement, num_microbatches, _in_ticks(costs), max_activations)
    known = [
        fixed.build(name, placement, num_microbatches) for name in fixed.schedules_of(placement)
    ]
    orders = [_best_pass(problem, known, max_placed).orders]
    orders += [plan.ops for plan in known if max(peak_activations(plan)) <= max_activations]
    plans = [Plan("search", placement, num_microbatches, each) for each in orders]
    return min(plans, key=lambda plan: simulate(plan, costs).step_s)


def _best_pass(problem: Problem, known: Sequence[Plan], max_placed: int) -> Pass:
    """The shortest step that any pass of any contender made."""
    num_ops = 3 * problem.placement.num_virtual_stages * problem.num_microbatches
    pairs_left = max_placed // (2 * num_ops)
    pool = list(itertools.islice(_contenders(problem, known), max(1, pairs_left // 2)))
    best: Pass | None = None
    while True:
        improved = False
        for contender in pool:
            for found in _play(problem, contender):
                if best is None or found.step_s < best.step_s:
                    best, improved = found, True
        pairs_left -= len(pool)
        assert best is not None
        if pairs_left <= 0 or (len(pool) <= 2 and not improved):
            return best
        pool = sorted(pool, key=lambda each: each.step_s)[: max(2, len(pool) // 2)]


def _play(problem: Problem, contender: _Contender) -> Iterator[Pass]:
    """One pass forwards, one backwards; the contender goes on from there."""
    for patience, backwards in zip(contender.patience, (False, True), strict=True):
        found = run_pass(problem, contender.ranks, patience, backwards=backwards)
        contender.ranks = found.ranks
        contender.step_s = min(contender.step_s, found.step_s)
        yield found


def _contenders(problem: Problem, known: Sequence[Plan]) -> Iterator[_Contender]:
    """Starts, the most promising ones first."""
    rules = [_ranks(problem, spacing, lag) for spacing, lag in itertools.product(_SPACINGS, _LAGS)]
    for ranks in (*rules[:2], *(_starts(problem, plan) for plan in known), *rules[2:]):
        for patience in _PATIENCE:
            yield _Contender(ranks, patience)


def _starts(problem: Problem, plan: Plan) -> Ranks:
    """When each op of a plan starts."""
    simulation = simulate(plan, problem.costs)
    count = plan.placement.num_virtual_stages
    ranks = [[0.0] * plan.num_microbatches for _ in range(3 * count)]
    for stage, (ops, starts_s) in enumerate(zip(plan.ops, simulation.starts_s, strict=True)):
        for op, start_s in zip(ops, starts_s, strict=True):
            row = plan.placement.virtual_stage(stage, op.chunk)
            for kind in (Kind.B, Kind.W) if op.kind is Kind.BW else (op.kind,):
                ranks[KINDS.index(kind) * count + row][op.microbatch] = start_s
    return ranks


def _ranks(problem: Problem, spacing: float, lag: float) -> Ranks:
    """When each op would run if every microbatch went through the model unhindered."""
    costs, count = problem.costs, problem.placement.num_virtual_stages
    spacing_s = spacing * costs.work_s(1) / problem.placement.num_stages
    into_s = list(itertools.accumulate(costs.forward_s, initial=0.0))[:-1]
    top_s = sum(costs.forward_s)
    back_s = list(itertools.accumulate(reversed(costs.input_grad_s), initial=top_s))
    lag_s = lag * back_s[-1]
    rows = [
        *into_s,
        *(back_s[count - 1 - idx] for idx in range(count)),
        *(back_s[count - 1 - idx] + lag_s for idx in range(count)),
    ]
    return [[row + idx * spacing_s for idx in range(problem.num_microbatches)] for row in rows]


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
