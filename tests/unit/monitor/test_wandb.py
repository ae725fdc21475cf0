"""The wandb sink, without a network: offline runs, resumed ids, no login, no server, no process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from dsv2_train.monitor.sinks.wandb import WandbSink
from tests.unit.monitor.wandb_file import read_history, read_records, wandb_processes

# Each of these runs in a process of its own, since wandb keeps settings and login in the process.
NO_SERVER = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
MAKE_ONLINE = """
import sys
from pathlib import Path
from dsv2_train.monitor.sinks import wandb as sinks
sinks._WANDB_CONNECT_TIMEOUT_S = 2
folder = Path(sys.argv[1])
sink = sinks.WandbSink(
    folder, "online", project="p", run_id="abcd1234", config={"a": 1}, warn=print
)
sink.record({"step": 10, "train/loss": 5.0})
sink.close()
assert sink.is_offline and sink.run_id == "abcd1234", (sink.is_offline, sink.run_id)
print(sink.folder.name)
"""
KILL_WANDB = """
import os, signal, sys, time
from pathlib import Path
from dsv2_train.monitor.sinks import wandb as sinks
from tests.unit.monitor.wandb_file import wandb_processes
sink = sinks.WandbSink(
    Path(sys.argv[1]), "offline", project="p", run_id=None, config={}, warn=print
)
(core,) = wandb_processes()
os.kill(core, signal.SIGKILL)
for step in range(50):
    sink.record({"step": step, "train/loss": 5.0})
    time.sleep(0.02)
sink.close()
print("training went on")
"""


def start(folder: Path, run_id: str | None = None) -> WandbSink:
    folder.mkdir(exist_ok=True)
    return WandbSink(
        folder, "offline", project="p", run_id=run_id, config={"model": {"a": 1}}, warn=pytest.fail
    )


def run_alone(code: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run code in a process that knows no login and cannot ask for one."""
    folder.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = {"HOME": str(folder.parent), "NETRC": str(folder.parent / "netrc")}
    home["PYTHONPATH"] = str(Path(__file__).parents[3])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder)],
        env={**kept, **home, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_offline_run_holds_rows_and_config_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sink = start(tmp_path / "run")
    rows = [{"step": step, "train/loss": 5.0 / step} for step in (10, 20)]
    for row in rows:
        sink.record(row)
    sink.close()
    assert sink.is_offline
    assert sink.folder.parent == tmp_path / "run" / "wandb"
    assert read_history(sink.folder) == rows
    (run,) = [r.run for r in read_records(sink.folder) if r.WhichOneof("record_type") == "run"]
    assert run.display_name == "run"
    assert run.project == "p"
    assert "model" in [update.key for update in run.config.update]
    assert capfd.readouterr() == ("", "")


def test_pictures_and_alerts_are_recorded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sink = start(tmp_path / "run")
    sink.record_picture("moe/expert_map", np.zeros((8, 16, 3), dtype=np.uint8), step=10)
    sink.alert("routing", "layer 3: dead experts")
    sink.close()
    (row,) = read_history(sink.folder)
    assert row["step"] == 10
    (picture,) = (sink.folder / "files" / "media").rglob("*.png")
    assert image.imread(picture).shape[:2] == (8, 16)
    (alert,) = [
        r.alert for r in read_records(sink.folder) if r.WhichOneof("record_type") == "alert"
    ]
    assert (alert.title, alert.text) == ("routing", "layer 3: dead experts")
    assert capfd.readouterr() == ("", "")


def test_steps_that_do_not_increase_are_kept_on_an_axis_of_their_own(tmp_path: Path) -> None:
    sink = start(tmp_path / "run")
    rows = [{"step": step, "train/loss": 5.0} for step in (10, 20, 20, 10)]
    for row in rows:
        sink.record(row)
    sink.close()
    assert read_history(sink.folder) == rows
    metrics = [
        r.metric for r in read_records(sink.folder) if r.WhichOneof("record_type") == "metric"
    ]
    assert [metric.step_metric for metric in metrics if metric.glob_name == "*"] == ["step"]


def test_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    first = start(tmp_path / "run")
    first.record({"step": 10})
    first.close()
    second = start(tmp_path / "run", run_id=first.run_id)
    second.record({"step": 20})
    second.close()
    assert second.run_id == first.run_id
    assert first.run_id in second.folder.name
    assert read_history(second.folder) == [{"step": 20}]


def test_close_waits_for_the_process_that_writes(tmp_path: Path) -> None:
    sink = start(tmp_path / "run")
    assert len(wandb_processes()) == 1
    sink.close()
    assert wandb_processes() == []


def test_two_new_runs_have_two_ids(tmp_path: Path) -> None:
    run_ids = []
    for name in ("a", "b"):
        sink = start(tmp_path / name)
        run_ids.append(sink.run_id)
        sink.close()
    assert run_ids[0] != run_ids[1]


def test_online_without_a_login_becomes_offline(tmp_path: Path) -> None:
    done = run_alone(MAKE_ONLINE, tmp_path / "run", {})
    assert done.returncode == 0, done.stderr
    said, folder = done.stdout.splitlines()
    assert said == "wandb: not logged in, so the run is recorded offline"
    assert read_history(tmp_path / "run" / "wandb" / folder) == [{"step": 10, "train/loss": 5.0}]
    assert done.stderr == ""


def test_online_without_a_server_becomes_offline(tmp_path: Path) -> None:
    done = run_alone(MAKE_ONLINE, tmp_path / "run", NO_SERVER)
    assert done.returncode == 0, done.stderr
    said, folder = done.stdout.splitlines()
    assert said.startswith("wandb: no connection, so the run is recorded offline (")
    assert read_history(tmp_path / "run" / "wandb" / folder) == [{"step": 10, "train/loss": 5.0}]


def test_training_goes_on_when_the_process_of_wandb_dies(tmp_path: Path) -> None:
    done = run_alone(KILL_WANDB, tmp_path / "run", {})
    assert done.returncode == 0, done.stderr
    said, last = done.stdout.splitlines()
    assert said.startswith("wandb: stopped recording, metrics.jsonl goes on (")
    assert last == "training went on"
