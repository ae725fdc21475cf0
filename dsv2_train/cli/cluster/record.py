"""What is submitted, in the run folder: script, configuration, code, environment, jobs."""

import itertools
import json
import os
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from dsv2_train.cli.run_folder.launch import numbered

_REPOSITORY = Path(__file__).resolve().parents[3]
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")

SCRIPT = "train.sbatch"
CONFIG = "config.yaml"
_JOBS = "jobs.json"


def next_folder(run_folder: Path) -> Path:
    """A folder for the next submission; not made yet."""
    return numbered(run_folder / "logs", "submit_")


def write_record(folder: Path, script: str, config_yaml: str) -> None:
    """Write what a submission is, before it is made.

    Args:
        folder: new.
        script: of the job.
        config_yaml: the resolved configuration, which the job reads.

    Raises:
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True)
    (folder / SCRIPT).write_text(script)
    (folder / CONFIG).write_text(config_yaml)
    (folder / "code.txt").write_text(_code())
    (folder / "code.diff").write_text(_git("diff", "HEAD"))
    (folder / "packages.txt").write_text(_packages())
    (folder / "environment.txt").write_text(without_secrets(os.environ))


def write_jobs(folder: Path, job_ids: list[str]) -> None:
    """Write the numbers of the jobs of a submission."""
    (folder / _JOBS).write_text(json.dumps(job_ids))


def chain_of(run_folder: Path, job_id: str) -> tuple[str, ...]:
    """A job, then those of the same submission that it continues."""
    chains = [json.loads(file.read_text()) for file in _files_of_jobs(run_folder)]
    before = [chain[: chain.index(job_id)] for chain in chains if job_id in chain]
    return (job_id, *itertools.chain(*before))


def submitted_jobs(run_folder: Path) -> list[str]:
    """Numbers of every job that was ever submitted for a run."""
    return [
        job_id for file in _files_of_jobs(run_folder) for job_id in json.loads(file.read_text())
    ]


def _files_of_jobs(run_folder: Path) -> list[Path]:
    return sorted((run_folder / "logs").glob(f"submit_*/{_JOBS}"))


def without_secrets(environment: Mapping[str, str]) -> str:
    """Variables a line, as JSON strings.

    Values of those that sound like secrets are left out, and who an address is opened as.
    """

    def told(name: str, value: str) -> str:
        if _SECRET.search(name):
            return "(left out)"
        return json.dumps(_USER_OF_URL.sub("(left out)", value))

    return "".join(f"{name}={told(name, value)}\n" for name, value in sorted(environment.items()))


def _code() -> str:
    """Commit, and what is changed or new beside it."""
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--short")
    return f"{_REPOSITORY}\n{commit or 'no git repository'}\n{changed}".rstrip() + "\n"


def _git(*words: str) -> str:
    command = ["git", "-C", str(_REPOSITORY), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _packages() -> str:
    found = {f"{each.name}=={each.version}" for each in distributions()}
    return "".join(f"{line}\n" for line in sorted(found, key=str.lower))
