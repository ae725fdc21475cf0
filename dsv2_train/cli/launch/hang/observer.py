"""The ranks of this node, looked at again and again: since when does each stand still?"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.cli.launch.hang.verdict import Sighting
from dsv2_train.distributed.activity import Record, ranks_in, read

# Longer gaps between two looks are this launcher's own (it was stopped, or the whole machine).
_MOST_OF_A_GAP_S = 2.0


@dataclass
class _Seen:
    record: Record
    still_s: float = 0.0
    silent_s: float = 0.0


class Observer:
    """Counts time only while it looks itself, by its own clock.

    Args:
        folder: with the records of this node's ranks.
        now: a clock, in seconds.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._now = folder, now
        self._seen: dict[int, _Seen] = {}
        self._last_s = now()

    def look(self) -> list[Sighting]:
        """Every rank of this node that keeps a record, in order."""
        now_s = self._now()
        gap_s = min(now_s - self._last_s, _MOST_OF_A_GAP_S)
        self._last_s = now_s
        records = {rank: read(self._folder, rank) for rank in ranks_in(self._folder)}
        self._seen = {
            rank: _updated(self._seen.get(rank), record, gap_s)
            for rank, record in records.items()
            if record is not None
        }
        return [
            Sighting(rank, seen.record, seen.still_s, seen.silent_s, state_of(seen.record.pid))
            for rank, seen in self._seen.items()
        ]


def state_of(pid: int) -> str:
    """The system's letter for the state of a process; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _updated(before: _Seen | None, record: Record, gap_s: float) -> _Seen:
    if before is None or before.record.pid != record.pid:
        return _Seen(record)
    old = before.record
    moved = (old.step, old.marks, old.ticks) != (record.step, record.marks, record.ticks)
    lives = moved or old.heartbeat != record.heartbeat
    return _Seen(
        record,
        still_s=0.0 if moved else before.still_s + gap_s,
        silent_s=0.0 if lives else before.silent_s + gap_s,
    )
