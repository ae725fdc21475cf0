"""Files that torch.distributed.checkpoint's own reader accepts; ranges that must be pieces_of."""

import io
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load

from dsv2_train.checkpoint.dcp.archive import stream_header
from dsv2_train.checkpoint.dcp.coverage import Range, check_coverage, ranges_of
from dsv2_train.checkpoint.dcp.write import write_pieces
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.distributed.sharding import Piece
from tests.helpers.saved import files_up_to
from tests.helpers.tensors import pieces_of

STATE = TrainState(5, 10, 640, 5)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {
        f"kind/{str(dtype)[6:]}": torch.randn(3, 5, generator=generator).to(dtype)
        for dtype in DTYPES
    }
    # several blocks of a file, and more than one write in flight
    return {**values, "weight/large": torch.randn(1700, 1701, generator=generator)}


def halves(values: dict[str, Tensor]) -> list[Piece]:
    return [
        Piece(key, tuple(value.shape), offset, value.view(-1)[offset:end])
        for key, value in values.items()
        for offset, end in ((0, 7), (7, value.numel()))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 255, 70000])
def test_torch_load_reads_what_follows_a_header(dtype: torch.dtype, numel: int) -> None:
    data = torch.randint(0, 2, (numel,)).to(dtype)
    stream = io.BytesIO(stream_header(dtype, numel) + bytes(data.view(torch.uint8).tolist()))
    loaded = torch.load(stream, weights_only=True)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, data)


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"found torch\.complex64; a checkpoint holds"):
        stream_header(torch.complex64, 3)


def with_empty_pieces(values: dict[str, Tensor]) -> list[Piece]:
    """Like a rank that owns nothing of a tensor, where another rank's range begins."""
    empty = [
        Piece(key, tuple(value.shape), offset, value.view(-1)[:0])
        for key, value in values.items()
        for offset in (0, 7)
    ]
    return [*halves(values), *empty]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("cut", [pieces_of, halves, with_empty_pieces])
def test_torchs_own_reader_reads_our_files(
    tmp_path: Path, cut: Callable[[dict[str, Tensor]], list[Piece]]
) -> None:
    values = tensors()
    path = CheckpointManager(tmp_path, 1).save(STATE, cut(values), "")
    loaded = {key: torch.zeros(value.numel(), dtype=value.dtype) for key, value in values.items()}
    load(loaded, checkpoint_id=path, no_dist=True)
    assert all(torch.equal(loaded[key], value.view(-1)) for key, value in values.items())


def test_torchs_converter_reads_our_files(tmp_path: Path) -> None:
    values = tensors()
    path = CheckpointManager(tmp_path, 1).save(STATE, halves(values), "")
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert loaded.keys() == values.keys()
    assert all(torch.equal(loaded[key], value.view(-1)) for key, value in values.items())


def part(offset: int, numel: int, key: str = "weight/x", shape: tuple[int, ...] = (4, 5)) -> Range:
    return Range(offset, numel, key, shape, "float32")


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([part(0, 20)], None),
        ([part(12, 8), part(0, 5), part(5, 7)], None),
        ([part(0, 20), part(9, 0), part(20, 0)], None),
        ([part(0, 0, shape=(0, 5))], None),
        ([part(0, 1, shape=())], None),
        ([part(0, 5), part(6, 14)], "weight/x: gap: no rank holds elements 5 to 5"),
        ([part(0, 19)], "weight/x: gap: no rank holds elements 19 to 19"),
        ([part(3, 17)], "weight/x: gap: no rank holds elements 0 to 2"),
        ([part(0, 0)], "weight/x: gap: no rank holds elements 0 to 19"),
        ([part(0, 6), part(5, 15)], "weight/x: overlap: elements 5 to 5 are held twice"),
        ([part(0, 20), part(0, 20)], "weight/x: overlap: elements 0 to 19 are held twice"),
        ([part(0, 20), part(3, 2)], "weight/x: overlap: elements 3 to 4 are held twice"),
        ([part(0, 20), part(20, 0, shape=(5, 4))], "weight/x: ranks disagree about it"),
    ],
)
def test_coverage(ranges: list[Range], said: str | None) -> None:
    others = [part(0, 6, "weight/y", (6,))]
    if said is None:
        check_coverage(others + ranges)
        return
    with pytest.raises(CheckpointError, match=r"^1 tensors that are not covered") as error:
        check_coverage(others + ranges)
    assert said in str(error.value)


@settings(max_examples=200)
@given(
    numel=st.integers(1, 12),
    ranges=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 12)), max_size=6),
)
def test_coverage_equals_counting(numel: int, ranges: list[tuple[int, int]]) -> None:
    inside = [(start, min(length, numel - start)) for start, length in ranges if start <= numel]
    counts = [
        sum(start <= element < start + length for start, length in inside)
        for element in range(numel)
    ]
    parts = [part(start, length, shape=(numel,)) for start, length in [*inside, (0, 0)]]
    try:
        check_coverage(parts)
    except CheckpointError:
        assert set(counts) != {1}
    else:
        assert set(counts) == {1}


@pytest.mark.parametrize(
    "piece",
    [
        Piece("weight/x", (4, 5), 1, torch.zeros(20)),
        Piece("weight/x", (4, 5), -1, torch.zeros(20)),
        Piece("weight/x", (4, 5), 0, torch.zeros(4, 5)),
        Piece("weight/x", (4, 5), 0, torch.zeros(40)[::2]),
    ],
)
def test_a_piece_that_is_no_flat_range_is_refused(piece: Piece) -> None:
    with pytest.raises(CheckpointError, match="weight/x: found data of shape"):
        ranges_of([piece])


@pytest.mark.parametrize("numel", [1 << 21, 1 << 19])
def test_an_error_while_writing_reaches_the_caller(tmp_path: Path, numel: int) -> None:
    data = torch.zeros(numel)
    with files_up_to(1 << 20), pytest.raises(OSError, match="File too large"):
        write_pieces(tmp_path / "file", [Piece("weight/x", (numel,), 0, data)])
