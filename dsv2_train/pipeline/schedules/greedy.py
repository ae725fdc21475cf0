"""One pass of list scheduling over a step, forwards or backwards in time.

A stage that is free takes, of its ops that are ready, the one of lowest rank; ranks are any
numbers. Read backwards a step is a step again: what needed an op is needed by it, microbatches
descend, and an activation is held from W until F. So the ends of one pass, read backwards, rank
the next pass in the other direction, which keeps what the first one did well and packs the end
that it left ragged (forward-backward improvement, as project scheduling knows it).

No pass comes to a standstill for want of room: the last v - 1 - c places of a stage are kept for
the chunks after c, and a chunk takes in a microbatch only after the chunk before it on the stage
did. So the oldest microbatch always gets through.
"""

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind, Op

KINDS = (Kind.F, Kind.B, Kind.W)
Ranks = list[list[float]]  # [3 p v][m]: F of every virtual stage, then B, then W
Orders = tuple[tuple[Op, ...], ...]  # for each stage its ops in order


@dataclass(frozen=True)
class Problem:
    """What is to be ordered.

    Attributes:
        placement: where the chunks are.
        num_microbatches: m.
        costs: durations by virtual stage.
        max_activations: chunk activations that a stage may hold, at least the number of chunks.
    """

    placement: Placement
    num_microbatches: int
    costs: Costs
    max_activations: int


@dataclass(frozen=True)
class Pass:
    """What a pass made.

    Attributes:
        step_s: length of the step; what a backwards pass made may be a little shorter.
        orders: forwards in time.
        ranks: for a pass in the other direction.
    """

    step_s: float
    orders: Orders
    ranks: Ranks


@dataclass(eq=False, slots=True)
class _Queue:
    """The ops of one kind on one virtual stage: one a microbatch, taken in order.

    Attributes:
        kind: of the ops.
        stage: that runs them.
        chunk: of that stage.
        duration_s: of an op.
        ranks: of the ops.
        holds: by how many activations an op changes what the stage holds.
        room: an op starts only while its stage holds fewer activations than this.
        before: a queue that must have taken a microbatch first.
        feeds: queues whose ops need a result of these: queue, which of its needs, time on the way.
        arrivals_s: for each need, when it is there, by microbatch, as far as known.
        ready_s: when all that the next op needs is there; infinite where that is not known.
        ends_s: of the ops taken so far.
    """

    kind: Kind
    stage: int
    chunk: int
    duration_s: float
    ranks: list[float]
    holds: int = 0
    room: float = math.inf
    before: "_Queue | None" = None
    feeds: list[tuple["_Queue", int, float]] = field(default_factory=list)
    arrivals_s: list[list[float]] = field(default_factory=list)
    ready_s: float = 0.0
    ends_s: list[float] = field(default_factory=list)

    def look(self) -> None:
        """Find out when the next op is ready."""
        place = len(self.ends_s)
        known = place < len(self.ranks) and all(len(each) > place for each in self.arrivals_s)
        arrivals_s = [each[place] for each in self.arrivals_s] if known else [math.inf]
        self.ready_s = max(arrivals_s, default=0.0)


def run_pass(problem: Problem, ranks: Ranks, patience: float, *, backwards: bool) -> Pass:
    """Order a step.

    Args:
        problem: what is to be ordered.
        ranks: of each op; backwards, microbatch m - 1 - i is entry i.
        patience: a stage waits for an op of lower rank rather than start the best one that is
            ready, where it need not wait longer than this share of the latter's duration.
        backwards: read the step from its end.
    """
    queues = _queues(problem, ranks, backwards)
    turns = _Stages(queues, problem.placement.num_stages, patience).run()
    if backwards:
        last = problem.num_microbatches - 1
        turns = [[(kind, last - idx, chunk) for kind, idx, chunk in each[::-1]] for each in turns]
    return Pass(
        step_s=max(queue.ends_s[-1] for queue in queues),
        orders=tuple(tuple(itertools.starmap(Op, each)) for each in turns),
        ranks=[[-end_s for end_s in reversed(queue.ends_s)] for queue in queues],
    )


def _queues(problem: Problem, ranks: Ranks, backwards: bool) -> list[_Queue]:
    """Queues in the order of `ranks`, connected."""
    place, costs = problem.placement, problem.costs
    count = place.num_virtual_stages
    queues = [
        _Queue(kind, *place.stage_and_chunk(idx), costs.duration_s(kind, idx), ranks[row + idx])
        for row, kind in zip(range(0, 3 * count, count), KINDS, strict=True)
        for idx in range(count)
    ]
    for source, target in _needs(count):
        if backwards:
            source, target = target, source
        here, there = queues[source], queues[target]
        delay_s = 0.0 if here.stage == there.stage else costs.communication_s
        here.feeds.append((there, len(there.arrivals_s), delay_s))
        there.arrivals_s.append([])
    takes, gives = (Kind.W, Kind.F) if backwards else (Kind.F, Kind.W)
    of_chunk = {(queue.kind, queue.stage, queue.chunk): queue for queue in queues}
    for queue in queues:
        queue.holds = (queue.kind is takes) - (queue.kind is gives)
        if queue.kind is takes:
            queue.room = problem.max_activations - (place.num_chunks - 1 - queue.chunk)
            queue.before = of_chunk.get((takes, queue.stage, queue.chunk - 1))
        queue.look()
    return queues


def _needs(count: int) -> Iterator[tuple[int, int]]:
    """Pairs of queues: an op of the second one needs that of the first one."""
    backward, weight = count, 2 * count
    for idx in range(count):
        if idx + 1 < count:
            yield idx, idx + 1
            yield backward + idx + 1, backward + idx
        yield backward + idx, weight + idx
    yield count - 1, backward + count - 1


class _Stages:
    """Stages that take ops from their queues as time goes on."""

    def __init__(self, queues: list[_Queue], num_stages: int, patience: float) -> None:
        self._patience = patience
        self._queues = [[q for q in queues if q.stage == stage] for stage in range(num_stages)]
        self._free_s = [0.0] * num_stages
        self._held = [0] * num_stages
        self._turns: list[list[tuple[Kind, int, int]]] = [[] for _ in range(num_stages)]
        self._events = [(0.0, stage) for stage in range(num_stages)]  # when to look at a stage

    def run(self) -> list[list[tuple[Kind, int, int]]]:
        """Take everything; for each stage kind, place in the queue and chunk of its ops."""
        while self._events:
            now, stage = heapq.heappop(self._events)
            if self._free_s[stage] > now:
                continue
            queue, again_s = self._choose(stage, now)
            if queue is not None:
                self._take(queue, now)
            elif again_s < math.inf:
                heapq.heappush(self._events, (again_s, stage))
        return self._turns

    def _choose(self, stage: int, now: float) -> tuple[_Queue | None, float]:
        """The queue to take from; or None and when the stage should look again."""
        best, best_rank = None, math.inf
        coming = []
        for queue in self._queues[stage]:
            place = len(queue.ends_s)
            if queue.ready_s == math.inf or self._held[stage] >= queue.room:
                continue
            if queue.before is not None and len(queue.before.ends_s) <= place:
                continue
            rank = queue.ranks[place]
            if queue.ready_s > now:
                coming.append((queue.ready_s, rank))
            elif rank < best_rank:
                best, best_rank = queue, rank
        until_s = math.inf if best is None else now + self._patience * best.duration_s
        worth_it = (ready_s for ready_s, rank in coming if rank < best_rank and ready_s < until_s)
        again_s = min(worth_it, default=math.inf)
        return (best if again_s == math.inf else None), again_s

    def _take(self, queue: _Queue, now: float) -> None:
        stage, end_s = queue.stage, now + queue.duration_s
        self._turns[stage].append((queue.kind, len(queue.ends_s), queue.chunk))
        self._free_s[stage] = end_s
        self._held[stage] += queue.holds
        queue.ends_s.append(end_s)
        queue.look()
        heapq.heappush(self._events, (end_s, stage))
        for other, need, delay_s in queue.feeds:
            arrivals_s = other.arrivals_s[need]
            arrivals_s.append(end_s + delay_s)
            if len(arrivals_s) == len(other.ends_s) + 1:
                other.look()
                heapq.heappush(self._events, (end_s + delay_s, other.stage))
