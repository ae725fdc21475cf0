"""A folder that is there entirely in the end, or leaves nothing behind."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsv2_train.checkpoint.disk.errors import TargetError


@contextmanager
def new_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside the target to write into; at the end it is synced and renamed.

    Args:
        target: must not exist, or be an empty folder.
        num_bytes: what will be written; too small a disk is refused before the first byte is.

    Raises:
        TargetError: for a target that is there or is being written, for a disk without room, and
            for whatever the system refuses meanwhile. Then, and when the block fails, the
            folder is removed, with the parents that were made for it.
    """
    target = Path(os.path.abspath(target))
    try:
        _require_free(target)
        _require_space(target, num_bytes)
        new_parents = [path for path in target.parents if not path.exists()]
        written = _make(target)
    except OSError as error:
        raise TargetError(f"{target}: cannot be written: {error}") from error
    try:
        yield written
        for path in [*written.iterdir(), written]:
            sync(path)
        written = written.rename(target)
        for path in [target, *new_parents]:
            sync(path.parent)
    except BaseException as error:
        shutil.rmtree(written, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # something else is in it by now
                parent.rmdir()
        if isinstance(error, OSError):
            message = f"{target}: not written: {error}; nothing is left behind"
            raise TargetError(message) from error
        raise


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_parents(path: Path) -> None:
    """Wait until the names of a path and of the folders above are on the disk.

    A folder that this user may not write in has no new names, nor have those above it.
    """
    for parent in Path(os.path.abspath(path)).parents:
        if not os.access(parent, os.R_OK | os.W_OK):
            break
        sync(parent)


def _require_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise TargetError(f"{target}: is there already; give another folder, or remove it")


def _require_space(target: Path, num_bytes: int) -> None:
    nearest = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if num_bytes > free:
        raise TargetError(
            f"{target}: needs {num_bytes:,} bytes, free are {free:,}; make room, or give another "
            "folder"
        )


def _make(target: Path) -> Path:
    temporary = target.with_name(f".tmp_{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
    except FileExistsError as error:
        raise TargetError(
            f"{target}: is being written by another process, or one that did was killed: "
            f"{temporary} is there already; wait for it, or remove what it left"
        ) from error
    return temporary
