"""Is a checkpoint, or a file of it, as it was written?

The marker vouches for the manifest, the manifest for the files and tensors.
"""

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError, DamagedError
from dsv2_train.checkpoint.disk.manifest import FileEntry, Manifest
from dsv2_train.checkpoint.disk.state import TrainState

_READ_BYTES = 4 << 20


def open_verified(path: Path, *, need_marker: bool = True) -> tuple[Manifest, TrainState]:
    """Read a checkpoint's manifest and clock.

    Verified against each other are the marker, the manifest, the small files and the lengths of
    the data files; what is in the data files is verified by who reads it.

    Args:
        path: a checkpoint.
        need_marker: whether one without a marker is damaged; who takes it must read all of it.

    Raises:
        DamagedError: for anything that is not as it was written, by name of file.
        CheckpointError: for one of another format version, or that may not be read.
    """
    has_marker = need_marker or layout.is_complete(path)
    marker = read_file(path / layout.MARKER) if has_marker else None
    text = read_file(path / layout.MANIFEST)
    if marker is not None and marker != marker_of(text):
        raise DamagedError(
            f"{path}: {layout.MANIFEST} and {layout.MARKER} do not belong together: one is damaged"
        )
    try:
        manifest = Manifest.from_json(text)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    small = [name for name in manifest.files if not is_data(name)]
    problems = size_problems(path, manifest.files) or crc_problems(path, manifest, small)
    if problems:
        raise DamagedError("\n".join([f"{path}: damaged files:", *problems]))
    try:
        state = TrainState.from_json(read_file(path / layout.STATE).decode(errors="replace"))
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    if not layout.step_of(path) == manifest.step == state.step:
        raise DamagedError(
            f"{path}: {layout.MANIFEST} is of step {manifest.step} "
            f"and {layout.STATE} of step {state.step}"
        )
    return manifest, state


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint that can be opened.

    Attributes:
        path: its folder; None without one.
        state: its clock; None without one.
        passed_over: what is wrong with the newer ones, newest first.
    """

    path: Path | None
    state: TrainState | None
    passed_over: tuple[str, ...]


def newest_intact(
    folder: Path, is_read_whole: Callable[[TrainState], bool] = lambda _: False
) -> Newest:
    """The newest checkpoint whose small files are intact, with a marker or without.

    Args:
        folder: that checkpoints are in.
        is_read_whole: of which clocks the data files are to be intact too.

    Raises:
        CheckpointError: as by `open_verified`, for the first that is not damaged and cannot be
            used.
    """
    passed_over: list[str] = []
    for path in reversed(layout.step_folders(folder)):
        try:
            manifest, state = open_verified(path, need_marker=False)
            if is_read_whole(state):
                _require_intact_data(path, manifest)
        except DamagedError as error:
            passed_over.append(str(error))
        else:
            return Newest(path, state, tuple(passed_over))
    return Newest(None, None, tuple(passed_over))


def is_data(name: str) -> bool:
    """Whether a file of this name holds tensors."""
    return name.endswith(layout.DATA_SUFFIX)


def crc_problems(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """A line for each of the named files whose bytes are not those that were written."""
    return [line for name in names if (line := _crc_problem(path, manifest, name))]


def size_problems(path: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """A line for each file that is not there at its full length."""
    problems = []
    for name, entry in files.items():
        try:
            with reading(path / name):
                size = (path / name).stat().st_size
        except DamagedError as error:
            problems.append(f"  - {error}")
            continue
        if size != entry.size_bytes:
            problems.append(f"  - {name}: found {size} bytes; written were {entry.size_bytes}")
    return problems


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tell a damaged file from one that may not be read.

    Raises:
        DamagedError: if there is no such file, or its disk cannot give it back.
        CheckpointError: if the system refuses for another reason.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedError(f"{path.name}: missing") from error
    except OSError as error:
        kind = DamagedError if error.errno == errno.EIO else CheckpointError
        raise kind(f"{path.name}: cannot be read: {error.strerror}") from error


def read_back(path: Path, entry: FileEntry) -> None:
    """See that the disk, not the memory before it, gives back what was written and synced.

    Raises:
        CheckpointError: if it does not.
    """
    with reading(path), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if crc32_of(path) != entry.crc32:
            raise CheckpointError(f"{path.name}: the disk gives back other bytes than were written")


def read_file(path: Path) -> bytes:
    """The bytes of a small file of a checkpoint; raises as `reading`, with the checkpoint named."""
    try:
        with reading(path):
            return path.read_bytes()
    except CheckpointError as error:
        raise type(error)(f"{path.parent}: {error}") from error


def marker_of(manifest: bytes) -> bytes:
    """Content of the marker of a checkpoint that has this manifest."""
    return f"{hashlib.sha256(manifest).hexdigest()}\n".encode()


def _require_intact_data(path: Path, manifest: Manifest) -> None:
    problems = crc_problems(path, manifest, filter(is_data, manifest.files))
    if problems:
        raise DamagedError("\n".join([f"{path}: damaged files:", *problems]))


def _crc_problem(path: Path, manifest: Manifest, name: str) -> str | None:
    try:
        with reading(path / name):
            crc = crc32_of(path / name)
    except DamagedError as error:
        return f"  - {error}"
    wrong = crc != manifest.files[name].crc32
    return f"  - {name}: its CRC-32 is not the manifest's" if wrong else None


def crc32_of(path: Path) -> int:
    """CRC-32 of all bytes of a file, read in 4 MiB of memory."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            crc = zlib.crc32(data, crc)
    return crc
