"""How fast a node reaches the disk of a run, and whether the next checkpoints fit on it."""

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.checkpoint.disk.layout import complete_checkpoints
from dsv2_train.cli.preflight.report import Row, against, judged, name_ranks
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.cluster import PreflightConfig
from dsv2_train.planner.memory import stage_memory

_BLOCK_BYTES = 1 << 22
_NUM_BLOCKS = 16
# Where all are kept, at least so many more must fit.
_WITHOUT_LIMIT = 2


@dataclass(frozen=True)
class Disk:
    """What a node found of the disk.

    Attributes:
        folder: where it looked.
        write_gb_per_s: written and on the disk; 0 if that failed.
        read_gb_per_s: read back, past the node's cache; 0 if that failed.
        free_bytes: that this user may write.
        error: what failed, empty if nothing did.
    """

    folder: str
    write_gb_per_s: float
    read_gb_per_s: float
    free_bytes: int
    error: str


def try_disk(folder: Path) -> Disk:
    """Write, sync and read 64 MiB where a run will write; nothing is left there."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    free_bytes = 0
    try:
        free_bytes = _free(there)
        with tempfile.TemporaryFile(dir=there, prefix=".preflight_") as file:
            num_bytes = _BLOCK_BYTES * _NUM_BLOCKS
            write_s = _write(file.fileno())
            read_s = _read(file.fileno())
    except OSError as error:
        return Disk(str(there), 0.0, 0.0, free_bytes, error.strerror or str(error))
    return Disk(str(there), num_bytes / write_s / 1e9, num_bytes / read_s / 1e9, free_bytes, "")


@dataclass(frozen=True)
class Room:
    """What the next checkpoints take: one of them, and how many there will be beside those kept."""

    checkpoint_bytes: int
    num_checkpoints: int


def room_needed(config: RunConfig) -> Room:
    """Of a run as it is on disk now.

    With `checkpoint.keep_last` n, n and the one being written, less those that are there; without
    it, two.
    """
    stages = stage_memory(config)
    size = config.parallel.dp * sum(stage.checkpoint_bytes for stage in stages)
    keep_last = config.checkpoint.keep_last
    if keep_last is None:
        return Room(size, _WITHOUT_LIMIT)
    there = len(complete_checkpoints(config.run.checkpoint_folder))
    return Room(size, max(1, keep_last + 1 - there))


def judge_disks(
    found: Mapping[int, Disk], hosts: Sequence[str], room: Room, expected: PreflightConfig
) -> Iterator[Row]:
    """Rows of the slowest node, and of the one with least room.

    Args:
        found: by the rank that looked, one of each node.
        hosts: by rank.
        room: what the run needs.
        expected: what it is held against.
    """
    failed = [rank for rank, disk in found.items() if disk.error]
    if failed:
        first = found[failed[0]]
        told = f"{first.error} in {first.folder}, {name_ranks(failed, hosts)}"
        yield judged("a file of 64 MiB", told, "can be written and read", is_good=False)
    for what in ("write", "read"):
        speeds: dict[int, float] = {
            rank: getattr(disk, f"{what}_gb_per_s")
            for rank, disk in found.items()
            if not disk.error
        }
        if speeds:
            slowest = min(speeds, key=lambda rank: speeds[rank])
            where, wanted = name_ranks([slowest], hosts), expected.disk_gb_per_s
            yield against(f"disk, {what}", speeds[slowest], where, wanted, expected.min_share)
    least = min(found, key=lambda rank: found[rank].free_bytes)
    free, needed = found[least].free_bytes, room.checkpoint_bytes * room.num_checkpoints
    told = f"{_size(free)} free in {found[least].folder}, {name_ranks([least], hosts)}"
    needs = f"{room.num_checkpoints} checkpoints of {_size(room.checkpoint_bytes)}"
    yield judged("disk, room", told, needs, is_good=free >= needed)


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _write(descriptor: int) -> float:
    block = os.urandom(_BLOCK_BYTES)  # what a disk could not compress away
    start_s = time.perf_counter()
    for _ in range(_NUM_BLOCKS):
        left = memoryview(block)
        while left:
            left = left[os.write(descriptor, left) :]
    os.fsync(descriptor)
    return time.perf_counter() - start_s


def _read(descriptor: int) -> float:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(descriptor, 0, os.SEEK_SET)
    start_s = time.perf_counter()
    while os.read(descriptor, _BLOCK_BYTES):
        pass
    return time.perf_counter() - start_s


def _size(num_bytes: int) -> str:
    gib = num_bytes / 2**30
    return f"{gib:,.1f} GiB" if gib >= 0.1 else f"{num_bytes / 2**20:,.1f} MiB"
