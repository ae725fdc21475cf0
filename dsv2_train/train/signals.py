"""A request to stop becomes one clean end on all ranks at the same step."""

import signal
from types import FrameType

import torch
from torch.distributed import ProcessGroup

from dsv2_train.distributed.collectives import all_max


class StopSignals:
    """Remembers SIGTERM and SIGINT; the ranks agree on a stop between two steps."""

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def agreed(self, world: ProcessGroup, device: torch.device) -> bool:
        """True on every rank if any rank was asked to stop. One all-reduce of one number."""
        flag = torch.tensor(int(self._requested), device=device)
        return bool(all_max(flag, world).item())

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._requested = True
