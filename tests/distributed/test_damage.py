"""Whatever is done to a checkpoint, it is named and the run goes on from the older one, whole."""

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from dsv2_train.checkpoint import load, restore
from dsv2_train.checkpoint.disk import integrity, layout
from dsv2_train.checkpoint.disk.errors import CheckpointError, DamagedError
from dsv2_train.checkpoint.disk.manifest import Manifest
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed.sharding import Piece
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.train.loop import train
from tests.helpers.corpus import synthetic_folder
from tests.helpers.damage import KINDS, Damage, damage
from tests.helpers.run import Owned, add_up, close_run, open_run, owned, run_config
from tests.helpers.tensors import blank, drawn, hold, share_of
from tests.helpers.world import World

STATE = TrainState(10, 20, 1280, 10)
SHAPES = {"weight/a": (17, 5), "master/a": (17, 5), "exp_avg/a": (17, 5), "weight/b": (8, 3, 7)}
OLDER, NEWEST = 10, 20


def values_of(step: int) -> dict[str, Tensor]:
    return drawn(SHAPES, seed=step)


def empty(rank: int = 0, world_size: int = 1) -> list[Piece]:
    """Memory for a rank's share."""
    return share_of(blank(values_of(OLDER)), rank, world_size)


def save_both(rank: int, world_size: int, path: Path) -> None:
    manager = CheckpointManager(path, 10)
    for step in (OLDER, NEWEST):
        manager.save(
            replace(STATE, step=step),
            share_of(values_of(step), rank, world_size),
            f"step: {step}\n",
        )


@pytest.fixture(scope="module")
def intact(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of four ranks."""
    path = tmp_path_factory.mktemp("intact")
    world.run(save_both, 4, 4, path)
    return path


def names_it(text: str, done: Damage, newest: Path) -> bool:
    """Whether a file that was damaged is named, or a tensor that has a part in it."""
    tensors = integrity.open_verified(newest)[0].tensors
    inside = [
        key
        for key, entry in tensors.items()
        if any(chunk.file in done.files for chunk in entry.chunks)
    ]
    return any(name in text for name in (*done.files, *inside))


def what_went_wrong(seed: int, intact: Path, path: Path) -> str | None:
    """Damage a copy of two checkpoints, restore, and tell what is not as promised."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(intact, path)
    older, newest = (layout.step_folder(path, step) for step in (OLDER, NEWEST))
    done = damage(random.Random(seed), newest, older)
    manager, pieces = CheckpointManager(path, 10), empty()
    before = {file.name: file.read_bytes() for file in newest.iterdir()}
    unmarked = not layout.is_complete(newest)
    try:
        seen = integrity.newest_intact(path)
        if seen.path == newest and not unmarked and not all(map(integrity.is_data, done.files)):
            return f"{done}: not found by who reads small files"
        state = manager.restore(pieces)
    except CheckpointError as error:
        return f"{done}: {error}"
    if unmarked:
        return healed(state, pieces, path, manager.passed_over)
    if state != STATE:
        return f"{done}: the run goes on from {state}"
    if not hold(pieces, values_of(OLDER)):
        return f"{done}: what is loaded is not all of the older one"
    told = "\n".join(manager.passed_over)
    if not names_it(told, done, layout.step_folder(intact, NEWEST)):
        return f"{done}: not named in: {told}"
    aside = path / f"damaged_{newest.name}"
    if newest.exists() or {file.name: file.read_bytes() for file in aside.iterdir()} != before:
        return f"{done}: not moved aside as it was"
    return None


def healed(
    state: TrainState | None, pieces: list[Piece], path: Path, told: tuple[str, ...]
) -> str | None:
    """What is not as promised of a checkpoint that has lost its marker and nothing else."""
    newest = layout.step_folder(path, NEWEST)
    if state != replace(STATE, step=NEWEST) or not hold(pieces, values_of(NEWEST)):
        return f"without its marker: the run goes on from {state}"
    if not all(map(layout.is_complete, layout.step_folders(path))) or len(told) != 1:
        return f"without its marker: {told}"
    integrity.open_verified(newest)
    return None


def failures(count: int, intact: Path, path: Path) -> list[str]:
    return [wrong for seed in range(count) if (wrong := what_went_wrong(seed, intact, path))]


@pytest.mark.soak
def test_every_damage_is_named_and_the_older_one_is_loaded_whole(
    intact: Path,
    tmp_path: Path,
    soak: bool,
    pytestconfig: pytest.Config,
) -> None:
    count = pytestconfig.getoption("--damages") or (2000 if soak else 200)
    assert failures(count, intact, tmp_path / "run") == []


def test_the_damages_are_of_every_kind_and_in_every_file(intact: Path, tmp_path: Path) -> None:
    kinds: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for seed in range(200):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(intact, tmp_path / "run")
        both = [layout.step_folder(tmp_path / "run", step) for step in (NEWEST, OLDER)]
        done = damage(random.Random(seed), *both)
        kinds[done.kind] += 1
        files.update(done.files)
    assert set(kinds) == set(KINDS)
    assert set(files) == {file.name for file in layout.step_folder(intact, NEWEST).iterdir()}
    assert min(*kinds.values(), *files.values()) >= 5


@pytest.mark.parametrize("detector", ["tensors", "headers", "small files", "sizes"])
def test_each_detector_is_needed(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    if detector == "tensors":
        monkeypatch.setattr(restore, "read_pieces", unchecked)
    elif detector == "headers":
        monkeypatch.setattr(load, "files_with_other_headers", lambda *_: [])
    elif detector == "small files":
        monkeypatch.setattr(integrity, "crc_problems", lambda *_: [])
    else:
        monkeypatch.setattr(integrity, "size_problems", lambda *_: [])
    assert failures(200, intact, tmp_path / "run")


def unchecked(path: Path, manifest: Manifest, pieces: list[Piece]) -> list[int]:
    """A reader that believes what it reads."""
    read = READ_PIECES(path, manifest, pieces)
    assert len(read) == len(pieces)
    return [manifest.tensors[piece.key].checksum for piece in pieces]


READ_PIECES = restore.read_pieces


def test_if_all_are_damaged_nothing_is_begun_or_changed(intact: Path, tmp_path: Path) -> None:
    for seed in range(20):
        path = tmp_path / str(seed)
        shutil.copytree(intact, path)
        draw = random.Random(seed)
        for step, other in ((OLDER, NEWEST), (NEWEST, OLDER)):
            damage(draw, layout.step_folder(path, step), layout.step_folder(intact, other))
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        with pytest.raises(DamagedError, match="no checkpoint of this run is intact") as error:
            CheckpointManager(path, 10).restore(empty())
        assert all(f"step_000000{step}" in str(error.value) for step in (OLDER, NEWEST))
        assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_an_only_checkpoint_without_marker_is_used_and_marked(intact: Path, tmp_path: Path) -> None:
    """Its save was cut off behind the rename, or the file was lost: every byte is verified."""
    path = layout.step_folder(tmp_path, OLDER)
    shutil.copytree(layout.step_folder(intact, OLDER), path)
    (path / layout.MARKER).unlink()
    manager, pieces = CheckpointManager(tmp_path, 10), empty()
    assert manager.restore(pieces) == STATE
    assert hold(pieces, values_of(OLDER))
    [told] = manager.passed_over
    assert told.startswith(f"{path}: had no COMPLETE: ")
    integrity.open_verified(path)


def test_an_only_checkpoint_without_marker_and_another_byte_is_no_new_run(
    intact: Path, tmp_path: Path
) -> None:
    """Of every file the one in the middle, of every part of a tensor its first."""
    whole = layout.step_folder(intact, OLDER)
    tensors = integrity.open_verified(whole)[0].tensors.values()
    places = [(file.name, file.stat().st_size // 2) for file in sorted(whole.iterdir())]
    places += [(chunk.file, chunk.byte_offset) for each in tensors for chunk in each.chunks]
    for number, (name, position) in enumerate(places):
        if name == layout.MARKER:
            continue
        path = layout.step_folder(tmp_path / str(number), OLDER)
        shutil.copytree(whole, path)
        (path / layout.MARKER).unlink()
        data = bytearray((path / name).read_bytes())
        data[position] ^= 1
        (path / name).write_bytes(data)
        with pytest.raises(CheckpointError):
            CheckpointManager(path.parent, 10).restore(empty())
        assert not layout.is_complete(path)


def restore_on(rank: int, world_size: int, path: Path) -> tuple[TrainState | None, bool, str]:
    manager, pieces = CheckpointManager(path, 10), empty(rank, world_size)
    state = manager.restore(pieces)
    return state, hold(pieces, values_of(OLDER)), "\n".join(manager.passed_over)


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_go_on_from_the_same_one(
    world: World, intact: Path, tmp_path: Path, world_size: int
) -> None:
    for seed in range(10):
        path = tmp_path / str(seed)
        shutil.copytree(intact, path)
        both = [layout.step_folder(path, step) for step in (NEWEST, OLDER)]
        done = damage(random.Random(seed), *both)
        results = world.run(restore_on, world_size, world_size, path)
        assert results == [(STATE, True, results[0][2])] * world_size, done
        assert names_it(results[0][2], done, layout.step_folder(intact, NEWEST))


def misread(path: Path, manifest: Manifest, pieces: list[Piece]) -> list[int]:
    """A node whose memory or network gives back what is on no disk."""
    return [checksum + 1 for checksum in READ_PIECES(path, manifest, pieces)]


def test_what_only_arrives_damaged_is_no_damage_of_the_checkpoint(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(intact, tmp_path / "run")
    monkeypatch.setattr(restore, "read_pieces", misread)
    with pytest.raises(CheckpointError, match="suspect the memory or the network") as error:
        CheckpointManager(tmp_path / "run", 10).restore(empty())
    assert not isinstance(error.value, DamagedError)
    assert len(layout.complete_checkpoints(tmp_path / "run")) == 2


def read_whole(rank: int, world_size: int, path: Path) -> list[str]:
    """Which data files this rank reads whole while it restores."""
    read: list[str] = []
    crc32 = integrity.crc32_of

    def recorded(file: Path) -> int:
        read.append(file.name)
        return crc32(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integrity, "crc32_of", recorded)
        restore_on(rank, world_size, path)
    return sorted(filter(integrity.is_data, read))


def test_files_are_read_whole_where_something_is_wrong_with_them_by_one_rank(
    world: World, intact: Path, tmp_path: Path
) -> None:
    shutil.copytree(intact, tmp_path / "run")
    assert world.run(read_whole, 2, 2, tmp_path / "run") == [[], []]
    newest = layout.step_folder(tmp_path / "run", NEWEST)
    chunk = integrity.open_verified(newest)[0].tensors["weight/b"].chunks[0]
    data = bytearray((newest / chunk.file).read_bytes())
    data[chunk.byte_offset] ^= 1
    (newest / chunk.file).write_bytes(data)
    names = [layout.data_file(rank) for rank in range(4)]
    assert world.run(read_whole, 2, 2, tmp_path / "run") == [names[0::2], names[1::2]]


def test_weights_alone_are_verified_without_reading_the_rest(
    intact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    crc32 = integrity.crc32_of
    monkeypatch.setattr(integrity, "crc32_of", lambda path: read.append(path) or crc32(path))
    weights = [piece for piece in empty() if piece.key.startswith("weight/")]
    CheckpointManager(intact.parent / "none", 10).initialize(intact, weights)
    assert hold(weights, values_of(NEWEST))
    assert not any(integrity.is_data(path.name) for path in read)


def test_another_model_is_no_damage(intact: Path, tmp_path: Path) -> None:
    shutil.copytree(intact, tmp_path / "run")
    pieces = empty()[1:]
    with pytest.raises(CheckpointError, match="weight/a: in the checkpoint only") as error:
        CheckpointManager(tmp_path / "run", 10).restore(pieces)
    assert not isinstance(error.value, DamagedError)
    assert len(layout.complete_checkpoints(tmp_path / "run")) == 2


def _train(rank: int, config: RunConfig, stop_at: int | None) -> list[Owned]:
    with pytest.MonkeyPatch.context() as patch:
        told = config.run.folder / "told"
        patch.setattr(Monitor, "alert", lambda _, title, text: told.write_text(text))
        run = open_run(rank, config)
    if stop_at is not None:
        # The run is the test's and ends with it: nothing has to be put back.
        run.signals.agreed = lambda *_: run.clock.step >= stop_at  # type: ignore[method-assign]
    train(run)
    state = owned(run)
    close_run(run)
    return state


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_nothing_had_been(
    world: World, tmp_path: Path
) -> None:
    data = synthetic_folder(tmp_path / "data")
    common = ("parallel.world_size=2", "checkpoint.every_steps=2", "checkpoint.keep_last=2")
    straight = run_config(tmp_path, data, "run.name=straight", *common)
    resumed = run_config(tmp_path, data, "run.name=resumed", *common)
    expected = add_up(world.run(_train, 2, straight, None))
    world.run(_train, 2, resumed, 4)
    checkpoints = resumed.run.checkpoint_folder
    file = layout.step_folder(checkpoints, 4) / layout.data_file(1)
    content = file.read_bytes()
    file.write_bytes(content[:-40] + bytes(40))
    assert add_up(world.run(_train, 2, resumed, None)) == expected
    assert layout.data_file(1) in (resumed.run.folder / "told").read_text(), "loudly"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "damaged_step_00000004",
        "step_00000004",
        "step_00000006",
    ]
