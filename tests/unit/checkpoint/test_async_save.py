"""A checkpoint written behind training is the blocking one, of the moment it was begun."""

import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv2_train.checkpoint.async_save import Finished
from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.errors import CheckpointError, SaveError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.checkpoint.staging import Staging
from dsv2_train.distributed.sharding import Piece
from tests.helpers.faults import Write, data_written_by, held_writing, no_space
from tests.helpers.tensors import blank, drawn, equal, pieces_of

STATE = TrainState(1, 2, 128, 1)
CONFIG = "run:\n  name: test\n"


SHAPES = {
    "weight/a": (30, 7),
    "master/a": (30, 7),
    "weight/none": (0, 3),
    "master/large": (1100, 1001),
}


def tensors() -> dict[str, Tensor]:
    return drawn(SHAPES)


def manager_of(folder: Path) -> CheckpointManager:
    return CheckpointManager(folder, every_steps=1, staging=Staging(pieces_of(tensors())))


def test_the_files_are_those_of_a_blocking_save(tmp_path: Path) -> None:
    blocking = CheckpointManager(tmp_path / "blocking", 1)
    behind = manager_of(tmp_path / "behind")
    path = blocking.save(STATE, pieces_of(tensors()), CONFIG)
    behind.save_async(STATE, pieces_of(tensors()), CONFIG)
    finished = behind.wait()
    assert finished is not None
    assert finished.step == STATE.step
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        file.name: file.read_bytes() for file in finished.path.iterdir()
    }


def changed_while_written(folder: Path) -> bool:
    """Whether what is saved has changed with the weights after `save_async` returned."""
    manager, values = manager_of(folder), tensors()
    with held_writing() as gate:
        manager.save_async(STATE, pieces_of(values), CONFIG)
        for value in values.values():
            value.add_(1)
        gate.set()
        manager.wait()
    loaded = blank(values)
    assert manager.restore(pieces_of(loaded)) == STATE
    return not equal(loaded, tensors())


def test_what_is_written_is_what_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not changed_while_written(tmp_path / "copied")
    monkeypatch.setattr(Staging, "copy", lambda _, pieces: pieces)
    assert changed_while_written(tmp_path / "not copied"), "the test sees a missing copy"


def test_polling_does_not_wait(tmp_path: Path) -> None:
    manager = manager_of(tmp_path)
    assert manager.poll() is None
    with held_writing() as gate:
        manager.save_async(STATE, pieces_of(tensors()), CONFIG)
        assert manager.under_way == STATE.step
        assert [manager.poll() for _ in range(3)] == [None] * 3
        assert layout.latest_complete(tmp_path) is None
        gate.set()
        finished = poll_to_the_end(manager)
    assert finished.path == layout.latest_complete(tmp_path)
    assert manager.under_way is None


def poll_to_the_end(manager: CheckpointManager) -> Finished:
    pause = threading.Event()
    for _ in range(6000):
        finished = manager.poll()
        if finished is not None:
            return finished
        pause.wait(0.01)
    raise TimeoutError("still under way")


def test_at_most_one_is_under_way(tmp_path: Path) -> None:
    manager = manager_of(tmp_path)
    with held_writing() as gate:
        manager.save_async(STATE, pieces_of(tensors()), CONFIG)
        threading.Timer(0.1, gate.set).start()
        manager.save_async(replace(STATE, step=2), pieces_of(tensors()), CONFIG)
        assert layout.latest_complete(tmp_path) == layout.step_folder(tmp_path, 1)
        assert manager.under_way == 2
    assert manager.save(replace(STATE, step=3), pieces_of(tensors()), CONFIG).name.endswith("3")
    assert [layout.step_of(path) for path in layout.complete_checkpoints(tmp_path)] == [1, 2, 3]


def test_without_memory_to_copy_to_it_is_written_at_once(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, 1)
    manager.save_async(STATE, pieces_of(tensors()), CONFIG)
    assert manager.under_way is None
    assert layout.latest_complete(tmp_path) is not None


def test_a_complete_checkpoint_is_not_begun_again(tmp_path: Path) -> None:
    manager = manager_of(tmp_path)
    manager.save(STATE, pieces_of(tensors()), CONFIG)
    manager.save_async(STATE, pieces_of(tensors()), CONFIG)
    assert manager.under_way is None


def test_memory_is_known_and_used_again() -> None:
    values = pieces_of(tensors())
    staging = Staging(values)
    rounded = [448, 896, 0, 4404416]  # 420, 840, 0 and 4404400 bytes
    assert staging.size_bytes == sum(rounded)
    places = [[piece.data.data_ptr() for piece in staging.copy(values)] for _ in range(2)]
    assert places[0] == places[1]
    with torch.profiler.profile(profile_memory=True) as profile:
        staging.copy(values)
    assert max((event.cpu_memory_usage for event in profile.events()), default=0) == 0


def test_too_little_memory_is_told_at_the_start() -> None:
    huge = Piece("weight/a", (1 << 60,), 0, torch.zeros(1).expand(1 << 60))
    with pytest.raises(CheckpointError, match="needs 4,611,686,018,427,387,904 bytes of host mem"):
        Staging([huge])


def test_what_the_disk_gives_back_is_what_was_written(tmp_path: Path) -> None:
    def another(write: Write, descriptor: int, data: memoryview) -> int:
        return write(descriptor, memoryview(bytes([data[0] ^ 1, *data[1:]])))

    manager = manager_of(tmp_path)
    with data_written_by(another):
        manager.save_async(STATE, pieces_of({"weight/a": torch.ones(9)}), CONFIG)
        with pytest.raises(SaveError, match=r"__0_0\.distcp: the disk gives back other bytes than"):
            manager.wait()
    assert list(tmp_path.iterdir()) == []
    manager.save_async(STATE, pieces_of({"weight/a": torch.ones(9)}), CONFIG)
    assert manager.wait() is not None


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_due_once_more(tmp_path: Path, asynchronous: bool) -> None:
    values = pieces_of({"weight/a": torch.ones(99)})
    staging = Staging(values) if asynchronous else None
    manager = CheckpointManager(tmp_path, 10, staging=staging)

    def attempt(step: int) -> list[bool]:
        """Whether the next steps are due after a save."""
        with suppress(SaveError):
            manager.save_async(replace(STATE, step=step), values, CONFIG)
            manager.wait()
        return [manager.due(step) for step in (11, 20)]

    with no_space(tmp_path):
        assert [attempt(step) for step in (10, 11, 12, 13)] == [[True, True], [False, True]] * 2
        assert attempt(10) == [True, True]
    assert attempt(11) == [False, True]
    with no_space(tmp_path):
        assert attempt(20) == [True, True], "after one that is good, the next is the first again"


def test_a_failure_is_heard_at_the_next_poll_and_the_next_save_succeeds(tmp_path: Path) -> None:
    manager = manager_of(tmp_path)
    with no_space(tmp_path):
        manager.save_async(STATE, pieces_of(tensors()), CONFIG)
        with pytest.raises(CheckpointError) as error:
            poll_to_the_end(manager)
    assert str(error.value) == (
        f"the checkpoint of step 1 could not be written to {tmp_path}:\n"
        "rank 0: OSError: [Errno 28] No space left on device"
    )
    assert manager.under_way is None
    assert list(tmp_path.iterdir()) == [], "a full disk is given back what the attempt took"
    manager.save_async(STATE, pieces_of(tensors()), CONFIG)
    assert manager.wait() is not None
