"""A small run on two nodes of Slurm, through launch/submit.py."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.folder import open_verified
from tests.helpers.corpus import synthetic_folder
from tests.helpers.slurm import Slurm, wait_until
from tests.helpers.tiny import TINY
from tests.helpers.world import ROOT

NUM_STEPS = 24


class SlurmRun:
    """A run folder and the jobs that are submitted for it.

    Args:
        slurm: where to.
        folder: to work in; new.
    """

    PATIENCE_S = 240.0  # a start takes 10 s, many times that on a machine that is busy

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.folder = folder / "runs" / "quickstart"
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
        return found[1]

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
        wait_until(lambda: self._last_step() >= step, self._all_logs, self.PATIENCE_S, every_s=0.05)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """While the block runs its ranks are stopped, so that it does not end before."""
        ranks = self._ranks()
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def trace(self) -> list[dict[str, Any]]:
        """Every row of the run's metrics without what depends on the clock on the wall."""
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in row.items() if k[:5] not in ("perf/", "mem/p")} for row in rows]

    def final_tensors(self) -> dict[str, int]:
        """Checksums of every tensor of the checkpoint at the end."""
        path = layout.latest_complete(self.folder / "checkpoints")
        assert path is not None and layout.step_of(path) == NUM_STEPS, path
        manifest, _ = open_verified(path)
        return {key: entry.checksum for key, entry in manifest.tensors.items()}

    def _last_step(self) -> int:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def _all_logs(self) -> str:
        files = sorted((self.folder / "logs").glob("slurm_*.out"))
        return "\n".join([f"no such step in {self.folder}", *(file.read_text() for file in files)])

    def _ranks(self) -> list[int]:
        """Processes of the ranks, by the folder that they work in and what they run."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                works_here = os.readlink(process / "cwd") == str(self._working)
                is_rank = b"dsv2_train.cli.train" in words
                if works_here and is_rank and b"torch.distributed.run" not in words:
                    found.append(int(process.name))
        return found
