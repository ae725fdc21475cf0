"""How far the clocks of ranks are apart, from the middle of a message there and back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter, time

import torch
import torch.distributed as dist

from dsv2_train.cli.preflight.report import Row, judged, name_ranks

_ROUND_TRIPS = 5


@dataclass(frozen=True)
class Skew:
    """A clock against that of rank 0.

    Attributes:
        offset_s: what it shows more.
        error_s: half of the round trip: the offset is off by no more.
    """

    offset_s: float
    error_s: float

    @property
    def least_s(self) -> float:
        """What the clocks are apart at least."""
        return max(0.0, abs(self.offset_s) - self.error_s)


def clock_skews(hosts: dist.ProcessGroup) -> list[Skew]:
    """Every rank's clock against that of rank 0, by rank; empty on all but rank 0.

    Args:
        hosts: all ranks, over gloo.

    Note:
        Collective: five messages of 8 bytes to each rank and back, one rank after another.
    """
    if hosts.rank() != 0:
        _answer(hosts)
        return []
    return [Skew(0.0, 0.0), *(_skew_of(rank, hosts) for rank in range(1, hosts.size()))]


def judge_clocks(skews: Sequence[Skew], hosts: Sequence[str], max_skew_s: float) -> Iterator[Row]:
    """One row of the clocks that are farthest apart.

    Args:
        skews: by rank.
        hosts: by rank.
        max_skew_s: between a rank and rank 0.
    """
    worst = max(range(len(skews)), key=lambda rank: skews[rank].least_s)
    far = [rank for rank, skew in enumerate(skews) if skew.least_s > max_skew_s]
    one = skews[worst]
    told = f"{one.offset_s:+.4f} s (+- {one.error_s:.4f}), {name_ranks(far or [worst], hosts)}"
    yield judged("clock against rank 0's", told, f"within {max_skew_s:g} s", is_good=not far)


def _skew_of(rank: int, hosts: dist.ProcessGroup) -> Skew:
    message = torch.zeros(1, dtype=torch.float64)
    trips = []
    for _ in range(_ROUND_TRIPS):
        start_s, wall_s = perf_counter(), time()
        dist.send(message, group=hosts, group_dst=rank)
        dist.recv(message, group=hosts, group_src=rank)
        trip_s = perf_counter() - start_s
        trips.append(Skew(message.item() - (wall_s + trip_s / 2), trip_s / 2))
    return min(trips, key=lambda skew: skew.error_s)


def _answer(hosts: dist.ProcessGroup) -> None:
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(_ROUND_TRIPS):
        dist.recv(message, group=hosts, group_src=0)
        message[0] = time()
        dist.send(message, group=hosts, group_dst=0)
