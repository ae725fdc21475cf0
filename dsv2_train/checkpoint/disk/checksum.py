"""A checksum of a tensor that its parts add up to, whatever the parts are.

checksum(x) = sum over 32-bit words w of x of key(index of w) * bits(w)   mod 2^64

Keys are odd and scattered by SplitMix64, so a changed word always changes the sum, and words that
trade places do unless (key_i - key_j) * (x_i - x_j) is a multiple of 2^64, about once in 2^32.
The key of index i is a product, row_key(i div 16384) * column_key(i mod 16384), so that a table of
16384 keys serves a tensor of any size and the work per word is one multiplication and one addition.
"""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_COLUMNS = 1 << 14
_ROWS_AT_ONCE = 4


def splitmix64(index: int) -> int:
    """Scatter an integer over 64 bits (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        index: any integer >= 0.

    Returns:
        The output number `index` (from 0) of the SplitMix64 generator seeded with 0.
    """
    z = (index + 1) * 0x9E3779B97F4A7C15 & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def tensor_checksum(data: Tensor, offset: int = 0) -> int:
    """Checksum of a flat range of a tensor, by position in the whole tensor and by bits.

    Args:
        data: contiguous, any shape and dtype; seen as flat.
        offset: elements of the flattened whole tensor that precede `data`.

    Returns:
        0 <= checksum < 2^64; 0 for an empty range. Checksums of the parts of a tensor, combined by
        `add_checksums`, are the checksum of the whole.

    Note:
        No communication. Runs where `data` is, in 512 KiB of memory beside it.
    """
    words = _as_words(data)
    start = offset * (words.numel() // max(1, data.numel()))
    total = 0
    done = 0
    while done < words.numel():
        row, column = divmod(start + done, _COLUMNS)
        left = words.numel() - done
        if column or left < _COLUMNS:
            num_rows, num_columns = 1, min(left, _COLUMNS - column)
        else:
            num_rows, num_columns = min(left // _COLUMNS, _ROWS_AT_ONCE), _COLUMNS
        size = num_rows * num_columns
        block = words[done : done + size].view(num_rows, num_columns)
        keys = _column_keys(words.device)[column : column + num_columns]
        for index, row_sum in enumerate(_row_sums(block, keys).tolist(), start=row):
            total += _row_key(index) * row_sum
        done += size
    return total & _MASK


def add_checksums(parts: Iterable[int]) -> int:
    """Checksum of a whole from the checksums of its parts, in any order."""
    return sum(parts) & _MASK


def _as_words(data: Tensor) -> Tensor:
    """Data as signed integers of at most 32 bits, so that no bit is lost to a wide shift."""
    integer = {1: torch.int8, 2: torch.int16}.get(data.element_size(), torch.int32)
    return data.detach().reshape(-1).view(integer)


def _row_sums(block: Tensor, keys: Tensor) -> Tensor:
    """[rows] int64: of each row, the sum of its words times their keys."""
    if block.is_cpu:
        return block.long() @ keys  # not on every device; here the faster by half
    return (block * keys).sum(dim=1)


def _row_key(row: int) -> int:
    return splitmix64(_COLUMNS + row) | 1


@cache
def _column_keys(device: torch.device) -> Tensor:
    keys = [splitmix64(column) | 1 for column in range(_COLUMNS)]
    return torch.tensor([key - (key >> 63 << 64) for key in keys], device=device)
