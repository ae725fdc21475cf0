"""When the ops of a real step ran: host clock on a CPU, events in the stream on a GPU."""

from typing import Any

import torch

from dsv2_train.distributed.stamps import since_first_s, stamp
from dsv2_train.pipeline.timeline import Event


class Recorder:
    """Notes what a stage has done since it noted something last.

    Args:
        device: where the stage computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, str, Any]] = []

    def begin(self) -> None:
        """A step begins; times count from here. Waits for a GPU to have nothing left to do."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._marks = [("", "", stamp(self._on_gpu))]

    def mark(self, kind: str, label: str) -> None:
        """What was done since the last mark."""
        self._marks.append((kind, label, stamp(self._on_gpu)))

    def events(self) -> list[Event]:
        """The step so far, in order; waits for a GPU."""
        times_s = since_first_s([at for _, _, at in self._marks], self._on_gpu)
        spans = zip(self._marks[1:], times_s, times_s[1:], strict=False)
        return [Event(label, kind, start, end) for (kind, label, _), start, end in spans]
