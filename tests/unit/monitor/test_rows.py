"""metrics.jsonl: strict JSON that reads back exactly, and one history after a resume."""

import json
import math
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.monitor.rows import decode_row, encode_row, keep_until, read_rows

NUMBERS = st.one_of(st.floats(), st.integers(min_value=-(2**63), max_value=2**63))
ROWS = st.dictionaries(st.text(), NUMBERS).map(lambda row: {**row, "step": 3})


def refuse(word: str) -> NoReturn:
    raise AssertionError(f"{word} is no JSON")


def same(left: float, right: float) -> bool:
    both_nan = isinstance(left, float) and math.isnan(left) and math.isnan(right)
    return type(left) is type(right) and (both_nan or repr(left) == repr(right))


@given(ROWS)
def test_row_reads_back_exactly_from_one_line_of_strict_json(row: dict[str, float]) -> None:
    line = encode_row(row)
    assert line.count("\n") == 1
    assert line.endswith("\n")
    json.loads(line, parse_constant=refuse)
    read = decode_row(line)
    assert list(read) == list(row)
    assert all(same(read[key], value) for key, value in row.items())


def test_non_finite_numbers_are_words_that_float_reads() -> None:
    line = encode_row({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf})
    assert json.loads(line) == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    assert float("Infinity") == math.inf


@pytest.mark.parametrize("line", ["", "[1]", '{"loss": 1}', '{"step": 1, "x": "y"}', '{"step": 1'])
def test_what_is_no_row_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        decode_row(line)


def write(path: Path, *lines: str) -> None:
    path.write_text("".join(lines))


def row(step: int) -> str:
    return encode_row({"step": step, "train/loss": 1.0 / step})


def test_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, row(1), "garbage\n", row(3))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_rows(path)


def test_last_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, row(1), row(2)[:-1])
    assert [read["step"] for read in read_rows(path)] == [1]


@given(
    steps=st.lists(st.integers(min_value=1, max_value=40), max_size=12).map(sorted),
    restored=st.integers(min_value=0, max_value=40),
    cut_off=st.booleans(),
)
def test_resume_splits_the_file_at_the_restored_step(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], restored: int, cut_off: bool
) -> None:
    folder = tmp_path_factory.mktemp("run")
    path = folder / "metrics.jsonl"
    lines = [row(step) for step in steps]
    last = '{"step": 4' if cut_off else ""
    write(path, *lines, last)

    aside = keep_until(path, restored, folder / "logs")

    later = "".join(row(step) for step in steps if step > restored) + last
    assert [read["step"] for read in read_rows(path)] == [s for s in steps if s <= restored]
    if later:
        assert aside == folder / "logs" / f"metrics_after_step_{restored:08d}_1.jsonl"
        assert aside.read_text() == later
    else:
        assert aside is None
        assert not (folder / "logs").exists()


def test_each_resume_gets_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for attempt in (1, 2):
        with path.open("a") as file:
            file.writelines([row(20), row(30)])
        assert keep_until(path, 10, tmp_path / "logs") == (
            tmp_path / "logs" / f"metrics_after_step_00000010_{attempt}.jsonl"
        )
    assert path.read_text() == ""
    names = sorted(found.name for found in tmp_path.rglob("*"))
    assert not [name for name in names if name.endswith(".tmp")]


def test_damaged_bytes_move_aside_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 2, "x": \xff\x00}\r\n'
    path.write_bytes(row(1).encode() + damaged + row(3).encode())
    aside = keep_until(path, 3, tmp_path)
    assert aside is not None
    assert aside.read_bytes() == damaged
    assert [read["step"] for read in read_rows(path)] == [1, 3]


def test_row_that_lacks_only_its_newline_moves_aside(tmp_path: Path) -> None:
    # The next row would be appended to the same line.
    path = tmp_path / "metrics.jsonl"
    write(path, row(1), row(2)[:-1])
    aside = keep_until(path, 5, tmp_path / "logs")
    assert aside is not None
    assert aside.read_text() == row(2)[:-1]
    assert path.read_text() == row(1)


def test_whoever_wrote_before_writes_to_another_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert keep_until(path, 0, tmp_path) is None
    assert not path.exists()
    write(path, row(1))
    with path.open("a") as earlier:
        assert keep_until(path, 1, tmp_path) is None
        earlier.write(row(2))
    assert path.read_text() == row(1)
