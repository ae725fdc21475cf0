"""The whole way of a user's line: launch/local.sh, torchrun, ranks, files."""

import os
import socket
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from dsv2_train.data.manifest import DataError
from dsv2_train.monitor.rows import read_rows
from tests.helpers.corpus import synthetic_folder
from tests.helpers.run import open_run, run_config
from tests.helpers.tiny import TINY
from tests.helpers.world import ROOT, World


def _line(folder: Path, *overrides: str) -> list[str]:
    return [
        *(word for word in TINY if word != "parallel=single"),
        *("parallel.world_size=2", "parallel.pp=2", "parallel.ep=1"),
        *(f"run.dir={folder}", "run.name=whole", f"data.path={folder / 'data'}"),
        *("recipe.global_batch_size=4", "recipe.num_steps=3", "recipe.eval_num_samples=2"),
        *("recipe.capacity_factor=1.0", "monitor.log_every_steps=2"),
        *overrides,
    ]


def _launch(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    words = [ROOT / "launch" / "local.sh", *_line(folder, *overrides)]
    return subprocess.run(words, env=_environment(), capture_output=True, text=True, timeout=180)


def _environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


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


def test_two_hosts_without_slurm_train_one_run(tmp_path: Path) -> None:
    """Both are this one; each has one of the two ranks."""
    synthetic_folder(tmp_path / "data")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    line = _line(tmp_path, "cluster.ranks_per_node=1")
    hosts = [
        subprocess.Popen(
            [ROOT / "launch" / "multinode.sh", "2", str(node), endpoint, *line],
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [host.communicate(timeout=180) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert sum("done: 3 of 3 steps" in out for out, _ in said) == 1
    run = tmp_path / "whole"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3]
    logs = run / "logs" / "launch_0001"
    assert {"node_0", "node_1"} <= {path.name for path in logs.iterdir()}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["2", "2", "h:1"], "--node-rank: found 2; must be 0 to 1"),
        (["2", "0", "h"], "--endpoint: found 'h'; must be HOST:PORT"),
        (["0", "0", "h:1"], "--nodes: found 0; must be at least 1"),
        (["3", "0", "h:1"], "parallel.world_size: found 2; must be a multiple of 3"),
        ([], "launch/multinode.sh NODES NODE_RANK HOST:PORT"),
    ],
)
def test_a_wrong_place_is_told(tmp_path: Path, words: list[str], told: str) -> None:
    synthetic_folder(tmp_path / "data")
    line = _line(tmp_path) if words else []
    done = subprocess.run(
        [ROOT / "launch" / "multinode.sh", *words, *line],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert not (tmp_path / "whole").exists()


def _open(rank: int, folder: Path) -> None:
    open_run(rank, run_config(folder, folder / "data"))


def test_a_corpus_with_a_flipped_byte_is_not_trained_on(world: World, tmp_path: Path) -> None:
    stream = synthetic_folder(tmp_path / "data") / "train.bin"
    data = bytearray(stream.read_bytes())
    data[1000] ^= 1
    stream.write_bytes(data)
    with pytest.raises(DataError, match=r"train\.bin"):
        world.run(_open, 1, tmp_path)
