"""`python -m dsv2_train.cli.cluster.node`: what a job of Slurm runs once on each node."""

import argparse
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dsv2_train.cli.cluster.record import chain_of
from dsv2_train.cli.launch.place import Place, on_nodes
from dsv2_train.cli.launch.start import start
from dsv2_train.cli.main import EXIT_CONFIG_ERROR, EXIT_STOPPED, report_errors
from dsv2_train.cli.run_folder.inspect import inspect
from dsv2_train.config.load import load_file

# Below those that Linux gives to connections; jobs on one node are rarely 10,000 apart.
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000

# Environment variable: a file to make where this node refuses. The status of srun is the highest of
# all tasks, and those of other nodes, which wait for this one, are killed.
REFUSED = "DSV2_REFUSED"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on this node of the job; returns the exit status.

    0: the run is finished. 3: it was stopped before its end, cleanly. 2: configuration, data or
    checkpoints cannot be used. 1: otherwise.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a resolved config.yaml")
    parser.add_argument("--command", default="launch/submit.py", help="the line that submitted it")
    parsed = parser.parse_args(arguments)
    status = report_errors(lambda: _run(parsed.config, shlex.split(parsed.command)))
    if status == EXIT_CONFIG_ERROR and REFUSED in os.environ:
        with suppress(OSError):
            Path(os.environ[REFUSED]).touch()
    return status


def _run(config_path: Path, command: Sequence[str]) -> int:
    place = place_in_job(os.environ)
    config = load_file(config_path)
    machines = on_nodes(place.num_nodes)
    # Every node looks: none of them reads what was read back when it was written.
    launch = inspect(config, (), command, machines, reads_end=False)
    if launch.is_finished:
        if place.node == 0:
            print(launch.describe(), flush=True)
        return 0
    log_dir = launch.folder / "logs" / place.launch_id / f"node_{place.node}"
    jobs = chain_of(launch.folder, os.environ["SLURM_JOB_ID"])
    outcome = start(launch, place, log_dir, jobs)
    if outcome.status:
        return outcome.status
    after = inspect(config, (), command, machines, reads_end=False)
    return 0 if after.is_finished else EXIT_STOPPED


def place_in_job(environment: Mapping[str, str]) -> Place:
    """This node among those of the job step, by the variables that Slurm sets for its tasks."""
    job_id, restart = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    host = first_host(environment["SLURM_STEP_NODELIST"])
    if not _is_known(host):  # as on nodes that were made for the job
        host = environment["SLURM_LAUNCH_NODE_IPADDR"]
    return Place(
        num_nodes=int(environment["SLURM_STEP_NUM_NODES"]),
        node=int(environment["SLURM_NODEID"]),
        endpoint=f"{host}:{_FIRST_PORT + int(job_id) % _NUM_PORTS}",
        launch_id=f"job_{job_id}_{restart}",
    )


def first_host(node_list: str) -> str:
    """The first host of a list as Slurm writes it: `gpu[007-012,020],login1` is `gpu007`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", node_list)
    if first is None:
        raise ValueError(f"found node list {node_list!r}; must name a host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _is_known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
