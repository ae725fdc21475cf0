"""Slurm's programs, asked; what they do not do is told in one line."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from dsv2_train.config.problems import ConfigError, Problem

_PATH = "cluster.slurm"
_PATIENCE_S = 120.0


def require_slurm() -> None:
    """Raises ConfigError where there is no Slurm."""
    missing = [name for name in ("sbatch", "sinfo", "squeue") if shutil.which(name) is None]
    if missing:
        allowed = (
            "must be where Slurm is: no "
            f"{', '.join(missing)} here; --dry-run shows the script, launch/local.sh trains here"
        )
        raise ConfigError([Problem(_PATH, os.uname().nodename, allowed)])


def partitions() -> list[str]:
    """Names of the partitions that this user sees.

    Raises:
        ConfigError: if Slurm does not answer.
    """
    return sorted(set(_ask("sinfo", "--noheader", "--format=%R").split()))


def live_jobs(job_ids: Sequence[str]) -> dict[str, str]:
    """Those jobs that have not ended, and their state.

    Raises:
        ConfigError: if Slurm does not answer.
    """
    if not job_ids:
        return {}
    everyone = dict(map(str.split, _ask("squeue", "--noheader", "--format=%A %T").splitlines()))
    return {job_id: everyone[job_id] for job_id in job_ids if job_id in everyone}


def submit(script: Path, output: Path, after: str | None) -> str:
    """Submit a script.

    Args:
        script: the file.
        output: what the job prints goes there; `%j` is its number.
        after: a job that must have ended before, however it ends.

    Returns:
        The number of the job.

    Raises:
        ConfigError: if Slurm does not take it, with its reason.
    """
    options = [f"--output={output}"]
    if after is not None:
        options.append(f"--dependency=afterany:{after}")
    return _ask("sbatch", "--parsable", *options, str(script)).partition(";")[0].strip()


def _ask(*command: str) -> str:
    # SBATCH_PARTITION and the like would win over the script.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SBATCH_")}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise _refused(command[0], f"nothing for {_PATIENCE_S:.0f} s") from None
    if done.returncode:
        raise _refused(command[0], done.stderr or f"exit status {done.returncode}")
    return done.stdout


def _refused(program: str, said: str) -> ConfigError:
    allowed = f"must be taken by Slurm, which says: {' '.join(said.split())}"
    return ConfigError([Problem(_PATH, program, allowed)])
