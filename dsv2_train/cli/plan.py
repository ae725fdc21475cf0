"""`dsv2 plan`: what a run will be, before a GPU is spent on it."""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from dsv2_train.cli.resolve import resolve
from dsv2_train.config.problems import ConfigError, Problem
from dsv2_train.config.run import RunConfig
from dsv2_train.planner.draw import draw_step
from dsv2_train.planner.render import render
from dsv2_train.planner.report import make_report

_WIDTH_OFF_TERMINAL = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `dsv2 plan` takes."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")
    parser.add_argument(
        "--at-tokens",
        nargs="+",
        action="extend",
        default=[],
        type=_token_count,
        metavar="TOKENS",
        help="show the recipe at these token counts too, e.g. 2.0e12",
    )
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="FOLDER",
        help="draw the first step: as text, pipeline.png, and pipeline.json for Perfetto",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan of a configuration; needs no data, no GPU and no torch.

    Raises:
        ConfigError: with every problem of the configuration.
    """
    config = resolve(args.overrides, need_data=False)
    report = make_report(config, args.at_tokens)
    text = _drawn(config, args.draw) if args.draw else ""
    if args.json:
        print(json.dumps(asdict(report), indent=2))
        return 0
    width = None if sys.stdout.isatty() else _WIDTH_OFF_TERMINAL
    Console(width=width).print(render(report))
    if text:
        print(f"\n{text}\ndrawn in {args.draw}")
    return 0


def _drawn(config: RunConfig, folder: Path) -> str:
    try:
        return draw_step(config, folder)
    except OSError as error:
        allowed = f"must be a folder that can be written ({error.strerror})"
        raise ConfigError([Problem("--draw", str(folder), allowed)]) from error


def _token_count(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"found {text!r}; must be a number of tokens, 0 or more")
    return int(value)
