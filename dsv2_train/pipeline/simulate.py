"""Proves a plan, and tells when each of its ops runs.

The proof has two parts. `validate`: every op is there once, in an order that no stage contradicts
by itself. `simulate`: the plan runs to its end in the strictest reading of its messages:

- one channel for each ordered pair of stages; a message occupies it from its send until its
  receive is posted, so a channel's messages are received in the order in which they were sent, and
  its n-th receive must be that of its n-th message (NCCL's rules; gloo forgives more);
- a stage runs its actions in order (`messages.Action`): it posts receives, waits for the message
  its op takes, computes, sends without waiting.

What is left waiting then is a deadlock, whatever the durations: which receive meets which send
does not depend on them.
"""

import itertools
from collections import defaultdict, deque
from dataclasses import dataclass, field

from dsv2_train.pipeline.costs import Costs
from dsv2_train.pipeline.messages import Message, Program, with_messages
from dsv2_train.pipeline.plans import Kind, Op, Plan, input_from


class PlanError(Exception):
    """A plan that cannot be run; names stages and ops."""


@dataclass(frozen=True)
class Simulation:
    """A step as a plan's costs have it.

    Attributes:
        plan: what was run.
        starts_s: for each stage the start of each op, from the start of the step.
        ends_s: the ends.
        step_s: when the last stage ends; all stages begin the next step together.
        bubble: idle share of p * `step_s`.
        peak_activations: for each stage the most chunk activations held at once.
    """

    plan: Plan
    starts_s: tuple[tuple[float, ...], ...]
    ends_s: tuple[tuple[float, ...], ...]
    step_s: float
    bubble: float
    peak_activations: tuple[int, ...]


def prove(plan: Plan, program: Program) -> None:
    """See that a plan runs to its end, whatever its ops cost.

    Raises:
        PlanError: as `simulate`.
    """
    simulate(plan, Costs.equal(plan.placement, 1.0, 1.0, 1.0), program)


def simulate(plan: Plan, costs: Costs, program: Program | None = None) -> Simulation:
    """Prove a plan and time it.

    Args:
        plan: any.
        costs: durations by virtual stage of its placement.
        program: its ops with their messages; as `with_messages` makes it if not given.

    Raises:
        PlanError: it is no plan, it never ends, or a receive meets another message than its own.
    """
    validate(plan)
    program = with_messages(plan) if program is None else program
    for stage, actions in enumerate(program):
        if tuple(action.op for action in actions) != plan.ops[stage]:
            raise PlanError(f"stage {stage}: the actions are not the plan's ops in their order")
    run = _Run(plan, costs, program)
    run.to_the_end()
    step_s = max((ends[-1] for ends in run.ends_s if ends), default=0.0)
    work_s = costs.work_s(plan.num_microbatches, plan.forward_only)
    stage_time_s = plan.placement.num_stages * step_s
    return Simulation(
        plan=plan,
        starts_s=tuple(map(tuple, run.starts_s)),
        ends_s=tuple(map(tuple, run.ends_s)),
        step_s=step_s,
        bubble=max(0.0, 1 - work_s / stage_time_s) if stage_time_s else 0.0,
        peak_activations=peak_activations(plan),
    )


def peak_activations(plan: Plan) -> tuple[int, ...]:
    """For each stage the most chunk activations held at once, each from F to W (or BW)."""
    peaks = []
    for ops in plan.ops:
        held = peak = 0
        for op in ops:
            held += (op.kind is Kind.F) - (op.kind in (Kind.W, Kind.BW))
            peak = max(peak, held)
        peaks.append(0 if plan.forward_only else peak)
    return tuple(peaks)


def validate(plan: Plan) -> None:
    """Check what each stage's order says by itself.

    Each F once; each B and W once, or one BW in their place (none of them where the plan is for
    evaluation); what is computed from another op of the stage comes after it; microbatches of one
    kind and chunk ascend.

    Raises:
        PlanError: with the first mistake found.
    """
    if len(plan.ops) != plan.placement.num_stages:
        found, needed = len(plan.ops), plan.placement.num_stages
        raise PlanError(f"the plan has ops for {found} stages, its placement {needed} stages")
    for stage, ops in enumerate(plan.ops):
        _validate_stage(plan, stage, ops)


def _validate_stage(plan: Plan, stage: int, ops: tuple[Op, ...]) -> None:
    done: set[Op] = set()
    next_microbatch: dict[tuple[Kind, int], int] = defaultdict(int)
    for op in ops:
        if op in done:
            raise PlanError(f"stage {stage} runs {op} twice")
        for earlier in _needed_here(plan, stage, op):
            if not done & earlier:
                needed = " or ".join(sorted(map(str, earlier)))
                raise PlanError(f"stage {stage} runs {op} before {needed}")
        done.add(op)
        for kind in (Kind.B, Kind.W) if op.kind is Kind.BW else (op.kind,):
            if op.microbatch < next_microbatch[kind, op.chunk]:
                raise PlanError(f"stage {stage} runs {op} after a later microbatch")
            next_microbatch[kind, op.chunk] = op.microbatch + 1
    _validate_counts(plan, stage, done)


def _needed_here(plan: Plan, stage: int, op: Op) -> list[set[Op]]:
    """Ops of the same stage that must come before an op; of each set one."""
    microbatch = op.microbatch
    if op.kind is Kind.W:
        return [{Op(Kind.B, microbatch, op.chunk)}]
    forward = op.kind is Kind.F
    needed = [] if forward else [{Op(Kind.F, microbatch, op.chunk)}]
    source = input_from(plan.placement, stage, op)
    if source is not None and source[0] == stage:
        kinds = (Kind.F,) if forward else (Kind.B, Kind.BW)
        needed.append({Op(kind, microbatch, source[1]) for kind in kinds})
    return needed


def _validate_counts(plan: Plan, stage: int, done: set[Op]) -> None:
    expected = [()] if plan.forward_only else [(Kind.B, Kind.W), (Kind.BW,)]
    num_chunks, num_microbatches = plan.placement.num_chunks, plan.num_microbatches
    for op in done:
        if not (0 <= op.chunk < num_chunks and 0 <= op.microbatch < num_microbatches):
            counts = f"{num_chunks} chunks and {num_microbatches} microbatches"
            raise PlanError(f"stage {stage} runs {op}, of {counts}")
    for chunk, microbatch in itertools.product(range(num_chunks), range(num_microbatches)):
        forward = Op(Kind.F, microbatch, chunk)
        if forward not in done:
            raise PlanError(f"stage {stage} lacks {forward}")
        kinds = (Kind.B, Kind.W, Kind.BW)
        found = tuple(kind for kind in kinds if Op(kind, microbatch, chunk) in done)
        if found not in expected:
            names = " and ".join(kind.value for kind in found) or "no gradient"
            of = f"microbatch {microbatch}, chunk {chunk}"
            raise PlanError(f"stage {stage} has {names} of {of}; must have B and W, or BW")


@dataclass
class _Channel:
    """What is sent and not received, what is posted and not sent; with the times of that."""

    sends: deque[tuple[Message, float]] = field(default_factory=deque)
    receives: deque[tuple[Message, float]] = field(default_factory=deque)


class _Run:
    """Stages that run their actions until all are done or all of them wait."""

    def __init__(self, plan: Plan, costs: Costs, program: Program) -> None:
        self._plan, self._costs, self._program = plan, costs, program
        stages = range(plan.placement.num_stages)
        self.starts_s: list[list[float]] = [[] for _ in stages]
        self.ends_s: list[list[float]] = [[] for _ in stages]
        self._posted = [0 for _ in stages]  # actions whose receives are posted
        self._arrived: list[dict[Op, float]] = [{} for _ in stages]  # when, by the op that takes it
        self._channels: dict[tuple[int, int], _Channel] = defaultdict(_Channel)
        self._runnable = list(stages)

    def to_the_end(self) -> None:
        """Run every action; raise PlanError where that cannot be."""
        while self._runnable:
            self._advance(self._runnable.pop())
        stuck = [
            stage
            for stage, actions in enumerate(self._program)
            if len(self.ends_s[stage]) < len(actions)
        ]
        if stuck:
            raise PlanError(self._deadlock(stuck[0]))
        for channel in self._channels.values():
            for message, _ in channel.sends:
                raise PlanError(f"{message} is sent and never received")
            for message, _ in channel.receives:
                raise PlanError(f"{message} is to be received and never sent")

    def _advance(self, stage: int) -> None:
        """Run a stage until it waits for a message or has done everything."""
        actions, ends_s = self._program[stage], self.ends_s[stage]
        while (place := len(ends_s)) < len(actions):
            action = actions[place]
            now = ends_s[-1] if ends_s else 0.0
            if self._posted[stage] == place:
                self._posted[stage] += 1
                for message in action.posts:
                    self._channels[message.source, stage].receives.append((message, now))
                    self._match(message.source, stage)
            if action.takes is not None and not action.takes.is_local:
                if action.op not in self._arrived[stage]:
                    return
                now = max(now, self._arrived[stage].pop(action.op))
            self.starts_s[stage].append(now)
            ends_s.append(now + self._duration_s(stage, action.op))
            if action.sends is not None and not action.sends.is_local:
                target = action.sends.target
                self._channels[stage, target].sends.append((action.sends, ends_s[-1]))
                self._match(stage, target)

    def _match(self, source: int, target: int) -> None:
        """Let the oldest send of a channel meet the oldest receive while there are both."""
        channel = self._channels[source, target]
        while channel.sends and channel.receives:
            sent, sent_s = channel.sends.popleft()
            posted, posted_s = channel.receives.popleft()
            if sent != posted:
                raise PlanError(
                    f"stage {source} sends {sent.made_by} to stage {target}, "
                    f"whose next receive from there is {posted.made_by}"
                )
            arrival_s = max(sent_s, posted_s) + self._costs.communication_s
            self._arrived[target][sent.taken_by] = arrival_s
            self._runnable.append(target)

    def _duration_s(self, stage: int, op: Op) -> float:
        virtual_stage = self._plan.placement.virtual_stage(stage, op.chunk)
        return self._costs.duration_s(op.kind, virtual_stage)

    def _deadlock(self, stage: int) -> str:
        """Who waits for whom, from a stage on until it repeats or ends."""
        told, seen = [], set()
        while stage not in seen:
            seen.add(stage)
            place = len(self.ends_s[stage])
            message = self._program[stage][place].takes
            assert message is not None  # only that holds a stage up
            source = message.source
            op = self._program[stage][place].op
            told.append(f"stage {stage} waits at {op} for {message.made_by} of stage {source}")
            if len(self.ends_s[source]) == len(self._program[source]):
                told.append(f"stage {source} has ended")
                break
            stage = source
        return f"a deadlock: {', '.join(told)}"
