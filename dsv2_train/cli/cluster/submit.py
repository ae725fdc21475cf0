"""`python -m dsv2_train.cli.cluster.submit`: overrides -> a checked run -> jobs of Slurm."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv2_train.cli.cluster import slurm
from dsv2_train.cli.cluster.checks import CHECKS
from dsv2_train.cli.cluster.record import (
    CONFIG,
    SCRIPT,
    next_folder,
    submitted_jobs,
    write_jobs,
    write_record,
)
from dsv2_train.cli.cluster.script import Job
from dsv2_train.cli.launch.place import fits, num_nodes_of
from dsv2_train.cli.main import report_errors
from dsv2_train.cli.resolve import examine
from dsv2_train.cli.run_folder.inspect import inspect
from dsv2_train.cli.run_folder.launch import Launch
from dsv2_train.config.load import to_yaml
from dsv2_train.config.problems import ConfigError, Problem, passing_over_absent
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.cluster import SlurmConfig

EXAMPLES = """\
examples:
  launch/submit.py experiment=dsv2_236b_pretrain data.path=/data/corpus --dry-run
  launch/submit.py experiment=dsv2_236b_pretrain data.path=/data/corpus parallel.world_size=2048
  launch/submit.py experiment=quickstart cluster.ranks_per_node=2 \\
      'cluster.slurm={partition:debug,time_limit_minutes:30}'

A run that was stopped goes on from its newest checkpoint when the same line is given again.
Exit status: 0 submitted or finished, 2 for what cannot be submitted, 1 otherwise."""


@dataclass(frozen=True)
class Submission:
    """A run, checked, and what is to be submitted for it."""

    launch: Launch
    slurm: SlurmConfig
    folder: Path

    @property
    def output(self) -> Path:
        """What a job prints goes there; `%j` is its number."""
        return self.launch.folder.absolute() / "logs" / "slurm_%j.out"

    @property
    def script(self) -> str:
        """Of every job of this submission."""
        config_path = self.folder.absolute() / CONFIG
        return Job(self.launch.config, self.slurm, config_path, self.launch.command).script()


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit what the command line asks for; returns the exit status."""
    parsed = _parser().parse_intermixed_args(arguments)
    return report_errors(lambda: _run(parsed))


def _run(arguments: argparse.Namespace) -> int:
    command = ["launch/submit.py", *arguments.overrides]
    checked = _checked(arguments.overrides, command, need_data=not arguments.dry_run)
    if arguments.dry_run:
        print(checked.script, end="")
        return 0
    if checked.launch.is_finished:
        print(checked.launch.describe())
        return 0
    _ask_slurm(checked)
    job_ids = _submit(checked)
    _tell(checked, job_ids)
    return 0


def _checked(overrides: Sequence[str], command: Sequence[str], *, need_data: bool) -> Submission:
    """Check all that can be checked without Slurm.

    Raises:
        ConfigError: with every problem.
    """
    to_train = need_data and not _is_in_container(overrides)
    config, problems = examine(overrides, need_data=need_data, to_train=to_train)
    for check in CHECKS:
        problems += passing_over_absent(check, config)
    launch = inspect(config, problems, command, [_fits_its_nodes])
    section = launch.config.cluster.slurm
    assert section is not None, "a check has refused this"
    return Submission(launch, section, next_folder(launch.folder))


def _is_in_container(overrides: Sequence[str]) -> bool:
    """The run has the packages of an image, and not those that are here."""
    section = getattr(examine(overrides, need_data=False)[0].cluster, "slurm", None)
    return getattr(section, "container", None) is not None


def _fits_its_nodes(config: RunConfig) -> Iterator[Problem]:
    yield from fits(num_nodes_of(config))(config)


def _ask_slurm(checked: Submission) -> None:
    """Hold a submission against the cluster.

    Raises:
        ConfigError: if there is no Slurm, no such partition, or a job that has this run already.
    """
    slurm.require_slurm()
    problems: list[Problem] = []
    partition, there = checked.slurm.partition, slurm.partitions()
    if not set(partition.split(",")) <= set(there):
        allowed = f"must be a partition of this cluster: {', '.join(there)}"
        problems.append(Problem("cluster.slurm.partition", partition, allowed))
    for job_id, state in slurm.live_jobs(submitted_jobs(checked.launch.folder)).items():
        allowed = (
            f"must not be a run that a job has: job {job_id} is {state} and writes to "
            f"{checked.launch.folder}; wait for it, 'scancel {job_id}', or choose another run.name"
        )
        problems.append(Problem("run.name", checked.launch.config.run.name, allowed))
    if problems:
        raise ConfigError(problems)


def _submit(checked: Submission) -> list[str]:
    """Write the record, then submit the jobs of a chain, each after the one before."""
    folder = checked.folder
    try:
        write_record(folder, checked.script, to_yaml(checked.launch.config))
    except OSError as error:
        allowed = f"must be a folder that can be written ({error})"
        raise ConfigError([Problem("run.dir", str(folder), allowed)]) from error
    job_ids: list[str] = []
    for _ in range(checked.slurm.chain):
        after = job_ids[-1] if job_ids else None
        try:
            job_ids.append(slurm.submit(folder / SCRIPT, checked.output, after))
        except ConfigError:
            if job_ids:
                _tell(checked, job_ids)
                print("but no more of the chain:", flush=True)
            raise
        write_jobs(folder, job_ids)
    return job_ids


def _tell(checked: Submission, job_ids: Sequence[str]) -> None:
    first, *rest = job_ids
    chain = f", and then {', '.join(rest)}" if rest else ""
    log = str(checked.output).replace("%j", first)
    print(checked.launch.describe())
    print(f"submitted job {first}{chain}")
    print(f"  log: {os.path.relpath(log)}")
    print(f"  script, configuration, code, environment: {checked.folder}")
    print(f"  save and stop: scancel --signal=TERM {first}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/submit.py",
        description="Check a configuration, then submit it to Slurm, one task a node.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the script, write and submit nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
