"""When a run is saved, and what a checkpoint that cannot be written does to it."""

import time
from collections.abc import Callable
from pathlib import Path

from dsv2_train.checkpoint.background import Finished
from dsv2_train.checkpoint.disk.layout import CheckpointError
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
_GOES_ON = (
    "the run goes on; complete checkpoints are as they were, and the next one is tried in its time"
)


def after_step(run: Run) -> None:
    """Hear of the checkpoint that is under way, begin the one that is due.

    Raises:
        CheckpointError: on every rank, when one could not be written and a run is to stop then.

    Note:
        Collective over all ranks; does nothing where nothing is under way or due.
    """
    is_due = run.checkpoints.due(run.clock.step)
    if run.checkpoints.under_way is None and not is_due:
        return
    go_on = run.config.checkpoint.on_failure == "go_on"
    with activity.phase(Phase.CHECKPOINT), run.telemetry.stopwatch.checkpoint():
        _apply_failure_policy(run, run.checkpoints.poll, go_on)
        if is_due:
            finish(run, go_on)
            _apply_failure_policy(run, lambda: run.checkpoints.begin(*_state(run)), go_on)


def final_save(run: Run) -> Path:
    """Write a checkpoint of the current clock, after the one under way. Collective.

    Raises:
        CheckpointError: on every rank, when the checkpoint of this clock is not complete.
    """
    with activity.phase(Phase.CHECKPOINT):
        finish(run, go_on=True)
        return run.checkpoints.save(*_state(run))


def finish(run: Run, go_on: bool) -> None:
    """Wait for the checkpoint that is under way, if one is. Collective.

    Raises:
        CheckpointError: on every rank, when it could not be written and the run is not to go on.
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
    except CheckpointError as error:
        if not go_on:
            raise CheckpointError(f"step {run.clock.step}: {error}\n{_STOPS}") from error
        if run.monitor is not None:
            told = f"step {run.clock.step}: {error}\n{_GOES_ON}"
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
