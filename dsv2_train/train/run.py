"""Everything a training loop needs, in one record."""

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from dsv2_train.checkpoint.disk.state import GuardState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.config.run import RunConfig
from dsv2_train.data.loader import Split
from dsv2_train.distributed.env import Env
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.optim.zero import ZeroOptimizer
from dsv2_train.pipeline.executor import Executor
from dsv2_train.pipeline.profiler import Profiler
from dsv2_train.recipe.clock import Clock, Schedule
from dsv2_train.train.signals import StopSignals
from dsv2_train.train.telemetry.telemetry import Telemetry


@dataclass
class Run:
    """One rank's share of a run; `clock`, `guard` and the skip list change while it trains.

    Attributes:
        chunks: this rank's part of the model, wrapped for data parallelism, by chunk.
        executor: runs microbatches through the pipeline.
        monitor: on the rank that writes metrics, else None.
        world: the group of all ranks.
        hosts: all ranks, over a back end that takes host tensors and objects.
        guard: what the guards against bad numbers remember.
    """

    config: RunConfig
    env: Env
    groups: ProcessGroupCollection
    world: ProcessGroup
    hosts: ProcessGroup
    schedule: Schedule
    clock: Clock
    guard: GuardState
    chunks: list[DistributedDataParallel]
    optimizer: ZeroOptimizer
    executor: Executor
    train_split: Split
    validation_split: Split
    checkpoints: CheckpointManager
    monitor: Monitor | None
    telemetry: Telemetry
    profiler: Profiler
    signals: StopSignals

    @property
    def is_done(self) -> bool:
        """True when the recipe's end is reached."""
        return self.schedule.is_done(self.clock)

    @property
    def evaluation_due(self) -> bool:
        """True after every `recipe.eval_every_steps`-th step and after the last one."""
        return self.clock.step % self.config.recipe.eval_every_steps == 0 or self.is_done

    def num_microbatches(self, num_samples: int) -> int:
        """Microbatches of each pipeline, if the pipelines share `num_samples`."""
        return num_samples // (self.config.recipe.micro_batch_size * self.groups.dp.size())
