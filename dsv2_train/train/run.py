"""Everything a training loop needs, in one record."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from dsv2_train.checkpoint.background import Finished
from dsv2_train.checkpoint.disk.layout import CheckpointError, SaveError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.config.load import to_yaml
from dsv2_train.config.run import RunConfig
from dsv2_train.data.loader import Split
from dsv2_train.distributed.env import Env
from dsv2_train.distributed.sharding import Piece
from dsv2_train.monitor.monitor import Monitor
from dsv2_train.optim.zero import ZeroOptimizer
from dsv2_train.pipeline.executor import Executor
from dsv2_train.pipeline.profiler import Profiler
from dsv2_train.recipe.clock import Clock, Schedule
from dsv2_train.train.signals import StopSignals
from dsv2_train.train.telemetry import Telemetry

_WORTH_TELLING_S = 0.1

_STOPS = (
    "the run stops, as checkpoint.on_failure says; the same line, given again, goes on from the "
    "newest complete checkpoint, which is as it was"
)
_GOES_ON = (
    "the run goes on; complete checkpoints are as they were, and the next one is tried in its time"
)


@dataclass
class Run:
    """One rank's share of a run; only `clock` changes while it trains.

    Attributes:
        chunks: this rank's part of the model, wrapped for data parallelism, by chunk.
        executor: runs micro-batches through the pipeline.
        monitor: on the rank that writes metrics, else None.
        world: the group of all ranks.
    """

    config: RunConfig
    env: Env
    groups: ProcessGroupCollection
    world: ProcessGroup
    schedule: Schedule
    clock: Clock
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
        """Micro-batches of each pipeline, if the pipelines share `num_samples`."""
        return num_samples // (self.config.recipe.micro_batch_size * self.groups.dp.size())

    def keep_checkpoints(self) -> None:
        """After a step: hear of the checkpoint that is under way, begin the one that is due.

        Raises:
            CheckpointError: on every rank, when one could not be written and a run is to stop then.

        Note:
            Collective over all ranks; does nothing where nothing is under way or due.
        """
        is_due = self.checkpoints.due(self.clock.step)
        if self.checkpoints.under_way is None and not is_due:
            return
        go_on = self.config.checkpoint.on_failure == "go_on"
        with self.telemetry.stopwatch.checkpoint():
            self._heed(self.checkpoints.poll, go_on)
            if is_due:
                self._wait(go_on)
                self._heed(lambda: self.checkpoints.begin(*self._state()), go_on)

    def save(self) -> Path:
        """Write a checkpoint of the current clock, after the one under way. Collective.

        Raises:
            CheckpointError: on every rank, when the checkpoint of this clock is not complete.
        """
        self._wait(go_on=True)
        return self.checkpoints.save(*self._state())

    def _wait(self, go_on: bool) -> None:
        step, start_s = self.checkpoints.under_way, time.perf_counter()
        if step is None:
            return
        self._heed(self.checkpoints.wait, go_on)
        waited_s = time.perf_counter() - start_s
        if self.monitor is not None and waited_s >= _WORTH_TELLING_S:
            self.monitor.message(
                f"step {self.clock.step}: waited {waited_s:.1f} s for the checkpoint of step {step}"
            )

    def _heed(self, work: Callable[[], Finished | None], go_on: bool) -> None:
        try:
            finished = work()
        except CheckpointError as error:
            if not go_on:
                raise SaveError(f"step {self.clock.step}: {error}\n{_STOPS}") from error
            if self.monitor is not None:
                told = f"step {self.clock.step}: {error}\n{_GOES_ON}"
                self.monitor.alert("checkpoint", told)
            return
        if finished is not None:
            self.telemetry.stopwatch.add_checkpoint_write(finished.elapsed_s)

    def _state(self) -> tuple[TrainState, list[Piece], str]:
        state = TrainState(
            step=self.clock.step,
            consumed_samples=self.clock.consumed_samples,
            consumed_tokens=self.schedule.consumed_tokens(self.clock),
            adam_step=self.optimizer.adam_step,
            wandb_run_id=self.monitor.wandb_run_id if self.monitor else None,
            skip_list=self.train_split.skip_list,
            corpus=self.train_split.sha256,
        )
        return state, list(self.optimizer.pieces()), to_yaml(self.config)
