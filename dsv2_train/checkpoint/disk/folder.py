"""One checkpoint folder: it appears complete or not at all, and is verified when it is opened.

The marker holds the digest of the manifest, the manifest the checksums of all files and tensors.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.layout import CheckpointError
from dsv2_train.checkpoint.disk.manifest import FileEntry, Manifest
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.disk.target import sync

_READ_BYTES = 4 << 20


def start(folder: Path, step: int) -> Path:
    """Make an empty temporary folder for a step; what earlier saves left behind is removed."""
    for leftover in layout.leftovers(folder):
        shutil.rmtree(leftover)
    temporary = layout.temporary_folder(folder, step)
    temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> Path:
    """Turn a temporary folder that holds all data files into the checkpoint of its step.

    Args:
        temporary: from `start`.
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
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync(final.parent)
    _write(final / layout.MARKER, _marker_of(text))
    sync(final)
    return final


def open_verified(path: Path) -> tuple[Manifest, TrainState]:
    """Read a complete checkpoint's manifest and clock.

    Verified against each other are the marker, the manifest, the small files and the lengths of
    the data files; what is in the data files is verified by who reads it.

    Raises:
        CheckpointError: for anything that is not as it was written, by name of file.
    """
    text = _read(path / layout.MANIFEST)
    if _read(path / layout.MARKER) != _marker_of(text):
        raise CheckpointError(
            f"{path}: {layout.MANIFEST} and {layout.MARKER} do not belong together: one is damaged"
        )
    manifest = Manifest.from_json(text.decode())
    small = [name for name in manifest.files if not name.endswith(layout.DATA_SUFFIX)]
    problems = _size_problems(path, manifest.files) or crc_problems(path, manifest, small)
    if problems:
        raise CheckpointError("\n".join([f"{path}: damaged files:", *problems]))
    state = TrainState.from_json(_read(path / layout.STATE).decode())
    if not layout.step_of(path) == manifest.step == state.step:
        raise CheckpointError(
            f"{path}: {layout.MANIFEST} is of step {manifest.step} "
            f"and {layout.STATE} of step {state.step}"
        )
    return manifest, state


def crc_problems(path: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """A line for each of the named files whose bytes are not those that were written."""
    return [
        f"  - {name}: its CRC-32 is not the manifest's"
        for name in names
        if _crc32(path / name) != manifest.files[name].crc32
    ]


def _marker_of(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}\n".encode()


def _size_problems(path: Path, files: Mapping[str, FileEntry]) -> list[str]:
    problems = []
    for name, entry in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size is None:
            problems.append(f"  - {name}: missing")
        elif size != entry.size_bytes:
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
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: {path.name} is missing") from error


def _write(path: Path, data: bytes) -> FileEntry:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(len(data), zlib.crc32(data))
