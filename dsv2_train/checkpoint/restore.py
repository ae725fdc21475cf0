"""Fill a run's tensors from the newest checkpoint that is as it was written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsv2_train.checkpoint.dcp.coverage import Range, ranges_of
from dsv2_train.checkpoint.dcp.read import read_pieces
from dsv2_train.checkpoint.disk import layout, lifecycle
from dsv2_train.checkpoint.disk.errors import DamagedError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.load import compare, load_verified
from dsv2_train.checkpoint.ranks import RankGroup
from dsv2_train.distributed.sharding import Piece

_NONE_LEFT = (
    "nothing was changed; bring one back from a copy, or train anew under another run.name. If "
    "every one is damaged: is this folder on a file system that all ranks share?"
)


@dataclass(frozen=True)
class Restored:
    """Where a run goes on.

    Attributes:
        state: the clock.
        passed_over: what is wrong with each newer checkpoint, and where it is now; newest first.
            Then, that this one had no marker, if so.
    """

    state: TrainState
    passed_over: tuple[str, ...]


def restore_newest(
    ranks: RankGroup, folder: Path, pieces: Sequence[Piece], at_most_step: int | None = None
) -> Restored | None:
    """Fill pieces from the newest intact checkpoint; see `CheckpointManager.restore`.

    Args:
        ranks: all ranks of the run.
        folder: the run's checkpoint folder.
        pieces: over all ranks, every element of every tensor of the checkpoint.
        at_most_step: of which step it may be at most; any, if None.

    Returns:
        The clock, or None where there is no checkpoint, or none of so early a step.

    Raises:
        DamagedError: on every rank, if there are checkpoints and all are damaged.
        CheckpointError: on every rank, for differences from this run.

    Note:
        Collective over all ranks.
    """
    paths = ranks.on_rank0(lambda: layout.step_folders(folder))
    later: list[Path] = []
    if at_most_step is not None:
        later = [path for path in paths if (layout.step_of(path) or 0) > at_most_step]
        paths = paths[: len(paths) - len(later)]
        if not paths:
            return None
    passed_over: dict[Path, str] = {}
    for path in reversed(paths):
        try:
            state = _restore_from(ranks, path, pieces)
        except DamagedError as error:
            passed_over[path] = str(error)
        else:
            take = partial(_take, path, passed_over, later)
            return Restored(state, ranks.on_rank0(take))
    if paths:
        heading = f"{folder}: no checkpoint of this run is intact:"
        raise DamagedError("\n".join([heading, *passed_over.values(), _NONE_LEFT]))
    return None


def _take(used: Path, passed_over: Mapping[Path, str], later: Sequence[Path]) -> tuple[str, ...]:
    """Make room for the steps of the others to be written again, and see that this one is marked.

    Returns:
        What people must hear of.
    """
    for path in reversed(later):  # the newest first: whenever this ends, no history has a gap
        lifecycle.set_back(path)
    told = [
        f"{text}\nthe run goes on from {used} instead; the other is kept as "
        f"{lifecycle.set_aside(path).name}"
        for path, text in passed_over.items()
    ]
    if not layout.is_complete(used):
        lifecycle.mark(used)
        told.append(
            f"{used}: had no {layout.MARKER}: its save was cut off just before the end, or the "
            "file was lost. Every byte is as it was written: it is complete now, and the run goes "
            "on from it"
        )
    return tuple(told)


def _restore_from(ranks: RankGroup, path: Path, pieces: Sequence[Piece]) -> TrainState:
    manifest, state = ranks.on_rank0(lambda: open_verified(path, need_marker=False))
    ranks.gather_then_broadcast(lambda: ranges_of(pieces), lambda ranges: compare(manifest, ranges))

    def load() -> list[tuple[Range, int]]:
        return list(zip(ranges_of(pieces), read_pieces(path, manifest, pieces), strict=True))

    load_verified(ranks, path, manifest, load)
    return state
