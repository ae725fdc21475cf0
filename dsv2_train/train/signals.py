"""A request to stop becomes one clean end on all ranks at the same step."""

import signal
from types import FrameType

import torch
from torch.distributed import ProcessGroup

from dsv2_train.distributed.collectives import all_max


class StopSignals:
    """Remembers SIGTERM and SIGINT; the ranks agree on a stop between two steps.

    Args:
        hosts: all ranks, over a back end that takes host tensors.
    """

    def __init__(self, hosts: ProcessGroup) -> None:
        self._hosts = hosts
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def agreed(self) -> bool:
        """True on every rank if any rank was asked to stop.

        One all-reduce of one number between the hosts: a device is not waited for.
        """
        return bool(all_max(torch.tensor(int(self._requested)), self._hosts).item())

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._requested = True
