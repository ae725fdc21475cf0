"""Which window of the token stream each sample is: a pure function of (seed, sample id).

Sample ids count from 0 whatever there is to train on; a run takes all but those of its skip list.
Epoch e is the ids [e N, (e + 1) N) of a stream with N windows, each epoch in an order of its own.
Nothing depends on how many samples a run will take, on its layout, its batch sizes or its restarts,
and nothing but the id is needed to find a sample.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
SkipList = tuple[tuple[int, int], ...]  # [first, end) ranges of ids in order, none adjacent
_Words = npt.NDArray[np.uint64]

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Windows in a stream: each is `sequence_length` + 1 tokens and shares its last with the next.

    Fewer than `sequence_length` tokens at the end of the stream are in no window.
    """
    return max(num_tokens - 1, 0) // sequence_length


def num_unused_tokens(num_tokens: int, sequence_length: int) -> int:
    """Tokens at the end of a stream that are in no window: all of one shorter than a window."""
    windows = num_windows(num_tokens, sequence_length)
    return num_tokens - (windows * sequence_length + 1) if windows else num_tokens


def step_places(
    consumed_samples: int,
    *,
    num_microbatches: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> Ids:
    """Places in the run's order of one rank's samples, in the step that starts at a clock.

    Microbatch j of rank r takes the `micro_batch_size` places that start at
    consumed_samples + (j * dp_size + r) * micro_batch_size: the ranks of a step together take the
    same samples at any dp_size.

    Returns:
        [num_microbatches, micro_batch_size] int64.
    """
    first = np.arange(num_microbatches, dtype=np.int64) * dp_size + dp_rank
    within = np.arange(micro_batch_size, dtype=np.int64)
    return consumed_samples + first[:, None] * micro_batch_size + within


def samples_at(places: Ids, skip_list: SkipList) -> Ids:
    """Sample id at each place in a run's order: ids that are skipped have no place.

    Args:
        places: any shape, int64; how many samples the run has trained on before each.
        skip_list: what the run never trains on.

    Returns:
        The shape of `places`, int64.
    """
    ids = places.copy()
    for first, end in skip_list:
        ids[ids >= first] += end - first
    return ids


def joined(skip_list: SkipList, more: Iterable[tuple[int, int]]) -> SkipList:
    """A skip list that has the samples of both; ranges of `more` in any order."""
    found: list[tuple[int, int]] = []
    for first, end in sorted([*skip_list, *more]):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return tuple(found)


def sample_windows(seed: int, num_windows: int, sample_ids: Ids) -> Ids:
    """Window of each sample in the shuffled order of `seed`.

    Within an epoch the map is a permutation of the windows: an alternating Feistel network on the
    smallest power of two that holds them, applied again where it leaves the range (cycle walking),
    less than twice on average. Constant memory; any set of ids in any order gives the same answers.

    Args:
        seed: seed of the order.
        num_windows: windows in the stream, at least 1.
        sample_ids: [n] int64, not negative.

    Returns:
        [n] int64 in [0, num_windows).
    """
    epochs, positions = np.divmod(sample_ids.astype(np.uint64), np.uint64(num_windows))
    seed_word = np.full(1, (seed * _GOLDEN + 1) & _MASK, dtype=np.uint64)
    keys = _mix(_mix(seed_word) + epochs)
    num_bits = max((num_windows - 1).bit_length(), 2)
    pending = np.arange(positions.size)
    while pending.size:
        positions[pending] = _feistel(positions[pending], keys[pending], num_bits)
        pending = pending[positions[pending] >= num_windows]
    return positions.astype(np.int64)


def _feistel(values: _Words, keys: _Words, num_bits: int) -> _Words:
    """A bijection of [0, 2**num_bits) for each key."""
    low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64((1 << (num_bits // 2)) - 1)
    high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for turn in range(0, _ROUNDS, 2):
        high = high ^ (_mix(low + keys + _turn_word(turn)) & high_mask)
        low = low ^ (_mix(high + keys + _turn_word(turn + 1)) & low_mask)
    return (high << low_bits) | low


def _turn_word(turn: int) -> np.uint64:
    return np.uint64(turn * _GOLDEN & _MASK)


def _mix(words: _Words) -> _Words:
    """The finalizer of SplitMix64: every output bit depends on every input bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
