"""`dsv2 train`: one rank of a run, as torchrun starts it; launch/local.sh starts them all."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from dsv2_train.checkpoint.disk.layout import latest_complete
from dsv2_train.cli.launch.failure import REFUSALS
from dsv2_train.cli.preflight.suite import require_preflight
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.checks.all import cross_check
from dsv2_train.config.load import load_file
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import activity
from dsv2_train.distributed import env as environment
from dsv2_train.distributed import groups as process_groups
from dsv2_train.distributed.activity import Phase
from dsv2_train.monitor.report import Closing, closing_message
from dsv2_train.train.attempts import begin_again, end_torchrun, end_well, this_start
from dsv2_train.train.loop import train
from dsv2_train.train.run import Run
from dsv2_train.train.setup import build_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.add_argument("--config", type=Path, required=True, help="a resolved config.yaml")
    parser.add_argument(
        "--command", default="launch/local.sh", help="the line that started the run, to show again"
    )


@record
def run(arguments: argparse.Namespace) -> int:
    """Train what the config says, on this rank.

    The outermost frame that sees an exception, so that torchrun learns which rank raised it first.
    """
    activity.start()
    config = load_file(arguments.config)
    begin_again(config)
    env = environment.start(config.cluster.group_timeout_s)
    if config.cluster.preflight.before_training:
        require_preflight(config, env)
    this_run = build_run(config, env)
    start = this_start(this_run)
    try:
        with activity.phase(Phase.BETWEEN_STEPS):
            train(this_run)
    finally:
        this_run.signals.close()
        if this_run.monitor is not None:
            this_run.monitor.close()
    end_well(this_run, start)
    with activity.phase(Phase.END):
        _say_what_is_where(this_run, arguments.command)
        process_groups.destroy()
        environment.stop()
    return 0


def _say_what_is_where(run: Run, command: str) -> None:
    if run.monitor is None:
        return
    closing = Closing(
        headline=_headline(run),
        checkpoint=latest_complete(run.checkpoints.folder),
        plots=run.monitor.draw_plots(),
        metrics=run.monitor.metrics_path,
        wandb_folder=run.monitor.wandb_folder,
        wandb_is_offline=run.monitor.wandb_is_offline,
        commands=_next_commands(run, command),
    )
    run.monitor.message(closing_message(closing))


def _headline(run: Run) -> str:
    steps = f"{run.clock.step} of {run.schedule.last_step(run.clock)} steps"
    return f"{'done' if run.is_done else 'stopped cleanly'}: {steps}"


def _next_commands(run: Run, command: str) -> list[tuple[str, str]]:
    """What a user can do next, from the line that started this run; only what would be accepted."""
    steps = run.schedule.last_step(run.clock)
    what, line = "resume", command
    if run.is_done:
        what, line = "train longer", f"{command} recipe.num_steps={2 * steps}"
    return [(what, line), *_another_layout(run.config, line), *_on_one_gpu(run)]


def _another_layout(config: RunConfig, command: str) -> Iterator[tuple[str, str]]:
    layout = {"pp": 4, "ep": 1}
    other = config.model_copy(update={"parallel": config.parallel.model_copy(update=layout)})
    if other.parallel == config.parallel or cross_check(other):
        return
    keys = " ".join(f"parallel.{key}={size}" for key, size in layout.items())
    yield "in another layout", f"{command} {keys}"


def _on_one_gpu(run: Run) -> Iterator[tuple[str, str]]:
    """The experiment that trains the same model on the same data in bf16, after a run on CPUs."""
    choice = "experiment=debug_1gpu"
    gpu = resolve([choice], need_data=False)
    same = (run.config.model, run.config.data) == (gpu.model, gpu.data)
    if same and run.env.device.type == "cpu":
        yield "on one GPU", f"launch/local.sh {choice}"


def main() -> int:
    """Entry of `python -m dsv2_train.cli.train`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    try:
        return run(parser.parse_args()) or 0
    except Exception as error:
        if type(error).__name__ in REFUSALS:
            end_torchrun()
        raise


if __name__ == "__main__":
    sys.exit(main())
