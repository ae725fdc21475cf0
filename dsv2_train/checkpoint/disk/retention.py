"""Which checkpoints of a run are kept."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.lifecycle import remove


@dataclass(frozen=True)
class Retention:
    """What is kept; by default everything.

    Attributes:
        keep_last: as many of the newest, at least 1; None for all.
        keep_every_steps: beside these, those whose step is a multiple of it; None for no others.
    """

    keep_last: int | None = None
    keep_every_steps: int | None = None


KEEP_ALL = Retention()


def to_remove(steps: Iterable[int], retention: Retention) -> list[int]:
    """The steps whose checkpoints are not kept, oldest first; never the newest.

    Args:
        steps: of complete checkpoints, in any order.
        retention: what is kept.
    """
    if retention.keep_last is None:
        return []
    older = sorted(steps)[: -max(1, retention.keep_last)]
    every = retention.keep_every_steps
    return [step for step in older if every is None or step % every]


def superseded(folder: Path, retention: Retention) -> list[Path]:
    """Complete checkpoints below a folder that are not kept, oldest first."""
    paths = {layout.step_of(path) or 0: path for path in layout.complete_checkpoints(folder)}
    return [paths[step] for step in to_remove(paths, retention)]


def prune(folder: Path, retention: Retention) -> None:
    """Remove what is not kept; of damaged or unfinished checkpoints, nothing.

    One that cannot be removed is told of on standard error; whatever looks complete is complete.

    Note:
        Local; for one process at a time.
    """
    for path in superseded(folder, retention):
        try:
            remove(path)
        except OSError as error:
            sys.stderr.write(f"{path}: no longer needed, but it could not be removed: {error}\n")
