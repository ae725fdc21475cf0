"""When the ops of a real step ran: host clock on a CPU, events in the stream on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Phase, Place
from dsv2_train.distributed.stamps import since_first_s, stamp
from dsv2_train.pipeline.timeline import Event


@dataclass(frozen=True)
class Recorded:
    """A step of one rank.

    Attributes:
        events: what it did, one after the other, without a gap.
        waits: when it was in something that ranks do together, within events: exchanges of tokens,
            reductions, receives.
    """

    events: list[Event]
    waits: list[Event]


class Recorder:
    """Notes what a stage has done since it noted something last, and what it waited for in that.

    Args:
        device: where the stage computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, str, Any]] = []
        self._turns: list[tuple[str, Any]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the block runs, hear what this rank waits for."""
        activity.observe(self._hear)
        try:
            yield
        finally:
            activity.dismiss(self._hear)

    def begin(self) -> None:
        """A step begins; times count from here. Waits for a GPU to have nothing left to do."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._marks = [("", "", stamp(self._on_gpu))]
        self._turns = []

    def mark(self, kind: str, label: str) -> None:
        """What was done since the last mark."""
        self._marks.append((kind, label, stamp(self._on_gpu)))

    def recorded(self) -> Recorded:
        """The step so far, in order; waits for a GPU."""
        stamps = [at for _, at in self._turns] + [at for _, _, at in self._marks[1:]]
        times_s = since_first_s([self._marks[0][2], *stamps], self._on_gpu)
        turns_s, marks_s = times_s[1 : 1 + len(self._turns)], times_s[1 + len(self._turns) :]
        spans = zip(self._marks[1:], [0.0, *marks_s], marks_s, strict=False)
        turns = zip(self._turns, turns_s, turns_s[1:], strict=False)
        return Recorded(
            [Event(label, kind, start, end) for (kind, label, _), start, end in spans],
            [Event(place, "wait", start, end) for (place, _), start, end in turns if place],
        )

    def _hear(self, _phase: Phase, _op: str, place: Place, waits: bool) -> None:
        what = place.value if waits else ""
        if self._marks and what != (self._turns[-1][0] if self._turns else ""):
            self._turns.append((what, stamp(self._on_gpu)))
