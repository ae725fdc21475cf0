"""`dsv2 checkpoint prune`: remove checkpoints that are not to be kept."""

import argparse
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.lifecycle import remove
from dsv2_train.checkpoint.disk.retention import Retention, superseded
from dsv2_train.cli.checkpoint.folders import folder_of_run, human, size_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.description = (
        "Remove complete checkpoints but the newest N and, with --keep-every, those whose step is "
        "a multiple of K. Damaged ones that were moved aside are left for you to remove. Reads "
        "small files only: `dsv2 checkpoint verify` tells first whether those that stay are intact."
    )
    parser.add_argument("run_folder", type=Path, help="a run folder, or its checkpoints folder")
    parser.add_argument("--keep-last", type=_count, required=True, metavar="N", help="at least 1")
    parser.add_argument("--keep-every", type=_count, metavar="K", help="steps")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, remove nothing")


def run(arguments: argparse.Namespace) -> int:
    """Remove, and tell what is freed.

    Raises:
        CheckpointError: where there is none, for a newest one whose small files are damaged, and
            for one that cannot be removed.
    """
    folder = folder_of_run(arguments.run_folder)
    paths = superseded(folder, Retention(arguments.keep_last, arguments.keep_every))
    if paths:
        _require_intact(layout.complete_checkpoints(folder)[-1])
    word = "would be removed" if arguments.dry_run else "removed"
    count = freed = 0
    for path in paths:
        size = size_of(path)
        if not arguments.dry_run:
            try:
                remove(path)
            except FileNotFoundError:
                continue  # the run beside it has removed it
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be removed: {error.strerror}") from error
        print(f"{path}: {word}, {human(size)}")
        freed += size
        count += 1
    print(f"{count} checkpoints {word}, {human(freed)}")
    return 0


def _require_intact(newest: Path) -> None:
    """Remove nothing that a run would fall back on."""
    try:
        open_verified(newest)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nit is the newest: nothing is removed") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; must be a whole number, at least 1")
    return int(text)
