"""A small run on two nodes of Slurm, through launch/submit.py."""

import re
import subprocess
from pathlib import Path

from tests.helpers.corpus import synthetic_folder
from tests.helpers.history import last_step
from tests.helpers.processes import ranks_working_in, wait_until
from tests.helpers.slurm import Slurm
from tests.helpers.tiny import TINY
from tests.helpers.world import ROOT

NUM_STEPS = 24


class SlurmRun:
    """A run folder and the jobs that are submitted for it.

    Args:
        slurm: where to.
        folder: to work in; new.

    Attributes:
        folder: of the run.
        job_id: of the first job that was submitted last.
    """

    PATIENCE_S = 240.0  # a start takes 10 s, many times that on a machine that is busy

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.folder = folder / "runs" / "quickstart"
        self.job_id = ""
        self._slurm = slurm
        self._working = folder
        synthetic_folder(folder / "data")

    def line(self, *overrides: str) -> list[str]:
        """What is given to launch/submit.py."""
        return [
            *(word for word in TINY if word != "parallel=single"),
            *("parallel.world_size=4", "parallel.pp=2", "parallel.ep=2", "data.path=data"),
            *("recipe.global_batch_size=8", f"recipe.num_steps={NUM_STEPS}"),
            *("recipe.eval_num_samples=4", "monitor.log_every_steps=1", "checkpoint.every_steps=4"),
            *("cluster.ranks_per_node=2", "cluster.slurm={partition:train,time_limit_minutes:10}"),
            *overrides,
        ]

    def submit(self, *overrides: str) -> str:
        """Submit; the number of the first job."""
        done = self.try_to_submit(*self.line(*overrides))
        assert done.returncode == 0, done.stderr
        found = re.search(r"submitted job (\d+)", done.stdout)
        assert found is not None, done.stdout
        self.job_id = found[1]
        return self.job_id

    def try_to_submit(self, *line: str) -> subprocess.CompletedProcess[str]:
        """Run launch/submit.py as a user of this cluster."""
        return subprocess.run(
            [ROOT / "launch" / "submit.py", *line],
            cwd=self._working,
            env={**self._slurm.environment, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def log(self, job_id: str) -> str:
        """What a job has printed so far."""
        path = self.folder / "logs" / f"slurm_{job_id}.out"
        return path.read_text() if path.exists() else ""

    def wait_for_step(self, step: int) -> None:
        """Wait until a row of metrics tells of a step."""
        wait_until(
            lambda: last_step(self.folder) >= step, self._all_logs, self.PATIENCE_S, every_s=0.05
        )

    def ranks(self) -> list[int]:
        """Processes of its ranks, on all nodes."""
        return ranks_working_in(self._working)

    def _all_logs(self) -> str:
        files = sorted((self.folder / "logs").glob("slurm_*.out"))
        return "\n".join([f"no such step in {self.folder}", *(file.read_text() for file in files)])
