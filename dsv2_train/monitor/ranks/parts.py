"""Where a step of this rank goes: data, forward, backward, exchange, optimizer."""

from typing import Any, Literal

import torch

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Phase, Place
from dsv2_train.distributed.stamps import since_first_s, stamp

Part = Literal["data", "forward", "backward", "exchange", "optimizer"]
PARTS: tuple[Part, ...] = ("data", "forward", "backward", "exchange", "optimizer")


def part_of(phase: Phase, op: str, place: Place, waits: bool) -> Part | None:
    """The part that a rank is in; None outside of training steps.

    `exchange` is whatever a rank does with others, waiting for them included: so the other parts
    are what it takes by itself.
    """
    if phase is not Phase.TRAINING and phase is not Phase.OPTIMIZER:
        return None
    if waits:
        return "exchange"
    if phase is Phase.OPTIMIZER:
        return "optimizer"
    if place is Place.DATA:
        return "data"
    return _PART_OF_OP[op]


_PART_OF_OP: dict[str, Part] = {
    "F": "forward",
    "B": "backward",
    "W": "backward",
    "BW": "backward",
    "": "exchange",
}


class PartClock:
    """Times the parts of one step, from the marks of this rank's activity.

    On a GPU a mark is an event in the stream: a part takes as long as it occupies or holds up the
    device, and nothing is waited for before the times are read.

    Args:
        device: where the rank computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[Part | None, Any]] = []

    def begin(self) -> None:
        """A step begins."""
        self._marks = []
        activity.observe(self._hear)

    def end(self) -> list[float]:
        """Seconds of each of `PARTS` since `begin`.

        Waits for a GPU, if nothing has been read from it since the step.
        """
        activity.dismiss(self._hear)
        self._marks.append((None, stamp(self._on_gpu)))
        times_s = since_first_s([at for _, at in self._marks], self._on_gpu)
        spent: dict[Part | None, float] = dict.fromkeys(PARTS, 0.0)
        for (part, _), start_s, end_s in zip(self._marks, times_s, times_s[1:], strict=False):
            spent[part] = spent.get(part, 0.0) + end_s - start_s
        return [spent[part] for part in PARTS]

    def _hear(self, phase: Phase, op: str, place: Place, waits: bool) -> None:
        part = part_of(phase, op, place, waits)
        if not self._marks or self._marks[-1][0] != part:
            self._marks.append((part, stamp(self._on_gpu)))
