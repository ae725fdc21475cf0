"""Names on disk: what a checkpoint folder is called, what it contains, when it is complete.

checkpoints/
  step_00000100/          one complete checkpoint
    __<rank>_0.distcp     the pieces that a rank owns (torch.distributed.checkpoint)
    .metadata             torch.distributed.checkpoint's own index, for its tools
    config.yaml           the resolved config of the run
    state.json            the clock (`TrainState`)
    manifest.json         every file and every tensor, with checksums
    COMPLETE              written last; holds the digest of the manifest
  .tmp_step_00000200/     one being written, or left behind by a crash
  .tmp_removed_step_.../  one being removed, or left behind by a crash
  damaged_step_00000300/  one that was found damaged, moved aside; never read, never removed
  rolled_back_step_.../   one that a run went back behind, moved aside; the same
"""

import os
import re
from pathlib import Path

from dsv2_train.checkpoint.disk.errors import CheckpointError

CONFIG = "config.yaml"
STATE = "state.json"
MANIFEST = "manifest.json"
METADATA = ".metadata"
MARKER = "COMPLETE"
DATA_SUFFIX = ".distcp"
CHECKPOINTS = "checkpoints"

_STEP = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".tmp_"
_DAMAGED = "damaged_"
_ROLLED_BACK = "rolled_back_"


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs, below the run's checkpoint folder."""
    return folder / f"step_{step:08d}"


def temporary_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is while it is written: a name that is free."""
    return _free(folder / f"{_TEMPORARY}step_{step:08d}")


def removed_folder(path: Path) -> Path:
    """Where a checkpoint is while it is removed: a name that is free."""
    return _free(path.with_name(f"{_TEMPORARY}removed_{path.name}"))


def damaged_folder(path: Path) -> Path:
    """Where a damaged checkpoint is moved to: a name that is free."""
    return _free(path.with_name(f"{_DAMAGED}{path.name}"))


def rolled_back_folder(path: Path) -> Path:
    """Where a checkpoint is moved to that a run goes back behind: a name that is free."""
    return _free(path.with_name(f"{_ROLLED_BACK}{path.name}"))


def data_file(rank: int) -> str:
    """Name of the file that holds a rank's pieces."""
    return f"__{rank}_0{DATA_SUFFIX}"


def step_of(path: Path) -> int | None:
    """The step that a folder's name tells, or None for a folder that is no checkpoint."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def is_complete(path: Path) -> bool:
    """Whether a checkpoint folder was written to the end; an empty marker is none."""
    marker = path / MARKER
    return step_of(path) is not None and marker.is_file() and marker.stat().st_size > 0


def step_folders(folder: Path) -> list[Path]:
    """Folders of steps, complete or not, oldest step first; empty if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below a folder, oldest step first; empty if there is no such folder."""
    return [path for path in step_folders(folder) if is_complete(path)]


def latest_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return next(reversed(complete_checkpoints(folder)), None)


def leftovers(folder: Path) -> list[Path]:
    """What saves and removals have not finished."""
    return sorted(folder.glob(f"{_TEMPORARY}*step_*"))


def moved_aside(folder: Path) -> list[Path]:
    """Checkpoints that were moved aside: damaged ones, then those that a run went back behind."""
    kinds = (_DAMAGED, _ROLLED_BACK)
    return [path for kind in kinds for path in sorted(folder.glob(f"{kind}step_*"))]


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest complete one of a run.

    Args:
        path: a checkpoint, the folder that checkpoints are in, or a run folder.

    Raises:
        CheckpointError: if there is none, or the folder cannot be read.
    """
    try:
        if is_complete(path):
            return path
        found = latest_complete(path / CHECKPOINTS) or latest_complete(path)
        is_folder = path.is_dir()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if found is None:
        what = "holds no complete checkpoint" if is_folder else "no such folder"
        raise CheckpointError(
            f"{path}: {what}; must be a run folder, its {CHECKPOINTS} folder, or one of the "
            f"step_<8 digits> folders in it that have a {MARKER} file"
        )
    return found


def _free(path: Path) -> Path:
    """The path, or the first with a number behind it where nothing is, not even a broken link."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free
