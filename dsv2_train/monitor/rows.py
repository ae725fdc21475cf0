"""metrics.jsonl: one JSON object a line, one history a file."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

# JSON has no such numbers; these spellings are protobuf's, and `float` reads them back.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_row(row: Mapping[str, float]) -> str:
    """A row as one line of strict JSON, newline included; `decode_row` reads it back exactly."""
    values = {key: encode_number(value) for key, value in row.items()}
    return json.dumps(values, allow_nan=False) + "\n"


def decode_row(line: str | bytes) -> dict[str, float]:
    """The row of a line.

    Raises:
        ValueError: if the line is no JSON object of numbers with a `step`.
    """
    values = json.loads(line)
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise ValueError(f"must be a JSON object with an integer step, found {line[:80]!r}")
    return {key: _decode(key, value) for key, value in values.items()}


def read_rows(path: Path) -> list[dict[str, float]]:
    """All rows; a last line without its newline was cut off by a kill and is left out.

    Raises:
        ValueError: naming file and line, for a line that is no row.
    """
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            rows.append(decode_row(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def step_of_row(line: bytes) -> int:
    """The step of a line; raises ValueError as `decode_row` does."""
    return int(decode_row(line)["step"])


def keep_until(
    path: Path, step: int, aside_folder: Path, step_of: Callable[[bytes], int] = step_of_row
) -> Path | None:
    """Make a file of JSON lines tell the history up to a step, before a run goes on from there.

    Lines after the step, and lines of which `step_of` raises ValueError, move to
    `<name>_after_step_<8 digits>_<n>.jsonl`. A kill in between leaves them in both files, never in
    none. The file is a new one: what an earlier attempt that lives on writes is not in it.

    Returns:
        The file they moved to, None if there was nothing to move.
    """
    if not path.exists():
        return None
    kept: list[bytes] = []
    moved: list[bytes] = []
    for line in _lines(path):
        (kept if _is_until(line, step, step_of) else moved).append(line)
    aside = None
    if moved:
        aside_folder.mkdir(parents=True, exist_ok=True)
        aside = _free_name(aside_folder, f"{path.stem}_after_step_{step:08d}")
        _write_whole(aside, moved)
    _write_whole(path, kept)
    return aside


def encode_number(value: float) -> float | str:
    """A number as strict JSON can have it: one that is not finite as its name."""
    if isinstance(value, int):
        return value
    value = float(value)
    if math.isfinite(value):
        return value
    return next(word for word, number in _NON_FINITE.items() if repr(number) == repr(value))


def _decode(key: str, value: object) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise ValueError(f"{key} must be a number, found {value!r}")


def _lines(path: Path) -> list[bytes]:
    # Bytes, so that a damaged line moves aside as it is.
    with path.open("rb") as file:
        return file.readlines()


def _is_until(line: bytes, step: int, step_of: Callable[[bytes], int]) -> bool:
    try:
        return line.endswith(b"\n") and step_of(line) <= step
    except ValueError:
        return False


def _free_name(folder: Path, stem: str) -> Path:
    number = 1
    while (path := folder / f"{stem}_{number}.jsonl").exists():
        number += 1
    return path


def _write_whole(path: Path, lines: list[bytes]) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
