"""The ranks of one node under torchrun: start, pass signals on, say what failed, leave nothing."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from dsv2_train.cli.launch.failure import describe_failure, first_error, where_ranks_wrote
from dsv2_train.cli.launch.hang.watchdog import Watchdog
from dsv2_train.cli.main import EXIT_CONFIG_ERROR, EXIT_FAILED

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_GRACE_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """How the ranks ended.

    Attributes:
        status: 0 all ended well, 2 a rank refused the configuration, 1 otherwise.
        was_stopped: the launcher was asked to stop while they ran.
    """

    status: int
    was_stopped: bool


def run_ranks(
    worker: Sequence[str], num_ranks: int, log_dir: Path, hang_timeout_s: float | None = None
) -> Outcome:
    """Run a Python program on every rank and wait for the last one.

    Rank 0 writes to this terminal; the standard error of every rank, and the standard output of
    the others, go to files under `log_dir`. The first SIGINT or SIGTERM goes to the ranks, which
    end in their own time; the second goes to torchrun, which ends them; the third kills them.

    Args:
        worker: arguments of torchrun that name the program, and its own.
        num_ranks: processes on this node.
        log_dir: folder for this launch alone.
        hang_timeout_s: how long a rank may stand still before all are ended; None does not watch.
    """
    log_dir.mkdir(parents=True)
    _prctl(_PR_SET_CHILD_SUBREAPER)
    watchdog = Watchdog(log_dir, hang_timeout_s)
    process = subprocess.Popen(
        _command(worker, num_ranks, log_dir),
        env={**_environment(num_ranks), **watchdog.environment},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_die_with_launcher,
    )
    assert process.stderr is not None
    said: list[str] = []
    reader = threading.Thread(target=_pass_on, args=(process.stderr, said), daemon=True)
    reader.start()
    with _forwarded_signals(process) as received, watchdog.watching():
        status = process.wait()
        _end_leftovers()
    reader.join()
    if status == 0:
        return Outcome(0, bool(received))
    if watchdog.hang is not None:
        where = where_ranks_wrote(log_dir)
        print(f"\nthe ranks were ended:\n{watchdog.hang.text}\n{where}", file=sys.stderr)
        return Outcome(EXIT_FAILED, bool(received))
    error = first_error(log_dir)
    if received and status > 0 and error is None:
        print("stopped while the ranks could not yet, or no longer, save", file=sys.stderr)
        return Outcome(EXIT_FAILED, True)
    print(describe_failure(log_dir, "".join(said), status), file=sys.stderr)
    refused = error is not None and error.is_config_error
    return Outcome(EXIT_CONFIG_ERROR if refused else EXIT_FAILED, bool(received))


def _command(worker: Sequence[str], num_ranks: int, log_dir: Path) -> list[str]:
    redirects = ",".join(f"{rank}:{2 if rank == 0 else 3}" for rank in range(num_ranks))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = [f"--nproc-per-node={num_ranks}", f"--log-dir={log_dir}", f"--redirects={redirects}"]
    return [*torchrun, *options, *worker]


def _environment(num_ranks: int) -> dict[str, str]:
    num_cores = len(os.sched_getaffinity(0))
    threads = str(max(1, num_cores // num_ranks))
    return {"OMP_NUM_THREADS": threads, **os.environ}


def _pass_on(stream: IO[bytes], said: list[str]) -> None:
    for line in stream:
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        said.append(line.decode(errors="replace"))


@contextmanager
def _forwarded_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on while the block runs; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        ranks = _children(process.pid)
        if len(received) > 2:
            _send(signal.SIGKILL, [*ranks, process.pid])
        elif len(received) == 2 or not ranks:
            process.send_signal(signal.SIGTERM)
        else:
            _send(number, ranks)

    previous = {
        number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_leftovers() -> None:
    """Wait for processes that torchrun left behind (it was killed), then kill them."""
    deadline_s = time.monotonic() + _GRACE_S
    while leftovers := _children(os.getpid()):
        if time.monotonic() > deadline_s:
            _send(signal.SIGKILL, leftovers)
        for pid in leftovers:
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(word) for file in files for word in file.read_text().split()]


def _send(number: int, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _die_with_launcher() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int = 1) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
