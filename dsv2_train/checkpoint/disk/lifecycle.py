"""What a checkpoint folder goes through: begun, finished, moved aside, removed.

It appears complete or not at all. The marker holds the digest of the manifest, the manifest the
checksums of all files and tensors.
"""

import os
import shutil
import sys
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.atomic_folder import sync, sync_parents
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import marker_of, read_file, size_problems
from dsv2_train.checkpoint.disk.manifest import FileEntry, Manifest


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
    problems = size_problems(temporary, manifest.files)
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
    _write(marker, marker_of(read_file(path / layout.MANIFEST)))
    sync(path)


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


def _renamed(path: Path, aside: Path) -> Path:
    path.rename(aside)
    sync(path.parent)
    return aside


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
