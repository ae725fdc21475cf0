"""NVIDIA devices of this node, counted without CUDA and torch: every rank takes one."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

from dsv2_train.config.problems import Check, Problem
from dsv2_train.config.run import RunConfig

# The driver keeps one entry a device here.
DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")

_NAMES = ("GPU-", "MIG-")


def enough_devices(num_nodes: int) -> Check:
    """Every rank of this node has a device. Where none is visible, all ranks run on the CPU."""

    def check(config: RunConfig) -> Iterator[Problem]:
        world_size, found = config.parallel.world_size, num_usable()
        if 0 < found < world_size // num_nodes:
            allowed = (
                f"must be at most {found * num_nodes}, {found} a node, the NVIDIA devices visible "
                "here: every rank takes one; for ranks on the CPU set CUDA_VISIBLE_DEVICES= (to "
                "nothing)"
            )
            yield Problem("parallel.world_size", world_size, allowed)

    return check


def num_usable() -> int:
    """Devices for the ranks of this node; 0 where they run on the CPU."""
    found = num_visible(DRIVER_FOLDER, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return found if _torch_has_cuda() else 0


def num_visible(driver_folder: Path, chosen: str | None) -> int:
    """Devices that CUDA would offer.

    Args:
        driver_folder: one entry a device; need not be there.
        chosen: value of CUDA_VISIBLE_DEVICES, indices or names of devices; None if it is not set.

    Returns:
        All of them, or those chosen before the first that is not there: CUDA stops at that one.
    """
    found = len(list(driver_folder.glob("*")))
    if chosen is None or found == 0:
        return found
    names = [name.strip() for name in chosen.split(",")]
    return len(list(takewhile(lambda name: _is_there(name, found), names)))


def _is_there(name: str, found: int) -> bool:
    return name.startswith(_NAMES) or (name.isdecimal() and int(name) < found)


def _torch_has_cuda() -> bool:
    """False for a build for the CPU alone, which says so in its version."""
    return not version("torch").endswith("+cpu")
