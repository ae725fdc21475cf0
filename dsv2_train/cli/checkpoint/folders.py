"""Which checkpoints a path on the command line means, and how they are told of."""

from contextlib import suppress
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError

_UNITS = ("B", "kB", "MB", "GB", "TB")


def folder_of_run(path: Path) -> Path:
    """The folder that the checkpoints of a run are in.

    Args:
        path: the run folder, or the folder itself.

    Raises:
        CheckpointError: if there is none, or nothing in it is a checkpoint or was one.
    """
    below = path / layout.CHECKPOINTS
    folder = below if below.is_dir() else path
    if not everything(folder):
        what = "holds no checkpoint" if path.is_dir() else "no such folder"
        raise CheckpointError(
            f"{path}: {what}; must be a run folder or its {layout.CHECKPOINTS} folder"
        )
    return folder


def everything(folder: Path) -> list[Path]:
    """Checkpoints, complete or not, what saves left behind, and damaged ones moved aside."""
    return [
        *layout.moved_aside(folder),
        *layout.step_folders(folder),
        *layout.leftovers(folder),
    ]


def size_of(path: Path) -> int:
    """Bytes of the files in a folder, of a file its own; what a run removes meanwhile has none."""
    with suppress(FileNotFoundError):
        if path.is_dir():
            return sum(map(size_of, path.iterdir()))
        return path.lstat().st_size
    return 0


def human(num_bytes: float) -> str:
    """A size for people, in powers of 1,000."""
    for unit in _UNITS[:-1]:
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} {_UNITS[-1]}"
