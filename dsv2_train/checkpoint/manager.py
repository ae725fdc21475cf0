"""Save a run's state so that it is there entirely or not at all, and restore the newest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import distributed as dist

from dsv2_train.checkpoint import folder as folders
from dsv2_train.checkpoint import layout
from dsv2_train.checkpoint.checksum import add_checksums
from dsv2_train.checkpoint.dcp.coverage import (
    Range,
    by_key,
    check_coverage,
    coverage_problems,
    listing,
    ranges_of,
)
from dsv2_train.checkpoint.dcp.metadata import metadata_bytes
from dsv2_train.checkpoint.dcp.read import read_pieces
from dsv2_train.checkpoint.dcp.write import WrittenPiece, write_pieces
from dsv2_train.checkpoint.layout import CheckpointError
from dsv2_train.checkpoint.manifest import Chunk, FileEntry, Manifest, TensorEntry
from dsv2_train.checkpoint.ranks import Ranks
from dsv2_train.checkpoint.state import TrainState
from dsv2_train.distributed.sharding import Piece


@dataclass(frozen=True)
class _Written:
    """What one rank wrote."""

    file: str
    entry: FileEntry
    places: list[tuple[Range, WrittenPiece]]


class CheckpointManager:
    """Saves and restores the state of a run, below one folder that all ranks share.

    Args:
        folder: the run's checkpoint folder; made by the first save.
        every_steps: a checkpoint is due every so many steps.
        group: process group of all ranks, able to carry objects; None for the default group, or
            for one process where none is initialized.
    """

    def __init__(
        self, folder: Path, every_steps: int, group: dist.ProcessGroup | None = None
    ) -> None:
        self.folder = folder
        self.every_steps = every_steps
        self._ranks = Ranks(group)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return step > 0 and step % self.every_steps == 0

    def save(self, state: TrainState, pieces: Sequence[Piece], config_yaml: str) -> Path:
        """Write a checkpoint; nothing is gathered, every rank writes the ranges it owns.

        A complete checkpoint of this step is left as it is.

        Args:
            state: the clock, equal on all ranks.
            pieces: what this rank owns: over all ranks, every element of every tensor once.
            config_yaml: the resolved config.

        Returns:
            The checkpoint's folder; it is complete and on the disk.

        Raises:
            CheckpointError: on every rank, when pieces leave a gap or overlap, and when a file
                cannot be written. The newest complete checkpoint is intact.

        Note:
            Collective over all ranks. Host memory: a few MiB, and 68 MiB if pieces are on a device.
        """
        final = layout.step_folder(self.folder, state.step)
        if self._ranks.first(lambda: layout.is_complete(final)):
            return final

        def prepare(ranges: list[list[Range]]) -> Path:
            check_coverage(part for of_rank in ranges for part in of_rank)
            return folders.start(self.folder, state.step)

        temporary = self._ranks.reduce(lambda: ranges_of(pieces), prepare)

        def publish(written: list[_Written]) -> None:
            contents = {
                layout.METADATA: metadata_bytes(
                    (rank.file, *place) for rank in written for place in rank.places
                ),
                layout.CONFIG: config_yaml.encode(),
                layout.STATE: state.to_json().encode(),
            }
            folders.publish(temporary, _manifest(state.step, written), contents)

        self._ranks.reduce(lambda: self._write(temporary, pieces), publish)
        return final

    def restore(self, pieces: Sequence[Piece]) -> TrainState | None:
        """Fill pieces from the newest complete checkpoint and verify what arrived.

        The pieces may be cut differently from how they were written. Several ranks may ask for the
        same range, but not for ranges that overlap in part.

        Args:
            pieces: over all ranks, every element of every tensor of the checkpoint.

        Returns:
            The clock, or None where there is no complete checkpoint.

        Raises:
            CheckpointError: on every rank: for tensors that are missing, unexpected or of another
                shape or dtype (all are listed), and for damage (tensors and files are named).
                Then the pieces hold nothing of use.

        Note:
            Collective over all ranks. Host memory: 4 MiB beside the pieces.
        """
        found = self._ranks.first(self._open_newest)
        if found is None:
            return None
        path, manifest, state = found
        self._ranks.reduce(lambda: ranges_of(pieces), lambda ranges: _compare(manifest, ranges))

        def load() -> list[tuple[Range, int]]:
            checksums = read_pieces(path, manifest, pieces)
            return list(zip(ranges_of(pieces), checksums, strict=True))

        self._ranks.reduce(load, lambda loaded: _verify(path, manifest, loaded))
        return state

    def _open_newest(self) -> tuple[Path, Manifest, TrainState] | None:
        path = layout.latest_complete(self.folder)
        return None if path is None else (path, *folders.open_verified(path))

    def _write(self, temporary: Path, pieces: Sequence[Piece]) -> _Written:
        file = layout.data_file(self._ranks.rank)
        entry, places = write_pieces(temporary / file, pieces)
        return _Written(file, entry, list(zip(ranges_of(pieces), places, strict=True)))


def _manifest(step: int, written: Sequence[_Written]) -> Manifest:
    parts = [(part, rank.file, place) for rank in written for part, place in rank.places]
    of_key: dict[str, list[tuple[Range, str, WrittenPiece]]] = {}
    for item in sorted(parts, key=lambda item: (item[0].key, item[0].offset)):
        of_key.setdefault(item[0].key, []).append(item)
    tensors = {
        key: TensorEntry(
            shape=items[0][0].shape,
            dtype=items[0][0].dtype,
            checksum=add_checksums(place.checksum for _, _, place in items),
            chunks=tuple(
                Chunk(part.offset, part.numel, file, place.byte_offset)
                for part, file, place in items
                if part.numel
            ),
        )
        for key, items in of_key.items()
    }
    return Manifest(step, tensors, {rank.file: rank.entry for rank in written})


def _compare(manifest: Manifest, ranges: Sequence[Sequence[Range]]) -> None:
    wanted = by_key({part for of_rank in ranges for part in of_rank})
    problems = [f"{key}: in the checkpoint only" for key in manifest.tensors.keys() - wanted.keys()]
    for key, parts in wanted.items():
        entry = manifest.tensors.get(key)
        if entry is None:
            problems.append(f"{key}: in this run only")
            continue
        kinds = {(part.shape, part.dtype) for part in parts} - {(entry.shape, entry.dtype)}
        problems += [
            f"{key}: {shape} {dtype} in this run; {entry.shape} {entry.dtype} in the checkpoint"
            for shape, dtype in sorted(kinds)
        ] or coverage_problems(parts)
    if problems:
        raise CheckpointError(
            listing(f"differences between this run and step {manifest.step}", sorted(problems))
        )


def _verify(path: Path, manifest: Manifest, loaded: Sequence[Sequence[tuple[Range, int]]]) -> None:
    held: dict[str, set[tuple[Range, int]]] = {}
    for of_rank in loaded:
        for part, checksum in of_rank:
            held.setdefault(part.key, set()).add((part, checksum))
    damaged = [
        key
        for key, parts in held.items()
        if add_checksums(checksum for _, checksum in parts) != manifest.tensors[key].checksum
    ]
    if damaged:
        names = {chunk.file for key in damaged for chunk in manifest.tensors[key].chunks}
        problems = [f"{key}: its checksum is not the manifest's" for key in sorted(damaged)]
        files = folders.crc_problems(path, manifest, sorted(names))
        raise CheckpointError(
            "\n".join([f"{path}: {listing('damaged tensors', problems)}", "in:", *files])
        )
