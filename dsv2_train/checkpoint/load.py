"""Load a checkpoint on every rank, and see that what arrived is what was written."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dsv2_train.checkpoint.dcp.coverage import Range, by_key, coverage_problems, listing
from dsv2_train.checkpoint.dcp.headers import files_with_other_headers
from dsv2_train.checkpoint.disk import integrity
from dsv2_train.checkpoint.disk.checksum import add_checksums
from dsv2_train.checkpoint.disk.errors import CheckpointError, DamagedError
from dsv2_train.checkpoint.disk.manifest import Manifest
from dsv2_train.checkpoint.ranks import RankGroup


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
    data_files = sorted(filter(integrity.is_data, manifest.files))
    others = ranks.gather_then_broadcast(
        lambda: files_with_other_headers(path, manifest, data_files[ranks.rank :: ranks.size]),
        _all_of,
    )
    keys = ranks.gather_then_broadcast(load, lambda loaded: damaged_tensors(manifest, loaded))
    inside = {chunk.file for key in keys for chunk in manifest.tensors[key].chunks}
    suspects = sorted(inside.union(others))
    mine = suspects[ranks.rank :: ranks.size]
    problems = ranks.gather_then_broadcast(
        lambda: integrity.crc_problems(path, manifest, mine), _all_of
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
