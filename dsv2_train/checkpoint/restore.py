"""Fill a run's tensors from the newest checkpoint that is as it was written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsv2_train.checkpoint.dcp.coverage import Range, by_key, coverage_problems, listing, ranges_of
from dsv2_train.checkpoint.dcp.headers import files_with_other_headers
from dsv2_train.checkpoint.dcp.read import read_pieces
from dsv2_train.checkpoint.disk import folder as folders
from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.checksum import add_checksums
from dsv2_train.checkpoint.disk.layout import CheckpointError, DamagedError
from dsv2_train.checkpoint.disk.manifest import Manifest
from dsv2_train.checkpoint.disk.state import TrainState
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
        folders.set_back(path)
    told = [
        f"{text}\nthe run goes on from {used} instead; the other is kept as "
        f"{folders.set_aside(path).name}"
        for path, text in passed_over.items()
    ]
    if not layout.is_complete(used):
        folders.mark(used)
        told.append(
            f"{used}: had no {layout.MARKER}: its save was cut off just before the end, or the "
            "file was lost. Every byte is as it was written: it is complete now, and the run goes "
            "on from it"
        )
    return tuple(told)


def _restore_from(ranks: RankGroup, path: Path, pieces: Sequence[Piece]) -> TrainState:
    manifest, state = ranks.on_rank0(lambda: folders.open_verified(path, need_marker=False))
    ranks.gather_then_broadcast(lambda: ranges_of(pieces), lambda ranges: compare(manifest, ranges))

    def load() -> list[tuple[Range, int]]:
        return list(zip(ranges_of(pieces), read_pieces(path, manifest, pieces), strict=True))

    load_verified(ranks, path, manifest, load)
    return state


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


def load_verified(
    ranks: RankGroup, path: Path, manifest: Manifest, load: Callable[[], list[tuple[Range, int]]]
) -> None:
    """Load on every rank, and see that it is what was written.

    Args:
        ranks: all ranks of the run.
        path: a checkpoint.
        manifest: its manifest.
        load: fills this rank's memory; its ranges with the checksums of what they hold then.

    Raises:
        DamagedError: on every rank, with the tensors and files that are damaged.
        CheckpointError: on every rank, if tensors arrived that are not those of intact files.

    Note:
        Collective over all ranks. Files are read whole only where something is wrong with them,
        each by one rank.
    """
    data_files = sorted(filter(folders.is_data, manifest.files))
    others = ranks.gather_then_broadcast(
        lambda: files_with_other_headers(path, manifest, data_files[ranks.rank :: ranks.size]),
        _all_of,
    )
    keys = ranks.gather_then_broadcast(load, lambda loaded: damaged_tensors(manifest, loaded))
    inside = {chunk.file for key in keys for chunk in manifest.tensors[key].chunks}
    suspects = sorted(inside.union(others))
    mine = suspects[ranks.rank :: ranks.size]
    problems = ranks.gather_then_broadcast(
        lambda: folders.crc_problems(path, manifest, mine), _all_of
    )
    tensors = [f"{key}: its checksum is not the manifest's" for key in keys]
    if tensors and not problems:
        raise CheckpointError(
            f"{path}: {listing('tensors did not arrive as they are on the disk', tensors)}\n"
            "all files are as they were written: suspect the memory or the network of a node"
        )
    if tensors:
        told = [f"{path}: {listing('damaged tensors', tensors)}", "in:", *problems]
        raise DamagedError("\n".join(told))
    if problems:
        raise DamagedError("\n".join([f"{path}: damaged files:", *problems]))


def damaged_tensors(manifest: Manifest, loaded: Sequence[Sequence[tuple[Range, int]]]) -> list[str]:
    """Keys of the tensors whose parts do not add up to the manifest's checksum, in order.

    Args:
        manifest: of a checkpoint.
        loaded: of each rank its ranges with their checksums.
    """
    held: dict[str, set[tuple[Range, int]]] = {}
    for of_rank in loaded:
        for part, checksum in of_rank:
            held.setdefault(part.key, set()).add((part, checksum))
    return sorted(
        key
        for key, parts in held.items()
        if add_checksums(checksum for _, checksum in parts) != manifest.tensors[key].checksum
    )


def _all_of(found: Sequence[Sequence[str]]) -> list[str]:
    return sorted(line for of_rank in found for line in of_rank)
