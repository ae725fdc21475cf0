"""What a run must be so that a Slurm job can do it."""

from collections.abc import Iterator

from dsv2_train.cli.launch.place import num_nodes_of
from dsv2_train.config.problems import Check, Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.planner.memory import checkpoint_bytes

# Slurm replaces these in the name of a file, and an end of a line ends an option.
_NOT_IN_OUTPUT = "%\\"


def _has_section(config: RunConfig) -> Iterator[Problem]:
    if config.cluster.slurm is None:
        allowed = "must be a section; choose cluster=h800, or set its keys for your Slurm"
        yield Problem("cluster.slurm", None, allowed)


def _output_can_be_named(config: RunConfig) -> Iterator[Problem]:
    folder = str(config.run.folder.absolute())
    if not folder.isprintable() or set(_NOT_IN_OUTPUT) & set(folder):
        allowed = (
            "must be a path without % and backslash that prints on a line: Slurm names a log in it"
        )
        yield Problem("run.dir", folder, allowed)


def _a_checkpoint_is_written_in_time(config: RunConfig) -> Iterator[Problem]:
    slurm = config.cluster.slurm
    if slurm is None:
        return
    size_bytes = checkpoint_bytes(config)
    needed_s = size_bytes / (1e9 * slurm.checkpoint_gb_per_s)
    if slurm.signal_before_end_s < needed_s:
        allowed = (
            f"must be at least {needed_s:.0f}: a checkpoint of {size_bytes / 1e9:,.0f} GB takes as "
            f"long at cluster.slurm.checkpoint_gb_per_s = {slurm.checkpoint_gb_per_s:g}"
        )
        yield Problem("cluster.slurm.signal_before_end_s", slurm.signal_before_end_s, allowed)


def _there_is_time_to_train(config: RunConfig) -> Iterator[Problem]:
    slurm = config.cluster.slurm
    if slurm is not None and 60 * slurm.time_limit_minutes <= slurm.signal_before_end_s:
        allowed = (
            f"must be more than cluster.slurm.signal_before_end_s = {slurm.signal_before_end_s} s, "
            "which are for the last checkpoint"
        )
        yield Problem("cluster.slurm.time_limit_minutes", slurm.time_limit_minutes, allowed)


def _ranks_have_gpus(config: RunConfig) -> Iterator[Problem]:
    slurm = config.cluster.slurm
    gpus = None if slurm is None else slurm.gpus_per_node
    on_a_node = config.parallel.world_size // num_nodes_of(config)
    if gpus is not None and gpus < on_a_node:
        allowed = f"must be at least {on_a_node}, the ranks of a node"
        yield Problem("cluster.slurm.gpus_per_node", gpus, allowed)


CHECKS: tuple[Check, ...] = (
    _has_section,
    _output_can_be_named,
    _a_checkpoint_is_written_in_time,
    _there_is_time_to_train,
    _ranks_have_gpus,
)
