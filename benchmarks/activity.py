"""What it costs a rank to say what it is doing: with a launcher that reads it, and without."""

import os
import tempfile
import time
from collections.abc import Callable

from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Place

_CALLS = 20_000


def cost_us(repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of each kind of call, the least of `repeats` rounds, kept and not kept.

    From now on this process keeps a record, in a folder that is gone.
    """
    not_kept = _measure(repeats)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        os.environ.update({activity.FOLDER_VARIABLE: folder, "RANK": "0"})
        activity.start()
        kept = _measure(repeats)
    return {what: {"kept": kept[what], "not kept": not_kept[what]} for what in kept}


def show(costs: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    print(f"{'microseconds a call':<34}{'launched':>10}{'without':>10}")
    for what, cost in costs.items():
        print(f"{what:<34}{cost['kept']:>10.2f}{cost['not kept']:>10.2f}")


def _measure(repeats: int) -> dict[str, float]:
    calls: dict[str, Callable[[], None]] = {
        "an op: begun, ended": _op,
        "a wait: begun, ended": _wait,
        "an empty function": _nothing,
    }
    return {
        what: min(_seconds(call) for _ in range(repeats)) / _CALLS * 1e6
        for what, call in calls.items()
    }


def _seconds(call: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return time.perf_counter() - start_s


def _op() -> None:
    activity.begin_op("F", 3, 1)
    activity.end_op()


def _wait() -> None:
    with activity.waiting(Place.DISPATCH):
        pass


def _nothing() -> None:
    pass
