import json
import os
from pathlib import Path

import pytest

from dsv2_train.cli.launch.failure import describe_failure, first_error

TRACEBACK = "Traceback (most recent call last):\n  File ...\nValueError: boom"
KILLED = """\
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 14303)  (SIGKILL)
  error_file: <N/A>
"""


def leave_error(log_dir: Path, rank: int, message: str, written_ns: int, attempt: int = 0) -> None:
    folder = log_dir / "id_abc" / f"attempt_{attempt}" / str(rank)
    folder.mkdir(parents=True)
    extra = {"py_callstack": TRACEBACK, "timestamp": "0"}
    entry = {"message": {"message": message, "extraInfo": extra}}
    (folder / "error.json").write_text(json.dumps(entry))
    os.utime(folder / "error.json", ns=(written_ns, written_ns))


def test_the_first_error_written_is_the_one_shown(tmp_path: Path) -> None:
    leave_error(tmp_path, 0, "RuntimeError: Connection closed by peer", written_ns=2_000)
    leave_error(tmp_path, 3, "ValueError: boom", written_ns=1_000)
    told = describe_failure(tmp_path, "", 1)
    assert "rank 3 raised first:" in told
    assert "ValueError: boom" in told
    assert "Connection" not in told
    assert str(tmp_path) in told
    assert "local rank 3 of node 1 raised first:" in describe_failure(tmp_path, "", 1, node=1)


def test_after_restarts_the_last_start_is_told(tmp_path: Path) -> None:
    for attempt in (2, 9, 10):
        leave_error(tmp_path, 1, f"ValueError: of {attempt}", 1_000 - attempt, attempt)
    found = first_error(tmp_path)
    assert found is not None
    assert found.message == "ValueError: of 10"
    (tmp_path / "id_abc" / "attempt_11" / "0").mkdir(parents=True)
    assert first_error(tmp_path) is None


def test_a_killed_rank_comes_before_the_errors_it_caused(tmp_path: Path) -> None:
    leave_error(tmp_path, 0, "RuntimeError: Connection closed by peer", written_ns=1_000)
    lines = describe_failure(tmp_path, KILLED.format(rank=2, code=-9), 1).splitlines()
    assert lines[1].startswith("rank 2 was killed by SIGKILL")
    assert "out of memory" in lines[1]


def test_ranks_that_torchrun_ended_are_not_blamed(tmp_path: Path) -> None:
    assert "rank 1" not in describe_failure(tmp_path, KILLED.format(rank=1, code=-15), 1)


def test_a_crash_is_named(tmp_path: Path) -> None:
    told = describe_failure(tmp_path, KILLED.format(rank=1, code=-11), 1)
    assert "rank 1 was killed by SIGSEGV\n" in told


def test_a_killed_torchrun_is_named(tmp_path: Path) -> None:
    assert "torchrun was killed by SIGKILL" in describe_failure(tmp_path, "", -9)


def test_errors_that_say_what_to_do_have_no_traceback(tmp_path: Path) -> None:
    leave_error(tmp_path, 0, "DataError: data/x/train.bin: found 3 bytes", written_ns=1)
    told = describe_failure(tmp_path, "", 1)
    assert "Traceback" not in told
    assert "\ndata/x/train.bin: found 3 bytes\n" in told


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("ConfigError", True),
        ("DataError", True),
        ("CheckpointError", True),
        ("DamagedError", True),
        ("SaveError", False),
        ("FloatingPointError", False),
        ("RuntimeError", False),
    ],
)
def test_refusals_are_known(tmp_path: Path, kind: str, refused: bool) -> None:
    leave_error(tmp_path, 0, f"{kind}: 1 problem:\n  - a: b", written_ns=1)
    error = first_error(tmp_path)
    assert error is not None
    assert error.is_config_error is refused
    plain = kind != "RuntimeError"
    assert ("raised first" not in describe_failure(tmp_path, "", 1)) is plain


def test_ranks_that_left_nothing(tmp_path: Path) -> None:
    assert first_error(tmp_path) is None
    assert "no rank left an error" in describe_failure(tmp_path, "", 1)
