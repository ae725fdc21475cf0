"""The start of a launch on a node: its run folder is owned, then its ranks run."""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dsv2_train.cli.launch.place import Place
from dsv2_train.cli.launch.torchrun import Outcome, run_ranks
from dsv2_train.cli.main import EXIT_CONFIG_ERROR
from dsv2_train.cli.run_folder.launch import Launch, unwritable
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.runs.attempts import SERIES, Start, begin, record
from dsv2_train.runs.ownership import ATTEMPT, OwnedError, Owner, owned


def start(launch: Launch, place: Place, log_dir: Path, jobs: tuple[str, ...] = ()) -> Outcome:
    """Run the ranks of this node; the first node owns the run folder meanwhile.

    Args:
        launch: checked, and not finished.
        place: this node among all.
        log_dir: as `run_ranks` takes it.
        jobs: Slurm's job, and those that it is a continuation of: an attempt of theirs that is
            still alive is fenced.

    Raises:
        ConfigError: if another attempt owns the run folder and is alive, or the folder cannot be
            written; then nothing was.
        CrashLoopError: if the starts before this one, of the same job, got nowhere.
    """
    num_ranks = launch.config.parallel.world_size // place.num_nodes
    cluster = launch.config.cluster

    def run(names: Mapping[str, str]) -> Outcome:
        return run_ranks(launch.worker, num_ranks, log_dir, place, cluster, names)

    if place.node != 0:
        return run({})
    attempt = Owner.this_process(jobs)
    this_start = Start(jobs[0] if jobs else attempt.attempt, restart=0)
    with ExitStack() as stack:
        before = _own(launch, attempt, stack)
        if before is not None:
            print(f"{launch.folder} is taken over from {before}", file=sys.stderr)
        begin(launch.folder, this_start, cluster.crash_loop)
        launch.write_config()
        print(launch.describe(), flush=True)
        outcome = run({ATTEMPT: attempt.attempt, SERIES: this_start.series})
        if outcome.was_stopped and outcome.status != EXIT_CONFIG_ERROR:
            # Maybe before the ranks had begun; one that was fenced writes nothing.
            record(launch.folder, replace(this_start, ended_well=True))
        return outcome


def _own(launch: Launch, attempt: Owner, stack: ExitStack) -> Owner | None:
    try:
        return stack.enter_context(owned(launch.folder, attempt))
    except OwnedError as error:
        raise ConfigError([Problem("run.name", launch.config.run.name, str(error))]) from error
    except OSError as error:
        raise ConfigError([unwritable(launch.config, error.strerror)]) from error
