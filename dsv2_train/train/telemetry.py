"""What a run tells while it trains: rows of metrics, read from the device once a log step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dsv2_train.config.run import RunConfig
from dsv2_train.data.loader import Batch
from dsv2_train.distributed.collectives import all_sum
from dsv2_train.model.moe.router import DeviceLimitedRouter
from dsv2_train.monitor.memory import peak_memory
from dsv2_train.monitor.moe_load import ExpertLoad, load_row
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.monitor.throughput import Stopwatch, throughput
from dsv2_train.recipe.clock import Clock, Point
from dsv2_train.recipe.flops import forward_flops
from dsv2_train.recipe.utilization import peak_tflops


@dataclass(frozen=True)
class StepResult:
    """What a step reports, still on the device.

    Attributes:
        loss: [] mean over this rank's micro-batches on the last stage, 0 on the others.
        grad_norm: [] global norm before clipping.
    """

    loss: Tensor
    grad_norm: Tensor


class Telemetry:
    """Turns steps into rows: every rank takes part in the reductions, one rank writes.

    A row's loss, gradient norm and expert load are those of its own step, so that a resumed run
    writes the rows that an undisturbed one would have; speeds are means since the last row.

    Args:
        config: the run.
        monitor: on the rank that writes, else None.
        routers: this rank's routers by the index of their layer in the model.
        world: the group of all ranks.
        dp_size: data-parallel ranks that share a loss.
        device: where results are.
    """

    def __init__(
        self,
        config: RunConfig,
        monitor: Monitor | None,
        routers: dict[int, DeviceLimitedRouter],
        world: ProcessGroup,
        dp_size: int,
        device: torch.device,
    ) -> None:
        self._config = config
        self._monitor = monitor
        self._routers = routers
        self._world = world
        self._dp_size = dp_size
        self._device = device
        model = config.model
        self._load = ExpertLoad(model.num_layers, model.num_routed_experts, device)
        flops = forward_flops(model, config.recipe.sequence_length, "causal")
        self._flops_per_token = flops.training
        self._peak_tflops = _peak(device, config.recipe.precision)
        self.stopwatch = Stopwatch()

    def begin_step(self) -> None:
        """Forget what the routers counted before this step."""
        for router in self._routers.values():
            router.reset_counters()

    def data(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the wait for them is measured."""
        return self.stopwatch.timed(batches)

    def end_step(self, clock: Clock, point: Point, result: StepResult) -> None:
        """Count a step; on a log step, reduce, read and report. Collective.

        Args:
            clock: after the step.
            point: what the recipe asked of the step.
            result: what the step reported.
        """
        self.stopwatch.add_step(point.num_tokens)
        if clock.step % self._config.monitor.log_every_steps == 0 or clock.step == 1:
            self._report(clock, self._row(point, result))

    def _row(self, point: Point, result: StepResult) -> dict[str, float]:
        for layer_idx, router in self._routers.items():
            self._load.add(
                layer_idx, router.expert_counts, router.balance_sums, router.num_microbatches
            )
        routing = load_row(self._load.reduce(self._world), self._config.model.num_device_groups)
        row = {
            "train/loss": all_sum(result.loss.double(), self._world).item() / self._dp_size,
            "train/lr": point.lr,
            "train/grad_norm": result.grad_norm.item(),
            "train/global_batch_size": point.global_batch_size,
        }
        speed = throughput(
            self.stopwatch.cut(),
            self._flops_per_token,
            self._config.parallel.world_size,
            self._peak_tflops,
        )
        return {**row, **routing, **speed, **peak_memory(self._device)}

    def evaluated(self, clock: Clock, loss: float) -> None:
        """Report a validation loss."""
        self._report(clock, {"eval/loss": loss})

    def _report(self, clock: Clock, row: dict[str, float]) -> None:
        if self._monitor is not None:
            tokens = clock.consumed_samples * self._config.recipe.sequence_length
            self._monitor.record(row, clock.step, clock.consumed_samples, tokens)


def _peak(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device), precision)
