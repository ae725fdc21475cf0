"""A rank that is stopped in the middle of something is named, told and ended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsv2_train.config.load import to_yaml
from dsv2_train.config.run import RunConfig
from tests.helpers.corpus import synthetic_folder
from tests.helpers.hangs import STOPS, Stop, run_watched
from tests.helpers.run import close_run, open_run, run_config
from tests.helpers.world import ROOT, World

TIMEOUT_S = 5.0
# Ranks that import on a busy machine have no heartbeat for seconds.
LAUNCH_TIMEOUT_S = 20.0
WITHIN_S = 10.0

LAUNCHER = """\
import sys
from pathlib import Path
from dsv2_train.cli.launch.torchrun import run_ranks
from dsv2_train.config.sections.cluster import ClusterConfig
timeout_s, restarts = float(sys.argv[1]), int(sys.argv[2])
cluster = ClusterConfig(ranks_per_node=4, hang_timeout_s=timeout_s, max_restarts=restarts)
outcome = run_ranks(sys.argv[3:], 4, Path("logs"), cluster=cluster)
print(outcome)
sys.exit(outcome.status)
"""

# Every attempt stops at another place.
WORKER = """\
import os, sys
from pathlib import Path
from dsv2_train.cli.train import main
from tests.helpers.hangs import STOPS, stop_in_step

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt < int(sys.argv.pop(1)):
    stop_in_step(STOPS[attempt], int(os.environ["RANK"]), Path(f"stopped_{attempt + 1}"))
sys.exit(main())
"""


def _config(folder: Path) -> RunConfig:
    data = synthetic_folder(folder / "data")
    return run_config(folder, data, "run.name=hangs", "parallel=pp2_ep2", "recipe.num_steps=3")


def _require_told(folder: Path, stop: Stop, stopped: Path, timeout_s: float = TIMEOUT_S) -> None:
    """The report names the rank and what it was in, in time; its process is gone."""
    when_s, pid = stopped.read_text().split()
    values = json.loads((folder / "report.json").read_text())
    assert (values["missing"], values["why"]) == ([stop.rank], "SILENT"), (stop, values)
    text = (folder / "report.txt").read_text()
    (line,) = (line for line in text.splitlines() if "is missing" in line)
    assert line.startswith(f"  rank {stop.rank} is missing: step 2, "), line
    assert stop.told in line and "stopped by a signal" in line, line
    late_s = (folder / "report.json").stat().st_mtime - float(when_s)
    assert timeout_s - 1 < late_s < timeout_s + WITHIN_S, (stop, late_s)
    assert not Path(f"/proc/{pid}").exists(), stop
    others = {f"rank_{rank:05}.stacks" for rank in range(4) if rank != stop.rank}
    assert {file.name for file in folder.glob("*.stacks")} == others, stop
    assert all("in train\n" in (folder / name).read_text() for name in others)


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.place)
def test_a_stopped_rank_is_named_wherever_it_stops(tmp_path: Path, stop: Stop) -> None:
    codes = run_watched(_config(tmp_path), stop, tmp_path / "logs", TIMEOUT_S)
    assert codes[stop.rank] == -9 and all(codes)
    _require_told(tmp_path / "logs" / "hang_1", stop, tmp_path / "logs" / "stopped")


def test_a_run_that_is_watched_and_never_stops_is_left_alone(tmp_path: Path) -> None:
    assert run_watched(_config(tmp_path), None, tmp_path / "logs", TIMEOUT_S) == [0] * 4
    assert not (tmp_path / "logs").exists()


def _group_timeouts(rank: int, config: RunConfig) -> list[float]:
    run = open_run(rank, config)
    default = dist.group.WORLD
    found = [
        group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for group in distributed_c10d._world.pg_map
        if group is not default  # the test's own
    ]
    close_run(run)
    return found


def test_every_group_gives_up_later_than_a_hang_is_told(world: World, tmp_path: Path) -> None:
    config = _config(tmp_path)
    cluster = config.cluster
    assert cluster.hang_timeout_s is not None and cluster.hang_timeout_s < cluster.group_timeout_s
    for found in world.run(_group_timeouts, 4, config):
        assert len(found) > 5 and set(found) == {cluster.group_timeout_s}


@pytest.mark.soak
def test_a_launch_tells_every_hang_and_goes_on_after_it(tmp_path: Path, soak: bool) -> None:
    """Real torchrun, which starts the ranks again; all places with --soak, else one."""
    (tmp_path / "config.yaml").write_text(to_yaml(_config(tmp_path)))
    (tmp_path / "worker.py").write_text(WORKER)
    num_hangs = len(STOPS) if soak else 1
    worker = ["worker.py", str(num_hangs), "--config", "config.yaml"]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(LAUNCH_TIMEOUT_S), str(num_hangs), *worker],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200 if soak else 240,
    )
    assert done.returncode == 0, done.stderr
    assert "done: 3 of 3 steps" in done.stdout
    for number, stop in enumerate(STOPS[:num_hangs], start=1):
        hang, stopped = tmp_path / "logs" / f"hang_{number}", tmp_path / f"stopped_{number}"
        _require_told(hang, stop, stopped, LAUNCH_TIMEOUT_S)
    assert done.stderr.count("THE RUN HANGS") == num_hangs
