"""What is timed of an op: ours and its peers on one shape, with what the memory must move."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dsv2_kernels.testing.machine import Speeds
from dsv2_kernels.testing.timing import Timer, Times, alternate, ratio


@dataclass(frozen=True)
class Missing:
    """Stands for a peer that cannot run on this machine.

    Attributes:
        why: for example "liger_kernel is not installed".
    """

    why: str


Peer = Callable[[], object] | Missing


@dataclass(frozen=True)
class Case:
    """One op, one direction, one shape.

    Attributes:
        name: op and direction, for example "swiglu_gate forward".
        shape: of the problem, by name, for example {"rows": 24576, "width": 1536}.
        num_bytes: that must be read and written at least, every element once.
        num_flops: of matrix products; 0 where the memory's speed is the floor.
        ours: calls the kernel once.
        peers: by name, the same through something else: "eager", "compiled", a library.
    """

    name: str
    shape: Mapping[str, int]
    num_bytes: int
    ours: Callable[[], object]
    peers: Mapping[str, Peer]
    num_flops: int = field(default=0, kw_only=True)


def peers(function: Callable[..., object], *inputs: object) -> dict[str, Peer]:
    """A function of torch's, called as it is and compiled for these very shapes."""
    return {
        "eager": partial(function, *inputs),
        "compiled": partial(torch.compile(function, dynamic=False), *inputs),
    }


def measure(case: Case, timer: Timer, seconds: float, speeds: Speeds) -> dict[str, Any]:
    """Time a case; its record in the results.

    Args:
        case: called `ours` and by its peers' names, those that are here.
        timer: microseconds of one call.
        seconds: to spend; see `alternate`.
        speeds: of the device, in this run.

    Returns:
        What `record` gives.
    """
    here = {name: peer for name, peer in case.peers.items() if not isinstance(peer, Missing)}
    calls = {"ours": case.ours, **here}
    times, errors = alternate(calls, timer, seconds)
    return record(case, times, errors, speeds)


def record(
    case: Case, times: Mapping[str, Times], errors: Mapping[str, str], speeds: Speeds
) -> dict[str, Any]:
    """Figures of a case.

    Returns:
        Name, shape, bytes, FLOPs; `floor_us` and `bound`, what gives the floor; `us`, the rate
        that is, GB/s or TFLOP/s, and `of_floor`, the fraction of the measured copy or product that
        we reach; each peer's `us` and `ratio`, its time over ours. `error` stands in place of the
        figures of what failed, `missing` in place of those of a peer that cannot run here.
    """
    floor_us = speeds.floor_us(case.num_bytes, case.num_flops)
    is_memory = floor_us == speeds.floor_us(case.num_bytes, 0)
    found: dict[str, Any] = {
        "name": case.name,
        "shape": dict(case.shape),
        "num_bytes": case.num_bytes,
        "num_flops": case.num_flops,
        "floor_us": floor_us,
        "bound": "memory" if is_memory else "products",
        "peers": {},
    }
    ours = times.get("ours")
    if ours is None:
        found["error"] = errors["ours"]
    else:
        found["us"] = ours.summary
        found["of_floor"] = floor_us / ours.median
        found["gb_per_s"] = case.num_bytes / ours.median / 1e3
        found["tflop_per_s"] = case.num_flops / ours.median / 1e6
    for name, peer in case.peers.items():
        if isinstance(peer, Missing):
            found["peers"][name] = {"missing": peer.why}
            continue
        if name in errors:
            found["peers"][name] = {"error": errors[name]}
            continue
        found["peers"][name] = {"us": times[name].summary}
        if ours is not None:
            found["peers"][name]["ratio"] = ratio(times[name], ours)
    return found
