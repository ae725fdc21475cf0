"""Write a run's state so that it is there entirely or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.checkpoint.dcp.coverage import Range, check_coverage, ranges_of
from dsv2_train.checkpoint.dcp.metadata import metadata_bytes, tensor_entries
from dsv2_train.checkpoint.dcp.write import WrittenPiece, write_pieces
from dsv2_train.checkpoint.disk import folder as folders
from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.manifest import FileEntry, Manifest
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.ranks import Ranks
from dsv2_train.distributed.sharding import Piece


@dataclass(frozen=True)
class _Written:
    """What one rank wrote."""

    file: str
    entry: FileEntry
    places: list[tuple[Range, WrittenPiece]]


def save(
    ranks: Ranks, folder: Path, state: TrainState, pieces: Sequence[Piece], config_yaml: str
) -> Path:
    """Write a checkpoint; see `CheckpointManager.save`.

    Args:
        ranks: all ranks of the run.
        folder: the run's checkpoint folder.
        state: the clock, equal on all ranks.
        pieces: what this rank owns.
        config_yaml: the resolved config.

    Raises:
        CheckpointError: on every rank, when pieces leave a gap or overlap, and when a file cannot
            be written.

    Note:
        Collective over all ranks.
    """
    final = layout.step_folder(folder, state.step)
    if ranks.first(lambda: layout.is_complete(final)):
        return final

    def prepare(ranges: list[list[Range]]) -> Path:
        check_coverage(part for of_rank in ranges for part in of_rank)
        return folders.start(folder, state.step)

    temporary = ranks.reduce(lambda: ranges_of(pieces), prepare)

    def publish(written: list[_Written]) -> None:
        places = [(rank.file, *place) for rank in written for place in rank.places]
        contents = {
            layout.METADATA: metadata_bytes(places),
            layout.CONFIG: config_yaml.encode(),
            layout.STATE: state.to_json().encode(),
        }
        files = {rank.file: rank.entry for rank in written}
        folders.publish(temporary, Manifest(state.step, tensor_entries(places), files), contents)

    ranks.reduce(lambda: _write(temporary, ranks.rank, pieces), publish)
    return final


def _write(temporary: Path, rank: int, pieces: Sequence[Piece]) -> _Written:
    file = layout.data_file(rank)
    entry, places = write_pieces(temporary / file, pieces)
    return _Written(file, entry, list(zip(ranges_of(pieces), places, strict=True)))
