"""Starts of a run, and when they are a loop."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.runs.attempts import (
    ATTEMPTS,
    CrashLoopError,
    Start,
    begin,
    read_starts,
    record,
    why_loop,
)


def failures(*steps: int) -> list[Start]:
    return [Start("a", restart, step) for restart, step in enumerate(steps)]


def test_what_is_recorded_is_read(tmp_path: Path) -> None:
    assert read_starts(tmp_path) == []
    for start in failures(0, 4):
        record(tmp_path, start)
    record(tmp_path, Start("a", 1, 4, ended_well=True))
    assert read_starts(tmp_path) == [Start("a", 0, 0), Start("a", 1, 4, ended_well=True)]


def test_an_end_of_another_start_is_not_taken_for_that_of_the_last(tmp_path: Path) -> None:
    record(tmp_path, Start("a", 0, 4))
    record(tmp_path, Start("b", 0, 4, ended_well=True))
    assert len(read_starts(tmp_path)) == 2


def test_lines_that_were_cut_off_are_passed_over(tmp_path: Path) -> None:
    record(tmp_path, Start("a", 0, 4))
    with (tmp_path / ATTEMPTS).open("ab") as file:
        file.write(b'{"series": "b", "rest\n[]\n{"more": 1}\n\xff\n')
    record(tmp_path, Start("c", 0, 4))
    assert [start.series for start in read_starts(tmp_path)] == ["a", "c"]


def test_a_loop_is_told_with_the_limit_and_what_to_do() -> None:
    assert why_loop(failures(4, 4), Start("a", 2, 4), limit=3) is None
    told = why_loop(failures(4, 4, 4), Start("a", 3, 4), limit=3)
    assert told is not None
    assert "last 3 starts" in told and "step 4" in told and "cluster.crash_loop=3" in told


def test_a_clean_end_is_no_failure() -> None:
    starts = [*failures(4, 4), Start("a", 2, 4, ended_well=True)]
    assert why_loop(starts, Start("a", 3, 4), limit=3) is None
    assert why_loop([*starts, *failures(4, 4)], Start("a", 5, 4), limit=3) is None


def test_whoever_gives_the_line_again_has_looked() -> None:
    assert why_loop(failures(4, 4, 4), Start("b", 0, 4), limit=3) is None


@given(st.lists(st.integers(0, 3)), st.integers(0, 3), st.integers(1, 4))
def test_only_as_many_failures_at_this_step_as_the_limit_are_a_loop(
    steps: list[int], step: int, limit: int
) -> None:
    in_a_row = next((n for n, each in enumerate(reversed(steps)) if each != step), len(steps))
    told = why_loop(failures(*steps), Start("a", 9, step), limit)
    assert (told is not None) == (in_a_row >= limit)


def test_a_start_is_one_from_its_launch_to_its_end(tmp_path: Path) -> None:
    assert begin(tmp_path, Start("a", 0), limit=1) is None
    assert begin(tmp_path, Start("a", 0, 4), limit=1) is None
    record(tmp_path, Start("a", 0, 4, ended_well=True))
    assert begin(tmp_path, Start("a", 0), limit=1) == Start("a", 0, 4, ended_well=True)
    assert read_starts(tmp_path) == [Start("a", 0, 4, ended_well=True), Start("a", 0)]


def test_launches_whose_ranks_never_began_are_a_loop_too(tmp_path: Path) -> None:
    for _ in range(3):
        begin(tmp_path, Start("a", 0), limit=3)
    before = (tmp_path / ATTEMPTS).read_bytes()
    with pytest.raises(CrashLoopError, match="last 3 starts never came to a step and failed"):
        begin(tmp_path, Start("a", 0), limit=3)
    assert (tmp_path / ATTEMPTS).read_bytes() == before
    begin(tmp_path, Start("b", 0), limit=3)


def test_those_that_never_began_count_with_those_that_did() -> None:
    starts = [Start("a", 0, 4), Start("a", 0), Start("a", 0, 4)]
    told = why_loop(starts, Start("a", 0), limit=3)
    assert told is not None and "after step 4" in told
    assert why_loop([*starts, Start("a", 0, 8)], Start("a", 0), limit=3) is None
