"""Fill a run's tensors from its newest checkpoint, and verify what arrived."""

from collections.abc import Sequence
from pathlib import Path

from dsv2_train.checkpoint.dcp.coverage import Range, by_key, coverage_problems, listing, ranges_of
from dsv2_train.checkpoint.dcp.read import read_pieces
from dsv2_train.checkpoint.disk import folder as folders
from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.checksum import add_checksums
from dsv2_train.checkpoint.disk.layout import CheckpointError
from dsv2_train.checkpoint.disk.manifest import Manifest
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.ranks import Ranks
from dsv2_train.distributed.sharding import Piece


def restore(ranks: Ranks, folder: Path, pieces: Sequence[Piece]) -> TrainState | None:
    """Fill pieces from the newest complete checkpoint; see `CheckpointManager.restore`.

    Args:
        ranks: all ranks of the run.
        folder: the run's checkpoint folder.
        pieces: over all ranks, every element of every tensor of the checkpoint.

    Returns:
        The clock, or None where there is no complete checkpoint.

    Raises:
        CheckpointError: on every rank, for differences and for damage.

    Note:
        Collective over all ranks.
    """
    found = ranks.first(lambda: _open_newest(folder))
    if found is None:
        return None
    path, manifest, state = found
    ranks.reduce(lambda: ranges_of(pieces), lambda ranges: compare(manifest, ranges))

    def load() -> list[tuple[Range, int]]:
        checksums = read_pieces(path, manifest, pieces)
        return list(zip(ranges_of(pieces), checksums, strict=True))

    ranks.reduce(load, lambda loaded: verify(path, manifest, loaded))
    return state


def _open_newest(folder: Path) -> tuple[Path, Manifest, TrainState] | None:
    path = layout.latest_complete(folder)
    return None if path is None else (path, *folders.open_verified(path))


def compare(manifest: Manifest, ranges: Sequence[Sequence[Range]]) -> None:
    """See that the ranges of all ranks are the tensors of a checkpoint.

    Raises:
        CheckpointError: with everything that differs.
    """
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


def verify(path: Path, manifest: Manifest, loaded: Sequence[Sequence[tuple[Range, int]]]) -> None:
    """See that what all ranks have loaded is what was written.

    Args:
        path: the checkpoint.
        manifest: its manifest.
        loaded: of each rank its ranges with their checksums.

    Raises:
        CheckpointError: with the tensors and files that are damaged.
    """
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
