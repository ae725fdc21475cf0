"""Ranks of a launched run, found from outside and stopped; and waiting for what others do."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def ranks_working_in(folder: Path) -> list[int]:
    """Processes of the ranks that were launched in this folder, by what they run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            is_rank = b"dsv2_train.cli.train" in words and b"torch.distributed.run" not in words
            if is_rank and os.readlink(process / "cwd") == str(folder):
                found.append(int(process.name))
    return sorted(found)


@contextmanager
def standing_still(pids: Sequence[int]) -> Iterator[None]:
    """While the block runs these processes are stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def wait_until(
    is_so: Callable[[], bool], what: Callable[[], str], timeout_s: float, every_s: float = 0.2
) -> None:
    """Wait for something to be so.

    Raises:
        TimeoutError: that it is not, as `what` says.
    """
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"after {timeout_s} s: {what()}")
        time.sleep(every_s)
