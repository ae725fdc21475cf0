"""A request to stop becomes one clean end on all ranks at the same step."""

import signal
from types import FrameType

import torch
from torch.distributed import ProcessGroup

from dsv2_train.distributed.collectives import all_max

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Remembers that a signal asked for a stop; the ranks agree on it between two steps.

    A launcher sends SIGUSR2, again and again until its ranks have ended; the others come from a
    user, from Slurm, or from torchrun when another rank has failed.

    Args:
        hosts: all ranks, over a back end that takes host tensors.
    """

    def __init__(self, hosts: ProcessGroup) -> None:
        self._hosts = hosts
        self._requested = False
        for number in _ASKING:
            signal.signal(number, self._remember)

    def agreed(self) -> bool:
        """True on every rank if any rank was asked to stop.

        One all-reduce of one number between the hosts: a device is not waited for.
        """
        return bool(all_max(torch.tensor(int(self._requested)), self._hosts).item())

    def close(self) -> None:
        """Ignore further requests: at its end Python would let them kill the process."""
        for number in _ASKING:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._requested = True
