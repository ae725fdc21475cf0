"""Write a run's state so that it is there entirely or not at all.

A save is, in this order: `open_temporary` on all ranks, `write` on each, `commit` on the first; or
`discard`, when any of it fails. `save_blocking` does the rest at once, `async_save` while training
goes on.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from dsv2_train.checkpoint.dcp.coverage import Range, check_coverage, ranges_of
from dsv2_train.checkpoint.dcp.metadata import metadata_bytes, tensor_entries
from dsv2_train.checkpoint.dcp.write import WrittenPiece, write_pieces
from dsv2_train.checkpoint.disk import layout, lifecycle
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.manifest import FileEntry, Manifest
from dsv2_train.checkpoint.disk.retention import Retention, prune
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.ranks import RankGroup
from dsv2_train.distributed.sharding import Piece


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is being written, as every rank knows it.

    Attributes:
        temporary: the folder that it is written into.
        state: the clock.
        config_yaml: the resolved config.
        retention: which checkpoints are kept when this one is complete.
        fence: raises where this run may no longer write; asked on the first rank.
    """

    temporary: Path
    state: TrainState
    config_yaml: str
    retention: Retention
    fence: Callable[[], None]


@dataclass(frozen=True)
class Written:
    """What one rank wrote."""

    file: str
    entry: FileEntry
    places: list[tuple[Range, WrittenPiece]]


def save_blocking(ranks: RankGroup, checkpoint: Checkpoint, pieces: Sequence[Piece]) -> Path:
    """Write a checkpoint that is open; see `CheckpointManager.save`.

    Args:
        ranks: all ranks of the run.
        checkpoint: from `open_temporary`.
        pieces: what this rank owns.

    Raises:
        CheckpointError: on every rank, when a file cannot be written.

    Note:
        Collective over all ranks.
    """
    try:
        return ranks.gather_then_broadcast(
            lambda: write(checkpoint, ranks.rank, pieces),
            lambda written: commit(checkpoint, written),
        )
    except CheckpointError:
        discard(ranks, checkpoint)
        raise


def open_temporary(
    ranks: RankGroup,
    folder: Path,
    state: TrainState,
    pieces: Sequence[Piece],
    config_yaml: str,
    retention: Retention,
    fence: Callable[[], None],
) -> Checkpoint | None:
    """Make the temporary folder of a checkpoint; None if its step is there, complete.

    First is removed what a save or a removal that was killed left behind, and what is no longer
    kept: on a full disk, a smaller retention makes room.

    Args:
        ranks: all ranks of the run.
        folder: the run's checkpoint folder.
        state: the clock, equal on all ranks.
        pieces: what this rank owns.
        config_yaml: the resolved config.
        retention: which checkpoints are kept when this one is complete.
        fence: raises where this run may no longer write; asked on the first rank.

    Raises:
        CheckpointError: on every rank, when pieces leave a gap or overlap, or there is no folder.

    Note:
        Collective over all ranks.
    """

    def prepare(ranges: list[list[Range]]) -> Path | None:
        fence()
        lifecycle.clear_leftovers(folder)
        prune(folder, retention)
        if layout.is_complete(layout.step_folder(folder, state.step)):
            return None
        check_coverage(part for of_rank in ranges for part in of_rank)
        return lifecycle.start_folder(folder, state.step)

    temporary = ranks.gather_then_broadcast(lambda: ranges_of(pieces), prepare)
    return (
        None if temporary is None else Checkpoint(temporary, state, config_yaml, retention, fence)
    )


def write(
    checkpoint: Checkpoint,
    rank: int,
    pieces: Sequence[Piece],
    is_wanted: Callable[[], bool] = lambda: True,
) -> Written:
    """Write a rank's pieces into the temporary folder, on the disk when it returns; local.

    `is_wanted` is asked before each piece; when it denies, the rest is left out.
    """
    file = layout.data_file(rank)
    wanted = takewhile(lambda _: is_wanted(), pieces)
    entry, places = write_pieces(checkpoint.temporary / file, wanted)
    return Written(file, entry, list(zip(ranges_of(pieces), places, strict=False)))


def commit(checkpoint: Checkpoint, written: Sequence[Written]) -> Path:
    """Make the checkpoint of what all ranks wrote, and remove older ones that are not kept.

    Note:
        On the first rank, without communication.
    """
    places = [(rank.file, *place) for rank in written for place in rank.places]
    contents = {
        layout.METADATA: metadata_bytes(places),
        layout.CONFIG: checkpoint.config_yaml.encode(),
        layout.STATE: checkpoint.state.to_json().encode(),
    }
    files = {rank.file: rank.entry for rank in written}
    manifest = Manifest(checkpoint.state.step, tensor_entries(places), files)
    checkpoint.fence()
    path = lifecycle.finalize_folder(checkpoint.temporary, manifest, contents)
    prune(path.parent, checkpoint.retention)
    return path


def discard(ranks: RankGroup, checkpoint: Checkpoint) -> None:
    """Free what a failed save took; no rank may be writing. No communication, raises nothing."""
    if ranks.rank == 0:
        shutil.rmtree(checkpoint.temporary, ignore_errors=True)
