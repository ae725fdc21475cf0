"""Real torchrun: ranks that die are started again, a run belongs to one launch at a time."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dsv2_train.runs.attempts import read_starts
from tests.helpers.corpus import synthetic_folder
from tests.helpers.history import final_tensors, last_step, trace
from tests.helpers.processes import ranks_working_in, standing_still, wait_until
from tests.helpers.tiny import TINY
from tests.helpers.world import ROOT

PATIENCE_S = 120.0
NUM_STEPS = 60

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start launch/local.sh, in a folder of its own; all that it began is ended with the test."""
    synthetic_folder(tmp_path / "data")
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *overrides: str) -> subprocess.Popen[str]:
        line = [
            *(word for word in TINY if word != "parallel=single"),
            *("parallel.world_size=2", "parallel.pp=2", "parallel.ep=1"),
            *("data.path=data", f"run.name={name}", f"recipe.num_steps={NUM_STEPS}"),
            *("recipe.global_batch_size=4", "recipe.eval_num_samples=2"),
            *("monitor.log_every_steps=1", "checkpoint.every_steps=1", "monitor.wandb=offline"),
            *overrides,
        ]
        process = subprocess.Popen(
            [ROOT / "launch" / "local.sh", *line],
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
    for pid in ranks_working_in(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until a run has done a step; the launch must live."""

    def is_there() -> bool:
        assert process.poll() is None, process.communicate()
        return last_step(run) >= step

    wait_until(is_there, lambda: f"no step {step} in {run}", PATIENCE_S, every_s=0.005)


def wait_for_start(run: Path, number: int) -> None:
    """Wait until the ranks have begun at a step so many times."""

    def has_begun() -> bool:
        return len([each for each in read_starts(run) if each.step is not None]) == number

    wait_until(has_begun, lambda: f"no start {number} in {run}", PATIENCE_S)


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


@pytest.mark.soak
def test_ranks_killed_again_and_again(tmp_path: Path, launch: Launch, soak: bool) -> None:
    """Ten times with --soak, else two; one run of wandb from the first start to the last."""
    runs, num_kills = tmp_path / "runs", 10 if soak else 2
    assert end_of(launch("straight"))[0] == 0
    killed = launch("killed", f"cluster.max_restarts={num_kills}")
    choose, step = random.Random(num_kills), 0
    for _ in range(num_kills):
        # What is begun after the next step is complete when the one after it has been told of.
        step += 3
        wait_for_step(killed, runs / "killed", step)
        os.kill(choose.choice(ranks_working_in(tmp_path)), signal.SIGKILL)
        step = last_step(runs / "killed")
    status, out, err = end_of(killed)
    assert status == 0, err
    assert f"done: {NUM_STEPS} of {NUM_STEPS} steps" in out
    assert out.count("ALERT  the start before this one went on after step ") == num_kills
    assert len(list((runs / "killed/logs").glob("launch_0001/*/attempt_*"))) == num_kills + 1
    assert trace(runs / "killed") == trace(runs / "straight")
    tensors = [final_tensors(runs / name, NUM_STEPS) for name in ("killed", "straight")]
    assert tensors[0] == tensors[1]
    ids = {path.name.rpartition("-")[2] for path in (runs / "killed").rglob("offline-run-*")}
    assert len(ids) == 1


def test_a_run_that_gets_nowhere_is_not_started_again(tmp_path: Path, launch: Launch) -> None:
    run = tmp_path / "runs" / "loop"
    line = ("cluster.max_restarts=9", "cluster.crash_loop=2", "checkpoint.every_steps=1000")
    looping = launch("loop", *line)
    for number in (1, 2):
        wait_for_start(run, number)
        os.kill(ranks_working_in(tmp_path)[-1], signal.SIGKILL)
    status, _, err = end_of(looping)
    assert status == 2, err
    told = "the last 2 starts all went on after step 0 and failed before another checkpoint"
    assert err.count(told) == 1 and "Traceback" not in err.rpartition(told)[2], err
    assert len(list((run / "logs").glob("launch_0001/*/attempt_*"))) == 3
    assert end_of(launch("loop", *line, "recipe.num_steps=3"))[0] == 0


def test_starts_that_fail_before_there_is_a_model_count(tmp_path: Path, launch: Launch) -> None:
    slow = ("cluster.preflight.before_training=true", "cluster.preflight.disk_gb_per_s=1e6")
    line = (*slow, "cluster.max_restarts=9", "cluster.crash_loop=2")
    status, _, err = end_of(launch("loop", *line))
    assert status == 2, err
    assert "the last 2 starts never came to a step and failed" in err
    assert len(list((tmp_path / "runs/loop/logs").glob("launch_0001/*/attempt_*"))) == 3


def test_what_a_rank_refuses_is_not_started_again(tmp_path: Path, launch: Launch) -> None:
    line = ("checkpoint.every_steps=1000", "cluster.max_restarts=9")
    assert end_of(launch("damaged", *line, "recipe.num_steps=2"))[0] == 0
    (data, *_) = (tmp_path / "runs/damaged/checkpoints/step_00000002").glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    status, _, err = end_of(launch("damaged", *line, "recipe.num_steps=4"))
    assert status == 2 and "no checkpoint of this run is intact" in err, err
    assert len(list((tmp_path / "runs/damaged/logs").glob("launch_0002/*/attempt_*"))) == 1


def test_a_run_belongs_to_one_launch_at_a_time(tmp_path: Path, launch: Launch) -> None:
    """A second launch is refused and writes nothing; when the first is dead it goes on."""
    run = tmp_path / "runs" / "one"
    first = launch("one")
    wait_for_step(first, run, 3)
    with standing_still(ranks_working_in(tmp_path)):
        files = contents(run)
        status, _, err = end_of(launch("one"))
        assert status == 2
        owner = json.loads((run / "owner.json").read_text())
        told = f"{run} is in use by process {owner['pid']} on {owner['host']}; stop that first"
        assert told in err.replace("runs/one", str(run)), err
        assert len(err.splitlines()) == 2
        assert contents(run) == files
        first.kill()
        first.wait()
    wait_until(lambda: not ranks_working_in(tmp_path), str, PATIENCE_S)
    status, out, err = end_of(launch("one"))
    assert status == 0, err
    assert f"is taken over from process {owner['pid']} on {owner['host']}" in err
    assert f"done: {NUM_STEPS} of {NUM_STEPS} steps" in out


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
