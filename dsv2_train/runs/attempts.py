"""How the attempts at a run began and ended, and whether they get anywhere."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ATTEMPTS = "attempts.jsonl"
SERIES = "DSV2_SERIES"  # environment variable of the first node's ranks: that of their starts


class CrashLoopError(Exception):
    """A run fails again and again without getting any further."""


@dataclass(frozen=True)
class Start:
    """A start of all ranks.

    Attributes:
        series: starts that nobody looked between: of one launch, or of one job of Slurm.
        restart: how often torchrun had started the ranks again before.
        step: the clock that they went on from; None until they have come to that.
        ended_well: they reached the end or were stopped cleanly; False while they run.
    """

    series: str
    restart: int
    step: int | None = None
    ended_well: bool = False


def read_starts(folder: Path) -> list[Start]:
    """All starts, oldest first, each as it was last recorded.

    A line that was cut off is passed over.
    """
    try:
        lines = (folder / ATTEMPTS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    starts: list[Start] = []
    for line in lines:
        try:
            start = Start(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if starts and _tells_more(start, starts[-1]):
            starts.pop()
        starts.append(start)
    return starts


def record(folder: Path, start: Start) -> None:
    """Append a start, or what more is known of the last one."""
    with (folder / ATTEMPTS).open("a") as file:
        file.write(f"{json.dumps(asdict(start))}\n")


def begin(folder: Path, start: Start, limit: int) -> Start | None:
    """Record a start, unless those before it got nowhere.

    Args:
        folder: of the run.
        start: to be made; or under way, its step known by now.
        limit: starts in a row, of one series and at one step, that may fail.

    Returns:
        The start before it; None for the first.

    Raises:
        CrashLoopError: if so many did; nothing is recorded.
    """
    starts = read_starts(folder)
    if starts and _tells_more(start, starts[-1]):
        starts.pop()
    loop = why_loop(starts, start, limit)
    if loop is not None:
        raise CrashLoopError(f"{folder}: {loop}")
    record(folder, start)
    return starts[-1] if starts else None


def why_loop(starts: Sequence[Start], this: Start, limit: int) -> str | None:
    """Why a run is not to be started again; None if it is.

    Args:
        starts: before this one, oldest first.
        this: the start to be made.
        limit: as `begin` takes it.
    """
    last = starts[-limit:]
    all_failed = all(each.series == this.series and not each.ended_well for each in last)
    steps = {each.step for each in (*last, this)} - {None}
    if len(last) < limit or not all_failed or len(steps) > 1:
        return None
    where = f"all went on after step {steps.pop()}" if steps else "never came to a step"
    return (
        f"the last {limit} starts {where} and failed before another checkpoint: there is no other "
        f"(cluster.crash_loop={limit}). Mend what failed, as logs/ has it, and give the same line "
        "again"
    )


def _tells_more(start: Start, before: Start) -> bool:
    """Whether a record is of the same start as the one before it."""
    unfinished = replace(start, ended_well=False)
    has_begun = start.step is not None and before == replace(unfinished, step=None)
    return has_begun or (start.ended_well and before == unfinished)
