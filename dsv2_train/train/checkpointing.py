"""When a run is saved, and what a checkpoint that cannot be written does to it."""

import time
from collections.abc import Callable
from pathlib import Path

from dsv2_train.checkpoint.async_save import Finished
from dsv2_train.checkpoint.disk.errors import SaveError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.config.load import to_yaml
from dsv2_train.distributed import activity
from dsv2_train.distributed.activity import Phase
from dsv2_train.distributed.sharding import Piece
from dsv2_train.train.run import Run

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


def after_step(run: Run) -> None:
    """Hear of the checkpoint that is under way, begin the one that is due.

    One that could not be written is tried again at once or, if it was to be written in the step
    itself, after the next one, with the state of then.

    Raises:
        SaveError: on every rank, when that fails too and a run is to stop then.

    Note:
        Collective over all ranks; does nothing where nothing is under way or due.
    """
    step = run.clock.step
    if run.checkpoints.under_way is None and not run.checkpoints.due(step):
        return
    go_on = run.config.checkpoint.on_failure == "go_on"
    with activity.phase(Phase.CHECKPOINT), run.telemetry.stopwatch.checkpoint():
        _apply_failure_policy(run, run.checkpoints.poll, go_on)
        if run.checkpoints.due(step):
            finish(run, go_on)
            _apply_failure_policy(run, lambda: run.checkpoints.save_async(*_state(run)), go_on)


def final_save(run: Run) -> Path:
    """Write a checkpoint of the current clock, after the one under way. Collective.

    Raises:
        SaveError: on every rank, when the checkpoint of this clock is not complete.
    """
    with activity.phase(Phase.CHECKPOINT):
        finish(run, go_on=True)
        try:
            return run.checkpoints.save(*_state(run))
        except SaveError as error:
            raise SaveError(f"{error}\n{_LAST}") from error


def finish(run: Run, go_on: bool) -> None:
    """Wait for the checkpoint that is under way, if one is. Collective.

    Raises:
        SaveError: on every rank, when it could not be written and the run is not to go on.
    """
    step, start_s = run.checkpoints.under_way, time.perf_counter()
    if step is None:
        return
    _apply_failure_policy(run, run.checkpoints.wait, go_on)
    waited_s = time.perf_counter() - start_s
    if run.monitor is not None and waited_s >= _WORTH_TELLING_S:
        run.monitor.message(
            f"step {run.clock.step}: waited {waited_s:.1f} s for the checkpoint of step {step}"
        )


def _apply_failure_policy(run: Run, work: Callable[[], Finished | None], go_on: bool) -> None:
    try:
        finished = work()
    except SaveError as error:
        will_retry = run.checkpoints.will_retry
        if not will_retry and not go_on:
            raise SaveError(f"step {run.clock.step}: {error}\n{_STOPS}") from error
        if run.monitor is not None:
            what_now = _RETRIES if will_retry else _GOES_ON
            told = f"step {run.clock.step}: {error}\n{what_now}"
            run.monitor.alert("checkpoint", told)
        return
    if finished is not None:
        run.telemetry.stopwatch.add_checkpoint_write(finished.elapsed_s)


def _state(run: Run) -> tuple[TrainState, list[Piece], str]:
    state = TrainState(
        step=run.clock.step,
        consumed_samples=run.clock.consumed_samples,
        consumed_tokens=run.schedule.consumed_tokens(run.clock),
        adam_step=run.optimizer.adam_step,
        wandb_run_id=run.monitor.wandb_run_id if run.monitor else None,
        skip_list=run.train_split.skip_list,
        corpus=run.train_split.sha256,
        guard=run.guard,
    )
    return state, list(run.optimizer.pieces()), to_yaml(run.config)
