"""What a run tells while it trains: rows of metrics, read from the device once a log step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dsv2_train.checkpoint.disk.state import GuardState
from dsv2_train.config.run import RunConfig
from dsv2_train.model.moe.layer import MixtureOfExperts
from dsv2_train.monitor.memory import peak_memory
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.monitor.ranks.watch import RankWatch
from dsv2_train.monitor.throughput import Stopwatch, throughput
from dsv2_train.recipe.clock import Clock, Point
from dsv2_train.recipe.flops import forward_flops
from dsv2_train.recipe.mfu import peak_tflops
from dsv2_train.train.telemetry.routing_metrics import (
    RoutedStep,
    expert_map,
    gather_step,
    routing_row,
)


@dataclass(frozen=True)
class StepResult:
    """What a step has computed before its update.

    Attributes:
        loss: mean over the tokens of the step; the same bits on every rank.
        grad_norm: global norm before clipping; the same bits on every rank.
        norm: [] fp64, the same number on the device.
        microbatch_losses: [] each, of this rank's microbatches in order; on the last stage only.
    """

    loss: float
    grad_norm: float
    norm: Tensor
    microbatch_losses: tuple[Tensor, ...]


class Telemetry:
    """Turns steps into rows: every rank takes part in the reductions, one rank writes.

    A row's loss, gradient norm and routing are those of its own step, so that a resumed run
    writes the rows that an undisturbed one would have; speeds are means since the last row.

    Args:
        config: the run.
        monitor: on the rank that writes, else None.
        mixtures: this rank's mixtures of experts by the index of their layer in the model.
        world: the group of all ranks.
        ranks: tells of slow ones.
        device: where results are.
    """

    def __init__(
        self,
        config: RunConfig,
        monitor: Monitor | None,
        mixtures: Mapping[int, MixtureOfExperts],
        world: ProcessGroup,
        ranks: RankWatch,
        device: torch.device,
    ) -> None:
        self._config = config
        self._monitor = monitor
        self._mixtures = mixtures
        self._world = world
        self._ranks = ranks
        self._device = device
        flops = forward_flops(config.model, config.recipe.sequence_length, "causal")
        self._flops_per_token = flops.training
        self._peak_tflops = _peak(device, config.recipe.precision)
        self.stopwatch = Stopwatch()

    def begin_step(self) -> None:
        """Forget what the layers counted before this step, and time it where that is due."""
        for mixture in self._mixtures.values():
            mixture.statistics.zero_()
        self._ranks.begin_step()

    def end_step(
        self,
        clock: Clock,
        point: Point,
        result: StepResult,
        guard: GuardState,
        validation_loss: float | None,
    ) -> None:
        """Count a step; on a log step, with an evaluation and for a map, reduce and report.

        Args:
            clock: after the step.
            point: what the recipe asked of the step.
            result: what the step reported.
            guard: after the step.
            validation_loss: of an evaluation after the step.

        Note:
            Collective over all ranks.
        """
        self._ranks.end_step(clock.step)
        monitor = self._config.monitor
        self.stopwatch.add_step(point.num_tokens)
        row_is_due = clock.step % monitor.log_every_steps == 0 or clock.step == 1
        row_is_due = row_is_due or validation_loss is not None
        map_is_due = clock.step % monitor.expert_map_every_steps == 0
        if not (row_is_due or map_is_due):
            return
        routed = gather_step(self._mixtures, self._config.model, self._world)
        if row_is_due:
            row = self._row(point, result, routed)
            if validation_loss is not None:
                row["eval/loss"] = validation_loss
            if guard.last_bad_step:
                row["guard/skipped_steps"] = guard.skipped_steps
                row["guard/rollbacks"] = guard.rollbacks
            self._report(clock, row)
        if map_is_due and routed.layers and self._monitor is not None:
            self._monitor.record_map(expert_map(routed, self._config.model), clock.step)

    def _row(self, point: Point, result: StepResult, routed: RoutedStep) -> dict[str, float]:
        row = {
            "train/loss": result.loss,
            "train/lr": point.lr,
            "train/grad_norm": result.grad_norm,
            "train/global_batch_size": point.global_batch_size,
        }
        speed = throughput(
            self.stopwatch.cut(),
            self._flops_per_token,
            self._config.parallel.world_size,
            self._peak_tflops,
        )
        routing = routing_row(routed, self._config.model)
        return {**row, **routing, **speed, **self._ranks.row(), **peak_memory(self._device)}

    def _report(self, clock: Clock, row: dict[str, float]) -> None:
        if self._monitor is not None:
            tokens = clock.consumed_samples * self._config.recipe.sequence_length
            self._monitor.record(row, clock.step, clock.consumed_samples, tokens)


def _peak(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device), precision)
