"""Checkpoints of several ranks: bit for bit back, in other cuts and at other world sizes."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsv2_train.checkpoint.disk.checksum import tensor_checksum
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.layout import step_folder
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from tests.helpers.tensors import blank, drawn, hold, share_of
from tests.helpers.world import World

STATE = TrainState(10, 20, 1280, 10)
SHAPES = {"weight/a": (17, 5), "master/a": (17, 5), "weight/experts": (8, 3, 7), "weight/one": (1,)}


VALUES = drawn(SHAPES)


def save(rank: int, world_size: int, folder: Path) -> Path:
    return CheckpointManager(folder, 10).save(STATE, share_of(VALUES, rank, world_size), "a: 1\n")


def restore(rank: int, world_size: int, folder: Path, shift: int) -> TrainState | None:
    pieces = share_of(blank(VALUES), rank, world_size, shift)
    state = CheckpointManager(folder, 10).restore(pieces)
    assert hold(pieces, VALUES)
    return state


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_round_trip_is_bitwise(world: World, tmp_path: Path, world_size: int) -> None:
    path = step_folder(tmp_path, 10)
    assert world.run(save, world_size, world_size, tmp_path) == [path] * world_size
    assert world.run(restore, world_size, world_size, tmp_path, 0) == [STATE] * world_size
    assert len(list(path.glob("*.distcp"))) == world_size


@pytest.mark.parametrize(("written", "read"), [(4, 1), (4, 2), (1, 4), (2, 4)])
def test_other_ranks_and_cut_points(world: World, tmp_path: Path, written: int, read: int) -> None:
    world.run(save, written, written, tmp_path)
    for shift in (0, 1, 5):
        assert world.run(restore, read, read, tmp_path, shift) == [STATE] * read


def test_checksums_do_not_depend_on_the_layout(world: World, tmp_path: Path) -> None:
    for world_size in (1, 2, 4):
        folder = tmp_path / str(world_size)
        world.run(save, world_size, world_size, folder)
        manifest, _ = open_verified(step_folder(folder, 10))
        assert {key: entry.checksum for key, entry in manifest.tensors.items()} == {
            key: tensor_checksum(value) for key, value in VALUES.items()
        }


def restore_on_every_rank(rank: int, folder: Path) -> TrainState | None:
    """As weights are, where every data-parallel rank has all of them."""
    return restore(0, 1, folder, 0)


def test_several_ranks_may_ask_for_the_same_range(world: World, tmp_path: Path) -> None:
    world.run(save, 4, 4, tmp_path)
    assert world.run(restore_on_every_rank, 2, tmp_path) == [STATE] * 2


def said(rank: int, action: str, folder: Path) -> str:
    """What a rank is told when another one asks for what is not its own."""
    pieces = share_of(VALUES, rank, 2)
    if rank == 1 and action == "gap":
        pieces[2] = replace(pieces[2], data=pieces[2].data[1:], offset=pieces[2].offset + 1)
    if rank == 1 and action == "overlap":
        pieces[2] = share_of(VALUES, 0, 2)[2]
    try:
        CheckpointManager(folder / "checkpoints", 10).save(STATE, pieces, "")
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("gap", "weight/experts: gap: no rank holds elements 84 to 84"),
        ("overlap", "weight/experts: overlap: elements 0 to 83 are held twice"),
    ],
)
def test_pieces_that_are_not_the_whole_are_not_saved_and_every_rank_hears_of_it(
    world: World, tmp_path: Path, action: str, expected: str
) -> None:
    messages = world.run(said, 2, action, tmp_path)
    assert messages[0] == messages[1]
    assert expected in messages[0]
    assert list(tmp_path.iterdir()) == []


def restore_damaged(rank: int, world_size: int, folder: Path) -> str:
    try:
        restore(rank, world_size, folder, 3)
    except CheckpointError as error:
        return str(error)
    return "restored"


def test_every_rank_hears_which_tensor_and_file_are_damaged(world: World, tmp_path: Path) -> None:
    world.run(save, 4, 4, tmp_path)
    path = step_folder(tmp_path, 10)
    chunk = open_verified(path)[0].tensors["weight/experts"].chunks[2]
    data = bytearray((path / chunk.file).read_bytes())
    data[chunk.byte_offset] ^= 1
    (path / chunk.file).write_bytes(data)
    for message in world.run(restore_damaged, 2, 2, tmp_path):
        assert "1 damaged tensors:\n  - weight/experts: its checksum" in message
        assert "in:\n  - __2_0.distcp: its CRC-32 is not the manifest's\n" in message
