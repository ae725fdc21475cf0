"""A request to stop becomes one clean end on all ranks at the same step."""

import signal
from types import FrameType

import torch
from torch.distributed import ProcessGroup

from dsv2_train.distributed.collectives import all_max
from dsv2_train.runs.ownership import Fence, FencedError

_FENCED = 2
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Remembers that a signal asked for a stop; the ranks agree on it between two steps.

    A launcher sends SIGUSR2, again and again until its ranks have ended; the others come from a
    user, from Slurm, or from torchrun when another rank has failed.

    Args:
        hosts: all ranks, over a back end that takes host tensors.
        fence: on the rank that looks whether this attempt still owns its run, else None.
    """

    def __init__(self, hosts: ProcessGroup, fence: Fence | None = None) -> None:
        self._hosts = hosts
        self._fence = fence
        self._requested = False
        for number in _ASKING:
            signal.signal(number, self._remember)

    def agreed(self) -> bool:
        """True on every rank if any rank was asked to stop.

        One all-reduce of one number between the hosts: a device is not waited for.

        Raises:
            FencedError: on every rank, if another attempt has taken the run over.
        """
        lost = None if self._fence is None else self._fence.why_lost()
        mine = _FENCED if lost else int(self._requested)
        highest = int(all_max(torch.tensor(mine), self._hosts).item())
        if highest == _FENCED:
            raise FencedError(lost or "another attempt has taken this run over")
        return bool(highest)

    def close(self) -> None:
        """Ignore further requests: at its end Python would let them kill the process."""
        for number in _ASKING:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._requested = True
