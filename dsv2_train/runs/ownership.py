"""One attempt at a time owns a run folder; a later one of the same job fences an earlier one.

The owner's record, `owner.json`, is replaced by rename. Its modification time, by the clock of the
file system, is the owner's heartbeat.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

OWNER = "owner.json"
ATTEMPT = "DSV2_ATTEMPT"  # environment variable of the first node's ranks: their attempt
HEARTBEAT_S = 10.0
DEAD_AFTER_S = 60.0

_START_TIME_FIELD = 19  # of /proc/PID/stat, counted from behind the name


class FencedError(Exception):
    """This attempt no longer owns its run folder, and must write nothing more."""


class OwnedError(Exception):
    """The run folder belongs to an attempt that is alive."""


@dataclass(frozen=True)
class Owner:
    """An attempt at a run.

    Attributes:
        attempt: a random name.
        host: name of the machine of its launcher.
        machine: tells apart machines, boots of one, and containers on one.
        pid: process of its launcher.
        started: when that process began, in clock ticks since the machine did.
        jobs: the scheduler's job, and those that it is a continuation of.
    """

    attempt: str
    host: str
    machine: str
    pid: int
    started: int
    jobs: tuple[str, ...] = ()

    @classmethod
    def this_process(cls, jobs: tuple[str, ...] = ()) -> "Owner":
        """A new attempt, launched by this process."""
        pid = os.getpid()
        started = _started(pid)
        assert started is not None, "this process is in /proc"
        return cls(secrets.token_hex(8), socket.gethostname(), _machine(), pid, started, jobs)

    def __str__(self) -> str:
        job = f", job {self.jobs[0]}" if self.jobs else ""
        return f"process {self.pid} on {self.host}{job}"


def read_owner(folder: Path) -> Owner | None:
    """The owner of a run folder; None for a folder that nobody ever owned.

    A record that cannot be understood is nobody's: whoever wrote it does not hold it either.

    Raises:
        OSError: if it is there and cannot be read.
    """
    try:
        values = json.loads((folder / OWNER).read_bytes())
        values["jobs"] = tuple(values["jobs"])
        return Owner(**{field.name: values[field.name] for field in fields(Owner)})
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def is_alive(owner: Owner, folder: Path) -> bool:
    """Whether an attempt still runs: by its process here, by its heartbeat elsewhere."""
    if owner.machine == _machine():
        return _started(owner.pid) == owner.started
    return _heartbeat_age_s(folder) < DEAD_AFTER_S


def take(folder: Path, attempt: Owner) -> Owner | None:
    """Make an attempt the owner of a run folder.

    An attempt of the same job, or of one that this job continues, is fenced even if it lives.

    Returns:
        The owner before, dead or fenced; None where there was none.

    Raises:
        OwnedError: if another attempt owns it and is alive.
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _one_taker(folder):
        before = read_owner(folder)
        goes_on = before is not None and not set(before.jobs).isdisjoint(attempt.jobs)
        if before is not None and not goes_on and is_alive(before, folder):
            raise OwnedError(
                f"{folder} is in use by {before}; stop that first, or choose another run.name"
            )
        path = folder / OWNER
        temporary = path.with_suffix(f".{attempt.attempt}")
        temporary.write_text(json.dumps(asdict(attempt), indent=2) + "\n")
        temporary.rename(path)
    return before


@contextmanager
def owned(folder: Path, attempt: Owner) -> Iterator[Owner | None]:
    """Own a run folder while the block runs; yields the owner before, dead or fenced, if any.

    One that ended, in whatever way, has given the folder back: an owner before is one that was
    killed, or that lives.

    Raises:
        OwnedError: if another attempt owns it and is alive.
        OSError: if the folder cannot be written.
    """
    before = take(folder, attempt)
    try:
        with heartbeat(folder, attempt):
            yield before
    finally:
        _give_back(folder, attempt)


@contextmanager
def heartbeat(folder: Path, attempt: Owner, every_s: float = HEARTBEAT_S) -> Iterator[None]:
    """Keep the owner's heartbeat while the block runs; nobody else's."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            with suppress(OSError):  # of a file system that does not answer now
                if read_owner(folder) == attempt:
                    os.utime(folder / OWNER)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Fence:
    """Keeps an attempt that lost its run folder from writing to it.

    Args:
        folder: the run folder.
        attempt: the name of this attempt; None where no launcher took the folder, and then nothing
            is fenced.
    """

    def __init__(self, folder: Path, attempt: str | None) -> None:
        self._folder = folder
        self._attempt = attempt

    def check(self) -> None:
        """See that the folder is still this attempt's; reads one small file.

        Raises:
            FencedError: if it is another's.
        """
        lost = self.why_lost()
        if lost is not None:
            raise FencedError(lost)

    def why_lost(self) -> str | None:
        """Whose the folder is, if it is another's; reads one small file."""
        try:
            owner = None if self._attempt is None else read_owner(self._folder)
        except OSError:  # a file system that does not answer now is asked again
            return None
        if owner is None or owner.attempt == self._attempt:
            return None
        return (
            f"{self._folder} now belongs to {owner}, which goes on with this run; this attempt "
            "ends and writes nothing more"
        )


def _give_back(folder: Path, attempt: Owner) -> None:
    with suppress(OSError), _one_taker(folder):
        if read_owner(folder) == attempt:
            (folder / OWNER).unlink()


@contextmanager
def _one_taker(folder: Path) -> Iterator[None]:
    """Let one process at a time look and take, on file systems that know locks."""
    with (folder / f"{OWNER}.lock").open("a") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _heartbeat_age_s(folder: Path) -> float:
    """Seconds since the last heartbeat, both times by the file system's clock."""
    probe = folder / f"{OWNER}.{secrets.token_hex(8)}"
    try:
        probe.touch()
        return probe.stat().st_mtime - (folder / OWNER).stat().st_mtime
    except FileNotFoundError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks; None for one that has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else int(after_name[_START_TIME_FIELD])
