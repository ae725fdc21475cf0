"""Microseconds of calls in turns: by CUDA events with a cold cache, by a clock on a CPU."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Timer = Callable[[Call], float]

# To be written before each call: long enough for the host to launch what is timed meanwhile.
_FLUSHED_BYTES = 1 << 30
_LEAST_REPEATS, _MOST_REPEATS = 5, 100
_WARMING_TURNS = 2


@dataclass(frozen=True)
class Times:
    """Microseconds of each repeat."""

    us: tuple[float, ...]

    @property
    def summary(self) -> dict[str, float]:
        """Of the repeats."""
        return {"median": self.median, "min": min(self.us), "max": max(self.us)}

    @property
    def median(self) -> float:
        """The middle repeat."""
        return statistics.median(self.us)


def ratio(slow: Times, fast: Times) -> dict[str, float]:
    """How many times as long, turn by turn: neighbours met the same clocks."""
    return Times(tuple(a / b for a, b in zip(slow.us, fast.us, strict=True))).summary


class CudaTimer:
    """Time on a GPU from the first kernel's start to the last one's end, L2 without its data.

    Args:
        device: holds the buffer of 1 GiB, or four times L2, whose writing empties the cache.
    """

    def __init__(self, device: torch.device) -> None:
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(_FLUSHED_BYTES, 4 * cache_bytes)
        self._buffer = torch.empty(size, dtype=torch.int8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        """Microseconds of one call."""
        self._buffer.zero_()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e3


def clock(call: Call) -> float:
    """Microseconds of one call on a CPU."""
    start_s = time.perf_counter()
    call()
    return (time.perf_counter() - start_s) * 1e6


def alternate(
    calls: Mapping[str, Call], timer: Timer, seconds: float
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time calls in turns, in an order that reverses every turn.

    The garbage collector runs between calls only.

    Args:
        calls: by name.
        timer: microseconds of one call.
        seconds: to spend on all turns, of which there are 5 to 100; one turn for 0. Warming up,
            twice each, comes on top, and with it any compilation.

    Returns:
        Times by name; and, of those that failed, the error instead.
    """
    errors: dict[str, str] = {}
    found: dict[str, list[float]] = {name: [] for name in calls}

    def turn(names: Iterable[str]) -> None:
        for name in names:
            gc.collect(0)
            try:
                found[name].append(timer(calls[name]))
            except Exception as error:
                errors[name] = first_line(error)
                del found[name]

    for _ in range(_WARMING_TURNS):
        turn(list(found))
    found = {name: [] for name in found}
    begin_s, turns = time.perf_counter(), 0
    gc.disable()
    try:
        while found and not _enough(turns, time.perf_counter() - begin_s, seconds):
            turn(list(reversed(found)) if turns % 2 else list(found))
            turns += 1
    finally:
        gc.enable()
    return {name: Times(tuple(us)) for name, us in found.items()}, errors


def first_line(error: Exception) -> str:
    """Its type and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _enough(turns: int, spent_s: float, seconds: float) -> bool:
    if turns == 0 or seconds == 0:
        return turns == 1
    return turns >= _LEAST_REPEATS and (turns >= _MOST_REPEATS or spent_s >= seconds)
