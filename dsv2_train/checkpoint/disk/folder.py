"""One checkpoint folder: it appears complete or not at all, and is verified when it is opened.

The marker holds the digest of the manifest, the manifest the checksums of all files and tensors.
"""

import errno
import hashlib
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.layout import CheckpointError, DamagedError
from dsv2_train.checkpoint.disk.manifest import FileEntry, Manifest
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.disk.target import sync, sync_parents

_READ_BYTES = 4 << 20


def clear_leftovers(folder: Path) -> None:
    """Remove what saves and removals left behind; what cannot be is told of on standard error."""
    for leftover in layout.leftovers(folder):
        try:
            _delete(leftover)
        except OSError as error:
            sys.stderr.write(f"left behind by a save, and cannot be removed: {error}\n")


def start_folder(folder: Path, step: int) -> Path:
    """Make an empty temporary folder for a step."""
    temporary = layout.temporary_folder(folder, step)
    temporary.mkdir(parents=True)
    if not layout.step_folders(folder):  # the folders above may be as new
        sync_parents(temporary)
    return temporary


def finalize_folder(temporary: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Path:
    """Turn a temporary folder that holds all data files into the checkpoint of its step.

    Args:
        temporary: from `start_folder`.
        manifest: every tensor, and the data files.
        contents: the small files by name; added to the folder and to the manifest.

    Returns:
        The complete checkpoint, on the disk.

    Raises:
        CheckpointError: for a data file that is not there at its full length.
    """
    problems = _size_problems(temporary, manifest.files)
    if problems:
        raise CheckpointError(
            "data files that this rank does not find as they were written; "
            "is the checkpoint folder on a file system that all ranks share?\n"
            + "\n".join(problems)
        )
    entries = {name: _write(temporary / name, data) for name, data in contents.items()}
    text = replace(manifest, files={**manifest.files, **entries}).to_json().encode()
    _write(temporary / layout.MANIFEST, text)
    sync(temporary)
    final = layout.step_folder(temporary.parent, manifest.step)
    if os.path.lexists(final):
        set_aside(final)
    temporary.rename(final)
    sync(final.parent)
    _write(final / layout.MARKER, marker_of(text))
    sync(final)
    return final


def mark(path: Path) -> None:
    """Make a checkpoint complete that has no marker and is, to the last byte, as it was written.

    Its save was cut off between the rename of its folder and the end, or its marker was lost.
    """
    marker = path / layout.MARKER
    marker.unlink(missing_ok=True)  # an empty one
    _write(marker, marker_of(_read(path / layout.MANIFEST)))
    sync(path)


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
    marker = _read(path / layout.MARKER) if has_marker else None
    text = _read(path / layout.MANIFEST)
    if marker is not None and marker != marker_of(text):
        raise DamagedError(
            f"{path}: {layout.MANIFEST} and {layout.MARKER} do not belong together: one is damaged"
        )
    try:
        manifest = Manifest.from_json(text)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    small = [name for name in manifest.files if not is_data(name)]
    problems = _size_problems(path, manifest.files) or crc_problems(path, manifest, small)
    if problems:
        raise DamagedError("\n".join([f"{path}: damaged files:", *problems]))
    try:
        state = TrainState.from_json(_read(path / layout.STATE).decode(errors="replace"))
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


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is damaged or unfinished; nothing of it is lost."""
    return _renamed(path, layout.damaged_folder(path))


def set_back(path: Path) -> Path:
    """Rename a checkpoint that a run goes back behind; nothing of it is lost."""
    return _renamed(path, layout.rolled_back_folder(path))


def remove(path: Path) -> None:
    """Remove a checkpoint; whenever this is interrupted, nothing that looks complete is left."""
    doomed = layout.removed_folder(path)
    path.rename(doomed)
    sync(path.parent)
    _delete(doomed)


def is_data(name: str) -> bool:
    """Whether a file of this name holds tensors."""
    return name.endswith(layout.DATA_SUFFIX)


def crc_problems(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """A line for each of the named files whose bytes are not those that were written."""
    return [line for name in names if (line := _crc_problem(path, manifest, name))]


def _require_intact_data(path: Path, manifest: Manifest) -> None:
    problems = crc_problems(path, manifest, filter(is_data, manifest.files))
    if problems:
        raise DamagedError("\n".join([f"{path}: damaged files:", *problems]))


def _crc_problem(path: Path, manifest: Manifest, name: str) -> str | None:
    try:
        with reading(path / name):
            crc = _crc32(path / name)
    except DamagedError as error:
        return f"  - {error}"
    wrong = crc != manifest.files[name].crc32
    return f"  - {name}: its CRC-32 is not the manifest's" if wrong else None


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
        if _crc32(path) != entry.crc32:
            raise CheckpointError(f"{path.name}: the disk gives back other bytes than were written")


def marker_of(manifest: bytes) -> bytes:
    """Content of the marker of a checkpoint that has this manifest."""
    return f"{hashlib.sha256(manifest).hexdigest()}\n".encode()


def _renamed(path: Path, aside: Path) -> Path:
    path.rename(aside)
    sync(path.parent)
    return aside


def _size_problems(path: Path, files: Mapping[str, FileEntry]) -> list[str]:
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


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            crc = zlib.crc32(data, crc)
    return crc


def _read(path: Path) -> bytes:
    try:
        with reading(path):
            return path.read_bytes()
    except CheckpointError as error:
        raise type(error)(f"{path.parent}: {error}") from error


def _delete(path: Path) -> None:
    """Delete a folder with what is in it, or a file; of a link, not what it leads to."""
    with suppress(FileNotFoundError):  # somebody else deletes it too
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write(path: Path, data: bytes) -> FileEntry:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(data), zlib.crc32(data))
