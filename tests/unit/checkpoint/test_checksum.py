"""The checksum against a plain-Python definition of it, and what it must and must not notice."""

import random
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dsv2_train.checkpoint.disk.checksum import add_checksums, splitmix64, tensor_checksum

COLUMNS = 16384
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def random_bits(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, (numel,), generator=generator).bool()
    num_bytes = numel * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype)


def by_definition(data: Tensor, offset: int) -> int:
    """sum of key(word index) * word, one word at a time, from the bytes."""
    width = min(4, data.element_size())
    raw = bytes(data.view(torch.uint8).tolist())
    start = offset * data.element_size() // width
    total = 0
    for index in range(len(raw) // width):
        word = int.from_bytes(raw[index * width : (index + 1) * width], "little", signed=True)
        row, column = divmod(start + index, COLUMNS)
        total += (splitmix64(COLUMNS + row) | 1) * (splitmix64(column) | 1) * word
    return total % 2**64


def test_splitmix64_is_the_published_generator() -> None:
    # first outputs of the reference implementation (prng.di.unimi.it/splitmix64.c) seeded with 0
    assert [splitmix64(index) for index in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_its_definition(dtype: torch.dtype) -> None:
    data = random_bits(3000, dtype)
    for offset in (0, 1, COLUMNS - 1000, 5 * COLUMNS + 7):
        assert tensor_checksum(data, offset) == by_definition(data, offset)


def test_equals_its_definition_over_many_rows() -> None:
    data = random_bits(17 * COLUMNS + 5, torch.float32)
    assert tensor_checksum(data, 11) == by_definition(data, 11)


@settings(max_examples=50)
@given(
    numel=st.integers(1, 3 * COLUMNS),
    dtype=st.sampled_from(DTYPES),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    seed=st.integers(0, 99),
)
def test_parts_add_up_to_the_whole(
    numel: int, dtype: torch.dtype, cuts: list[float], seed: int
) -> None:
    data = random_bits(numel, dtype, seed)
    edges = sorted({0, numel, *(int(cut * numel) for cut in cuts)})
    parts = [tensor_checksum(data[first:last], first) for first, last in pairwise(edges)]
    random.Random(seed).shuffle(parts)
    assert add_checksums(parts) == tensor_checksum(data)


@settings(max_examples=50)
@given(numel=st.integers(2, 2 * COLUMNS), dtype=st.sampled_from(DTYPES), data=st.data())
def test_a_flipped_bit_is_noticed(numel: int, dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = random_bits(numel, dtype)
    before = tensor_checksum(tensor)
    raw = tensor.view(torch.uint8)
    position = data.draw(st.integers(0, raw.numel() - 1))
    bit = 0 if dtype is torch.bool else data.draw(st.integers(0, 7))
    raw[position] ^= 1 << bit
    assert tensor_checksum(tensor) != before


@settings(max_examples=50)
@given(numel=st.integers(2, 2 * COLUMNS), dtype=st.sampled_from(DTYPES[:-1]), draw=st.data())
def test_swapped_elements_are_noticed(numel: int, dtype: torch.dtype, draw: st.DataObject) -> None:
    tensor = random_bits(numel, dtype)
    first = draw.draw(st.integers(0, numel - 2))
    second = draw.draw(st.integers(first + 1, numel - 1))
    bits = tensor.view(torch.uint8).view(numel, -1)
    bits[first, 0], bits[second, 0] = 3, 4
    before = tensor_checksum(tensor)
    bits[[first, second]] = bits[[second, first]]
    assert tensor_checksum(tensor) != before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_shift_by_one_is_noticed(dtype: torch.dtype) -> None:
    tensor = random_bits(5000, dtype)
    assert tensor_checksum(tensor.roll(1)) != tensor_checksum(tensor)
    assert tensor_checksum(tensor, 1) != tensor_checksum(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_two_flipped_signs_are_noticed(dtype: torch.dtype) -> None:
    # the top bit of a 64-bit word times any odd key is 2^63: two of them would cancel
    tensor = random_bits(1000, dtype)
    before = tensor_checksum(tensor)
    tensor.view(torch.uint8).view(1000, -1)[[17, 503], -1] ^= 128
    assert tensor_checksum(tensor) != before


def test_two_swapped_experts_are_noticed() -> None:
    experts = random_bits(4 * COLUMNS, torch.float32).view(4, COLUMNS)
    assert tensor_checksum(experts[[0, 2, 1, 3]].contiguous()) != tensor_checksum(experts)


def test_one_element_of_each_position_differs() -> None:
    ones = torch.ones(1, dtype=torch.int32)
    offsets = range(0, 3 * COLUMNS, 7)
    assert len({tensor_checksum(ones, offset) for offset in offsets}) == len(offsets)


def test_an_empty_part_adds_nothing() -> None:
    assert tensor_checksum(torch.empty(0), 7) == 0


def test_memory_is_bounded() -> None:
    tensor = torch.zeros(1 << 22)
    with torch.profiler.profile(profile_memory=True) as profile:
        tensor_checksum(tensor)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * COLUMNS * 8, "four rows of int64"
