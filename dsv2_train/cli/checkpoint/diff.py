"""`dsv2 checkpoint diff`: what differs between two checkpoints, by their manifests."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from dsv2_train.checkpoint.disk import layout
from dsv2_train.checkpoint.disk.integrity import open_verified
from dsv2_train.checkpoint.disk.manifest import Manifest
from dsv2_train.cli.run_folder.changes import changes
from dsv2_train.config.load import read_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.description = (
        "Compare configurations field by field, clocks, and tensors by shape, element type and "
        "checksum, whatever the layouts. Reads no tensor. Exit status: 0 equal, 1 different."
    )
    parser.add_argument("a", type=Path, help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("b", type=Path, help="the other one")


def run(arguments: argparse.Namespace) -> int:
    """Print a line a difference.

    Raises:
        CheckpointError: for a path that leads to no checkpoint, or to a damaged one.
    """
    a, b = layout.checkpoint_at(arguments.a), layout.checkpoint_at(arguments.b)
    (manifest_a, state_a), (manifest_b, state_b) = open_verified(a), open_verified(b)
    config_a, config_b = read_values(a / layout.CONFIG), read_values(b / layout.CONFIG)
    parts = {
        "config": map(str, changes(config_a, config_b)),
        "clock": map(str, changes(asdict(state_a), asdict(state_b))),
        "tensors": _tensors(manifest_a, manifest_b),
    }
    print(f"{a} -> {b}")
    found = {title: list(lines) for title, lines in parts.items()}
    for title, lines in found.items():
        print(f"{title}: {'equal' if not lines else f'{len(lines)} differences'}")
        for line in lines:
            print(f"  {line}")
    return 1 if any(found.values()) else 0


def _tensors(a: Manifest, b: Manifest) -> Iterator[str]:
    for key in sorted(a.tensors.keys() | b.tensors.keys()):
        before, now = a.tensors.get(key), b.tensors.get(key)
        if before is None or now is None:
            yield f"{key}: in the {'second' if before is None else 'first'} only"
        elif (before.shape, before.dtype) != (now.shape, now.dtype):
            yield f"{key}: {before.shape} {before.dtype} -> {now.shape} {now.dtype}"
        elif before.checksum != now.checksum:
            yield f"{key}: checksum {before.checksum:016x} -> {now.checksum:016x}"
