"""Real torchrun, two ranks that do almost nothing: output, failure, signals, no leftovers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dsv2_train.cli.launch.stop import ONE_REQUEST_S, children

# Importing torch takes seconds, many times that on a machine that is busy.
PATIENCE_S = 90.0

LAUNCHER = """\
import sys
from pathlib import Path
from dsv2_train.cli.launch.torchrun import run_ranks
outcome = run_ranks([sys.argv[1]], 2, Path("logs"))
print(outcome, flush=True)
sys.exit(outcome.status)
"""

WORKER = """\
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
Path(f"pid_{rank}").write_text(str(os.getpid()))
stopped = []
signal.signal(signal.SIGUSR2, lambda *_: stopped.append(1))
print("hello from", rank, "threads", os.environ["OMP_NUM_THREADS"], flush=True)
while not stopped:
    time.sleep(0.05)
"""

FAILING_WORKER = """\
import os, signal, time
from torch.distributed.elastic.multiprocessing.errors import record
from dsv2_train.config.problems import ConfigError, Problem

@record
def main():
    if os.environ["RANK"] == "1":
        raise ERROR
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as when a handler heeds it
    time.sleep(600)

main()
"""


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start the launcher on a worker's source in an empty folder; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(source: str) -> subprocess.Popen[str]:
        (tmp_path / "worker.py").write_text(source)
        environment = {name: os.environ[name] for name in os.environ if name != "OMP_NUM_THREADS"}
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, "worker.py"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_as_a_shell_would,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    for file in tmp_path.glob("pid_*"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)
    for process in started:
        process.communicate()


class _Handlers:
    """What a launcher begins with, whatever tests were started with."""

    hangups = signal.SIG_DFL


def _as_a_shell_would() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, _Handlers.hangups)


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


def rank_pids(folder: Path) -> list[int]:
    """Process ids of the two ranks, once both run."""
    files = [folder / f"pid_{rank}" for rank in range(2)]
    eventually(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_first_signal_lets_the_ranks_end_well(
    tmp_path: Path, launch: Callable[[str], subprocess.Popen[str]]
) -> None:
    launcher = launch(WORKER)
    rank_pids(tmp_path)
    time.sleep(0.5)
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0, err
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert out.splitlines() == [
        f"hello from 0 threads {threads}",
        "Outcome(status=0, was_stopped=True)",
    ]
    (other,) = tmp_path.glob("logs/*/attempt_0/1/stdout.log")
    assert other.read_text() == f"hello from 1 threads {threads}\n"


def test_what_slurm_sends_to_every_process_is_one_request(
    tmp_path: Path, launch: Callable[[str], subprocess.Popen[str]]
) -> None:
    launcher = launch(WORKER)
    ranks = rank_pids(tmp_path)
    time.sleep(0.5)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        for pid in (*ranks, parent_of(ranks[0]), launcher.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
    out, err = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0, err
    assert out.splitlines()[-1] == "Outcome(status=0, was_stopped=True)"
    assert err.count("asked to stop") == 1 and "asked again" not in err


def test_ranks_that_cannot_hear_yet_are_told_again(
    tmp_path: Path, launch: Callable[[str], subprocess.Popen[str]]
) -> None:
    deaf = WORKER.replace("signal.signal(", "time.sleep(4)\nsignal.signal(")
    launcher = launch(deaf)
    rank_pids(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0, err


def test_a_second_signal_kills_at_once(
    tmp_path: Path, launch: Callable[[str], subprocess.Popen[str]]
) -> None:
    """Ranks that save for ever, as far as the one who waits can tell."""
    launcher = launch(WORKER.replace("while not stopped", "while True"))
    pids = rank_pids(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    time.sleep(ONE_REQUEST_S + 1)
    assert all(map(is_alive, pids)) and launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    asked_s = time.monotonic()
    eventually(lambda: not any(map(is_alive, pids)))
    assert time.monotonic() - asked_s < 2
    _, err = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 1
    assert err.endswith("asked again (SIGTERM): killed\ncomplete checkpoints are as they were\n")


@pytest.mark.parametrize("hangups", [signal.SIG_DFL, signal.SIG_IGN], ids=["", "nohup"])
def test_without_ranks_there_is_nothing_to_wait_for(
    tmp_path: Path,
    launch: Callable[[str], subprocess.Popen[str]],
    hangups: signal.Handlers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Handlers, "hangups", hangups)
    launcher = launch(WORKER)
    eventually(lambda: children(launcher.pid) != [])  # torchrun, which imports torch for seconds
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 1
    assert err.endswith("stopped while the ranks could not yet, or no longer, save\n")
    assert not list(tmp_path.glob("pid_*"))


@pytest.mark.parametrize("victim", ["launcher", "torchrun"])
def test_no_rank_outlives_who_started_it(
    tmp_path: Path, launch: Callable[[str], subprocess.Popen[str]], victim: str
) -> None:
    launcher = launch(WORKER)
    pids = rank_pids(tmp_path)
    os.kill(launcher.pid if victim == "launcher" else parent_of(pids[0]), signal.SIGKILL)
    eventually(lambda: not any(is_alive(pid) for pid in pids))
    if victim == "torchrun":
        _, err = launcher.communicate(timeout=PATIENCE_S)
        assert launcher.returncode == 1
        assert "torchrun was killed by SIGKILL" in err


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        ("ValueError('boom')", 1, "rank 1 raised first:\n"),
        ("ConfigError([Problem('a', 1, 'must be 2')])", 2, "\n\n1 configuration problem:\n  - a: "),
        ("SystemExit(os.kill(os.getpid(), 9))", 1, "\nrank 1 was killed by SIGKILL"),
    ],
)
def test_what_failed_is_the_last_thing_told(
    launch: Callable[[str], subprocess.Popen[str]], error: str, status: int, told: str
) -> None:
    launcher = launch(FAILING_WORKER.replace("ERROR", error))
    _, err = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == status, err
    assert told in err
    assert err.splitlines()[-1].startswith("everything the ranks wrote: logs/")
