"""`dsv2 validate`: check a configuration and its data, start nothing."""

import argparse

from dsv2_train.cli.resolve import resolve
from dsv2_train.config.load import to_yaml


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument(
        "--without-data", action="store_true", help="check the configuration alone, not the data"
    )
    parser.add_argument("--show", action="store_true", help="print the resolved configuration")


def run(arguments: argparse.Namespace) -> int:
    """Print `valid`, or raise ConfigError with every problem."""
    config = resolve(arguments.overrides, need_data=not arguments.without_data)
    print(to_yaml(config) if arguments.show else f"valid: {config.run.name}")
    return 0
