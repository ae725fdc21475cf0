"""`dsv2 checkpoint ls`: what checkpoints a run has."""

import argparse
from datetime import datetime
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.cli.checkpoint.folders import everything, folder_of_run, human, size_of
from dsv2_train.config.load import read_values
from dsv2_train.config.problems import ConfigError

_UNMARKED = f"complete but for {layout.MARKER}; a run takes it if its tensors are as written"
_COLUMNS = ("checkpoint", "step", "tokens", "size", "written", "layout", "state")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.description = (
        "List the checkpoints of a run, and what else is there: unfinished ones and damaged ones "
        "that were moved aside. Reads small files only; `dsv2 checkpoint verify` reads everything. "
        "What a run beside it removes meanwhile is not listed."
    )
    parser.add_argument("run_folder", type=Path, help="a run folder, or its checkpoints folder")


def run(arguments: argparse.Namespace) -> int:
    """Print a line a checkpoint.

    Raises:
        CheckpointError: where there is none.
    """
    folder = folder_of_run(arguments.run_folder)
    rows = [_COLUMNS, *filter(None, map(_row, everything(folder)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, _COLUMNS, strict=True)
        print("  ".join(_aligned(text, width, column) for text, width, column in cells).rstrip())
    return 0


def _aligned(text: str, width: int, column: str) -> str:
    return text.rjust(width) if column in ("step", "tokens", "size") else text.ljust(width)


def _row(path: Path) -> tuple[str, ...] | None:
    """What is in each column; None if the checkpoint is gone by now."""
    step, tokens, placed, state = "", "", "", "left by a save or a removal, or one is at work"
    if path.name.startswith("damaged_"):
        state = "damaged or unfinished, moved aside"
    elif path.name.startswith("rolled_back_"):
        state = "the run went back behind it, moved aside"
    elif layout.step_of(path) is not None:
        step, tokens, placed, state = _contents(path)
    size = human(size_of(path))
    try:
        written = datetime.fromtimestamp(path.lstat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
    except FileNotFoundError:
        return None
    return path.name, step, tokens, size, written, placed, state


def _contents(path: Path) -> tuple[str, str, str, str]:
    step = f"{layout.step_of(path):,}"
    try:
        _, clock = open_verified(path, need_marker=False)
        placed = _layout_of(path / layout.CONFIG)
    except (CheckpointError, ConfigError) as error:
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())
        return step, "", "", f"damaged: {reason}"
    state = "complete" if layout.is_complete(path) else _UNMARKED
    return step, f"{clock.consumed_tokens:,}", placed, state


def _layout_of(config: Path) -> str:
    """What a configuration says of its ranks; nothing if it says nothing, as an imported one."""
    parallel = read_values(config).get("parallel")
    if not isinstance(parallel, dict):
        return ""
    words = [f"{parallel.get('world_size')} ranks"]
    words += [f"{key.upper()}{parallel.get(key)}" for key in ("pp", "ep")]
    return " ".join([*words, str(parallel.get("schedule"))])
