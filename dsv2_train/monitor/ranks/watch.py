"""Every rank's parts of a step, gathered on a cadence."""

import socket
from typing import cast

import torch
import torch.distributed as dist

from dsv2_train.config.run import RunConfig
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.monitor.ranks.parts import PARTS, PartClock
from dsv2_train.monitor.ranks.stragglers import Stragglers
from dsv2_train.recipe.rank_map import stage_ranks


class RankWatch:
    """Measures a step in every `monitor.slow_ranks.every_steps`, and tells of slow ranks.

    Args:
        config: the run.
        monitor: on the rank that writes, else None.
        hosts: all ranks, over gloo.
        device: where this rank computes.

    Note:
        Collective over all ranks, as is `end_step`.
    """

    def __init__(
        self,
        config: RunConfig,
        monitor: Monitor | None,
        hosts: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._every_steps = config.monitor.slow_ranks.every_steps
        self._monitor, self._hosts = monitor, hosts
        self._clock = PartClock(device)
        names: list[str | None] = [None] * hosts.size()
        dist.all_gather_object(names, socket.gethostname(), group=hosts)
        stages = stage_ranks(config.parallel)
        self._stragglers = Stragglers(config.monitor.slow_ranks, stages, cast(list[str], names))
        self._is_next = self._is_measured = False
        self._row: dict[str, float] = {}

    def begin_step(self) -> None:
        """Before a step; the first one after a start is not measured: it warms up."""
        self._is_measured = self._is_next
        if self._is_measured:
            self._clock.begin()

    def end_step(self, step: int) -> None:
        """After a step, counted from 1; where it was measured, one gather of 40 bytes a rank."""
        self._is_next = (step + 1) % self._every_steps == 0
        if not self._is_measured:
            return
        ours = torch.tensor(self._clock.end(), dtype=torch.float64)
        everyone = [torch.empty(len(PARTS), dtype=torch.float64) for _ in range(self._hosts.size())]
        dist.all_gather(everyone, ours, group=self._hosts)
        if self._monitor is None:
            return
        times_s = [each.tolist() for each in everyone]
        self._row = self._stragglers.row(times_s)
        for sentence in self._stragglers.check(times_s):
            self._monitor.alert("slow rank", f"step {step}: {sentence}")

    def row(self) -> dict[str, float]:
        """The part of a row that tells of the last measured step; empty if another row has it."""
        row, self._row = self._row, {}
        return row
