"""A Slurm cluster on this one machine: two nodes, started for tests and stopped."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from tests.helpers.processes import wait_until

NODES = ("n0", "n1")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
START_TIMEOUT_S = 60.0

# One host is every node by `-N` and a port of its own, with the processors that are said here
# (config_overrides). A requeued job waits until its credential has expired, hence 5 s; a node is
# given up 6 s after its slurmd was last heard of, and a job that is ended has 15 s.
CONFIGURATION = """\
ClusterName=dsv2
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=6
MessageTimeout=4
KillWait=15
OverTimeLimit=1
MinJobAge=3600
JobRequeue=1
{nodes}
PartitionName=train Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
{more}
"""


def missing_programs() -> list[str]:
    """What of Slurm this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Slurm:
    """A running cluster.

    Args:
        folder: for all that it writes; new, and short, since sockets lie in it.
        more: lines for slurm.conf, such as nodes that only a test of a script sees.

    Attributes:
        environment: what its programs need to find it.
    """

    def __init__(self, folder: Path, more: str = "") -> None:
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._write(more)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)

    def kill_node(self, node: str, *, with_steps: bool) -> None:
        """Kill a node's slurmd, and what its job steps run as well or not."""
        slurmd = self._daemons.pop(f"slurmd-{node}")
        slurmd.kill()
        slurmd.wait()
        if with_steps:
            self._kill_steps(node)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's programs, or one that calls them."""
        return subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows about a job, by Slurm's names of the fields."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: str, *states: str, timeout_s: float) -> dict[str, str]:
        """Wait until a job is in one of these states; what Slurm knows about it then."""
        wanted = " or ".join(states)
        wait_until(
            lambda: self.job(job_id)["JobState"] in states,
            lambda: f"job {job_id} is to be {wanted}: {self.job(job_id)}",
            timeout_s,
        )
        return self.job(job_id)

    def close(self) -> None:
        """End every job and every process."""
        if "slurmctld" in self._daemons:
            with suppress(subprocess.SubprocessError):
                self.run("scancel", "--full", "--signal=KILL", "--user=root")
        for node in NODES:
            self._kill_steps(node)
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        self._daemons.clear()

    def _start(self) -> None:
        munge = self._folder / "munge"
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        options = ["--foreground", "--force", "--num-threads=2", f"--socket={munge}/socket"]
        self._daemon("munged", "munged", *options, *files)
        wait_until((munge / "socket").exists, lambda: "munged listens", START_TIMEOUT_S)
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(self._nodes_are_idle, lambda: "the nodes are idle", START_TIMEOUT_S)

    def _nodes_are_idle(self) -> bool:
        partition = ["--noheader", "--Node", "--partition=train", "--format=%t"]
        said = self.run("sinfo", *partition, check=False).stdout
        return said.split() == ["idle"] * len(NODES)

    def _write(self, more: str) -> None:
        for name in ("munge", "state", *(f"spool/{node}" for node in NODES)):
            (self._folder / name).mkdir(parents=True)
        (self._folder / "munge").chmod(0o700)
        key = self._folder / "munge/key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host, ports = socket.gethostname(), _free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        configuration = CONFIGURATION.format(
            host=host, port=ports[0], folder=self._folder, nodes="\n".join(nodes), more=more
        )
        (self._folder / "slurm.conf").write_text(configuration)

    def _daemon(self, name: str, *command: str) -> None:
        with (self._folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _kill_steps(self, node: str) -> None:
        """Kill the keepers of a node's steps, found by the sockets they listen on, and the rest."""
        sockets = f"{self._folder}/spool/{node}/"
        for keeper in _listeners(sockets):
            for pid in [keeper, *_descendants(keeper)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with closing(socket.socket()) as first:
        sockets = [first, *(socket.socket() for _ in range(count - 1))]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
    return ports


def _listeners(prefix: str) -> set[int]:
    """Processes that hold a socket whose path begins so."""
    table = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    held = {f"socket:[{row[6]}]" for row in table if len(row) > 7 and row[7].startswith(prefix)}
    return {pid for pid in _processes() if held.intersection(_open_files(pid))}


def _open_files(pid: int) -> Iterator[str]:
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield os.readlink(file)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _descendants(pid: int) -> list[int]:
    """Children first found, theirs after them."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *_descendants(child)]
    return found
