"""The machines, for launchers, planner and a searched schedule."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dsv2_train.config.section import Section

# Slurm reads its options before a shell does: nothing can be quoted there for sure.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/@%+=,-]*$")]
Option = Annotated[str, Field(pattern=r"^--[a-z]+[a-z-]*(=[A-Za-z0-9_.:/@%+=,-]+)?$")]
Mount = Annotated[str, Field(pattern=r"^[^:,\s]+:[^:,\s]+(:[a-z+]+)?$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]*$")]


class EnvironmentVariable(Section):
    """What a variable is set to on every node, and why."""

    name: Name
    value: Line
    reason: Line


class SlurmConfig(Section):
    """How Slurm is asked for the nodes; one task a node starts the ranks there.

    `options`: more of sbatch, one a line, e.g. `--exclusive`.
    `python`: has dsv2_train, on every node (a venv on a shared file system) or in the container;
    null for the one that submits, or python3 of the container.
    `container`: image for pyxis (`srun --container-image`), `container_mounts` in it, besides the
    working folder, as FROM:TO.
    `requeue`: a job that was stopped, or failed, asks to be run again. A configuration error ends
    it, and so does a crash loop.
    `chain`: jobs, each of which begins when the one before has ended: for runs longer than
    `time_limit_minutes`.
    `signal_before_end_s`: before the time limit a run is asked to save and stop. Slurm may ask up
    to a minute earlier.
    `checkpoint_gb_per_s`: what the file system takes from all nodes together, to tell whether a
    checkpoint can be written in that time.
    """

    partition: Word
    time_limit_minutes: PositiveInt
    account: Word | None = None
    qos: Word | None = None
    gpus_per_node: PositiveInt | None = None
    cpus_per_task: PositiveInt | None = None
    options: Annotated[tuple[Option, ...], Field(strict=False)] = ()
    python: Line | None = None
    container: Line | None = None
    container_mounts: Annotated[tuple[Mount, ...], Field(strict=False)] = ()
    requeue: bool = False
    chain: PositiveInt = 1
    signal_before_end_s: PositiveInt = 120
    checkpoint_gb_per_s: PositiveFloat = 1.0


class PreflightConfig(Section):
    """What machines are held against; a figure that is null is shown, not judged.

    `before_training`: a run begins with a preflight; `dsv2 preflight` is one alone.
    `within_node_gb_per_s`, `between_nodes_gb_per_s`: from a rank to another, one way; the bus
    bandwidth of collectives as well.
    `disk_gb_per_s`: what a node writes to the run's folder, and reads back.
    `min_share`: of these; less fails. A link that has lost lanes, or goes another way, is at half
    or below; what protocols take is less than a third.
    `max_clock_skew_s`: of a rank against rank 0. Heartbeats and logs of nodes are compared.
    """

    before_training: bool = False
    within_node_gb_per_s: PositiveFloat | None = None
    between_nodes_gb_per_s: PositiveFloat | None = None
    disk_gb_per_s: PositiveFloat | None = None
    min_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    max_clock_skew_s: PositiveFloat = 0.5


class ClusterConfig(Section):
    """Nodes are alike; ranks are placed on them in order.

    `device`: its peak is what a plan is held against, its speeds are what a schedule is searched
    for; what a rank computes on is not chosen by it. A preflight expects GPUs of that name.
    `hang_timeout_s`: how long a rank may stand still before all ranks are ended, with a report of
    who is missing where; null does not watch. The longest pipeline op, and the longest wait for
    the disk, must be shorter.
    `group_timeout_s`: how long a collective of any process group may wait for its peers. The first
    ones wait for ranks that still build or read, later ones for the slowest step.
    `max_restarts`: how often torchrun starts the ranks of a launch again after one has failed.
    `crash_loop`: when so many starts in a row, of torchrun or of jobs, went on from the same step
    and failed, there is no other.
    `environment`: of every rank; what is set already where a run is launched wins, but
    not under Slurm, whose script sets it.
    """

    ranks_per_node: PositiveInt
    device: str = Field(default="cpu", min_length=1)
    preflight: PreflightConfig = PreflightConfig()
    hang_timeout_s: PositiveFloat | None = 600.0
    group_timeout_s: PositiveFloat = 1800.0
    max_restarts: NonNegativeInt = 0
    crash_loop: PositiveInt = 3
    environment: Annotated[tuple[EnvironmentVariable, ...], Field(strict=False)] = ()
    slurm: SlurmConfig | None = None
