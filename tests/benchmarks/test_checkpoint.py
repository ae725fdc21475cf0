"""The comparison of checkpoints, on a tiny state: every contender brings back what it saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoint
from benchmarks.checkpoint import MEGATRON, OURS, TORCH, Measured, measure, pieces_of_layers
from benchmarks.ranks import run_processes

LAYER = {"experts.fc1": (4, 32, 16), "norm": (16,)}
NUM_LAYERS, NUM_RANKS, REPEATS = 4, 2, 1
STATE_BYTES = NUM_LAYERS * (4 * 32 * 16 + 16) * (2 + 3 * 4)


def _measured(folder: Path) -> tuple[Measured, str]:
    """A comparison; and what is told of another one, in which torch.load gives zeros."""
    pieces = pieces_of_layers(LAYER, NUM_LAYERS)
    found, load = measure(folder / "true", pieces, REPEATS), torch.load

    def zeros(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
        return {key: value.zero_() for key, value in load(*args, **options).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", zeros)
        try:
            measure(folder / "forgetful", pieces, REPEATS)
        except RuntimeError as error:
            return found, str(error)
    return found, ""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, str]:
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("true", "forgetful"):
        (folder / name).mkdir()
    # megatron-core's has processes of its own, which ranks of a test world may not have.
    return run_processes(_measured, NUM_RANKS, folder)[0]


def test_all_contenders_save_and_load_the_same_state(
    measured: tuple[Measured, str], capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = measured
    assert found.state_bytes == STATE_BYTES
    for times in (found.save, found.load_cached, found.load):
        assert times.keys() == {OURS, TORCH, MEGATRON}
        assert all(len(each.seconds) == REPEATS and each.best > 0 for each in times.values())
    assert all(written > STATE_BYTES for written in found.written_bytes.values())
    assert len(found.stall.seconds) == REPEATS
    checkpoint.show(found, NUM_RANKS)
    told = capsys.readouterr().out
    for title in ("save", "load from the page cache", "load from the disk", "written over state"):
        assert sum(line.strip().startswith(f"{title}  ") for line in told.splitlines()) == 3
    assert "stall of a save behind training: " in told


def test_there_is_no_figure_of_what_does_not_come_back(measured: tuple[Measured, str]) -> None:
    _, told = measured
    assert told.startswith("torch does not bring back weight/layers.0.")
