"""A checkpoint of any layout is the state of any other: to the bit, and in the next loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

from dsv2_train.checkpoint import restore
from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.layout import latest_complete
from dsv2_train.checkpoint.disk.manifest import Manifest, TensorEntry
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed.sharding import Piece
from dsv2_train.train.checkpointing import final_save
from dsv2_train.train.run import Run
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import (
    Owned,
    add_up,
    close_run,
    open_run,
    owned,
    run_config,
    train_step,
)
from tests.helpers.world import World

# Eight layers; buckets of 2000 elements cut every chunk into many, none a multiple of its ranks.
_COMMON = ("model.num_layers=8", "parallel.bucket_size=2000", "recipe.num_steps=100")
_V = ("parallel.schedule=zb_v", "parallel.chunks=2")

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "PP2": (2, ("parallel.pp=2",)),
    "EP2": (2, ("parallel.ep=2",)),
    "DP2": (2, ("parallel.bucket_size=3000",)),
    "PP2 as a V": (2, ("parallel.pp=2", *_V, "parallel.layers_per_chunk=[1,3,3,1]")),
    "PP4": (4, ("parallel.pp=4", "parallel.layers_per_chunk=[1,3,2,2]")),
    "EP4": (4, ("parallel.ep=4",)),
    "PP2 EP2": (4, ("parallel.pp=2", "parallel.ep=2")),
    "PP2 DP2 as a V": (4, ("parallel.pp=2", *_V)),
    "EP2 DP2": (4, ("parallel.ep=2",)),
    "DP4": (4, ()),
    "PP4 as a V": (4, ("parallel.pp=4", *_V)),
}

Saved = tuple[dict[str, int], float]  # checksums of the state, loss of the step after it


def _config(folder: Path, layout: str, name: str) -> RunConfig:
    size, overrides = LAYOUTS[layout]
    names = (f"run.name={name.replace(' ', '_')}", f"parallel.world_size={size}")
    return run_config(folder / "runs", folder / "data", *_COMMON, *names, *overrides)


def _next_loss(run: Run) -> float:
    """Of the step from here, equal on all ranks."""
    return train_step(run, run.schedule.at(run.clock)).loss


def _save(rank: int, config: RunConfig) -> tuple[list[Owned], float]:
    """Two steps, a checkpoint, and the loss of the third."""
    run = open_run(rank, config)
    for _ in range(2):
        point = run.schedule.at(run.clock)
        train_step(run, point)
        run.clock = run.clock.advance(point)
    final_save(run)
    state = owned(run)
    loss = _next_loss(run)
    close_run(run)
    return state, loss


def _load(
    rank: int, config: RunConfig, sources: list[Path]
) -> list[tuple[list[Owned], float, bool]]:
    """The state and the next loss of every source in this layout; whether a buffer is padded."""
    results = []
    for source in sources:
        run = open_run(rank, config.model_copy(update={"run": _of(source, config)}))
        assert run.clock.step == 2
        padded = False
        for chunk in run.chunks:
            buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
            # Ranks that reduce nothing have one bucket.
            assert sum(len(buffer.buckets) for buffer in buffers) >= 3 or config.parallel.dp == 1
            padded |= any(_is_padded(buffer) for buffer in buffers)
        state = owned(run)
        results.append((state, _next_loss(run), padded))
        close_run(run)
    return results


def _is_padded(buffer: _ParamAndGradBuffer) -> bool:
    return sum(param.numel() for param in buffer.params) < buffer.numel


def _of(source: Path, config: RunConfig) -> object:
    return config.run.model_copy(update={"name": source.name})


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Saved]]:
    folder = tmp_path_factory.mktemp("reshape")
    synthetic_folder(folder / "data")
    found = {}
    for layout, (size, _) in LAYOUTS.items():
        config = _config(folder, layout, layout)
        ranks = world.run(_save, size, config)
        state = add_up([of_rank for of_rank, _ in ranks])
        found[layout] = state, ranks[0][1]
        path = latest_complete(config.run.checkpoint_folder)
        assert path is not None
        manifest, _ = open_verified(path)
        assert {key: entry.checksum for key, entry in manifest.tensors.items()} == state
    return folder, found


def _some(layout: str) -> list[str]:
    """Three others, so that each is loaded by three."""
    names = list(LAYOUTS)
    place = names.index(layout)
    return [names[(place + distance) % len(names)] for distance in (1, 3, 6)]


@pytest.mark.soak
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_the_state_of_every_other(
    world: World, saved: tuple[Path, dict[str, Saved]], soak: bool, layout: str
) -> None:
    folder, sources = saved
    if not soak:
        sources = {source: sources[source] for source in _some(layout)}
    size, _ = LAYOUTS[layout]
    config = _config(folder, layout, layout)
    paths = [_config(folder, source, source).run.folder for source in sources]
    by_rank = world.run(_load, size, config, paths)
    is_padded = False
    for (state, loss), *loaded in zip(sources.values(), *by_rank, strict=True):
        assert add_up([of_rank for of_rank, _, _ in loaded]) == state
        # Sums over ranks and buckets have another order: rounding of fp32.
        assert loaded[0][1] == pytest.approx(loss, rel=1e-6)
        is_padded |= any(padded for _, _, padded in loaded)
    assert is_padded


Mistake = Callable[[Run], None]


def _shift_a_moment(run: Run) -> None:
    piece = next(one for one in run.optimizer.pieces() if one.key.startswith("exp_avg_sq/"))
    piece.data.copy_(piece.data.roll(1))


def _swap_two_experts(run: Run) -> None:
    for piece in run.optimizer.pieces():
        if piece.key.startswith("weight/") and piece.key.endswith("experts.fc1"):
            of_one = piece.shape[1] * piece.shape[2]
            start = -piece.offset % of_one
            first, second = (piece.data[start + i * of_one :][:of_one] for i in range(2))
            if second.numel() == of_one:
                both = torch.cat([second, first])
                piece.data[start : start + 2 * of_one].copy_(both)
                return


def _with_a_mistake(rank: int, config: RunConfig, mistake: Mistake) -> list[Owned]:
    run = open_run(rank, config)
    if rank == 0:
        mistake(run)
    state = owned(run)
    close_run(run)
    return state


@pytest.mark.parametrize("mistake", [_shift_a_moment, _swap_two_experts])
def test_a_mistake_is_seen_in_the_checksums(
    world: World, saved: tuple[Path, dict[str, Saved]], mistake: Mistake
) -> None:
    """The negative controls."""
    folder, sources = saved
    config = _config(folder, "EP2", "PP2")
    found = add_up(world.run(_with_a_mistake, 2, config, mistake))
    expected, _ = sources["PP2"]
    assert sum(found[key] != expected[key] for key in expected) == 1


def _read_wrongly(rank: int, config: RunConfig, mistake: str) -> str:
    """What a rank is told whose reader, or whose ranges, are off by one."""
    read_pieces = restore.read_pieces

    def one_off(path: Path, manifest: Manifest, wanted: list[Piece]) -> list[int]:
        tensors = {
            key: _one_off(entry) if key.startswith("exp_avg/decoder.layers.3.") else entry
            for key, entry in manifest.tensors.items()
        }
        return read_pieces(path, replace(manifest, tensors=tensors), wanted)

    run = open_run(rank, config)
    pieces = list(run.optimizer.pieces())
    if mistake == "range" and rank == 1:
        last = max(range(len(pieces)), key=lambda i: pieces[i].data.numel())
        pieces[last] = replace(pieces[last], offset=pieces[last].offset - 1)
    with pytest.MonkeyPatch.context() as patch:
        if mistake == "reader":
            patch.setattr(restore, "read_pieces", one_off)
        try:
            run.checkpoints.restore(pieces)
        except CheckpointError as error:
            return str(error)
        finally:
            close_run(run)
    return ""


def _one_off(entry: TensorEntry) -> TensorEntry:
    """Its elements of fp32 are looked for one too early."""
    chunks = tuple(replace(one, byte_offset=one.byte_offset - 4) for one in entry.chunks)
    return replace(entry, chunks=chunks)


@pytest.mark.parametrize(
    ("mistake", "expected"),
    [("range", "overlap: element"), ("reader", "exp_avg/decoder.layers.3.")],
)
def test_a_range_that_is_off_by_one_is_refused(
    world: World, saved: tuple[Path, dict[str, Saved]], mistake: str, expected: str
) -> None:
    folder, _ = saved
    config = _config(folder, "DP2", "one rank")
    for said in world.run(_read_wrongly, 2, config, mistake):
        assert expected in said
