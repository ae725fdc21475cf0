"""Who is missing: decided from records, over nodes, told by a launcher whose ranks hang."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.cli.launch.hang import report
from dsv2_train.cli.launch.hang.nodes import Nodes, as_values, from_values
from dsv2_train.cli.launch.hang.observer import Observer
from dsv2_train.cli.launch.hang.verdict import Sighting, Verdict, Why, decide
from dsv2_train.cli.launch.hang.watchdog import Watchdog
from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Phase, Place, Record
from tests.helpers.world import ROOT

T = 60.0

working = Record(
    pid=os.getpid(),
    heartbeat=9,
    ticks=0,
    step=5,
    marks=40,
    phase=Phase.TRAINING,
    op="F",
    microbatch=2,
    chunk=1,
    place=Place.NOWHERE,
    waits=False,
)
waiting = replace(working, place=Place.DISPATCH, waits=True)

fresh = st.floats(0, 2)
long = st.floats(T, 10 * T)
any_time = st.floats(0, 10 * T)
records = st.builds(
    Record,
    pid=st.just(1),
    heartbeat=st.integers(0, 9),
    ticks=st.integers(0, 9),
    step=st.integers(0, 9),
    marks=st.integers(0, 99),
    phase=st.sampled_from(Phase),
    op=st.sampled_from(["", "F", "B", "W", "BW"]),
    microbatch=st.integers(0, 9),
    chunk=st.integers(0, 3),
    place=st.sampled_from(Place),
    waits=st.booleans(),
)
hurried = records.filter(lambda each: each.phase not in (Phase.SETUP, Phase.END))


def sighting(
    rank: int, record: Record, still_s: float, silent_s: float, state: str = "S"
) -> Sighting:
    return Sighting(rank, record, still_s, silent_s, state)


@st.composite
def peers(draw: st.DrawFn, still: st.SearchStrategy[float]) -> list[Sighting]:
    """Ranks 1 and up that live and wait, each for a time of its own."""
    found = draw(st.lists(st.tuples(records, still, fresh), min_size=1, max_size=6))
    return [
        sighting(rank, replace(record, waits=True), still_s, silent_s)
        for rank, (record, still_s, silent_s) in enumerate(found, start=1)
    ]


@given(peers(any_time), records, long, fresh)
def test_a_stopped_rank_is_missing_wherever_it_was(
    others: list[Sighting], record: Record, silent_s: float, earlier_s: float
) -> None:
    stopped = sighting(0, record, silent_s + earlier_s, silent_s, "T")
    assert decide([*others, stopped], T) == Verdict((0,), Why.SILENT)


@given(peers(any_time), hurried, long, fresh)
def test_one_that_lives_and_waits_for_nobody_is_missing(
    others: list[Sighting], record: Record, still_s: float, silent_s: float
) -> None:
    stuck = sighting(0, replace(record, waits=False), still_s, silent_s)
    assert decide([*others, stuck], T) == Verdict((0,), Why.BUSY)


@given(peers(any_time), records, st.floats(0, T, exclude_max=True), fresh)
def test_who_waits_for_one_that_works_is_no_hang(
    others: list[Sighting], record: Record, still_s: float, silent_s: float
) -> None:
    works = sighting(0, record, still_s, silent_s)
    assert decide([*others, works], T) is None


@given(peers(any_time), st.sampled_from([Phase.SETUP, Phase.END]), long, fresh)
def test_before_the_first_step_a_rank_may_work_for_long(
    others: list[Sighting], phase: Phase, still_s: float, silent_s: float
) -> None:
    reads = sighting(0, replace(working, phase=phase), still_s, silent_s)
    assert decide([*others, reads], T) is None


@given(peers(long), records, any_time)
def test_one_that_has_ended_is_missed_by_all_others(
    others: list[Sighting], record: Record, still_s: float
) -> None:
    assert decide([*others, sighting(0, record, still_s, still_s, "Z")], T) == Verdict(
        (0,), Why.ENDED
    )


@given(peers(long))
def test_where_all_wait_the_one_furthest_behind_is_named(others: list[Sighting]) -> None:
    behind = sighting(0, replace(waiting, step=-1), T, 0.0)
    assert decide([*others, behind], T) == Verdict((0,), Why.BEHIND)


def test_the_ranks_of_a_silent_node_are_missing() -> None:
    others = [sighting(rank, waiting, 2 * T, 0.0) for rank in (0, 1)]
    lost = [sighting(rank, waiting, 3.0, 0.0) for rank in (2, 3)]
    assert decide([*others, *lost], T) is None
    assert decide([*others, *lost], T, [2, 3]) == Verdict((2, 3), Why.NODE)


def _write(folder: Path, rank: int, record: Record) -> None:
    ours = activity._Activity()
    ours._memory = bytearray(activity._END)
    phase, place = list(Phase).index(record.phase), list(Place).index(record.place)
    ours._step, ours._marks, ours._op = record.step, record.marks, record.op.encode()
    ours._microbatch, ours._chunk = record.microbatch, record.chunk
    ours._phases, ours._places = [phase], [(place, record.waits)]
    header = (record.pid, record.heartbeat, record.ticks)
    activity._HEADER.pack_into(ours._memory, 0, *header)
    ours._write()
    activity.file_of(folder, rank).write_bytes(ours._memory)


@given(records)
def test_a_record_is_read_as_it_was_written_and_told_to_other_nodes(
    tmp_path_factory: pytest.TempPathFactory, record: Record
) -> None:
    folder = tmp_path_factory.mktemp("records")
    _write(folder, 3, record)
    assert activity.read(folder, 3) == record
    assert activity.ranks_in(folder) == [3]
    assert activity.read(folder, 2) is None
    seen = sighting(3, record, 1.5, 0.5)
    assert from_values(json.loads(json.dumps(as_values(seen)))) == seen


def test_time_counts_while_the_launcher_runs_and_the_rank_does_not(tmp_path: Path) -> None:
    now_s = [0.0]
    observer = Observer(tmp_path, lambda: now_s[0])

    def look(after_s: float, record: Record) -> tuple[float, float]:
        now_s[0] += after_s
        _write(tmp_path, 0, record)
        (seen,) = observer.look()
        return seen.still_s, seen.silent_s

    assert observer.look() == []
    assert look(1, working) == (0, 0)
    assert look(1, replace(working, heartbeat=10)) == (1, 0)
    assert look(1, replace(working, heartbeat=10)) == (2, 1)
    assert look(3600, replace(working, heartbeat=10)) == (4, 3)  # the launcher was stopped
    assert look(1, replace(working, heartbeat=10, ticks=1)) == (0, 0)
    assert look(1, replace(working, heartbeat=10, ticks=1, marks=41)) == (0, 0)
    assert look(1, replace(working, heartbeat=10, ticks=1, marks=41)) == (1, 1)
    assert look(1, replace(working, pid=1)) == (0, 0)  # started again


def test_launchers_hear_of_each_other_and_miss_one_that_is_silent(tmp_path: Path) -> None:
    now_s = [0.0]
    first, second = (Nodes(tmp_path, node, 2, T, lambda: now_s[0]) for node in range(2))
    ours, theirs = sighting(0, waiting, T, 0.0), sighting(1, working, T, 0.0)
    assert first.everyone([ours]) == ([ours], [])
    second.tell([theirs])
    assert first.everyone([ours]) == ([ours, theirs], [])
    for _ in range(10):
        now_s[0] += T / 4
        second.tell([theirs])
        assert first.everyone([ours]) == ([ours, theirs], [])
    now_s[0] += T
    assert first.everyone([ours]) == ([ours, theirs], [1])


def test_the_report_names_the_missing_first_and_the_others_together(tmp_path: Path) -> None:
    stopped = sighting(4, replace(working, place=Place.DATA), 61.0, 60.5, "T")
    sightings = [sighting(rank, waiting, 50.0, 0.1) for rank in (0, 1, 2, 7)] + [stopped]
    written = report.write(tmp_path / "hang_1", Verdict((4,), Why.SILENT), sightings)
    assert report.find(tmp_path / "hang_1") == written
    assert report.find(tmp_path / "hang_2") is None
    assert written.text.splitlines()[:3] == [
        "THE RUN HANGS",
        "  rank 4 is missing: step 5, F of microbatch 2, chunk 1, in data, for 61 s; "
        "it shows no sign of life; its process is stopped by a signal",
        "  ranks 0-2, 7: step 5, F of microbatch 2, chunk 1, waits in dispatch",
    ]


def test_a_report_of_thousands_of_ranks_is_short(tmp_path: Path) -> None:
    sightings = [sighting(rank, replace(waiting, microbatch=rank), T, 0.0) for rank in range(2048)]
    text = report.describe(tmp_path, Verdict(tuple(range(1024)), Why.BEHIND), sightings)
    assert len(text.splitlines()) < 50


def test_a_report_that_cannot_be_written_is_told_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seen = sighting(0, working, T, 0.0)
    written = report.write(tmp_path / "file" / "hang_1", Verdict((0,), Why.BUSY), [seen])
    assert "rank 0 is missing" in written.text and "could not be written" in written.text


def test_the_first_node_decides_and_every_launcher_ends_its_ranks(tmp_path: Path) -> None:
    """Two launchers, each with one rank; the one of the second node is stopped."""
    (tmp_path / "worker.py").write_text(
        WORKER.replace("STUCK", "os.kill(os.getpid(), signal.SIGSTOP)")
    )
    watchdogs = [Watchdog(tmp_path / "logs", 3.0, node, 2) for node in range(2)]
    with watchdogs[0].watching(), watchdogs[1].watching():
        ranks = [
            subprocess.Popen(
                [sys.executable, tmp_path / "worker.py"],
                env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(node), **one.environment},
            )
            for node, one in enumerate(watchdogs)
        ]
        assert [rank.wait(30) for rank in ranks] == [-9, -9]
    reports = [one.hang for one in watchdogs]
    assert reports[0] is not None and reports[0] == reports[1]
    assert "rank 1 is missing: step 7, W of microbatch 3" in reports[0].text
    assert [file.name for file in reports[0].folder.glob("*.stacks")] == ["rank_00000.stacks"]


LAUNCHER = """\
import sys
from pathlib import Path
from dsv2_train.cli.launch.torchrun import run_ranks
from dsv2_train.config.sections.cluster import ClusterConfig
cluster = ClusterConfig(ranks_per_node=2, hang_timeout_s=3.0)
sys.exit(run_ranks(["worker.py"], 2, Path("logs"), cluster=cluster).status)
"""

WORKER = """\
import os, signal, time
from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Phase, Place

activity.start()
activity.begin_step(7)
with activity.phase(Phase.TRAINING):
    if os.environ["RANK"] == "1":
        activity.begin_op("W", 3, 0)
        STUCK
    with activity.waiting(Place.GRADIENTS):
        time.sleep(600)
"""


@pytest.mark.parametrize(
    ("stuck", "why"),
    [
        (
            "os.kill(os.getpid(), signal.SIGSTOP)",
            "it shows no sign of life; its process is stopped",
        ),
        ("time.sleep(600)", "it stands still and waits for nobody"),
    ],
    ids=["stopped", "asleep"],
)
def test_a_launcher_ends_ranks_that_hang_and_says_why_last(
    tmp_path: Path, stuck: str, why: str
) -> None:
    (tmp_path / "worker.py").write_text(WORKER.replace("STUCK", stuck))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.rpartition("the ranks were ended:\n")[2].splitlines()
    assert last[1].startswith("  rank 1 is missing: step 7, W of microbatch 3, chunk 0, for ")
    assert why in last[1]
    assert last[2] == "  rank 0: step 7, forward and backward, waits in reduction of gradients"
    assert last[-1].startswith("everything the ranks wrote: logs/")
    assert "out of memory" not in done.stderr
    assert "worker.py" in (tmp_path / "logs/hang_1/rank_00000.stacks").read_text()
