"""An event simulation of a pipeline that shares nothing with `simulate.py` but the records.

What an op needs and makes are values with a name; time goes forward from event to event; receives
are posted as stages go along.
"""

import heapq
from collections import defaultdict

from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.plans import Kind, Op, Plan

Value = tuple[str, int, int]  # activation or gradient, virtual stage that makes it, microbatch


class World:
    """Stages, channels between them, and events to come."""

    def __init__(
        self, plan: Plan, costs: Costs, receives_ahead: int, max_unsent: int | None = None
    ) -> None:
        """`max_unsent`: a stage stands still while more of its sends are in a channel."""
        self.plan, self.costs, self.ahead, self.max_unsent = plan, costs, receives_ahead, max_unsent
        stages = range(plan.placement.num_stages)
        self.owner = [plan.placement.stage_and_chunk(x)[0] for x in range(self.last + 1)]
        self.spans: list[list[tuple[float, float]]] = [[] for _ in stages]
        self.busy = [False] * len(stages)
        self.here: list[set[Value]] = [set() for _ in stages]
        self.held = [0 for _ in stages]
        self.most_held = [0 for _ in stages]
        self.channels: dict[tuple[int, int], list[Value]] = defaultdict(list)
        self.place: dict[Value, int] = {}  # in its channel
        for stage in stages:
            for op in plan.ops[stage]:
                value = self.made(stage, op)
                target = self.wanted_on(value) if value else None
                if value and target is not None and target != stage:
                    self.place[value] = len(self.channels[stage, target])
                    self.channels[stage, target].append(value)
        self.into = [[each for each in self.channels if each[1] == stage] for stage in stages]
        self.sent_s: dict[Value, float] = {}
        self.posted_s: dict[Value, float] = {}
        self.num_posted: dict[tuple[int, int], int] = defaultdict(int)
        self.num_taken: dict[tuple[int, int], int] = defaultdict(int)
        self.unsent: dict[tuple[int, int], int] = defaultdict(int)
        self.events: list[tuple[float, int, str, Value | None]] = []

    @property
    def last(self) -> int:
        return self.plan.placement.num_virtual_stages - 1

    def made(self, stage: int, op: Op) -> Value | None:
        if op.kind is Kind.W:
            return None
        name = "activation" if op.kind is Kind.F else "gradient"
        return name, self.plan.placement.virtual_stage(stage, op.chunk), op.microbatch

    def needed(self, stage: int, op: Op) -> Value | None:
        virtual_stage = self.plan.placement.virtual_stage(stage, op.chunk)
        if op.kind is Kind.F:
            value = ("activation", virtual_stage - 1, op.microbatch)
            return value if virtual_stage > 0 else None
        if op.kind is Kind.W:
            return "gradient", virtual_stage, op.microbatch
        if virtual_stage == self.last:
            return "activation", virtual_stage, op.microbatch
        return "gradient", virtual_stage + 1, op.microbatch

    def wanted_on(self, value: Value) -> int | None:
        """The stage whose F or B needs a value; W finds it where it was made."""
        name, virtual_stage, _ = value
        if name == "activation":
            return self.owner[min(virtual_stage + 1, self.last)]
        return self.owner[virtual_stage - 1] if virtual_stage else None

    def run(self) -> bool:
        """Go on until nothing happens any more; whether everything was run."""
        for stage in range(len(self.spans)):
            self.begin(stage, 0.0)
        while self.events:
            now, stage, what, value = heapq.heappop(self.events)
            if what == "arrives":
                assert value is not None
                self.here[stage].add(value)
            else:
                self.finish(stage, now, self.plan.ops[stage][len(self.spans[stage]) - 1])
            self.begin(stage, now)
        return all(map(lambda a, b: len(a) == len(b), self.spans, self.plan.ops))

    def begin(self, stage: int, now: float) -> None:
        place = len(self.spans[stage])
        if self.busy[stage] or place == len(self.plan.ops[stage]) or self.stands_still(stage):
            return
        op = self.plan.ops[stage][place]
        value = self.needed(stage, op)
        sender = self.owner[value[1]] if value in self.place and op.kind is not Kind.W else None
        for source, target in self.into[stage]:
            self.post(source, target, value if source == sender else None, now)
        if value is not None and value not in self.here[stage]:
            return
        if sender is not None:
            self.num_taken[sender, stage] += 1
        self.held[stage] += op.kind is Kind.F
        self.most_held[stage] = max(self.most_held[stage], self.held[stage])
        virtual_stage = self.plan.placement.virtual_stage(stage, op.chunk)
        end_s = now + self.costs.duration_s(op.kind, virtual_stage)
        self.spans[stage].append((now, end_s))
        self.busy[stage] = True
        heapq.heappush(self.events, (end_s, stage, "ends", None))

    def stands_still(self, stage: int) -> bool:
        most = self.max_unsent
        counts = (count for (source, _), count in self.unsent.items() if source == stage)
        return most is not None and any(count > most for count in counts)

    def post(self, source: int, target: int, needed: Value | None, now: float) -> None:
        channel, values = (source, target), self.channels[source, target]
        count, taken = self.num_posted[channel], self.num_taken[channel]
        at_least = self.place[needed] + 1 if needed is not None else 0
        while count < len(values) and (count - taken < self.ahead or count < at_least):
            self.posted_s[values[count]] = now
            self.meet(source, target, values[count])
            count += 1
        self.num_posted[channel] = count

    def finish(self, stage: int, now: float, op: Op) -> None:
        self.busy[stage] = False
        self.held[stage] -= op.kind in (Kind.W, Kind.BW)
        value = self.made(stage, op)
        if value is None:
            return
        self.here[stage].add(value)
        target = self.wanted_on(value)
        if target is not None and target != stage:
            self.sent_s[value] = now
            self.unsent[stage, target] += 1
            self.meet(stage, target, value)

    def meet(self, source: int, target: int, value: Value) -> None:
        """Both sides follow the sender's order, so the n-th receive is that of the n-th send."""
        if value in self.sent_s and value in self.posted_s:
            arrival_s = max(self.sent_s[value], self.posted_s[value]) + self.costs.communication_s
            heapq.heappush(self.events, (arrival_s, target, "arrives", value))
            self.unsent[source, target] -= 1
            if self.max_unsent is not None:
                self.begin(source, arrival_s)
