"""Everything a training loop needs, in one record."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from dsv2_train.checkpoint.background import Finished
from dsv2_train.checkpoint.disk.layout import SaveError
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
_RETRIES = "it is tried again at the next step; complete checkpoints are as they were"
_LAST = (
    "it must be written. See to what is told above; for room: `dsv2 checkpoint prune`, a smaller "
    "checkpoint.keep_last, and damaged_* folders, which only you remove. The same line, given "
    "again, goes on from the newest complete checkpoint, which is as it was"
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

        One that could not be written is tried again at once or, if it was to be written in the
        step itself, after the next one, with the state of then.

        Raises:
            SaveError: on every rank, when that fails too and a run is to stop then.

        Note:
            Collective over all ranks; does nothing where nothing is under way or due.
        """
        step = self.clock.step
        if self.checkpoints.under_way is None and not self.checkpoints.due(step):
            return
        go_on = self.config.checkpoint.on_failure == "go_on"
        with self.telemetry.stopwatch.checkpoint():
            self._heed(self.checkpoints.poll, go_on)
            if self.checkpoints.due(step):
                self._wait(go_on)
                self._heed(lambda: self.checkpoints.begin(*self._state()), go_on)

    def save(self) -> Path:
        """Write a checkpoint of the current clock, after the one under way. Collective.

        Raises:
            SaveError: on every rank, when the checkpoint of this clock is not complete.
        """
        self._wait(go_on=True)
        try:
            return self.checkpoints.save(*self._state())
        except SaveError as error:
            raise SaveError(f"{error}\n{_LAST}") from error

    def settle_checkpoint(self) -> None:
        """Before a run ends otherwise on every rank: see the checkpoint that is under way through.

        Raises nothing for one that could not be written: what ended the run is what to tell of.
        Collective over all ranks.
        """
        self._wait(go_on=True)

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
        except SaveError as error:
            will_retry = self.checkpoints.will_retry
            if not will_retry and not go_on:
                raise SaveError(f"step {self.clock.step}: {error}\n{_STOPS}") from error
            if self.monitor is not None:
                what_now = _RETRIES if will_retry else _GOES_ON
                told = f"step {self.clock.step}: {error}\n{what_now}"
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
