"""`dsv2 checkpoint verify`: is every byte of a checkpoint as it was written?"""

import argparse
import sys
import time
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError, DamagedError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.verify import verify
from dsv2_train.cli.checkpoint.folders import folder_of_run, human
from dsv2_train.cli.main import EXIT_FAILED

_PROGRESS_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.description = (
        "Read every file and every tensor and hold them against the manifest. Needs no GPU and a "
        "few MiB of memory. What a run beside it removes meanwhile does not count. Exit status: 0 "
        "all as written, 1 damaged or without marker, 2 nothing to verify."
    )
    parser.add_argument("path", type=Path, help="a checkpoint, or a run folder (all of its)")


def run(arguments: argparse.Namespace) -> int:
    """Verify, and tell of each checkpoint what is wrong with it.

    Raises:
        CheckpointError: where there is no checkpoint.
    """
    paths = [arguments.path]
    if layout.step_of(arguments.path) is None:
        folder = folder_of_run(arguments.path)
        paths = layout.step_folders(folder)
        if not paths:
            raise CheckpointError(f"{folder}: holds no checkpoint of a step")
    elif not arguments.path.is_dir():
        raise CheckpointError(f"{arguments.path}: no such folder")
    are_intact = [_is_intact(path) for path in paths]
    return 0 if all(are_intact) else EXIT_FAILED


def _is_intact(path: Path) -> bool:
    try:
        manifest, _ = open_verified(path, need_marker=False)
    except DamagedError as error:
        if not path.exists():
            return _is_gone(path)
        print(f"{path}: DAMAGED\n  {str(error).removeprefix(f'{path}: ')}", flush=True)
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
    if not path.exists():
        return _is_gone(path)
    if not layout.is_complete(path):
        problems.append(f"{layout.MARKER}: missing")
    counts = f"{len(manifest.files)} files, {len(tensors)} tensors, {human(total / 2)}"
    lines = [f"{path}: {'DAMAGED' if problems else 'as written'} ({counts})"]
    print("\n".join([*lines, *(f"  - {problem}" for problem in problems)]), flush=True)
    return not problems


def _is_gone(path: Path) -> bool:
    print(f"{path}: removed meanwhile", flush=True)
    return True
