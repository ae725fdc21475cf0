"""Timing that survives a busy machine: alternating runs, ratios of neighbours."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of each repeat; of CPU, all threads of the process together, unless told."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The repeat that was disturbed least."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle repeat."""
        return statistics.median(self.seconds)

    def __add__(self, other: "Times") -> "Times":
        pairs = zip(self.seconds, other.seconds, strict=True)
        return Times(tuple(mine + theirs for mine, theirs in pairs))


@dataclass(frozen=True)
class Ratio:
    """How many times as long something took as something else, repeat by repeat.

    Attributes:
        median: of the repeats' ratios.
        low: smallest of them.
        high: largest of them.
        of_best: ratio of the two fastest repeats, which need not be neighbours.
    """

    median: float
    low: float
    high: float
    of_best: float


def ratio(slow: Times, fast: Times) -> Ratio:
    """Divide `slow` by `fast`, of one `alternate`: neighbours met the same machine."""
    each = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return Ratio(statistics.median(each), min(each), max(each), slow.best / fast.best)


def alternate(
    actions: Sequence[Callable[[], object]],
    repeats: int,
    now: Callable[[], float] = time.process_time,
    before: Callable[[], object] | None = None,
) -> list[Times]:
    """Run all actions in turn, `repeats` times over, after one unmeasured turn.

    The order reverses every turn, so that none always runs in the caches of the same other. The
    garbage collector runs between actions only.

    Args:
        actions: what is compared.
        repeats: measured turns.
        now: the clock; the process's CPU time, or wall time for what waits for other processes.
        before: called before each measured action, not measured; a barrier where all processes
            begin together.
    """
    for action in actions:
        action()
    seconds: list[list[float]] = [[] for _ in actions]
    gc.disable()
    try:
        for repeat in range(repeats):
            turn = list(zip(actions, seconds, strict=True))
            for action, measured in reversed(turn) if repeat % 2 else turn:
                gc.collect(0)
                if before is not None:
                    before()
                start_s = now()
                action()
                measured.append(now() - start_s)
    finally:
        gc.enable()
    return [Times(tuple(measured)) for measured in seconds]
