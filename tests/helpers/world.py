"""Process worlds for tests: four gloo workers, started once, that run many functions."""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

MAX_WORLD_SIZE = 4
START_TIMEOUT_S = 300
READY = b"ready"
# Said by gloo, before a test's function begins, when a socket is closed while ranks connect.
NEVER_MET = "Gloo connectFullMesh failed"
# Imported once, by the process that the workers are forked from.
PRELOADED = ["dsv2_train.distributed.cpu_ranks", "dsv2_train.distributed.groups"]
ROOT = Path(__file__).parents[2]


class World:
    """Runs a function on several ranks; the processes are started by the first run and kept."""

    def __init__(self, warning_filters: list[str]) -> None:
        self._warning_filters = warning_filters
        self._workers: list[tuple[BaseProcess, Connection]] = []
        # Kept as long as the processes: a rank that lets go of its store while the file is being
        # removed dies (torch looks whether it is there, then opens it).
        self._stores: tempfile.TemporaryDirectory[str] | None = None
        self._num_runs = 0

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
    ) -> list[Any]:
        """Call `function(rank, *args)` on `world_size` ranks of a fresh gloo world.

        Args:
            function: importable by name: defined at the top of a module.
            world_size: at most 4.
            args: pickled, so tensors arrive as copies.
            timeout_s: when it passes, the processes are ended and their stacks printed.

        Returns:
            What each rank returned, by rank.

        Raises:
            BaseException: what the first rank to fail raised, with that rank's traceback as a note.
            TimeoutError: when a rank does not come back.
        """
        assert 1 <= world_size <= MAX_WORLD_SIZE, world_size
        try:
            return self._run(function, world_size, args, timeout_s)
        except RuntimeError as error:
            if NEVER_MET not in str(error):
                raise
        return self._run(function, world_size, args, timeout_s)

    def _run(
        self,
        function: Callable[..., Any],
        world_size: int,
        args: tuple[Any, ...],
        timeout_s: float,
    ) -> list[Any]:
        if self._stores is None:
            self._stores = self._start()
        deadline_s = time.monotonic() + timeout_s
        store = f"{self._stores.name}/{self._num_runs}"
        self._num_runs += 1
        for rank in range(world_size):
            task = (function, rank, world_size, store, timeout_s, args)
            self._workers[rank][1].send_bytes(pickle.dumps(task))
        return self._collect(world_size, deadline_s)

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []
        if self._stores is not None:
            self._stores.cleanup()
            self._stores = None

    def _start(self) -> tempfile.TemporaryDirectory[str]:
        context = preloaded_context()
        for _ in range(MAX_WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, self._warning_filters), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for _, connection in self._workers:
            assert connection.poll(START_TIMEOUT_S), "a worker does not start"
            assert connection.recv_bytes() == READY
        return tempfile.TemporaryDirectory(prefix="world-")

    def _collect(self, world_size: int, deadline_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        failure: BaseException | None = None
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline_s - time.monotonic()))
            if not ready:
                missing = sorted(waiting.values())
                self.close()
                if failure is not None:
                    raise failure
                raise TimeoutError(f"ranks {missing} did not come back; their stacks are on stderr")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    results[rank], error = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    error = ChildProcessError(f"the process of rank {rank} died")
                if error is not None and failure is None:
                    failure = error
                    deadline_s = min(deadline_s, time.monotonic() + 10)
        if failure is not None:
            self.close()
            raise failure
        return [results[rank] for rank in range(world_size)]


def preloaded_context() -> ForkServerContext:
    """Processes that start with torch and megatron-core imported, and nothing of a test's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def apply_warning_filters(filters: list[str]) -> None:
    """Set Python's warning filters to those of a pytest configuration, first to last."""
    warnings.resetwarnings()
    for text in filters:
        action, _, rest = text.partition(":")
        message, _, rest = rest.partition(":")
        category, _, module = rest.partition(":")
        kind = getattr(__import__("builtins"), category or "Warning")
        warnings.filterwarnings(action, message.strip(), kind, module)  # type: ignore[arg-type]


def _work(connection: Connection, warning_filters: list[str]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(ROOT))
    apply_warning_filters(warning_filters)
    import torch  # noqa: PLC0415  imported under the filters

    from dsv2_train.distributed import cpu_ranks  # noqa: PLC0415

    torch.set_num_threads(1)
    cpu_ranks.install()
    connection.send_bytes(READY)
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        _run_task(connection, task)


def _run_task(connection: Connection, task: bytes) -> None:
    import torch.distributed as dist  # noqa: PLC0415

    from dsv2_train.distributed import groups  # noqa: PLC0415

    rank = -1
    try:
        function, rank, world_size, store, timeout_s, args = pickle.loads(task)
        faulthandler.dump_traceback_later(0.95 * timeout_s)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=0.9 * timeout_s),
        )
        answer = pickle.dumps((function(rank, *args), None))
    except BaseException as error:
        answer = _pickle_failure(error, rank)
    connection.send_bytes(answer)
    faulthandler.cancel_dump_traceback_later()
    groups.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()


def _pickle_failure(error: BaseException, rank: int) -> bytes:
    note = f"on rank {rank}:\n{traceback.format_exc()}"
    try:
        error.add_note(note)
        pickled = pickle.dumps((None, error.with_traceback(None)))
        pickle.loads(pickled)
    except Exception:
        return pickle.dumps((None, RuntimeError(note)))
    return pickled
