"""`dsv2 preflight`: is this node fit for a run?"""

import argparse
import shutil
import tempfile
from pathlib import Path

from dsv2_train.cli.launch.devices import num_usable
from dsv2_train.cli.launch.torchrun import run_ranks
from dsv2_train.cli.resolve import resolve
from dsv2_train.config.load import to_yaml
from dsv2_train.config.run import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")


def run(arguments: argparse.Namespace) -> int:
    """Start the run's ranks of one node here, look at everything, show a table and a verdict.

    A run on several nodes looks at all of them when it starts, with
    `cluster.preflight.before_training`.

    Raises:
        ConfigError: with every problem of the configuration.
    """
    config = resolve(arguments.overrides, need_data=False)
    folder = Path(tempfile.mkdtemp(prefix="dsv2_preflight_"))
    file = folder / "config.yaml"
    file.write_text(to_yaml(config))
    worker = ["-m", "dsv2_train.cli.preflight.rank", "--config", str(file)]
    once = config.cluster.model_copy(update={"max_restarts": 0})
    status = run_ranks(worker, _num_ranks(config), folder / "logs", cluster=once).status
    if status == 0:
        shutil.rmtree(folder)
    return status


def _num_ranks(config: RunConfig) -> int:
    """Those of one node; where GPUs lack, one for each that is there, and the table tells."""
    wanted = min(config.parallel.world_size, config.cluster.ranks_per_node)
    return min(wanted, num_usable() or wanted)
