"""List scheduling: one pass over the time of a step, which starts ops by their priorities.

Time goes from one event to the next: a stage becomes free, or an op's input arrives. A free stage
looks at the first op of each of its queues and starts the most urgent one that is ready and has
room. Where it is patient it may idle instead, for a more urgent op that is on its way.

No pass comes to a standstill for want of room. Of a stage's room the last v - 1 - c places are
kept for the chunks after c, and a chunk takes in a microbatch only after the chunk before it on the
stage did. So the oldest microbatch always gets through.
"""

import heapq
import math
from dataclasses import dataclass, field

from dsv2_train.pipeline.plans import Op
from dsv2_train.pipeline.schedules.fixed import Turn, numbered
from dsv2_train.pipeline.schedules.step_graph import Queue, StepGraph

Priorities = dict[Queue, list[float]]  # by microbatch; the lowest is the most urgent


@dataclass(frozen=True)
class ListSchedule:
    """What a pass made.

    Attributes:
        orders: for each stage kind and chunk of its ops in order.
        times_s: when each op ran, in the direction of the pass; priorities for a next pass.
        step_s: length of the step if every receive were posted before it, or a little more, since
            a mirrored pass runs ops as late as they can; `simulate` gives the real one.
    """

    orders: list[list[Turn]]
    times_s: Priorities
    step_s: float

    def mirrored(self) -> "ListSchedule":
        """The same schedule with its time reversed."""
        return ListSchedule(
            orders=[order[::-1] for order in self.orders],
            times_s={
                queue: [-time_s for time_s in reversed(times_s)]
                for queue, times_s in self.times_s.items()
            },
            step_s=self.step_s,
        )

    def ops(self, num_microbatches: int) -> tuple[tuple[Op, ...], ...]:
        """For each stage its ops in order, as a plan has them."""
        return tuple(tuple(numbered(order, num_microbatches)) for order in self.orders)


@dataclass(eq=False, slots=True)
class _QueueState:
    """How far a queue is; its head is the first op that has not started.

    Attributes:
        turn: kind and chunk of its ops.
        stage: that runs them.
        duration_s: of an op.
        priorities: by microbatch.
        activations: by how many an op changes what its stage holds.
        room: an op starts only while its stage holds fewer activations than this.
        predecessors: queues whose ops these need, with the time on the way.
        successors: queues whose ops need these.
        ends_s: of the ops started so far.
        ready_s: when the head has all that it needs; infinite where that is not known.
    """

    turn: Turn
    stage: int
    duration_s: float
    priorities: list[float]
    activations: int
    room: float
    predecessors: list[tuple["_QueueState", float]] = field(default_factory=list)
    successors: list["_QueueState"] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    ready_s: float = math.inf

    def update_ready(self) -> None:
        """Find out when the head is ready."""
        idx = len(self.ends_s)
        self.ready_s = 0.0 if idx < len(self.priorities) else math.inf
        for other, delay_s in self.predecessors:
            arrival_s = other.ends_s[idx] + delay_s if idx < len(other.ends_s) else math.inf
            self.ready_s = max(self.ready_s, arrival_s)


@dataclass(eq=False, slots=True)
class _StageState:
    """How far a stage is.

    Attributes:
        queues: of its ops.
        free_s: when it has ended what it runs.
        held: activations.
        order: kind and chunk of the ops started so far.
    """

    queues: list[_QueueState]
    free_s: float = 0.0
    held: int = 0
    order: list[Turn] = field(default_factory=list)

    def choose(self, now: float, patience: float) -> tuple[_QueueState | None, float]:
        """The queue whose head to start now; or None, and when to look again."""
        best, best_priority = None, math.inf
        coming = []
        for queue in self.queues:
            if queue.ready_s == math.inf or self.held >= queue.room:
                continue
            priority = queue.priorities[len(queue.ends_s)]
            if queue.ready_s > now:
                coming.append((queue.ready_s, priority))
            elif priority < best_priority:
                best, best_priority = queue, priority
        until_s = math.inf if best is None else now + patience * best.duration_s
        worth_it = [
            ready_s
            for ready_s, priority in coming
            if priority < best_priority and ready_s < until_s
        ]
        return (None, min(worth_it)) if worth_it else (best, math.inf)

    def start(self, queue: _QueueState, now: float) -> None:
        """Run the head of a queue."""
        self.free_s = now + queue.duration_s
        self.held += queue.activations
        self.order.append(queue.turn)
        queue.ends_s.append(self.free_s)
        queue.update_ready()


def list_schedule(graph: StepGraph, priorities: Priorities, patience: float) -> ListSchedule:
    """Order a step.

    Args:
        graph: what is to be ordered.
        priorities: of each op, in the direction of the graph.
        patience: a stage idles for a more urgent op rather than start the best one that is ready,
            where it need not idle longer than this share of the latter's duration.
    """
    queues = _queue_states(graph, priorities)
    stages = [
        _StageState([queue for queue in queues.values() if queue.stage == idx])
        for idx in range(graph.placement.num_stages)
    ]
    events = [(0.0, idx) for idx in range(len(stages))]  # when to look at which stage
    while events:
        now, idx = heapq.heappop(events)
        stage = stages[idx]
        if stage.free_s > now:
            continue
        queue, again_s = stage.choose(now, patience)
        if queue is not None:
            stage.start(queue, now)
            again_s = stage.free_s
            _announce(queue, events)
        if again_s < math.inf:
            heapq.heappush(events, (again_s, idx))
    return ListSchedule(
        orders=[stage.order for stage in stages],
        times_s={key: queue.ends_s for key, queue in queues.items()},
        step_s=max(stage.free_s for stage in stages),
    )


def _announce(queue: _QueueState, events: list[tuple[float, int]]) -> None:
    """Tell successors when the op that was just started arrives."""
    for other in queue.successors:
        if len(other.ends_s) == len(queue.ends_s) - 1:  # it is what their heads need
            other.update_ready()
            if other.ready_s < math.inf:
                heapq.heappush(events, (other.ready_s, other.stage))


def _queue_states(graph: StepGraph, priorities: Priorities) -> dict[Queue, _QueueState]:
    """Queues of which nothing has started, linked by the edges of the graph."""
    queues: dict[Queue, _QueueState] = {}
    for kind, virtual_stage in graph.queues:
        stage, chunk = graph.placement.stage_and_chunk(virtual_stage)
        kept = graph.placement.num_chunks - 1 - chunk
        queues[kind, virtual_stage] = _QueueState(
            turn=(kind, chunk),
            stage=stage,
            duration_s=graph.costs.duration_s(kind, virtual_stage),
            priorities=priorities[kind, virtual_stage],
            activations=(kind is graph.acquires) - (kind is graph.releases),
            room=graph.max_activations - kept if kind is graph.acquires else math.inf,
        )
    for before, after in (*graph.edges, *_intake_edges(graph)):
        _link(queues[before], queues[after], graph.costs.communication_s)
    for queue in queues.values():
        queue.update_ready()
    return queues


def _intake_edges(graph: StepGraph) -> list[tuple[Queue, Queue]]:
    """A chunk takes in a microbatch after the chunk before it on the stage did."""
    place = graph.placement
    return [
        (
            (graph.acquires, place.virtual_stage(stage, chunk - 1)),
            (graph.acquires, place.virtual_stage(stage, chunk)),
        )
        for stage in range(place.num_stages)
        for chunk in range(1, place.num_chunks)
    ]


def _link(before: _QueueState, after: _QueueState, communication_s: float) -> None:
    delay_s = 0.0 if before.stage == after.stage else communication_s
    after.predecessors.append((before, delay_s))
    before.successors.append(after)
