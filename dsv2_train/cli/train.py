"""`dsv2 train`: one rank of a run, as torchrun starts it; launch/local.sh starts them all."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from dsv2_train.checkpoint.layout import latest_complete
from dsv2_train.config.checks import cross_check
from dsv2_train.config.load import load_file
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed import env as environment
from dsv2_train.distributed import groups as process_groups
from dsv2_train.monitor.report import Closing, closing_message
from dsv2_train.train.loop import train
from dsv2_train.train.run import Run
from dsv2_train.train.setup import TIMEOUT_S, build_run


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
    config = load_file(arguments.config)
    env = environment.start(TIMEOUT_S)
    this_run = build_run(config, env)
    try:
        train(this_run)
    finally:
        if this_run.monitor is not None:
            this_run.monitor.close()
    _say_what_is_where(this_run, arguments.command)
    process_groups.destroy()
    environment.stop()
    return 0


def _say_what_is_where(run: Run, command: str) -> None:
    if run.monitor is None:
        return
    steps = f"{run.clock.step} of {run.schedule.last_step(run.clock)} steps"
    closing = Closing(
        headline=f"{'done' if run.is_done else 'stopped cleanly'}: {steps}",
        checkpoint=latest_complete(run.checkpoints.folder),
        plots=run.monitor.draw_plots(),
        metrics=run.monitor.metrics_path,
        wandb_folder=run.monitor.wandb_folder,
        wandb_is_offline=run.monitor.wandb_is_offline,
        commands=_next_commands(run, command),
    )
    run.monitor.message(closing_message(closing))


def _next_commands(run: Run, command: str) -> list[tuple[str, str]]:
    """What a user can do next, from the line that started this run; only what would be accepted."""
    config, steps = run.config, run.schedule.last_step(run.clock)
    resume = ("resume", command)
    if run.is_done:
        resume = ("train longer", f"{command} recipe.num_steps={2 * steps}")
    others = {
        "another layout": {"world_size": config.parallel.world_size, "pp": 4, "ep": 1},
        "on one GPU": {"world_size": 1, "pp": 1, "ep": 1},
    }
    return [resume, *_accepted(config, command, others)]


def _accepted(
    config: RunConfig, command: str, layouts: dict[str, dict[str, int]]
) -> Iterator[tuple[str, str]]:
    for words, layout in layouts.items():
        other = config.model_copy(update={"parallel": config.parallel.model_copy(update=layout)})
        if other.parallel == config.parallel or cross_check(other):
            continue
        keys = " ".join(f"parallel.{key}={size}" for key, size in layout.items())
        name = f"{config.run.name}_{words.rpartition(' ')[2].lower()}"
        yield words, f"{command} run.name={name} {keys}"


def main() -> int:
    """Entry of `python -m dsv2_train.cli.train`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args()) or 0


if __name__ == "__main__":
    sys.exit(main())
