"""Where a run goes on: the state of a checkpoint becomes that of a run."""

from dataclasses import replace
from pathlib import Path

from dsv2_train.checkpoint.disk.errors import CheckpointError
from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.config.run import RunConfig
from dsv2_train.data.sampler import SkipList, joined
from dsv2_train.optim.zero import ZeroOptimizer
from dsv2_train.recipe.clock import Clock
from dsv2_train.train.checkpointing import finish
from dsv2_train.train.run import Run


def begin_or_go_on(
    config: RunConfig, checkpoints: CheckpointManager, optimizer: ZeroOptimizer
) -> TrainState | None:
    """Load the newest intact checkpoint, or the weights that the run is to begin with.

    Returns:
        What else the checkpoint holds; None for a run that begins.

    Raises:
        CheckpointError: if every checkpoint is damaged, or the newest is of another model.

    Note:
        Collective over all ranks.
    """
    state = load_state(checkpoints, optimizer)
    if state is None and config.checkpoint.init_from is not None:
        checkpoints.initialize(Path(config.checkpoint.init_from), list(optimizer.weights()))
        optimizer.after_load()
    return state


def load_state(
    checkpoints: CheckpointManager, optimizer: ZeroOptimizer, at_most_step: int | None = None
) -> TrainState | None:
    """Make weights, moments and Adam's step count those of the newest intact checkpoint.

    Args:
        checkpoints: of the run.
        optimizer: of the run.
        at_most_step: as `CheckpointManager.restore` takes it.

    Returns:
        What else the checkpoint holds; None where there is none, and nothing was loaded.

    Note:
        Collective over all ranks.
    """
    state = checkpoints.restore(list(optimizer.pieces()), at_most_step)
    if state is not None:
        optimizer.adam_step = state.adam_step
        optimizer.after_load()
    return state


def roll_back(run: Run, step: int, last_step: int) -> None:
    """Go back to a checkpoint: all of the run but its skip list and its counts of bad steps.

    Args:
        run: what goes back; its rows after the checkpoint move aside, and so do checkpoints.
        step: to the newest checkpoint of this step or an earlier one.
        last_step: and, if there is none, of this step or an earlier one.

    Raises:
        CheckpointError: on every rank, if there is none, or all are damaged.

    Note:
        Collective over all ranks; a checkpoint under way is waited for.
    """
    with run.telemetry.stopwatch.checkpoint():
        finish(run, go_on=True)
        state = load_state(run.checkpoints, run.optimizer, step)
        if state is None:
            state = load_state(run.checkpoints, run.optimizer, last_step)
    if state is None:
        raise CheckpointError(f"there is no checkpoint of step {last_step} or an earlier one")
    run.clock = clock_of(state)
    run.guard = replace(run.guard, losses=state.guard.losses)
    if run.monitor is not None:
        run.monitor.rewind(state.step)
        for damage in run.checkpoints.passed_over:
            run.monitor.alert("checkpoint", damage)


def clock_of(state: TrainState | None) -> Clock:
    """How far a run is that goes on with a state."""
    return Clock(state.step, state.consumed_samples) if state else Clock()


def skip_list_of(config: RunConfig, state: TrainState | None) -> SkipList:
    """What a run skips: what it has skipped before, and what it is told to."""
    return joined(state.skip_list if state else (), config.data.skip)
