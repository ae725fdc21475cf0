"""The batch script of a run: a template, in which every value is quoted for the shell."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from dsv2_train.cli.cluster.node import REFUSED
from dsv2_train.cli.launch.place import num_nodes_of
from dsv2_train.cli.main import EXIT_CONFIG_ERROR, EXIT_STOPPED
from dsv2_train.config.run import RunConfig
from dsv2_train.config.sections.cluster import SlurmConfig

TEMPLATE = Path(__file__).resolve().parents[3] / "launch" / "slurm" / "train.sbatch.j2"

# When the first node has ended well, torchrun has ended on all: what remains then hangs.
_WAIT_S = 60
_REQUEUE_WAIT_S = 600


@dataclass(frozen=True)
class Job:
    """A run as Slurm is to run it.

    Attributes:
        config: the run.
        slurm: its section of the configuration.
        config_path: where the job finds the resolved configuration; absolute.
        command: the line that submits the run, to show again.
    """

    config: RunConfig
    slurm: SlurmConfig
    config_path: Path
    command: Sequence[str]

    def script(self) -> str:
        """The script for sbatch; what of it Slurm reads are words that need no quotes."""
        cluster, slurm = self.config.cluster, self.slurm
        return _template().render(
            options=list(_options(self.config, slurm)),
            run_name=self.config.run.name,
            environment=cluster.environment,
            wait_s=_WAIT_S,
            srun_options=list(_srun_options(slurm, Path.cwd())),
            python=slurm.python or ("python3" if slurm.container else sys.executable),
            config=self.config_path,
            refused_variable=REFUSED,
            refused=self.config.run.folder.absolute() / "logs" / "refused",
            command=shlex.join(self.command),
            exit_config_error=EXIT_CONFIG_ERROR,
            exit_stopped=EXIT_STOPPED,
            requeue=slurm.requeue,
            requeue_wait_s=_REQUEUE_WAIT_S,
        )


def _options(config: RunConfig, slurm: SlurmConfig) -> Iterator[str]:
    yield f"--job-name={config.run.name}"
    yield f"--partition={slurm.partition}"
    if slurm.account is not None:
        yield f"--account={slurm.account}"
    if slurm.qos is not None:
        yield f"--qos={slurm.qos}"
    yield f"--nodes={num_nodes_of(config)}"
    yield "--ntasks-per-node=1"
    if slurm.gpus_per_node is not None:
        yield f"--gpus-per-node={slurm.gpus_per_node}"
    if slurm.cpus_per_task is not None:
        yield f"--cpus-per-task={slurm.cpus_per_task}"
    yield f"--time={slurm.time_limit_minutes}"
    yield f"--signal=USR1@{slurm.signal_before_end_s}"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    yield "--open-mode=append"
    yield from slurm.options


def _srun_options(slurm: SlurmConfig, working_folder: Path) -> Iterator[str]:
    if slurm.cpus_per_task is not None:  # not taken over from the job
        yield f"--cpus-per-task={slurm.cpus_per_task}"
    if slurm.container is not None:
        mounts = [f"{working_folder}:{working_folder}", *slurm.container_mounts]
        yield f"--container-image={slurm.container}"
        yield f"--container-mounts={','.join(mounts)}"
        yield f"--container-workdir={working_folder}"


class _Comment(str):
    """Text behind a `#`, on one line."""


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        finalize=_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["comment"] = lambda text: _Comment(" ".join(str(text).split()))
    return environment.from_string(TEMPLATE.read_text())


def _quoted(value: object) -> str:
    """What every `{{ }}` of the template goes through."""
    return value if isinstance(value, _Comment) else shlex.quote(str(value))
