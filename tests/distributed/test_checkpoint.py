"""Checkpoints of several ranks: bit for bit back, in other cuts and at other world sizes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv2_train.checkpoint.dcp import write
from dsv2_train.checkpoint.disk.checksum import tensor_checksum
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.layout import latest_complete, step_folder
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.distributed.sharding import Piece
from tests.helpers.world import World

STATE = TrainState(10, 20, 1280, 10)
SHAPES = {"weight/a": (17, 5), "master/a": (17, 5), "weight/experts": (8, 3, 7), "weight/one": (1,)}


def whole(key: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(key.encode()))
    value = torch.randn(SHAPES[key], generator=generator)
    return value.bfloat16() if key == "weight/a" else value


def cut(rank: int, world_size: int, first: int, fill: bool) -> list[Piece]:
    """A rank's share of every tensor; `first` moves all cut points."""
    pieces = []
    for key, shape in SHAPES.items():
        value = whole(key).view(-1)
        edges = [0, *(min(value.numel(), first + 13 * i) for i in range(1, world_size))]
        start, end = [*edges, value.numel()][rank : rank + 2]
        data = value[start:end].clone() if fill else torch.full_like(value[start:end], 7)
        pieces.append(Piece(key, shape, start, data))
    return pieces


def save(rank: int, world_size: int, folder: Path) -> Path:
    return CheckpointManager(folder, 10).save(STATE, cut(rank, world_size, 0, True), "a: 1\n")


def restore(rank: int, world_size: int, folder: Path, first: int) -> TrainState | None:
    pieces = cut(rank, world_size, first, False)
    state = CheckpointManager(folder, 10).restore(pieces)
    for piece in pieces:
        expected = whole(piece.key).view(-1)[piece.offset : piece.offset + piece.data.numel()]
        assert torch.equal(piece.data, expected)
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
    for first in (0, 1, 5):
        assert world.run(restore, read, read, tmp_path, first) == [STATE] * read


def test_checksums_do_not_depend_on_the_layout(world: World, tmp_path: Path) -> None:
    for world_size in (1, 2, 4):
        folder = tmp_path / str(world_size)
        world.run(save, world_size, world_size, folder)
        manifest, _ = open_verified(step_folder(folder, 10))
        assert {key: entry.checksum for key, entry in manifest.tensors.items()} == {
            key: tensor_checksum(whole(key)) for key in SHAPES
        }


def restore_on_every_rank(rank: int, folder: Path) -> TrainState | None:
    """As weights are, where every data-parallel rank has all of them."""
    return restore(0, 1, folder, 0)


def test_several_ranks_may_ask_for_the_same_range(world: World, tmp_path: Path) -> None:
    world.run(save, 4, 4, tmp_path)
    assert world.run(restore_on_every_rank, 2, tmp_path) == [STATE] * 2


def said(rank: int, action: str, world_size: int, folder: Path) -> str:
    """What a rank is told when another one does something wrong."""
    pieces = cut(rank, world_size, 0, True)
    manager = CheckpointManager(folder, 10)
    if rank == 1 and action == "gap":
        pieces[2] = replace(pieces[2], data=pieces[2].data[1:], offset=pieces[2].offset + 1)
    if rank == 1 and action == "overlap":
        pieces[2] = replace(cut(0, world_size, 0, True)[2])
    if rank == 1 and action == "disk full":
        write._write_all = fail  # type: ignore[assignment]
    try:
        manager.save(STATE, pieces, "")
    except CheckpointError as error:
        return str(error)
    finally:
        write._write_all = _WRITE_ALL
    return "saved"


_WRITE_ALL = write._write_all


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("gap", "weight/experts: gap: no rank holds elements 13 to 13"),
        ("overlap", "weight/experts: overlap: elements 0 to 12 are held twice"),
        ("disk full", "rank 1: OSError: [Errno 28] No space left on device"),
    ],
)
def test_every_rank_hears_of_a_failure_on_one(
    world: World, tmp_path: Path, action: str, expected: str
) -> None:
    messages = world.run(said, 2, action, 2, tmp_path)
    assert messages[0] == messages[1]
    assert expected in messages[0]
    assert latest_complete(tmp_path) is None


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
