"""A launcher that is asked to stop: its ranks stop when they can; asked again, they are killed."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

# What asks a launcher to stop: a user, Slurm, a lost terminal.
ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# What a launcher tells its ranks: stop when you can. Told twice it means the same.
STOP_WHEN_YOU_CAN = signal.SIGUSR2
# What ends torchrun, and with it its ranks.
END_TORCHRUN = signal.SIGHUP
# Torchrun begins with these ignored, and its ranks until they have handlers: Slurm signals every
# process of a step.
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

# Slurm sends one request more than once, to a step and to what runs it.
ONE_REQUEST_S = 2.0
_TELL_AGAIN_S = 2.0


class Stop:
    """Requests to stop, counted, from before torchrun is started until it has ended.

    Attributes:
        was_asked: a request came.
        has_killed: a second one came, and everything was killed.
    """

    def __init__(self) -> None:
        self.was_asked = False
        self.has_killed = False
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._asked_s = 0.0

    def wait(self, torchrun: subprocess.Popen[bytes]) -> int:
        """Wait for torchrun, and tell its ranks to stop for as long as they are asked to.

        A rank that was just started hears of it when it can.

        Args:
            torchrun: the process whose children are the ranks of this node.

        Returns:
            Exit status of torchrun.
        """
        self._torchrun = torchrun
        if self.was_asked:
            torchrun.send_signal(END_TORCHRUN)
        while True:
            try:
                return torchrun.wait(_TELL_AGAIN_S)
            except subprocess.TimeoutExpired:
                if self.was_asked:
                    send(STOP_WHEN_YOU_CAN, children(torchrun.pid))

    def heed(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal: what comes within two seconds of the first one is the same request."""
        now_s, torchrun = time.monotonic(), self._torchrun
        ranks = [] if torchrun is None else children(torchrun.pid)
        if not self.was_asked:
            self.was_asked, self._asked_s = True, now_s
            _say(f"asked to stop ({signal.Signals(number).name}): ranks save, and stop")
            if ranks:
                send(STOP_WHEN_YOU_CAN, ranks)
            elif torchrun is not None:
                torchrun.send_signal(END_TORCHRUN)
        elif now_s - self._asked_s > ONE_REQUEST_S:
            self.has_killed = True
            _say(f"asked again ({signal.Signals(number).name}): killed")
            send(signal.SIGKILL, [*([torchrun.pid] if torchrun else []), *ranks])


@contextmanager
def heeding_signals() -> Iterator[Stop]:
    """Heed signals while the block runs; one that this process ignores stays ignored (nohup)."""
    stop = Stop()
    heeded = [each for each in ASKING if signal.getsignal(each) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, stop.heed) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(what: str) -> None:
    """To standard error, past its buffer: the handler may have interrupted a write to that."""
    os.write(2, f"{what}\n".encode())


def children(pid: int) -> list[int]:
    """Processes that a process has started; none if it is gone."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def send(number: int, pids: Sequence[int]) -> None:
    """Send a signal to those processes that are there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
