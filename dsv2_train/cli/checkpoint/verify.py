"""`dsv2 checkpoint verify`: is every byte of a checkpoint as it was written?"""

import argparse
import sys
import time
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.folder import open_verified
from dsv2_train.checkpoint.disk.layout import CheckpointError, DamagedError
from dsv2_train.checkpoint.verify import verify
from dsv2_train.cli.checkpoint.folders import folder_of_run, human
from dsv2_train.cli.main import EXIT_FAILED

_PROGRESS_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.description = (
        "Read every file and every tensor and hold them against the manifest. Needs no GPU and a "
        "few MiB of memory. Exit status: 0 all as written, 1 damaged or unfinished, 2 nothing to "
        "verify."
    )
    parser.add_argument("path", type=Path, help="a checkpoint, or a run folder (all of its)")


def run(arguments: argparse.Namespace) -> int:
    """Verify, and tell of each checkpoint what is wrong with it.

    Raises:
        CheckpointError: where there is no complete checkpoint.
    """
    paths = [arguments.path]
    if layout.step_of(arguments.path) is None:
        folder = folder_of_run(arguments.path)
        paths = layout.step_folders(folder)
        if not any(map(layout.is_complete, paths)):
            raise CheckpointError(f"{folder}: holds no complete checkpoint")
    elif not arguments.path.is_dir():
        raise CheckpointError(f"{arguments.path}: no such folder")
    are_intact = [_is_intact(path) for path in paths]
    return 0 if all(are_intact) else EXIT_FAILED


def _is_intact(path: Path) -> bool:
    try:
        manifest, _ = open_verified(path)
    except DamagedError as error:
        what = "DAMAGED" if layout.is_complete(path) else "UNFINISHED"
        print(f"{path}: {what}\n  {str(error).removeprefix(f'{path}: ')}", flush=True)
        return False
    tensors = manifest.tensors
    total = 2 * sum(file.size_bytes for file in manifest.files.values())
    problems, done, told_s = [], 0, time.monotonic()
    for num_bytes, problem in verify(path, manifest):
        done += num_bytes
        problems += [problem] if problem else []
        if time.monotonic() - told_s > _PROGRESS_S:
            told_s = time.monotonic()
            print(f"{path}: {human(done)} of {human(total)} read", file=sys.stderr, flush=True)
    counts = f"{len(manifest.files)} files, {len(tensors)} tensors, {human(total / 2)}"
    lines = [f"{path}: {'DAMAGED' if problems else 'as written'} ({counts})"]
    print("\n".join([*lines, *(f"  - {problem}" for problem in problems)]), flush=True)
    return not problems
