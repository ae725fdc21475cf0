"""A run may begin with the weights of a checkpoint of any layout and precision."""

from pathlib import Path

import pytest
import torch

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.layout import latest_complete
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import groups as process_groups
from dsv2_train.train.loop import train
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import Owned, add_up, close_run, open_run, owned, run_config, train_step
from tests.helpers.world import World


def _train(rank: int, config: RunConfig) -> list[Owned]:
    run = open_run(rank, config)
    train(run)
    state = owned(run)
    close_run(run)
    return state


def _begin(rank: int, config: RunConfig) -> tuple[list[Owned], int, int, float, float]:
    """State, clock and Adam's count at the start; largest moment; loss of the first step."""
    run = open_run(rank, config)
    state, clock, adam_step = owned(run), run.clock, run.optimizer.adam_step
    moments = [one.data for one in run.optimizer.pieces() if one.key.startswith("exp_avg")]
    largest = max(float(data.abs().max()) for data in moments)
    loss = train_step(run, run.schedule.at(run.clock)).loss
    close_run(run)
    return state, clock.consumed_samples, adam_step, largest, loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("begin")
    synthetic_folder(root / "data")
    return root


def _config(folder: Path, *overrides: str) -> RunConfig:
    return run_config(folder, folder / "data", *overrides)


def _weights(state: dict[str, int]) -> dict[str, int]:
    return {key: checksum for key, checksum in state.items() if key.startswith("weight/")}


def test_weights_are_those_of_the_other_run_and_all_else_is_new(world: World, folder: Path) -> None:
    old = _config(folder, "run.name=old", "parallel.world_size=4", "parallel=pp2_ep2")
    expected = _weights(add_up(world.run(_train, 4, old)))
    new = _config(
        folder,
        "run.name=new",
        "parallel.world_size=2",
        "parallel.ep=2",
        "run.seed=7",
        f"checkpoint.init_from={old.run.folder}",
    )
    ranks = world.run(_begin, 2, new)
    assert _weights(add_up([state for state, *_ in ranks])) == expected
    for _, consumed_samples, adam_step, largest, _ in ranks:
        assert (consumed_samples, adam_step, largest) == (0, 0, 0.0)
    fresh = new.model_copy(
        update={"checkpoint": new.checkpoint.model_copy(update={"init_from": None})}
    )
    assert abs(ranks[0][-1] - world.run(_begin, 2, fresh)[0][-1]) > 1e-3


@pytest.mark.parametrize(("before", "now"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_another_precision_is_converted(world: World, folder: Path, before: str, now: str) -> None:
    old = _config(
        folder, f"run.name=old_{before}", "parallel.world_size=2", f"recipe.precision={before}"
    )
    world.run(_train, 2, old)
    path = latest_complete(old.run.checkpoint_folder)
    assert path is not None
    new = _config(
        folder,
        f"run.name=new_{now}",
        "parallel.world_size=1",
        f"recipe.precision={now}",
        f"checkpoint.init_from={path}",
    )
    assert world.run(_masters_are_as_written, 1, new, path) == [True]


def _masters_are_as_written(rank: int, config: RunConfig, path: Path) -> bool:
    """Against what torch reads of the checkpoint's files by itself."""
    manifest, _ = open_verified(path)
    run = open_run(rank, config)
    for piece in run.optimizer.weights():
        entry = manifest.tensors[piece.key]
        written = torch.empty(torch.Size(entry.shape).numel(), dtype=getattr(torch, entry.dtype))
        for chunk in entry.chunks:
            part = written[chunk.offset : chunk.offset + chunk.numel]
            with (path / chunk.file).open("rb") as file:
                file.seek(chunk.byte_offset)
                data = bytearray(file.read(part.numel() * part.element_size()))
            part.copy_(torch.frombuffer(data, dtype=part.dtype))
        expected = written[piece.offset : piece.offset + piece.data.numel()].float()
        assert torch.equal(piece.data, expected), piece.key
    for piece in run.optimizer.pieces():
        if piece.key.startswith("weight/"):
            master = next(one for one in run.optimizer.weights() if one.key == piece.key)
            assert torch.equal(piece.data, master.data.to(piece.data.dtype))
    close_run(run)
    return True


def _refusal(rank: int, config: RunConfig) -> str:
    with pytest.raises(CheckpointError) as refused:
        open_run(rank, config)
    process_groups.destroy()
    return str(refused.value)


def test_weights_of_another_model_are_refused_on_every_rank(world: World, folder: Path) -> None:
    old = _config(folder, "run.name=narrow", "parallel.world_size=1", "model.hidden_size=32")
    world.run(_train, 1, old)
    new = _config(
        folder, "run.name=wide", "parallel.world_size=2", f"checkpoint.init_from={old.run.folder}"
    )
    for said in world.run(_refusal, 2, new):
        assert "(128, 48) float32 in this run; (128, 32) float32 in the checkpoint" in said
