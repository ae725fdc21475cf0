"""The sample order: a permutation per epoch that depends on seed and id alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.data.sampler import (
    joined,
    num_unused_tokens,
    num_windows,
    sample_windows,
    samples_at,
    step_places,
)

SEEDS = st.integers(0, 2**70)
SIZES = st.integers(1, 700)


@given(seed=SEEDS, size=SIZES, epoch=st.integers(0, 2**30))
def test_every_epoch_is_a_permutation_of_the_windows(seed: int, size: int, epoch: int) -> None:
    order = sample_windows(seed, size, np.arange(epoch * size, (epoch + 1) * size))
    assert sorted(order.tolist()) == list(range(size))


@given(seed=SEEDS, size=SIZES, data=st.data())
def test_a_sample_is_the_same_whatever_is_asked_with_it(
    seed: int, size: int, data: st.DataObject
) -> None:
    ids = np.array(data.draw(st.lists(st.integers(0, 5 * size), min_size=1, max_size=40)))
    together = sample_windows(seed, size, ids)
    alone = [sample_windows(seed, size, ids[i : i + 1]).item() for i in range(len(ids))]
    assert together.tolist() == alone


def test_no_samples_asked_gives_none() -> None:
    assert sample_windows(0, 5, np.arange(0)).tolist() == []


def test_the_order_never_changes() -> None:
    # A run that is resumed with another release must go on in the order it was started with.
    assert sample_windows(1234, 1000, np.arange(6)).tolist() == GOLDEN_FIRST
    assert sample_windows(1234, 1000, np.arange(1000, 1006)).tolist() == GOLDEN_SECOND
    assert sample_windows(2**40, 10**12, np.array([0, 10**13])).tolist() == GOLDEN_LARGE


GOLDEN_FIRST = [687, 7, 428, 950, 279, 741]
GOLDEN_SECOND = [305, 116, 90, 161, 365, 270]
GOLDEN_LARGE = [581149836599, 612164554345]


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
def test_each_window_is_equally_likely_at_each_place(size: int) -> None:
    num_epochs = 4000
    orders = sample_windows(5, size, np.arange(num_epochs * size)).reshape(num_epochs, size)
    counts = np.array([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    expected = num_epochs / size
    # 6 standard deviations of a binomial count: one false alarm in 1e7 over all cells
    bound = 6 * np.sqrt(expected * (1 - 1 / size))
    assert np.abs(counts - expected).max() < bound


@pytest.mark.parametrize(("first", "second"), [((7, 0), (7, 1)), ((7, 0), (8, 0))])
def test_epochs_and_seeds_have_unrelated_orders(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    size = 5000
    orders = [
        sample_windows(seed, size, np.arange(epoch * size, (epoch + 1) * size))
        for seed, epoch in (first, second)
    ]
    # A shared place has chance 1/size: the count is Poisson(1), above 12 once in 1e10.
    assert np.count_nonzero(orders[0] == orders[1]) <= 12
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 6 / np.sqrt(size)


@pytest.mark.parametrize("size", [1000, 1024, 65537])
def test_neighbours_in_time_are_not_neighbours_in_the_stream(size: int) -> None:
    order = sample_windows(3, size, np.arange(size))
    steps = np.diff(order)
    # As above: Poisson(1) for each fixed distance.
    assert all(np.count_nonzero(steps == distance) <= 12 for distance in (1, -1, 2, 512))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 6 / np.sqrt(size)


@given(
    consumed=st.integers(0, 10**12),
    num_microbatches=st.integers(1, 5),
    micro_batch_size=st.integers(1, 4),
    dp_size=st.integers(1, 6),
)
def test_ranks_take_what_the_assignment_rule_says(
    consumed: int, num_microbatches: int, micro_batch_size: int, dp_size: int
) -> None:
    for rank in range(dp_size):
        expected = [
            [
                consumed + (microbatch * dp_size + rank) * micro_batch_size + place
                for place in range(micro_batch_size)
            ]
            for microbatch in range(num_microbatches)
        ]
        found = step_places(
            consumed,
            num_microbatches=num_microbatches,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
        )
        assert found.tolist() == expected


@given(consumed=st.integers(0, 10**9), data=st.data())
def test_a_step_consumes_the_same_samples_at_any_dp_size(
    consumed: int, data: st.DataObject
) -> None:
    global_batch_size = 24
    dp_size = data.draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    micro_batch_size = data.draw(st.sampled_from([1, 2]))
    step = [
        step_places(
            consumed,
            num_microbatches=global_batch_size // (dp_size * micro_batch_size),
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
        ).ravel()
        for rank in range(dp_size)
    ]
    expected = range(consumed, consumed + global_batch_size)
    assert sorted(np.concatenate(step).tolist()) == list(expected)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2), (18, 2)]
)
def test_a_window_needs_one_token_more_than_its_length(num_tokens: int, expected: int) -> None:
    assert num_windows(num_tokens, 8) == expected


@given(num_tokens=st.integers(0, 100), length=st.integers(1, 30))
def test_tokens_are_in_a_window_or_counted_as_unused(num_tokens: int, length: int) -> None:
    used = {
        window * length + place
        for window in range(num_windows(num_tokens, length))
        for place in range(length + 1)
    }
    assert used == set(range(num_tokens - num_unused_tokens(num_tokens, length)))


RANGES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 8)).map(lambda one: (one[0], sum(one))),
    max_size=6,
)


@given(ranges=RANGES, more=RANGES)
def test_a_joined_skip_list_has_the_samples_of_both(
    ranges: list[tuple[int, int]], more: list[tuple[int, int]]
) -> None:
    skip_list = joined(joined((), ranges), more)
    ids = [sample for first, end in skip_list for sample in range(first, end)]
    assert set(ids) == {i for first, end in [*ranges, *more] for i in range(first, end)}
    ends = [end for one in skip_list for end in one]
    assert ends == sorted(set(ends)), "in order, and something between any two"


@given(ranges=RANGES, first_place=st.integers(0, 60))
def test_every_sample_but_the_skipped_has_its_place(
    ranges: list[tuple[int, int]], first_place: int
) -> None:
    skipped = {i for first, end in ranges for i in range(first, end)}
    expected = [i for i in range(200) if i not in skipped]
    places = np.arange(first_place, first_place + 40).reshape(8, 5)
    found = samples_at(places, joined((), ranges))
    assert found.shape == places.shape
    assert found.ravel().tolist() == expected[first_place : first_place + 40]


@given(ranges=RANGES, place=st.integers(0, 60))
def test_what_is_skipped_later_moves_nothing_before(
    ranges: list[tuple[int, int]], place: int
) -> None:
    before = joined((), ranges)
    sample = int(samples_at(np.array([place]), before).item())
    after = joined(before, [(sample, sample + 3)])
    passed = np.arange(place)
    assert samples_at(passed, after).tolist() == samples_at(passed, before).tolist()
