"""The test worlds themselves: failures, deaths, hangs and warnings of ranks reach the test."""

import os
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.world import NEVER_MET, World


def rank_and_size(rank: int) -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def fail_on(rank: int, failing: int) -> None:
    if rank == failing:
        raise KeyError("what went wrong")
    dist.all_reduce(torch.zeros(1))  # the others wait for it


def die(rank: int) -> None:
    if rank == 0:
        os._exit(1)
    time.sleep(60)


def never_meet_at_first(rank: int, trace: Path) -> int:
    with trace.open("a") as file:
        file.write(f"{rank}")
    if trace.stat().st_size <= 2:
        raise RuntimeError(f"{NEVER_MET} with [pair.cc:553] Connection closed by peer")
    return rank


def never_meet_always(rank: int) -> None:
    raise RuntimeError(NEVER_MET)


def hang(rank: int) -> None:
    time.sleep(60 * rank)


def warn(rank: int) -> None:
    warnings.warn("of something", DeprecationWarning, stacklevel=1)


def test_ranks_that_never_met_are_started_once_more(world: World, tmp_path: Path) -> None:
    assert world.run(never_meet_at_first, 2, tmp_path / "trace") == [0, 1]
    with pytest.raises(RuntimeError, match=NEVER_MET):
        world.run(never_meet_always, 1)


def test_worlds_of_any_size_follow_each_other(world: World) -> None:
    for size in (1, 4, 2):
        assert world.run(rank_and_size, size) == [(rank, size) for rank in range(size)]


def test_a_failure_has_its_type_and_the_traceback_of_its_rank(world: World) -> None:
    start_s = time.monotonic()
    with pytest.raises(KeyError, match="what went wrong") as raised:
        world.run(fail_on, 3, 2)
    assert "on rank 2:" in raised.value.__notes__[0]
    assert "in fail_on" in raised.value.__notes__[0]
    assert time.monotonic() - start_s < 60


def test_a_dead_rank_is_reported(world: World) -> None:
    with pytest.raises(ChildProcessError, match="the process of rank 0 died"):
        world.run(die, 2)


def test_a_rank_that_hangs_is_named(world: World) -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not come back"):
        world.run(hang, 2, timeout_s=2)


def test_a_warning_on_a_rank_is_an_error(world: World) -> None:
    with pytest.raises(DeprecationWarning, match="of something"):
        world.run(warn, 1)


def test_after_all_that_a_world_still_runs(world: World) -> None:
    assert world.run(rank_and_size, 4) == [(rank, 4) for rank in range(4)]
