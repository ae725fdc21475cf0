"""The clock of a run, and everything the recipe makes a function of it.

The training loop needs three lines:

    while not schedule.is_done(clock):
        point = schedule.at(clock)
        ...  # one step of point.global_batch_size samples at rate point.lr
        clock = clock.advance(point)
"""

from dataclasses import dataclass

from dsv2_train.config.sections.optim import OptimConfig
from dsv2_train.config.sections.recipe import RecipeConfig
from dsv2_train.recipe.batch_ramp import BatchTrace, batch_size_at, ramp_samples
from dsv2_train.recipe.lr_schedule import decay_milestones, learning_rate


@dataclass(frozen=True)
class Point:
    """What the recipe asks of one step.

    Attributes:
        lr: learning rate.
        global_batch_size: samples of the step.
        num_tokens: tokens of the step.
        recipe_stage: `warm-up`, `batch ramp`, `peak`, `decay 1`, `decay 2`, ...
    """

    lr: float
    global_batch_size: int
    num_tokens: int
    recipe_stage: str


@dataclass(frozen=True)
class Clock:
    """How far a run is; the whole of its schedule state.

    Attributes:
        step: steps done.
        consumed_samples: samples consumed by them.
    """

    step: int = 0
    consumed_samples: int = 0

    def advance(self, point: Point) -> "Clock":
        """The clock after the step that `point` describes."""
        return Clock(self.step + 1, self.consumed_samples + point.global_batch_size)


class Schedule:
    """Learning rate, batch size and end of a run as functions of its clock.

    Holds no state: a resumed run asks at its restored clock and replays nothing.

    Attributes:
        budget_tokens: `num_tokens` of the recipe, or what its `num_steps` steps consume from 0 on.
        milestones: consumed tokens at which the learning rate falls.
    """

    def __init__(self, recipe: RecipeConfig, optim: OptimConfig) -> None:
        self._recipe = recipe
        self._max_lr = optim.lr
        self._trace = BatchTrace(recipe)
        self.budget_tokens = _budget_tokens(recipe, self._trace)
        self.milestones = decay_milestones(recipe, self.budget_tokens)

    def at(self, clock: Clock) -> Point:
        """What the step that starts at `clock` does; defined past the end of the run too."""
        batch_size = batch_size_at(self._recipe, clock.consumed_samples)
        lr = learning_rate(
            self._recipe,
            self._max_lr,
            step=clock.step,
            consumed_tokens=self.consumed_tokens(clock),
            budget_tokens=self.budget_tokens,
        )
        num_tokens = batch_size * self._recipe.sequence_length
        return Point(lr, batch_size, num_tokens, self._recipe_stage(clock))

    def consumed_tokens(self, clock: Clock) -> int:
        """Tokens consumed at `clock`."""
        return clock.consumed_samples * self._recipe.sequence_length

    def is_done(self, clock: Clock) -> bool:
        """True at the end: `num_steps` if the recipe gives it, else the token budget."""
        if self._recipe.num_steps is not None:
            return clock.step >= self._recipe.num_steps
        return self.consumed_tokens(clock) >= self.budget_tokens

    def last_step(self, clock: Clock) -> int:
        """Steps done, from 0 on, when a run that is now at `clock` ends; past its end, those done.

        The recipe may have changed on the way: from `clock` on, the run follows this one.
        """
        if self._recipe.num_steps is not None:
            return max(self._recipe.num_steps, clock.step)
        trace = BatchTrace(self._recipe, clock.step, clock.consumed_samples)
        return trace.steps_to_consume(self.budget_tokens)

    def end(self, clock: Clock) -> Clock:
        """Clock at which a run that is now at `clock` ends."""
        trace = BatchTrace(self._recipe, clock.step, clock.consumed_samples)
        step = self.last_step(clock)
        return Clock(step, trace.consumed_samples(step))

    def clock_at(self, num_tokens: int) -> Clock:
        """Clock of a run from its beginning as soon as it has consumed `num_tokens` tokens."""
        step = self._trace.steps_to_consume(num_tokens)
        return Clock(step, self._trace.consumed_samples(step))

    def clock_at_step(self, step: int) -> Clock:
        """Clock when `step` steps of a run from its beginning are done."""
        return Clock(step, self._trace.consumed_samples(step))

    def _recipe_stage(self, clock: Clock) -> str:
        tokens = self.consumed_tokens(clock)
        reached = sum(tokens >= milestone for milestone in self.milestones)
        if clock.step < self._recipe.warmup_steps:
            return "warm-up"
        if reached:
            return f"decay {reached}"
        return "batch ramp" if clock.consumed_samples < ramp_samples(self._recipe) else "peak"


def _budget_tokens(recipe: RecipeConfig, trace: BatchTrace) -> int:
    if recipe.num_tokens is not None:
        return recipe.num_tokens
    if recipe.num_steps is None:
        raise ValueError("recipe: found neither num_steps nor num_tokens; one of them is needed")
    return trace.consumed_tokens(recipe.num_steps)
