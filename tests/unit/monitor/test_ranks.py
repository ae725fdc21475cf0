"""Parts of a step from marks, and who is slow, against times written by hand."""

from collections.abc import Iterator

import pytest
import torch

from dsv2_train.config.sections.monitor import SlowRankConfig
from dsv2_train.distributed import activity, stamps
from dsv2_train.distributed.activity import Phase, Place
from dsv2_train.monitor.metrics import check_row
from dsv2_train.monitor.ranks.parts import PARTS, PartClock
from dsv2_train.monitor.ranks.stragglers import Stragglers

HOSTS = ["a", "a", "b", "b"]
EVEN = [0.01, 0.3, 0.5, 0.1, 0.05]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[PartClock]:
    """Each look at the time is a second later than the one before; nothing looks twice."""
    seconds = iter(range(1000))
    monkeypatch.setattr(stamps.time, "perf_counter", lambda: float(next(seconds)))
    clock = PartClock(torch.device("cpu"))
    yield clock
    clock.end()


def test_a_step_is_split_by_what_a_rank_was_in(clock: PartClock) -> None:
    clock.begin()  # 0: outside of a step
    with activity.phase(Phase.TRAINING):  # 1: between ops, with others
        activity.begin_op("F", 0, 0)  # 2: forward
        with activity.waiting(Place.ACTIVATION):  # 3: exchange
            pass  # 4: forward
        with activity.working(Place.DATA):  # 5: data
            pass  # 6: forward
        with activity.working(Place.DISPATCH), activity.waiting(Place.DISPATCH):  # 7: exchange
            pass  # 8: forward
        activity.end_op()  # 9: exchange
        activity.begin_op("W", 0, 0)  # 10: backward
        activity.end_op()  # 11: exchange
        activity.begin_op("B", 1, 0)  # 12: backward
        activity.begin_op("BW", 1, 0)  # is backward too
        activity.end_op()  # 13: exchange
    # 14: outside
    with activity.phase(Phase.OPTIMIZER):  # 15: optimizer
        activity.begin_op("", 0, 0)  # the same part
        with activity.waiting(Place.REDUCTION):  # 16: exchange
            pass  # 17: optimizer
    # 18: outside
    with activity.phase(Phase.EVALUATION):
        activity.begin_op("F", 0, 0)
        activity.end_op()
    with activity.phase(Phase.CHECKPOINT), activity.waiting(Place.REDUCTION):
        pass
    spent = dict(zip(PARTS, clock.end(), strict=True))
    assert spent == {"data": 1, "forward": 4, "backward": 2, "exchange": 7, "optimizer": 2}


def test_marks_cost_nothing_when_no_step_is_measured(clock: PartClock) -> None:
    clock.begin()
    clock.end()
    assert activity.waiting(Place.DISPATCH) is activity.phase(Phase.TRAINING)  # does nothing
    clock.begin()
    assert activity.waiting(Place.DISPATCH) is not activity.phase(Phase.TRAINING)


def stragglers(stages: list[list[int]], **rule: float) -> Stragglers:
    config = SlowRankConfig.model_validate({"patience": 1, "min_ratio": 1.5, **rule})
    return Stragglers(config, stages, HOSTS)


def times(rank: int, part: str, seconds: float) -> list[list[float]]:
    found = [list(EVEN) for _ in HOSTS]
    found[rank][PARTS.index(part)] = seconds
    return found


def test_ranks_that_are_alike_are_not_named() -> None:
    assert stragglers([[0, 1, 2, 3]]).check(times(0, "data", 0.01)) == []


@pytest.mark.parametrize("part", ["data", "forward", "backward", "optimizer"])
def test_the_slow_rank_and_its_part_are_named(part: str) -> None:
    [told] = stragglers([[0, 1, 2, 3]]).check(times(3, part, 1.0))
    usual = EVEN[PARTS.index(part)]
    assert told.startswith(f"rank 3 (b) is slow: {part} takes 1 s of its step, {1 / usual:.2f} ")


def test_who_waits_is_not_slow() -> None:
    assert stragglers([[0, 1, 2, 3]]).check(times(3, "exchange", 9.0)) == []


def test_what_costs_little_is_not_told() -> None:
    assert stragglers([[0, 1, 2, 3]]).check(times(3, "data", 0.05)) == []  # 5 times the median
    assert stragglers([[0, 1, 2, 3]], min_share=0.03).check(times(3, "data", 0.05)) != []


def test_a_stage_is_held_against_itself() -> None:
    """A stage with more layers is not slow; of two ranks the slower one is."""
    found = times(0, "forward", 0.3)
    for rank in (2, 3):
        found[rank][1] *= 3
    judge = stragglers([[0, 1], [2, 3]])
    assert judge.check(found) == []
    found[3][1] *= 2
    [told] = judge.check(found)
    assert told.startswith("rank 3 (b)")
    assert stragglers([[0], [1], [2], [3]]).check(found) == []


def test_a_rank_is_told_when_it_has_been_slow_for_long_enough_and_once() -> None:
    judge = stragglers([[0, 1, 2, 3]], patience=3)
    slow, even = times(1, "backward", 2.0), times(1, "backward", 0.5)
    told = [len(judge.check(each)) for each in (slow, slow, even, slow, slow, slow, slow, even)]
    assert told == [0, 0, 0, 0, 0, 1, 0, 0]
    assert [len(judge.check(slow)) for _ in range(3)] == [0, 0, 1]


def test_the_row_has_the_worst_stage_of_each_part() -> None:
    found = times(1, "forward", 0.6)
    found[3][1] = 0.9
    row = stragglers([[0, 1], [2, 3]]).row(found)
    check_row(row)
    assert row == {
        **{f"perf/{part}_max_over_median": 1.0 for part in PARTS},
        "perf/forward_max_over_median": pytest.approx(3.0),
    }


def test_a_part_that_takes_no_time_has_no_ratio() -> None:
    found = [[0.0, *EVEN[1:]] for _ in HOSTS]
    assert "perf/data_max_over_median" not in stragglers([[0, 1, 2, 3]]).row(found)
    found[2][0] = 1.0
    [told] = stragglers([[0, 1, 2, 3]]).check(found)
    assert "rank 2 (b) is slow: data takes 1 s of its step, inf times" in told
