"""Where a run goes on: the state of a checkpoint becomes that of a run."""

from pathlib import Path

from dsv2_train.checkpoint.disk.state import TrainState
from dsv2_train.checkpoint.manager import CheckpointManager
from dsv2_train.config.run import RunConfig
from dsv2_train.data.sampler import SkipList, joined
from dsv2_train.optim.zero import ZeroOptimizer
from dsv2_train.recipe.clock import Clock


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


def load_state(checkpoints: CheckpointManager, optimizer: ZeroOptimizer) -> TrainState | None:
    """Make weights, moments and Adam's step count those of the newest intact checkpoint.

    Returns:
        What else the checkpoint holds; None where there is none, and nothing was loaded.

    Note:
        Collective over all ranks.
    """
    state = checkpoints.restore(list(optimizer.pieces()))
    if state is not None:
        optimizer.adam_step = state.adam_step
        optimizer.after_load()
    return state


def clock_of(state: TrainState | None) -> Clock:
    """How far a run is that goes on with a state."""
    return Clock(state.step, state.consumed_samples) if state else Clock()


def skip_list_of(config: RunConfig, state: TrainState | None) -> SkipList:
    """What a run skips: what it has skipped before, and what it is told to."""
    return joined(state.skip_list if state else (), config.data.skip)
