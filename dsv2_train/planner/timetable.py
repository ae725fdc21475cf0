"""The recipe at chosen moments of a run: its turning points and any token count asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsv2_train.config.run import RunConfig
from dsv2_train.planner.layout import num_microbatches
from dsv2_train.recipe.batch_ramp import ramp_samples
from dsv2_train.recipe.clock import Clock, Schedule


@dataclass(frozen=True)
class Moment:
    """The step that starts at one moment of a run.

    Attributes:
        event: what happens there.
        step: steps done before it.
        consumed_samples: samples consumed before it.
        consumed_tokens: tokens consumed before it.
        lr: its learning rate.
        global_batch_size: its samples.
        num_microbatches: its microbatches on each pipeline.
        recipe_stage: as in `recipe.clock.Point`, or `done` after the last step.
    """

    event: str
    step: int
    consumed_samples: int
    consumed_tokens: int
    lr: float
    global_batch_size: int
    num_microbatches: int
    recipe_stage: str


def timetable(config: RunConfig, at_tokens: Sequence[int]) -> tuple[Moment, ...]:
    """Turning points of the recipe within the run, and moments asked for, in order.

    A token count stands for the first step that starts with at least as many tokens consumed.

    Args:
        config: the run.
        at_tokens: token counts asked for, >= 0; past the end of the run is allowed.
    """
    schedule = Schedule(config.recipe, config.optim)
    moments = [
        _moment(config, schedule, event, clock)
        for event, clock in _turning_points(config, schedule)
        if not schedule.is_done(clock)
    ]
    moments += [
        _moment(config, schedule, f"asked: {tokens:,}", schedule.clock_at(tokens))
        for tokens in at_tokens
    ]
    return tuple(sorted(moments, key=lambda moment: moment.step))


def _turning_points(config: RunConfig, schedule: Schedule) -> Iterator[tuple[str, Clock]]:
    recipe = config.recipe
    yield "first step", Clock()
    if recipe.warmup_steps:
        yield "warm-up over", schedule.clock_at_step(recipe.warmup_steps)
    if recipe.batch_ramp is not None:
        yield "batch ramp over", schedule.clock_at(ramp_samples(recipe) * recipe.sequence_length)
    for share, milestone in zip(recipe.decay_at, schedule.milestones, strict=True):
        yield f"decay at {100 * share:g}%", schedule.clock_at(milestone)
    yield "last step", schedule.clock_at_step(schedule.last_step(Clock()) - 1)


def _moment(config: RunConfig, schedule: Schedule, event: str, clock: Clock) -> Moment:
    point = schedule.at(clock)
    return Moment(
        event=event,
        step=clock.step,
        consumed_samples=clock.consumed_samples,
        consumed_tokens=schedule.consumed_tokens(clock),
        lr=point.lr,
        global_batch_size=point.global_batch_size,
        num_microbatches=num_microbatches(config, point.global_batch_size),
        recipe_stage="done" if schedule.is_done(clock) else point.recipe_stage,
    )
