"""Disks that fail during a save: all ranks hear of it at one step, and nothing is lost."""

import math
import threading
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsv2_train.checkpoint import async_save
from dsv2_train.checkpoint.dcp import write
from dsv2_train.checkpoint.disk import integrity, layout
from dsv2_train.checkpoint.disk.errors import CheckpointError, SaveError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.checkpoint.staging import Staging
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed.sharding import Piece
from dsv2_train.recipe.clock import Point
from dsv2_train.train import loop
from dsv2_train.train.run import Run
from dsv2_train.train.telemetry.telemetry import StepResult
from tests.helpers.corpus import synthetic_folder
from tests.helpers.faults import (
    OF_A_DISK,
    OF_A_RANK,
    Fault,
    held_writing,
    no_space,
    small_disk,
    work_behind,
)
from tests.helpers.run import Owned, add_up, before_step, close_run, open_run, owned, run_config
from tests.helpers.world import World

SMALL = 50_000
SAID = {
    "no_space": "OSError: [Errno 28] No space left on device",
    "limited_files": "OSError: [Errno 27] File too large",
    "vanishing_folder": "",  # what is said depends on who looks first
    "full_disk": "No space left on device",
    "read_only": "Read-only file system",
}


def state_of(step: int) -> TrainState:
    return TrainState(step, step, step, step)


def verified(path: Path) -> bool:
    """Whether every byte of a checkpoint is as it was written."""
    manifest, _ = integrity.open_verified(path)
    return integrity.crc_problems(path, manifest, manifest.files) == []


def three_saves(
    rank: int, size: int, folder: Path, fault: Fault, failing: int, asynchronous: bool
) -> list[str]:
    """The second of three saves meets a fault on one rank; what this rank heard of each."""
    piece = Piece("weight/a", (size * SMALL,), rank * SMALL, torch.ones(SMALL))
    staging = Staging([piece]) if asynchronous else None
    manager = CheckpointManager(folder / "checkpoints", 1, staging=staging)
    return [
        save(manager, piece, 1),
        save(manager, piece, 2, fault, folder if rank == failing else None),
        save(manager, piece, 3),
    ]


def save(
    manager: CheckpointManager,
    piece: Piece,
    step: int,
    fault: Fault | None = None,
    faulty: Path | None = None,
) -> str:
    with ExitStack() as stack:
        if fault is not None and faulty is not None:
            stack.enter_context(fault(faulty))
        dist.barrier()
        try:
            manager.save_async(state_of(step), [piece], "a: 1\n")
            while manager.under_way is not None:
                manager.poll()
        except CheckpointError as error:
            return str(error)
        finally:
            dist.barrier()
    return "saved"


def slow_write(rank: int, folder: Path) -> list[bool]:
    """The second rank's writing is held for three polls; whether a checkpoint is there by then."""
    piece = Piece("weight/a", (2 * SMALL,), rank * SMALL, torch.ones(SMALL))
    manager = CheckpointManager(folder, 1, staging=Staging([piece]))
    with held_writing() if rank == 1 else nullcontext(threading.Event()) as gate:
        manager.save_async(state_of(1), [piece], "a: 1\n")
        heard = [manager.poll() is not None for _ in range(3)]
        gate.set()
        return [*heard, manager.wait() is not None]


def slow_pieces(rank: int, folder: Path) -> tuple[str, float]:
    """The first rank cannot write; the second one would for 40 s. What is heard, and when."""
    shape = (2 * SMALL,)
    pieces = [Piece(f"weight/{i}", shape, rank * SMALL, torch.ones(SMALL)) for i in range(400)]
    manager = CheckpointManager(folder, 1, staging=Staging(pieces))
    tensor_checksum = write.tensor_checksum

    def slow(data: Tensor, offset: int) -> int:
        """Called once a piece."""
        time.sleep(0.1)
        return tensor_checksum(data, offset)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as faults:
        if rank == 0:
            faults.enter_context(no_space(folder))
        else:
            patch.setattr(write, "tensor_checksum", slow)
        start_s = time.monotonic()
        manager.save_async(state_of(1), pieces, "a: 1\n")
        try:
            while manager.poll() is None:
                time.sleep(0.05)
        except SaveError as error:
            return str(error), time.monotonic() - start_s
    return "saved", 0.0


def test_a_failure_is_heard_while_others_write(world: World, tmp_path: Path) -> None:
    heard = world.run(slow_pieces, 2, tmp_path)
    assert heard[0][0] == heard[1][0]
    assert "rank 0: OSError: [Errno 28]" in heard[0][0]
    assert max(elapsed_s for _, elapsed_s in heard) < 20, "not the 40 s of the others"
    assert list(tmp_path.iterdir()) == []


def nothing_finite(rank: int, config: RunConfig) -> str:
    """A run whose third step is bad; the checkpoint of the second is under way."""
    run = open_run(rank, config)
    write_all, measure = async_save.write, loop.measure

    def slow(*args: Any) -> Any:
        time.sleep(1.0)
        return write_all(*args)

    def spoilt(run: Run, point: Point) -> StepResult:
        result = measure(run, point)
        return replace(result, grad_norm=math.nan) if run.clock.step == 2 else result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_save, "write", slow)
        patch.setattr(loop, "measure", spoilt)
        try:
            loop.train(run)
        except FloatingPointError as error:
            return str(error)
        finally:
            close_run(run)
    return "trained"


def test_a_guard_costs_no_checkpoint_that_is_under_way(world: World, tmp_path: Path) -> None:
    config = config_of(tmp_path, 2, "stop", True)
    guards = config.guards.model_copy(update={"non_finite": "stop"})
    config = config.model_copy(update={"guards": guards})
    for said in world.run(nothing_finite, 2, config):
        assert said.startswith("step 3: ") and "the run stops" in said
    assert steps_saved(config) == [2]


def test_nobody_waits_for_a_rank_that_is_slow(world: World, tmp_path: Path) -> None:
    assert world.run(slow_write, 2, tmp_path) == [[False, False, False, True]] * 2


def check(heard: list[list[str]], folder: Path, fault: Fault, failing: int) -> None:
    assert all(each == heard[0] for each in heard), "all ranks hear the same"
    first, second, third = heard[0]
    assert (first, third) == ("saved", "saved")
    assert second.startswith("the checkpoint of step 2 could not be written to")
    assert SAID[fault.__name__] in second
    if fault in (no_space,):
        assert f"rank {failing}: " in second
    complete = layout.complete_checkpoints(folder / "checkpoints")
    assert [layout.step_of(path) for path in complete] == [1, 3]
    assert all(map(verified, complete))
    assert sorted((folder / "checkpoints").iterdir()) == complete, "nothing is left behind"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "behind"])
@pytest.mark.parametrize("fault", OF_A_RANK)
@pytest.mark.parametrize(("size", "failing"), [(1, 0), (2, 0), (2, 1)])
def test_one_rank_cannot_write(
    world: World, tmp_path: Path, size: int, failing: int, fault: Fault, asynchronous: bool
) -> None:
    heard = world.run(three_saves, size, size, tmp_path, fault, failing, asynchronous)
    check(heard, tmp_path, fault, failing)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "behind"])
@pytest.mark.parametrize("fault", OF_A_DISK)
@pytest.mark.parametrize("size", [1, 2])
def test_a_disk_that_is_full_or_read_only(
    world: World, tmp_path: Path, size: int, fault: Fault, asynchronous: bool
) -> None:
    with small_disk(tmp_path / "disk"):
        folder = tmp_path / "disk"
        heard = world.run(three_saves, size, size, folder, fault, 0, asynchronous)
        check(heard, folder, fault, 0)


@dataclass(frozen=True)
class Ended:
    """How a rank's run ended.

    Attributes:
        step: at which.
        error: what `train` raised, or nothing.
        alerts: what people were told, on the rank that tells.
        state: this rank's.
    """

    step: int
    error: str
    alerts: list[str]
    state: list[Owned]


def train(
    rank: int, config: RunConfig, faulty_step: int, failing: int, lasting: bool = False
) -> Ended:
    """Train; from the given step on, for one attempt or all of them, one rank cannot write."""
    run = open_run(rank, config)
    alerts: list[str] = []
    if run.monitor is not None:
        # The run is the test's and ends with it: nothing has to be put back.
        run.monitor.alert = lambda _, text: alerts.append(text)  # type: ignore[method-assign]
    with work_behind() as given, ExitStack() as faults:

        def begin() -> None:
            if run.clock.step >= faulty_step - 1 and run.checkpoints.under_way is not None:
                given[-1].exception()  # it meets the fault if it is to, and no other does
            if rank == failing and run.clock.step == faulty_step - 1:
                faults.enter_context(no_space(config.run.folder))
            if run.clock.step >= faulty_step and not lasting:
                faults.close()

        before_step(run, begin)
        error = ""
        try:
            loop.train(run)
        except CheckpointError as raised:
            error = str(raised)
    close_run(run)
    return Ended(run.clock.step, error, alerts, owned(run))


def config_of(folder: Path, size: int, on_failure: str, asynchronous: bool) -> RunConfig:
    return run_config(
        folder,
        synthetic_folder(folder / "data"),
        f"parallel.world_size={size}",
        f"parallel.pp={size}",
        "checkpoint.every_steps=2",
        f"checkpoint.on_failure={on_failure}",
        f"checkpoint.asynchronous={asynchronous}",
    )


def steps_saved(config: RunConfig) -> list[int | None]:
    complete = layout.complete_checkpoints(config.run.checkpoint_folder)
    assert all(map(verified, complete))
    assert sorted(config.run.checkpoint_folder.iterdir()) == complete
    return [layout.step_of(path) for path in complete]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "behind"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_goes_on(world: World, tmp_path: Path, size: int, asynchronous: bool) -> None:
    config = config_of(tmp_path / "faulty", size, "go_on", asynchronous)
    ended = world.run(train, size, config, 4, size - 1)
    assert [(each.step, each.error) for each in ended] == [(6, "")] * size
    [alert] = ended[0].alerts
    heard_at = 5 if asynchronous else 4
    assert alert.startswith(f"step {heard_at}: the checkpoint of step 4 could not be written")
    assert "it is tried again at the next step" in alert
    assert steps_saved(config) == [2, 5, 6]
    undisturbed = config_of(tmp_path / "undisturbed", size, "go_on", asynchronous)
    expected = world.run(train, size, undisturbed, 100, 0)
    assert add_up([each.state for each in ended]) == add_up([each.state for each in expected])
    assert steps_saved(undisturbed) == [2, 4, 6]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "behind"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_stops(world: World, tmp_path: Path, size: int, asynchronous: bool) -> None:
    config = config_of(tmp_path, size, "stop", asynchronous)
    ended = world.run(train, size, config, 4, size - 1, True)
    step = 6 if asynchronous else 5
    assert [each.step for each in ended] == [step] * size, "all ranks, at the same step"
    [alert] = ended[0].alerts
    assert "the checkpoint of step 4 could not be written" in alert, "and was tried again"
    for each in ended:
        assert each.error.startswith(f"step {step}: the checkpoint of step 5 could not be written")
        assert each.error.endswith("the newest complete checkpoint, which is as it was")
    assert steps_saved(config) == [2]
    again = world.run(train, size, config, 100, 0)
    assert [(each.step, each.error) for each in again] == [(6, "")] * size


@pytest.mark.parametrize("size", [1, 2])
def test_the_last_checkpoint_must_be_written(world: World, tmp_path: Path, size: int) -> None:
    config = config_of(tmp_path, size, "go_on", True)
    for each in world.run(train, size, config, 6, size - 1):
        assert each.step == 6
        assert "the checkpoint of step 6 could not be written" in each.error
        assert "for room: `dsv2 checkpoint prune`" in each.error
        assert each.error.endswith("the newest complete checkpoint, which is as it was")
    assert steps_saved(config) == [2, 4]
