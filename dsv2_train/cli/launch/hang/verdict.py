"""Who is missing in a run that hangs, from what its ranks were last seen doing. Pure."""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsv2_train.distributed.activity import Phase, Record

# Ranks read, build and draw for as long as it takes; the timeouts of their groups hold there.
_UNHURRIED = (Phase.SETUP, Phase.END)


class Why(enum.Enum):
    """What tells a missing rank from the others, in the order in which it is looked for."""

    SILENT = "shows no sign of life"
    NODE = "is on a node whose launcher is silent"
    BUSY = "stands still and waits for nobody"
    ENDED = "has ended while others wait for it"
    BEHIND = "waits like all others, and is furthest behind"


@dataclass(frozen=True)
class Sighting:
    """A rank as the launcher of its node sees it.

    Attributes:
        rank: of the run.
        record: what it does.
        still_s: since its record last changed, but for the heartbeat.
        silent_s: since its last heartbeat.
        state: of its process: the letter of the system (T is stopped, D waits for a disk), or
            empty when the process has ended.
    """

    rank: int
    record: Record
    still_s: float
    silent_s: float
    state: str

    @property
    def has_ended(self) -> bool:
        """Whether the process is no more."""
        return not is_alive_in(self.state)


@dataclass(frozen=True)
class Verdict:
    """That a run hangs, and who is missing.

    Attributes:
        missing: ranks, the one that has stood still longest first.
        why: what tells them from the others.
    """

    missing: tuple[int, ...]
    why: Why


def decide(
    sightings: Sequence[Sighting], timeout_s: float, silent_nodes: Iterable[int] = ()
) -> Verdict | None:
    """Whether a run hangs.

    It does when a rank has shown no sign of life for the timeout, or has stood still for it without
    waiting for anybody (before the first step and after the last one it may), or when all ranks
    have waited for it. A rank that waits for one that works is no hang.

    Args:
        sightings: of all ranks of which anything is known.
        timeout_s: more than two heartbeats.
        silent_nodes: ranks of the nodes whose launchers have said nothing for the timeout.
    """
    living = [each for each in sightings if not each.has_ended]
    longest_first = sorted(living, key=lambda each: (-each.still_s, each.rank))
    silent_at_all = any(each.silent_s >= timeout_s for each in living)
    busy = [each.rank for each in longest_first if _is_stuck(each, timeout_s)]
    lost = tuple(sorted(silent_nodes))
    all_wait = bool(living) and all(
        each.still_s >= timeout_s and each.record.waits for each in living
    )
    if not (silent_at_all or busy or lost or all_wait):
        return None
    # One that is stopped stands still from its last mark on, which may be older than the heartbeat.
    silent = [each.rank for each in longest_first if each.silent_s >= timeout_s / 2]
    if silent:
        return Verdict(tuple(silent), Why.SILENT)
    if lost:
        return Verdict(lost, Why.NODE)
    if busy:
        return Verdict(tuple(busy), Why.BUSY)
    ended = tuple(sorted(each.rank for each in sightings if each.has_ended))
    if ended:
        return Verdict(ended, Why.ENDED)
    furthest = min((each.record.step, each.record.marks) for each in living)
    behind = (each.rank for each in living if (each.record.step, each.record.marks) == furthest)
    return Verdict(tuple(sorted(behind)), Why.BEHIND)


def is_alive_in(state: str) -> bool:
    """Whether a process in this state may do anything still; states as in `Sighting`."""
    return state not in ("", "Z", "X")


def _is_stuck(sighting: Sighting, timeout_s: float) -> bool:
    record = sighting.record
    hurries = record.phase not in _UNHURRIED
    return sighting.still_s >= timeout_s and not record.waits and hurries
