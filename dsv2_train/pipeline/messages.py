"""What ops hand to ops: who sends what when, and when its receive is posted.

A local message stays on its stage, as at the turn of a V. For each ordered pair of stages there is
one channel. Its messages are the results of the sender's ops that the other stage needs, in the
order of the sender's plan; activations and gradients share it where they go the same way. The
receiver posts its receives of a channel in this very order, each one as early as this allows:

    receive j is posted before the first action at which fewer than `receives_ahead` earlier ones
    are posted and not taken; at the latest before the action that takes message j or a later one
    of the channel.

So what an op waits for is always posted, in whatever order a plan takes messages; a stage has more
than `receives_ahead` of a channel posted and not taken only where its plan takes them out of order.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dsv2_train.pipeline.plans import Kind, Op, Plan, result_to

RECEIVES_AHEAD = 4  # two on the way in each direction of the model


@dataclass(frozen=True, slots=True)
class Message:
    """The result of an op, needed by another op.

    Attributes:
        source: stage that computes it.
        target: stage that needs it.
        made_by: op on `source`.
        taken_by: op on `target`.
    """

    source: int
    target: int
    made_by: Op
    taken_by: Op

    @property
    def is_local(self) -> bool:
        """Whether it stays on its stage."""
        return self.source == self.target

    def __str__(self) -> str:
        return f"{self.made_by} (stage {self.source} to stage {self.target})"


@dataclass(frozen=True, slots=True)
class Action:
    """One op and the messages around it, in the order of the fields.

    Attributes:
        posts: receives to post, without waiting.
        takes: message to wait for, or at hand if it is local; None for a W and at the model's ends.
        op: what to compute.
        sends: message to send, or to keep if it is local; None likewise. Nothing may wait for it
            but its buffer, which is kept until it is sent: stages that wait for their sends before
            they go on can deadlock (interleaved_zb does, with four chunks on 16 stages).
    """

    posts: tuple[Message, ...]
    takes: Message | None
    op: Op
    sends: Message | None


Program = tuple[tuple[Action, ...], ...]  # for each stage its actions in order


def with_messages(plan: Plan, receives_ahead: int = RECEIVES_AHEAD) -> Program:
    """Add to each op of a plan what its stage receives before and sends after it.

    Args:
        plan: one whose every op is there (`simulate.validate`).
        receives_ahead: posted receives of a channel that are not taken yet, at least 1.
    """
    sends = _sends(plan)
    channels: dict[tuple[int, int], list[Message]] = defaultdict(list)
    takes: list[dict[Op, Message]] = [{} for _ in plan.ops]
    for message in itertools.chain.from_iterable(sends):
        if message is not None:
            takes[message.target][message.taken_by] = message
            if not message.is_local:
                channels[message.source, message.target].append(message)
    places = [{op: place for place, op in enumerate(ops)} for ops in plan.ops]
    posts: list[dict[int, list[Message]]] = [defaultdict(list) for _ in plan.ops]
    for (_, target), messages in channels.items():
        taken = [places[target][message.taken_by] for message in messages]
        for message, place in zip(messages, post_places(taken, receives_ahead), strict=True):
            posts[target][place].append(message)
    return tuple(
        tuple(
            Action(tuple(posts[stage].get(place, ())), takes[stage].get(op), op, sent)
            for place, (op, sent) in enumerate(zip(ops, sends[stage], strict=True))
        )
        for stage, ops in enumerate(plan.ops)
    )


def post_places(taken: Sequence[int], receives_ahead: int) -> list[int]:
    """Before which action each receive of a channel is posted, by the rule of this file.

    Args:
        taken: for each message, in the order sent, the action that takes it.
        receives_ahead: as in `with_messages`.
    """
    latest = list(itertools.accumulate(reversed(taken), min))[::-1]
    places: list[int] = []
    last_taken: list[int] = []  # of the earlier messages the `receives_ahead` taken last
    for place, bound in zip(taken, latest, strict=True):
        window = last_taken[0] + 1 if len(last_taken) == receives_ahead else 0
        places.append(min(window, bound))
        heapq.heappush(last_taken, place)
        if len(last_taken) > receives_ahead:
            heapq.heappop(last_taken)
    return places


def _sends(plan: Plan) -> list[list[Message | None]]:
    """For each op of each stage the message that carries its result; None where none does."""
    backwards = [
        {(op.microbatch, op.chunk): op for op in ops if op.kind in (Kind.B, Kind.BW)}
        for ops in plan.ops
    ]

    def message(source: int, op: Op) -> Message | None:
        needed_by = result_to(plan.placement, source, op)
        if needed_by is None:
            return None
        target, chunk = needed_by
        forward = Op(Kind.F, op.microbatch, chunk)
        taker = forward if op.kind is Kind.F else backwards[target][op.microbatch, chunk]
        return Message(source, target, op, taker)

    return [[message(stage, op) for op in ops] for stage, ops in enumerate(plan.ops)]
