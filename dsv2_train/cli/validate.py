"""`dsv2 validate`: check a configuration and its data, start nothing."""

import argparse
from pathlib import Path

from dsv2_train.cli.resolve import resolve
from dsv2_train.config.load import to_yaml
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.data.manifest import DataError, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument(
        "--without-data", action="store_true", help="check the configuration alone, not the data"
    )
    parser.add_argument("--show", action="store_true", help="print the resolved configuration")


def run(arguments: argparse.Namespace) -> int:
    """Print `valid`, or raise ConfigError with every problem; reads the whole corpus."""
    config = resolve(arguments.overrides, need_data=not arguments.without_data)
    if not arguments.without_data:
        _verify_data(config)
    print(to_yaml(config) if arguments.show else f"valid: {config.run.name}")
    return 0


def _verify_data(config: RunConfig) -> None:
    try:
        verify(Path(config.data.path))
    except DataError as error:
        raise ConfigError([Problem("data.path", config.data.path, str(error))]) from error
