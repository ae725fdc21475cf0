"""What is removed, and that whatever interrupts it leaves nothing that looks complete."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2_train.checkpoint.disk import layout, lifecycle
from dsv2_train.checkpoint.disk.errors import SaveError
from dsv2_train.checkpoint.disk.retention import Retention, prune, to_remove
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.checkpoint.staging import Staging
from dsv2_train.distributed.sharding import Piece
from tests.helpers.faults import no_space

PIECES = [Piece("weight/a", (6,), 0, torch.arange(6.0))]
STATE = TrainState(1, 2, 128, 1)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "removed"),
    [
        (None, None, []),
        (1, None, [10, 20, 30, 40]),
        (3, None, [10, 20]),
        (5, None, []),
        (9, None, []),
        (1, 20, [10, 30]),
        (2, 10, []),
        (1, 7, [10, 20, 30, 40]),
    ],
)
def test_to_remove(keep_last: int | None, keep_every: int | None, removed: list[int]) -> None:
    assert to_remove([30, 10, 50, 20, 40], Retention(keep_last, keep_every)) == removed


@given(
    steps=st.sets(st.integers(0, 500)),
    keep_last=st.none() | st.integers(1, 10),
    keep_every=st.none() | st.integers(1, 50),
)
def test_the_laws(steps: set[int], keep_last: int | None, keep_every: int | None) -> None:
    removed = set(to_remove(steps, Retention(keep_last, keep_every)))
    kept = steps - removed
    assert removed <= steps
    assert not steps or max(steps) in kept
    assert all(keep_every is None or step % keep_every for step in removed)
    assert keep_last is not None or not removed
    assert removed == set() or len([s for s in kept if s > max(removed)]) >= (keep_last or 0)
    assert to_remove(kept, Retention(keep_last, keep_every)) == [], "once is enough"


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


def save(manager: CheckpointManager, step: int) -> None:
    manager.save(replace(STATE, step=step), PIECES, "")


@pytest.mark.parametrize("behind", [False, True])
def test_a_save_removes_what_is_not_kept(tmp_path: Path, behind: bool) -> None:
    staging = Staging(PIECES) if behind else None
    manager = CheckpointManager(tmp_path, 10, staging=staging, retention=Retention(2, 30))
    for step in range(10, 70, 10):
        manager.save_async(replace(STATE, step=step), PIECES, "")
        manager.wait()
    assert names(tmp_path) == ["step_00000030", "step_00000050", "step_00000060"]


def test_a_smaller_retention_makes_room_before_the_save(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(CheckpointManager(tmp_path, 10), step)
    with no_space(tmp_path), pytest.raises(SaveError):
        save(CheckpointManager(tmp_path, 10, retention=Retention(1)), 40)
    assert names(tmp_path) == ["step_00000030"]


def test_damaged_and_unfinished_ones_are_no_business_of_it(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 10)
    for step in (10, 20, 30, 40):
        save(manager, step)
    (tmp_path / "step_00000010" / layout.MARKER).unlink()
    lifecycle.set_aside(tmp_path / "step_00000020")
    prune(tmp_path, Retention(1))
    assert names(tmp_path) == ["damaged_step_00000020", "step_00000010", "step_00000040"]


def test_a_removal_that_is_interrupted_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path, 10)
    for step in (10, 20, 30):
        save(manager, step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, Retention(1))
    assert [layout.step_of(path) for path in layout.step_folders(tmp_path)] == [20, 30]
    prune(tmp_path, Retention(1))
    save(manager, 40)
    assert names(tmp_path) == ["step_00000030", "step_00000040"], "the next save clears the rest"


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run", 10)
    for step in (10, 20):
        save(manager, step)
    elsewhere = tmp_path / "large disk"
    layout.step_folder(manager.folder, 10).rename(elsewhere)
    layout.step_folder(manager.folder, 10).symlink_to(elsewhere)
    prune(manager.folder, Retention(1))
    assert names(manager.folder) == ["step_00000020"]
    assert layout.MARKER in names(elsewhere)


def test_whatever_is_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".tmp_step_00000010").write_text("a file")
    (folder / ".tmp_removed_step_00000005").symlink_to(tmp_path / "elsewhere")
    (folder / ".tmp_step_00000020").symlink_to("nowhere")
    save(CheckpointManager(folder, 10), 10)
    assert names(folder) == ["step_00000010"]
    assert (tmp_path / "elsewhere").is_dir()


def test_a_removal_that_was_killed_is_finished_though_nothing_is_to_be_saved(
    tmp_path: Path,
) -> None:
    """As by the end of a run that was killed in the removal behind its last save."""
    save(CheckpointManager(tmp_path, 10), 10)
    save(CheckpointManager(tmp_path, 10), 20)
    (tmp_path / ".tmp_removed_step_00000005").mkdir()
    save(CheckpointManager(tmp_path, 10, retention=Retention(1)), 20)
    assert names(tmp_path) == ["step_00000020"]


def test_what_cannot_be_cleared_keeps_nothing_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [tmp_path / ".tmp_step_00000010", tmp_path / ".tmp_removed_step_00000005"]
    for path in left:
        path.mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(CheckpointManager(tmp_path, 10), 10)
    told = capsys.readouterr().err
    assert all(
        f"cannot be removed: [Errno 13] Permission denied: '{path}'" in told for path in left
    )
    assert layout.complete_checkpoints(tmp_path) == [tmp_path / "step_00000010"]


def test_a_name_that_is_taken_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "step_00000010").symlink_to("nowhere")
    (tmp_path / "step_00000020").write_text("a file")
    manager = CheckpointManager(tmp_path, 10)
    for step in (10, 20):
        save(manager, step)
    assert [layout.step_of(path) for path in layout.complete_checkpoints(tmp_path)] == [10, 20]
    assert (tmp_path / "damaged_step_00000020").read_text() == "a file"


def interrupt(path: Path) -> None:
    (path / layout.CONFIG).unlink()
    raise KeyboardInterrupt


def test_what_cannot_be_removed_is_told_and_the_save_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = CheckpointManager(tmp_path, 10, retention=Retention(1))
    save(manager, 10)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(manager, 20)
    told = capsys.readouterr().err
    assert "step_00000010: no longer needed, but it could not be removed: [Errno 13]" in told
    assert layout.complete_checkpoints(tmp_path) == [tmp_path / "step_00000020"]
