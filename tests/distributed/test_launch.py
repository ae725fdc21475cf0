"""The whole way of a user's line: launch/local.sh, torchrun, ranks, files."""

import os
import subprocess
from pathlib import Path

import pytest

from dsv2_train.data.manifest import DataError
from dsv2_train.monitor.rows import read_rows
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import open_run, run_config
from tests.helpers.tiny import TINY
from tests.helpers.world import ROOT, World


def _launch(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    line = [
        *(word for word in TINY if word != "parallel=single"),
        *("parallel.world_size=2", "parallel.pp=2", "parallel.ep=1"),
        *(f"run.dir={folder}", "run.name=whole", f"data.path={folder / 'data'}"),
        *("recipe.global_batch_size=4", "recipe.num_steps=3", "recipe.eval_num_samples=2"),
        *("recipe.capacity_factor=1.0", "monitor.log_every_steps=2"),
        *overrides,
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    words = [ROOT / "launch" / "local.sh", *line]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180)


def test_a_line_trains_tells_and_is_finished(tmp_path: Path) -> None:
    synthetic_folder(tmp_path / "data")
    done = _launch(tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "whole"
    assert "done: 3 of 3 steps" in done.stdout
    for words in ("Implementations", "train longer", str(run / "checkpoints" / "step_00000003")):
        assert words in done.stdout
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]  # the last with the evaluation at the end
    assert "eval/loss" in rows[-1]
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "checkpoints", "plots", "logs"}
    again = _launch(tmp_path)
    assert again.returncode == 0
    assert "run whole is finished: 3 of 3 steps" in again.stdout


def _open(rank: int, folder: Path) -> None:
    open_run(rank, run_config(folder, folder / "data"))


def test_a_corpus_with_a_flipped_byte_is_not_trained_on(world: World, tmp_path: Path) -> None:
    stream = synthetic_folder(tmp_path / "data") / "train.bin"
    data = bytearray(stream.read_bytes())
    data[1000] ^= 1
    stream.write_bytes(data)
    with pytest.raises(DataError, match=r"train\.bin"):
        world.run(_open, 1, tmp_path)
