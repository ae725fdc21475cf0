"""What is being written is there entirely in the end, or leaves nothing behind."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv2_train.checkpoint.disk.layout import CheckpointError


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target to write into; at the end its files are synced and it is renamed.

    Args:
        target: must not exist, or be an empty folder.

    Raises:
        CheckpointError: for a target that is there, and for whatever the system refuses.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: is there already; give another --out, or remove it")
    temporary = target.with_name(f".tmp_{target.name}")
    with removed_on_failure(temporary):
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        temporary.rename(target)
        sync(target.parent)


@contextmanager
def removed_on_failure(made: Path) -> Iterator[None]:
    """Remove a folder, and those that its making made on the way to it, when the block fails.

    Args:
        made: is made by the block; what an interrupted one left there is removed first.

    Raises:
        CheckpointError: instead of an OSError.
    """
    try:
        shutil.rmtree(made, ignore_errors=True)
        first_made = next(path for path in reversed([made, *made.parents]) if not path.exists())
    except (OSError, StopIteration) as error:
        raise CheckpointError(f"{made}: cannot be written: {error}") from error
    try:
        yield
    except BaseException as error:
        shutil.rmtree(first_made, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{error}; nothing is left behind") from error
        raise


def require_space(path: Path, num_bytes: int) -> None:
    """Refuse in the first second what would fill a disk in the last hour.

    Args:
        path: what is to be written; the nearest folder that exists is asked.
        num_bytes: what it takes.

    Raises:
        CheckpointError: if there is less.
    """
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    free = shutil.disk_usage(nearest).free
    if num_bytes > free:
        raise CheckpointError(
            f"{path}: needs {num_bytes / 1e9:,.1f} GB, free are {free / 1e9:,.1f} GB; "
            "make room, or give another --out"
        )


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
