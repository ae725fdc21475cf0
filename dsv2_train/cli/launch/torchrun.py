"""The ranks of one node under torchrun: start, pass signals on, say what failed, leave nothing."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO

from dsv2_train.cli.launch.failure import describe_failure, first_error, where_ranks_wrote
from dsv2_train.cli.launch.hang.watchdog import Watchdog
from dsv2_train.cli.launch.place import Place
from dsv2_train.cli.launch.stop import END_TORCHRUN, IGNORED, children, heeding_signals, send
from dsv2_train.cli.main import EXIT_CONFIG_ERROR, EXIT_FAILED
from dsv2_train.config.sections.cluster import ClusterConfig

ONE_NODE = Place()

# Of torchrun's agents a store keeps the addresses of ranks that have died: ranks that are started
# again would try to reach them. Their own store is new each time.
_OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

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
    worker: Sequence[str],
    num_ranks: int,
    log_dir: Path,
    place: Place = ONE_NODE,
    cluster: ClusterConfig | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Run a Python program on every rank of this node and wait for the last one.

    Rank 0 of each node writes to this terminal; the standard error of every rank, and the standard
    output of the others, go to files under `log_dir`. A signal that asks to stop goes to the ranks,
    which end in their own time; a second one kills them.

    Args:
        worker: arguments of torchrun that name the program, and its own.
        num_ranks: processes on this node.
        log_dir: folder for this node of this launch alone; of several nodes, below one of all.
        place: this node among all.
        cluster: how often ranks that failed are started again, how long they may stand still, and
            their environment; what the environment has already is left as it is.
        more: of the ranks' environment.
    """
    log_dir.mkdir(parents=True)
    _prctl(_PR_SET_CHILD_SUBREAPER)
    watchdog = _watchdog(log_dir, place, cluster)
    max_restarts = 0 if cluster is None else cluster.max_restarts
    options = [f"--max-restarts={max_restarts}", *place.rendezvous]
    said: list[str] = []
    with heeding_signals() as stop, watchdog.watching():
        process = subprocess.Popen(
            [*_torchrun(num_ranks, log_dir), *options, *worker],
            env={**_environment(num_ranks, cluster), **watchdog.environment, **more},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_ignore_what_the_launcher_heeds,
        )
        assert process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(process.stderr, said), daemon=True)
        reader.start()
        status = stop.wait(process)
        _end_leftovers()
    reader.join()
    if status == 0:
        return Outcome(0, stop.was_asked)
    if stop.has_killed:
        print("complete checkpoints are as they were", file=sys.stderr)
        return Outcome(EXIT_FAILED, True)
    if watchdog.hang is not None:
        where = where_ranks_wrote(log_dir)
        print(f"\nthe ranks were ended:\n{watchdog.hang.text}\n{where}", file=sys.stderr)
        return Outcome(EXIT_FAILED, stop.was_asked)
    error = first_error(log_dir)
    if stop.was_asked and error is None:
        print("stopped while the ranks could not yet, or no longer, save", file=sys.stderr)
        return Outcome(EXIT_FAILED, True)
    node = None if place.num_nodes == 1 else place.node
    print(describe_failure(log_dir, "".join(said), status, node), file=sys.stderr)
    refused = error is not None and error.is_config_error
    return Outcome(EXIT_CONFIG_ERROR if refused else EXIT_FAILED, stop.was_asked)


def _watchdog(log_dir: Path, place: Place, cluster: ClusterConfig | None) -> Watchdog:
    of_all = log_dir if place.num_nodes == 1 else log_dir.parent
    timeout_s = None if cluster is None else cluster.hang_timeout_s
    return Watchdog(of_all, timeout_s, place.node, place.num_nodes)


def _torchrun(num_ranks: int, log_dir: Path) -> list[str]:
    redirects = ",".join(f"{rank}:{2 if rank == 0 else 3}" for rank in range(num_ranks))
    program = [sys.executable, "-m", "torch.distributed.run"]
    options = [f"--nproc-per-node={num_ranks}", f"--log-dir={log_dir}", f"--redirects={redirects}"]
    return [*program, *options, f"--signals-to-handle={END_TORCHRUN.name}"]


def _environment(num_ranks: int, cluster: ClusterConfig | None) -> dict[str, str]:
    num_cores = len(os.sched_getaffinity(0))
    threads = str(max(1, num_cores // num_ranks))
    ours = () if cluster is None else cluster.environment
    values = {variable.name: variable.value for variable in ours}
    return {"OMP_NUM_THREADS": threads, **_OWN_STORE, **values, **os.environ}


def _pass_on(stream: IO[bytes], said: list[str]) -> None:
    for line in stream:
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        said.append(line.decode(errors="replace"))


def _end_leftovers() -> None:
    """Wait for processes that torchrun left behind (it was killed), then kill them."""
    deadline_s = time.monotonic() + _GRACE_S
    while leftovers := children(os.getpid()):
        if time.monotonic() > deadline_s:
            send(signal.SIGKILL, leftovers)
        for pid in leftovers:
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _ignore_what_the_launcher_heeds() -> None:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END_TORCHRUN, signal.SIG_DFL)  # nohup has it ignored
    _prctl(_PR_SET_PDEATHSIG, END_TORCHRUN)


def _prctl(option: int, value: int = 1) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
