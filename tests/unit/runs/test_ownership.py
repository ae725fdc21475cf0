"""A run folder has one owner: who lives is refused to others and fenced by a continuation."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dsv2_train.runs.ownership import (
    DEAD_AFTER_S,
    OWNER,
    Fence,
    FencedError,
    OwnedError,
    Owner,
    heartbeat,
    is_alive,
    owned,
    read_owner,
    take,
)

TAKES_AND_WAITS = """
import sys
from pathlib import Path
from dsv2_train.runs.ownership import Owner, take
take(Path(sys.argv[1]), Owner.this_process(tuple(sys.argv[2:])))
print("taken", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_launcher(folder: Path, *jobs: str) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the folder while the block runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", TAKES_AND_WAITS, str(folder), *jobs],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "taken\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def elsewhere(owner: Owner) -> Owner:
    return replace(owner, host="far", machine="far away")


def test_a_folder_in_use_is_refused_by_name_and_left_as_it_is(tmp_path: Path) -> None:
    with another_launcher(tmp_path, "7") as process:
        before = (tmp_path / OWNER).read_bytes()
        with pytest.raises(OwnedError, match=rf"in use by process {process.pid} on .*, job 7; "):
            take(tmp_path, Owner.this_process(("8",)))
        with pytest.raises(OwnedError):
            take(tmp_path, Owner.this_process())
        assert (tmp_path / OWNER).read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_is_replaced(tmp_path: Path, number: int) -> None:
    with another_launcher(tmp_path) as process:
        process.send_signal(number)
        process.wait()
        mine = Owner.this_process()
        before = take(tmp_path, mine)
        assert before is not None
        assert before.pid == process.pid
        assert read_owner(tmp_path) == mine


def test_another_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    earlier = replace(Owner.this_process(), started=1)
    take(tmp_path, earlier)
    assert not is_alive(earlier, tmp_path)


def test_a_process_that_ended_and_is_not_waited_for_is_dead(tmp_path: Path) -> None:
    with another_launcher(tmp_path) as process:
        owner = read_owner(tmp_path)
        assert owner is not None
        assert is_alive(owner, tmp_path)
        process.kill()
        while b") Z" not in Path(f"/proc/{process.pid}/stat").read_bytes():
            time.sleep(0.01)
        assert not is_alive(owner, tmp_path)


def test_elsewhere_a_heartbeat_tells_who_lives(tmp_path: Path) -> None:
    owner = elsewhere(Owner.this_process())
    take(tmp_path, owner)
    assert is_alive(owner, tmp_path)
    with pytest.raises(OwnedError, match="on far"):
        take(tmp_path, Owner.this_process())
    old_s = time.time() - DEAD_AFTER_S - 1
    os.utime(tmp_path / OWNER, (old_s, old_s))
    assert not is_alive(owner, tmp_path)
    with heartbeat(tmp_path, owner, every_s=0.01):
        deadline_s = time.monotonic() + 10
        while not is_alive(owner, tmp_path):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == [OWNER, f"{OWNER}.lock"]


def test_no_heart_beats_for_another(tmp_path: Path) -> None:
    mine, other = Owner.this_process(("1",)), Owner.this_process(("1",))
    take(tmp_path, mine)
    with heartbeat(tmp_path, mine, every_s=0.01):
        take(tmp_path, other)
        os.utime(tmp_path / OWNER, (1, 1))
        time.sleep(0.2)
        assert (tmp_path / OWNER).stat().st_mtime == 1


def test_a_continuation_of_the_job_fences_an_attempt_that_lives(tmp_path: Path) -> None:
    with another_launcher(tmp_path, "7", "5") as process:
        owner = read_owner(tmp_path)
        assert owner is not None
        old = Fence(tmp_path, owner.attempt)
        old.check()
        mine = Owner.this_process(("9", "7"))
        assert take(tmp_path, mine) == owner
        with pytest.raises(FencedError, match=r"now belongs to process .*, job 9, which goes on"):
            old.check()
        Fence(tmp_path, mine.attempt).check()
        assert process.poll() is None


def test_without_a_launcher_nothing_is_fenced(tmp_path: Path) -> None:
    Fence(tmp_path, None).check()
    take(tmp_path, Owner.this_process())
    Fence(tmp_path, None).check()
    with pytest.raises(FencedError):
        Fence(tmp_path, "another").check()


def test_a_file_system_that_does_not_answer_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, read_bytes, stale = Owner.this_process(), Path.read_bytes, [True]
    take(tmp_path, mine)

    def sometimes(path: Path) -> bytes:
        if stale and path.name == OWNER:
            raise OSError(errno.ESTALE, "stale file handle")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", sometimes)
    Fence(tmp_path, "another").check()
    with pytest.raises(OSError, match="stale"):
        take(tmp_path, Owner.this_process())
    with heartbeat(tmp_path, mine, every_s=0.01):
        time.sleep(0.1)
        os.utime(tmp_path / OWNER, (1, 1))
        stale.clear()
        time.sleep(0.2)
        assert (tmp_path / OWNER).stat().st_mtime > 1
    with pytest.raises(FencedError):
        Fence(tmp_path, "another").check()


def test_who_ends_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), owned(tmp_path, Owner.this_process()):
        assert read_owner(tmp_path) is not None
        raise ZeroDivisionError
    assert read_owner(tmp_path) is None


def test_who_has_lost_the_folder_does_not_give_it_back(tmp_path: Path) -> None:
    later = Owner.this_process(("7",))
    with owned(tmp_path, Owner.this_process(("7",))):
        take(tmp_path, later)
    assert read_owner(tmp_path) == later


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"attempt": "a"}', '{"jobs": 3}'])
def test_a_record_that_says_nothing_is_nobodys(tmp_path: Path, text: str) -> None:
    (tmp_path / OWNER).write_text(text)
    assert read_owner(tmp_path) is None
    mine = Owner.this_process()
    assert take(tmp_path, mine) is None
    assert read_owner(tmp_path) == mine


def test_of_many_that_take_at_once_one_owns(tmp_path: Path) -> None:
    attempts = [elsewhere(Owner.this_process((str(number),))) for number in range(16)]

    def try_to_take(attempt: Owner) -> bool:
        try:
            take(tmp_path, attempt)
        except OwnedError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        took = list(pool.map(try_to_take, attempts))
    assert took.count(True) == 1
    assert read_owner(tmp_path) == attempts[took.index(True)]
