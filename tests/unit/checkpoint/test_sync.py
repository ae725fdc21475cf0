"""Power may fail at any moment: what is renamed and marked is on the disk before."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv2_train.checkpoint.disk import layout, lifecycle
from dsv2_train.checkpoint.disk.atomic_folder import new_folder
from dsv2_train.checkpoint.disk.errors import SaveError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.checkpoint.staging import Staging
from dsv2_train.distributed.sharding import Piece

STATE = TrainState(10, 80, 1920, 10)
PIECES = [
    Piece("weight/a", (1200, 1024), 0, torch.ones(1200 * 1024)),
    Piece("b", (3,), 0, torch.ones(3)),
]
Event = tuple[str, Path, int]  # what was done to which path, and its length then


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What is done to files and folders, in order."""
    found: list[Event] = []

    def recorded(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(first: Any, *more: Any) -> Any:
            path = Path(os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first)
            result = function(first, *more)
            found.append((what, path, path.stat().st_size if path.is_file() else 0))
            return result

        return record

    monkeypatch.setattr(os, "fsync", recorded("sync", os.fsync))
    monkeypatch.setattr(os, "fdatasync", recorded("sync data", os.fdatasync))
    monkeypatch.setattr(os, "rename", recorded("rename", os.rename))
    monkeypatch.setattr(shutil, "rmtree", recorded("delete", shutil.rmtree))
    return found


def save(path: Path, behind: bool = False) -> Path:
    manager = CheckpointManager(path, 10, staging=Staging(PIECES) if behind else None)
    manager.save_async(STATE, PIECES, "run: {}\n")
    manager.wait()
    return layout.step_folder(path, STATE.step)


@pytest.mark.parametrize("behind", [False, True])
def test_a_save_is_on_the_disk_before_it_is_renamed_and_marked(
    tmp_path: Path, events: list[Event], behind: bool
) -> None:
    checkpoints = tmp_path / "runs" / "name" / "checkpoints"
    final = save(checkpoints, behind)
    temporary = checkpoints / ".tmp_step_00000010"
    renamed = events.index(("rename", temporary, 0))
    before, behind_it = events[:renamed], events[renamed + 1 :]
    files = [path for path in final.iterdir() if path.name != layout.MARKER]
    assert len(files) == 5
    for path in files:
        assert ("sync", temporary / path.name, path.stat().st_size) in before
    assert before[-1] == ("sync", temporary, 0), "its entries, when all are there"
    for parent in (checkpoints, *checkpoints.parents[:3]):
        assert ("sync", parent, 0) in before, "the first save makes them"
    marker = final / layout.MARKER
    assert behind_it == [
        ("sync", checkpoints, 0),
        ("sync", marker, marker.stat().st_size),
        ("sync", final, 0),
    ]


LARGE = Piece("weight/a", (9 << 20,), 0, torch.ones(9 << 20))  # 36 MiB; 32 go to the disk at once


def test_large_files_go_to_the_disk_on_the_way(tmp_path: Path, events: list[Event]) -> None:
    CheckpointManager(tmp_path, 10).save(STATE, [LARGE], "")
    assert ("sync data", tmp_path / ".tmp_step_00000010" / layout.data_file(0)) in [
        event[:2] for event in events
    ]


def test_what_the_disk_says_of_the_last_part_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells an error once: the sync at the end of the file may know nothing of it."""

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(SaveError, match="Input/output error"):
        CheckpointManager(tmp_path, 10).save(STATE, [LARGE], "")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_moved_aside_is_so_on_the_disk(tmp_path: Path, events: list[Event]) -> None:
    path = save(tmp_path)
    del events[:]
    lifecycle.set_aside(path)
    assert events == [("rename", path, 0), ("sync", tmp_path, 0)]


def test_a_checkpoint_is_deleted_when_its_name_is_gone(tmp_path: Path, events: list[Event]) -> None:
    path = save(tmp_path)
    del events[:]
    lifecycle.remove(path)
    removed = tmp_path / ".tmp_removed_step_00000010"
    assert events == [("rename", path, 0), ("sync", tmp_path, 0), ("delete", removed, 0)]


def test_a_marker_that_is_written_again_is_on_the_disk(tmp_path: Path, events: list[Event]) -> None:
    path = save(tmp_path)
    (path / layout.MARKER).unlink()
    del events[:]
    lifecycle.mark(path)
    marker = path / layout.MARKER
    assert events == [("sync", marker, marker.stat().st_size), ("sync", path, 0)]


def test_parents_of_a_new_folder_are_synced(tmp_path: Path, events: list[Event]) -> None:
    with new_folder(tmp_path / "a" / "b", 0) as path:
        (path / "file").write_text("mine")
    synced = [path for what, path, _ in events if what == "sync"]
    assert {tmp_path, tmp_path / "a"} <= set(synced)
