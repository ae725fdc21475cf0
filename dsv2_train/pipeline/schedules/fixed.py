"""Schedules whose order is a formula of stages, microbatches and chunks.

A stage runs the microbatches of one kind and chunk in ascending order. So its order is a sequence
of (kind, chunk), and the microbatch of an entry is the number of equal entries before it. p is the
number of stages, m of microbatches, v of chunks; F, B and W in the closed forms are durations of a
whole stage, all its chunks. A step's end is the same on all stages.
"""

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from dsv2_train.config.placement import Placement
from dsv2_train.pipeline.plans import Kind, Op, Plan

Turn = tuple[Kind, int]  # kind, chunk


def build(schedule: str, placement: Placement, num_microbatches: int) -> Plan:
    """Make the plan of a schedule that has a formula; its placement fits it."""
    m, p, v = num_microbatches, placement.num_stages, placement.num_chunks
    orders = {
        "1f1b": one_f_one_b,
        "interleaved": interleaved,
        "zb_h1": interleaved_zb,
        "interleaved_zb": interleaved_zb,
        "zb_v": zb_v,
    }
    turns = [orders[schedule](p, stage, m, v) for stage in range(p)]
    return Plan(schedule, placement, m, tuple(tuple(numbered(order, m)) for order in turns))


def schedules_of(placement: Placement) -> tuple[str, ...]:
    """The schedules here that have this placement."""
    if placement.shape == "v":
        return ("zb_v",)
    return ("1f1b", "zb_h1") if placement.num_chunks == 1 else ("interleaved", "interleaved_zb")


def one_f_one_b(p: int, stage: int, m: int, v: int) -> Iterator[Turn]:
    """1F1B, v = 1: after its first forwards a stage alternates.

    Idle: (p - 1) (F + B + W) on every stage. Held: p - stage activations.
    """
    return _alternating(p, m, v, p - 1 - stage)


def interleaved(p: int, stage: int, m: int, v: int) -> Iterator[Turn]:
    """Interleaved 1F1B in the order of megatron-core: p microbatches chunk by chunk.

    Idle: (p - 1) (F + B + W) / v on every stage where p divides m. Held: on the first stage
    (v + 1) p - 1 chunk activations, more than the v p of 1F1B.
    """
    return _alternating(p, m, v, (v - 1) * p + 2 * (p - 1 - stage))


def interleaved_zb(p: int, stage: int, m: int, v: int) -> Iterator[Turn]:
    """Interleaved ZB1P: a W comes later by as many Bs as there are stages before this one.

    With one chunk it is ZB-H1. Idle: (p - 1) (F + B - W) / v on every stage where p divides m and
    no chunk's W takes longer than its F or B. Held: v p chunk activations, 1F1B's most.
    """
    return _with_split_gradients(_alternating(p, m, v, (v - 1) * p + p - 1 - stage), stage)


def zb_v(p: int, stage: int, m: int, v: int) -> Iterator[Turn]:
    """ZB-V (arXiv 2401.10241, section 6): two chunks there and back, v = 2.

    Idle: (p - 1) F / 2 on every stage for F = B = W and m >= 2 p - 1. Held: 2 p chunk activations,
    1F1B's most.
    """
    m = max(m, v * p - 1)  # with fewer it is the order of this many, with gaps
    behind = p - stage  # stages from this one to the turn of the V, itself included
    yield from [(Kind.F, 0)] * (2 * behind - 1)
    yield from [(Kind.F, 1), (Kind.F, 0)] * stage
    yield from [(Kind.F, 1), (Kind.B, 1), (Kind.W, 1)] * behind
    both = [(Kind.B, 0), (Kind.W, 0), (Kind.F, 1), (Kind.B, 1), (Kind.W, 1)]
    yield from [(Kind.F, 0), *both] * (m - (2 * behind - 1) - stage)
    yield from both * (behind - 1)
    yield from [(Kind.B, 0), (Kind.B, 1)] * stage
    yield from [(Kind.B, 0), (Kind.W, 0)] * behind
    yield from [(Kind.W, 1)] * stage
    yield from [(Kind.W, 0)] * stage


def numbered(turns: Iterable[Turn], num_microbatches: int) -> Iterator[Op]:
    """Ops of the turns of a stage; what is beyond the last microbatch is left out.

    A plan without some of its microbatches is a plan for the others: no op of one microbatch
    needs another microbatch.
    """
    seen: Counter[Turn] = Counter()
    for kind, chunk in turns:
        if seen[kind, chunk] < num_microbatches:
            yield Op(kind, seen[kind, chunk], chunk)
        seen[kind, chunk] += 1


def _alternating(p: int, m: int, v: int, num_warmup: int) -> Iterator[Turn]:
    """F and BW in turn after the first forwards; p microbatches chunk by chunk.

    Args:
        p: stages.
        m: microbatches; whole groups of p are made, the last one may go beyond.
        v: chunks; backwards go from the last one to the first.
        num_warmup: forwards before the first pair of F and BW.
    """
    chunks = [chunk for chunk in range(v) for _ in range(p)] * -(-m // p)
    forwards = [(Kind.F, chunk) for chunk in chunks]
    backwards = [(Kind.BW, v - 1 - chunk) for chunk in chunks]
    yield from forwards[:num_warmup]
    for forward, backward in itertools.zip_longest(forwards[num_warmup:], backwards):
        if forward is not None:
            yield forward
        yield backward


def _with_split_gradients(turns: Iterable[Turn], num_deferred: int) -> Iterator[Turn]:
    """B in place of each BW, and its W after so many more Bs; what is left comes at the end."""
    deferred: deque[Turn] = deque()
    for kind, chunk in turns:
        if kind is not Kind.BW:
            yield kind, chunk
            continue
        yield Kind.B, chunk
        deferred.append((Kind.W, chunk))
        if len(deferred) > num_deferred:
            yield deferred.popleft()
    yield from deferred
