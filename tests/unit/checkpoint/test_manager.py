"""A checkpoint is there entirely or not at all, comes back bit for bit, and damage is named."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dsv2_train.checkpoint.disk import integrity, layout, lifecycle
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.distributed.sharding import Piece
from tests.helpers.tensors import blank, drawn, equal, pieces_of

STATE = TrainState(100, 200, 12800, 100, "a1b2")
CONFIG = "run:\n  name: test\n"


SHAPES = {"weight/a": (30, 7), "master/a": (30, 7), "weight/large": (1100, 1001)}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    values = drawn(SHAPES, seed)
    return {**values, "moment/a": values["master/a"].double() / 3}


def fresh() -> dict[str, Tensor]:
    return blank(tensors())


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints", every_steps=100)


@pytest.fixture
def saved(manager: CheckpointManager) -> Path:
    return manager.save(STATE, pieces_of(tensors()), CONFIG)


def test_due(manager: CheckpointManager) -> None:
    assert [step for step in range(301) if manager.due(step)] == [100, 200, 300]


def test_round_trip_is_bitwise(manager: CheckpointManager, saved: Path) -> None:
    loaded = fresh()
    assert manager.restore(pieces_of(loaded)) == STATE
    assert equal(loaded, tensors())
    assert (saved / layout.CONFIG).read_text() == CONFIG


def test_nothing_to_restore(manager: CheckpointManager) -> None:
    loaded = fresh()
    assert manager.restore(pieces_of(loaded)) is None
    assert equal(loaded, fresh())


def test_parameters_that_require_gradients(manager: CheckpointManager) -> None:
    parameter = torch.nn.Parameter(torch.randn(5, 3))
    before = parameter.detach().clone()
    piece = Piece("weight/p", (5, 3), 0, parameter.view(-1))
    manager.save(STATE, [piece], CONFIG)
    with torch.no_grad():
        parameter.zero_()
    manager.restore([piece])
    assert torch.equal(parameter, before)


def test_restores_in_other_pieces_than_were_saved(manager: CheckpointManager, saved: Path) -> None:
    loaded = fresh()
    cut = [
        Piece(key, tuple(value.shape), offset, value.view(-1)[offset : offset + value.numel() // 3])
        for key, value in loaded.items()
        for offset in range(0, value.numel(), value.numel() // 3)
    ]
    assert manager.restore(cut) == STATE
    assert equal(loaded, tensors())


def cut(data: Tensor, edges: list[int]) -> list[Piece]:
    bounds = sorted({0, data.numel(), *(min(edge, data.numel()) for edge in edges)})
    return [
        Piece("weight/a", (data.numel(),), first, data[first:last])
        for first, last in pairwise(bounds)
    ]


@settings(max_examples=30)
@given(
    numel=st.integers(1, 40),
    written=st.lists(st.integers(0, 40), max_size=5),
    read=st.lists(st.integers(0, 40), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
)
def test_any_cut_reads_any_cut(
    numel: int, written: list[int], read: list[int], dtype: torch.dtype
) -> None:
    data = torch.arange(numel).to(dtype)
    with tempfile.TemporaryDirectory() as name:
        manager = CheckpointManager(Path(name), 1)
        manager.save(STATE, cut(data, written), CONFIG)
        loaded = torch.zeros_like(data)
        assert manager.restore(cut(loaded, read)) == STATE
    assert torch.equal(loaded, data)


def test_memory_beside_the_state_is_bounded(manager: CheckpointManager) -> None:
    values = {"weight/large": torch.ones(6 << 20)}
    with torch.profiler.profile(profile_memory=True) as profile:
        manager.save(STATE, pieces_of(values), CONFIG)
        manager.restore(pieces_of(values))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 1 << 20, "of 24 MiB of state; the checksum works in blocks of 512 KiB"


def test_empty_pieces_are_no_trouble(manager: CheckpointManager) -> None:
    values = {"weight/none": torch.zeros(0, 3), "weight/a": torch.ones(4)}
    empty = Piece("weight/a", (4,), 2, torch.zeros(0))
    manager.save(STATE, [*pieces_of(values), empty], CONFIG)
    assert manager.restore([empty, *pieces_of(values)]) == STATE


def test_a_data_file_is_the_state_and_a_header_a_piece(saved: Path) -> None:
    size_bytes = (saved / layout.data_file(0)).stat().st_size
    state_bytes = sum(value.nbytes for value in tensors().values())
    assert 0 <= size_bytes - state_bytes < 400 * len(tensors())


def test_a_complete_checkpoint_is_not_written_again(
    manager: CheckpointManager, saved: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.iterdir()}
    assert manager.save(STATE, pieces_of(tensors(seed=1)), CONFIG) == saved
    assert {path: path.stat().st_mtime_ns for path in saved.iterdir()} == before


def test_the_newest_is_restored(manager: CheckpointManager, saved: Path) -> None:
    later = replace(STATE, step=200, consumed_samples=400)
    manager.save(later, pieces_of(tensors(seed=1)), CONFIG)
    loaded = fresh()
    assert manager.restore(pieces_of(loaded)) == later
    assert equal(loaded, tensors(seed=1))


def test_a_truncated_temporary_folder_is_ignored_and_cleared(
    manager: CheckpointManager, saved: Path
) -> None:
    left = layout.temporary_folder(manager.folder, 200)
    shutil.copytree(saved, left)
    (left / layout.data_file(0)).write_bytes(b"cut off")
    assert manager.restore(pieces_of(fresh())) == STATE
    manager.save(replace(STATE, step=300), pieces_of(tensors()), CONFIG)
    assert sorted(path.name for path in manager.folder.iterdir()) == [
        "step_00000100",
        "step_00000300",
    ]


def test_a_crash_before_the_marker_costs_nothing(manager: CheckpointManager, saved: Path) -> None:
    later = manager.save(replace(STATE, step=200), pieces_of(tensors(seed=1)), CONFIG)
    (later / layout.MARKER).write_bytes(b"")
    loaded = fresh()
    assert manager.restore(pieces_of(loaded)) == replace(STATE, step=200)
    assert equal(loaded, tensors(seed=1))
    assert layout.complete_checkpoints(manager.folder) == [saved, later]


def test_one_without_marker_that_is_damaged_is_ignored_and_made_good(
    manager: CheckpointManager, saved: Path
) -> None:
    later = manager.save(replace(STATE, step=200), pieces_of(tensors(seed=1)), CONFIG)
    (later / layout.MARKER).unlink()
    (later / layout.data_file(0)).write_bytes(b"cut off")
    assert manager.restore(pieces_of(fresh())) == STATE
    manager.save(replace(STATE, step=200), pieces_of(tensors(seed=1)), CONFIG)
    loaded = fresh()
    assert manager.restore(pieces_of(loaded)) == replace(STATE, step=200)
    assert equal(loaded, tensors(seed=1))


def test_a_save_that_fails_at_any_moment_leaves_the_last_checkpoint(
    manager: CheckpointManager, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = replace(STATE, step=200)
    fsync = os.fsync

    def failing(moment: int) -> Callable[[int], None]:
        calls = iter(range(1000))

        def fail(descriptor: int) -> None:
            if next(calls) == moment:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        return fail

    outcomes = []
    for moment in range(10):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(moment))
            try:
                manager.save(later, pieces_of(tensors(seed=1)), CONFIG)
                outcomes.append("saved")
            except CheckpointError as error:
                assert "No space left on device" in str(error)
                outcomes.append("failed")
        loaded = fresh()
        state = manager.restore(pieces_of(loaded))
        assert state in (STATE, later)
        assert equal(loaded, tensors(seed=0 if state == STATE else 1))
        assert (state == later) == (moment >= 6), "whole from the rename on"
        shutil.rmtree(layout.step_folder(manager.folder, 200), ignore_errors=True)
    assert outcomes == ["failed"] * 9 + ["saved"], "every file and folder is synced"


def test_all_differences_are_listed(manager: CheckpointManager, saved: Path) -> None:
    values = fresh()
    values["weight/b"] = values.pop("weight/a")
    values["master/a"] = values["master/a"].view(7, 30)
    values["moment/a"] = values["moment/a"].float()
    with pytest.raises(CheckpointError) as error:
        manager.restore(pieces_of(values))
    assert str(error.value).splitlines() == [
        "4 differences between this run and step 100:",
        "  - master/a: (7, 30) float32 in this run; (30, 7) float32 in the checkpoint",
        "  - moment/a: (30, 7) float32 in this run; (30, 7) float64 in the checkpoint",
        "  - weight/a: in the checkpoint only",
        "  - weight/b: in this run only",
    ]


def test_a_flipped_byte_in_a_tensor_is_found(manager: CheckpointManager, saved: Path) -> None:
    manifest, _ = integrity.open_verified(saved)
    for key, entry in manifest.tensors.items():
        flip(saved / entry.chunks[0].file, entry.chunks[0].byte_offset + 11)
        with pytest.raises(CheckpointError) as error:
            manager.restore(pieces_of(fresh()))
        assert f"{key}: its checksum is not the manifest's" in str(error.value)
        assert "__0_0.distcp: its CRC-32 is not the manifest's" in str(error.value)
        flip(saved / entry.chunks[0].file, entry.chunks[0].byte_offset + 11)
    assert manager.restore(pieces_of(fresh())) == STATE


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: flip(path, 10)])
@pytest.mark.parametrize(
    "name", [layout.CONFIG, layout.STATE, layout.MANIFEST, layout.METADATA, layout.MARKER]
)
def test_a_damaged_file_is_named(
    manager: CheckpointManager, saved: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(saved / name)
    if not (saved / layout.MARKER).exists():
        assert manager.restore(pieces_of(fresh())) == STATE
        assert layout.is_complete(saved)
        return
    with pytest.raises(CheckpointError, match=name):
        manager.restore(pieces_of(fresh()))


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_data_file_is_named(
    manager: CheckpointManager, saved: Path, damage: Callable[[Path], None]
) -> None:
    damage(saved / layout.data_file(0))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: (missing|found [0-9]+ bytes)"):
        manager.restore(pieces_of(fresh()))


def test_a_renamed_checkpoint_is_refused(manager: CheckpointManager, saved: Path) -> None:
    saved.rename(layout.step_folder(manager.folder, 500))
    with pytest.raises(CheckpointError, match=r"step_00000500: manifest\.json is of step 100"):
        manager.restore(pieces_of(fresh()))


def test_a_newer_format_is_refused(manager: CheckpointManager, saved: Path) -> None:
    manifest = saved / layout.MANIFEST
    text = manifest.read_text().replace('"format_version": 1', '"format_version": 2')
    manifest.write_text(text)
    (saved / layout.MARKER).write_bytes(integrity.marker_of(text.encode()))
    with pytest.raises(CheckpointError, match="format_version: found 2; this dsv2_train reads 1"):
        manager.restore(pieces_of(fresh()))


def test_restoring_never_unpickles(
    manager: CheckpointManager, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled something")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert manager.restore(pieces_of(fresh())) == STATE


def test_the_manifest_is_plain_json(saved: Path) -> None:
    manifest = json.loads((saved / layout.MANIFEST).read_text())
    assert manifest["tensors"]["weight/a"]["shape"] == [30, 7]
    assert manifest["files"].keys() == {
        "__0_0.distcp",
        ".metadata",
        "config.yaml",
        "state.json",
    }


def test_going_back_moves_later_checkpoints_aside(manager: CheckpointManager) -> None:
    for step in (100, 200, 300):
        manager.save(TrainState(step, step, step, step), pieces_of(tensors(step)), CONFIG)
    loaded = fresh()
    assert manager.restore(pieces_of(loaded), at_most_step=99) is None
    state = manager.restore(pieces_of(loaded), at_most_step=150)
    assert state is not None and state.step == 100
    assert equal(loaded, tensors(100))
    names = sorted(path.name for path in manager.folder.iterdir())
    assert names == ["rolled_back_step_00000200", "rolled_back_step_00000300", "step_00000100"]
    again = manager.save(TrainState(200, 200, 200, 200), pieces_of(tensors(7)), CONFIG)
    assert manager.restore(pieces_of(loaded)) == TrainState(200, 200, 200, 200)
    assert equal(loaded, tensors(7))
    lifecycle.set_back(again)
    assert (manager.folder / "rolled_back_step_00000200_2").is_dir()


def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(manager: CheckpointManager) -> None:
    for step in (100, 200, 300):
        manager.save(TrainState(step, step, step, step), pieces_of(tensors(step)), CONFIG)
    (manager.folder / "step_00000200" / layout.MANIFEST).write_text("")
    state = manager.restore(pieces_of(fresh()), at_most_step=200)
    assert state is not None and state.step == 100
    names = sorted(path.name for path in manager.folder.iterdir())
    assert names == ["damaged_step_00000200", "rolled_back_step_00000300", "step_00000100"]
