"""Everything that a preflight looks at, on all ranks, and the verdict."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed as dist
from rich.console import Console

from dsv2_train.cli.preflight.clocks import Skew, clock_skews, judge_clocks
from dsv2_train.cli.preflight.device import Device, judge_devices, look_at
from dsv2_train.cli.preflight.disk import Disk, judge_disks, room_needed, try_disk
from dsv2_train.cli.preflight.links import Speed, judge_links, measure_links
from dsv2_train.cli.preflight.report import PreflightError, Report
from dsv2_train.cli.preflight.versions import Versions, judge_versions, versions
from dsv2_train.config.run import RunConfig
from dsv2_train.distributed.env import Env

# A preflight takes less than a minute: who is silent for so long does not come.
TIMEOUT_S = 120.0
_WIDTH_OFF_TERMINAL = 160

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """What one rank found.

    Attributes:
        disk: on the first rank of each node, else None.
        skews: of all clocks, on rank 0, else empty.
        speeds: of links and collectives that this rank tells of.
    """

    versions: Versions
    device: Device
    disk: Disk | None
    skews: list[Skew]
    speeds: list[Speed]


def require_preflight(config: RunConfig, env: Env) -> None:
    """Look at everything; rank 0 shows a table and the verdict.

    Raises:
        PreflightError: on every rank, with each thing that is not as it should be.

    Note:
        Collective over all ranks; less than a minute.
    """
    report = preflight(config, env)
    if env.rank == 0:
        console = Console()
        console.width = console.width if console.is_terminal else _WIDTH_OFF_TERMINAL
        console.print(report.table())
        print(report.verdict(), flush=True)
    if report.failed:
        raise PreflightError(report.verdict())


def preflight(config: RunConfig, env: Env) -> Report:
    """Look at everything, judge it on rank 0 and tell all ranks. Collective over all ranks."""
    start_s = time.perf_counter()
    control = dist.new_group(backend=dist.Backend.GLOO, timeout=timedelta(seconds=TIMEOUT_S))
    hosts = _gathered(socket.gethostname(), control)
    is_first_of_node = hosts.index(hosts[env.rank]) == env.rank
    found = Found(
        versions=versions(),
        device=look_at(env.device),
        disk=try_disk(config.run.checkpoint_folder) if is_first_of_node else None,
        skews=clock_skews(control),
        speeds=measure_links(env, hosts, config.parallel, control),
    )
    report = [_judge(config, _gathered(found, control), hosts, time.perf_counter() - start_s)]
    dist.broadcast_object_list(report, src=0, group=control)
    dist.destroy_process_group(control)
    return report[0]


def _judge(
    config: RunConfig, found: Sequence[Found], hosts: Sequence[str], elapsed_s: float
) -> Report:
    cluster = config.cluster
    disks = {rank: one.disk for rank, one in enumerate(found) if one.disk is not None}
    devices = min(cluster.ranks_per_node, config.parallel.world_size)
    rows = [
        *judge_versions([one.versions for one in found], hosts),
        *judge_devices([one.device for one in found], hosts, devices, cluster.device),
        *judge_links([speed for one in found for speed in one.speeds], hosts, cluster.preflight),
        *judge_disks(disks, hosts, room_needed(config), cluster.preflight),
        *judge_clocks(found[0].skews, hosts, cluster.preflight.max_clock_skew_s),
    ]
    return Report(rows, elapsed_s)


def _gathered(value: T, group: dist.ProcessGroup) -> list[T]:
    """A value of every rank, by rank. Collective."""
    everyone: list[T | None] = [None] * group.size()
    dist.all_gather_object(everyone, value, group=group)
    return cast(list[T], everyone)
