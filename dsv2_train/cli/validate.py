"""`dsv2 validate`: check a configuration and its data, start nothing."""

import argparse
from pathlib import Path

from dsv2_train.cli.resolve import resolve
from dsv2_train.config.load import to_yaml
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.data.manifest import DataError, Manifest, verify
from dsv2_train.data.parts import read_lengths
from dsv2_train.data.sampler import num_unused_tokens, num_windows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument(
        "--without-data", action="store_true", help="check the configuration alone, not the data"
    )
    parser.add_argument("--show", action="store_true", help="print the resolved configuration")


def run(arguments: argparse.Namespace) -> int:
    """Print `valid` and what the data comes to, or raise ConfigError with every problem.

    Reads the whole corpus. With --show, standard output is the resolved configuration alone.
    """
    config = resolve(arguments.overrides, need_data=not arguments.without_data, to_train=True)
    manifest = None if arguments.without_data else _verify_data(config)
    print(to_yaml(config) if arguments.show else f"valid: {config.run.name}")
    if manifest is not None and not arguments.show:
        _print_samples(config, manifest)
    return 0


def _verify_data(config: RunConfig) -> Manifest:
    try:
        return verify(Path(config.data.path))
    except DataError as error:
        raise ConfigError([Problem("data.path", config.data.path, str(error))]) from error


def _print_samples(config: RunConfig, manifest: Manifest) -> None:
    """How each split is cut: documents are packed, so a long one goes on in the next sample."""
    length = config.recipe.sequence_length
    for name, split in manifest.splits.items():
        lengths = read_lengths(Path(config.data.path), split)
        unused = num_unused_tokens(split.num_tokens, length)
        print(
            f"  {name:<12}{num_windows(split.num_tokens, length):,} samples of {length:,} tokens; "
            f"{unused:,} of {split.num_tokens:,} tokens unused at the end\n"
            f"  {'':<12}{split.num_documents:,} documents, the longest {lengths.max(initial=0):,} "
            f"tokens; {(lengths > length).sum():,} longer than a sample go on in the next one"
        )
