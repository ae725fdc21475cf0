"""A rank that is stopped in the middle of something is named, and the run goes on without a hang.

One launch, real torchrun: every attempt but the last hangs at another place.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from dsv2_train.config.load import to_yaml
from tests.helpers.corpus import synthetic_folder
from tests.helpers.hangs import STOPS
from tests.helpers.run import run_config
from tests.helpers.world import ROOT

TIMEOUT_S = 5.0
WITHIN_S = 10.0

LAUNCHER = """\
import sys
from pathlib import Path
from dsv2_train.cli.launch.torchrun import run_ranks
outcome = run_ranks(sys.argv[2:], 4, Path("logs"), float(sys.argv[1]))
sys.exit(outcome.status)
"""

WORKER = """\
import os, sys, time
from pathlib import Path
from dsv2_train.cli.train import main
from dsv2_train.train import loop
from tests.helpers import hangs

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
stop = hangs.STOPS[attempt] if attempt < len(hangs.STOPS) else None
train_step = loop.train_step

def stopping_in_step_2(run, point):
    if run.clock.step == 1 and stop is not None and rank == stop.rank:
        original = hangs._stop
        def told():
            Path(f"stopped_{attempt}").write_text(f"{time.time()} {os.getpid()}")
            original()
        hangs._stop = told
        hangs.stop_in(stop.place)
    return train_step(run, point)

loop.train_step = stopping_in_step_2
sys.exit(main())
"""


def test_a_stopped_rank_is_named_wherever_it_stops(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        synthetic_folder(tmp_path / "data"),
        *("run.name=hangs", "parallel=pp2_ep2", "recipe.num_steps=3"),
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "worker.py").write_text(WORKER)
    worker = [f"--max-restarts={len(STOPS)}", "worker.py", "--config", "config.yaml"]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(TIMEOUT_S), *worker],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "done: 3 of 3 steps" in done.stdout
    for number, stop in enumerate(STOPS):
        folder = tmp_path / "logs" / f"hang_{number + 1}"
        when_s, pid = (tmp_path / f"stopped_{number}").read_text().split()
        values = json.loads((folder / "report.json").read_text())
        assert values["missing"] == [stop.rank], (stop, values)
        (line,) = (line for line in done.stderr.splitlines() if f"rank {stop.rank} is miss" in line)
        assert f": step 2, {stop.told}" in line, line
        assert line in (folder / "report.txt").read_text()
        late_s = (folder / "report.json").stat().st_mtime - float(when_s)
        assert TIMEOUT_S - 1 < late_s < TIMEOUT_S + WITHIN_S, (stop, late_s)
        assert not Path(f"/proc/{pid}").exists(), stop
        others = {f"rank_{rank:05}.stacks" for rank in range(4)} - {f"rank_{stop.rank:05}.stacks"}
        assert {file.name for file in folder.glob("*.stacks")} == others, stop
        assert all("train_step" in (folder / name).read_text() for name in others)
    assert not (tmp_path / "logs" / "hang_6").exists()
