"""A thread of the node's launcher that ends ranks which hang, and tells who is missing."""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dsv2_train.cli.launch.hang import report as reports
from dsv2_train.cli.launch.hang.nodes import Nodes
from dsv2_train.cli.launch.hang.observer import Observer, state_of
from dsv2_train.cli.launch.hang.report import Report
from dsv2_train.cli.launch.hang.verdict import Sighting, decide, is_alive_in
from dsv2_train.distributed import activity

_LOOK_EVERY_S = 0.5
_STACKS_WITHIN_S = 2.0
_KILLED_WITHIN_S = 5.0  # longer takes only a process that waits for a broken device
_MEMORY = Path("/dev/shm")


class Watchdog:
    """Watches the ranks of this node; with others', those of the whole run.

    Args:
        log_dir: of the launch, on a file system that all nodes share.
        timeout_s: how long a rank may stand still; None does not watch.
        node: which node this is; the first one decides.
        num_nodes: nodes of the launch.
    """

    def __init__(
        self, log_dir: Path, timeout_s: float | None, node: int = 0, num_nodes: int = 1
    ) -> None:
        self._timeout_s, self._node, self._num_nodes = timeout_s, node, num_nodes
        self._log_dir = log_dir
        self._reported = 0
        self._last: Report | None = None
        self._is_over = threading.Event()
        in_memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        self._records = tempfile.TemporaryDirectory(prefix="dsv2-activity-", dir=in_memory)

    @property
    def environment(self) -> dict[str, str]:
        """What the ranks need to know to be watched."""
        return {} if self._timeout_s is None else {activity.FOLDER_VARIABLE: self._records.name}

    @property
    def hang(self) -> Report | None:
        """The hang that ended the ranks that ran last, if one did."""
        return self._last

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs; afterwards the records are gone."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._timeout_s is not None:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            if self._timeout_s is not None:
                thread.join()
            self._records.cleanup()

    def _watch(self) -> None:
        assert self._timeout_s is not None
        folder = Path(self._records.name)
        observer = Observer(folder)
        nodes = Nodes(self._log_dir / "nodes", self._node, self._num_nodes, self._timeout_s)
        while not self._is_over.wait(_LOOK_EVERY_S):
            ours = observer.look()
            if ours and all(each.has_ended for each in ours):
                _forget(folder, ours)
                continue
            if ours:
                self._last = None
            nodes.tell(ours)
            report = self._report(nodes, ours)
            if report is not None:
                self._end(folder, ours, report)

    def _report(self, nodes: Nodes, ours: Sequence[Sighting]) -> Report | None:
        assert self._timeout_s is not None
        folder = self._log_dir / f"hang_{self._reported + 1}"
        if self._node != 0:
            return reports.find(folder)
        sightings, lost = nodes.everyone(ours)
        verdict = decide(sightings, self._timeout_s, lost)
        return None if verdict is None else reports.write(folder, verdict, sightings)

    def _end(self, folder: Path, ours: Sequence[Sighting], report: Report) -> None:
        """Tell, collect the stacks of those that can tell, kill all ranks of this node."""
        if self._node == 0:
            sys.stderr.write(f"\n{report.text}\n")
            sys.stderr.flush()
        _collect_stacks(folder, ours, report.folder)
        _send(signal.SIGKILL, ours)
        _wait_until_gone(ours)
        _forget(folder, ours)
        self._reported += 1
        self._last = report


def _collect_stacks(folder: Path, ours: Sequence[Sighting], target: Path) -> None:
    """Have every rank that is not stopped dump its stacks, and keep them."""
    files = {each.rank: activity.stacks_of(folder, each.rank) for each in ours}
    _send(activity.STACKS_SIGNAL, ours)
    can_tell = [files[each.rank] for each in ours if each.state not in ("T", "t")]
    deadline_s = time.monotonic() + _STACKS_WITHIN_S
    sizes: list[int] = []
    while time.monotonic() < deadline_s:
        before, sizes = sizes, [file.stat().st_size for file in can_tell]
        if sizes == before and all(sizes):
            break
        time.sleep(0.2)
    for rank, file in files.items():
        if file.exists() and file.stat().st_size:
            with suppress(OSError):  # a full disk
                shutil.copyfile(file, activity.stacks_of(target, rank))


def _wait_until_gone(ours: Sequence[Sighting]) -> None:
    deadline_s = time.monotonic() + _KILLED_WITHIN_S
    while time.monotonic() < deadline_s and any(
        is_alive_in(state_of(each.record.pid)) for each in ours
    ):
        time.sleep(0.05)


def _forget(folder: Path, ours: Sequence[Sighting]) -> None:
    for each in ours:
        activity.file_of(folder, each.rank).unlink(missing_ok=True)


def _send(number: int, ours: Sequence[Sighting]) -> None:
    for each in ours:
        with suppress(ProcessLookupError):
            os.kill(each.record.pid, number)
